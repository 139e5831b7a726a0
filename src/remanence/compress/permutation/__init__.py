"""Channels reordered so that blocks hold alike weights."""
