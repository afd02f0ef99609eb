"""The plugin `heartbeat` under real runs."""

import logging
from pathlib import Path

import pytest
from tiny import Net, Tensors, train_tiny

import iris_hf


def test_heartbeat_logs_steps_and_batches_at_its_interval(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="iris_hf.engine.plugins.heartbeat"):
        train_tiny(num_epochs=1, plugins=["heartbeat(0)"])
        assert len(caplog.messages) == 8
        assert caplog.messages[-1].startswith("Step 8 of 8 is done, loss 0.")
        iris_hf.predict(Tensors(8), Net(), batch_size=4, num_dataloader_workers=0, plugins=["heartbeat(0)"])
        assert caplog.messages[-1] == "Batch 2 of 2 is predicted."
        caplog.clear()
        train_tiny(num_epochs=1, plugins=["heartbeat"])
        assert not caplog.messages


def test_heartbeat_and_profile_write_where_nobody_listens_to_the_logger(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    train_tiny(num_epochs=1, plugins=["heartbeat(0)", f"profile(1, {str(tmp_path)!r})"])
    out, err = capsys.readouterr()
    assert "Step 8 of 8 is done" in err
    assert "aten::addmm" in err
    assert not out


def test_a_negative_interval_is_an_error() -> None:
    with pytest.raises(iris_hf.ConfigError, match="interval_in_minutes must not be negative, got -1"):
        train_tiny(plugins=["heartbeat(-1)"])
