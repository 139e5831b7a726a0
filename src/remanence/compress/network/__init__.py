"""A whole network: what it multiplies, layer after layer, and the training that repairs it."""
