"""Where the time goes."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from iris_hf.engine.plugins.base import Plugin, PredictState, RunState, TrainState
from iris_hf.engine.plugins.telling import tell
from iris_hf.errors import ConfigError

logger = logging.getLogger(__name__)

_NUM_ROWS = 15


class Profile(Plugin):
    """Records some steps with torch.profiler, after a first one that warms up.

    Every process writes `<folder>/train-rank<r>.json` or `predict-rank<r>.json`, which https://ui.perfetto.dev and
    chrome://tracing show. The most expensive operations are logged at level INFO, or written to stderr where nobody
    listens to that. Fewer steps than asked for are recorded where a run has fewer.

    Attributes:
        num_steps: Steps, or batches in prediction, to record.
        folder: Made if absent.
    """

    def __init__(self, num_steps: int = 10, folder: str = "profile") -> None:
        if num_steps < 1:
            raise ConfigError(f"profile: num_steps must be at least 1, got {num_steps}.")
        self.num_steps = num_steps
        self.folder = folder
        self._name = ""
        self._on_gpu = False
        self._profiler: torch.profiler.profile | None = None
        self._remaining = 0

    def on_train_start(self, state: TrainState) -> None:
        """Wait for the first step."""
        self._prepare(state, "train")

    def on_step_end(self, state: TrainState) -> None:
        """Begin after the first step, end after the last that is wanted."""
        self._advance()

    def on_prediction_start(self, state: PredictState) -> None:
        """Wait for the first batch."""
        self._prepare(state, "predict")

    def on_prediction_batch_end(self, state: PredictState) -> None:
        """Begin after the first batch, end after the last that is wanted."""
        self._advance()

    def on_exit(self) -> None:
        """Write what was recorded."""
        self._remaining = 0
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        path = Path(self.folder, f"{self._name}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        order = "self_cuda_time_total" if self._on_gpu else "self_cpu_time_total"
        tell(logger, f"Profile in {path}\n{profiler.key_averages().table(sort_by=order, row_limit=_NUM_ROWS)}")

    def _prepare(self, state: RunState, what: str) -> None:
        self._name = f"{what}-rank{state.accelerator.process_index}"
        self._on_gpu = state.accelerator.device.type == "cuda"
        self._remaining = self.num_steps + 1

    def _advance(self) -> None:
        if not self._remaining:
            return
        self._remaining -= 1
        if not self._remaining:
            self.on_exit()
        elif self._profiler is None:
            # acc_events: without it torch warns that several recordings would overwrite each other
            self._profiler = torch.profiler.profile(acc_events=True)
            self._profiler.start()
