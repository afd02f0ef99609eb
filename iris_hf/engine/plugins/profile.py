"""Where the time goes."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from iris_hf.engine.plugins.base import Plugin, PredictState, RunState, TrainState
from iris_hf.errors import ConfigError

logger = logging.getLogger(__name__)

_NUM_ROWS = 15


class Profile(Plugin):
    """Records some steps with torch.profiler, after one that warms up.

    Every process writes `<folder>/train-rank<r>.json` or `predict-rank<r>.json`, which https://ui.perfetto.dev and
    chrome://tracing show; the most expensive operations are logged at level INFO. Fewer steps than asked for are
    recorded where a run has fewer.

    Attributes:
        num_steps: Steps, or batches in prediction, to record.
        folder: Made if absent.
    """

    def __init__(self, num_steps: int = 10, folder: str = "profile") -> None:
        if num_steps < 1:
            raise ConfigError(f"profile: num_steps must be at least 1, got {num_steps}.")
        self.num_steps = num_steps
        self.folder = folder
        self._profiler: torch.profiler.profile | None = None
        self._remaining = 0

    def on_train_start(self, state: TrainState) -> None:
        """Begin."""
        self._begin(state, "train")

    def on_step_end(self, state: TrainState) -> None:
        """Count a step."""
        self._advance()

    def on_prediction_start(self, state: PredictState) -> None:
        """Begin."""
        self._begin(state, "predict")

    def on_prediction_batch_end(self, state: PredictState) -> None:
        """Count a batch."""
        self._advance()

    def on_exit(self) -> None:
        """Write what was recorded."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _begin(self, state: RunState, what: str) -> None:
        path = Path(self.folder, f"{what}-rank{state.accelerator.process_index}.json")
        path.parent.mkdir(parents=True, exist_ok=True)

        def write(profiler: torch.profiler.profile) -> None:
            profiler.export_chrome_trace(str(path))
            on_gpu = state.accelerator.device.type == "cuda"
            table = profiler.key_averages().table(
                sort_by="self_cuda_time_total" if on_gpu else "self_cpu_time_total", row_limit=_NUM_ROWS
            )
            logger.info("Profile of %s in %s\n%s", what, path, table)

        self._profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=self.num_steps, repeat=1), on_trace_ready=write
        )
        self._remaining = self.num_steps + 1
        self._profiler.start()

    def _advance(self) -> None:
        if self._profiler is None:
            return
        self._profiler.step()
        self._remaining -= 1
        if not self._remaining:
            self.on_exit()
