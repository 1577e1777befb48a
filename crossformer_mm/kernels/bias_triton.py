"""The Triton kernels of :mod:`.bias`, and how they are launched. Imports triton.

A program computes the network for a tile of offsets, from the first layer to the table, and keeps
everything between in registers. The backward pass computes it again. Each of its programs sums
the gradients of its own tiles; their sums are added afterwards, in a fixed order.
"""

from typing import Sequence, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 16  # offsets; of more, a wide network's numbers do not fit in registers
# What comes with the image: no kernel may be compiled for each.
SIZES = ['rows', 'columns', 'tiles', 'programs']
PROGRAMS = 64  # of the backward pass, at most: each one's sums are written and read once


@triton.jit
def load_vector(start, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK,), 0 beyond COUNT."""
    i = tl.arange(0, BLOCK)
    return tl.load(start + i, mask=i < COUNT, other=0.0)


@triton.jit
def load_matrix(
    start, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """(BLOCK_ROWS, BLOCK_COLUMNS), 0 beyond ROWS and COLUMNS."""
    r, c = tl.arange(0, BLOCK_ROWS)[:, None], tl.arange(0, BLOCK_COLUMNS)[None, :]
    return tl.load(start + r * COLUMNS + c, mask=(r < ROWS) & (c < COLUMNS), other=0.0)


@triton.jit
def store_vector(start, values, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The reverse of load_vector."""
    i = tl.arange(0, BLOCK)
    tl.store(start + i, values, mask=i < COUNT)


