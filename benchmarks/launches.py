"""Count the kernels that a backbone launches on a GPU, without one.

    python benchmarks/launches.py

For a small image a GPU takes less time than the host needs to launch its kernels, so that their
number decides. Each operator that computes something counts as one; a few launch several, such as
a convolution with a bias. Tensors have shapes and no content, and lie on the CPU under the rules of
CUDA's autocast. A fused attention counts as one in each pass. `mul`, `rand`, `add_`, `floor_` and
`div_` in training are stochastic depth's.

Writes benchmarks/launches.md. Needs Triton, and MMDetection for its Swin-T.
"""

from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from crossformer_mm import CrossFormer, block, exact, layers
from crossformer_mm.attention import GroupAttention
from crossformer_mm.kernels import bias, bias_triton, fused

SIZE = 800, 1216
CASES = {'float32': (False, False), 'AMP': (True, False), 'AMP, training': (True, True)}
KINDS = {
    'products and convolutions': 'addmm mm bmm baddbmm convolution convolution_backward',
    'norms': 'native_layer_norm native_layer_norm_backward',
    'attention': 'attention attention_backward',
    'position bias': 'forward_kernel backward_kernel',
    'casts': '_to_copy _foreach_copy_',
    'sums (gradients of biases)': 'sum',
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}


class Launches(TorchDispatchMode):
    """Counts operators that compute: neither views nor memory that is not written to."""

    def __init__(self):
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split('::')[1]
        views = any(a.alias_info and not a.alias_info.is_write for a in func._schema.arguments)
        if not views and 'empty' not in name and name not in ('device', '_unsafe_view'):
            self.counts[name] += 1
        return out


@contextmanager
def as_on_cuda(launches: Launches) -> Iterator[None]:
    """Make CrossFormer and autocast act on the CPU as on a GPU, without running a kernel."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, qkv, table):
            ctx.save_for_backward(qkv, table)
            launches.counts['attention'] += 1
            return qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)

        @staticmethod
        def backward(ctx, grad):
            launches.counts['attention_backward'] += 1
            return tuple(torch.empty_like(one) for one in ctx.saved_tensors)

    def attend(qkv, table, rows, columns, heads, scale, dropout, path):
        if path == 'plain':
            return map_attention(qkv, table, rows, columns, heads, scale, dropout, path)
        return Attention.apply(qkv, table)

    def launch(kernel, *args):
        launches.counts[kernel.__name__] += 1

    def in_float32(name: str, overload: str = ''):
        operator = getattr(getattr(torch.ops.aten, name), overload or 'default')

        def run(x: Tensor, *args, **kwargs):
            keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return operator(x.float(), *args, **kwargs)

        library.impl(f'{name}.{overload}' if overload else name, run, 'AutocastCPU')

    map_attention = GroupAttention.attend
    library = torch.library.Library('aten', 'IMPL')
    in_float32('layer_norm')
    in_float32('softmax', 'int')
    with (
        mock.patch.object(GroupAttention, 'attend', staticmethod(attend)),
        mock.patch.object(bias_triton, 'launch', launch),
        mock.patch.object(bias, 'is_intercepted', lambda *tensors: False),
        mock.patch.object(fused, 'why_no_triton', lambda device: ''),
        mock.patch.object(exact, 'is_observed', lambda: False),
        mock.patch.object(layers, 'onednn_suits', lambda x, weight: False),
        mock.patch.object(layers, 'joint_cast_dtype', layers.cast_dtype),
        mock.patch.object(layers, 'convolve_on_cpu', lambda convs, x: [conv(x) for conv in convs]),
        mock.patch.object(block, 'SUMS_ON', 'cpu'),
        mock.patch.object(layers.Mlp, 'takes_shortcut', lambda mlp, x: False),
    ):
        yield
    library._destroy()


def count(backbone: nn.Module, amp: bool, training: bool, size=SIZE) -> Dict[str, int]:
    """Launches of a forward pass, and of the backward pass if it trains, by operator."""
    launches = Launches()
    backbone.train(training)
    with FakeTensorMode(allow_non_fake_inputs=True), as_on_cuda(launches):
        image = torch.empty(1, 3, *size)
        with launches, torch.set_grad_enabled(training):
            with torch.autocast('cpu', torch.bfloat16, enabled=amp):
                outs = backbone(image)
        grads = [torch.empty_like(out) for out in outs]
        if training:
            with launches:
                torch.autograd.backward(outs, grads)
    backbone.zero_grad()
    return launches.counts


def table_of(counts: Dict[str, Dict[str, Dict[str, int]]]) -> str:
    """Markdown: launches of each model, and by kind."""
    lines = [f'| one image of {SIZE[0]}x{SIZE[1]} | ' + ' | '.join(CASES) + ' |']
    lines += ['|---|' + '---|' * len(CASES)]
    for name, cases in counts.items():
        totals = (str(sum(case.values())) for case in cases.values())
        lines += [f'| **{name}** | ' + ' | '.join(f'**{total}**' for total in totals) + ' |']
        for kind in (*KINDS, 'rest'):
            numbers = [
                sum(n for op, n in case.items() if KIND_OF.get(op, 'rest') == kind)
                for case in cases.values()
            ]
            lines += [f'| {kind} | ' + ' | '.join(map(str, numbers)) + ' |']
    return '\n'.join(lines) + '\n'


def main() -> None:
    from mmdet.models import SwinTransformer

    models = {
        'CrossFormer-S': CrossFormer('s', attention_path='fused'),
        "CrossFormer-S, attention_path='plain'": CrossFormer('s', attention_path='plain'),
        'Swin-T of MMDetection': SwinTransformer(),
    }
    counts = {
        name: {case: count(model, *flags) for case, flags in CASES.items()}
        for name, model in models.items()
    }
    table = table_of(counts)
    Path(__file__).with_suffix('.md').write_text(
        'Launches by `python benchmarks/launches.py`; training is forward and backward.\n\n' + table
    )
    print(table)


if __name__ == '__main__':
    main()
