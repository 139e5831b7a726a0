"""The one error that a user is meant to read."""


class InputError(ValueError):
    """Something the user gave is wrong: the message names the thing and the mend, on one line.

    The command line prints it without a traceback and exits with status 2.
    """
