"""The one error that a user is meant to read."""


class FoemError(ValueError):
    """What was found, where, and what to do next, in one line. The command line prints it and exits with code 1."""
