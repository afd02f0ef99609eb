import pickle

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from data_examples import (
    CLASS_NAMES,
    assert_same_example,
    assert_same_target,
    encode,
    hf_arguments,
    make_examples,
    noise,
)
from datasets import ClassLabel, Features, Image, List, Value
from datasets.distributed import split_dataset_by_node

from iris_hf.data.convert import to_hf
from iris_hf.data.hf_dataset import from_hf
from iris_hf.errors import ConfigError, DataError

LABEL = ClassLabel(names=CLASS_NAMES)
PNG = encode(noise(0), "PNG")
OBJECTS = {"bbox": List(List(Value("float64"))), "category": List(LABEL)}
BOX = {"bbox": [[1.3, 0.9, 2.6, 1.8]], "category": [2]}


def unchanged(value):
    return value


def make_hf(columns, features, count=3):
    """A data set of equal rows; columns are values, or a list of `count` of them."""
    rows = {name: value if isinstance(value, list) and len(value) == count else [value] * count
            for name, value in columns.items()}  # fmt: skip
    return datasets.Dataset.from_dict(rows, features=Features(features))


def png(array, mode=None):
    image = PIL.Image.fromarray(array)
    return {"bytes": encode(image if mode is None else image.convert(mode), "PNG"), "path": None}


@pytest.mark.parametrize(
    ("features", "target_type"),
    [
        ({"image": Image(), "label": LABEL}, "multiclass"),
        ({"img": Image(), "labels": LABEL}, "multiclass"),
        ({"photo": Image(), "fine_label": LABEL, "note": Value("string")}, "multiclass"),
        ({"image": Image(decode=False), "label": LABEL}, "multiclass"),
        ({"image": Image(), "labels": List(LABEL)}, "multilabel"),
        ({"image": Image(), "label": List(LABEL)}, "multilabel"),
        ({"image": Image(), "objects": OBJECTS, "width": Value("int64"), "height": Value("int64")}, "detection"),
        (
            {"image": Image(), "objects": List({"bbox": List(Value("float32"), length=4), "categories": LABEL})},
            "detection",
        ),
        ({"image": Image(), "objects": {"bbox": OBJECTS["bbox"], "label": List(LABEL)}}, "detection"),
        ({"image": Image(), "annotation": Image(), "classes": List(LABEL)}, "segmentation"),
        ({"pixel_values": Image(), "label": Image(), "classes": List(LABEL)}, "segmentation"),
        ({"image": Image(), "mask": List(Image()), "classes": List(LABEL)}, "segmentation"),
        ({"image": Image(), "caption": Value("string")}, "image_text"),
        ({"image": Image(), "text": List(Value("string"))}, "image_text"),
        ({"image": Image(), "caption": Value("string"), "label": LABEL}, "image_text"),
    ],
)
def test_target_type_and_columns_are_found_by_name_and_feature(features, target_type):
    dataset = from_hf(datasets.Dataset.from_dict({name: [] for name in features}, features=Features(features)))
    assert dataset.target_type == target_type
    assert len(dataset) == 0
    has_names = target_type != "image_text" or "label" in features
    assert dataset.class_names == (CLASS_NAMES if has_names else [])
    assert dataset.num_classes == (3 if has_names else 0)


