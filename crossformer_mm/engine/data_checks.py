"""Former place of :mod:`.dataset_checks`, for importers that have not moved yet."""

from .dataset_checks import check_files, explained_data  # noqa: F401
