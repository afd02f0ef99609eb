"""Local data sets that would have files read that are not their own. Those of the Hub are in tests/hub."""

import json
import os
import shutil
import zipfile

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iris_hf.data.convert import to_hf
from iris_hf.data.hf_dataset import from_hf
from iris_hf.data.storage import load_hf_dataset
from iris_hf.data.trust import Origin, find_origin
from iris_hf.errors import ConfigError, DataError

LABEL = datasets.ClassLabel(names=["a", "b"])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def private(tmp_path):
    """An image that no data set here holds."""
    (tmp_path / "private").mkdir()
    PIL.Image.new("RGB", (9, 9)).save(tmp_path / "private" / "private.png")
    return str(tmp_path / "private" / "private.png")


@pytest.fixture
def folder(tmp_path):
    """The folder of a data set, with an image in it."""
    folder = tmp_path / "mine"
    (folder / "a").mkdir(parents=True)
    PIL.Image.new("RGB", (8, 8)).save(folder / "a" / "own.png")
    return folder


def write_parquet(path, images, **columns):
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    features = datasets.Features({"image": datasets.Image(), "label": LABEL})
    masks = [[{"bytes": None, "path": mask} for mask in row] for row in columns.pop("annotation", ())]
    data = {
        "image": pa.array([{"bytes": None, "path": i} if isinstance(i, str) else i for i in images], image),
        "label": pa.array([0] * len(images), pa.int64()),
    }
    if masks:
        features["annotation"] = datasets.List(datasets.Image())
        data["annotation"] = pa.array(masks, pa.list_(image))
    table = pa.table(data)
    pq.write_table(table.replace_schema_metadata(features.arrow_schema.metadata), path)


def test_a_parquet_file_names_images_beside_it_alone(folder, private, tmp_path):
    own = {"bytes": (folder / "a" / "own.png").read_bytes(), "path": private}  # the bytes count
    write_parquet(folder / "fine.parquet", [own, str(folder / "a" / "own.png"), f"{folder}/a/../a/own.png", None])
    assert [load_hf_dataset(folder / "fine.parquet").dataset[i][0].size for i in range(3)] == [(8, 8)] * 3
    for name, path in {
        "absolute": private,
        "climbing": f"{folder}/../private/private.png",
        "relative": "private.png",
        "address": "http://127.0.0.1:9/x",
        "repository": "hf://datasets/evil/other@main/x.png",
        "home": f"file://{private}",
    }.items():
        write_parquet(tmp_path / "mine" / f"{name}.parquet", [own, path])
        with pytest.raises(DataError, match=f"Example 1: the column 'image' names the file '.*{path[-5:]}', which is"):
            load_hf_dataset(folder / f"{name}.parquet")


def test_no_mask_is_read_from_elsewhere(folder, private):
    own = str(folder / "a" / "own.png")
    write_parquet(folder / "masks.parquet", [own, own, own], annotation=[[own], [], [own, private]])
    with pytest.raises(DataError, match=r"Example 2: the column 'annotation' names the file '.*private\.png'"):
        load_hf_dataset(folder / "masks.parquet")


def test_images_of_ones_own_may_lie_anywhere(folder, private):
    rows = datasets.Dataset.from_dict({"image": [private], "label": [0]})
    assert from_hf(rows.cast_column("image", datasets.Image()).cast_column("label", LABEL))[0][0].size == (9, 9)
    write_parquet(folder / "own.parquet", [private])
    rows = datasets.load_dataset("parquet", data_files=str(folder / "own.parquet"), split="train")
    assert from_hf(rows)[0][0].size == (9, 9)
    assert from_hf(rows.to_iterable_dataset()).make_example(next(iter(from_hf(rows).hf_dataset)), 0)


def test_rows_that_are_dropped_are_not_refused(folder, private, tmp_path):
    """As what `datasets` leaves in its cache for a repository of the Hub."""
    cached = tmp_path / "evil___data" / "default" / "0.0.0" / ("0" * 40) / "data-train.arrow"
    cached.parent.mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image(), "label": LABEL})
    own = {"bytes": (folder / "a" / "own.png").read_bytes(), "path": None}
    table = pa.table({"image": [own, {"bytes": None, "path": private}, own], "label": [0, 0, 1]})
    with pa.OSFile(str(cached), "wb") as file, pa.ipc.new_stream(file, features.arrow_schema) as writer:
        writer.write_table(table.cast(features.arrow_schema))
    rows = datasets.Dataset.from_file(str(cached))
    with pytest.raises(DataError, match=r"Example 1: .*private\.png', which is not of the data set 'evil/data'"):
        from_hf(rows)
    with pytest.raises(DataError, match="Example 0: "):
        from_hf(rows.select([1, 2]))
    assert [from_hf(rows.select([2, 0]))[i][0].size for i in range(2)] == [(8, 8)] * 2


