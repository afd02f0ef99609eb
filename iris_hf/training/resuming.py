"""What of a run a checkpoint holds, and how a run goes on from one."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from iris_hf.engine.plugins import PluginList
from iris_hf.engine.shards import gather_nested
from iris_hf.training.buffers import (
    LateBuffer,
    copy_buffers,
    extra_states,
    mean_buffers,
    set_extra_states,
    unsaved_buffers,
)
from iris_hf.training.checkpoint import Checkpoint, CheckpointWriter, Progress
from iris_hf.training.facts import RunFacts, another_run, plain, plugin_settings, regrouping

if TYPE_CHECKING:
    from iris_hf.training.run import TrainingRun

logger = logging.getLogger(__name__)


@dataclass
class Pending:
    """What a run gets back not at once, but on its way. Each is given once.

    Attributes:
        plugin_states: By the plugins' names. Plugins get them after they were told of the start, and of the epoch
            within one.
        late_buffers: What the model made on its way. They are made when plugins have seen it as it was at the run's
            start.
    """

    plugin_states: dict[str, Any] = field(default_factory=dict)
    late_buffers: list[LateBuffer] = field(default_factory=list)

    def restore_buffers(self, device: torch.device) -> None:
        """Put the buffers into their places."""
        late, self.late_buffers = self.late_buffers, []
        for buffer in late:
            buffer.register(device)

    def restore_plugins(self, plugins: PluginList) -> None:
        """Give plugins back what they had."""
        states, self.plugin_states = self.plugin_states, {}
        for name, plugin in plugins.named():
            if name in states:
                plugin.load_state_dict(states[name])


def facts_of(run: TrainingRun) -> RunFacts:
    """Return what makes a run the same as another."""
    config, batches, state = run.config, run.batches, run.state
    division = {name: value for name, value in state.config.items() if name == "sub_batch_size"}
    examples_per_micro_batch = config.batch_size * run.accelerator.num_processes
    return RunFacts(
        random_seed=run.seed,
        num_examples=batches.num_examples,
        num_stream_parts=batches.num_parts,
        num_stream_shards=batches.num_shards,
        stream_shuffled_by=batches.shuffled_by,
        examples_per_step=state.examples_per_step,
        examples_per_epoch=len(batches) * examples_per_micro_batch,
        examples_per_micro_batch=examples_per_micro_batch,
        loss_is_joint=bool(division) or run.module.gathers,
        num_epochs=state.num_epochs,
        steps_per_epoch=state.steps_per_epoch,
        optimizer=config.optimizer,
        base_lr=config.base_lr,
        lr_scheduler=json.dumps(asdict(run.schedule.config), default=str),
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        nesterov=config.nesterov,
        settings={
            "precision": run.accelerator.mixed_precision,
            "lr_scale_param_names": plain(config.lr_scale_param_names),
            "no_weight_decay_param_names": plain(config.no_weight_decay_param_names),
            "no_weight_decay_module_class_names": plain(config.no_weight_decay_module_class_names),
            **division,
            **plugin_settings(run.plugins.named()),
        },
    )


def write_checkpoint(run: TrainingRun, writer: CheckpointWriter, *, is_validated: bool) -> None:
    """Write a checkpoint of a run at this moment between two steps; every process calls this.

    Args:
        run: Prepared, and at the same step everywhere.
        writer: Writes it.
        is_validated: Whether the last validation was of these very weights.
    """
    state, scaler, is_main = run.state, run.accelerator.scaler, run.accelerator.is_main_process
    writer.write(
        Progress(state.epoch, state.step, state.val_loss, is_validated, state.stop_reason, run.best_val_loss),
        parameters=run.layout.parameters(keep=is_main),
        optimizer={
            "optimizer": run.layout.optimizer_state(run.optimizer, keep=is_main),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "names": run.group_names,
        },
        of_rank={
            "buffers": dict(run.module.named_buffers()),
            "unsaved": unsaved_buffers(run.module),
            "extra": extra_states(run.module),
            "plugins": gather_nested(
                {name: saved for name, plugin in run.plugins.named() if (saved := plugin.state_dict())}
            ),
            "val_metrics": dict(state.val_metrics),
            "skipped": dict(run.skipped),
            "origins": dict(run.batches.origins),
        },
    )


def restore(run: TrainingRun, checkpoint: Checkpoint) -> Pending:
    """Put a run, which has not begun, where a checkpoint is; return what it gets back on its way.

    Raises:
        ConfigError: If the optimizer's state belongs to other parameters.
        DataError: If it is of another model.
    """
    run.layout.load_parameters(checkpoint.parameters)
    _restore_optimizer(run, checkpoint)
    own = _read_ranks(run, checkpoint)
    late_buffers = copy_buffers(run.module, own["buffers"], unsaved=own["unsaved"])
    set_extra_states(run.module, own["extra"])
    state, progress = run.state, checkpoint.progress
    state.epoch, state.step, state.stop_reason = progress.epoch, progress.step, progress.stop_reason
    state.val_loss, state.val_metrics = progress.val_loss, own["val_metrics"]
    run.best_val_loss = progress.best_val_loss
    return Pending(own["plugins"], late_buffers)


def _restore_optimizer(run: TrainingRun, checkpoint: Checkpoint) -> None:
    stored = checkpoint.optimizer
    if different := regrouping(stored["names"], run.group_names):
        raise another_run(
            checkpoint.folder,
            f"in the optimizer, {different}. What is frozen decides on that, and so do "
            "no_weight_decay_param_names, no_weight_decay_module_class_names and lr_scale_param_names",
        )
    run.layout.load_optimizer(run.optimizer, stored["optimizer"])
    if run.accelerator.scaler is not None and stored["scaler"]:
        run.accelerator.scaler.load_state_dict(stored["scaler"])


def _read_ranks(run: TrainingRun, checkpoint: Checkpoint) -> dict[str, Any]:
    """Give a run what all processes together know of its data; return what this one goes on with.

    One that was not there goes on with the first one's; on another number of processes, buffers are what those of all
    come to.
    """
    index = run.accelerator.process_index
    known: dict[str, Any] = {}
    of_ranks = []
    for rank in range(checkpoint.world_size):
        of_rank = checkpoint.of_rank(rank)
        run.skipped.update(of_rank["skipped"])
        run.batches.origins.update(of_rank["origins"])
        of_ranks.append((of_rank["buffers"], of_rank["unsaved"]))
        if rank == (index if index < checkpoint.world_size else 0):
            known = of_rank
    if checkpoint.world_size == run.accelerator.num_processes:
        return known
    return {**known, "buffers": mean_buffers([buffers for buffers, _ in of_ranks]), "unsaved": of_ranks[0][1]}


def report_resumption(run: TrainingRun, checkpoint: Checkpoint) -> None:
    """Say from where a restored run goes on; warn of what is not as it was."""
    progress = checkpoint.progress
    logger.info("Going on from %s: epoch %d, step %d.", checkpoint.folder, progress.epoch, progress.step)
    if changes := facts_of(run).changes(checkpoint.facts):
        logger.warning("The run goes on with other settings than before: %s.", "; ".join(changes))
    if lost := run.pending.plugin_states.keys() - dict(run.plugins.named()).keys():
        logger.warning("The run goes on without plugins whose state it had: %s.", ", ".join(sorted(lost)))
    if run.is_over():
        logger.warning(
            "%s is the end of its run, at step %d: %s Nothing is left to train.",
            *(checkpoint.folder, progress.step, progress.stop_reason or "all epochs are done."),
        )
