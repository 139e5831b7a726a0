"""Vectors, images and patches to find again."""
