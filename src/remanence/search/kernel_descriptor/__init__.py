"""Kernel local descriptors of grey patches, and their whitening (arXiv 1811.11147)."""
