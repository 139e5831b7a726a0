"""Augmentation of waveforms in the time domain, batched (arXiv 2007.00991)."""
