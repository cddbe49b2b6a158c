"""Where things stand: named positions of a prompt, flows between them, and samples as tensors."""
