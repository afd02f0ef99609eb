"""The CIFAR ResNet-20 of He et al. (arXiv 1512.03385, section 4.2): n = 3, option-A shortcuts, in [0, 1] images."""

import torch
from torch import nn

from iris_hf.models.classifier import ImageClassifier, ImageEncoder
from iris_hf.models.image_spec import ImageSpec
from iris_hf.models.recipe import register_model_factory

SPEC = ImageSpec(height=32, width=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return (y + nn.functional.pad(shortcut, (0, 0, 0, 0, self.extra // 2, self.extra // 2))).relu()


class ResNet20(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return self.linear(x.mean((2, 3)))


@register_model_factory("resnet20")
def make_resnet20() -> ImageClassifier:
    """The network in the model interface, with random weights."""
    encoder = ImageEncoder(ResNet20(), SPEC)
    return ImageClassifier(encoder, target_type="multiclass", num_classes=10, class_names=None, image_spec=SPEC)


def load_resnet20(shared_data):
    """The network with its published weights."""
    from safetensors.torch import load_file

    model = make_resnet20()
    model.network.network.load_state_dict(load_file(shared_data / "weights/resnet20_cifar10/resnet20.safetensors"))
    return model.eval()


def load_cifar10(shared_data):
    """The first 1000 test images, float `[1000, 3, 32, 32]` in [0, 1], and their labels."""
    import json

    import numpy as np
    from PIL import Image

    folder = shared_data / "weights/resnet20_cifar10"
    with Image.open(folder / "cifar10_test_first1000.png") as picture:
        images = torch.from_numpy(np.array(picture)).reshape(1000, 32, 32, 3).permute(0, 3, 1, 2) / 255
    return images, torch.tensor(json.loads((folder / "labels_first1000.json").read_text()))
