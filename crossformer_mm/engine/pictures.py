"""Former place of :mod:`crossformer_mm.pictures`, for importers that have not moved yet."""

from ..pictures import as_picture, unique_names, write_image, write_labels  # noqa: F401
