"""What is asked: samples, the readers of question files, and the one list of tasks.

A file that isn't what it should be stops the reading with one `ValueError`; a single question that can't be used, such
as one without its picture, is left out, and the reason is recorded.
"""