def test_a_folder_of_images_is_read(folder, private):
    (folder / "b").mkdir()
    os.symlink(private, folder / "b" / "linked.png")  # the caller's own business
    loaded = load_hf_dataset(folder)
    assert sorted(image.size for image, _ in loaded.dataset) == [(8, 8), (9, 9)]
    os.symlink(folder, folder.parent / "linked")
    assert len(load_hf_dataset(folder.parent / "linked").dataset) == 2


def test_an_archive_of_images_is_read(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.write(folder / "a" / "own.png", "own.png")
        archive.writestr("metadata.csv", "file_name,label\nown.png,0\n")
    shutil.rmtree(folder / "a")
    shutil.move(tmp_path / "train.zip", folder)
    assert load_hf_dataset(folder, class_names=["a"]).dataset[0][0].size == (8, 8)


@pytest.mark.parametrize("file", ["README.md", ".huggingface.yaml"])
def test_the_description_of_a_folder_names_its_own_files_alone(file, folder, tmp_path):
    write_parquet(folder / "own.parquet", [str(folder / "a" / "own.png")])
    write_parquet(tmp_path / "other.parquet", [str(folder / "a" / "own.png")])
    (folder / file).write_text("---\nconfigs:\n- config_name: x\n  data_files: own.parquet\n---\n".strip("-\n"))
    for path in (f"{tmp_path}/other.parquet", "../other.parquet", "http://127.0.0.1:9/x.parquet", "file:/etc/x.csv"):
        text = f"configs:\n- config_name: x\n  data_files:\n  - split: train\n    path: [own.parquet, '{path}']\n"
        (folder / file).write_text(f"---\n{text}---\n" if file == "README.md" else text)
        with pytest.raises(DataError, match=rf"{file} of '.*mine' names the data_files '.*{path[-5:]}'"):
            load_hf_dataset(folder)
    text = "configs:\n- config_name: x\n  data_files: own*\n  data_dir: ''\n"
    (folder / file).write_text(f"---\n{text}---\n" if file == "README.md" else text)
    assert len(load_hf_dataset(folder).dataset) == 1


def test_a_saved_folder_names_its_own_files_alone(tmp_path):
    rng = np.random.default_rng(0)
    images = [PIL.Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8)) for _ in range(2)]
    rows = to_hf([(image, 0) for image in images], target_type="multiclass", class_names=["a"])
    for name in ("secret", "plain"):
        rows.save_to_disk(tmp_path / name)
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "splits")
    for folder in (tmp_path / "plain", tmp_path / "splits" / "train"):
        state = json.loads((folder / "state.json").read_text())
        state["_data_files"] = [{"filename": "../secret/data-00000-of-00001.arrow"}]
        (folder / "state.json").write_text(json.dumps(state))
        with pytest.raises(DataError, match=r"state\.json' names '\.\./secret/data-.*', which is not in its folder"):
            load_hf_dataset(tmp_path / folder.relative_to(tmp_path).parts[0])
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["../secret"]}')
    with pytest.raises(DataError, match=r"dataset_dict\.json' names '\.\./secret'"):
        load_hf_dataset(tmp_path / "splits")
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"parts": []}')
    with pytest.raises(DataError, match=r"does not describe a saved data set: KeyError\('splits'\). Save it again"):
        load_hf_dataset(tmp_path / "splits")


def test_a_bucket_is_left_to_datasets():
    with pytest.raises(ConfigError, match=r"'hf://buckets/me/photos' is a bucket\. Load it with datasets"):
        load_hf_dataset("hf://buckets/me/photos")


def test_a_script_is_not_run_and_the_way_out_is_named(folder):
    (folder / "mine.py").write_text("1 / 0")
    with pytest.raises(DataError, match=r"holds a script, which is not run.*give one that holds the data files alone"):
        load_hf_dataset(folder)


def test_a_path_into_an_archive_leads_where_the_archive_is():
    origin = Origin("me/photos", ("/data/",), ("me/photos",))
    for path in (
        "/data/a.png",
        "zip://../x::/data/a.zip",
        "zip://x::hf://datasets/me/photos@1/a.zip",
        "/data/../data/a",
    ):
        assert origin.holds(path), path
    for path in (
        "zip://x::/other/a.zip", "http://host/x::hf://datasets/me/photos@1/a.zip", "hf://datasets/me/photos2@1/a.zip",
        "zip://x::hf://datasets/me/other@1/a.zip", "hf://datasets/me/photos@1/../a", "/database/a", "https://data/a",
        "zip://x::file:///data/a.zip", "hf://models/me/photos@1/a",
    ):  # fmt: skip
        assert not origin.holds(path), path


def test_a_set_that_was_made_here_has_no_origin():
    assert find_origin(datasets.Dataset.from_dict({"a": [1]})) is None
    assert find_origin(datasets.Dataset.from_dict({"a": [1]}).to_iterable_dataset()) is None
