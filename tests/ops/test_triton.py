"""The CUDA kernels: their arithmetic in Triton's interpreter against the reference in float64, and that they compile.

Triton decides when it is imported whether kernels are interpreted, so they run in processes of their own.
"""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from coadvise.ops import involution, involution2d
from coadvise.ops.reference import involution2d_reference

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}

# batch, groups, group width, K, stride, size, layout: plain, channels-last, or views with gaps
CASES = {
    "float32": [
        (2, 2, 16, 3, 2, (6, 5), "plain"),
        (1, 1, 16, 5, 1, (3, 17), "last"),
        (1, 2, 12, 5, 2, (5, 3), "last"),
        (1, 1, 16, 7, 2, (9, 4), "last"),
        (1, 1, 80, 3, 1, (2, 3), "last"),
        (1, 1, 4, 9, 4, (5, 7), "plain"),
        (1, 2, 8, 1, 3, (7, 4), "last"),
        (1, 1, 16, 3, 1, (4, 3), "gaps"),
        (0, 2, 16, 3, 1, (5, 6), "last"),
        (1, 1, 16, 3, 5, (1, 1), "plain"),
    ],
    "bfloat16": [
        (1, 1, 16, 3, 1, (4, 5), "last"),
        (1, 1, 24, 5, 2, (5, 3), "plain"),
        (1, 1, 16, 7, 1, (3, 4), "last"),
    ],
    "float16": [(1, 1, 16, 3, 2, (4, 5), "plain"), (1, 1, 16, 7, 1, (3, 4), "last")],
}

INTERPRETED = """
    import json, sys
    import torch
    from coadvise.ops.reference import involution2d_backward_reference, involution2d_reference
    from coadvise.ops.triton import involution2d_backward_triton, involution2d_triton

    def tensors(batch, groups, width, kernel, stride, size, layout, dtype):
        out = [-(-side // stride) for side in size]
        x, grad = (torch.randn(batch, groups * width, *s).to(dtype) for s in (size, out))
        pixels = torch.randn(batch, *out, groups, kernel, kernel).to(dtype)
        weight = pixels.permute(0, 3, 4, 5, 1, 2)
        if layout == "plain":
            return grad, x, weight.contiguous()
        if layout == "gaps":  # every other element of larger tensors, and one gradient for all
            x, weight = (torch.stack((t, t), -1)[..., 0] for t in (x, weight))
            return torch.ones((), dtype=dtype).expand_as(grad), x, weight
        return *(t.contiguous(memory_format=torch.channels_last) for t in (grad, x)), weight

    def form(t):
        strides = [stride for stride, length in zip(t.stride(), t.shape) if length > 1]
        return t.dtype, t.shape, strides if t.numel() else []

    results = []
    for case in json.loads(sys.argv[2]):
        grad, x, weight = tensors(*case, getattr(torch, sys.argv[1]))
        stride, exact = case[4], [t.double() for t in (grad, x, weight)]
        got = involution2d_triton(x, weight, stride), *involution2d_backward_triton(grad, x, weight, stride)
        want = involution2d_reference(*exact[1:], stride), *involution2d_backward_reference(*exact, stride)
        like = involution2d_reference(x, weight, stride), *involution2d_backward_reference(grad, x, weight, stride)
        results.append({
            "errors": [float((g.double() - w).norm() / w.norm().clamp_min(1e-9)) for g, w in zip(got, want)],
            "form": [form(g) == form(l) for g, l in zip(got, like)],
        })
    print(json.dumps(results))
"""

# Takes the arguments of the very calls that the operator makes, and compiles them for a Hopper GPU, present or not.
COMPILED = """
    import torch, triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from coadvise.ops import triton as kernels

    def compiled(kernel, arguments, options):
        warps = options.pop("num_warps")
        values = dict(zip(kernel.arg_names, arguments)) | options | {"WIDEN": False}
        constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
        types = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
        signature = {
            name: "constexpr" if name in constants else types[value.dtype] if torch.is_tensor(value) else "i32"
            for name, value in values.items()
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        assert made.metadata.shared <= 64 << 10, made.metadata.shared
        print(kernel.fn.__name__, made.asm["ptx"].count("wgmma.mma_async.sync"))

    class Call:
        def __init__(self, kernel): self.kernel = kernel
        def __getitem__(self, grid): return lambda *arguments, **options: compiled(self.kernel, arguments, options)

    for name in ("_forward", "_backward_x", "_backward_weight"):
        setattr(kernels, name, Call(getattr(kernels, name)))
    x = torch.randn(1, 32, 16, 16).bfloat16()
    kernels.involution2d_triton(x, torch.randn(1, 2, 3, 3, 16, 16).bfloat16(), 1)
    kernels.involution2d_backward_triton(x, x, torch.randn(1, 2, 3, 3, 16, 16).bfloat16(), 1)
"""