@pytest.mark.parametrize(
    ("features", "arguments", "message"),
    [
        ({"image": Image(), "name": Value("string")}, {}, r"Cannot infer the target type.*image: Image, name: string"),
        ({"image": Image(), "a": LABEL, "b": LABEL}, {}, r"Cannot infer .*a: ClassLabel, b: ClassLabel"),
        ({"image": Image(), "label": LABEL}, {"target_type": "detection"}, r"No columns for .* 'detection'"),
        ({"image": Image(), "label": LABEL}, {"target_type": "boxes"}, r"Unknown target_type 'boxes'"),
        ({"image": Image(), "label": Value("int64")}, {}, r"The column 'label' does not tell the class names"),
        ({"image": Image(), "annotation": Image()}, {}, r"The column 'annotation' does not tell the class names"),
        ({"image": Image(), "label": LABEL}, {"class_names": ["a"]}, r"class_names has 1 names, but .* has 3 classes"),
        ({"a": Image(), "b": Image(), "label": LABEL}, {}, r"several columns of images, none named image"),
        ({"label": LABEL}, {}, r"no column of images.*label: ClassLabel"),
        ({"image": Image(), "objects": {"bbox": OBJECTS["bbox"]}}, {}, r"objects: \{bbox: List\(List\(float64\)\)\}"),
    ],
)  # fmt: skip
def test_columns_that_do_not_fit_are_listed(features, arguments, message):
    dataset = datasets.Dataset.from_dict({name: [] for name in features}, features=Features(features))
    with pytest.raises(ConfigError, match=message):
        from_hf(dataset, **arguments)


def test_one_split_is_wanted():
    dataset = make_hf({"image": {"bytes": PNG, "path": None}, "label": 0}, {"image": Image(), "label": LABEL})
    with pytest.raises(ConfigError, match=r"Give one split of the data set, such as dataset\['test'\]"):
        from_hf(datasets.DatasetDict({"test": dataset}))
    with pytest.raises(ConfigError, match=r"from_hf takes a datasets.Dataset or IterableDataset, not list"):
        from_hf([1])
    with pytest.raises(ConfigError, match=r"features of the streaming data set are unknown. .*cast\(features\)"):
        from_hf(datasets.IterableDataset.from_generator(lambda: iter([{"label": 0}])))


def test_given_class_names_replace_those_of_the_features():
    dataset = make_hf({"image": {"bytes": PNG, "path": None}, "label": 2}, {"image": Image(), "label": LABEL})
    assert from_hf(dataset, class_names=["Ameise", "Biene", "Katze"]).class_names == ["Ameise", "Biene", "Katze"]
    plain = make_hf({"image": {"bytes": PNG, "path": None}, "label": 2}, {"image": Image(), "label": Value("int32")})
    assert from_hf(plain, class_names=CLASS_NAMES)[0][1] == 2


def test_selections_and_shuffles_are_respected(kind):
    examples = make_examples(kind)
    converted = to_hf(examples, **hf_arguments(kind)).add_column("number", list(range(10)))
    shuffled = converted.shuffle(seed=1)
    order = shuffled["number"][:]
    dataset = from_hf(shuffled).select([4, 4, 2])
    assert_same_example(dataset[0], examples[order[4]])
    assert_same_example(dataset[1], examples[order[4]])
    assert_same_example(dataset[-1], examples[order[2]])
    assert_same_target(dataset.get_targets(-1), examples[order[2]][1])
    for actual, index in zip(from_hf(shuffled).get_all_targets(), order, strict=True):
        expected = examples[index][1]
        assert torch.equal(actual, expected) if torch.is_tensor(expected) else actual == expected
    for actual, index in zip(from_hf(converted.select(range(3, 6))), range(3, 6), strict=True):
        assert_same_example(actual, examples[index])
    assert dataset.hf_dataset["number"][:] == [order[4], order[4], order[2]]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_workers_read_it(context):
    examples = make_examples("detection")
    dataset = from_hf(to_hf(examples, **hf_arguments("detection"))).select(range(9, -1, -1))
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=3, num_workers=1, collate_fn=unchanged, multiprocessing_context=context
    )
    found = [example for batch in loader for example in batch]
    for actual, expected in zip(found, reversed(examples), strict=True):
        assert_same_example(actual, expected)


def test_it_pickles_with_its_selection(kind):
    examples = make_examples(kind)
    dataset = pickle.loads(pickle.dumps(from_hf(to_hf(examples, **hf_arguments(kind))).select([7, 1])))
    assert_same_example(dataset[1], examples[1])
    assert dataset.target_type == hf_arguments(kind)["target_type"]
    assert dataset.target_type in repr(dataset)


