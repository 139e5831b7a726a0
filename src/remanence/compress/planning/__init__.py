"""Which layers, how finely, in how many bytes."""
