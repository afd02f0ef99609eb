import json
import pickle
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from data_examples import CLASS_NAMES, assert_same_target, encode, hf_arguments, make_examples, noise
from datasets import ClassLabel, Features, Image, List, Value
from sampling_examples import LABELLED_KINDS, WithTargets, make_hf, make_targets, rows_of
from torch.utils.data import ConcatDataset, Subset

import iris_hf
from iris_hf.data.coco import save_coco
from iris_hf.data.convert import to_hf
from iris_hf.data.hf_dataset import HFDataset, from_hf
from iris_hf.data.read_targets import get_classes_from_dataset, get_targets_from_dataset
from iris_hf.data.subclass import get_subclass_dataset
from iris_hf.data.targets import check_target, classes_in
from iris_hf.errors import ConfigError, DataError

ALL_IDS = [[0], [2], [0, 2], [2, 1], [1, 0, 2]]


@pytest.fixture(params=LABELLED_KINDS)
def kind(request):
    return request.param


def named(target, target_type, names, kept) -> Any:
    """What a target says of some classes, by their names."""
    if target_type in ("multiclass", "image_text"):
        return names[int(target)]
    if target_type == "multilabel":
        return {name for name, label in zip(names, target.tolist(), strict=True) if label} & set(kept)
    if target_type == "detection":
        boxes = [(names[int(box[0])], *box[1:]) for box in target.tolist()]
        return [box for box in boxes if box[0] in kept]
    return {name: mask.tolist() for name, mask in zip(names, target, strict=True) if name in kept}


def expected_rows(kind, targets, class_ids):
    target_type = hf_arguments(kind)["target_type"]
    return [i for i, target in enumerate(targets) if set(classes_in(target, target_type)) & set(class_ids)]


def assert_remapped(dataset, kind, targets, class_ids):
    """Compare with the targets that the examples had, by class names."""
    names = [CLASS_NAMES[index] for index in sorted(class_ids)]
    target_type = hf_arguments(kind)["target_type"]
    rows = expected_rows(kind, targets, class_ids)
    assert len(dataset) == len(rows)
    assert list(dataset.class_names) == names
    assert dataset.num_classes == len(names)
    if isinstance(dataset, HFDataset):
        assert dataset.target_type == target_type
    else:  # of an image and a text, the target tells only that there is a class
        assert dataset.target_type == target_type.replace("image_text", "multiclass")
    for index, row in enumerate(rows):
        target = dataset.get_targets(index)
        check_target(target, target_type, num_classes=len(names))
        assert type(target) is type(targets[row])
        if isinstance(target, torch.Tensor):
            assert target.dtype == targets[row].dtype
        assert named(target, target_type, names, names) == named(targets[row], target_type, CLASS_NAMES, names)


@pytest.mark.parametrize("class_ids", ALL_IDS)
def test_examples_with_one_of_the_classes_are_kept_as_they_are(kind, class_ids):
    targets = make_targets(kind)
    rows = expected_rows(kind, targets, class_ids)
    hf = make_hf(kind, targets)
    for dataset in (WithTargets(targets), hf, hf.hf_dataset, [(None, target) for target in targets]):
        result = get_subclass_dataset(dataset, CLASS_NAMES, class_ids=class_ids)
        assert result.class_names == [CLASS_NAMES[index] for index in sorted(class_ids)]
        assert result.num_classes == len(class_ids)
        if isinstance(dataset, datasets.Dataset):
            assert isinstance(result.dataset, datasets.Dataset)
            assert list(result.dataset["row"]) == rows
            continue
        assert isinstance(result.dataset, HFDataset) == isinstance(dataset, HFDataset)
        assert rows_of(result.dataset) == rows
        for index, row in enumerate(rows):
            assert_same_target(result.dataset.get_targets(index), targets[row])


