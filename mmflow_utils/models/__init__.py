"""Models: the adapter to their parts, and how they get here from a folder or the hub."""