def test_a_format_on_the_data_set_does_not_matter():
    examples = make_examples("multilabel")
    converted = to_hf(examples, **hf_arguments("multilabel"))
    for formatted in (converted.with_format("torch"), converted.with_transform(lambda rows: {"x": [0] * 10})):
        assert_same_example(from_hf(formatted)[1], examples[1])


def test_images_by_path_are_read(tmp_path):
    path = tmp_path / "image.png"
    noise(4).save(path)
    dataset = from_hf(make_hf({"image": str(path), "label": 1}, {"image": Image(), "label": LABEL}))
    assert_same_example(dataset[2], (noise(4), 1))
    path.unlink()
    with pytest.raises(DataError, match=r"^Example 2: cannot read the image file '.*image.png': No such file"):
        dataset[2]


def test_a_broken_image_is_named_by_its_index():
    images = [{"bytes": data, "path": None} for data in (PNG, PNG[:300], b"")]
    dataset = from_hf(make_hf({"image": images, "label": 0}, {"image": Image(), "label": LABEL}))
    with pytest.raises(DataError, match=r"^Example 1: data of 300 bytes .* cannot be decoded: .*truncated"):
        dataset[1]
    with pytest.raises(DataError, match=r"^Example 2: data of 0 bytes .* is no image"):
        dataset.select([0, 2]).__getitems__([0]) + from_hf(dataset.hf_dataset).__getitems__([0, 2])
    null = from_hf(make_hf({"image": None, "label": 0}, {"image": Image(), "label": LABEL}))
    with pytest.raises(DataError, match=r"^Example 0: an image is .* not nothing"):
        null[0]


@pytest.mark.parametrize(
    ("columns", "features", "message"),
    [
        ({"label": [0, 1, -1]}, {"label": LABEL}, r"Example 2: class index -1 is negative"),
        ({"label": [0, 1, 3]}, {"label": Value("int64")}, r"Example 2: class index 3 is beyond the 3 classes"),
        ({"label": [0, 1, None]}, {"label": LABEL}, r"Example 2: 'label' is null"),
        ({"labels": [[0], [], [1, 5]]}, {"labels": List(Value("int8"))}, r"Example 2: class index 5 is beyond"),
        ({"labels": [[0], [], None]}, {"labels": List(LABEL)}, r"Example 2: 'labels' is null"),
        ({"labels": [[0], [], [1, None]]}, {"labels": List(LABEL)}, r"Example 2: 'labels' holds a null"),
        ({"caption": "text", "label": [0, None, 7]}, {"caption": Value("string"), "label": Value("int64")},
         r"Example 2: class index 7 is beyond"),
        ({"objects": [BOX, BOX, {"bbox": [[0, 0, 4, 4]], "category": [7]}]},
         {"objects": {"bbox": OBJECTS["bbox"], "category": List(Value("int64"))}},
         r"Example 2: box 0 is wrong: class index 7 is beyond"),
        ({"objects": [BOX, BOX, {"bbox": [*BOX["bbox"], [1, 1, 0, 4]], "category": [0, 0]}]}, {"objects": OBJECTS},
         r"Example 2: box 1 has x1 <= x0 \(0.07692308, 0.07692308\)"),
        ({"objects": [BOX, BOX, {"bbox": [[1, 1, 20, 4]], "category": [0]}]}, {"objects": OBJECTS},
         r"Example 2: box 0 leaves the image: .*x1=1.615385"),
        ({"objects": [BOX, BOX, {"bbox": [[1, 1, float("nan"), 4]], "category": [0]}]}, {"objects": OBJECTS},
         r"Example 2: box 0 holds NaN or infinity"),
        ({"objects": [BOX, BOX, {"bbox": [[1, 1, 4]], "category": [0]}]}, {"objects": OBJECTS},
         r"Example 2: a bbox has 4 numbers \(x, y, width, height\), not 3"),
        ({"objects": [BOX, BOX, {"bbox": [[1, 1, 4, 4]], "category": []}]}, {"objects": OBJECTS},
         r"Example 2: 1 boxes but 0 categories"),
        ({"objects": [BOX, BOX, {"bbox": [[1, 1, 4, 4]], "category": None}]}, {"objects": OBJECTS},
         r"Example 2: 'objects.category' is null"),
        ({"objects": BOX, "width": [13, 13, 0], "height": 9},
         {"objects": OBJECTS, "width": Value("int64"), "height": Value("int64")},
         r"Example 2: width and height have to be positive, not \[0.0, 9.0\]"),
    ],
)  # fmt: skip
def test_a_wrong_target_is_named_by_its_index_and_value(columns, features, message):
    dataset = from_hf(
        make_hf({"image": {"bytes": PNG, "path": None}} | columns, {"image": Image()} | features),
        class_names=CLASS_NAMES,
    )
    assert len(dataset.__getitems__([0, 1])) == 2
    reads = [lambda: dataset[2], lambda: dataset.get_targets(2), dataset.get_all_targets,
             lambda: dataset.__getitems__([1, 2])]  # fmt: skip
    if dataset.target_type != "detection":  # whose classes are read without the boxes
        reads.append(dataset.get_all_classes)
    for read in reads:
        with pytest.raises(DataError, match=f"^{message}"):
            read()


