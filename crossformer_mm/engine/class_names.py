"""Former place of :mod:`crossformer_mm.class_names`, for importers that have not moved yet."""

from ..class_names import drop_unnamed, names_and_colours, recorded  # noqa: F401
