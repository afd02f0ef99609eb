"""Checkpoints: folders that are complete or not there, from which a run goes on to the same bytes.

A checkpoint is taken between two optimizer steps. Since every random number of a run is a function of the seed and of
what it is for (:mod:`iris_hf.engine.rng`) and learning rates are a function of the step, it holds no generator, loader
or scheduler: weights, optimizer, scaler, plugins, buffers and the step number are all there is.

`step-00000042/` holds `model.safetensors` and `optimizer.safetensors` from the main process, `rank-0000.safetensors`
(buffers, plugins) from every process, and `checkpoint.json` with the size and the checksum of each. It is written
under another name and renamed when all is on disk; one of the same step is out of the way under a name by which it is
found until then.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from iris_hf.errors import ConfigError, DataError
from iris_hf.training.facts import RunFacts, another_run
from iris_hf.training.storage import read_state, write_state

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

_FORMAT, _INFO, _NAME = 1, "checkpoint.json", "step-{step:08d}"
_PARTIAL, _REPLACED, _ASIDE = ".partial-", ".replaced-", "aside-"
_OWN = re.compile(rf"({re.escape(_REPLACED)})?step-\d{{8,}}")


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        epoch: The epoch of the next step, from 0.
        step: Optimizer steps done.
        val_loss: The last validation's loss.
        is_validated: Whether that validation was of these very weights.
        stop_reason: Why the run has ended early, if it has.
        best_val_loss: The least loss of all validations; None before the first.
    """

    epoch: int
    step: int
    val_loss: float | None
    is_validated: bool
    stop_reason: str | None
    best_val_loss: float | None


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        folder: Where it lies.
        facts: Of the run that wrote it.
        progress: How far that had come.
        world_size: Processes that wrote it.
    """

    folder: Path
    facts: RunFacts
    progress: Progress
    world_size: int

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """The model's parameters."""
        parameters: dict[str, torch.Tensor] = read_state(self.folder / "model.safetensors")
        return parameters

    @property
    def optimizer(self) -> dict[str, Any]:
        """States of the optimizer and of the gradient scaler, and the names of the parameters in each group."""
        optimizer: dict[str, Any] = read_state(self.folder / "optimizer.safetensors")
        return optimizer

    def of_rank(self, rank: int) -> dict[str, Any]:
        """Return `buffers`, `plugins` and so on of a process that wrote it."""
        state: dict[str, Any] = read_state(self.folder / _rank_file(rank))
        return state

    def require(self, facts: RunFacts) -> None:
        """Make sure that a run may go on from here.

        Raises:
            ConfigError: If it would be another run; the message names what differs.
        """
        if different := facts.differences(self.facts):
            shuffle = ". Give shuffle the seed and the buffer_size that it had" if facts.stream_shuffled_by else ""
            otherwise = "" if facts.loss_is_joint else ", or at least in a step and in an epoch"
            raise another_run(
                self.folder,
                f"{'; '.join(different)}. On another number of processes, change batch_size so that all together have "
                "as many examples as before in a micro-batch" + otherwise + shuffle,
            )


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint and make sure that every byte of it is as it was written.

    Raises:
        DataError: If it is none, or damaged.
    """
    try:
        checkpoint, files = _parse(folder)
        for name, wanted in files.items():
            if _checksum(folder / name) != wanted:
                raise DataError(f"{str(folder / name)!r} is not what was written there: its size or checksum differs.")
        return checkpoint
    except _DAMAGES as error:
        if isinstance(error, DataError):
            raise
        inside = _list(folder)
        hint = f", but holds {inside[-1].name!r}" if inside else f": {error}"
        raise DataError(f"{str(folder)!r} is no complete checkpoint{hint}.") from error


def find_checkpoint(resume: str | Path | None, checkpoint_dir: str | Path | None) -> Checkpoint | None:
    """Find the checkpoint to go on from; None for a fresh start.

    Args:
        resume: `"auto"`: the newest good one in `checkpoint_dir`. Otherwise a checkpoint's folder, or None.
        checkpoint_dir: Where a run keeps its checkpoints.

    Raises:
        DataError: If a folder was named and holds no good checkpoint.
    """
    if resume is None:
        return None
    if resume != "auto":
        try:
            return open_checkpoint(Path(resume))
        except DataError as error:
            raise DataError(f"{error} resume='auto' goes on from the newest good one in checkpoint_dir.") from error
    assert checkpoint_dir is not None
    for folder in reversed(_list(Path(checkpoint_dir))):
        try:
            return open_checkpoint(folder)
        except DataError as error:
            logger.warning("Passing over a damaged checkpoint: %s", error)
    return None


class CheckpointWriter:
    """Writes a run's checkpoints, and keeps the newest and the best.

    Attributes:
        directory: Where they lie, one folder each.
        keep: How many of the newest to keep; the one of least validation loss is kept besides.

    Raises:
        ConfigError: If the directory holds checkpoints of another run, or nobody asked to go on from them.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int,
        facts: RunFacts,
        accelerator: Accelerator,
        resumed: bool,
        step: int,
    ) -> None:
        self.directory = Path(directory)
        found = _list(self.directory)
        later = [folder for folder in found if _step_of(folder) > step]
        known = [described for folder in found if folder not in later and (described := _describe(folder))]
        if (found and not resumed) or any(facts.differences(each.facts) for each in known):
            raise ConfigError(
                f"checkpoint_dir={str(directory)!r} holds the checkpoints of another run. resume='auto' goes on from "
                "them; to start afresh, choose another folder or empty this one."
            )
        accelerator.wait_for_everyone()  # all have looked
        self.keep = keep
        self.facts = facts
        self.accelerator = accelerator
        self.last_step: int | None = None
        is_over = any(
            progress.step == step and (progress.stop_reason is not None or progress.epoch == facts.num_epochs)
            for progress in (each.progress for each in known)
        )
        self._on_main(
            lambda: self._prepare(later, step, writes=not is_over), f"checkpoint_dir={str(directory)!r} cannot be used"
        )

    def _prepare(self, later: Sequence[Path], step: int, *, writes: bool) -> None:
        if not (writes or later):  # a run that is over may lie where nobody can write
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        for replaced in self.directory.glob(f"{_REPLACED}*"):
            final = replaced.with_name(replaced.name.removeprefix(_REPLACED))
            if final.exists():
                shutil.rmtree(replaced, ignore_errors=True)
            elif replaced not in later:
                replaced.rename(final)
        for leftover in self.directory.glob(f"{_PARTIAL}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        probe = self.directory / f"{_PARTIAL}probe"
        probe.mkdir()  # a folder that cannot be written to is no matter for the first checkpoint, hours later
        probe.rmdir()
        for folder in later:  # damaged, or of a future that this run does not have
            aside = self.directory / f"{_ASIDE}{_NAME.format(step=_step_of(folder))}"
            logger.warning("Going on from step %d: %s is put aside as %s.", step, folder, aside.name)
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)

    def _on_main(self, action: Callable[[], None], what: str) -> None:
        """Do something on the main process while the others wait.

        Raises:
            DataError: On every process, if the file system does not allow it.
        """
        failure = _attempt(action) if self.accelerator.is_main_process else None
        self._agree(failure, what)

    def _agree(self, failure: str | None, what: str) -> None:
        from accelerate.utils import gather_object

        failures = [text for text in gather_object([failure]) if text is not None]
        if failures:
            raise DataError(f"{what}: {failures[0]}")

    def write(
        self,
        progress: Progress,
        *,
        parameters: dict[str, Any],
        optimizer: dict[str, Any],
        of_rank: dict[str, Any],
    ) -> None:
        """Write a checkpoint; every process calls this at the same step.

        Args:
            progress: How far the run has come.
            parameters: As in :class:`Checkpoint`; used on the main process.
            optimizer: Likewise.
            of_rank: This process's.

        Raises:
            DataError: On every process, if one of them cannot write: the disk is full, or a plugin's state is of a kind
                that cannot be stored.
        """
        partial = self.directory / f"{_PARTIAL}{_NAME.format(step=progress.step)}"
        what = (
            f"The checkpoint of step {progress.step} cannot be written to {str(self.directory)!r}, where earlier ones "
            "are as they were"
        )

        def begin() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()

        self._on_main(begin, what)
        own: dict[str, Any] = {_rank_file(self.accelerator.process_index): of_rank}
        if self.accelerator.is_main_process:
            own.update({"model.safetensors": parameters, "optimizer.safetensors": optimizer})
        checksums: dict[str, dict[str, int]] = {}

        def write_own() -> None:
            for file, state in own.items():
                write_state(state, partial / file)
                _flush(partial / file)
                checksums[file] = _checksum(partial / file)

        failure = _attempt(write_own)
        from accelerate.utils import gather_object

        everyone = gather_object([checksums])
        try:
            self._agree(failure, what)
            self._on_main(lambda: self._complete(partial, progress, everyone), what)
        except DataError:
            if self.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self.last_step = progress.step

    def _complete(self, partial: Path, progress: Progress, checksums: Sequence[Mapping[str, Any]]) -> None:
        """Describe the files that all processes have written, and give the folder its name."""
        info = {
            "format": _FORMAT,
            "facts": asdict(self.facts),
            "progress": asdict(progress),
            "files": {file: checksum for of_rank in checksums for file, checksum in of_rank.items()},
        }
        (partial / _INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        _flush(partial / _INFO)
        _flush(partial)
        final = self.directory / _NAME.format(step=progress.step)
        replaced = final.with_name(f"{_REPLACED}{final.name}")
        if final.exists():  # from before a resume
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        partial.rename(final)
        _flush(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)
        self._remove_old()

    def _remove_old(self) -> None:
        folders = _list(self.directory)
        kept = set(folders[-self.keep :])
        losses: dict[Path, float] = {}
        for folder in folders:
            described = _describe(folder)  # a damaged one is passed over on resuming, too
            loss = described.progress.val_loss if described and described.progress.is_validated else None
            if loss is not None and not math.isnan(loss):
                losses[folder] = loss
        if losses:
            kept.add(min(losses, key=losses.__getitem__))
        for folder in folders:
            if folder not in kept:
                doomed = folder.with_name(f"{_PARTIAL}{folder.name}")
                folder.rename(doomed)  # never half a checkpoint under its name
                shutil.rmtree(doomed, ignore_errors=True)


def _list(directory: Path) -> list[Path]:
    """The folders of checkpoints, oldest first; one that was to be replaced counts where the new one is not there."""
    folders = [*directory.glob(f"{_REPLACED}step-*"), *directory.glob("step-*")]
    by_step = {_step_of(folder): folder for folder in folders if _OWN.fullmatch(folder.name) and folder.is_dir()}
    return [by_step[step] for step in sorted(by_step)]


def _step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


_DAMAGES = (OSError, ValueError, TypeError, KeyError)
"""What :func:`_parse` raises of a folder that is no checkpoint."""


def _parse(folder: Path) -> tuple[Checkpoint, Mapping[str, Mapping[str, int]]]:
    """Read what a checkpoint says of itself, and the sizes and checksums of its files, which are not looked at."""
    info = json.loads((folder / _INFO).read_text(encoding="utf-8"))
    if info["format"] != _FORMAT:
        raise DataError(f"{str(folder)!r} has the format {info['format']!r}; this iris_hf reads {_FORMAT}.")
    files: Mapping[str, Mapping[str, int]] = info["files"]
    return Checkpoint(folder, RunFacts(**info["facts"]), Progress(**info["progress"]), len(files) - 2), files


def _describe(folder: Path) -> Checkpoint | None:
    """Read what a checkpoint says of itself; None of a damaged one."""
    try:
        return _parse(folder)[0]
    except _DAMAGES:
        return None


def _attempt(action: Callable[[], None]) -> str | None:
    """Do something; return what went wrong, if anything did."""
    from safetensors import SafetensorError

    try:
        action()
    except ConfigError as error:
        return str(error)
    except (OSError, SafetensorError) as error:
        return f"{error}. Make room or give write access, and resume."
    return None


def _rank_file(rank: int) -> str:
    return f"rank-{rank:04d}.safetensors"


def _checksum(file: Path) -> dict[str, int]:
    crc = 0
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return {"bytes": file.stat().st_size, "crc32": crc}


def _flush(path: Path) -> None:
    """Make sure that a file's bytes, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