@pytest.mark.parametrize("with_size", [False, True])
@pytest.mark.parametrize("as_list_of_objects", [False, True])
def test_boxes_are_read_from_both_forms_with_and_without_size_columns(with_size, as_list_of_objects):
    size = {"width": Value("int64"), "height": Value("int64")} if with_size else {}
    feature = List({"bbox": List(Value("float64")), "category": LABEL}) if as_list_of_objects else OBJECTS
    boxes = [{"bbox": BOX["bbox"][0], "category": 2}] if as_list_of_objects else BOX
    none = [] if as_list_of_objects else {"bbox": [], "category": []}
    columns = {"image": {"bytes": PNG, "path": None}, "objects": [boxes, none, boxes]}
    columns |= {"width": 13, "height": 9} if with_size else {}
    dataset = from_hf(make_hf(columns, {"image": Image(), "objects": feature} | size))
    expected = torch.tensor([[2, 0.1, 0.1, 0.3, 0.3]])
    assert torch.allclose(dataset[0][1], expected)
    assert dataset[1][1].shape == (0, 5)
    assert [len(target) for target in dataset.get_all_targets()] == [1, 0, 1]
    assert dataset.get_all_classes() == [[2], [], [2]]


def test_boxes_are_fixed_on_demand_only():
    boxes = {"bbox": [[-2, 1, 5, 4], [3, 3, 0, 2], [12, 8, 4, 4], [20, 3, 2, 2]], "category": [0, 1, 2, 0]}
    features, image = {"image": Image(), "objects": OBJECTS}, {"bytes": PNG, "path": None}
    dataset = make_hf({"image": image, "objects": [BOX, boxes, BOX]}, features)
    with pytest.raises(DataError, match="Example 1: box 0 leaves the image"):
        from_hf(dataset)[1]
    targets = from_hf(dataset, fix_boxes=True).get_all_targets()
    expected = torch.tensor([[0, 0, 1 / 9, 3 / 13, 5 / 9], [2, 12 / 13, 8 / 9, 1, 1]])
    assert torch.allclose(targets[1], expected)
    assert [len(target) for target in targets] == [1, 2, 1]
    nan = make_hf({"image": image, "objects": {"bbox": [[float("nan"), 1, 2, 2]], "category": [0]}}, features)
    with pytest.raises(DataError, match="Example 0: box 0 holds NaN"):
        from_hf(nan, fix_boxes=True)[0]


