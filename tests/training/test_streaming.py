"""Streams train as map-style data sets do: by any number of workers and processes, killed and resumed, to the byte."""

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streams import (
    CONSTANT,
    Interrupt,
    Interruption,
    Pairs,
    assert_close,
    assert_equal,
    endless,
    load,
    rows_of,
    to_noisy_tensor,
    to_tensor,
    train_stream,
    trained_by_hand,
    write_shards,
)
from tiny import Net, train_tiny

import iris_hf
from iris_hf.engine.loader import Examples
from iris_hf.engine.plans import training_batches
from iris_hf.engine.streams import StreamBatches


@pytest.mark.parametrize("buffer_size", [0, 6])
def test_a_stream_trains_on_its_rows_in_order_pass_after_pass(shards: Path, buffer_size: int) -> None:
    weights, recorder = train_stream(iris_hf.from_hf(load(shards, buffer_size)), **CONSTANT)
    assert recorder.steps == list(range(1, 9))  # 64 of 20 rows
    assert_close(weights, trained_by_hand(endless(shards, buffer_size=buffer_size), 8))


def test_the_number_of_loader_workers_changes_no_byte(shards: Path, val_shards: Path) -> None:
    val = {"val_dataset": iris_hf.from_hf(load(val_shards)), "val_transform": to_noisy_tensor, "val_batch_size": 3}
    config = {"train_transform": to_noisy_tensor, "accumulate_grad_batches": 2, "dropout": 0.3, **val}
    alone, seen = train_stream(iris_hf.from_hf(load(shards, 6)), num_dataloader_workers=0, **config)
    for num_workers in (1, 2):
        weights, recorder = train_stream(iris_hf.from_hf(load(shards, 6)), num_dataloader_workers=num_workers, **config)
        assert_equal(weights, alone)
        assert recorder.losses == seen.losses
        assert recorder.val_losses == seen.val_losses


def test_what_a_stream_draws_and_how_it_shares_itself_does_not_depend_on_workers() -> None:
    config = {"train_transform": None, "val_dataset": Pairs(7), "val_transform": None}
    alone, seen = train_stream(Pairs(30), num_dataloader_workers=0, **config)
    weights, recorder = train_stream(Pairs(30), num_dataloader_workers=2, **config)
    assert_equal(weights, alone)
    assert recorder.val_losses == seen.val_losses


@pytest.mark.parametrize("take", [0, 15])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_interrupted_and_resumed_ends_with_the_bytes_of_one_never_stopped(
    shards: Path, num_workers: int, take: int, tmp_path: Path
) -> None:
    def run(**config: Any) -> Any:
        plugins = ["ema(0.9, 2)", *config.pop("plugins", ())]
        settings = {"train_transform": to_noisy_tensor, "dropout": 0.3, "num_dataloader_workers": num_workers}
        return train_stream(iris_hf.from_hf(load(shards, 6, take)), plugins=plugins, **settings, **config)

    never, seen = run()
    kept = {"checkpoint_dir": tmp_path, "checkpoint_steps": 3, "resume": "auto"}
    for stop in (5, 7):  # in passes 2 and 3 of 20 rows
        with pytest.raises(Interruption):
            run(plugins=[Interrupt(stop)], **kept)
    weights, recorder = run(**kept)
    assert_equal(weights, never)
    assert recorder.losses == seen.losses[6:]


def test_resuming_reads_no_more_than_one_pass(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    original = iris_hf.data.hf_dataset.HFIterableDataset.iter_rows

    def noting(self: Any, epoch: int, **arguments: Any) -> Any:
        passes.append(epoch)
        return original(self, epoch, **arguments)

    monkeypatch.setattr("iris_hf.data.hf_dataset.HFIterableDataset.iter_rows", noting)
    config = {"checkpoint_dir": tmp_path, "checkpoint_steps": 6, "resume": "auto"}
    with pytest.raises(Interruption):
        train_stream(iris_hf.from_hf(load(shards)), plugins=[Interrupt(7)], **config)
    assert passes == [0, 1, 2, 3]
    passes.clear()
    train_stream(iris_hf.from_hf(load(shards)), **config)
    assert passes == [2, 3]  # row 48 is in the third pass over 20


class Counted:
    """A stream that says what was done to its rows."""

    num_shards = 1
    is_split_by_node = False
    shuffled_by = ""

    def __init__(self) -> None:
        self.decoded: list[int] = []

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("rows are read undecoded")

    def iter_rows(self, epoch: int, *, part: int = 0, num_parts: int = 1) -> Iterator[int]:
        return iter(range(10))

    def make_example(self, row: int, position: int) -> tuple[torch.Tensor, int]:
        assert row == position
        self.decoded.append(row)
        return torch.tensor([float(row)]), row


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_decodes_its_own_rows_only(rank: int) -> None:
    dataset = Counted()
    source, batches = training_batches(
        dataset,
        batch_size=2,
        accumulation=1,
        steps_per_epoch=3,
        seed=0,
        rank=rank,
        world_size=2,
        num_parts=None,
    )
    examples = Examples(source, None, seed=0, targets_required=True)
    for batch in batches:
        examples.__getitems__(batch)
    assert dataset.decoded == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 0, 1]][rank]


