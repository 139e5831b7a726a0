"""Commands of `remanence learn`."""
