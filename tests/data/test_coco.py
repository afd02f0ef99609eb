import contextlib
import io
import json

import datasets
import numpy as np
import pytest
import torch
from data_examples import CLASS_NAMES, assert_same_target, hf_arguments, make_examples, noise

from iris_hf.data.coco import load_coco, save_coco
from iris_hf.data.convert import to_hf
from iris_hf.data.hf_dataset import from_hf
from iris_hf.data.read_targets import get_classes_from_dataset, get_targets_from_dataset
from iris_hf.errors import ConfigError, DataError


def read_with_pycocotools(path):
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def by_id(rows):
    return {row["id"]: row for row in rows}


@pytest.fixture
def coco_file(tmp_path):
    """Two images, one without annotations; categories with gaps; a polygon, run lengths and a crowd."""
    for name in ("a", "b"):
        noise(0, 20, 10).save(tmp_path / f"{name}.png")
    crowd = {"size": [10, 20], "counts": [0, 30, 170]}
    annotations = [
        {"id": 5, "bbox": [2, 1, 4, 5], "category_id": 9, "area": 20, "iscrowd": 0,
         "segmentation": [[2, 1, 6, 1, 6, 6, 2, 6]]},
        {"id": 6, "bbox": [0, 0, 3, 10], "category_id": 3, "area": 30, "iscrowd": 1, "segmentation": crowd},
        {"id": 7, "bbox": [5, 0, 5, 10], "category_id": 4, "area": 50, "iscrowd": 0,
         "segmentation": {"size": [10, 20], "counts": [50, 50, 100]}},
    ]  # fmt: skip
    content = {
        "images": [{"id": 12, "file_name": "b.png", "width": 20, "height": 10},
                   {"id": 3, "file_name": "a.png", "width": 20, "height": 10}],
        "annotations": [annotation | {"image_id": 12} for annotation in annotations],
        "categories": [{"id": 9, "name": "cat"}, {"id": 3, "name": "ant"}, {"id": 4, "name": "bee"}],
    }  # fmt: skip
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(content))
    return path


def test_boxes_become_targets_in_category_order_and_crowds_do_not(coco_file):
    dataset = from_hf(load_coco(coco_file, coco_file.parent))
    assert dataset.class_names == CLASS_NAMES
    image, target = dataset[0]
    assert image.tobytes() == noise(0, 20, 10).tobytes()
    assert torch.equal(target, torch.tensor([[2, 0.1, 0.1, 0.3, 0.6], [1, 0.25, 0, 0.5, 1.0]]))
    assert dataset[1][1].shape == (0, 5)
    assert get_classes_from_dataset(dataset) == [[1, 2], []]
    assert dataset.hf_dataset[0]["objects"]["iscrowd"] == [0, 1, 0]


def test_masks_of_polygons_run_lengths_and_crowds_are_drawn(coco_file):
    pytest.importorskip("faster_coco_eval")
    dataset = from_hf(load_coco(coco_file, coco_file.parent, target_type="segmentation"))
    masks = dataset[0][1]
    expected = torch.zeros(3, 10, 20)
    expected[0, :, :3] = 1
    expected[1, :, 5:10] = 1
    expected[2, 1:6, 2:6] = 1
    assert torch.equal(masks, expected)
    assert dataset[1][1].sum() == 0
    assert get_classes_from_dataset(dataset) == [[0, 1, 2], []]


def test_images_stay_by_reference(coco_file):
    stored = load_coco(coco_file, coco_file.parent).cast_column("image", datasets.Image(decode=False))
    assert stored[0]["image"] == {"bytes": None, "path": str(coco_file.parent / "b.png")}
    (coco_file.parent / "b.png").unlink()
    dataset = from_hf(load_coco(coco_file, coco_file.parent))
    assert len(get_targets_from_dataset(dataset)) == 2
    with pytest.raises(DataError, match=r"^Example 0: cannot read the image file '.*b\.png'"):
        dataset[0]


def test_saving_gives_the_loaded_annotations_back(coco_file, tmp_path):
    save_coco(load_coco(coco_file, coco_file.parent), tmp_path / "out" / "coco.json", tmp_path / "out" / "images")
    original, saved = (json.loads(path.read_text()) for path in (coco_file, tmp_path / "out" / "coco.json"))
    assert saved["images"] == original["images"]
    names = {9: 3, 3: 1, 4: 2}
    expected = [a | {"category_id": names[a["category_id"]]} for a in original["annotations"]]
    assert by_id(saved["annotations"]) == by_id(expected)
    assert [category["name"] for category in saved["categories"]] == CLASS_NAMES
    for name in ("a.png", "b.png"):
        assert (tmp_path / "out" / "images" / name).read_bytes() == (coco_file.parent / name).read_bytes()


@pytest.mark.parametrize("kind", ["detection", "segmentation", "overlapping"])
def test_what_is_saved_loads_to_the_same_targets(kind, tmp_path):
    if kind != "detection":
        pytest.importorskip("faster_coco_eval")
    examples = make_examples(kind)
    arguments = hf_arguments(kind)
    save_coco(to_hf(examples, **arguments), tmp_path / "coco.json", tmp_path / "images")
    dataset = from_hf(load_coco(tmp_path / "coco.json", tmp_path / "images", target_type=arguments["target_type"]))
    assert dataset.class_names == CLASS_NAMES
    for (image, target), (expected_image, expected) in zip(dataset, examples, strict=True):
        assert image.tobytes() == expected_image.tobytes()
        assert_same_target(target, expected)
    read_with_pycocotools(tmp_path / "coco.json")


