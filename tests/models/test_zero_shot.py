import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from iris_hf.data.image_text_transform import make_image_text_transform
from iris_hf.data.prompts import build_classification_prompt_dataset, create_classification_prompt_generator
from iris_hf.errors import ConfigError, DataError
from iris_hf.inference.predictor import predict
from iris_hf.models.classifier import append_classifier
from iris_hf.models.contrastive import split_image_text_model
from iris_hf.models.sources.open_clip import create_tokenizer
from iris_hf.models.zero_shot import build_zero_shot_classifier
from iris_hf.training.trainer import train

from .families import make
from .words import save_word_tokenizer

CLASSES = [0, 2, 1, 0, 2, 2, 1, 0]


def make_features(n=8, dim=5):
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(0)), dim=1)


def test_rows_are_normalised_means_of_their_classes_texts():
    features, scale = make_features(), torch.tensor(2.5)
    classifier = build_zero_shot_classifier(features, torch.tensor(CLASSES), scale, num_classes=3)
    assert classifier.bias is None
    assert (classifier.in_features, classifier.out_features) == (5, 3)
    for index, row in enumerate(classifier.weight):
        mean = torch.stack([f for f, c in zip(features, CLASSES, strict=True) if c == index]).mean(0)
        torch.testing.assert_close(row.detach(), mean / mean.norm() * scale.exp())
    plain = build_zero_shot_classifier(features, torch.tensor(CLASSES), num_classes=3)
    torch.testing.assert_close(plain.weight.norm(dim=1), torch.ones(3))
    assert plain.weight.requires_grad


def test_lists_columns_and_numbers_are_taken_too():
    features = make_features()
    expected = build_zero_shot_classifier(features, torch.tensor(CLASSES), torch.tensor([2.0]), num_classes=3)
    for texts, classes in ((list(features), CLASSES), (features, torch.tensor(CLASSES)[:, None])):
        classifier = build_zero_shot_classifier(texts, classes, 2.0, num_classes=3)
        assert torch.equal(classifier.weight, expected.weight)
    half = build_zero_shot_classifier(features.bfloat16(), CLASSES, num_classes=3)
    assert half.weight.dtype == torch.float32
    assert build_zero_shot_classifier(features.double(), CLASSES, num_classes=3).weight.dtype == torch.float64


