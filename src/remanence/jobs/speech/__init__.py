"""Jobs of `remanence speech`: recordings to augment, to learn from, and to measure."""
