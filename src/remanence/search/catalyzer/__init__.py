"""Maps to the sphere that make a fixed code fit the data (arXiv 1806.03198)."""