def test_a_repeated_selection_gets_new_numbers(coco_file, tmp_path):
    dataset = from_hf(load_coco(coco_file, coco_file.parent)).select([0, 0, 1])
    save_coco(dataset, tmp_path / "new.json", tmp_path / "new")
    saved = json.loads((tmp_path / "new.json").read_text())
    assert [image["id"] for image in saved["images"]] == [1, 2, 3]
    assert len({image["file_name"] for image in saved["images"]}) == 3
    assert [annotation["id"] for annotation in saved["annotations"]] == [1, 2, 3, 4, 5, 6]
    assert [annotation["image_id"] for annotation in saved["annotations"]] == [1, 1, 1, 2, 2, 2]


def test_blood_cells_round_trip_and_equal_what_pycocotools_reads(shared_data, tmp_path):
    folder = shared_data / "detection"
    path = folder / "instances_val.json"
    dataset = from_hf(load_coco(path, folder / "images"))
    coco = read_with_pycocotools(path)
    assert dataset.class_names == ["RBC", "WBC", "Platelets"]
    num_boxes = 0
    for row, target in zip(dataset.hf_dataset.remove_columns("image"), dataset.get_all_targets(), strict=True):
        expected = coco.loadAnns(coco.getAnnIds(row["image_id"]))
        x, y, width, height = np.array([a["bbox"] for a in expected], dtype=np.float64).reshape(-1, 4).T
        size = [row["width"], row["height"]] * 2
        corners = np.stack([x, y, x + width, y + height], axis=1) / size
        assert target[:, 0].tolist() == [a["category_id"] - 1 for a in expected]
        assert np.array_equal(target[:, 1:].numpy(), corners.astype(np.float32))
        num_boxes += len(target)
    assert num_boxes == 1137
    image, _ = dataset[3]
    assert image.size == (640, 480)
    save_coco(dataset, tmp_path / "saved.json", tmp_path / "images")
    original, saved = json.loads(path.read_text()), json.loads((tmp_path / "saved.json").read_text())
    assert by_id(saved["annotations"]) == by_id(original["annotations"])
    assert saved["images"] == original["images"]
    assert saved["categories"] == original["categories"]


# pycocotools' arrays do not know numpy 2's copy keyword, and its upstream sleeps:
# https://github.com/cocodataset/cocoapi/pull/686
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_masks_of_coco_equal_those_of_pycocotools(shared_data):
    pytest.importorskip("faster_coco_eval")
    path = shared_data / "coco_map" / "gt_instances_val2014_100.json"
    coco = read_with_pycocotools(path)
    dataset = from_hf(load_coco(path, "nowhere", target_type="segmentation"))
    categories = sorted(coco.cats)
    for index, image in list(enumerate(coco.dataset["images"]))[::10]:
        expected = np.zeros((len(categories), image["height"], image["width"]), dtype=np.float32)
        for annotation in coco.loadAnns(coco.getAnnIds(image["id"])):
            mask = expected[categories.index(annotation["category_id"])]
            np.maximum(mask, coco.annToMask(annotation), out=mask)
        assert np.array_equal(dataset.get_targets(index).numpy(), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("images"), r"is no COCO instances file: it has no images"),
        (lambda content: content["annotations"][0].pop("bbox"), r"annotation 5 has no bbox"),
        (lambda content: content["annotations"][0].update(category_id=1), r"annotation 5 has category 1, which is not"),
        (
            lambda content: content["annotations"][0].update(image_id=1),
            r"annotation 5 belongs to image 1, which is not",
        ),
        (lambda content: content["annotations"][0].pop("segmentation"), r"'b.png': annotation 5 has no segmentation"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(change, message, coco_file):
    content = json.loads(coco_file.read_text())
    change(content)
    coco_file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        load_coco(coco_file, coco_file.parent, target_type="segmentation")


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match=r"Cannot read the COCO file '.*nowhere.json': No such file"):
        load_coco(tmp_path / "nowhere.json", tmp_path)
    (tmp_path / "text.json").write_text("text")
    with pytest.raises(DataError, match=r"text.json' is no JSON"):
        load_coco(tmp_path / "text.json", tmp_path)


def test_only_boxes_and_masks_make_a_coco_file(coco_file, tmp_path):
    with pytest.raises(ConfigError, match="'detection' or 'segmentation', not 'multiclass'"):
        load_coco(coco_file, coco_file.parent, target_type="multiclass")
    converted = to_hf(make_examples("multiclass"), **hf_arguments("multiclass"))
    with pytest.raises(ConfigError, match="A COCO file holds detection or segmentation data, not multiclass"):
        save_coco(converted, tmp_path / "x.json", tmp_path)


def test_a_wrong_box_behind_a_crowd_has_the_number_of_its_annotation(coco_file):
    content = json.loads(coco_file.read_text())
    content["annotations"][2]["bbox"] = [5, 0, 0, 10]
    coco_file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"Example 0: box 2 has x1 <= x0 \(0.25, 0.25\)"):
        from_hf(load_coco(coco_file, coco_file.parent)).get_targets(0)


def test_file_names_follow_the_format(tmp_path):
    save_coco(
        to_hf([(noise(0), torch.zeros(0, 5))], **hf_arguments("detection")), tmp_path / "a.json", tmp_path / "images"
    )
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["000000000000.png"]
