"""Marking a data set so that training on it can be proved (arXiv 2002.00937)."""
