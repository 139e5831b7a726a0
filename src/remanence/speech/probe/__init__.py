"""Probes: what frozen features of frames tell, with few or many labels."""
