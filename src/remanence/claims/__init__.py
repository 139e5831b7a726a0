"""One file per paper: its claim shown small, with a control and a verdict."""
