"""Where a run computes: device, precision and processes, by lightning-fabric; and the signals that stop it."""

import hashlib
import logging
import os
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Self

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from timm.layers import Attention
from torch import Tensor, nn
from torch.distributed import DistError, ProcessGroup
from torch.distributed.distributed_c10d import _get_default_store

from coadvise.config import EngineConfig
from coadvise.data.views import Batch
from coadvise.errors import LostProcessError, UserError
from coadvise.machine import keep_freed_memory

ANSWER_SECONDS = 3.0  # for a process to say that it, too, waits for others


class Engine:
    """Device, precision and processes of a command. Several processes come from torchrun, whose environment is read.

    Building one changes nothing. `with engine:` starts it: processes find each other, and what holds for the whole
    process (memory, algorithms, loggers) is set. A command builds and enters one engine and passes it on.

    Raises:
        UserError: a device that is not there.
    """

    def __init__(self, config: EngineConfig) -> None:
        if config.device == "cuda" and not torch.cuda.is_available():
            raise UserError("engine.device=cuda, but PyTorch sees no CUDA device; use engine.device=cpu or auto")
        config = settled(config)
        on_gpu = torch.cuda.is_available() and config.device != "cpu"
        local, world = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("WORLD_SIZE", "1"))
        self.fabric = Fabric(
            accelerator="cuda" if on_gpu else "cpu",
            devices=local,
            num_nodes=world // local,
            strategy=DDPStrategy(timeout=timedelta(seconds=config.timeout_seconds)) if world > 1 else "auto",
            precision="bf16-mixed" if config.precision == "bfloat16" else "32-true",
        )
        self._deterministic, self._timeout_seconds = config.deterministic and on_gpu, config.timeout_seconds
        self._hosts: ProcessGroup | None = None
        self.compile = config.compile
        self.half_precision = config.precision == "bfloat16"
        # Convolutions and involutions are faster channels-last in bfloat16 and on GPUs; plain ViTs do not mind.
        self.memory_format = torch.channels_last
        self.at = "the start"  # where this process is, for an error that names it
        self._stop = False

    def __enter__(self) -> Self:
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces the precision otherwise
        if self.device.type == "cpu":
            keep_freed_memory()
        if self._deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        self.fabric.launch()
        if self.processes > 1:
            self._hosts = _hosts(torch.distributed.group.WORLD, self._timeout_seconds)
        return self

    def __exit__(self, *fault: object) -> None:
        if self._deterministic:
            torch.use_deterministic_algorithms(False)

    @property
    def device(self) -> torch.device:
        return self.fabric.device

    @property
    def pins(self) -> bool:
        """Whether batches are to be pinned on their way to the device."""
        return self.device.type == "cuda"

    @property
    def rank(self) -> int:
        return self.fabric.global_rank

    @property
    def processes(self) -> int:
        return self.fabric.world_size

    @property
    def is_main(self) -> bool:
        return self.fabric.is_global_zero

    def describe(self) -> str:
        """The device in words."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"cpu, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}"

    def prepare(self, network: nn.Module) -> None:
        """Puts a network, in place, where and as it runs fastest.

        One without gradients, such as a teacher, only answers: it is compiled here where asked, and never goes through
        `setup`, so no process waits for another on its account.
        """
        network.to(self.device)
        network.to(memory_format=self.memory_format)  # type: ignore[call-overload]  # torch's stub leaves it out
        if self.device.type == "cpu" and self.half_precision:
            plain_attention(network)
        if self.compile and not any(p.requires_grad for p in network.parameters()):
            network.compile()

    def setup(self, network: nn.Module, optimiser: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Compiles a prepared network where asked, wraps it for several processes."""
        module = torch.compile(network) if self.compile else network
        return self.fabric.setup(module, optimiser)

    def place(self, batch: Batch) -> Batch:
        """The batch where and as the networks run."""
        return batch.to(self.device, self.memory_format)

    def accumulating(self, model: nn.Module, more_to_come: bool) -> AbstractContextManager[None]:
        """Keeps gradients to this process until the step's last micro-batch."""
        return self.fabric.no_backward_sync(model, enabled=more_to_come and self.processes > 1)

    def backward(self, loss: Tensor) -> None:
        self.fabric.backward(loss)

    def synchronise(self) -> None:
        """Waits for the device; only measurements need it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def barrier(self) -> None:
        """Waits for all processes."""
        self.fabric.barrier()

    def autocast(self) -> AbstractContextManager[None]:
        return self.fabric.autocast()

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes; the device is not waited for."""
        if self.processes == 1:
            return values
        total = values.clone()
        torch.distributed.all_reduce(total)  # Fabric's waits at a barrier first, which on CUDA waits for the device
        return total / self.processes

    def anywhere(self, flags: Tensor) -> Tensor:
        """What is true on any process; the same answer on all, and the device is not waited for."""
        return self.mean(flags.float()) > 0 if self.processes > 1 else flags

    def agreed(self, answer: bool) -> bool:
        """Whether any process says yes; the same answer on all."""
        return answer if self.processes == 1 else bool(self._highest(torch.tensor(int(answer))))

    def alike(self, text: str) -> bool:
        """Whether all processes have the same text; the same answer on all."""
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        highest, minus_lowest = self._highest(torch.tensor([number, -number])).tolist()
        return bool(highest == -minus_lowest)

    def _highest(self, values: Tensor) -> Tensor:
        """The highest of each over processes, which meet on their hosts and leave the device alone."""
        if self.processes > 1:
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=self._hosts)
        return values

    @property
    def stop_requested(self) -> bool:
        """Whether any process got a signal to stop; the same answer on all."""
        return self.agreed(self._stop)

    @contextmanager
    def in_company(self) -> Iterator[None]:
        """Names the processes that no longer answer, where one waits for another in vain.

        Raises:
            LostProcessError: in place of gloo's error or time-out, which does not know whom it waited for.
        """
        try:
            yield
        except RuntimeError as error:
            if self.processes == 1 or not (isinstance(error, DistError) or "gloo" in str(error)):
                raise
            lost = " and ".join(f"rank {rank}" for rank in self._silent()) or "others, which answer again"
            reason = str(error).partition("\n")[0]
            raise LostProcessError(
                f"rank {self.rank} got no answer from {lost} at {self.at} ({reason}); run the same command again to "
                "go on from the last checkpoint"
            ) from error

    def _silent(self) -> list[int]:
        """The processes that do not say within a moment that they, too, got no answer."""
        store = _get_default_store()
        store.set(f"coadvise/waiting/{self.rank}", "")
        deadline, silent = time.monotonic() + ANSWER_SECONDS, list(range(self.processes))
        while silent and time.monotonic() < deadline:
            silent = [rank for rank in silent if not store.check([f"coadvise/waiting/{rank}"])]
            time.sleep(0.1)
        return silent

    @property
    def stop_requested_here(self) -> bool:
        """Whether this process got a signal to stop, whatever others did: for work that is not done in step."""
        return self._stop

    @contextmanager
    def stops_gently(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGUSR1 ask for a stop after the step at hand instead of ending the process."""

        def ask(number: int, frame: FrameType | None) -> None:
            self._stop = True

        names = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        try:
            before = {name: signal.signal(name, ask) for name in names}
        except ValueError:  # not the main thread: signals are somebody else's
            yield
            return
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)


@cache
def _hosts(processes: ProcessGroup, timeout_seconds: float) -> ProcessGroup:
    """The same processes, to meet on their hosts wherever they compute. All of them make it at the same time."""
    group: ProcessGroup = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
    return group


def here(config: EngineConfig) -> EngineConfig:
    """How a run's networks answer on this machine: as they were trained; without such a device, as it can."""
    if config.device == "cuda" and not torch.cuda.is_available():
        precision = "auto" if config.precision == "bfloat16" else config.precision
        return config.model_copy(update={"device": "auto", "precision": precision})
    return config


def settled(config: EngineConfig) -> EngineConfig:
    """The configuration with the precision that `auto` stands for on this machine."""
    if config.precision != "auto":
        return config
    native = _cuda_has_bfloat16() if config.device != "cpu" and torch.cuda.is_available() else _cpu_has_bfloat16()
    return config.model_copy(update={"precision": "bfloat16" if native else "float32"})


def _cuda_has_bfloat16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def _cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself. Emulated, a training step takes some twenty times as long."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "").split()
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


def plain_attention(network: nn.Module) -> None:
    """Has timm's attention computed by two matrix products and a softmax.

    On a CPU, PyTorch's fused attention spends three fifths of a small ViT's bfloat16 training step in its backward pass
    (docs/LOG.md); on a GPU it is the faster one, and stays.
    """
    for module in network.modules():
        if isinstance(module, Attention):
            module.fused_attn = False
