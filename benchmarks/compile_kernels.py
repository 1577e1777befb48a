"""Compile the Triton kernels for GPUs that need not be there, and say what they cost.

    python benchmarks/compile_kernels.py --out benchmarks/compiled_kernels.md
    python benchmarks/compile_kernels.py --kernels forward --tiles 64,64,4,2 128,64,8,2

Both passes run as they do on a GPU, but launches do nothing: what is compiled, and for which
arguments, is what Triton's own cache would hold. Printed are, of each kernel:

registers, stack   of a thread, by ptxas; a stack means spilled registers
shared             bytes of shared memory of a program
warps/SM           warps that a multiprocessor with the registers and shared memory of sm_90 holds
instructions       of the main loop, counted in SASS: of one warp for 1,024 pairs of query and key,
                   which is its share of a tile of 64x64 in 4 warps. Not counted are branches that
                   only ragged groups and last blocks take

The tiles in crossformer_mm/kernels/triton_launch.py were chosen by this table.
"""

import argparse
import re
import subprocess
import tempfile
from itertools import product
from pathlib import Path
from typing import Dict, Iterator, List

import networkx
import torch
import triton
from stand_in_gpu import pretend

from crossformer_mm.grouping import AxisRule
from crossformer_mm.kernels import fused_triton, triton_launch
from crossformer_mm.kernels.triton_launch import Tile

DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': torch.float32}
# Sides of the groups: of long and of short distance attention at 800x1216.
SIDES = (25, 38), (7, 7)
KERNELS = (
    *('forward', 'forward_groups', 'fill_strips', 'backward_queries', 'backward_keys'),
    *('backward_pairs', 'backward_groups', 'sum_pairs'),
)
COLUMNS = 'kernel type head arch tile registers stack shared warps/SM instructions'.split()


def compile_all(dtype: torch.dtype, head_dim: int, capability: int) -> Dict[str, tuple]:
    """Both passes over a small and a large group: compiled kernels and their constants, by name."""
    pretend(capability)
    for rows, columns in SIDES:
        qkv = torch.zeros(1, rows, columns, 3 * head_dim, dtype=dtype)
        table = torch.zeros(1, 2 * rows - 1, 2 * columns - 1)
        arguments = AxisRule(rows, 1), AxisRule(columns, 1), 1, 1.0
        out, norms = fused_triton.forward(qkv, table, *arguments)
        fused_triton.backward(out, qkv, table, out, norms, *arguments)
    return {
        key[0].removesuffix('_kernel'): (key, compiled)
        for key, (compiled, _) in triton_launch.COMPILED.items()
    }


def run_tool(name: str, cubin: bytes, *options: str) -> str:
    """Run a CUDA tool that Triton carries on a compiled kernel and return its output."""
    tool = Path(triton.__file__).parent / 'backends/nvidia/bin' / name
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, *options, file.name], capture_output=True, text=True, check=True
        ).stdout


def loop_lengths(sass: str) -> Iterator[int]:
    """Instructions of each loop on the shortest way through it."""
    lines: List[str] = []
    labels: Dict[str, int] = {}
    for line in sass.splitlines():
        label = re.match(r'\s*(\.L_\w+):', line)
        instruction = re.match(r'\s*/\*[0-9a-f]+\*/\s+(.*?);', line)
        if label:
            labels[label[1]] = len(lines)
        elif instruction:
            lines.append(instruction[1])
    jumps = {
        index: labels[target[1]]
        for index, line in enumerate(lines)
        if (target := re.search(r'\bBRA\b.*?`\((\.L_\w+)\)', line)) and target[1] in labels
    }
    flow = networkx.DiGraph(jumps.items())
    for index, line in enumerate(lines):
        if index not in jumps or line.startswith('@') or re.search(r'BRA\S* !?U?P', line):
            flow.add_edge(index, index + 1)
    for last, start in jumps.items():
        loop = flow.subgraph(range(start, last + 1))
        if start < last and networkx.has_path(loop, start, last):
            yield networkx.shortest_path_length(loop, start, last) + 1


def describe(name: str, dtype: str, head_dim: int, arch: int, key: tuple, compiled) -> tuple:
    """A row of the table."""
    constants, (warps, stages) = key[2:4]
    cubin = compiled.asm['cubin']
    usage = run_tool('cuobjdump', cubin, '-res-usage')
    registers, stack = map(int, re.search(r'REG:(\d+) STACK:(\d+)', usage).groups())
    shared = compiled.metadata.shared
    programs = min(64 // warps, 65536 // (32 * warps * registers), 227 * 1024 // (shared + 1024))
    tile, instructions = ('', '') if name in ('fill_strips', 'sum_pairs') else ('?', '?')
    if tile:
        sides = (constants[2:-1] * 2)[:2]  # a small group has one
        tile = ','.join(map(str, (*sides, warps, stages)))
        loop = max(loop_lengths(run_tool('nvdisasm', cubin, '-c')))
        instructions = round(loop * 1024 * warps / (sides[0] * sides[1]))
    return (
        *(name, dtype, head_dim, f'sm_{arch}', tile, registers, stack, shared),
        *(programs * warps, instructions),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--kernels', choices=KERNELS, nargs='+', default=KERNELS)
    parser.add_argument('--dtypes', choices=DTYPES, nargs='+', default=list(DTYPES))
    parser.add_argument('--head-dims', type=int, nargs='+', default=[32, 64])
    parser.add_argument('--archs', type=int, nargs='+', default=[80, 86, 90], metavar='ARCH')
    parser.add_argument(
        '--tiles',
        nargs='+',
        metavar='QUERIES,KEYS,WARPS,STAGES',
        help='tiles to try in large groups instead of the present ones',
    )
    parser.add_argument('--out', type=Path, help='Markdown file to write the table to')
    options = parser.parse_args()
    if triton_launch.INTERPRETED:
        parser.error('TRITON_INTERPRET is set, with which Triton compiles nothing: unset it')
    table = []

    def add(cells) -> None:
        table.append(f'| {" | ".join(map(str, cells))} |')
        print(table[-1], flush=True)

    add(COLUMNS)
    table.append('| --- ' * len(COLUMNS) + '|')
    for tile in options.tiles or ['']:
        if tile:
            for tiles in (triton_launch.TILES, triton_launch.WIDE_TILES):
                tiles.update(dict.fromkeys(tiles, Tile(*map(int, tile.split(',')))))
        for case in product(options.dtypes, options.head_dims, options.archs):
            kernels = compile_all(DTYPES[case[0]], *case[1:])
            for name in KERNELS:
                if name in options.kernels and name in kernels:
                    add(describe(name, *case, *kernels[name]))
    if options.out:
        lines = '\n'.join(table)
        options.out.write_text(
            f'# Compiled Triton kernels\n\nWritten by `benchmarks/compile_kernels.py`, which says '
            f'what the columns mean, with Triton {triton.__version__}. Groups of 25x38 and 7x7 '
            f'members.\n\n{lines}\n'
        )


if __name__ == '__main__':
    main()
