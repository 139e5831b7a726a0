"""Speech: waveforms augmented, representations learned from them, and measured."""