def test_boxes_may_exceed_the_image_by_a_rounding_error():
    box = {"bbox": [[-1e-7, 0, 13.000001, 9]], "category": [0]}
    dataset = make_hf({"image": {"bytes": PNG, "path": None}, "objects": box}, {"image": Image(), "objects": OBJECTS})
    assert from_hf(dataset)[0][1].tolist() == [[0, 0, 0, 1, 1]]


def test_boxes_drawn_on_a_rotated_view_are_refused():
    columns = {"image": {"bytes": PNG, "path": None}, "objects": BOX, "width": 9, "height": 13}
    features = {"image": Image(), "objects": OBJECTS, "width": Value("int64"), "height": Value("int64")}
    with pytest.raises(DataError, match=r"Example 0: the columns say 9 x 13 pixels, the image 13 x 9: .*rotated view"):
        from_hf(make_hf(columns, features))[0]


MASK = np.zeros((9, 13), dtype=np.uint8)
MASK[2, 3], MASK[4, 5], MASK[8, 12] = 1, 2, 255


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_index_masks_of_every_mode_are_read_as_class_indices(mode):
    image = PIL.Image.fromarray(MASK)
    if mode == "P":
        image.putpalette([value for i in range(256) for value in (255 - i, i, 7)])
    elif mode == "I;16":
        image = PIL.Image.fromarray(MASK.astype(np.uint16))
    columns = {"image": {"bytes": PNG, "path": None}, "annotation": {"bytes": encode(image, "PNG"), "path": None}}
    dataset = from_hf(make_hf(columns, {"image": Image(), "annotation": Image()}), class_names=CLASS_NAMES)
    target = dataset[0][1]
    assert target.sum(0).eq(torch.from_numpy(MASK != 255)).all()
    assert target.argmax(0)[MASK != 255].equal(torch.from_numpy(MASK[MASK != 255]).long())
    assert dataset.get_all_classes()[0] == [0, 1, 2]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (png(MASK + (MASK == 1) * np.uint8(10)),
         "at x=3, y=2 of the mask: class index 11 is beyond the 3 classes .*ignore_index=11"),
        (png(MASK, "RGB"), "a mask has one channel of class indices, not mode RGB"),
        (png(MASK[:5]), r"the mask is 13 x 5 pixels \(width x height\), its image 13 x 9"),
        ({"bytes": b"no", "path": None}, "the mask cannot be decoded"),
        (None, "'annotation' is null"),
    ],
)  # fmt: skip
def test_wrong_masks_are_named(mask, message):
    columns = {"image": {"bytes": PNG, "path": None}, "annotation": mask}
    dataset = from_hf(make_hf(columns, {"image": Image(), "annotation": Image()}), class_names=CLASS_NAMES)
    with pytest.raises(DataError, match=f"^Example 1: {message}"):
        dataset[1]


def test_another_ignore_index_is_no_class():
    columns = {
        "image": {"bytes": PNG, "path": None},
        "annotation": png(np.where(MASK == 255, 11, MASK).astype(np.uint8)),
    }
    dataset = make_hf(columns, {"image": Image(), "annotation": Image()})
    assert from_hf(dataset, class_names=CLASS_NAMES, ignore_index=11)[0][1][:, 8, 12].tolist() == [0, 0, 0]


def test_stacked_masks_need_one_for_each_class_and_one_size():
    def read(masks):
        columns = {"image": {"bytes": PNG, "path": None}, "mask": [masks, masks, masks]}
        return from_hf(make_hf(columns, {"image": Image(), "mask": List(Image())}), class_names=CLASS_NAMES)[0]

    assert read([png(MASK)] * 3)[1].shape == (3, 9, 13)
    with pytest.raises(DataError, match="Example 0: 2 masks for 3 classes"):
        read([png(MASK)] * 2)
    with pytest.raises(DataError, match="Example 0: the masks have several sizes"):
        read([png(MASK), png(MASK), png(MASK[:5])])


