"""How a launcher wants the model spread over the processes: whole on each, or sharded by FSDP2."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING

from iris_hf.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

_WAY_OUT = (
    "The optimizers with zero_ in front shard the optimizer's state (ZeRO stage 1) under --multi_gpu or torchrun. "
    "FSDP2 shards weights and gradients too (ZeRO stage 3): put distributed_type: FSDP, and fsdp_version: 2 in "
    "fsdp_config, into the configuration of accelerate launch, as examples/accelerate_configs/fsdp2.yaml does."
)


def check_launcher() -> None:
    """Refuse what a launcher asks for by environment variables and no loop of iris_hf can do.

    Raises:
        ConfigError: For DeepSpeed, Megatron-LM, the first version of FSDP, and tensor or context parallelism.
    """
    if _asks_for("DEEPSPEED"):
        raise ConfigError(
            "The launcher chose DeepSpeed, whose engine takes the optimizer steps itself, in another loop than "
            f"iris_hf's. {_WAY_OUT}"
        )
    if _asks_for("MEGATRON_LM"):
        raise ConfigError(f"The launcher chose Megatron-LM, which brings its own models. {_WAY_OUT}")
    version = os.environ.get("FSDP_VERSION", "1")
    if _asks_for("FSDP") and version != "2":
        raise ConfigError(
            f"The launcher chose version {version} of FSDP, and iris_hf works with version 2. Set fsdp_version: 2 in "
            "the configuration of accelerate launch (--fsdp_version 2, or FSDP_VERSION=2)."
        )
    if _asks_for("PARALLELISM_CONFIG"):
        raise ConfigError(
            "The launcher has a parallelism_config, and iris_hf spreads examples over all processes, nothing else. "
            "Leave it out; FSDP2 shards over all of them."
        )


def adopt_sharding_on_cpu(accelerator: Accelerator) -> None:
    """Give an Accelerator on CPU processes the FSDP that its launcher asks for, which Accelerate leaves out there."""
    from accelerate import FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType

    if accelerator.distributed_type == DistributedType.MULTI_CPU and _asks_for("FSDP"):
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # every AcceleratorState() copies it


def sharding_plugin(accelerator: Accelerator) -> FullyShardedDataParallelPlugin | None:
    """Return how the model is to be sharded; None where every process holds it whole.

    Raises:
        ConfigError: If the launcher asks for a strategy, or an option of FSDP, that training does not have.
    """
    from accelerate.utils import DistributedType, DynamoBackend

    if accelerator.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        return None
    if accelerator.distributed_type != DistributedType.FSDP:
        raise ConfigError(
            "train works on one process, with DistributedDataParallel, or with FSDP2; the launcher chose "
            f"{accelerator.distributed_type.value}. Launch with --multi_gpu, torchrun, or --use_fsdp --fsdp_version 2."
        )
    plugin: FullyShardedDataParallelPlugin = accelerator.state.fsdp_plugin
    check_fsdp(plugin)
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ConfigError("A compiled model cannot be sharded: leave out dynamo_backend, or FSDP2.")
    return plugin


def check_fsdp(plugin: FullyShardedDataParallelPlugin) -> None:
    """Refuse options of FSDP that training does not have.

    Raises:
        ConfigError: For those.
    """
    import torch
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ConfigError(f"FSDP2 needs torch 2.7 or later, and this is {torch.__version__}: pip install 'torch>=2.7'.")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ConfigError("fsdp_offload_params is not there in train: leave it out, or set it to false.")
    if plugin.activation_checkpointing:
        raise ConfigError(
            "fsdp_activation_checkpointing is not there in train, since it draws other random numbers in the backward "
            "pass. Leave it out; models of transformers have gradient_checkpointing_enable(), those of timm "
            "set_grad_checkpointing()."
        )
    if plugin.ignored_modules is not None:
        raise ConfigError("fsdp_ignored_modules is not there in train: leave it out.")


def _asks_for(what: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() in ("true", "1", "yes", "on")
