"""Weights to codes and a codebook: the exact core."""
