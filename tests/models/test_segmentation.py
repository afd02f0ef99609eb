import pytest
import torch
from torch import nn

from iris_hf.errors import ConfigError, DataError
from iris_hf.models.sources.transformers import create_hf_model
from iris_hf.models.steps import as_trainable

from .families import make, make_batch, of_target_type

every_segmenter = pytest.mark.parametrize("name", of_target_type("segmentation"))


@every_segmenter
def test_segmentation_loss_is_the_librarys_own(name):
    model = make(name).eval()
    images, masks = make_batch(name)
    labels = torch.full((2, *images.shape[2:]), 255)
    for c in range(3):
        labels[masks[:, c] == 1] = c
    library = model.network(pixel_values=model.normalize(images), labels=labels)
    torch.testing.assert_close(model.training_step(images, masks)["loss"], library.loss)
    torch.testing.assert_close(model(images), library.logits)


@every_segmenter
def test_predictions_equal_the_librarys_post_processing(name):
    import transformers

    model = make(name).eval()
    images, _ = make_batch(name)
    processor = transformers.SegformerImageProcessor()
    with torch.no_grad():
        output = model.network(pixel_values=model.normalize(images))
        library = processor.post_process_semantic_segmentation(output, target_sizes=[tuple(images.shape[2:])] * 2)
        masks = model.prediction_step(images)
    assert masks.dtype == torch.uint8
    assert torch.equal(masks.argmax(1), torch.stack(library))


@pytest.mark.parametrize("name", [n for n in of_target_type("segmentation") if n != "hf-dpt"])
def test_images_of_different_sizes_are_padded(name):
    model = make(name)
    images = [torch.rand(3, 64, 96), torch.rand(3, 70, 64)]
    masks = [nn.functional.one_hot(torch.randint(0, 3, i.shape[1:]), 3).permute(2, 0, 1).float() for i in images]
    model.training_step(images, masks)["loss"].backward()
    predictions = model.eval().prediction_step(images)
    assert [tuple(p.shape) for p in predictions] == [(3, 64, 96), (3, 70, 64)]
    assert all((p.sum(0) == 1).all() for p in predictions)
    padded = [model.normalize(nn.functional.pad(i, (0, 96 - i.shape[2], 0, 70 - i.shape[1]))) for i in images]
    logits = model.network(pixel_values=torch.stack(padded)).logits
    labels = torch.full((2, 70, 96), 255)
    for i, mask in enumerate(masks):
        labels[i, : mask.shape[1], : mask.shape[2]] = mask.argmax(0)
    assert logits.shape[1] == 3
    torch.testing.assert_close(
        model.training_step(images, masks)["loss"],
        model.network(pixel_values=torch.stack(padded), labels=labels).loss,
    )


def test_networks_of_one_size_ask_for_it():
    with pytest.raises(DataError, match=r"takes images of one size.*create_image_transform"):
        make("hf-dpt").prediction_step([torch.rand(3, 32, 32), torch.rand(3, 32, 48)])


@every_segmenter
def test_pixels_without_a_class_do_not_count(name):
    model = make(name).train()
    images, masks = make_batch(name)
    loss = model.training_step(images, torch.zeros_like(masks))["loss"]
    loss.backward()
    assert loss == 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_wrong_masks_and_classes_are_refused():
    model = make("hf-segformer")
    images, masks = make_batch("hf-segformer")
    masks[1, :, 9, 9] = 1
    with pytest.raises(DataError, match=r"Mask 1 of the batch gives a pixel two classes"):
        model.training_step(images, masks)
    with pytest.raises(ConfigError, match=r"\['cell'\] are too few. Add a class for the background"):
        create_hf_model("segformer", target_type="segmentation", class_names=["cell"], pretrained=False)


def test_segformer_overfits_a_handful_of_images():
    torch.manual_seed(0)
    images, masks = torch.rand(4, 3, 64, 64) * 0.3, torch.zeros(4, 3, 64, 64)
    for i in range(4):
        images[i, 0, 8 * i : 8 * i + 24, 16:48] += 0.7
        images[i, 1, 44:60, 8 * i : 8 * i + 20] += 0.7
        masks[i, 1, 8 * i : 8 * i + 24, 16:48] = 1
        masks[i, :2, 44:60, 8 * i : 8 * i + 20], masks[i, 2, 44:60, 8 * i : 8 * i + 20] = 0, 1
    masks[:, 0] = 1 - masks[:, 1:].amax(1)
    config = {
        "hidden_sizes": [16, 16, 32, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 2, 2],
        "decoder_hidden_size": 32,
    }
    names = ["background", "square", "bar"]
    model = create_hf_model("segformer", target_type="segmentation", class_names=names, pretrained=False, config=config)
    trainable = as_trainable(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(80):
        loss = trainable(images, masks)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = model.eval().prediction_step(images)
    overlap, union = ((found * masks).sum((0, 2, 3)), ((found + masks) > 0).sum((0, 2, 3)))
    assert (overlap / union).mean() > 0.8