def alone(code: str, *arguments: str, **environment: str) -> str:
    """What the code prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_triton
@pytest.mark.parametrize("dtype", list(CASES))
def test_agrees_with_the_reference_in_the_interpreter(dtype: str) -> None:
    results = json.loads(alone(INTERPRETED, dtype, json.dumps(CASES[dtype]), TRITON_INTERPRET="1"))
    assert len(results) == len(CASES[dtype])
    for case, result in zip(CASES[dtype], results, strict=True):
        assert max(result["errors"]) <= TOLERANCE[dtype], (case, result)
        assert all(result["form"]), (case, result)


@needs_triton
def test_compiles_for_a_gpu_to_tensor_core_instructions(tmp_path: Path) -> None:
    lines = alone(COMPILED, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    counts = {name: int(count) for name, count in map(str.split, lines)}
    assert counts.keys() == {"_forward", "_backward_x", "_backward_weight"}
    assert min(counts.values()) > 0


# What the operator answers on CUDA tensors, here of the CPU, with the kernels as they are and with planted faults.
PLANTED = """
    import json, sys, warnings
    from types import ModuleType
    import torch
    from coadvise.ops import agreement, involution, triton as kernels
    from coadvise.ops.reference import involution2d_reference

    def wrong(*given):
        return kernels.involution2d_triton(*given) * 1.05

    def broken(*given):
        raise RuntimeError("out of resources: shared memory" + chr(10) + "details")

    def backward(*given):
        return tuple(-gradient for gradient in kernels.involution2d_backward_triton(*given))

    def with_planted(**planted):
        module = ModuleType("kernels")
        vars(module).update({**vars(kernels), **planted})
        return module

    x, weight = torch.randn(1, 16, 4, 5), torch.randn(1, 1, 3, 3, 4, 5)
    found = []
    for planted in ({}, {"involution2d_triton": wrong}, {"involution2d_triton": broken},
                    {"involution2d_backward_triton": backward}):
        used, asked = [], []
        module = with_planted(**planted)
        plain = module.involution2d_triton
        module.involution2d_triton = lambda *given: (used.append(given[0].shape[2]), plain(*given))[1]
        module.__file__ = kernels.__file__ if not planted else sys.argv[1]
        involution._triton = lambda module=module: module
        agreement._agree.cache_clear()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(2):
                out = involution._forward_cuda(x, weight, 1)
        right = torch.allclose(out, involution2d_reference(x, weight, 1), atol=1e-4)
        found.append({"right": right, "used": used, "said": [str(w.message) for w in said]})
        agreement._agree.cache_clear()
    involution._triton = lambda: with_planted(involution2d_triton=wrong)
    found.append(torch.equal(involution._forward_cuda(x, weight, 1), wrong(x, weight, 1)))
    print(json.dumps(found))
"""


@needs_triton
def test_kernels_that_are_wrong_are_found_before_they_are_used(tmp_path: Path) -> None:
    other = tmp_path / "kernels.py"
    other.write_text("# the source of the planted ones")
    printed = alone(PLANTED, str(other), TRITON_INTERPRET="1", XDG_CACHE_HOME=str(tmp_path))
    asis, wrong, broken, backward, known = json.loads(printed)
    assert asis == {"right": True, "used": [5, 4, 4], "said": []}, "asked once on a picture of 5 rows, then used"
    for planted, says in ((wrong, "are wrong"), (broken, "out of resources: shared memory"), (backward, "are wrong")):
        assert planted["right"]
        assert set(planted["used"]) <= {5}, "never used but when asked"
        (said,) = planted["said"]
        assert says in said
        assert "details" not in said
    assert known, "what agreed once is not asked again, by device and source"
    (agreed,) = json.loads((tmp_path / "coadvise" / "kernels.json").read_text())
    assert "float32" in agreed


def no_compiler() -> None:
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")


@pytest.mark.parametrize(
    ("module", "says"), [(None, "triton"), (SimpleNamespace(check_driver=no_compiler), "Failed to find C compiler")]
)
def test_without_triton_plain_torch_runs_and_says_so_once(
    module: SimpleNamespace | None, says: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    involution._triton.cache_clear()
    monkeypatch.setitem(sys.modules, "coadvise.ops.triton", module)
    x, weight = torch.randn(1, 4, 3, 3), torch.randn(1, 2, 3, 3, 3, 3)
    with pytest.warns(RuntimeWarning, match=f"CUDA.*{says}"):
        out = involution._forward_cuda(x, weight, 1)
    involution._backward_cuda(out, x, weight, 1)
    involution._triton.cache_clear()
    assert not recwarn.list
    assert torch.equal(out, involution2d_reference(x, weight, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_agrees_with_the_reference_on_a_gpu(
    dtype: torch.dtype, kernel: int, stride: int, layout: torch.memory_format
) -> None:
    size = [-(-side // stride) for side in (23, 34)]
    x = torch.randn(2, 48, 23, 34, device="cuda").to(dtype).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(2, 3 * kernel**2, *size, device="cuda").to(dtype).contiguous(memory_format=layout)
    weight = weight.unflatten(1, (3, kernel, kernel)).requires_grad_()
    out = involution2d(x, weight, stride)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    want = involution2d_reference(*exact, stride)
    grad = torch.randn_like(out)
    got = out, *torch.autograd.grad(out, (x, weight), grad)
    wanted = want, *torch.autograd.grad(want, exact, grad.double())
    tolerance = TOLERANCE[str(dtype).removeprefix("torch.")]
    assert all((g.double() - w).norm() <= tolerance * w.norm() for g, w in zip(got, wanted, strict=True))
