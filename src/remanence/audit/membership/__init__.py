"""Membership inference: was this sample in the training set (arXiv 1908.11229)."""
