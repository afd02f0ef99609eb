import os
import random
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from data_examples import (
    CLASS_NAMES,
    assert_same_example,
    assert_same_image,
    assert_same_target,
    encode,
    hf_arguments,
    make_examples,
    noise,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_images import ODD

from iris_hf.data.convert import to_hf
from iris_hf.data.hf_dataset import from_hf
from iris_hf.data.images import encode_image
from iris_hf.errors import ConfigError, DataError


class Examples(torch.utils.data.Dataset):
    """A map-style data set that can only be read by index."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


class Stream(torch.utils.data.IterableDataset):
    """An iterable that shares itself among workers, as torch's documentation tells to."""

    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        yield from self.examples if worker is None else self.examples[worker.id :: worker.num_workers]


def unchanged(value):
    return value


def assert_same(actual, expected):
    actual = list(actual)
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert_same_example(one, other)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_round_trip_is_exact(kind, num_proc):
    examples = make_examples(kind)
    arguments = hf_arguments(kind)
    dataset = from_hf(to_hf(Examples(examples), num_proc=num_proc, **arguments))
    assert dataset.target_type == arguments["target_type"]
    assert dataset.class_names == (arguments["class_names"] or [])
    assert_same((dataset[i] for i in range(len(dataset))), examples)
    assert_same(dataset.__getitems__(range(len(examples))), examples)
    for index, (_, target) in enumerate(examples):
        assert_same_target(dataset.get_targets(index), target)


@pytest.mark.parametrize("storage", ["save_to_disk", "parquet"])
def test_round_trip_survives_storage(kind, storage, tmp_path):
    examples, arguments = make_examples(kind), hf_arguments(kind)
    converted = to_hf(examples, **arguments)
    if storage == "save_to_disk":
        converted.save_to_disk(tmp_path / "saved")
        stored = datasets.load_from_disk(tmp_path / "saved")
    else:
        converted.to_parquet(tmp_path / "data.parquet")
        stored = datasets.Dataset.from_parquet(str(tmp_path / "data.parquet"), cache_dir=str(tmp_path / "cache"))
    dataset = from_hf(stored)
    assert dataset.target_type == arguments["target_type"]
    assert dataset.class_names == (arguments["class_names"] or [])
    assert_same((dataset[i] for i in range(len(dataset))), examples)
    again = from_hf(to_hf(dataset, **arguments))
    assert_same((again[i] for i in range(len(again))), examples)
    assert again.get_encoded(0)[0] == dataset.get_encoded(0)[0]


@pytest.mark.parametrize("source", ["iterable", "map-style"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_streams_give_every_example_once(kind, source, num_workers):
    examples, arguments = make_examples(kind), hf_arguments(kind)
    masks = "stack" if kind == "overlapping" else "auto"
    if source == "iterable":
        streamed = to_hf(Stream(examples), masks=masks, **arguments)
    else:
        streamed = to_hf(Examples(examples), streaming=True, masks=masks, **arguments)
    assert isinstance(streamed, datasets.IterableDataset)
    dataset = from_hf(streamed)
    assert dataset.target_type == arguments["target_type"]
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, collate_fn=unchanged, num_workers=num_workers)
    assert_same(loader, examples)  # two workers take turns at shards of one example


def test_a_stream_becomes_map_style_when_asked():
    examples = make_examples("detection")
    converted = to_hf(Stream(examples), streaming=False, **hf_arguments("detection"))
    assert isinstance(converted, datasets.Dataset)
    assert_same([from_hf(converted)[i] for i in range(10)], examples)


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("form", ["bytes", "path", "opened"])
def test_original_bytes_are_kept(name, form, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(ODD[name])
    with PIL.Image.open(path) as opened:
        image = {"bytes": ODD[name], "path": path, "opened": opened}[form]
        converted = to_hf([(image, 0)], target_type="multiclass", class_names=CLASS_NAMES)
    path.unlink()
    stored = converted.cast_column("image", datasets.Image(decode=False))[0]["image"]
    assert stored == {"bytes": ODD[name], "path": None}


@pytest.mark.parametrize("name", ODD)
def test_odd_images_of_every_form_round_trip(name, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(ODD[name])
    with PIL.Image.open(path) as opened:
        rgb = opened.convert("RGBA").convert("RGB") if opened.mode == "P" else opened.convert("RGB")
        examples = [(ODD[name], 0), (opened, 1), (rgb, 2)]
        dataset = from_hf(to_hf(examples, target_type="multiclass", class_names=CLASS_NAMES))
    for i in range(3):
        assert_same_image(dataset[i][0], rgb)


def test_boxes_stay_on_their_pixels_in_images_with_exif_rotation():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    data = encode(noise(0, 20, 12), "JPEG", exif=exif)
    boxes = torch.tensor([[1, 0.1, 0.2, 0.9, 0.7]])
    converted = to_hf([(data, boxes)], target_type="detection", class_names=CLASS_NAMES)
    assert (converted[0]["width"], converted[0]["height"]) == (20, 12)
    image, target = from_hf(converted)[0]
    assert image.size == (20, 12)
    assert torch.equal(target, boxes)


def test_a_photo_of_twelve_megapixels_round_trips():
    coarse = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    photo = PIL.Image.fromarray(coarse).resize((4000, 3000))
    jpeg = encode(photo, "JPEG")
    dataset = from_hf(to_hf([(photo, 0), (jpeg, 1)], target_type="multiclass", class_names=CLASS_NAMES))
    assert_same_image(dataset[0][0], photo)
    assert dataset.get_encoded(1) == (jpeg, 1)


float32 = st.floats(0, 1, width=32)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), float32, float32, float32, float32), max_size=5),
    st.integers(1, 9000),
    st.integers(1, 9000),
)
def test_every_float32_box_survives_pixel_coordinates(rows, width, height):
    from iris_hf.data.columns import features_for, find_layout
    from iris_hf.data.convert import _box_columns
    from iris_hf.data.hf_targets import read_targets

    corners = [(c, min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)) for c, x0, y0, x1, y1 in rows]
    boxes = torch.tensor([box for box in corners if box[1] < box[3] and box[2] < box[4]]).reshape(-1, 5)
    row = {"image_id": 0, "image": {"bytes": b"", "path": None}} | _box_columns(0, boxes, (width, height))
    features = features_for("detection", CLASS_NAMES)
    table = datasets.Dataset.from_list([row], features=features).with_format("arrow")[:]
    layout = find_layout(features, target_type=None, class_names=None)
    assert_same_target(read_targets(table, layout, [0])[0], boxes)


