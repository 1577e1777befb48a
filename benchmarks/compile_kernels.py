"""Compile the Triton kernels for a GPU that need not be there, and say what they occupy.

    python benchmarks/compile_kernels.py
    python benchmarks/compile_kernels.py --kernel forward --tiles 64,64,4,2 128,64,8,2

Registers and bytes of stack (spills) per thread and shared memory per program are ptxas's; from
them follows how many warps a multiprocessor of that GPU can hold at once. The tiles in
crossformer_mm/kernels/fused_triton.py were chosen by this table.
"""

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from crossformer_mm.kernels import fused_triton

DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16, 'fp32': torch.float32}
# By kernel: members of the groups that it is for.
KERNELS = dict(
    forward=(49, 950),
    backward_groups=(49,),
    backward_queries=(950,),
    backward_keys=(950,),
    backward_pairs=(950,),
)
IN_DTYPE = ('qkv', 'out', 'grad_out', 'grad_qkv')
IN_FLOAT = ('table', 'norms', 'deltas', 'grad_pairs', 'grad_table')


def compile_kernel(
    name: str,
    dtype: str,
    tile: fused_triton.Tile,
    head_dim: int = 32,
    precision: str = 'ieee',
    capability: int = 90,
):
    """Triton's compiled kernel, for sizes of the image not known yet."""
    kernel = getattr(fused_triton, f'{name}_kernel')
    constants = dict(
        D=head_dim,
        BLOCK_D=fused_triton.block_size(head_dim),
        QUERIES=tile.queries,
        KEYS=tile.keys,
        MEMBERS=tile.keys,
        OFFSETS=64,
        PRECISION=precision,
    )
    signature, aligned = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in IN_DTYPE or argument in IN_FLOAT:
            signature[argument] = f"*{dtype if argument in IN_DTYPE else 'fp32'}"
            aligned[index,] = [['tt.divisibility', 16]]
        else:
            signature[argument] = (
                'constexpr' if argument in constants else 'fp32' if argument == 'scale' else 'i32'
            )
    constants = {key: constants[key] for key in kernel.arg_names if key in constants}
    return triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget('cuda', capability, 32),
        options=dict(num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True),
    )


def occupancy(compiled, warps: int) -> dict:
    """Registers and stack per thread, shared memory per program, warps per multiprocessor."""
    cuobjdump = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(compiled.asm['cubin'])
        file.flush()
        report = subprocess.run(
            [cuobjdump, '-res-usage', file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = map(int, re.search(r'REG:(\d+) STACK:(\d+)', report).groups())
    shared = compiled.metadata.shared
    programs = min(64 // warps, 65536 // (32 * warps * registers), 227 * 1024 // (shared + 1024))
    return dict(registers=registers, stack=stack, shared=shared, warps=programs * warps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--kernel', choices=KERNELS, nargs='+', default=list(KERNELS))
    parser.add_argument('--dtype', choices=DTYPES, nargs='+', default=['bf16', 'fp32'])
    parser.add_argument('--head-dim', type=int, default=32)
    parser.add_argument(
        '--precision', choices=('ieee', 'tf32'), default='ieee', help='of float32 products'
    )
    parser.add_argument(
        '--tiles',
        nargs='+',
        metavar='QUERIES,KEYS,WARPS,STAGES',
        help='tiles to try in place of the present ones',
    )
    options = parser.parse_args()
    if fused_triton.INTERPRETED:
        parser.error('TRITON_INTERPRET is set, with which Triton compiles nothing: unset it')
    print(
        f"{'kernel':17} {'dtype':5} {'members':>7} {'tile':>14} {'registers':>9} {'stack':>5} "
        f"{'shared':>7} {'warps/SM':>8}",
        flush=True,
    )
    for name in options.kernel:
        for dtype in options.dtype:
            for members in KERNELS[name]:
                tiles = [fused_triton.choose_tile(name, members, DTYPES[dtype])]
                if options.tiles:
                    tiles = [
                        fused_triton.Tile(*map(int, tile.split(','))) for tile in options.tiles
                    ]
                for tile in tiles:
                    compiled = compile_kernel(
                        name, dtype, tile, head_dim=options.head_dim, precision=options.precision
                    )
                    row = occupancy(compiled, tile.warps)
                    print(
                        f"{name:17} {dtype:5} {members:7} {','.join(map(str, tile)):>14} "
                        f"{row['registers']:9} {row['stack']:5} {row['shared']:7} "
                        f"{row['warps']:8}",
                        flush=True,
                    )
    if not options.tiles:
        compiled = compile_kernel('sum_pairs', 'fp32', fused_triton.Tile(64, 64, 4, 1))
        row = occupancy(compiled, 4)
        print(
            f"{'sum_pairs':17} {'fp32':5} {'any':>7} {'64,64,4,1':>14} {row['registers']:9} "
            f"{row['stack']:5} {row['shared']:7} {row['warps']:8}"
        )


if __name__ == '__main__':
    main()
