"""Errors whose message is all that a user needs."""


class UserError(ValueError):
    """A mistake of the user's: which option or file, what was wrong, what is allowed.

    Commands print the message alone and end with status 2.
    """


def said(error: BaseException) -> str:
    """Format an error of a library as part of a message."""
    return ' '.join(f'{type(error).__name__}: {error}'.split()).rstrip('.')
