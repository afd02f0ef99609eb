"""Run by tests: trains with a tracker that writes into a folder, or reads back what one has written there, as JSON.

A process of its own, since trackers keep state in their modules, and their libraries warn of themselves.
"""

import json
import os
import signal
import struct
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiny import Dies, Tensors, train_tiny

import iris_hf

BLOCK, FILE_HEADER, RECORD_HEADER = 32768, 7, 7
OPTIONS = {"comet_ml": {"online": False}, "trackio": {"auto_log_cpu": False}}
SETTINGS = {"val_dataset": Tensors(8, seed=1), "num_epochs": 2}
EVERY = 3


class IsPreempted(iris_hf.Plugin):
    def on_step_end(self, state: iris_hf.TrainState) -> None:
        if state.step == EVERY + 1:  # something was sent
            os.kill(os.getpid(), signal.SIGTERM)


class NotANumber(iris_hf.Plugin):
    """Measures what is not a number."""

    def validation_metrics(self, state: iris_hf.TrainState) -> dict[str, float]:
        return {"undefined": float("nan")}


def set_up(folder: Path) -> None:
    """Let every tracker write into a folder, and nothing leave this machine."""
    os.environ.update(
        WANDB_MODE="offline",
        WANDB_SILENT="true",
        WANDB_DIR=str(folder),
        TRACKIO_DIR=str(folder / "trackio"),
        MLFLOW_TRACKING_URI=f"sqlite:///{folder}/mlflow.db",
        COMET_OFFLINE_DIRECTORY=str(folder),
        COMET_LOGGING_CONSOLE="ERROR",
    )
    folder.mkdir(exist_ok=True)
    os.chdir(folder)


def train(name: str, folder: Path, *others: iris_hf.Plugin) -> None:
    options = OPTIONS.get(name, {})
    plugins: list[Any] = [
        f"log_tracker({name!r}, 'mine', every={EVERY}, num_images=5, options={options})",
        NotANumber(),
    ]
    checkpoints = {"checkpoint_dir": folder / "checkpoints", "checkpoint_steps": 5, "resume": "auto"}
    optimizer = {"optimizer": "adam", "lr_scheduler": {"name": "linear_decreasing"}}
    train_tiny(plugins=[*plugins, *others], **SETTINGS, **checkpoints, **optimizer)


def read(name: str, folder: Path) -> dict[str, Any]:
    """Return what was written: `metrics` name -> step -> values, `pictures` step -> files, `parameters`, and so on."""
    found: dict[str, Any] = {
        "metrics": defaultdict(lambda: defaultdict(list)),
        "parameters": {},
        "pictures": defaultdict(list),
        "runs": [],
        "status": [],
    }
    {"wandb": read_wandb, "trackio": read_trackio, "mlflow": read_mlflow, "comet_ml": read_comet}[name](folder, found)
    found["runs"] = sorted(set(found["runs"]))
    return found


def read_mlflow(folder: Path, found: dict[str, Any]) -> None:
    import mlflow

    client = mlflow.MlflowClient()
    for run in client.search_runs([client.get_experiment_by_name("mine").experiment_id]):
        found["runs"].append(run.info.run_id)
        found["status"].append(run.info.status)
        found["parameters"].update(run.data.params)
        for metric in run.data.metrics:
            for value in client.get_metric_history(run.info.run_id, metric):
                found["metrics"][metric][value.step].append(value.value)
        for file in client.list_artifacts(run.info.run_id, "images"):
            if file.path.endswith(".png"):
                step = int(file.path.replace("%", "+").split("+step+")[1].split("+")[0])
                found["pictures"][step].append(str(next(folder.rglob(Path(file.path).name))))


def read_trackio(folder: Path, found: dict[str, Any]) -> None:
    import sqlite3

    database = sqlite3.connect(folder / "trackio" / "mine.db")
    for run, step, metrics in database.execute("select run_name, step, metrics from metrics order by id"):
        found["runs"].append(run)
        for metric, value in json.loads(metrics).items():
            if isinstance(value, dict):
                found["pictures"][step].append(str(folder / "trackio" / "media" / value["file_path"]))
            else:
                found["metrics"][metric][step].append(float(value))
    for (config,) in database.execute("select config from configs"):
        found["parameters"].update(json.loads(config))


def read_wandb(folder: Path, found: dict[str, Any]) -> None:
    from wandb.proto import wandb_internal_pb2

    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for bytes_ in records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(bytes_)
            found["runs"] += [record.run.run_id] if record.HasField("run") else []
            found["status"] += [record.exit.exit_code] if record.HasField("exit") else []
            for item in [*record.config.update, *record.run.config.update]:
                found["parameters"]["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
            if record.HasField("history"):
                values = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                for metric, value in values.items():
                    if metric.endswith("/filenames"):
                        found["pictures"][values["_step"]] += [str(file.parent / "files" / name) for name in value]
                    elif "/" not in metric:
                        found["metrics"][metric][values["_step"]].append(float(value))


def records(content: bytes) -> Iterator[bytes]:
    """Take the records out of a file in the format of LevelDB's log, whose blocks hold them in pieces."""
    position, parts = FILE_HEADER, b""
    while position + RECORD_HEADER <= len(content):
        if BLOCK - position % BLOCK < RECORD_HEADER:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        position += RECORD_HEADER
        parts += content[position : position + length]
        position += length
        if kind in (1, 4):  # the whole, or its last piece
            yield parts
            parts = b""


def read_comet(folder: Path, found: dict[str, Any]) -> None:
    for file in sorted(folder.glob("*.zip"), key=lambda path: path.stat().st_mtime_ns):
        with zipfile.ZipFile(file) as archive:
            found["runs"].append(json.loads(archive.read("experiment.json"))["offline_id"])
            for line in archive.read("messages.json").splitlines():
                message = json.loads(line)["payload"]
                if "metric" in message:
                    metric = message["metric"]
                    found["metrics"][metric["metricName"]][metric["step"]].append(float(metric["metricValue"]))
                elif "param" in message:
                    found["parameters"][message["param"]["paramName"]] = message["param"]["paramValue"]
                elif message.get("upload_type") == "visualization":
                    step = message["additional_params"]["step"]
                    picture = folder / f"picture-{file.stem}-{step}.png"
                    picture.write_bytes(archive.read(message["file_path"]))
                    found["pictures"][step].append(str(picture))


if __name__ == "__main__":
    what, name, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    set_up(folder)
    if what == "train":
        die_at = int(sys.argv[4])
        train(name, folder, *([Dies(die_at)] if die_at else []))
    elif what == "preempt":
        train(name, folder, IsPreempted())
    else:
        Path(sys.argv[4]).write_text(json.dumps(read(name, folder)))
