import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import nn
from torchvision.transforms import v2

from iris_hf.errors import ConfigError, DataError
from iris_hf.models.image_spec import ImageSpec, make_image_spec
from iris_hf.models.transforms import create_image_transform


class Needs(nn.Module):
    """A model as far as transforms look at it."""

    def __init__(self, target_type, **spec):
        super().__init__()
        self.target_type = target_type
        self.image_spec = ImageSpec(**spec)


@pytest.fixture
def image():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))


def test_evaluation_of_a_classifier_equals_torchvision(image):
    spec = ImageSpec(height=24, width=24, resize="crop", crop_fraction=0.8, interpolation="bicubic")
    oracle = v2.Compose(
        [
            v2.Resize(30, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(24),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    tensor, target = create_image_transform(spec)(image, 7)
    assert torch.equal(tensor, oracle(image))
    assert target == 7
    assert type(tensor) is torch.Tensor


def test_training_of_a_classifier_equals_torchvision(image):
    oracle = v2.Compose([v2.RandomResizedCrop(24), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    transform = create_image_transform(ImageSpec(height=24, width=24), train=True, horizontal_flip=False)
    for seed in range(10):
        torch.manual_seed(seed)
        expected = oracle(image)
        torch.manual_seed(seed)
        assert torch.equal(transform(image), expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_image_mode_becomes_three_channels_in_0_1(image, mode):
    tensor = create_image_transform(ImageSpec(height=8, width=9))(image.convert(mode))
    assert tensor.shape == (3, 8, 9)
    assert tensor.dtype == torch.float32
    assert 0 <= tensor.min() <= tensor.max() <= 1


def test_an_image_of_the_right_size_is_left_alone(image):
    tensor = create_image_transform(ImageSpec(height=40, width=60, interpolation="bicubic"))(image)
    torch.testing.assert_close(tensor, torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    assert torch.equal(create_image_transform(ImageSpec(height=40, width=60))(tensor), tensor)


@pytest.mark.parametrize("edge", [24, 25, 27])
@pytest.mark.parametrize("size", [(40, 61), (63, 40), (41, 41), (25, 24)])
def test_edges_are_rounded_as_torchvision_rounds_them(size, edge):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    oracle = v2.Compose([v2.Resize(edge), v2.CenterCrop(21), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    spec = ImageSpec(height=21, width=21, resize="crop", crop_fraction=21 / edge)
    assert torch.equal(create_image_transform(spec)(image), oracle(image))


def test_squash_with_a_fraction_cuts_out_the_centre(image):
    spec = ImageSpec(height=20, width=30, resize="squash", crop_fraction=0.5)
    whole = create_image_transform(ImageSpec(height=40, width=60))(image)
    assert torch.equal(create_image_transform(spec)(image), whole[:, 10:30, 15:45])


def test_another_resize_rule_keeps_all_of_the_image():
    known = {"height": 8, "width": 8, "resize": "crop", "crop_fraction": 0.8}
    assert make_image_spec(known, {"resize": "squash"}).crop_fraction == 1.0
    assert make_image_spec(known, {"resize": "squash", "crop_fraction": 0.9}).crop_fraction == 0.9
    assert make_image_spec(known, {"height": 9}).crop_fraction == 0.8


@pytest.mark.parametrize(("size", "expected"), [((60, 40), (32, 48)), ((100, 20), (12, 60)), ((20, 20), (32, 32))])
def test_fit_keeps_the_shape_within_both_edges(size, expected):
    spec = ImageSpec(height=32, width=60, resize="fit")
    assert create_image_transform(spec)(Image.new("RGB", size)).shape == (3, *expected)


def test_resizing_leaves_relative_boxes_bit_for_bit(image):
    boxes = torch.tensor([[2, 0.1, 0.2, 0.3, 0.7]])
    assert create_image_transform(Needs("detection", height=16, width=24))(image, boxes)[1] is boxes
    assert create_image_transform(Needs("detection", height=16, width=24, resize="fit"))(image, boxes)[1] is boxes


def test_flipping_twice_is_the_identity(image):
    transform = create_image_transform(Needs("detection", height=40, width=60), train=True, min_scale=1)
    boxes = torch.tensor([[1, 0.125, 0.25, 0.5, 0.75], [0, 0.0, 0.0, 1.0, 1.0]])
    torch.manual_seed(0)
    flips = [seed for seed in range(10) if torch.manual_seed(seed) and torch.rand(()) < 0.5]

    def flip(*pair):
        torch.manual_seed(flips[0])
        return transform(*pair)

    once = flip(image, boxes)
    torch.testing.assert_close(once[1][0], torch.tensor([1, 0.5, 0.25, 0.875, 0.75]))
    assert torch.equal(
        once[0].flip(2),
        transform.__class__(transform.spec, None, train=False, horizontal_flip=False, min_scale=1)(image),
    )
    twice = flip(*once)
    torch.testing.assert_close(twice[1], boxes)
    assert len({torch.equal(transform(image), once[0]) for _ in range(40)}) == 2  # about half are flipped


boxes_in_pixels = st.tuples(st.integers(0, 55), st.integers(0, 35), st.integers(4, 40), st.integers(4, 40)).map(
    lambda b: (b[0], b[1], min(60, b[0] + b[2]), min(40, b[1] + b[3]))
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    box=boxes_in_pixels,
    seed=st.integers(0, 1000),
    rule=st.sampled_from([("squash", 1.0), ("squash", 0.8), ("fit", 1.0), ("crop", 0.8)]),
    train=st.booleans(),
)
def test_a_box_and_the_mask_of_that_box_stay_together(box, seed, rule, train):
    x0, y0, x1, y1 = box
    picture = Image.new("RGB", (60, 40))
    ImageDraw.Draw(picture).rectangle((x0, y0, x1 - 1, y1 - 1), fill=(255, 255, 255))
    boxes = torch.tensor([[3, x0 / 60, y0 / 40, x1 / 60, y1 / 40]])
    masks = torch.zeros(2, 40, 60)
    masks[1, y0:y1, x0:x1] = 1
    arguments = {"height": 113, "width": 151, "resize": rule[0], "crop_fraction": rule[1], "interpolation": "nearest"}

    def run(target_type, target):
        torch.manual_seed(seed)
        return create_image_transform(Needs(target_type, **arguments), train=train)(picture, target)

    tensor, moved = run("detection", boxes)
    same, mask = run("segmentation", masks)
    assert torch.equal(tensor, same)
    assert mask.shape == (2, *tensor.shape[1:])
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    differs = mask[1] != (tensor[0] > 0.5)  # the mask follows the picture of the box, pixel by pixel
    differs[differs.sum(1).argmax()] = False  # but for one row and column whose centre is at an edge of pixels
    differs[:, differs.sum(0).argmax()] = False
    assert not differs.any()
    assert not mask[0].any()
    height, width = mask.shape[1:]
    if not mask.any():
        assert len(moved) == 0 or (moved[0, 3:] - moved[0, 1:3]).min() * 120 < 3
        return
    if len(moved) == 0:  # less than a pixel was left
        assert min(mask[1].any(0).sum(), mask[1].any(1).sum()) <= 2
        return
    rows, columns = mask[1].any(1).nonzero().flatten(), mask[1].any(0).nonzero().flatten()
    found = torch.tensor([columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height])
    assert moved[0, 0] == 3
    assert (moved[0, 1:] - found).abs().max() * 120 < 4  # one source pixel is up to 4 wide
    assert ((moved[0, 1:] >= 0) & (moved[0, 1:] <= 1)).all()


def test_boxes_that_a_crop_leaves_nothing_of_are_dropped_with_their_class(image):
    transform = create_image_transform(Needs("detection", height=40, width=60), train=True, min_scale=0.1)
    boxes = torch.tensor([[5, 0.0, 0.0, 0.05, 0.05], [6, 0.0, 0.0, 1.0, 1.0]])
    kept = []
    for seed in range(20):
        torch.manual_seed(seed)
        result = transform(image, boxes)[1]
        kept.append(set(result[:, 0].tolist()))
        assert (result[:, 3:] > result[:, 1:3]).all()
    assert {6.0} in kept
    assert all(6.0 in k for k in kept)


def test_images_without_boxes_stay_without(image):
    for train in (False, True):
        transform = create_image_transform(Needs("detection", height=32, width=32), train=train)
        assert transform(image, torch.zeros(0, 5))[1].shape == (0, 5)


def test_transforms_pickle_and_follow_the_seed(image):
    transform = create_image_transform(ImageSpec(height=24, width=24), train=True)
    twin = pickle.loads(pickle.dumps(transform))
    torch.manual_seed(3)
    expected = transform(image, 1)[0]
    torch.manual_seed(3)
    assert torch.equal(twin(image, 1)[0], expected)


def test_wrong_arguments_and_targets_are_refused(image):
    with pytest.raises(ConfigError, match="Linear has no image_spec"):
        create_image_transform(nn.Linear(1, 1))
    with pytest.raises(ConfigError, match=r"min_scale must be in \(0, 1\], got 0"):
        create_image_transform(ImageSpec(height=1, width=1), min_scale=0)
    for no_image in ("cat.png", np.zeros((4, 4, 3), np.uint8), None):
        with pytest.raises(DataError, match=r"An image is a PIL image or a tensor .*, not a (str|ndarray|NoneType)"):
            create_image_transform(ImageSpec(height=1, width=1))(no_image)
    with pytest.raises(DataError, match=r"tensor \[num_boxes, 5\].*got \(4,\)"):
        create_image_transform(Needs("detection", height=8, width=8))(image, torch.zeros(4))
    with pytest.raises(DataError, match=r"tensor \(num_classes, 40, 60\), got \(3, 60, 40\)"):
        create_image_transform(Needs("segmentation", height=8, width=8))(image, torch.zeros(3, 60, 40))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"height": 0}, "image_spec: height must be at least 1, got 0"),
        ({"multiple_of": 0}, "image_spec: multiple_of must be at least 1, got 0"),
        ({"width": "8"}, "image_spec: width must be a whole number, got '8'"),
        ({"mean": 0.5}, "mean needs three values, got 0.5"),
        ({"crop_fraction": "1"}, "crop_fraction must be a finite number, got '1'"),
        ({"std": (1, 0, 1)}, "std must be positive"),
        ({"mean": (0.5,)}, "mean needs three values"),
        ({"resize": "crops"}, "Unknown image_spec resize 'crops'. Did you mean 'crop'"),
        ({"interpolation": "cubic"}, "Known: bicubic, bilinear, lanczos, nearest"),
        ({"crop_fraction": 1.5}, r"crop_fraction must be in \(0, 1\], got 1.5"),
    ],
)
def test_wrong_image_specs_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        ImageSpec(**{"height": 8, "width": 8, **fields})
