"""Former place of :mod:`crossformer_mm.cli`, for importers that have not moved yet."""

from ..cli import argument_parser, exit_on, read_config, run  # noqa: F401
from ..config_parts import data_sets, innermost, kind_of, metrics_of  # noqa: F401
from ..errors import UserError, said  # noqa: F401
from ..files import check_writable, write_whole  # noqa: F401
from .config import (  # noqa: F401
    DENSE,
    SCOPES,
    ensure_visualizer,
    load_config,
    prepare_for_cpu,
    replace_data_root,
)
from .errors import fail  # noqa: F401
from .preflight import check_dataset, check_file  # noqa: F401
from .runner import build_runner  # noqa: F401

sentences_for, let_draw = exit_on, ensure_visualizer