@pytest.mark.parametrize("class_ids", ALL_IDS)
def test_remapped_targets_say_the_same_by_name(kind, class_ids):
    targets = make_targets(kind)
    before = [target.clone() if isinstance(target, torch.Tensor) else target for target in targets]
    hf = make_hf(kind, targets)
    for dataset in (WithTargets(targets), hf):
        result = get_subclass_dataset(dataset, CLASS_NAMES, class_ids=class_ids, remap_class_ids=True)
        assert isinstance(result.dataset, HFDataset) == isinstance(dataset, HFDataset)
        assert result.num_classes == len(class_ids)
        assert_remapped(result.dataset, kind, targets, class_ids)
    for target, copy in zip(targets, before, strict=True):
        assert_same_target(target, copy)


def test_remapped_hugging_face_data_sets_are_right_wherever_they_go(kind, tmp_path):
    targets = make_targets(kind)
    hf = make_hf(kind, targets, broken=False)
    arguments = {"class_ids": [np.int64(2), np.int32(0)], "remap_class_ids": True}
    result = get_subclass_dataset(hf, CLASS_NAMES, **arguments).dataset
    rows = expected_rows(kind, targets, [2, 0])
    assert list(result.hf_dataset["row"]) == rows
    assert result.hf_dataset.column_names == hf.hf_dataset.column_names
    result.hf_dataset.save_to_disk(tmp_path / "saved")
    result.hf_dataset.to_parquet(tmp_path / "data.parquet")
    parquet = datasets.Dataset.from_parquet(str(tmp_path / "data.parquet"), cache_dir=str(tmp_path))
    raw = get_subclass_dataset(hf.hf_dataset, CLASS_NAMES, **arguments).dataset
    again = to_hf(result, target_type=result.target_type, class_names=result.class_names)
    for copy in (result, pickle.loads(pickle.dumps(result)), from_hf(result.hf_dataset), from_hf(parquet),
                 from_hf(datasets.load_from_disk(tmp_path / "saved")), from_hf(raw), from_hf(again)):  # fmt: skip
        assert_remapped(copy, kind, targets, [2, 0])
        read = [classes_in(copy.get_targets(index), copy.target_type) for index in range(len(copy))]
        assert get_classes_from_dataset(copy) == read
        for index in (0, len(rows) - 1):
            (input_, _), (expected, _) = copy[index], hf[rows[index]]
            image, expected = (pair[0] if isinstance(pair, tuple) else pair for pair in (input_, expected))
            assert image.tobytes() == expected.tobytes()


def test_remapping_respects_order_and_what_is_filtered_out(kind):
    targets = make_targets(kind)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).tolist()[:25]
    order = [*order, order[0], order[7]]
    for view in (make_hf(kind, targets).select(order), Subset(make_hf(kind, targets), order)):
        result = get_subclass_dataset(view, CLASS_NAMES, class_ids=[1], remap_class_ids=True)
        assert isinstance(result.dataset, HFDataset)
        assert_remapped(result.dataset, kind, [targets[row] for row in order], [1])
        twice = get_subclass_dataset(result.dataset, ["bee"], class_ids=[0], remap_class_ids=True)
        assert_remapped(twice.dataset, kind, [targets[row] for row in order], [1])


def test_remapping_touches_no_image_bytes(kind):
    hf = make_hf(kind, make_targets(kind))
    result = get_subclass_dataset(hf, CLASS_NAMES, class_ids=[1], remap_class_ids=True).dataset

    def addresses(dataset):
        chunks = dataset.hf_dataset.data.table["image"].chunks
        return [buffer.address for chunk in chunks for buffer in chunk.buffers() if buffer is not None]

    assert addresses(result) == addresses(hf)


