"""Layers that hold codes and a codebook, and ways to run them."""