def test_columns_are_those_of_the_hub():
    def columns(kind):
        return to_hf(make_examples(kind), **hf_arguments(kind)).features

    from datasets import ClassLabel, Features, Image, List, Value

    label = ClassLabel(names=CLASS_NAMES)
    assert columns("multiclass") == Features({"image": Image(), "label": label})
    assert columns("multilabel") == Features({"image": Image(), "labels": List(label)})
    assert columns("image_text") == Features({"image": Image(), "caption": Value("string")})
    masks = Features({"image": Image(), "annotation": Image(), "classes": List(label)})
    assert columns("segmentation") == masks
    assert columns("overlapping") == masks | {"annotation": List(Image())}
    detection = columns("detection")
    assert set(detection) == {"image_id", "image", "width", "height", "objects"}
    assert detection["objects"] == {
        "id": List(Value("int64")),
        "area": List(Value("float64")),
        "bbox": List(List(Value("float64"), length=4)),
        "category": List(label),
    }


def test_boxes_are_stored_as_coco_has_them():
    target = torch.tensor([[2, 0.25, 0.5, 0.75, 1.0]])
    row = to_hf([(noise(0, 40, 20), target)], target_type="detection", class_names=CLASS_NAMES)[0]
    assert row["objects"] == {"id": [0], "area": [200.0], "bbox": [[10.0, 10.0, 20.0, 10.0]], "category": [2]}


