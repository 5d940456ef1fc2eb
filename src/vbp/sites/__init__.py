"""Which channels of a model can be removed, found by following one forward pass."""
