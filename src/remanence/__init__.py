"""What data leaves behind in a network: fifteen published methods, one library, one command."""

from remanence.errors import InputError

__all__ = ["InputError"]
__version__ = "0.1.0"
