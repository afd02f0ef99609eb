"""Keeping the best model of a run."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any, Literal

from torch import nn

from iris_hf.engine.plugins.base import Plugin, TrainState
from iris_hf.engine.plugins.monitor import Best, require_validation
from iris_hf.errors import ConfigError
from iris_hf.models.hub import save_pretrained

logger = logging.getLogger(__name__)

_INFO, _WEIGHTS = "best.json", "model.safetensors"


class SaveBest(Plugin):
    """Saves the model whenever a validation is the best so far.

    The folder holds what :func:`iris_hf.save_pretrained` writes, or `model.safetensors` alone where nothing tells how
    the model was made, and `best.json` with the metric, its value, epoch (from 1), step, and the names of these files.
    It is replaced as a whole: a process that is killed as it does so leaves both models beside the folder, and the next
    run with the plugin puts the better one there. With the plugin ema, the saved weights are the averaged ones, which
    were validated.

    Attributes:
        folder: Absent, empty, or written by this plugin before. Nothing else may write to it.
        metric: `val_loss`, or what the plugin val_metrics measures.
        mode: Whether `min` or `max` is better; needed for anything but `val_loss`.
    """

    def __init__(self, folder: str | Path, metric: str = "val_loss", mode: Literal["min", "max"] | None = None) -> None:
        self.folder = Path(folder)
        self._best = Best(metric, mode)
        self._own: set[str] = set()

    def on_train_start(self, state: TrainState) -> None:
        """Refuse a run without validations, or whose folder holds other things, or will.

        Raises:
            ConfigError: In these cases.
        """
        require_validation(state, "save_best")
        checkpoints = state.config.get("checkpoint_dir")
        if checkpoints is not None and Path(checkpoints).resolve().is_relative_to(self.folder.resolve()):
            raise ConfigError(
                f"save_best replaces its folder, and {str(self.folder)!r} would hold the checkpoints of "
                f"checkpoint_dir={str(checkpoints)!r}. Give it another one, such as {str(Path(checkpoints, 'best'))!r}."
            )
        if state.is_main_process:
            self._finish_replacing()
        state.accelerator.wait_for_everyone()  # nobody looks before
        self._own = _written_to(self.folder)
        if others := _names_in(self.folder) - self._own:
            raise ConfigError(
                f"save_best replaces its folder, and {str(self.folder)!r} holds other things: "
                f"{', '.join(sorted(others))}. Give it a folder of its own."
            )
        self.folder.parent.mkdir(parents=True, exist_ok=True)

    def on_validation_end(self, state: TrainState) -> None:
        """Save the model if it is the best so far."""
        if self._best.improves(state) and state.is_main_process:
            info = {"metric": self._best.metric, "value": self._best.value, "epoch": state.epoch + 1}
            self._replace(state.model, {**info, "step": state.step})

    def on_exit(self) -> None:
        """Forget the run."""
        self._best.value = None

    def state_dict(self) -> dict[str, Any]:
        """Return the best value."""
        return {"best": self._best.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._best.value = state["best"]

    def _replace(self, model: nn.Module, info: dict[str, Any]) -> None:
        new, old = self._beside()
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        _save(model, new)
        info = {**info, "files": sorted(_names_in(new))}
        (new / _INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        if others := _names_in(self.folder) - self._own:
            raise ConfigError(
                f"save_best replaces its folder, and {str(self.folder)!r} now holds other things: "
                f"{', '.join(sorted(others))}. Give it a folder of its own; the best model so far is in {str(new)!r}."
            )
        self._own = _names_in(new)
        if self.folder.exists():
            self.folder.rename(old)
        new.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def _finish_replacing(self) -> None:
        """Put the new model into its place where a kill has come between the two renames."""
        new, old = self._beside()
        if old.exists() and not _names_in(self.folder) and _written_to(new):
            new.rename(self.folder)
            shutil.rmtree(old, ignore_errors=True)

    def _beside(self) -> tuple[Path, Path]:
        """Where a new model is made, and where the one before is put as the new one takes its place."""
        new, old = (self.folder.with_name(f".{self.folder.name}-{what}") for what in ("new", "old"))
        return new, old


def _names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def _written_to(folder: Path) -> set[str]:
    """What this plugin has written to a folder, as the folder itself says; nothing where it does not."""
    try:
        return {_INFO, *json.loads((folder / _INFO).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def _save(model: nn.Module, folder: Path) -> None:
    try:
        save_pretrained(model, folder)
    except ConfigError as error:
        logger.info("save_best: the weights alone are saved. %s", error)
        from safetensors.torch import save_model

        folder.mkdir(parents=True, exist_ok=True)
        save_model(model, str(folder / _WEIGHTS))
