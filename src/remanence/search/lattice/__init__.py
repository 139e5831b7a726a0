"""Codes without a codebook: points of a fixed set on the sphere (arXiv 1806.03198, section 4)."""