def test_null_captions_are_named():
    columns = {"image": {"bytes": PNG, "path": None}, "caption": ["a", "b", None]}
    dataset = from_hf(make_hf(columns, {"image": Image(), "caption": Value("string")}))
    with pytest.raises(DataError, match=r"^Example 2: 'caption' is null"):
        dataset[2]


@pytest.mark.parametrize("index", ["image", slice(0, 2), 1.0])
def test_an_index_is_a_number(index):
    dataset = from_hf(to_hf(make_examples("multiclass"), **hf_arguments("multiclass")))
    with pytest.raises(ConfigError, match=r"An example is read by its number, got .* use select"):
        dataset[index]
    assert dataset[torch.tensor(1)][1] == dataset[np.int64(1)][1] == dataset[1][1]


def test_indices_outside_the_data_set_end_an_iteration():
    dataset = from_hf(to_hf(make_examples("multiclass"), **hf_arguments("multiclass")))
    with pytest.raises(IndexError):
        dataset[10]
    assert len(list(dataset)) == 10


def test_a_shuffled_stream_changes_with_the_epoch_and_repeats_in_it():
    examples = make_examples("multiclass", 32)
    names = [str(i) for i in range(32)]
    examples = [(image, index) for index, (image, _) in enumerate(examples)]
    streamed = to_hf(examples, target_type="multiclass", class_names=names, streaming=True)
    dataset = from_hf(streamed.shuffle(seed=0, buffer_size=8))
    assert (dataset.class_names, dataset.num_classes, dataset.target_type) == (names, 32, "multiclass")
    orders = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        orders.append([target for _, target in dataset])
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(32))
    assert orders[0] != list(range(32))


def test_persistent_workers_follow_the_epoch():
    examples = [(noise(i), i) for i in range(16)]
    names = [str(i) for i in range(16)]
    streamed = to_hf(examples, target_type="multiclass", class_names=names, streaming=True)
    dataset = from_hf(streamed.shuffle(seed=0, buffer_size=4))
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, collate_fn=unchanged, num_workers=2, persistent_workers=True
    )
    orders = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        orders.append([target for _, target in loader])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(16))


