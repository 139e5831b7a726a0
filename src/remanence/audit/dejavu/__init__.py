"""Dataset detection, explicit memorisation and membership from lower layers (arXiv 1809.06396)."""
