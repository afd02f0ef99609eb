from typing import Any

import datasets
import pytest
from data_examples import hf_arguments, make_examples

from iris_hf.data.convert import to_hf
from iris_hf.data.storage import load_hf_dataset, save_hf_dataset
from iris_hf.errors import ConfigError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of one unnamed set, of one that was the split `val`, and of two splits; and a Parquet file."""
    folder = tmp_path_factory.mktemp("saved")
    rows = to_hf(make_examples("multiclass"), **hf_arguments("multiclass"))
    rows.save_to_disk(folder / "one")
    rows.to_parquet(folder / "file.parquet")
    (folder / "broken").mkdir()
    (folder / "broken" / "train.parquet").write_text("no Parquet")
    splits = datasets.DatasetDict(train=rows.select([0, 1, 2]), val=rows.select([3]))
    splits.save_to_disk(folder / "two")
    return folder


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_named_split_is_taken(saved, split):
    loaded = load_hf_dataset(saved / "two", split=split)
    assert len(loaded.dataset) == {"train": 3, "val": 1}[split]
    assert (loaded.class_names, loaded.num_classes) == (hf_arguments("multiclass")["class_names"], 3)


def test_a_saved_split_still_answers_to_its_name(saved, tmp_path):
    datasets.Dataset.from_parquet(str(saved / "file.parquet"), split="val", cache_dir=str(tmp_path)).save_to_disk(
        tmp_path / "val"
    )
    assert len(load_hf_dataset(tmp_path / "val", split="val").dataset) == len(load_hf_dataset(saved / "one").dataset)
    with pytest.raises(ConfigError, match="Leave out split='test'"):
        load_hf_dataset(tmp_path / "val", split="test")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("two", {}, "has the splits train, val. Name one of them: split='train'"),
        ("two", {"split": "test"}, "has the splits train, val. Name one of them"),
        ("one", {"split": "test"}, "is one data set without splits. Leave out split='test'"),
        ("one", {"name": "small"}, "has no configurations, as repositories have them. Leave out name='small'"),
        ("file.parquet", {"name": "small"}, "has no configurations"),
        ("file.parquet", {"revision": "v1"}, "is a local path, which has no revisions. Leave out revision='v1'"),
        ("one", {"revision": "v1"}, "is a local path, which has no revisions"),
        ("two", {"split": ["val"]}, r"split must be the name of one split, got \['val'\]"),
        ("none", {}, "No dataset could be loaded from"),
        ("broken", {}, "No dataset could be loaded from .*Parquet"),
    ],
)
def test_what_a_path_cannot_give_is_refused(saved, tmp_path, monkeypatch, name, arguments: dict[str, Any], message):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_hf_dataset(saved / name, **arguments)


@pytest.mark.parametrize("path", [None, 3, ""])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(ConfigError, match=r"path must be a folder, a \.parquet file or a repository"):
        load_hf_dataset(path)


def test_a_data_set_is_not_saved_over_a_file(saved):
    with pytest.raises(ConfigError, match=r"but '.*file\.parquet' is a file"):
        save_hf_dataset(load_hf_dataset(saved / "one").dataset, saved / "file.parquet")
