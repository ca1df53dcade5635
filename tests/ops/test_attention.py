"""Attention against PyTorch's in float64, on both widths of vectors, and the kernel's absence."""

import ctypes

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from coadvise.errors import UserError
from coadvise.ops import attention, native
from coadvise.ops.attention import takes

pytestmark = pytest.mark.skipif(attention._library() is None, reason="no native kernel: no compiler, or switched off")


def sample(batch: int, tokens: int, heads: int, width: int, scale: float = 1.0) -> Tensor:
    """Queries, keys and values from a generator of their own."""
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(batch, tokens, 3 * heads * width, generator=generator)


def reference(qkv: Tensor, heads: int) -> Tensor:
    """A head and an image at a time, as the formula is written."""
    batch, tokens, _ = qkv.shape
    out = torch.empty(batch, tokens, heads, qkv.shape[2] // (3 * heads), dtype=torch.float64)
    for image in range(batch):
        for head in range(heads):
            q, k, v = qkv[image].double().view(tokens, 3, heads, -1)[:, :, head].unbind(1)
            out[image, :, head] = (q @ k.T / q.shape[1] ** 0.5).softmax(dim=1) @ v
    return out.flatten(2)


def assert_exact_enough(qkv: Tensor, heads: int) -> None:
    exact, got = reference(qkv, heads), attention.attention(qkv, heads)
    assert got.shape == exact.shape
    assert got.is_contiguous()
    assert got.dtype == qkv.dtype
    assert (got - exact).norm() <= 2e-6 * exact.norm()


@given(
    batch=st.integers(0, 3),
    tokens=st.integers(1, 90),
    heads=st.integers(1, 3),
    width=st.sampled_from([8, 64, 128]),
    scale=st.sampled_from([0.0, 0.1, 1.0, 3.0]),
)
def test_it_is_the_formula_for_any_shape(batch: int, tokens: int, heads: int, width: int, scale: float) -> None:
    qkv = sample(batch, tokens, heads, width, scale)
    assert takes(qkv, heads) == (tokens >= attention._needs()[0] and width != 8)
    assert_exact_enough(qkv, heads)


def test_tensors_that_are_not_contiguous() -> None:
    qkv = sample(3, 40, 2, 64)
    assert_exact_enough(qkv[::2, 5:], 2)
    assert_exact_enough(qkv.transpose(0, 1).contiguous().transpose(0, 1), 2)


@pytest.mark.parametrize("tokens", [6, 7, 24, 25, 199])
def test_narrower_vectors_give_the_same(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a processor without AVX-512, on one with it."""
    if "avx512f" not in native._processor():
        pytest.skip("this processor has the narrower ones anyway")
    library = native.load(attention.SOURCE, "it is not tested", "-mno-avx512f")
    assert library is not None
    assert library.width_multiple() == 16
    monkeypatch.setattr(attention, "_library", lambda: library)
    for width in (16, 48):
        assert takes(sample(2, tokens, 2, width), 2)
        assert_exact_enough(sample(2, tokens, 2, width), 2)


def test_bits_depend_on_neither_threads_nor_batch() -> None:
    qkv = sample(5, 67, 3, 64)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(attention.attention(qkv, 3))
    finally:
        torch.set_num_threads(threads)
    found.append(torch.cat([attention.attention(image[None], 3) for image in qkv]))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_scores_far_apart() -> None:
    """A weight below what float32 holds is 0; one score of thousands overflows nothing."""
    qkv = sample(1, 50, 1, 64)
    qkv[:, :, :128] *= 40
    assert_exact_enough(qkv, 1)
    qkv[0, 3, 64:128] = 1e4 * qkv[0, :, :64].sum(0).sign()
    assert_exact_enough(qkv, 1)
    equal = torch.zeros(1, 33, 3 * 64)
    equal[..., 128:] = sample(1, 33, 1, 64)[..., 128:]
    torch.testing.assert_close(attention.attention(equal, 1), equal[..., 128:].mean(1, keepdim=True).expand(-1, 33, -1))


def test_every_weight_is_right_to_its_last_places() -> None:
    """The small ones too, of which the norm of all says nothing."""
    scores = torch.linspace(-86, 0, 64)
    qkv = torch.zeros(1, 64, 3 * 64)
    qkv[..., 0], qkv[..., 64], qkv[..., 128:] = 8, scores, torch.eye(64)  # 8 is the root of the head's width
    wanted = scores.double().softmax(0).expand(1, 64, -1)
    torch.testing.assert_close(attention.attention(qkv, 1).double(), wanted, rtol=5e-7, atol=0)


def test_a_nan_and_an_infinity_stay_where_pytorch_has_them() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        for part in range(3):  # a query spoils its row, a key all of them, a value its channel
            qkv = sample(2, 20, 2, 64)
            qkv[0, 4, part * 128 + 70] = bad
            wanted = F.scaled_dot_product_attention(*qkv.unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4).double())
            wanted, got = wanted.transpose(1, 2).flatten(2), attention.attention(qkv, 2)
            assert not got[1].isnan().any()
            torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_go_to_pytorch(dtype: torch.dtype) -> None:
    qkv = sample(2, 30, 2, 64).to(dtype)
    assert not takes(qkv, 2)
    assert torch.equal(attention.attention(qkv, 2), attention.plain(qkv, 2))
    torch.testing.assert_close(attention.attention(qkv, 2).double(), reference(qkv, 2), rtol=3e-2, atol=3e-2)


def test_other_tensors_are_refused() -> None:
    qkv = sample(2, 30, 2, 64)
    for wrong, heads in ((qkv[0], 2), (qkv[..., 1:], 2), (qkv, 5), (qkv, 0), (qkv[..., :0], 2)):
        with pytest.raises(UserError, match=r"it must be \[B, N, 3 x heads x width of a head\]"):
            attention.attention(wrong, heads)
    with pytest.raises(UserError, match="must be floating point"):
        attention.attention(qkv.long(), 2)


def test_the_operator_is_registered_as_pytorch_wants_it() -> None:
    for width in (64, 8):
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.coadvise.attention, (sample(2, 30, 2, width), 2), test_utils=tests)


def test_buffers_that_memory_has_no_place_for_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = attention._kernel()
    assert kernel is not None
    monkeypatch.setattr(attention, "_kernel", lambda: lambda _, *tensors: kernel(huge, *tensors))
    huge = (ctypes.c_int64 * 5)(1, 2**47, 1, 64, 1)
    with pytest.raises(MemoryError, match="no memory for the buffers of attention"):
        attention.attention(sample(1, 30, 1, 64), 1)


@pytest.mark.usefixtures("fresh_kernel")
def test_switched_off_plain_torch_runs(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setenv("COADVISE_NATIVE", "0")
    qkv = sample(2, 30, 2, 64)
    assert not takes(qkv, 2)
    assert_exact_enough(qkv, 2)
    assert not recwarn.list


@pytest.mark.usefixtures("fresh_kernel")
def test_without_a_compiler_plain_torch_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    with pytest.warns(RuntimeWarning, match="attention runs in plain torch.*no gcc, cc or clang on PATH"):
        assert_exact_enough(sample(2, 30, 2, 64), 2)
