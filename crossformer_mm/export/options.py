"""Options of an export."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Optional, Sequence

from ..errors import UserError
from .onnx_file import NEEDED

SUFFIXES = {'onnx': '.onnx', 'torch-export': '.pt2'}


@dataclass
class Options:
    """Options of an export, named as those of tools/export.py, which explains them."""

    config: str
    out: str
    checkpoint: Optional[str] = None
    format: str = 'onnx'
    what: Optional[str] = None
    input_type: Optional[str] = None
    resize_inside: bool = False
    fixed_shape: Optional[Sequence[int]] = None
    int8: bool = False
    float16: bool = False
    logits: bool = False
    label_map: bool = False
    shape: Sequence[int] = (512, 512)
    threads: int = 1

    def check(self, scope: str) -> None:
        """Fill in ``what``, and check the options against each other.

        Args:
            scope: default_scope of the config.

        Raises:
            UserError: an option cannot work.
        """
        out, suffix = Path(self.out), SUFFIXES[self.format]
        if out.suffix != suffix:
            raise UserError(f"--out: '{self.out}' must end in {suffix} for --format {self.format}.")
        if not out.parent.is_dir():
            raise UserError(f"--out: folder '{out.parent}' does not exist.")
        for option, sides in (('--shape', self.shape), ('--fixed-shape', self.fixed_shape)):
            if sides and min(sides) < 1:
                given = ' '.join(map(str, sides))
                raise UserError(f'{option} must be two numbers of at least 1, got {given}.')
        if self.fixed_shape and self.format != 'onnx':
            raise UserError('--fixed-shape is for --format onnx only.')
        if self.int8 and self.float16:
            raise UserError(
                '--int8 and --float16 are two ways to store the same weights; give one.'
            )
        if (self.int8 or self.float16) and (
            self.format != 'onnx' or self.what not in ('model', None)
        ):
            raise UserError('--int8 and --float16 are for whole models as ONNX only.')
        if self.threads < 1:
            raise UserError(f'--threads must be at least 1, got {self.threads}.')
        absent = [name for name in NEEDED if find_spec(name) is None]
        if absent and self.format == 'onnx':
            raise UserError(
                f"--format {self.format} needs {', '.join(absent)}, which is not installed "
                f"(pip install {' '.join(absent)})."
            )
        if self.what is None:
            self.what = 'model' if self.format == 'onnx' else 'head'
        if self.what == 'model' and self.format != 'onnx':
            raise UserError(
                f'--format {self.format} has no operators for whole models; give --what head.'
            )
        if self.label_map and (scope != 'mmseg' or self.what != 'head'):
            raise UserError('--label-map is for --what head of segmentors only.')
        if self.logits and (scope != 'mmseg' or self.what != 'model'):
            raise UserError('--logits is for whole segmentors only.')
        if self.resize_inside and (
            self.what != 'model' or scope == 'mmpretrain' or self.fixed_shape
        ):
            raise UserError('--resize-inside is for whole detectors and segmentors of any size.')
        if self.input_type and self.what != 'model':
            raise UserError(
                f'--input-type is for whole models; --what {self.what} takes normalised images.'
            )
