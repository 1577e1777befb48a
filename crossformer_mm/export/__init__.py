"""A model as one graph that runs without PyTorch, for images of any size or of one.

    model = exportable(backbone)                    # or a whole detector or segmentor
    program = export_any_size(model)                # torch.export.ExportedProgram
    torch.onnx.export(program, f='backbone.onnx')

``any_size``: the backbone with the image's size left open; ``operators``: what PyTorch's exporter
cannot say in ONNX by itself; ``models``: whole models, from pixels to boxes, masks or labels;
``onnx_file``: the file that they are written to.
"""

from ..compat import EXPORT, missing_torch

if missing_torch(EXPORT):
    raise ImportError(f'Export of a CrossFormer: {missing_torch(EXPORT)}.')

from .any_size import AnySizePool, export_any_size, exportable  # noqa: E402

__all__ = ['AnySizePool', 'export_any_size', 'exportable']
