"""Former place of :mod:`.overrides` and of ``--cfg-options``, for importers that have not moved."""

from ..cli import add_cfg_options  # noqa: F401
from .overrides import check_keys  # noqa: F401
