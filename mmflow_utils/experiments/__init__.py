"""From samples to a frame: one loop, and what each experiment of the paper measures."""
