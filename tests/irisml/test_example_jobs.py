"""The jobs of examples/jobs, on data of a moment."""

import json
from pathlib import Path

import PIL.Image
import pytest
import torch
from launching import EXAMPLES

import iris_hf
from iris_hf.irisml import run_job

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 40, 210)}
FIT = {"EPOCHS": "2", "WORKERS": "0"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 8), ("test", 4)):
        for name, color in COLORS.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                shade = tuple(min(255, part + 5 * i) for part in color)
                PIL.Image.new("RGB", (64, 64), shade).save(folder / split / name / f"{i}.png")
    return str(folder)


def run_example(name: str, caplog: pytest.LogCaptureFixture, **variables: str) -> list[str]:
    job = json.loads((EXAMPLES / "jobs" / f"{name}.json").read_text())
    with caplog.at_level("INFO"):
        run_job(job, {**FIT, **variables})
    return [record.getMessage() for record in caplog.records if record.name == "irisml.tasks.print"]


TINY = {"ARCHITECTURE": "test_resnet", "PRETRAINED": "false"}


def test_four_shots_tell_colours(photos: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weights = tmp_path / "model.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), weights)
    backbone = {"ARCHITECTURE": "test_resnet", "WEIGHTS": str(weights), "SIZE": "64"}
    label, accuracy = run_example("few_shot", caplog, DATA=photos, SHOTS="4", EPOCHS="20", **backbone)
    assert label == "LABEL: accuracy"
    assert float(accuracy) > 0.6


def test_clip_learns_to_tell_colours_by_their_names(photos: str, caplog: pytest.LogCaptureFixture) -> None:
    label, accuracy = run_example("clip", caplog, DATA=photos, BATCH="24", EPOCHS="15")
    assert label == "LABEL: zero-shot accuracy"
    assert float(accuracy) > 0.6


def test_detection(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import datasets

    box = torch.tensor([[0, 0.25, 0.25, 0.75, 0.75]])
    examples = [(PIL.Image.new("RGB", (64, 64), color), box) for color in COLORS.values()]
    rows = iris_hf.to_hf(examples, target_type="detection", class_names=["square"], streaming=False)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "data"))
    label, precisions = run_example("detection", caplog, DATA=str(tmp_path / "data"), EPOCHS="1")
    assert label == "LABEL: mean average precision"
    assert precisions.startswith("{'mAP at 0.5 and 0.75': [")


def test_export_and_push(photos: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("onnxruntime", reason='the export needs the extra "onnx"')
    folders = {"MODEL_FOLDER": str(tmp_path / "model"), "ONNX_FOLDER": str(tmp_path / "onnx")}
    variables = {**TINY, **folders, "DATA": photos, "REPOSITORY": "me/colours", "DRY_RUN": "true", "EPOCHS": "1"}
    label, files = run_example("export_and_push", caplog, **variables)
    assert label == "LABEL: bytes by file"
    for name in ("README.md", "model.safetensors", "onnx/model.onnx"):
        assert f"'{name}': " in files
    assert iris_hf.from_pretrained(tmp_path / "model").class_names == sorted(COLORS)