def test_nodes_share_a_stream():
    examples = [(noise(i), i) for i in range(13)]
    names = [str(i) for i in range(13)]
    streamed = to_hf(examples, target_type="multiclass", class_names=names, streaming=True)
    parts = [[t for _, t in from_hf(split_dataset_by_node(streamed, rank, 2))] for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == list(range(13))


def test_a_stream_continues_from_its_state():
    examples = make_examples("detection")
    dataset = from_hf(to_hf(examples, streaming=True, **hf_arguments("detection")))
    iterator = iter(dataset)
    for _ in range(4):
        next(iterator)
    state = dataset.state_dict()
    fresh = from_hf(to_hf(examples, streaming=True, **hf_arguments("detection")))
    fresh.load_state_dict(state)
    for actual, expected in zip(fresh, examples[4:], strict=True):
        assert_same_example(actual, expected)


def test_a_map_style_set_streams_from_the_hub_library():
    examples = make_examples("overlapping")
    converted = to_hf(examples, **hf_arguments("overlapping"))
    dataset = from_hf(converted.to_iterable_dataset(num_shards=3))
    for actual, expected in zip(dataset, examples, strict=True):
        assert_same_example(actual, expected)
    assert "segmentation" in repr(dataset)
    again = to_hf(dataset, streaming=False, **hf_arguments("overlapping"))
    assert from_hf(again).get_encoded(3)[0] == from_hf(converted).get_encoded(3)[0]


def test_a_mapped_stream_gives_the_same_examples():
    for kind in ("multiclass", "overlapping"):
        examples = make_examples(kind)
        streamed = to_hf(
            examples, streaming=True, masks="stack" if kind == "overlapping" else "auto", **hf_arguments(kind)
        )
        dataset = from_hf(streamed.map(unchanged, features=streamed.features))
        for actual, expected in zip(dataset, examples, strict=True):
            assert_same_example(actual, expected)


def numbered(count=24, num_shards=3):
    """A streaming data set in shards, whose labels are its rows' numbers."""
    names = ClassLabel(names=[str(i) for i in range(count)])
    rows = {"image": [{"bytes": PNG, "path": None}] * count, "label": list(range(count))}
    table = datasets.Dataset.from_dict(rows, features=Features({"image": Image(), "label": names}))
    return table.to_iterable_dataset(num_shards=num_shards)


def labels(rows):
    return [row["label"] for row in rows]


SHUFFLED = {
    "buffer": lambda: numbered().shuffle(seed=1, buffer_size=6),
    "one shard after another": lambda: numbered().shuffle(seed=1, buffer_size=6, max_buffer_input_shards=1),
    "mixed": lambda: datasets.interleave_datasets([numbered(), numbered()], probabilities=[0.3, 0.7], seed=2),
    "parts": lambda: numbered().skip(3).take(15).shuffle(seed=1, buffer_size=6),
}


@pytest.mark.parametrize("name", SHUFFLED)
def test_the_rows_of_an_epoch_do_not_depend_on_what_was_read_before(name):
    dataset = from_hf(SHUFFLED[name]())
    orders = []
    for epoch in range(3):
        fresh = SHUFFLED[name]().decode(False)
        fresh.set_epoch(epoch)
        try:
            expected = labels(fresh)
        except datasets.iterable_dataset.DataSourcesShufflingDisallowed:  # datasets 5.0 after skip and take
            expected = labels(from_hf(SHUFFLED[name]()).iter_rows(epoch))
        iterator = dataset.iter_rows(epoch)
        read = [next(iterator) for _ in range(4)]
        assert labels(dataset.iter_rows(epoch)) == expected  # meanwhile
        assert labels(dataset.iter_rows(7)) != expected
        assert labels([*read, *iterator]) == expected
        orders.append(expected)
    assert orders[0] != orders[1] != orders[2]


def test_a_stream_that_is_not_shuffled_has_one_order():
    dataset = from_hf(numbered())
    assert dataset.shuffled_by == ""
    assert labels(dataset.iter_rows(3)) == list(range(24))


def test_what_shuffles_a_stream_is_told_apart():
    shuffled = [numbered().shuffle(seed=seed, buffer_size=size) for seed, size in ((1, 6), (1, 7), (2, 6), (None, 6))]
    assert len({from_hf(stream).shuffled_by for stream in shuffled}) == 4
    assert from_hf(shuffled[0]).shuffled_by == from_hf(SHUFFLED["buffer"]()).shuffled_by
    assert pickle.loads(pickle.dumps(from_hf(shuffled[0]))).shuffled_by == from_hf(shuffled[0]).shuffled_by


@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_parts_of_a_stream_share_its_rows_by_shards(num_parts):
    dataset = from_hf(numbered(num_shards=4))
    assert (dataset.num_shards, dataset.is_split_by_node) == (4, False)
    parts = [labels(dataset.iter_rows(0, part=part, num_parts=num_parts)) for part in range(num_parts)]
    assert sorted(number for part in parts for number in part) == list(range(24))
    assert parts == [
        labels(split_dataset_by_node(numbered(num_shards=4), part, num_parts)) for part in range(num_parts)
    ]
    image, label = dataset.make_example(next(dataset.iter_rows(0)), 0)
    assert (image.mode, label) == ("RGB", 0)


def test_a_wrong_example_of_a_stream_is_named():
    columns = {"image": {"bytes": PNG, "path": None}, "label": [0, 1, -1]}
    dataset = make_hf(columns, {"image": Image(), "label": LABEL}).to_iterable_dataset()
    with pytest.raises(DataError, match=r"^Example 2: class index -1 is negative"):
        list(from_hf(dataset))
