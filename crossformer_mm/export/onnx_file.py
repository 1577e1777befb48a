"""Exported programs as ONNX files of standard operators, with metadata for the runtime."""

import re
from collections import Counter
from pathlib import Path
from typing import Callable, Dict, Iterable, Mapping, Sequence

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
        onnx.ModelProto: with one graph of standard operators and no functions.
    """
    import onnx
    import onnx.inliner

    used: Dict[str, str] = {}
    exported = torch.onnx.export(
        program,
        input_names=list(inputs),
        output_names=list(outputs),
        verbose=False,
        optimize=False,  # which compares each operator with hundreds of patterns
        custom_translation_table={
            operator: translation(to_onnx, used)
            for operator, to_onnx in operators.TRANSLATIONS.items()
        },
    )
    proto = exported.model_proto
    name_dimensions(proto, inputs)
    if used:
        opset = next(one.version for one in proto.opset_import if not one.domain)
        imports = f'["" : {opset}, "{operators.DOMAIN}" : 1]'
        for text in dict.fromkeys([*operators.HELPERS, *used.values()]):
            proto.functions.append(
                onnx.parser.parse_function(
                    f'<opset_import: {imports}, domain: "{operators.DOMAIN}">{text}'
                )
            )
        proto = onnx.inliner.inline_local_functions(proto)
        ours = [one for one in proto.opset_import if one.domain == operators.DOMAIN]
        for one in ours:
            proto.opset_import.remove(one)
    proto = simplify(proto)
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


def translation(to_onnx: Callable, used: Dict[str, str]) -> Callable:
    """Return the exporter's function for one operator; it notes the ONNX functions that it calls.

    Args:
        to_onnx: of a module of :mod:`.operators`.
        used: texts of the functions that were called, by their names; added to.
    """
    from onnxscript import values

    domain = values.Opset(operators.DOMAIN, 1)

    def call(text: str, inputs: Sequence, **attributes):
        name = text.split()[0]
        used[name] = text
        return values.Op(domain, name, schema_of(name, attributes))(*inputs, **attributes)

    # The exporter reads the signature, so that it has to be one of any arguments.
    def translate(*args):
        return to_onnx(call, *args)

    return translate


def schema_of(name: str, attributes: Mapping[str, object]):
    """Make a schema that takes any number of tensors of any types."""
    from onnx.defs import OpSchema

    kinds = {
        int: OpSchema.AttrType.INT,
        float: OpSchema.AttrType.FLOAT,
        str: OpSchema.AttrType.STRING,
    }
    option = OpSchema.FormalParameterOption.Variadic
    known = ('float', 'float16', 'int64', 'int32', 'uint8', 'bool')
    types = [f'tensor({kind})' for kind in known]
    return OpSchema(
        name,
        operators.DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter('x', 'T', param_option=option, is_homogeneous=False)],
        outputs=[OpSchema.FormalParameter('y', 'U')],
        type_constraints=[('T', types, ''), ('U', types, '')],
        attributes=[
            OpSchema.Attribute(key, kinds[type(value)], '') for key, value in attributes.items()
        ],
    )


def name_dimensions(proto, inputs: Mapping[str, Mapping[int, str]]) -> None:
    """Rename the open dimensions of inputs, wherever they occur."""
    symbols = {}
    for value in proto.graph.input:
        for axis, name in inputs[value.name].items():
            symbols[value.type.tensor_type.shape.dim[axis].dim_param] = name
    if not symbols:
        return
    known = re.compile('|'.join(map(re.escape, symbols)))
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = known.sub(lambda found: symbols[found[0]], dim.dim_param)


def count_operators(proto) -> Counter:
    """Count each operator; those in loops count once."""
    import onnx

    found: Counter = Counter()

    def count(graph):
        for node in graph.node:
            found[node.op_type] += 1
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    count(attribute.g)

    count(proto.graph)
    return found
