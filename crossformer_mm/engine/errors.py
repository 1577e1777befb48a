"""Errors that say all that a user needs, in one sentence."""
import sys


class UserError(ValueError):
    """What tools end with, without a traceback."""


def said(error: Exception) -> str:
    """An error of a library as part of a sentence."""
    return ' '.join(f'{type(error).__name__}: {error}'.split()).rstrip('.')


def fail(sentence: str) -> None:
    """End the program with one sentence on stderr and exit status 2."""
    print(f'error: {sentence}', file=sys.stderr)
    sys.exit(2)
