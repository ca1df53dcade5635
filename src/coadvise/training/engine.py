"""Where a run computes: device, precision and processes, by lightning-fabric; and the signals that stop it."""

import hashlib
import logging
import os
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from functools import cache
from types import FrameType
from typing import Self

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from timm.layers import Attention
from torch import Tensor, nn
from torch.distributed import DistError, ProcessGroup

from coadvise.config.schema import EngineConfig, RunConfig
from coadvise.data.device_views import views_place
from coadvise.data.views import Batch
from coadvise.errors import LostProcessError, UserError
from coadvise.machine import keep_freed_memory, on_stop_signals, processor_facts

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
ANSWER_SECONDS = 3.0  # in which a rank that is alive reports that it got no answer either


class Engine:
    """Device, precision and processes of a command. Several processes come from torchrun, whose environment is read.

    Building an engine changes nothing outside it. `with engine:` starts it: the processes connect, and settings of the
    whole process (loggers, memory, algorithms) are changed. On exit they are restored, except two that cannot be: the C
    library keeps freed memory, and the processes stay connected. A command builds one engine and passes it on.

    Raises:
        UserError: a device that is not there.
    """

    def __init__(self, config: EngineConfig) -> None:
        if config.device == "cuda" and not torch.cuda.is_available():
            raise UserError("engine.device=cuda, but PyTorch sees no CUDA device; use engine.device=cpu or auto")
        config = resolve_precision(config)
        on_gpu = torch.cuda.is_available() and config.device != "cpu"
        local, world = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("WORLD_SIZE", "1"))
        with _quiet_fabric():
            self.fabric = Fabric(
                accelerator="cuda" if on_gpu else "cpu",
                devices=local,
                num_nodes=world // local,
                strategy=DDPStrategy(timeout=timedelta(seconds=config.timeout_seconds)) if world > 1 else "auto",
                precision="bf16-mixed" if config.precision == "bfloat16" else "32-true",
            )
        self._deterministic, self._timeout_seconds = config.deterministic and on_gpu, config.timeout_seconds
        self._hosts: ProcessGroup | None = None
        self._restore = ExitStack()
        self.compile = config.compile
        self.half_precision = config.precision == "bfloat16"
        # Convolutions and involutions are faster channels-last in bfloat16 and on GPUs; plain ViTs do not mind.
        self.memory_format = torch.channels_last
        self.at = "the start"  # what this process is doing, for an error message
        self.stop_requested = False  # whether this process got a signal to stop; see `any_rank` for all processes

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(_quiet_fabric())
            if self.device.type == "cpu":
                keep_freed_memory()
            if self._deterministic:
                stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
                stack.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
                torch.use_deterministic_algorithms(True)
                torch.backends.cudnn.benchmark = False
                if WORKSPACE not in os.environ:  # cuBLAS requires it
                    stack.callback(os.environ.pop, WORKSPACE, None)
                    os.environ[WORKSPACE] = ":4096:8"
            self.fabric.launch()
            if self.processes > 1:
                self._hosts = _hosts(torch.distributed.group.WORLD, self._timeout_seconds)
            self._restore = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._restore.close()

    @property
    def device(self) -> torch.device:
        return self.fabric.device

    @property
    def pins(self) -> bool:
        """Whether batches should be in pinned memory on their way to the device."""
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
        """Moves a network, in place, to the device and the memory format in which it runs fastest.

        A network without gradients, such as a teacher, is also compiled here if the configuration asks for it. It never
        goes through `setup`, so no process waits for another one because of it.
        """
        network.to(self.device)
        network.to(memory_format=self.memory_format)  # type: ignore[call-overload]  # torch's stub leaves it out
        if self.device.type == "cpu" and self.half_precision:
            plain_attention(network)
        if self.compile and not any(p.requires_grad for p in network.parameters()):
            network.compile()

    def setup(self, network: nn.Module, optimiser: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Compiles a prepared network if the configuration asks for it, and wraps it for several processes."""
        module = torch.compile(network) if self.compile else network
        return self.fabric.setup(module, optimiser)

    def place(self, batch: Batch) -> Batch:
        """The batch on the device, in the networks' memory format."""
        return batch.to(self.device, self.memory_format)

    def accumulating(self, model: nn.Module, more_to_come: bool) -> AbstractContextManager[None]:
        """Gradients stay in this process until the step's last micro-batch."""
        return self.fabric.no_backward_sync(model, enabled=more_to_come and self.processes > 1)

    def backward(self, loss: Tensor) -> None:
        self.fabric.backward(loss)

    def synchronise(self) -> None:
        """Waits for the device; only measurements need it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def autocast(self) -> AbstractContextManager[None]:
        return self.fabric.autocast()

    def barrier(self) -> None:
        """Waits for all processes."""
        self.fabric.barrier()

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes, on the device and without waiting for it."""
        if self.processes == 1:
            return values
        total = values.clone()
        torch.distributed.all_reduce(total)  # Fabric's waits at a barrier first, which on CUDA waits for the device
        return total / self.processes

    def any_rank_on_device(self, flags: Tensor) -> Tensor:
        """Which flags are true in any process, on the device and without waiting for it."""
        return self.mean(flags.float()) > 0 if self.processes > 1 else flags

    def any_rank(self, *flags: bool) -> tuple[bool, ...]:
        """Which flags are true in any process; the device is not involved."""
        return tuple(map(bool, self._on_hosts(torch.tensor(flags).int()).tolist())) if self.processes > 1 else flags

    def equal_on_all_ranks(self, text: str) -> bool:
        """Whether all processes have the same text."""
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        highest, minus_lowest = self._on_hosts(torch.tensor([number, -number])).tolist()
        return bool(highest == -minus_lowest)

    def fill_from_all_ranks(self, rows: Tensor) -> Tensor:
        """Float32 rows on the CPU, of which each process has some and zeros elsewhere, complete in every process."""
        return self._on_hosts(rows.view(torch.int32), torch.distributed.ReduceOp.SUM).view(torch.float32)  # exact bits

    def copy_buffers_from_main(self, network: nn.Module) -> None:
        """Gives every process rank 0's buffers, such as batch norm's statistics: those are saved and scored."""
        for buffer in network.buffers() if self.processes > 1 else ():
            torch.distributed.broadcast(buffer, src=0)

    def _on_hosts(self, values: Tensor, how: "torch.distributed.ReduceOp.RedOpType | None" = None) -> Tensor:
        """`values`, reduced in place over processes on their CPUs (by default to the highest)."""
        if self.processes > 1:
            torch.distributed.all_reduce(values, how or torch.distributed.ReduceOp.MAX, group=self._hosts)
        return values

    @contextmanager
    def detect_lost_ranks(self) -> Iterator[None]:
        """Names the processes that no longer answer, if one waits for another in vain.

        Raises:
            LostProcessError: in place of gloo's error or time-out, which does not say which rank is lost.
        """
        try:
            yield
        except RuntimeError as error:
            if self.processes == 1 or not (isinstance(error, DistError) or "gloo" in str(error)):
                raise
            lost = " and ".join(f"rank {rank}" for rank in self._silent_ranks()) or "ranks that answer again by now"
            reason = str(error).partition("\n")[0]
            raise LostProcessError(
                f"rank {self.rank} got no answer from {lost} at {self.at} ({reason}); run the same command again to "
                "go on from the last checkpoint"
            ) from error

    def _silent_ranks(self) -> list[int]:
        """The ranks that do not report within a moment that they got no answer either."""
        moment, silent = timedelta(seconds=ANSWER_SECONDS), list(range(self.processes))
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        deadline = time.monotonic() + ANSWER_SECONDS
        try:
            store = torch.distributed.TCPStore(*address, is_master=False, timeout=moment)  # type: ignore[attr-defined]
            store.set(f"coadvise/waiting/{self.rank}", "")
            while silent and time.monotonic() < deadline:
                silent = [rank for rank in silent if not store.check([f"coadvise/waiting/{rank}"])]
                time.sleep(0.1)
        except DistError:  # without torchrun's agent it is rank 0 that holds the store
            return [0]
        return silent

    @contextmanager
    def graceful_shutdown(self) -> Iterator[None]:
        """The signals to stop set `stop_requested` instead of ending the process."""

        def ask(number: int, frame: FrameType | None) -> None:
            self.stop_requested = True

        with on_stop_signals(ask):
            yield


@contextmanager
def _quiet_fabric() -> Iterator[None]:
    """Hides lightning-fabric's announcements of precision and ranks, and its advice to use srun where there is one."""
    logger = logging.getLogger("lightning_fabric")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The `srun` command is available")
            yield
    finally:
        logger.setLevel(level)


@cache
def _hosts(processes: ProcessGroup, timeout_seconds: float) -> ProcessGroup:
    """The same processes, communicating between their CPUs whatever their devices. All make it at the same time."""
    group: ProcessGroup = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
    return group


def for_this_machine(config: EngineConfig) -> EngineConfig:
    """The configuration to run trained networks with: as trained, or as this machine can."""
    if torch.cuda.is_available():
        return config
    precision = "auto" if config.precision == "bfloat16" else config.precision  # a GPU's; it may not be native here
    return config.model_copy(update={"device": "auto", "precision": precision})


def resolve_precision(config: EngineConfig) -> EngineConfig:
    """The configuration with the precision that `auto` means on this machine."""
    if config.precision != "auto":
        return config
    native = _cuda_has_bfloat16() if config.device != "cpu" and torch.cuda.is_available() else _cpu_has_bfloat16()
    return config.model_copy(update={"precision": "bfloat16" if native else "float32"})


def resolve_auto(config: RunConfig) -> RunConfig:
    """The configuration with what `auto` means on this machine: the precision, and where views are made.

    Raises:
        UserError: views that a device cannot make.
    """
    cuda = config.engine.device != "cpu" and torch.cuda.is_available()
    data = config.data.model_copy(update={"views": views_place(config, cuda)})
    return config.model_copy(update={"engine": resolve_precision(config.engine), "data": data})


def _cuda_has_bfloat16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def _cpu_has_bfloat16() -> bool:
    """Whether the processor has bfloat16 instructions. Emulated, a training step takes some twenty times as long."""
    flags = next((line for line in processor_facts() if line.startswith(("flags", "Features"))), "").split()
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


def plain_attention(network: nn.Module) -> None:
    """Makes timm's attention two matrix products and a softmax.

    On a CPU, PyTorch's fused attention spends three fifths of a small ViT's bfloat16 training step in its backward pass
    (docs/LOG.md). On a GPU the fused one is faster, and stays.
    """
    for module in network.modules():
        if isinstance(module, Attention):
            module.fused_attn = False