def test_rows_that_are_not_shown_may_be_unusable():
    features = {"image": Image(), "label": Value("int8"), "labels": List(Value("int32"))}
    objects = {"bbox": List(List(Value("float64"))), "categories": List(Value("int64")), "count": Value("int64")}
    columns = {"image": [None] * 4, "label": [None, 99, 1, 2], "labels": [None, [99, None], [2, 1], [0]]}
    box = {"bbox": [[0, 0, 1, 1], [1, 1, 1, 1]], "categories": [2, 1], "count": 2}
    columns["objects"] = [None, {"bbox": [[]], "categories": [99], "count": 1}, box, box]
    columns |= {"width": [2] * 4, "height": [2] * 4}
    hf = datasets.Dataset.from_dict(
        columns, features=Features(features | {"objects": objects, "width": Value("int64"), "height": Value("int64")})
    ).select([3, 2])
    expected = {"multiclass": [1, 0], "multilabel": None, "detection": None}
    for target_type in expected:
        dropped = {"multiclass": "labels", "multilabel": "label", "detection": "labels"}[target_type]
        dataset = from_hf(hf.remove_columns(dropped), target_type=target_type, class_names=CLASS_NAMES)
        ids = [1] if target_type == "multilabel" else [1, 2]
        result = get_subclass_dataset(dataset, CLASS_NAMES, class_ids=ids, remap_class_ids=True).dataset
        again = from_hf(result.hf_dataset, target_type=target_type)
        assert again.class_names == [CLASS_NAMES[index] for index in ids]
        if target_type == "multiclass":
            assert get_targets_from_dataset(again).tolist() == [1, 0]
        elif target_type == "multilabel":
            assert get_targets_from_dataset(again).tolist() == [[1]]
        else:
            boxes = [[1, 0, 0, 0.5, 0.5], [0, 0.5, 0.5, 1, 1]]
            assert [target.tolist() for target in again.get_all_targets()] == [boxes, boxes]
            assert result.hf_dataset[0]["objects"]["count"] == 2


def test_lists_of_objects_keep_the_fields_of_their_boxes(tmp_path):
    one = {"bbox": List(Value("float32"), length=4), "category": ClassLabel(names=CLASS_NAMES), "note": Value("string")}
    rows = [
        [{"bbox": [0, 0, 2, 1], "category": 2, "note": "a"}, {"bbox": [0, 0, 1, 1], "category": 0, "note": "b"}],
        [{"bbox": [1, 1, 1, 1], "category": 0, "note": "c"}],
        [],
    ]
    columns = {"image": [noise(0, 2, 2)] * 3, "objects": rows, "width": [2] * 3, "height": [2] * 3}
    features = Features({"image": Image(), "objects": List(one), "width": Value("int64"), "height": Value("int64")})
    dataset = from_hf(datasets.Dataset.from_dict(columns, features=features))
    result = get_subclass_dataset(dataset, CLASS_NAMES, class_ids=[2], remap_class_ids=True).dataset
    assert result.hf_dataset["objects"][:] == [[{"bbox": [0, 0, 2, 1], "category": 0, "note": "a"}]]
    save_coco(result, tmp_path / "coco.json", tmp_path)
    content = json.loads((tmp_path / "coco.json").read_text())
    assert content["categories"] == [{"id": 1, "name": "cat"}]
    assert [box["category_id"] for box in content["annotations"]] == [1]


def test_fields_of_unequal_length_are_an_error():
    label = ClassLabel(names=CLASS_NAMES)
    objects = {"bbox": List(List(Value("float64"))), "category": List(label), "id": List(Value("int64"))}
    rows = [{"bbox": [[0, 0, 1, 1]], "category": [0], "id": [1, 2]}]
    features = Features({"image": Image(), "objects": objects})
    dataset = from_hf(datasets.Dataset.from_dict({"image": [None], "objects": rows}, features=features))
    with pytest.raises(DataError, match="2 values of 'id' for 1 boxes"):
        get_subclass_dataset(dataset, CLASS_NAMES, class_ids=[0], remap_class_ids=True)


@pytest.mark.parametrize("kind", ["segmentation", "overlapping"])
def test_masks_without_a_classes_column_are_remapped(kind):
    examples = make_examples(kind, 8)
    full = to_hf(examples, **hf_arguments(kind))
    dataset = from_hf(full.remove_columns("classes"), class_names=CLASS_NAMES, target_type="segmentation")
    result = get_subclass_dataset(dataset, CLASS_NAMES, class_ids=[0, 2], remap_class_ids=True).dataset
    assert_remapped(from_hf(result.hf_dataset), "segmentation", [target for _, target in examples], [0, 2])


