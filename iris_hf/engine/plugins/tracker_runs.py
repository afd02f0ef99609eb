"""What trackers can do beside the interface that Accelerate gives them: pictures, going on in a run, failed runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    Picture = np.ndarray[Any, Any]

_WITHOUT_PICTURES = ("aim", "clearml")  # they have a log_images of other forms, which nobody has tried


def same_run_options(tracker: GeneralTracker) -> dict[str, str]:
    """Return the arguments by which a later tracker goes on in the same run; none where the project is the run."""
    match tracker.name:
        case "wandb":
            return {"id": tracker.tracker.id, "resume": "allow"}
        case "trackio":
            return {"name": tracker.tracker.name, "resume": "allow"}
        case "mlflow":
            return {"run_id": tracker.tracker.info.run_id}
        case "comet_ml":
            return {"experiment_key": tracker.tracker.get_key()}
    return {}


def store_hyper_parameters(tracker: GeneralTracker, values: dict[str, Any], *, again: bool) -> None:
    """Describe the run; again in one that goes on, except where what was described cannot change."""
    if not (again and tracker.name == "mlflow"):
        tracker.store_init_configuration(values)


def finish(tracker: GeneralTracker, *, failed: bool) -> None:
    """Close a run, and say where the tracker can be told that it failed or, by the exception at hand, was stopped."""
    error = sys.exception()
    if failed and tracker.name == "wandb":
        code = error.code if isinstance(error, SystemExit) else None
        tracker.tracker.finish(exit_code=code if isinstance(code, int) else 1)
    elif failed and tracker.name == "mlflow":
        import mlflow

        mlflow.end_run("KILLED" if isinstance(error, (SystemExit, KeyboardInterrupt)) else "FAILED")
    else:
        tracker.finish()


def picture_logger(tracker_class: type[GeneralTracker]) -> Callable[[GeneralTracker, str, Picture, int], None] | None:
    """Return how a tracker takes a picture (uint8 `[H, W, 3]`) of a name at a step; None if it takes none."""
    known = {"tensorboard": _to_tensorboard, "trackio": _to_trackio, "mlflow": _to_mlflow, "comet_ml": _to_comet}
    if tracker_class.name in known:
        return known[tracker_class.name]
    if tracker_class.name in _WITHOUT_PICTURES or not hasattr(tracker_class, "log_images"):
        return None
    return _to_others


def _to_tensorboard(tracker: GeneralTracker, name: str, picture: Picture, step: int) -> None:
    tracker.log_images({name: picture[None]}, step=step, dataformats="NHWC")


def _to_trackio(tracker: GeneralTracker, name: str, picture: Picture, step: int) -> None:
    import trackio

    tracker.log({name: trackio.Image(picture)}, step=step)


def _to_mlflow(tracker: GeneralTracker, name: str, picture: Picture, step: int) -> None:
    import mlflow

    mlflow.log_image(picture, key=name, step=step)


def _to_comet(tracker: GeneralTracker, name: str, picture: Picture, step: int) -> None:
    import PIL.Image

    tracker.tracker.log_image(PIL.Image.fromarray(picture), name=name, step=step)


def _to_others(tracker: GeneralTracker, name: str, picture: Picture, step: int) -> None:
    tracker.log_images({name: [picture]}, step=step)
