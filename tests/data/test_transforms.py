import functools
import pickle

import pytest
import torch
import torchvision.transforms
from data_examples import noise
from torchvision.transforms import v2

from iris_hf.data.transforms import as_pair_transform
from iris_hf.errors import ConfigError


def negate(image):
    return -image


def both(image, target):
    return -image, target + 1


def options(image, scale=-1, *, shift=0):
    return image * scale + shift


def optional_target(image, target=None):
    return -image, target + 1


def optional_targets(image, targets=None):
    return -image, targets + 1


def optional_label(image, label=None):
    return -image, label + 1


def with_target_size(image, target_size=None):
    return -image


class Methods:
    def image(self, image):
        return -image

    def pair(self, image, target):
        return -image, target + 1

    def __call__(self, image, target):
        return -image, target + 1


class Module(torch.nn.Module):
    def forward(self, image, target):
        return -image, target + 1


IMAGE_ONLY = [negate, options, with_target_size, lambda image: -image, Methods().image,
              functools.partial(options, shift=0), torchvision.transforms.Compose([negate])]  # fmt: skip
PAIRS = [both, optional_target, optional_targets, optional_label, functools.partial(both),
         lambda image, target: (-image, target + 1), Methods().pair, Methods(), Module()]  # fmt: skip


@pytest.mark.parametrize("transform", IMAGE_ONLY)
def test_image_only_transforms_pass_the_target_through(transform):
    image, target = as_pair_transform(transform)(torch.ones(2), 3)
    assert image.tolist() == [-1, -1]
    assert target == 3


@pytest.mark.parametrize("transform", PAIRS)
def test_transforms_of_pairs_get_the_target(transform):
    image, target = as_pair_transform(transform)(torch.ones(2), 3)
    assert image.tolist() == [-1, -1]
    assert target == 4


def test_none_changes_nothing():
    image = noise(0)
    assert as_pair_transform(None)(image, 3) == (image, 3)


@pytest.mark.parametrize(
    "transform",
    [
        torchvision.transforms.Compose([torchvision.transforms.Resize(5), torchvision.transforms.ToTensor()]),
        v2.Compose([v2.Resize(5), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]),
        v2.Compose([v2.Resize(5), torchvision.transforms.ToTensor()]),
        v2.Compose([lambda image: image.resize((7, 5)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]),
    ],
)
def test_torchvision_transforms_of_both_kinds_work(transform):
    image, target = as_pair_transform(transform)(noise(0), torch.tensor([3]))
    assert image.shape[:2] == (3, 5)
    assert target.tolist() == [3]


def test_torchvision_v2_moves_boxes_with_the_image():
    from torchvision import tv_tensors

    boxes = tv_tensors.BoundingBoxes([[0, 0, 3, 9]], format="XYXY", canvas_size=(9, 13))
    _, flipped = as_pair_transform(v2.Compose([v2.RandomHorizontalFlip(p=1.0)]))(noise(0), boxes)
    assert flipped.tolist() == [[10, 0, 13, 9]]


def test_the_result_pickles_and_is_left_alone_the_second_time():
    for transform in (None, negate, both, v2.Resize(5)):
        once = as_pair_transform(transform)
        assert as_pair_transform(once) is once or transform is None
        pickle.loads(pickle.dumps(once))(noise(0) if isinstance(transform, v2.Resize) else torch.ones(2), 3)
    assert as_pair_transform(as_pair_transform(None))("image", 3) == ("image", 3)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (3, "A transform is a callable or None, not 3"),
        (lambda: 1, "takes 0 arguments"),
        (lambda a, b, c: 1, "takes 3 arguments"),
    ],
)
def test_what_is_no_transform_is_refused(transform, message):
    with pytest.raises(ConfigError, match=message):
        as_pair_transform(transform)


def test_a_pair_transform_that_forgets_the_target_is_told():
    with pytest.raises(ConfigError, match=r"has to return \(input, target\), not Tensor"):
        as_pair_transform(lambda image, target: image)(torch.ones(2), 3)
