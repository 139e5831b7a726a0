"""Jobs of `remanence search`: vectors in a few bytes, images and patches to find again."""
