"""Contrastive predictive coding of speech (arXiv 1807.03748, 2002.02848, 2007.00991)."""