def test_masks_are_one_image_of_class_indices_unless_they_overlap():
    exclusive = to_hf(make_examples("segmentation"), **hf_arguments("segmentation"))
    masks = make_examples("segmentation")[1][1]
    expected = torch.where(masks.any(0), masks.argmax(0), 255).numpy()
    assert np.array_equal(np.asarray(exclusive[1]["annotation"]), expected)
    assert exclusive[0]["classes"] == []
    stacked = to_hf(make_examples("segmentation"), masks="stack", **hf_arguments("segmentation"))
    assert [mask.mode for mask in stacked[1]["annotation"]] == ["1", "1", "1"]
    with pytest.raises(
        DataError, match=r'Example 1: the masks of classes \[.*\] overlap at x=\d+, y=\d+; give masks="st'
    ):
        to_hf(make_examples("overlapping"), masks="index", **hf_arguments("overlapping"))


def test_an_overlap_in_a_stream_says_what_to_give():
    streamed = to_hf(Stream(make_examples("overlapping")), **hf_arguments("overlapping"))
    with pytest.raises(DataError, match=r'Example 1: .* give masks="stack"'):
        list(streamed)


def test_more_than_255_classes_are_stacked():
    masks = torch.zeros(300, 9, 13)
    masks[299, 2, 3] = 1
    names = [str(i) for i in range(300)]
    dataset = from_hf(to_hf([(noise(0), masks)], target_type="segmentation", class_names=names))
    assert torch.equal(dataset[0][1], masks)
    with pytest.raises(ConfigError, match="An index mask has room for 255 classes, not 300"):
        to_hf([(noise(0), masks)], target_type="segmentation", class_names=names, masks="index")


def test_converting_twice_gives_the_data_of_each_time():
    """A changed source with an equal look gets no stale result."""
    examples = make_examples("multiclass")
    first = to_hf(Examples(examples), **hf_arguments("multiclass"))
    examples[0] = (noise(99), 2)
    second = to_hf(Examples(examples), **hf_arguments("multiclass"))
    assert first._fingerprint != second._fingerprint
    assert_same_example(from_hf(second)[0], examples[0])
    assert_same_example(from_hf(first)[0], make_examples("multiclass")[0])


def test_the_callers_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state(), random.getstate()
    for num_proc in (1, 2):
        to_hf(make_examples("multiclass"), num_proc=num_proc, **hf_arguments("multiclass"))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_a_cache_dir_keeps_the_file(tmp_path):
    converted = to_hf(make_examples("multiclass"), cache_dir=tmp_path, **hf_arguments("multiclass"))
    (path,) = tmp_path.rglob("*.arrow")
    assert converted.cache_files == [{"filename": str(path)}]


_MEASURE_MEMORY = """
import resource, sys
import numpy as np, PIL.Image, datasets
from iris_hf.data.convert import to_hf
from iris_hf.data.hf_dataset import from_hf
from iris_hf.data.images import encode_image

image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
image = encode_image(image)

class Examples:
    def __len__(self):
        return 70_000
    def __getitem__(self, index):
        return image, index % 10

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

names = [str(i) for i in range(10)]
to_hf([Examples()[0]], target_type="multiclass", class_names=names)
before = peak()
converted = to_hf(Examples(), target_type="multiclass", class_names=names, num_proc=2)
print(peak() - before, converted.data.nbytes / 2**20, len(from_hf(converted)))
"""


def test_seventy_thousand_examples_need_bounded_memory(tmp_path):
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE_MEMORY], env=environment, capture_output=True, text=True, check=True
    )
    growth, size, count = (float(word) for word in result.stdout.split())
    assert count == 70_000
    assert size > 55
    assert growth < 30  # MiB; about 5
    assert list(tmp_path.iterdir()) == []  # the files of a process go with it


