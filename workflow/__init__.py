"""Running notebooks: their graph, one run, a batch of all for a model, and the data that they read."""