def test_index_masks_with_another_ignore_index_are_remapped():
    pixels = np.array([[2, 0, 9], [2, 1, 9]], dtype=np.uint8)
    columns = {"image": [None], "annotation": [{"bytes": encode(PIL.Image.fromarray(pixels), "PNG"), "path": None}]}
    hf = datasets.Dataset.from_dict(columns, features=Features({"image": Image(), "annotation": Image()}))
    dataset = from_hf(hf, class_names=CLASS_NAMES, ignore_index=9)
    result = get_subclass_dataset(dataset, CLASS_NAMES, class_ids=[1, 2], remap_class_ids=True).dataset
    assert torch.equal(from_hf(result.hf_dataset).get_targets(0), dataset.get_targets(0)[1:])
    with pytest.raises(DataError, match="Example 0: at x=2, y=0 of the mask: class index 9 is beyond the 3 classes"):
        get_subclass_dataset(from_hf(hf, class_names=CLASS_NAMES), CLASS_NAMES, class_ids=[1], remap_class_ids=True)


def test_more_classes_than_an_index_mask_has_room_for_are_stacked():
    names = [f"class {index}" for index in range(300)]
    pixels = np.arange(300, dtype=np.uint16).reshape(15, 20)
    columns = {"image": [None], "annotation": [{"bytes": encode(PIL.Image.fromarray(pixels), "PNG"), "path": None}]}
    features = Features({"image": Image(), "annotation": Image()})
    dataset = from_hf(datasets.Dataset.from_dict(columns, features=features), class_names=names, ignore_index=999)
    ids = list(range(10, 290))
    result = get_subclass_dataset(dataset, names, class_ids=ids, remap_class_ids=True).dataset
    again = from_hf(result.hf_dataset)
    assert again.class_names == names[10:290]
    assert torch.equal(again.get_targets(0), dataset.get_targets(0)[ids])


def test_stacked_masks_are_not_decoded():
    stored = [[{"bytes": f"mask {row} {index}".encode(), "path": None} for index in range(3)] for row in range(3)]
    columns = {"image": [None] * 3, "annotation": [*stored[:2], stored[2][:2]], "classes": [[0, 2], [1], [0]]}
    label = List(ClassLabel(names=CLASS_NAMES))
    features = Features({"image": Image(), "annotation": List(Image()), "classes": label})
    hf = datasets.Dataset.from_dict(columns, features=features)
    arguments = {"class_ids": [1, 2], "remap_class_ids": True}
    result = get_subclass_dataset(from_hf(hf.select([0, 1])), CLASS_NAMES, **arguments).dataset.hf_dataset
    rows = result.with_format("arrow")[:].select(["annotation", "classes"]).to_pylist()
    assert rows == [{"annotation": stored[0][1:], "classes": [1]}, {"annotation": stored[1][1:], "classes": [0]}]
    with pytest.raises(DataError, match="Example 2: 2 masks for 3 classes"):
        get_subclass_dataset(from_hf(hf), CLASS_NAMES, class_ids=[0, 1], remap_class_ids=True)


@pytest.mark.parametrize("form", [torch.tensor, lambda value: torch.tensor([value], dtype=torch.int32)])
def test_class_indices_keep_their_form(form):
    dataset = WithTargets([form(value) for value in (0, 3, 1, 3)])
    result = get_subclass_dataset(dataset, list("abcd"), class_ids=[3, 1], remap_class_ids=True).dataset
    for index, expected in enumerate((1, 0, 1)):
        assert_same_target(result.get_targets(index), form(expected))


class Counting(torch.utils.data.Dataset):
    epoch = -1

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return f"image {index}", index

    def set_epoch(self, epoch):
        self.epoch = epoch


def test_examples_keep_their_raw_input_and_epoch():
    source = Counting()
    result = get_subclass_dataset(source, list("abcd"), class_ids=[3, 1], remap_class_ids=True).dataset
    assert [result[index] for index in range(2)] == [("image 1", 0), ("image 3", 1)]
    result.set_epoch(7)
    assert source.epoch == 7
    assert pickle.loads(pickle.dumps(Subset(result, [1])))[0] == ("image 3", 1)
    plain = get_subclass_dataset([("image", 0)], ["a"], class_ids=[0], remap_class_ids=True).dataset
    assert not hasattr(plain, "set_epoch")


