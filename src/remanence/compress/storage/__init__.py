"""One safe file, and the formats of others."""
