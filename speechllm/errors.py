"""Errors that the person who runs a program can mend."""


class UserError(ValueError):
    """Says what is wrong, where, and what to do; the command-line programs show it without a traceback."""
