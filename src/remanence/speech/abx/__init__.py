"""ABX discriminability of speech representations."""
