"""The Winograd convolution against PyTorch's in float64, on both widths of vectors, and its absence."""

import ctypes

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from coadvise.errors import UserError
from coadvise.ops import convolution, native, onednn
from coadvise.ops.convolution import conv3x3_relu, takes

pytestmark = pytest.mark.skipif(convolution._library() is None, reason="no native kernel: no compiler, or switched off")


def sample(batch: int, inputs: int, outputs: int, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Images, weights and a bias from a generator of their own."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, inputs, *size, generator=generator)
    weight = torch.randn(outputs, inputs, 3, 3, generator=generator)
    return x, weight, torch.randn(outputs, generator=generator)


@pytest.fixture(autouse=True)
def without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with it has oneDNN compute what is bfloat16."""
    monkeypatch.setattr(onednn, "has_amx", False)


def assert_exact_enough(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1).relu()
    got = conv3x3_relu(x, weight, bias)
    assert got.shape == exact.shape
    assert got.dtype == x.dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    if x.dtype == torch.float32:
        assert (got - exact).norm() <= 1e-6 * exact.norm()
    else:  # rounded once
        torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-4)


@given(
    batch=st.integers(0, 3),
    inputs=st.sampled_from([16, 32, 64]),
    outputs=st.sampled_from([64, 128]),
    height=st.integers(1, 14),
    width=st.integers(1, 33),
    channels_last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_is_pytorchs_for_any_shape(
    batch: int, inputs: int, outputs: int, height: int, width: int, channels_last: bool, dtype: torch.dtype
) -> None:
    x, weight, bias = (t.to(dtype) for t in sample(batch, inputs, outputs, (height, width)))
    assert takes(x, weight)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert_exact_enough(x.contiguous(memory_format=layout), weight, bias)
    assert_exact_enough(x.expand(2, *x.shape)[1], weight, bias.expand(2, -1).T.contiguous().T[1])


def test_a_slice_of_a_larger_tensor() -> None:
    x, weight, bias = sample(3, 32, 64, (9, 10))
    assert_exact_enough(x[1:, ::2].repeat(1, 2, 1, 1)[:, :, 1:, :7], weight, bias)
    assert_exact_enough(x[::2, :16], weight[:, :16], bias)


@pytest.mark.parametrize("size", [(5, 7), (16, 28), (33, 30)])
def test_narrower_vectors_give_the_same(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a processor without AVX-512, on one with it."""
    if "avx512f" not in native._processor():
        pytest.skip("this processor has the narrower ones anyway")
    library = native.load(convolution.SOURCE, "it is not tested", "-mno-avx512f")
    assert library is not None
    assert library.inputs_multiple() == 8
    monkeypatch.setattr(convolution, "_library", lambda: library)
    assert_exact_enough(*sample(2, 24, 48, size))
    assert_exact_enough(*(t.bfloat16() for t in sample(2, 24, 48, size)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_on_neither_threads_nor_batch(dtype: torch.dtype) -> None:
    x, weight, bias = (t.to(dtype) for t in sample(5, 32, 64, (17, 23)))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(conv3x3_relu(x, weight, bias))
    finally:
        torch.set_num_threads(threads)
    found.append(torch.cat([conv3x3_relu(image[None], weight, bias) for image in x]))
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_nan_is_not_clamped_or_rounded_away(bad: float, dtype: torch.dtype) -> None:
    x, weight, bias = (t.to(dtype) for t in sample(1, 16, 64, (12, 12)))
    x[0, 3, 1, 1] = bad
    out = conv3x3_relu(x, weight, bias)
    assert out[..., :3, :3].isnan().all()
    assert not out[..., 8:, 8:].isnan().any()


def test_what_exceeds_bfloat16_is_infinite_and_autocast_changes_nothing() -> None:
    x, weight, bias = (t.bfloat16() for t in sample(1, 16, 64, (5, 4)))
    wanted = conv3x3_relu(x, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert takes(x, weight)
        assert not takes(x.float(), weight.float())
        assert torch.equal(conv3x3_relu(x, weight, bias), wanted)
    weight[:], x[:], bias[:] = 0, 1e18, torch.finfo(torch.bfloat16).max
    weight[:, :, 1, 1] = 6e16  # float32 holds the sum, bfloat16 does not
    assert conv3x3_relu(x, weight, bias).isinf().all()


def test_with_amx_bfloat16_goes_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "has_amx", True)
    x, weight, bias = (t.bfloat16() for t in sample(1, 16, 64, (5, 4)))
    assert not takes(x, weight)
    assert takes(x.float(), weight.float())
    assert torch.equal(conv3x3_relu(x, weight, bias), F.conv2d(x, weight, bias, padding=1).relu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(3, 64), (32, 40)])
def test_other_channels_and_precisions_go_to_pytorch(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x, weight, bias = (t.to(dtype) for t in sample(2, inputs, outputs, (6, 5)))
    assert not takes(x, weight)
    assert torch.equal(conv3x3_relu(x, weight, bias), F.conv2d(x, weight, bias, padding=1).relu())


@pytest.mark.parametrize("inputs", [32, 3])
def test_autocast_leaves_the_dtype(inputs: int) -> None:
    tensors = sample(2, inputs, 64, (6, 5))
    with torch.autocast("cpu", torch.bfloat16):
        out = conv3x3_relu(*tensors)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, conv3x3_relu(*tensors), rtol=2e-2, atol=1e-1)


def test_other_tensors_are_refused() -> None:
    x, weight, bias = sample(2, 32, 64, (6, 5))
    for wrong in ((x[0], weight, bias), (x[:, :16], weight, bias), (x, weight[..., :2], bias), (x, weight, bias[1:])):
        with pytest.raises(UserError, match=r"they must be \[B, I, H, W\], \[O, I, 3, 3\] and \[O\]"):
            conv3x3_relu(*wrong)
    for mixed in ((x, weight, bias.double()), (x.bfloat16(), weight, bias)):
        with pytest.raises(UserError, match="convert them to one dtype and device"):
            conv3x3_relu(*mixed)


def test_the_operator_is_registered_as_pytorch_wants_it() -> None:
    for inputs in (32, 3):
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.coadvise.conv3x3_relu, sample(2, inputs, 64, (6, 5)), test_utils=tests)


def test_buffers_that_memory_has_no_place_for_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = convolution._kernel()
    assert kernel is not None
    monkeypatch.setattr(convolution, "_kernel", lambda: lambda _, *tensors: kernel(huge, *tensors))
    huge = (ctypes.c_int64 * 7)(1, 4, 2**47, 16, 64, 0, 1)
    with pytest.raises(MemoryError, match="no memory for the convolution's buffers"):
        conv3x3_relu(*sample(1, 16, 64, (5, 4)))


@pytest.mark.usefixtures("fresh_kernel")
def test_switched_off_plain_torch_runs(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setenv("COADVISE_NATIVE", "0")
    x, weight, bias = sample(2, 32, 64, (6, 5))
    assert not takes(x, weight)
    assert_exact_enough(x, weight, bias)
    assert not recwarn.list


@pytest.mark.usefixtures("fresh_kernel")
def test_without_a_compiler_plain_torch_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    with pytest.warns(RuntimeWarning, match="stems run in plain torch.*no gcc, cc or clang on PATH"):
        assert_exact_enough(*sample(2, 32, 64, (6, 5)))