def test_arguments_and_the_callers_randomness_stay_as_they_were():
    features = make_features()
    before, state = features.clone(), torch.get_rng_state()
    classifier = build_zero_shot_classifier(features, CLASSES, num_classes=3)
    classifier.weight.data.zero_()
    assert torch.equal(features, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_classes_without_a_text_get_zeros_and_one_warning():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        classifier = build_zero_shot_classifier(make_features(2), [1, 1], 1.0, num_classes=4)
    assert [str(w.message) for w in caught] == ["There is no text for 3 classes: 0, 2, 3. Their logits are 0."]
    assert caught[0].filename == __file__
    assert not classifier.weight[[0, 2, 3]].any()
    assert classifier.weight[1].norm().item() == pytest.approx(2.71828, rel=1e-4)


@pytest.mark.parametrize(
    ("features", "classes", "arguments", "error", "message"),
    [
        (make_features(3), [0, 1], {}, DataError, "There are 3 text_features and 2 text_classes"),
        (make_features(2), [0, 3], {}, DataError, r"Text 1 has the class index 3, and num_classes=3 allows 0 to 2"),
        (make_features(2), [-1, 0], {}, DataError, r"Text 0 has the class index -1"),
        (
            make_features(2),
            [0.5, 1.0],
            {},
            DataError,
            r"text_classes must be integers \[N\] or \[N, 1\], got torch.float",
        ),
        (make_features(2), torch.zeros(2, 2).long(), {}, DataError, r"got torch.int64 of shape \(2, 2\)"),
        (make_features(0), [], {}, DataError, r"at least one row"),
        ([], [], {}, DataError, r"tensors of one shape \[F\], got \[\]"),
        ([torch.ones(2), torch.ones(3)], [0, 1], {}, DataError, r"got \[\(2,\), \(3,\)\]"),
        (torch.tensor([[1.0], [float("nan")]]), [0, 1], {}, DataError, "The features of text 1 are not finite"),
        (make_features(2), [0, 1], {"logit_scale": torch.ones(2)}, DataError, r"one number, got the shape \(2,\)"),
        (make_features(2), [0, 1], {"num_classes": 0}, ConfigError, "num_classes must be at least 1, got 0"),
        (make_features(2), [0, 1], {"num_classes": "3"}, ConfigError, "num_classes must be a whole number, got '3'"),
        (make_features(2), ["a", "b"], {}, DataError, r"must be integers \[N\] or \[N, 1\], got \['a', 'b'\]"),
        (make_features(2), [0, 1], {"logit_scale": "4"}, DataError, "logit_scale must be one number, got '4'"),
        ([[1.0], [2.0]], [0, 1], {}, DataError, r"a list of tensors \[F\] .*, not a list"),
        (None, [0, 1], {}, DataError, "not a NoneType"),
    ],
)
def test_wrong_arguments_are_refused(features, classes, arguments, error, message):
    with pytest.raises(error, match=message):
        build_zero_shot_classifier(features, classes, **{"num_classes": 3, **arguments})


def test_prompts_become_a_classifier_that_agrees_with_the_similarities():
    torch.manual_seed(3)
    model = make("open_clip").eval()
    image_model, text_model, logit_scale = split_image_text_model(model)
    names = ["cat", "dog", "car"]
    prompts = build_classification_prompt_dataset(names)
    tokenizer = create_tokenizer(text_model)
    features, classes = predict(prompts, text_model, tokenizer, batch_size=2, num_dataloader_workers=0, device="cpu")
    classifier = build_zero_shot_classifier(features, classes, logit_scale, num_classes=3)
    zero_shot = append_classifier(image_model, classifier, task_type="multiclass_classification").eval()
    assert (zero_shot.num_classes, zero_shot.image_spec) == (3, model.image_spec)
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        image, text, scale = *(model.encode_image(images), model.encode_text(tokenizer(names))), model.logit_scale.exp()
        torch.testing.assert_close(zero_shot.prediction_step(images), (scale * image @ text.T).softmax(1))
    assert isinstance(zero_shot.network[1], nn.Linear)


class Colours(torch.utils.data.Dataset):
    """Grey noise with one channel raised: which one is the class."""

    def __len__(self):
        return 48

    def __getitem__(self, index):
        image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(index)) * 0.4
        image[index % 3] += 0.5
        return image, index % 3


def test_a_model_trained_by_unicl_with_prompts_classifies_zero_shot(tmp_path):
    names = ["red", "big", "dog"]  # of the colours red, green and blue: names mean what training says
    torch.manual_seed(0)
    tokenizer = create_tokenizer(save_word_tokenizer(tmp_path, model_max_length=12))
    prompts = create_classification_prompt_generator(name="template", template="a photo of a {} .")
    transform = make_image_text_transform(None, names, prompts, tokenizer)
    model = train(
        make("timm-bert-unicl"),
        Colours(),
        transform,
        num_epochs=4,
        batch_size=12,
        optimizer="adamw",
        base_lr=3e-3,
        random_seed=0,
        num_dataloader_workers=0,
        device="cpu",
    ).model
    image_model, text_model, logit_scale = split_image_text_model(model)
    options = {"batch_size": 12, "num_dataloader_workers": 0, "device": "cpu"}
    texts = build_classification_prompt_dataset(names, prompts)
    features, classes = predict(texts, text_model, tokenizer, **options)
    classifier = build_zero_shot_classifier(features, classes, logit_scale, num_classes=3)
    zero_shot = append_classifier(image_model, classifier, task_type="multiclass_classification")
    predictions, targets = predict(Colours(), zero_shot, **options)
    assert (predictions.argmax(1) == targets).float().mean() > 0.95


def test_whole_floats_are_classes_as_in_irisml() -> None:
    features = make_features(2)
    ours = build_zero_shot_classifier(features, torch.tensor([1.0, 0.0]), num_classes=2)
    assert torch.equal(ours.weight, build_zero_shot_classifier(features, [1, 0], num_classes=2).weight)