@triton.jit
def store_layer(
    start, gamma, beta, weight, bias, OUT: tl.constexpr, P: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a layer's parameters one after another."""
    store_vector(start, gamma, P, BLOCK_P)
    store_vector(start + P, beta, P, BLOCK_P)
    r, c = tl.arange(0, BLOCK_OUT)[:, None], tl.arange(0, BLOCK_P)[None, :]
    tl.store(start + 2 * P + r * P + c, weight, mask=(r < OUT) & (c < P))
    store_vector(start + (2 + OUT) * P, bias, OUT, BLOCK_OUT)


@triton.jit
def locate_offsets(tile, rows, columns, TILE: tl.constexpr):
    """Numbers of a tile's offsets, row-major, and their rows and columns from the centre."""
    number = tile * TILE + tl.arange(0, TILE)
    row = (number // columns - rows // 2).to(tl.float32)
    column = (number % columns - columns // 2).to(tl.float32)
    return number, row, column


@triton.jit
def project(row, column, weight, bias, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """(TILE, BLOCK_P): the first linear layer."""
    p = tl.arange(0, BLOCK_P)
    of_row = tl.load(weight + 2 * p, mask=p < P, other=0.0)
    of_column = tl.load(weight + 2 * p + 1, mask=p < P, other=0.0)
    x = row[:, None] * of_row[None, :] + column[:, None] * of_column[None, :]
    return x + load_vector(bias, P, BLOCK_P)[None, :]


@triton.jit
def normalise(x, EPS: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """LayerNorm without its parameters, and 1 / the deviations."""
    centred = x - (tl.sum(x, 1) / P)[:, None]
    centred = tl.where(tl.arange(0, BLOCK_P)[None, :] < P, centred, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / P + EPS)
    return centred * scale[:, None], scale


@triton.jit
def activate(normal, gamma, beta, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """LayerNorm's parameters, then ReLU, after which NaN is still NaN."""
    out = normal * load_vector(gamma, P, BLOCK_P)[None, :] + load_vector(beta, P, BLOCK_P)[None, :]
    return tl.where(out < 0, 0.0, out)


@triton.jit
def multiply(
    x, weight, bias,
    OUT: tl.constexpr, P: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A linear layer in float32."""
    matrix = load_matrix(weight, OUT, P, BLOCK_OUT, BLOCK_P)
    product = tl.dot(x, tl.trans(matrix), input_precision='ieee')
    return product + load_vector(bias, OUT, BLOCK_OUT)[None, :]


@triton.jit
def layer(
    x, gamma, beta, weight, bias, EPS: tl.constexpr, OUT: tl.constexpr, P: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """LayerNorm, ReLU and a linear layer: output, and what :func:`differentiate` takes."""
    normal, scale = normalise(x, EPS, P, BLOCK_P)
    hidden = activate(normal, gamma, beta, P, BLOCK_P)
    return multiply(hidden, weight, bias, OUT, P, BLOCK_OUT, BLOCK_P), hidden, normal, scale


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    table, rows, columns,
    weight0, bias0, gamma1, beta1, weight1, bias1, gamma2, beta2, weight2, bias2,
    gamma3, beta3, weight3, bias3,
    RESIDUAL: tl.constexpr, EPS: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_HEADS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Bias of a tile of offsets, (heads, rows, columns) in all."""
    number, row, column = locate_offsets(tl.program_id(0), rows, columns, TILE)
    x = project(row, column, weight0, bias0, P, BLOCK_P)
    out, _, _, _ = layer(x, gamma1, beta1, weight1, bias1, EPS, P, P, BLOCK_P, BLOCK_P)
    x = x + out if RESIDUAL else out
    out, _, _, _ = layer(x, gamma2, beta2, weight2, bias2, EPS, P, P, BLOCK_P, BLOCK_P)
    x = x + out if RESIDUAL else out
    out, _, _, _ = layer(x, gamma3, beta3, weight3, bias3, EPS, HEADS, P, BLOCK_HEADS, BLOCK_P)
    count = rows * columns
    head = tl.arange(0, BLOCK_HEADS)
    tl.store(
        table + head[None, :] * count + number[:, None],
        out,
        mask=(number < count)[:, None] & (head < HEADS)[None, :],
    )


@triton.jit
def differentiate(
    grad, hidden, normal, scale, gamma, weight, OUT: tl.constexpr, P: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """From the gradient of a layer's output to those of its input and, of this tile, of gamma,
    beta, weight and bias."""
    matrix = load_matrix(weight, OUT, P, BLOCK_OUT, BLOCK_P)
    grad_weight = tl.dot(tl.trans(grad), hidden, input_precision='ieee')
    grad_hidden = tl.dot(grad, matrix, input_precision='ieee')
    grad_hidden = tl.where(hidden <= 0, 0.0, grad_hidden)
    grad_normal = grad_hidden * load_vector(gamma, P, BLOCK_P)[None, :]
    mean = tl.sum(grad_normal, 1) / P
    along = tl.sum(grad_normal * normal, 1) / P
    grad_x = (grad_normal - mean[:, None] - normal * along[:, None]) * scale[:, None]
    grad_x = tl.where(tl.arange(0, BLOCK_P)[None, :] < P, grad_x, 0.0)
    return (
        grad_x,
        tl.sum(grad_hidden * normal, 0),
        tl.sum(grad_hidden, 0),
        grad_weight,
        tl.sum(grad, 0),
    )


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    grad_table, sums, rows, columns, tiles, programs,
    weight0, bias0, gamma1, beta1, weight1, bias1, gamma2, beta2, weight2, bias2,
    gamma3, beta3, weight3, bias3,
    RESIDUAL: tl.constexpr, EPS: tl.constexpr, P: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_HEADS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of the parameters from every ``programs``-th tile, one after another in sums."""
    program = tl.program_id(0)
    count = rows * columns
    head = tl.arange(0, BLOCK_HEADS)
    d_row = tl.zeros([BLOCK_P], tl.float32)
    d_column = tl.zeros([BLOCK_P], tl.float32)
    d_bias0 = tl.zeros([BLOCK_P], tl.float32)
    d_gamma1 = tl.zeros([BLOCK_P], tl.float32)
    d_beta1 = tl.zeros([BLOCK_P], tl.float32)
    d_weight1 = tl.zeros([BLOCK_P, BLOCK_P], tl.float32)
    d_bias1 = tl.zeros([BLOCK_P], tl.float32)
    d_gamma2 = tl.zeros([BLOCK_P], tl.float32)
    d_beta2 = tl.zeros([BLOCK_P], tl.float32)
    d_weight2 = tl.zeros([BLOCK_P, BLOCK_P], tl.float32)
    d_bias2 = tl.zeros([BLOCK_P], tl.float32)
    d_gamma3 = tl.zeros([BLOCK_P], tl.float32)
    d_beta3 = tl.zeros([BLOCK_P], tl.float32)
    d_weight3 = tl.zeros([BLOCK_HEADS, BLOCK_P], tl.float32)
    d_bias3 = tl.zeros([BLOCK_HEADS], tl.float32)
    for tile in range(program, tiles, programs):
        number, row, column = locate_offsets(tile, rows, columns, TILE)
        x = project(row, column, weight0, bias0, P, BLOCK_P)
        out, hidden1, normal1, scale1 = layer(
            x, gamma1, beta1, weight1, bias1, EPS, P, P, BLOCK_P, BLOCK_P
        )
        x = x + out if RESIDUAL else out
        out, hidden2, normal2, scale2 = layer(
            x, gamma2, beta2, weight2, bias2, EPS, P, P, BLOCK_P, BLOCK_P
        )
        x = x + out if RESIDUAL else out
        _, hidden3, normal3, scale3 = layer(
            x, gamma3, beta3, weight3, bias3, EPS, HEADS, P, BLOCK_HEADS, BLOCK_P
        )
        grad = tl.load(
            grad_table + head[None, :] * count + number[:, None],
            mask=(number < count)[:, None] & (head < HEADS)[None, :],
            other=0.0,
        )
        grad, gamma, beta, weight, bias = differentiate(
            grad, hidden3, normal3, scale3, gamma3, weight3, HEADS, P, BLOCK_HEADS, BLOCK_P
        )
        d_gamma3 += gamma
        d_beta3 += beta
        d_weight3 += weight
        d_bias3 += bias
        before, gamma, beta, weight, bias = differentiate(
            grad, hidden2, normal2, scale2, gamma2, weight2, P, P, BLOCK_P, BLOCK_P
        )
        d_gamma2 += gamma
        d_beta2 += beta
        d_weight2 += weight
        d_bias2 += bias
        grad = grad + before if RESIDUAL else before
        before, gamma, beta, weight, bias = differentiate(
            grad, hidden1, normal1, scale1, gamma1, weight1, P, P, BLOCK_P, BLOCK_P
        )
        d_gamma1 += gamma
        d_beta1 += beta
        d_weight1 += weight
        d_bias1 += bias
        grad = grad + before if RESIDUAL else before
        d_row += tl.sum(grad * row[:, None], 0)
        d_column += tl.sum(grad * column[:, None], 0)
        d_bias0 += tl.sum(grad, 0)

    start = sums + program * (P * (2 * P + HEADS + 11) + HEADS)
    p = tl.arange(0, BLOCK_P)
    tl.store(start + 2 * p, d_row, mask=p < P)
    tl.store(start + 2 * p + 1, d_column, mask=p < P)
    store_vector(start + 2 * P, d_bias0, P, BLOCK_P)
    start += 3 * P
    store_layer(start, d_gamma1, d_beta1, d_weight1, d_bias1, P, P, BLOCK_P, BLOCK_P)
    start += (3 + P) * P
    store_layer(start, d_gamma2, d_beta2, d_weight2, d_bias2, P, P, BLOCK_P, BLOCK_P)
    start += (3 + P) * P
    store_layer(start, d_gamma3, d_beta3, d_weight3, d_bias3, HEADS, P, BLOCK_HEADS, BLOCK_P)


def forward(
    height: int, width: int, parameters: Sequence[Tensor], residual: bool, eps: float
) -> Tensor:
    """Bias (heads, 2*height-1, 2*width-1) in float32.

    Args:
        height, width (int): members of a group.
        parameters (Sequence[Tensor]): of a DynamicPositionBias, in its order, in float32.
        residual (bool), eps (float): its options.
    """
    rows, columns = 2 * height - 1, 2 * width - 1
    table = parameters[-1].new_empty(len(parameters[-1]), rows, columns)
    programs = triton.cdiv(rows * columns, TILE)
    launch(forward_kernel, programs, (table, rows, columns), parameters, residual, eps)
    return table


def backward(
    grad_table: Tensor, parameters: Sequence[Tensor], residual: bool, eps: float
) -> Tuple[Tensor, ...]:
    """Gradients of the parameters."""
    _, rows, columns = grad_table.shape
    tiles = triton.cdiv(rows * columns, TILE)
    programs = min(tiles, PROGRAMS)
    sizes = [parameter.numel() for parameter in parameters]
    sums = grad_table.new_empty(programs, sum(sizes))
    arguments = grad_table.contiguous(), sums, rows, columns, tiles, programs
    launch(backward_kernel, programs, arguments, parameters, residual, eps)
    grads = sums.sum(0).split(sizes)
    return tuple(grad.view(one.shape) for grad, one in zip(grads, parameters))


def launch(kernel, programs: int, arguments, parameters, residual: bool, eps: float) -> None:
    """Run a kernel."""
    heads, width = parameters[-2].shape
    with torch.cuda.device_of(parameters[0]):  # Triton launches on the current one
        kernel[(programs,)](
            *arguments,
            *parameters,
            RESIDUAL=residual,
            EPS=eps,
            P=width,
            HEADS=heads,
            BLOCK_P=max(16, triton.next_power_of_2(width)),  # of which tl.dot takes 16 or more
            BLOCK_HEADS=max(16, triton.next_power_of_2(heads)),
            TILE=TILE,
            num_warps=8 if width > 32 else 4,
        )
