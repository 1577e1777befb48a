"""Errors that say all that a user needs, in one sentence."""


class UserError(ValueError):
    """What tools end with, without a traceback."""


def said(error: Exception) -> str:
    """An error of a library as part of a sentence."""
    return ' '.join(f'{type(error).__name__}: {error}'.split()).rstrip('.')
