"""Times a student's forward and backward pass with PyTorch's fused attention and with plain attention.

    python benchmarks/attention.py                   cit_micro_patch4_32, batch 128, one thread
    python benchmarks/attention.py --threads 0       as many threads as PyTorch takes by itself
    python benchmarks/attention.py --device cuda

Plain attention is two matrix products and a softmax, as `coadvise.engine.plain_attention` sets it. Each figure is the
median over interleaved repeats, so that a slow moment of the machine falls on all of them. The question and what came
of it: docs/LOG.md.
"""

import argparse
import platform
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from coadvise.training.engine import plain_attention  # before timm: it lets torchvision be imported

# isort: split
import timm
from timm.layers import Attention
from torch import nn

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ATTENTIONS = ("fused", "plain")


def student(name: str, attention: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=100).to(device)
    if attention == "plain":
        plain_attention(model)
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    assert layers, "no attention to time"
    assert all(layer.fused_attn == (attention == "fused") for layer in layers), "timm was told not to fuse attention"
    return model.train()


def seconds(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> float:
    """Time of one forward and backward pass."""
    start = time.perf_counter()
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(images)
    F.cross_entropy(logits.float(), labels).backward()
    if images.is_cuda:
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cit_micro_patch4_32")
    parser.add_argument("--batch-size", type=int, default=128, help="images (default: 128)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU; 0 is PyTorch's own number (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    models = {name: student(args.model, name, args.device) for name in ATTENTIONS}
    size = models["plain"].patch_embed.img_size[0]  # type: ignore[union-attr, index]
    images = torch.randn(args.batch_size, 3, size, size, device=args.device)
    labels = torch.randint(100, (args.batch_size,), device=args.device)

    on_cpu = f"cpu {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"
    device = on_cpu if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{args.model}, {size} x {size} pixels, forward + backward, eager, batch {args.batch_size}")
    print(f"{device}; Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}\n")
    times: dict[tuple[str, str], list[float]] = {(p, name): [] for p in PRECISIONS for name in ATTENTIONS}
    for repeat in range(args.repeats + 1):  # the first is a warm-up
        for precision, attention in times:
            elapsed = seconds(models[attention], images, labels, PRECISIONS[precision])
            if repeat:
                times[precision, attention].append(elapsed)
    print(f"{'ms an image':<12}{'fused':>10}{'plain':>10}{'fused / plain':>16}")
    for precision in PRECISIONS:
        fused, plain = (1e3 * statistics.median(times[precision, name]) / args.batch_size for name in ATTENTIONS)
        print(f"{precision:<12}{fused:>10.3f}{plain:>10.3f}{fused / plain:>15.2f}x")


if __name__ == "__main__":
    main()
