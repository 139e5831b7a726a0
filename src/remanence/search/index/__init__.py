"""An index of codes: stored in a few bytes a vector, searched with plain queries."""
