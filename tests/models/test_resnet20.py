import torch

from iris_hf.models.hub import from_pretrained, save_pretrained

from .resnet20 import load_cifar10, load_resnet20


def test_resnet20_classifies_915_of_1000_cifar10_images(shared_data, tmp_path):
    model = load_resnet20(shared_data)
    assert sum(p.numel() for p in model.parameters()) == 269_722
    images, labels = load_cifar10(shared_data)
    with torch.no_grad():
        probabilities = torch.cat([model.prediction_step(batch) for batch in images.split(200)])
    correct = 0
    for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        correct += max(range(10), key=row.__getitem__) == label
    assert correct == 915

    save_pretrained(model, tmp_path)  # by the factory that resnet20.py registers
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path).prediction_step(images[:200]), probabilities[:200])