class Broken(Examples):
    def __getitem__(self, index):
        if index == 6:
            raise RuntimeError("the source fails")
        return super().__getitem__(index)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_wrong_target_is_named_by_its_index(num_proc):
    examples = make_examples("detection")
    examples[7] = (noise(7), torch.tensor([[0, 0.1, 0.1, 0.2, 0.2], [0, 0.71, 0, 0.7, 1]]))
    with pytest.raises(
        DataError, match=r"^Example 7: box 1 has x1 <= x0 \(0.7, 0.71\). Drop it or fix the annotation.$"
    ):
        to_hf(Examples(examples), num_proc=num_proc, **hf_arguments("detection"))


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_failing_source_is_named_with_the_cause(num_proc):
    examples = Broken(make_examples("multiclass"))
    with pytest.raises(DataError, match=r"^Example 6: RuntimeError: the source fails\n") as caught:
        to_hf(examples, num_proc=num_proc, **hf_arguments("multiclass"))
    assert "in __getitem__" in "".join(caught.value.__notes__)


def test_a_generator_keeps_its_first_example():
    examples = make_examples("image_text")
    kept = from_hf(to_hf(iter(examples), streaming=True, **hf_arguments("image_text")))
    assert len(list(kept)) == len(examples)


@pytest.mark.parametrize(
    ("example", "kind", "message"),
    [
        ((noise(0), 3), "multiclass", "class index 3 is beyond the 3 classes"),
        ((b"nothing", 0), "multiclass", "data of 7 bytes that starts with b'nothing' is no image"),
        ((torch.zeros(3, 4, 4), 0), "multiclass", "an image is a PIL image, encoded bytes or a path, not a Tensor"),
        ((noise(0),), "multiclass", r"an example is a tuple \(raw input, target\)"),
        (noise(0), "multiclass", r"an example is a tuple \(raw input, target\), not Image"),
        (
            (noise(0), torch.zeros(3, 8, 13)),
            "segmentation",
            r"the mask is 13 x 8 pixels \(width x height\), its image 13 x 9",
        ),
        ((noise(0), None), "image_text", r"the raw input of image_text is a tuple \(image, caption\), not Image"),
        (((noise(0), "text"), 1), "image_text", "has the label 1, but no class_names were given"),
    ],
)
def test_examples_out_of_format_are_named(example, kind, message):
    with pytest.raises(DataError, match=f"^Example 0: {message}"):
        to_hf([example], **hf_arguments(kind))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dataset": []}, DataError, "The data set has no examples"),
        ({"target_type": "boxes"}, ConfigError, "Unknown target_type 'boxes'"),
        ({"class_names": None}, ConfigError, "class_names is needed for the target type 'multiclass'"),
        ({"class_names": ["a", "a"]}, ConfigError, "class_names is a list of distinct names"),
        ({"class_names": []}, ConfigError, "class_names must be a list of at least one name"),
        ({"class_names": "abc"}, ConfigError, "class_names must be a list of at least one name, got 'abc'"),
        ({"class_names": 3}, ConfigError, "class_names must be a list of at least one name, got 3"),
        ({"class_names": [0, 1]}, ConfigError, r"class_names\[0\] must be a string, got 0"),
        ({"num_proc": 0}, ConfigError, "num_proc must be at least 1, got 0"),
        ({"num_proc": "2"}, ConfigError, "num_proc must be a whole number, got '2'"),
        ({"dataset": None}, ConfigError, "gives .raw input, target. by index or one after another, not None"),
        ({"masks": "stacked"}, ConfigError, "Unknown format of masks 'stacked'. Did you mean 'stack'"),
        ({"dataset": datasets.Dataset.from_dict({"a": [1]})}, ConfigError, "is a Hugging Face data set already"),
    ],
)
def test_wrong_arguments_are_refused(changes, error, message):
    arguments = {"dataset": make_examples("multiclass")} | hf_arguments("multiclass") | changes
    with pytest.raises(error, match=message):
        to_hf(arguments.pop("dataset"), **arguments)


def test_encoding_an_opened_truncated_file_is_named(tmp_path):
    path = tmp_path / "truncated.png"
    path.write_bytes(encode_image(noise(0, 64, 64))[:5000])
    with PIL.Image.open(path) as image, pytest.raises(DataError, match=r"^Example 0: .*truncated\.png"):
        to_hf([(image, 0)], **hf_arguments("multiclass"))
