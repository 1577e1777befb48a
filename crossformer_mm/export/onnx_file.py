"""Exported programs as ONNX files of standard operators, with metadata for the runtime."""

from collections import Counter
from pathlib import Path
from typing import Callable, Iterable, Mapping, Sequence

import torch
from torch.export import ExportedProgram

from . import operators

NEEDED = ('onnx', 'onnxscript', 'onnxruntime')


def to_onnx(
    program: ExportedProgram,
    inputs: Mapping[str, Mapping[int, str]],
    outputs: Sequence[str],
    metadata: Mapping[str, str],
):
    """Convert a program, its operators of :mod:`.operators` included.

    Args:
        program (ExportedProgram): of :func:`.any_size.export_any_size`.
        inputs: names of the inputs, and of each the names of its open dimensions by their number.
        outputs: names of the outputs.
        metadata: of the file, as texts.

    Returns:
        onnx.ModelProto: with one graph of standard operators.
    """
    import onnx
    from onnxscript import opset18  # also that of PyTorch's own functions

    exported = torch.onnx.export(
        program,
        input_names=list(inputs),
        output_names=list(outputs),
        dynamic_shapes=tuple(inputs.values()),
        verbose=False,
        optimize=False,  # which compares each operator with hundreds of patterns
        custom_translation_table={
            operator: translation(to_onnx, opset18)
            for operator, to_onnx in operators.TRANSLATIONS.items()
        },
    )
    proto = simplify(exported.model_proto)
    onnx.helper.set_model_props(proto, dict(metadata))
    return proto


def simplify(proto):
    """Fold constants, and remove duplicates and unused nodes."""
    import onnx_ir
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants

    model = onnx_ir.from_proto(proto)
    fold_constants(model)
    for step in (
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.ClearMetadataAndDocStringPass(),  # lines of code and paths of this machine
    ):
        step(model)
    return onnx_ir.to_proto(model)


def leave_out(proto, outputs: Iterable[str]) -> None:
    """Remove outputs, in place."""
    for output in [output for output in proto.graph.output if output.name in set(outputs)]:
        proto.graph.output.remove(output)


def write_onnx(proto, path: Path) -> None:
    import onnx

    onnx.save(proto, path)


def translation(to_onnx: Callable, op) -> Callable:
    """Return the exporter's function for one operator, of a module of :mod:`.operators`."""
    # The exporter derives a schema from the signature, and any arguments fit this one.
    return lambda *args: to_onnx(op, *args)


def count_operators(proto) -> Counter:
    """Count each operator; those in loops count once."""
    import onnx_ir

    return Counter(node.op_type for node in onnx_ir.from_proto(proto).graph.all_nodes())