class OneEmptyPart(Counted):
    """A stream in two shards, of which one is empty."""

    num_shards = 2

    def iter_rows(self, epoch: int, *, part: int = 0, num_parts: int = 1) -> Iterator[int]:
        return iter(range(10) if part else ())


def test_a_process_without_rows_has_an_error() -> None:
    settings = {"batch_size": 2, "accumulation": 1, "steps_per_epoch": 3, "seed": 0, "world_size": 2, "num_parts": None}
    for rank in range(2):
        source, batches = training_batches(OneEmptyPart(), rank=rank, **settings)
        made = Examples(source, None, seed=0, targets_required=True).__getitems__(next(iter(batches)))
        if rank == 1:
            assert [label for _, label in made] == [0, 1]
            continue
        with pytest.raises(iris_hf.DataError, match="Part 0 of the stream has no examples in pass 0"):
            made.reraise()


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.integers(0, 3))
def test_the_processes_share_every_global_batch(world_size: int, batch_size: int, num_parts: int, epoch: int) -> None:
    batch_size *= num_parts
    sampled = []
    for rank in range(world_size):
        batches = StreamBatches(
            3, num_examples=None, num_parts=num_parts, batch_size=batch_size, rank=rank, world_size=world_size
        )
        batches.epoch = epoch
        requests = list(batches)
        batches.start = 1
        assert list(batches) == requests[1:]
        rows = [[(part, row) for part, rows in request.rows for row in rows] for request in requests]
        assert all(len(batch) == batch_size for batch in rows)
        sampled.append(rows)
    share = batch_size * world_size // num_parts
    for number, parts in enumerate(zip(*sampled, strict=True), start=3 * epoch):
        wanted = [(part, row) for part in range(num_parts) for row in range(number * share, (number + 1) * share)]
        assert [row for part in parts for row in part] == wanted


def test_an_error_names_the_example_and_the_pass(bad_shards: Path, shards: Path) -> None:
    for num_workers in (0, 2):
        with pytest.raises(iris_hf.DataError, match=r"Example 3 of the stream \(pass 0\): .*image"):
            train_stream(iris_hf.from_hf(load(bad_shards)), num_dataloader_workers=num_workers)

    seen = []

    def fails_later(image: Any) -> torch.Tensor:
        seen.append(image)
        if len(seen) == 26:
            raise ValueError("bad pixel")
        return to_tensor(image)

    with pytest.raises(iris_hf.DataError, match=r"Example 5 of the stream \(pass 1\): ValueError: bad pixel"):
        train_stream(iris_hf.from_hf(load(shards)), train_transform=fails_later)


def substituted(folder: Path, bad_folder: Path, bad: set[int]) -> Iterator[Any]:
    """The rows with the next good one in the place of each bad one."""
    rows = list(itertools.chain(*(rows_of(folder, epoch) for epoch in range(5))))
    for position in range(64):
        while position % 20 in bad:
            position += 1
        yield rows[position]


