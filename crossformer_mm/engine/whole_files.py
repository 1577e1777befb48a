"""Former place of :mod:`.atomic_checkpoints`, for importers that have not moved yet."""

from .atomic_checkpoints import *  # noqa: F403
from .atomic_checkpoints import FULL, TEMPLATES  # noqa: F401
