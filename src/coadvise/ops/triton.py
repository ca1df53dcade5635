# mypy: disable-error-code="no-untyped-def"
"""Involution and its gradients on CUDA devices: Triton kernels for any strides, so for either memory layout.

A row of outputs is a product with a banded matrix. Per output row i and tap row u, with q running over input columns,

    out[j, c] = sum_q band[j, q] * x[q, c],    band[j, q] = weight[u, q - j * stride + pad]  where that is a tap, else 0

which tensor cores compute with float32 sums. The band costs products with zeros, but they are cheap there, while the
memory traffic, which is the limit, falls: a program makes an output tile of some rows by some columns, reads each input
row of its window once for all of them, and every weight once. The gradient of x is the same product with the bands
transposed (each input pixel gathers, so nothing is added atomically), and the band of the products of x and the
output's gradient is the gradient of the weight. All three are deterministic. float32 is multiplied as three TF32
products, which loses nothing that float32 sums would keep.

Since zeros are multiplied too, a NaN or an infinity in x spreads over the tile that it lies in, not over its window.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from coadvise.ops.reference import (
    empty_like_weight,
    involution2d_backward_reference,
    involution2d_reference,
    memory_format,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = 64  # pixels a program computes: a tensor core instruction's rows on Hopper
COLUMNS = 16  # at most this many of them side by side: a wider band has more zeros
WARPS = 4


def check_driver() -> None:
    """Make Triton build its driver before the first kernel is launched.

    Raises:
        RuntimeError, OSError, CalledProcessError: There is no C compiler, or Python's headers are missing.
    """
    triton.runtime.driver.active.get_current_target()


def involution2d_triton(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Involution on CUDA tensors: [B, C, H, W] and [B, G, K, K, h, w] to [B, C, h, w] in the memory order of ``x``."""
    if x.dtype not in DTYPES:
        return involution2d_reference(x, weight, stride)
    batch, channels, _, _ = x.shape
    _, groups, kernel, _, height, width = weight.shape
    shape = (batch, channels, height, width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    columns = _columns(width, kernel, stride)
    tile = _tile(x, columns, groups)
    grid = _grid(batch, height, width, columns, tile["ROWS"], groups * triton.cdiv(tile["WIDTH"], tile["CHANNELS"]))
    if grid[0]:
        with torch.cuda.device_of(x):
            _forward[grid](
                x, weight, out, *x.shape[2:], height, width, *x.stride(), *weight.stride(), *out.stride(),
                K=kernel, S=stride, SPAN=_power_of_2((columns - 1) * stride + kernel), **tile,
            )  # fmt: skip
    return out


def involution2d_backward_triton(grad: Tensor, x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``weight``, each in the shape, dtype and memory order of its tensor."""
    if x.dtype not in DTYPES:
        return involution2d_backward_reference(grad, x, weight, stride)
    batch, _, in_height, in_width = x.shape
    _, groups, kernel, _, height, width = weight.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    grad_weight = empty_like_weight(weight)
    sizes = (in_height, in_width, height, width)
    with torch.cuda.device_of(x):
        columns = _columns(in_width, kernel, 1)
        tile = _tile(x, columns, groups)
        blocks = groups * triton.cdiv(tile["WIDTH"], tile["CHANNELS"])
        grid = _grid(batch, in_height, in_width, columns, tile["ROWS"], blocks)
        if grid[0]:
            _backward_x[grid](
                grad, weight, grad_x, *sizes, *grad.stride(), *weight.stride(), *grad_x.stride(),
                K=kernel, S=stride, SPAN=_power_of_2((columns + kernel - 2) // stride + 1), **tile,
            )  # fmt: skip
        columns = _columns(width, kernel, stride)
        tile = _tile(x, columns, groups)
        grid = _grid(batch, height, width, columns, tile["ROWS"], groups)
        if grid[0]:
            _backward_weight[grid](
                grad, x, grad_weight, *sizes, *grad.stride(), *x.stride(), *grad_weight.stride(),
                K=kernel, S=stride, SPAN=_power_of_2((columns - 1) * stride + kernel), **tile,
            )  # fmt: skip
    return grad_x, grad_weight


def _columns(width: int, kernel: int, stride: int) -> int:
    """Columns of a tile: few enough for their window not to outgrow twice as many, and tiles of about equal width."""
    most = min(COLUMNS, max((2 * COLUMNS - kernel) // stride + 1, 8))
    return triton.cdiv(width, triton.cdiv(width, most)) if width else 1


def _tile(x: Tensor, columns: int, groups: int) -> dict[str, int]:
    """What the three kernels have in common."""
    padded, width = max(triton.next_power_of_2(columns), 8), x.shape[1] // groups
    return {
        "GROUPS": groups,
        "WIDTH": width,
        "CHANNELS": min(_power_of_2(width), 64),  # of a product; wider groups are cut
        "COLUMNS": columns,
        "PADDED": padded,
        "ROWS": TILE // padded,
        "WIDEN": not x.is_cuda,
        "num_warps": WARPS,
    }


def _power_of_2(length: int) -> int:
    """The side of a matrix that a tensor core takes."""
    return max(triton.next_power_of_2(length), 16)


def _grid(batch: int, height: int, width: int, columns: int, rows: int, blocks: int) -> tuple[int]:
    return (batch * triton.cdiv(height, rows) * triton.cdiv(width, columns) * blocks,)


# ---- kernels: the sizes in capitals are constants of the compiled kernel; strides are in elements ----


@triton.jit
def _place(blocks, height, width, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """(image, first row, first column, block of channels). Blocks of one place run side by side: they share lines."""
    program = tl.program_id(0)
    columns, rows = tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS)
    place = program // blocks
    image = (place // columns // rows).to(tl.int64)  # a batch may have more elements than 32 bits count
    return image, place // columns % rows * ROWS, place % columns * COLUMNS, program % blocks


@triton.jit
def _product(left, right, sums, WIDEN: tl.constexpr):
    if WIDEN:  # Triton's interpreter would multiply the bits of bfloat16 numbers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision="tf32x3")


@triton.jit
def _forward(
    x, weight, out, in_height, in_width, height, width,
    x_b, x_c, x_y, x_x, w_b, w_g, w_u: tl.constexpr, w_v, w_i, w_j, o_b, o_c, o_i, o_j,
    K: tl.constexpr, S: tl.constexpr, SPAN: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    PAD: tl.constexpr = (K - 1) // 2
    BLOCKS: tl.constexpr = (WIDTH + CHANNELS - 1) // CHANNELS
    b, i0, j0, block = _place(GROUPS * BLOCKS, height, width, COLUMNS, ROWS)
    group = block // BLOCKS
    channel = block % BLOCKS * CHANNELS + tl.arange(0, CHANNELS)
    c = group * WIDTH + channel
    pixel = tl.arange(0, ROWS * PADDED)
    row, column = pixel // PADDED, pixel % PADDED
    i, j = i0 + row, j0 + column
    inside = (column < COLUMNS) & (i < height) & (j < width)
    q = j0 * S - PAD + tl.arange(0, SPAN)  # columns of the window
    v = q[None, :] + PAD - j[:, None] * S
    band = inside[:, None] & (v >= 0) & (v < K)
    taps = weight + b * w_b + group * w_g + (i * w_i + j * w_j - row * S * w_u)[:, None] + v * w_v
    pixels = x + b * x_b + q[:, None] * x_x + c[None, :] * x_c
    sums = tl.zeros((ROWS * PADDED, CHANNELS), tl.float32)
    for step in tl.static_range((ROWS - 1) * S + K):
        y = i0 * S - PAD + step
        u = step - row * S
        end = tl.where((y >= 0) & (y < in_height), in_width, 0)  # a row outside has no columns
        matrix = tl.load(taps + step * w_u, mask=band & ((u >= 0) & (u < K))[:, None], other=0.0)
        there = ((q >= 0) & (q < end))[:, None] & (channel < WIDTH)[None, :]
        values = tl.load(pixels + y * x_y, mask=there, other=0.0)
        sums = _product(matrix, values, sums, WIDEN)
    target = out + b * o_b + (i * o_i + j * o_j)[:, None] + c[None, :] * o_c
    tl.store(target, sums.to(out.dtype.element_ty), mask=inside[:, None] & (channel < WIDTH)[None, :])


@triton.jit
def _backward_x(
    grad, weight, grad_x, in_height, in_width, height, width,
    o_b, o_c, o_i, o_j, w_b, w_g, w_u: tl.constexpr, w_v, w_i: tl.constexpr, w_j, x_b, x_c, x_y, x_x,
    K: tl.constexpr, S: tl.constexpr, SPAN: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    PAD: tl.constexpr = (K - 1) // 2
    BLOCKS: tl.constexpr = (WIDTH + CHANNELS - 1) // CHANNELS
    b, y0, q0, block = _place(GROUPS * BLOCKS, in_height, in_width, COLUMNS, ROWS)
    group = block // BLOCKS
    channel = block % BLOCKS * CHANNELS + tl.arange(0, CHANNELS)
    c = group * WIDTH + channel
    pixel = tl.arange(0, ROWS * PADDED)
    row, column = pixel // PADDED, pixel % PADDED
    y, q = y0 + row, q0 + column
    inside = (column < COLUMNS) & (y < in_height) & (q < in_width)
    # The first outputs whose windows reach here; K strides more and K less, since negative numbers divide otherwise.
    i0, j0 = (y0 + PAD + K * S - K + S) // S - K, (q0 + PAD + K * S - K + S) // S - K
    j = j0 + tl.arange(0, SPAN)
    v = q[:, None] + PAD - j[None, :] * S
    band = inside[:, None] & ((j >= 0) & (j < width))[None, :] & (v >= 0) & (v < K)
    first_u = y + PAD - i0 * S
    taps = weight + b * w_b + group * w_g + i0 * w_i + (first_u * w_u)[:, None] + j[None, :] * w_j + v * w_v
    gradients = grad + b * o_b + j[:, None] * o_j + c[None, :] * o_c
    sums = tl.zeros((ROWS * PADDED, CHANNELS), tl.float32)
    for step in tl.static_range((ROWS + K - 2) // S + 1):
        i = i0 + step
        u = first_u - step * S
        real = (i >= 0) & (i < height)
        rows = (u >= 0) & (u < tl.where(real, K, 0))  # a row outside has no taps and no columns
        matrix = tl.load(taps + step * (w_i - S * w_u), mask=band & rows[:, None], other=0.0)
        there = (j >= 0) & (j < tl.where(real, width, 0))
        values = tl.load(gradients + i * o_i, mask=there[:, None] & (channel < WIDTH)[None, :], other=0.0)
        sums = _product(matrix, values, sums, WIDEN)
    target = grad_x + b * x_b + (y * x_y + q * x_x)[:, None] + c[None, :] * x_c
    tl.store(target, sums.to(grad_x.dtype.element_ty), mask=inside[:, None] & (channel < WIDTH)[None, :])


@triton.jit
def _backward_weight(
    grad, x, grad_weight, in_height, in_width, height, width,
    o_b, o_c, o_i, o_j, x_b, x_c, x_y, x_x, w_b, w_g, w_u: tl.constexpr, w_v, w_i, w_j,
    K: tl.constexpr, S: tl.constexpr, SPAN: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    PAD: tl.constexpr = (K - 1) // 2
    b, i0, j0, group = _place(GROUPS, height, width, COLUMNS, ROWS)
    pixel = tl.arange(0, ROWS * PADDED)
    row, column = pixel // PADDED, pixel % PADDED
    i, j = i0 + row, j0 + column
    inside = (column < COLUMNS) & (i < height) & (j < width)
    q = j0 * S - PAD + tl.arange(0, SPAN)
    v = q[None, :] + PAD - j[:, None] * S
    band = inside[:, None] & (v >= 0) & (v < K)
    taps = grad_weight + b * w_b + group * w_g + (i * w_i + j * w_j - row * S * w_u)[:, None] + v * w_v
    gradients = grad + b * o_b + (i * o_i + j * o_j)[:, None]
    pixels = x + b * x_b + q[None, :] * x_x
    for step in tl.static_range((ROWS - 1) * S + K):
        y = i0 * S - PAD + step
        u = step - row * S
        end = tl.where((y >= 0) & (y < in_height), in_width, 0)
        there = (q >= 0) & (q < end)
        products = tl.zeros((ROWS * PADDED, SPAN), tl.float32)
        for start in tl.static_range(0, WIDTH, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)
            c, some = group * WIDTH + channel, channel < WIDTH
            left = tl.load(gradients + c[None, :] * o_c, mask=inside[:, None] & some[None, :], other=0.0)
            right = tl.load(pixels + y * x_y + c[:, None] * x_c, mask=some[:, None] & there[None, :], other=0.0)
            products = _product(left, right, products, WIDEN)
        mask = band & ((u >= 0) & (u < K))[:, None]
        tl.store(taps + step * w_u, products.to(grad_weight.dtype.element_ty), mask=mask)
