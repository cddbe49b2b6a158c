"""What is asked: samples, the readers of question files, and the one list of tasks."""
