"""An example that cannot be made stops training by name, or is skipped, counted and named."""

import logging
from typing import Any

import pytest
import torch
from tiny import Tensors, train_tiny

import iris_hf


class Corrupt(Tensors):
    """Some examples cannot be read."""

    def __init__(self, num_examples: int, bad: set[int]) -> None:
        super().__init__(num_examples)
        self.bad = bad

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index in self.bad:
            raise OSError(f"image {index} is cut short")
        return super().__getitem__(index)


class Substituted(Corrupt):
    """The next good one stands for each of them."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        while index in self.bad:
            index = (index + 1) % len(self)
        return super().__getitem__(index)


BAD = {3, 17, 18, 63}


def train(monkeypatch: pytest.MonkeyPatch, dataset: torch.utils.data.Dataset, **config: Any) -> Any:
    monkeypatch.setattr("tiny.Tensors", lambda num_examples: dataset)
    return train_tiny(**config)


def test_an_error_names_the_example_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(iris_hf.DataError, match=r"Example 17.*image 17 is cut short"):
        train(monkeypatch, Corrupt(64, {17}))


@pytest.mark.parametrize("config", [{}, {"num_dataloader_workers": 2}, {"num_processes": 2, "batch_size": 4}])
def test_skipped_examples_are_replaced_counted_and_named(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weights, recorder = train(monkeypatch, Corrupt(64, BAD), on_bad_example="skip", **config)
    wanted, expected = train(monkeypatch, Substituted(64, BAD))
    assert recorder.steps == expected.steps
    for name, weight in wanted.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6)
    if "num_processes" not in config:  # workers have a log of their own
        assert "4 bad examples of the train set were skipped" in caplog.text
        assert "3, 17, 18, 63" in caplog.text
        assert "image 3 is cut short" in caplog.text


def test_nothing_is_said_where_nothing_is_skipped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "iris_hf"):
        train(monkeypatch, Tensors(64), on_bad_example="skip")
    assert "skipped" not in caplog.text


def test_a_data_set_of_bad_examples_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(iris_hf.DataError, match=r"Example \d+.*is cut short"):
        train(monkeypatch, Corrupt(64, set(range(64))), on_bad_example="skip")


def test_an_unknown_way_is_an_error() -> None:
    with pytest.raises(iris_hf.ConfigError, match=r"on_bad_example 'skp'.*skip"):
        train_tiny(on_bad_example="skp")