def test_remapped_views_convert_with_their_encoded_bytes(kind):
    targets = make_targets(kind, 8)
    parts = [make_hf(kind, targets, broken=False) for _ in range(2)]
    result = get_subclass_dataset(ConcatDataset(parts), CLASS_NAMES, class_ids=[2], remap_class_ids=True).dataset
    again = from_hf(to_hf(result, **hf_arguments(kind) | {"class_names": ["cat"]}))
    assert_remapped(again, kind, targets * 2, [2])
    rows = expected_rows(kind, targets, [2])
    stored = parts[0].hf_dataset.with_format("arrow")[:]["image"].to_pylist()
    assert again.hf_dataset.with_format("arrow")[:]["image"].to_pylist() == [stored[row] for row in rows] * 2


class Scores(torch.nn.Module):
    """Predicts the same score for each of `num_classes` classes; a class beyond them fails."""

    def __init__(self, target_type, num_classes):
        super().__init__()
        self.target_type = target_type
        self.scores = torch.nn.Parameter(torch.zeros(num_classes))

    def training_step(self, inputs, targets):
        if self.target_type == "detection":
            targets = torch.cat(targets)[:, 0].long()
        if self.target_type in ("multiclass", "image_text", "detection"):
            return {"loss": torch.nn.functional.cross_entropy(self.scores.expand(len(targets), -1), targets)}
        scores = self.scores.view(1, -1, *[1] * (targets.dim() - 2)).expand_as(targets)
        return {"loss": torch.nn.functional.binary_cross_entropy_with_logits(scores, targets.float())}


def to_tensors(raw_input, target):
    image = raw_input[0] if isinstance(raw_input, tuple) else raw_input
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(9, 13, 3).permute(2, 0, 1) / 255, target


def test_a_model_of_num_classes_outputs_trains_on_the_result(kind):
    arguments = hf_arguments(kind)
    source = from_hf(to_hf(make_examples(kind, 24), **arguments))
    for dataset in (source, ConcatDataset([source])):
        result = get_subclass_dataset(dataset, CLASS_NAMES, class_ids=[1, 2], remap_class_ids=True)
        model = Scores(arguments["target_type"], result.num_classes)
        settings = {"num_epochs": 1, "batch_size": 4, "base_lr": 0.1, "num_dataloader_workers": 0}
        trained = iris_hf.train(model, result.dataset, to_tensors, **settings).model
        assert trained.scores.isfinite().all()
        assert not torch.equal(trained.scores, model.scores)


@pytest.mark.parametrize(
    ("class_ids", "message"),
    [
        ([], r"class_ids must be a list of at least one class id, got \[\]"),
        (1, "class_ids must be a list of at least one class id, got 1"),
        ([0, 3], r"class_ids\[1\] is 3, but class_names has the ids 0 to 2"),
        ([-1], r"class_ids\[0\] is -1"),
        (["ant"], r"class_ids\[0\] is 'ant'"),
        ([2, 0, 2], r"class_ids names 2 more than once: \[2, 0, 2\]"),
    ],
)
def test_wrong_class_ids_are_named(class_ids, message):
    with pytest.raises(ConfigError, match=message):
        get_subclass_dataset(WithTargets([0, 1, 2]), CLASS_NAMES, class_ids=class_ids)


def test_a_class_that_no_example_holds_is_an_error():
    with pytest.raises(DataError, match=r"No example holds the class 1 \('bee'\)\. The data set holds \[0, 2\]"):
        get_subclass_dataset(WithTargets([0, 2, 2]), CLASS_NAMES, class_ids=[2, 1])
    with pytest.raises(DataError, match=r"The data set holds \[\]"):
        get_subclass_dataset(WithTargets([torch.zeros(0, 5)]), CLASS_NAMES, class_ids=[2])


@pytest.mark.parametrize("class_names", [[], "ant"])
def test_class_names_are_a_list_of_names(class_names):
    with pytest.raises(ConfigError, match="class_names must be a list of at least one name"):
        get_subclass_dataset(WithTargets([0]), class_names, class_ids=[0])


def test_class_names_have_to_be_as_many_as_the_data_set_has():
    with pytest.raises(ConfigError, match="class_names has 2 names, but the data set has 3 classes"):
        get_subclass_dataset(make_hf("multiclass", [0, 1]), ["ant", "bee"], class_ids=[0])
