"""One file per command: opens inputs, calls methods, writes a run folder."""
