"""The native kernel against the reference in float64, and its absence."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from coadvise.ops import cpu, involution2d, native
from coadvise.ops.reference import involution2d_backward_reference, involution2d_reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
needs_native = pytest.mark.skipif(cpu.native_kernel() is None, reason="no native kernel: no compiler, or switched off")


def sample(batch: int, groups: int, width: int, kernel: int, stride: int, size: tuple[int, int]) -> tuple[Tensor, ...]:
    """x, weight and the output's gradient, contiguous float32."""
    out = tuple(-(-side // stride) for side in size)
    channels = groups * width
    x, grad = torch.randn(batch, channels, *size), torch.randn(batch, channels, *out)
    return x, torch.randn(batch, groups, kernel, kernel, *out), grad


def channels_last(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The same values as a channels-last network leaves them in memory."""
    pixels = weight.permute(0, 4, 5, 1, 2, 3).contiguous().permute(0, 3, 4, 5, 1, 2)
    return x.contiguous(memory_format=torch.channels_last), pixels, grad.contiguous(memory_format=torch.channels_last)


def results(x: Tensor, weight: Tensor, grad: Tensor, stride: int) -> tuple[Tensor, ...]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = involution2d(x, weight, stride)
    return out.detach(), *torch.autograd.grad(out, (x, weight), grad)


def assert_exact_enough(x: Tensor, weight: Tensor, grad: Tensor, stride: int) -> None:
    exact = x.double(), weight.double()
    expected = involution2d_reference(*exact, stride), *involution2d_backward_reference(grad.double(), *exact, stride)
    for got, want in zip(results(x, weight, grad, stride), expected, strict=True):
        assert got.shape == want.shape
        assert got.dtype == x.dtype
        assert (got.double() - want).norm() <= TOLERANCE[x.dtype] * want.norm()


@needs_native
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("size", [(9, 11), (8, 8), (3, 4)])
def test_agrees_with_the_reference(kernel: int, stride: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = [t.to(dtype) for t in sample(2, 2, 16, kernel, stride, size)]
    assert_exact_enough(*inputs, stride)
    assert_exact_enough(*channels_last(*inputs), stride)


@needs_native
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("width", [1, 4, 8, 12, 16, 24, 32, 40])
def test_any_group_width(width: int, dtype: torch.dtype) -> None:
    inputs = [t.to(dtype) for t in sample(2, 3, width, 3, 1, (6, 7))]
    assert_exact_enough(*channels_last(*inputs), 1)


@needs_native
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 3), (3, 5), (9, 1), (11, 4)])
def test_unusual_kernels_and_strides(kernel: int, stride: int) -> None:
    assert_exact_enough(*sample(1, 2, 16, kernel, stride, (10, 13)), stride)


@needs_native
@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)])
def test_smallest_inputs(batch: int, size: tuple[int, int]) -> None:
    assert_exact_enough(*sample(batch, 2, 16, 3, 2, size), 2)


@needs_native
def test_views_with_gaps() -> None:
    x, weight, _ = sample(2, 2, 16, 3, 1, (12, 14))
    x, weight = x[:, :, ::2, 1::2], weight[..., ::2, 1::2]
    grad = torch.ones(()).expand_as(x)
    assert_exact_enough(x, weight, grad, 1)


@needs_native
def test_results_keep_the_memory_order_of_the_inputs() -> None:
    for inputs in (sample(2, 2, 16, 3, 1, (5, 6)), channels_last(*sample(2, 2, 16, 3, 1, (5, 6)))):
        out, grad_x, grad_weight = results(*inputs, 1)
        assert out.stride() == grad_x.stride() == inputs[0].stride()
        assert grad_weight.stride() == inputs[1].stride()


@needs_native
def test_tensors_of_different_dtypes_do_not_reach_the_kernel() -> None:
    x, weight, grad = sample(1, 1, 16, 3, 1, (4, 4))
    mixed = cpu.involution2d_cpu(x, weight.bfloat16(), 1)
    torch.testing.assert_close(mixed, involution2d(x, weight), rtol=0.02, atol=0.02)
    gradients = cpu.involution2d_backward_cpu(grad.bfloat16(), x, weight, 1)
    assert all(gradient.isfinite().all() for gradient in gradients)


@needs_native
@pytest.mark.parametrize(("kernel", "stride", "size"), [(7, 1, (24, 20)), (3, 2, (64, 60)), (7, 2, (33, 40))])
def test_same_bits_for_any_thread_count(kernel: int, stride: int, size: tuple[int, int]) -> None:
    inputs = sample(3, 2, 16, kernel, stride, size)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            runs.append(results(*inputs, stride))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


@needs_native
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_nan_and_infinity_reach_the_result(dtype: torch.dtype) -> None:
    for bad in (float("nan"), float("inf")):
        x, weight, grad = (t.to(dtype) for t in sample(1, 1, 16, 3, 1, (4, 4)))
        x[0, 3, 1, 1] = bad
        out, _, grad_weight = results(x, weight, grad, 1)
        assert not out[0, 3, :3, :3].isfinite().any()
        assert not grad_weight[0, 0, 1, 1, 1, 1].isfinite()
        assert out[0, 4].isfinite().all()


@needs_native
def test_bfloat16_rounds_to_the_nearest() -> None:
    x, weight, _ = (t.bfloat16() for t in sample(1, 1, 16, 1, 1, (8, 8)))
    exact = x.float() * weight.float().view(1, 1, 8, 8)
    assert torch.equal(involution2d(x, weight), exact.bfloat16())


@needs_native
def test_buffers_that_memory_has_no_place_for_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = cpu.native_kernel()
    assert kernel is not None
    monkeypatch.setattr(cpu, "native_kernel", lambda: lambda _, *tensors: kernel(huge, *tensors))
    huge = (ctypes.c_int64 * 11)(1, 1, 2**47, 1, 16, 3, 1, 1, 1, 0, 1)
    x, weight, grad = sample(1, 1, 16, 3, 1, (4, 4))
    with pytest.raises(MemoryError):
        cpu.involution2d_cpu(x, weight, 1)
    with pytest.raises(MemoryError):
        cpu.involution2d_backward_cpu(grad, x, weight, 1)


@needs_native
def test_the_process_has_one_openmp_runtime() -> None:
    """In a process of its own: other packages in this one may have brought theirs."""
    code = (
        "import torch; from coadvise.ops import cpu; import pathlib\n"
        "count = lambda: len({l.split()[-1] for l in pathlib.Path('/proc/self/maps').read_text().splitlines()"
        " if 'libgomp' in l or 'libomp' in l or 'libiomp' in l})\n"
        "before = count(); assert cpu.native_kernel(); assert count() == max(before, 1), (before, count())"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.usefixtures("fresh_kernel")
def test_without_a_compiler_plain_torch_runs_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    for _ in range(2):
        assert_exact_enough(*sample(2, 2, 16, 3, 1, (5, 6)), 1)
    assert len(recwarn) == 1
    assert "no gcc, cc, clang on PATH" in str(recwarn[0].message)