def test_the_next_good_example_takes_the_place_of_a_bad_one(
    bad_shards: Path, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    by_hand = trained_by_hand(substituted(shards, bad_shards, {3, 7, 8, 19}), 8)
    alone = None
    for num_workers in (0, 2):
        caplog.clear()
        weights, _ = train_stream(
            iris_hf.from_hf(load(bad_shards)), on_bad_example="skip", num_dataloader_workers=num_workers, **CONSTANT
        )
        assert_close(weights, by_hand)
        assert_equal(weights, alone or weights)
        alone = weights
        assert "13 bad examples of the train set were skipped" in caplog.text
        assert "3 of the stream (pass 0), 3 of the stream (pass 1)" in caplog.text


def test_a_stream_of_bad_examples_is_an_error(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", [9], bad=range(9))
    with pytest.raises(iris_hf.DataError, match=r"Example 0 of the stream \(pass 0\)"):
        train_stream(iris_hf.from_hf(load(folder)), on_bad_example="skip")


class Broken(Pairs):
    """A stream of which each pass goes on where the one before has ended."""

    def __init__(self) -> None:
        super().__init__(10)
        self.only = super().__iter__()

    def __iter__(self) -> Iterator[Any]:
        return self.only


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("skip", [False, True])
def test_streams_that_cannot_be_read_say_why(num_workers: int, skip: bool, tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "train_transform": None,
        "val_transform": None,
        "num_dataloader_workers": num_workers,
        "on_bad_example": "skip" if skip else "raise",
    }
    with pytest.raises(
        iris_hf.DataError, match=r"The data set failed before example \d+ of the stream \(pass 0\): OSError"
    ):
        train_stream(Pairs(30, fails_at=13), **config)
    with pytest.raises(iris_hf.DataError, match=r"The stream has no examples in pass 0\. A stream has to"):
        train_stream(Pairs(0), **config)
    with pytest.raises(iris_hf.DataError, match=r"The stream has no examples in pass 1"):
        train_stream(Broken(), **config)
    with pytest.raises(iris_hf.DataError, match="val_dataset is empty"):
        train_stream(Pairs(10), val_dataset=Pairs(0), **config)
    with pytest.raises(iris_hf.DataError, match="dataset is empty"):
        iris_hf.predict(Pairs(0), Net(), num_dataloader_workers=num_workers)


def test_wrong_configurations_say_what_to_give(shards: Path) -> None:
    stream = iris_hf.from_hf(load(shards))
    with pytest.raises(iris_hf.ConfigError, match=r"HFIterableDataset without a length: give steps_per_epoch.*N / 16"):
        train_stream(stream, steps_per_epoch=None, accumulate_grad_batches=2)
    with pytest.raises(iris_hf.ConfigError, match="steps_per_epoch must be at least 1, got 0"):
        train_stream(stream, steps_per_epoch=0)
    with pytest.raises(iris_hf.ConfigError, match=r"steps_per_epoch must be a whole number, got 2\.5"):
        train_stream(stream, steps_per_epoch=2.5)
    with pytest.raises(iris_hf.ConfigError, match="train_dataset is a generator, which can be gone through once only"):
        train_stream(iter(Pairs(10)))
    with pytest.raises(
        iris_hf.DataError, match=r"Example 0 of the stream \(pass 0\): the dataset gave dict, not a pair"
    ):
        train_stream(load(shards))


def test_an_endless_stream_trains() -> None:
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            for number in itertools.count():
                yield torch.full((3, 4, 4), number % 7 / 7), number % 2

    for num_workers in (0, 2):
        _, recorder = train_stream(Endless(), train_transform=None, num_dataloader_workers=num_workers)
        assert recorder.steps == list(range(1, 9))


def test_a_stream_with_a_length_has_its_own_number_of_steps() -> None:
    class Sized(Pairs):
        def __len__(self) -> int:
            return self.num_examples

    for num_examples, steps in ((30, 6), (3, 2)):  # one with fewer than a step is gone through several times
        _, recorder = train_stream(Sized(num_examples), train_transform=None, steps_per_epoch=None)
        assert len(recorder.steps) == steps
    with pytest.raises(iris_hf.DataError, match="train_dataset is empty"):
        train_stream(Sized(0), train_transform=None, steps_per_epoch=None)


def test_steps_per_epoch_holds_for_map_style_data_sets_too() -> None:
    for steps in (3, 8, 21):
        weights, recorder = train_tiny(num_epochs=2, steps_per_epoch=steps)
        assert recorder.steps == list(range(1, 2 * steps + 1))
        if steps == 8:
            assert_equal(weights, train_tiny(num_epochs=2)[0])


def test_validation_and_prediction_are_those_of_a_map_style_data_set(shards: Path, val_shards: Path) -> None:
    rows = rows_of(val_shards, 0)
    stream = iris_hf.from_hf(load(val_shards))
    for num_workers in (0, 2):
        for batch_size in (5, 64):
            config = {"num_dataloader_workers": num_workers, "val_batch_size": batch_size}
            _, streamed = train_stream(iris_hf.from_hf(load(shards)), val_dataset=stream, **config)
            _, indexed = train_stream(
                iris_hf.from_hf(load(shards)), val_dataset=rows, **{**config, "val_transform": None}
            )
            assert streamed.val_losses == indexed.val_losses
            assert sorted(streamed.val_losses) == [0, 1]
        predicted = iris_hf.predict(stream, Net(), to_tensor, batch_size=4, num_dataloader_workers=num_workers)
        wanted = iris_hf.predict(rows, Net(), batch_size=4)
        assert torch.equal(predicted.predictions, wanted.predictions)
        assert predicted.targets.tolist() == [label for _, label in rows]


def test_a_held_out_part_of_a_stream_is_never_trained_on(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    def numbers(stream: datasets.IterableDataset, epoch: int) -> list[bytes]:
        return [row["image"]["bytes"] for row in iris_hf.from_hf(stream).iter_rows(epoch)]

    for rows in (load(shards), load(shards, 6)):
        held_out, everything = numbers(rows.take(5), 0), numbers(rows, 0)
        for epoch in range(4):
            assert sorted(numbers(rows.skip(5), epoch) + held_out) == sorted(everything)
    assert "has the same order in every pass. For another order in each, cut it first" in caplog.text
    cut_first = load(shards).skip(5).shuffle(seed=0, buffer_size=6)
    passes = [numbers(cut_first, epoch) for epoch in range(3)]
    assert passes[0] != passes[1] != passes[2]
    assert all(sorted(rows) == sorted(passes[0]) for rows in passes)


def test_streams_whose_rows_depend_on_the_whole_are_not_divided(even_shards: Path) -> None:
    stream = load(even_shards)
    assert iris_hf.from_hf(stream).num_shards > 1
    for whole in (
        stream.skip(3),
        stream.take(3),
        stream.skip(3).shuffle(seed=0),
        datasets.interleave_datasets([stream] * 2),
    ):
        assert iris_hf.from_hf(whole).num_shards == 1


def test_a_transform_in_place_changes_no_later_example() -> None:
    class Fresh(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
            return iter([(torch.full((3, 4, 4), float(i)), i % 2) for i in range(8)])

    def doubled(image: torch.Tensor) -> torch.Tensor:
        torch.rand(())  # drawing makes a batch twice
        return image.mul_(2)

    config = {"train_transform": doubled, "val_transform": doubled, "base_lr": 0.0, "num_epochs": 3}
    _, seen = train_stream(Fresh(), val_dataset=Fresh(), **config)
    assert len(set(seen.val_losses.values())) == 1
    _, with_workers = train_stream(Fresh(), val_dataset=Fresh(), num_dataloader_workers=2, **config)
    assert seen.losses == with_workers.losses


def test_train_and_validation_may_read_the_same_stream(shards: Path) -> None:
    stream = load(shards, 6)
    together, seen = train_stream(
        iris_hf.from_hf(stream.skip(5)), val_dataset=iris_hf.from_hf(stream.take(5)), num_epochs=4, steps_per_epoch=2
    )
    apart, _ = train_stream(iris_hf.from_hf(load(shards, 6).skip(5)), num_epochs=4, steps_per_epoch=2)
    assert_equal(together, apart)
    assert len(seen.val_losses) == 4


def test_a_gradient_cache_takes_streams(shards: Path) -> None:
    cached = iris_hf.train_with_gradient_cache(
        Net(),
        iris_hf.from_hf(load(shards)),
        to_tensor,
        num_epochs=2,
        batch_size=8,
        base_lr=0.1,
        random_seed=0,
        steps_per_epoch=4,
        sub_batch_size=3,
        **CONSTANT,
    )
    assert_close(cached.model.state_dict(), trained_by_hand(endless(shards), 8))


def test_nothing_is_said_where_nothing_is_skipped(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "iris_hf"):
        train_stream(iris_hf.from_hf(load(shards)), on_bad_example="skip")
    assert "skipped" not in caplog.text
