"""What the sweep and the models cost, measured beside other ways and counted; none of the notebooks' numbers."""
