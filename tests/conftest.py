"""The order of tests."""


def pytest_collection_modifyitems(items):
    """Begin with the one that waits longest, for Slurm: others run beside it."""
    items.sort(key=lambda item: "slurm" not in item.keywords)
