"""Former place of :mod:`crossformer_mm.errors`, for importers that have not moved yet."""

import sys

from ..errors import ConfigError, DataError, UserError, said  # noqa: F401


def fail(sentence: str) -> None:
    """End the program with an error message and status 2."""
    print(f'error: {sentence}', file=sys.stderr)
    sys.exit(2)
