"""What the methods of ABX say of their arguments, in the words of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from remanence.errors import InputError

OPTIONS = {
    "check frame_rate": "check --frame-rate",
    "use distance 'identical'": "use --distance identical",
    "take context 'any'": "take --context any",
    "score 'within' alone": "take --speaker within alone",
}


@contextmanager
def in_options() -> Iterator[None]:
    """Name options, not arguments, in the messages of methods that are called inside.

    Raises:
        InputError: One was raised inside.
    """
    try:
        yield
    except InputError as error:
        said = str(error)
        for argument, option in OPTIONS.items():
            said = said.replace(argument, option)
        raise InputError(said) from error
