"""Networks and their training: methods of the `learn` room."""
