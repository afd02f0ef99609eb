import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import pytest
import torch
from tiny import Net, Tensors

import iris_hf
from iris_hf.data import forking

HANGS: list[Path] = []
"""Files where the next forked processes that hang write their ids: each of them as long as one is not there."""


def hang_while_forking() -> None:
    """Do what Python before 3.11.10 does now and then: wait for a lock whose holder was not forked."""
    for note in HANGS:
        with contextlib.suppress(FileExistsError), note.open("x") as file:
            file.write(str(os.getpid()))
            file.flush()
            time.sleep(60)


@pytest.fixture
def hangs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    if multiprocessing.get_start_method() != "fork":
        pytest.skip("nothing is forked here")
    os.register_at_fork(after_in_child=hang_while_forking)
    monkeypatch.setattr(forking, "START_SECONDS", 1.0)
    yield HANGS
    HANGS.clear()


def test_processes_that_hang_while_they_are_forked_are_started_again(
    hangs: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = iris_hf.predict(Tensors(13), Net(), batch_size=2)
    hangs.append(tmp_path / "predict")
    loaded = iris_hf.predict(Tensors(13), Net(), batch_size=2, num_dataloader_workers=2)
    assert (tmp_path / "predict").exists()
    assert torch.equal(loaded.predictions, alone.predictions)
    assert caplog.messages == ["Start 1 of a process that loads data: it hung for 1 s."]

    hangs.append(tmp_path / "to_hf")
    pictures = [(PIL.Image.new("L", (2, 2), shade), shade % 3) for shade in range(9)]
    dataset = iris_hf.to_hf(pictures, target_type="multiclass", class_names=["a", "b", "c"], num_proc=2)
    assert (tmp_path / "to_hf").exists()
    assert list(dataset["label"]) == [0, 1, 2] * 3
    assert len(caplog.messages) == 2


def test_a_process_that_hangs_in_every_start_is_an_error(hangs: list[Path], tmp_path: Path) -> None:
    hangs += [tmp_path / str(start) for start in range(3)]
    with pytest.raises(RuntimeError, match=r"hung in each of 3 starts.*num_dataloader_workers=0"):
        iris_hf.predict(Tensors(13), Net(), batch_size=2, num_dataloader_workers=2)
    for note in hangs:
        with pytest.raises(ProcessLookupError):
            os.kill(int(note.read_text()), 0)
