"""The Accelerator that a run works on, and the world that it lives in."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch

from iris_hf.engine.strategy import adopt_sharding_on_cpu, check_launcher
from iris_hf.errors import ConfigError, require_integer

if TYPE_CHECKING:
    from accelerate import Accelerator

Device = Literal["cpu", "cuda"]


def launched_world_size() -> int | None:
    """Number of processes of the launcher that started this one (torchrun, accelerate launch); None without one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else None


def available_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def needs_local_workers(num_processes: int) -> bool:
    """Whether `num_processes` workers have to be started from this process.

    Raises:
        ConfigError: If `num_processes` is below 1, or contradicts the launcher's world size. The
            default 1 leaves the number to the launcher.
    """
    require_integer("num_processes", num_processes, at_least=1)
    world_size = launched_world_size()
    if world_size is None:
        return num_processes > 1
    if num_processes not in (1, world_size):
        raise ConfigError(
            f"num_processes={num_processes} contradicts the launcher, which started {world_size} processes. "
            f"Leave num_processes out, or start the script with --nproc_per_node {num_processes}."
        )
    return False


@contextmanager
def open_accelerator(device: Device | None = None, **options: Any) -> Iterator[Accelerator]:
    """Make the Accelerator of one run; Accelerate's process-wide state is the caller's again afterwards.

    Precision and device belong to a run, not to the process: `predict(device="cpu")` may follow a bf16
    training on a GPU. Accelerate keeps them in singletons, so these are set aside and put back.

    Args:
        device: `"cpu"` or `"cuda"`; the accelerator that is there, else the CPU, when None.
        options: Passed to `accelerate.Accelerator`, such as `mixed_precision`, which may also be `auto`: fp16 on a GPU,
            bf16 on the CPU.

    Raises:
        ConfigError: If the device is not there, or Accelerate was set up earlier in this process in a
            way that contradicts the launcher or the device.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import GradientAccumulationPlugin

    if device not in (None, "cpu", "cuda"):
        raise ConfigError(f"device must be 'cpu', 'cuda' or None, got {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda', but torch sees no GPU. Use device='cpu', or None for what is there.")
    # Without cpu=True, a rank that torchrun started on a machine without accelerators believes that it is alone.
    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    if options.get("mixed_precision") == "auto":
        options["mixed_precision"] = "bf16" if on_cpu else "fp16"
    if on_cpu and (options.get("mixed_precision") or os.environ.get("ACCELERATE_MIXED_PRECISION")) == "fp16":
        raise ConfigError("mixed precision fp16 needs a GPU. Use bf16 on a CPU.")
    check_launcher()
    world_size = launched_world_size() or 1
    singletons: list[Any] = [AcceleratorState, GradientState]
    if world_size == 1:  # with several processes it holds the process group, of which there is one
        singletons.append(PartialState)
    kept = [dict(singleton._shared_state) for singleton in singletons]
    for singleton in singletons:
        singleton._shared_state.clear()
    group = PartialState._shared_state
    strategy = group.get("distributed_type")
    _forget_sharding(group)
    try:
        try:
            # The loop divides by its micro-batches itself; without this, an environment variable would do so again.
            accumulation = GradientAccumulationPlugin(num_steps=1)
            accelerator = Accelerator(cpu=on_cpu, gradient_accumulation_plugin=accumulation, **options)
            adopt_sharding_on_cpu(accelerator)
        except ValueError as error:
            raise ConfigError(f"Accelerate refuses this set-up: {error}") from error
        atexit.register(_leave_process_group)  # an open one can abort the process as it ends
        if accelerator.num_processes != world_size:
            raise ConfigError(
                f"The launcher started {world_size} processes, but Accelerate, which was set up earlier in this "
                f"process, counts {accelerator.num_processes}. Set ACCELERATE_USE_CPU=true before its first use."
            )
        if device is not None and accelerator.device.type != device:
            raise ConfigError(f"device={device!r}, but the launcher set this process up for {accelerator.device}.")
        yield accelerator
    finally:
        _forget_sharding(group)
        if strategy is not None:
            group["distributed_type"] = strategy
        for singleton, state in zip(singletons, kept, strict=True):
            singleton._shared_state.clear()
            singleton._shared_state.update(state)


def _forget_sharding(group: dict[str, Any]) -> None:
    """Undo what an Accelerator under FSDP notes of itself in the processes' state, which the next one stumbles over."""
    from accelerate.utils import DistributedType

    if group.get("distributed_type") == DistributedType.FSDP:
        kind = "GPU" if group["device"].type == "cuda" else group["device"].type.upper()
        group["distributed_type"] = DistributedType(f"MULTI_{kind}")


def _leave_process_group() -> None:
    """End the group while Python still runs: its threads, when they outlive it, abort the process.

    What holds the group together with itself, as DistributedDataParallel and sharded optimizers do, goes first.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


def agree_on_seed(random_seed: int | None) -> int:
    """Return the seed of a run, the same on every rank.

    Args:
        random_seed: The caller's seed; zero is a seed. None draws one from torch's global generator, so
            that `torch.manual_seed` before the call decides.
    """
    if random_seed is not None:
        return random_seed
    from accelerate.utils import broadcast_object_list

    seed: int = broadcast_object_list([draw_seed()])[0]
    return seed


def draw_seed() -> int:
    """Draw a seed from torch's global generator."""
    return int(torch.randint(1 << 62, ()))
