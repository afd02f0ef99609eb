import copy
import math
import pickle
import shutil

import open_clip
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from iris_hf.errors import ConfigError, DataError
from iris_hf.inference.predictor import predict
from iris_hf.models.classifier import append_classifier
from iris_hf.models.contrastive import make_image_text_contrastive_model, split_image_text_model
from iris_hf.models.hub import from_pretrained, save_pretrained
from iris_hf.models.sources.open_clip import create_tokenizer
from iris_hf.models.sources.text_encoders import create_hf_text_encoder
from iris_hf.models.sources.timm import create_timm_model
from iris_hf.models.steps import as_predictor, as_trainable
from iris_hf.models.transforms import create_image_transform
from iris_hf.training.trainer import train

from .families import BERT, IMAGE_TEXT, make, make_inputs, make_pairs
from .words import save_word_tokenizer

every_model = pytest.mark.parametrize("name", IMAGE_TEXT)
KINDS = ["clip", "unicl", "siglip"]


class Vectors(nn.Module):
    """A tower whose inputs are vectors already."""

    def __init__(self, dim=6, out=5):
        super().__init__()
        self.layer = nn.Linear(dim, out)

    def forward(self, x):
        return self.layer(x)


def make_tiny(loss="clip", **arguments):
    torch.manual_seed(0)
    dims = {"image_feature_dim": 5, "text_feature_dim": 5, "projection_dim": 4}
    return make_image_text_contrastive_model(Vectors(), Vectors(), loss=loss, **{**dims, **arguments}).double()


def tiny_batch(n=7):
    generator = torch.Generator().manual_seed(1)
    images, texts = torch.randn(2, n, 6, generator=generator, dtype=torch.float64)
    return (images, texts), torch.arange(n) % 3


def naive_loss(model, inputs, targets):
    """The definitions of the papers, with the matrix of logits."""
    image = normalize(model.image_projection(model.image_model(inputs[0])), dim=-1)
    text = normalize(model.text_projection(model.text_model(inputs[1])), dim=-1)
    logits = model.logit_scale.exp() * image @ text.T
    if model.loss == "clip":
        labels = torch.arange(len(logits))
        return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    positives = (targets[:, None] == targets[None]).to(logits.dtype)
    if model.loss == "unicl":
        shares = positives / positives.sum(1, keepdim=True)
        return (cross_entropy(logits, shares) + cross_entropy(logits.T, shares)) / 2
    return -logsigmoid((2 * positives - 1) * (logits + model.logit_bias)).sum() / len(logits)


# ---- the model


@pytest.mark.parametrize("loss", KINDS)
def test_training_step_has_the_loss_and_gradients_of_the_papers(loss):
    model = make_tiny(loss).train()
    inputs, targets = tiny_batch()
    if loss == "siglip":
        model.logit_bias.data.fill_(-1.5)
    result = as_trainable(model)(inputs, targets)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(result["loss"], parameters)
    expected = naive_loss(model, inputs, targets)
    torch.testing.assert_close(result["loss"], expected, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert result["loss"].dtype == torch.float64
    torch.testing.assert_close(result["temperature"], 1 / model.logit_scale.exp())
    assert 0 <= result["image_to_text_r1"] <= 1
    assert 0 <= result["text_to_image_r1"] <= 1


@pytest.mark.parametrize(("loss", "oracle"), [("clip", open_clip.ClipLoss()), ("siglip", open_clip.loss.SigLipLoss())])
def test_loss_equals_open_clips(loss, oracle):
    model = make_tiny(loss)
    inputs, _ = tiny_batch()
    torch.testing.assert_close(model.training_step(inputs, None)["loss"], oracle(*model(inputs)))


def test_unicl_of_distinct_labels_is_clip():
    inputs, _ = tiny_batch()
    clip, unicl = make_tiny("clip"), make_tiny("unicl")
    torch.testing.assert_close(
        unicl.training_step(inputs, torch.arange(7)[:, None])["loss"], clip.training_step(inputs, None)["loss"]
    )
    with pytest.raises(DataError, match="unicl"):
        unicl.training_step(inputs, None)


def test_parts_are_copies_with_the_names_and_values_of_the_contract():
    image_model, text_model = Vectors(), Vectors(out=4)
    model = make_image_text_contrastive_model(image_model, text_model, image_feature_dim=5, projection_dim=4)
    assert (model.image_projection.in_features, model.image_projection.out_features) == (5, 4)
    assert isinstance(model.text_projection, nn.Identity)
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert model.logit_scale.shape == ()
    assert model.logit_bias is None
    assert (model.target_type, model.num_classes, model.class_names) == ("image_text", None, None)
    nn.init.zeros_(model.image_model.layer.weight)
    assert image_model.layer.weight.any()
    siglip = make_tiny("siglip")
    assert siglip.logit_scale.item() == pytest.approx(math.log(10))
    assert siglip.logit_bias.item() == -10
    plain = make_image_text_contrastive_model(Vectors(), Vectors(), projection_dim=None, image_feature_dim=5)
    assert isinstance(plain.image_projection, nn.Identity)


@every_model
def test_features_have_length_one_and_come_with_the_scale(name):
    model = make(name).eval()
    with torch.no_grad():
        image, text, scale, *bias = model(make_inputs(name))
    for features in (image, text):
        torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(scale, model.logit_scale.exp())
    assert len(bias) == (model.loss == "siglip")
    assert torch.equal(model.prediction_step(make_inputs(name)), torch.stack([image, text], 1))


@every_model
def test_gradients_reach_every_parameter(name):
    model = make(name).train()
    as_trainable(model)(make_pairs(3), torch.tensor([0, 1, 0]))["loss"].backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert all("text_model.network.pooler" in n for n in frozen)  # ALIGN's, which is part of nothing


@every_model
def test_a_few_steps_lower_the_loss(name):
    model = make(name).train()
    trainable, batch = as_trainable(model), (make_pairs(4), torch.tensor([0, 1, 2, 0]))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(10):
        torch.manual_seed(2)
        loss = trainable(*batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < losses[0]


@every_model
def test_copies_and_pickles_give_the_same(name):
    model = make(name).eval()
    with torch.no_grad():
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin.prediction_step(make_inputs(name)), model.prediction_step(make_inputs(name)))


@every_model
def test_double_precision_goes_through(name):
    import transformers

    if name in ("hf-clip", "hf-metaclip_2") and transformers.__version__.startswith("4."):
        pytest.skip("the causal mask of transformers 4 overflows in float64")
    model = make(name).double().eval()
    images, tokens = make_pairs()
    assert model.training_step((images.double(), tokens), torch.tensor([0, 1]))["loss"].dtype == torch.float64


def test_the_scale_of_siglip_has_no_bound():  # published ones are about 117
    model = make("hf-siglip")
    model.logit_scale.data.fill_(4.765)
    inputs = make_pairs()
    for mode in (True, False):
        assert model.train(mode)(inputs)[2].item() == pytest.approx(math.exp(4.765))
    assert split_image_text_model(model).logit_scale.item() == pytest.approx(4.765)


def test_the_scale_stays_below_one_hundred_and_can_come_back():
    model = make_tiny().train()
    inputs, _ = tiny_batch()
    model.logit_scale.data.fill_(7.0)
    model.eval()
    assert model(inputs)[2].item() == pytest.approx(100)
    assert model.logit_scale.item() == 7.0  # evaluation changes nothing
    model.train()
    assert model(inputs)[2].item() == pytest.approx(100)
    assert model.logit_scale.item() == pytest.approx(math.log(100))
    for dtype in (torch.float32, torch.float64):
        model.to(dtype).zero_grad()
        model.logit_scale.data.fill_(7.0)
        model([x.to(dtype) for x in inputs])[2].backward()
        assert model.logit_scale.grad.item() == pytest.approx(100, rel=1e-5)
    model.logit_scale.requires_grad_(False).data.fill_(7.0)
    model([x.double() for x in inputs])
    assert model.logit_scale.item() == 7.0  # a frozen parameter is the caller's


def test_a_graph_kept_from_an_earlier_forward_stays_valid():
    model = make_tiny().train()
    inputs, _ = tiny_batch()
    model.logit_scale.data.fill_(7.0)
    first = model.training_step(inputs, None)["loss"]
    second = model.training_step(inputs, None)["loss"]
    first.backward()
    gradient = model.logit_scale.grad.clone()
    second.backward()
    torch.testing.assert_close(model.logit_scale.grad, 2 * gradient)


def test_predictions_of_pairs_are_their_features_in_order():
    model = make_tiny()
    (images, texts), _ = tiny_batch(5)
    pairs = [((image, text), None) for image, text in zip(images, texts, strict=True)]
    predictions, targets = predict(pairs, model, batch_size=2, num_dataloader_workers=0, device="cpu")
    assert targets is None
    image_features, text_features = predictions.unbind(1)
    with torch.no_grad():
        expected = model((images, texts))
    torch.testing.assert_close(image_features, expected[0])
    torch.testing.assert_close(text_features, expected[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "clop"}, r"Unknown contrastive loss 'clop'.*Known: clip, siglip, unicl"),
        ({"projection_dim": 0}, r"projection_dim must be at least 1, got 0"),
        ({"image_feature_dim": -1}, r"image_feature_dim must be at least 1, got -1"),
        ({"projection_dim": "512"}, r"projection_dim must be a whole number, got '512'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_tiny(**arguments)


def test_dimensions_that_cannot_meet_are_refused_before_training():
    encoder = create_timm_model("resnet10t")
    assert encoder.feature_dim == 512
    text = make("hf-bert")
    with pytest.raises(
        ConfigError, match=r"512 dimensions and text features 16.*image_feature_dim=512, text_feature_dim=16"
    ):
        make_image_text_contrastive_model(encoder, text)
    with pytest.raises(ConfigError, match=r"text_feature_dim=384, but the features of the text model have 16"):
        make_image_text_contrastive_model(encoder, text, image_feature_dim=512, text_feature_dim=384)
    with pytest.raises(ConfigError, match=r"text_model must be a torch.nn.Module, got function"):
        make_image_text_contrastive_model(encoder, lambda x: x)
    unknown = make_image_text_contrastive_model(Vectors(), Vectors(out=3))
    with pytest.raises(DataError, match=r"image features have the shape \(7, 5\), the text features \(7, 3\)"):
        unknown([x.float() for x in tiny_batch()[0]])


def test_inputs_that_are_no_pairs_are_refused():
    model = make_tiny()
    (images, texts), _ = tiny_batch()
    with pytest.raises(DataError, match=r"takes \(images, texts\), got Tensor.*make_image_text_transform"):
        model(images)
    with pytest.raises(DataError, match=r"\(7, 4\), the text features \(6, 4\). There must be one text for each image"):
        model((images, texts[:6]))


@pytest.mark.parametrize(
    "name", ["mobilenetv3_small_050", "tf_efficientnet_lite0", "vit_tiny_patch16_224", "resnet10t"]
)
def test_timm_encoders_know_the_length_of_their_features(name):
    encoder = create_timm_model(name).eval()
    with torch.no_grad():
        assert encoder(torch.rand(1, 3, 224, 224)).shape == (1, encoder.feature_dim)


def test_two_processes_train_like_one():
    name = "hf-siglip"
    images, tokens = make_pairs(16)
    pairs = [
        ((image, {k: v[i] for k, v in tokens.items()}), i % 5) for i, image in enumerate(images)
    ]  # labels that are pairs of each other on different processes
    results = [
        train(
            make(name),
            pairs,
            None,
            num_epochs=2,
            batch_size=8 // num_processes,
            base_lr=0.1,
            random_seed=0,
            num_dataloader_workers=0,
            num_processes=num_processes,
            device="cpu",
        ).model.state_dict()
        for num_processes in (1, 2)
    ]
    start = make(name).state_dict()
    assert not torch.allclose(start["logit_scale"], results[0]["logit_scale"], atol=1e-4)
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-5, atol=1e-6)


# ---- its parts


@every_model
def test_split_parts_give_the_features_of_the_whole(name):
    model = make(name).eval()
    inputs = make_inputs(name)
    parts = split_image_text_model(model)
    raw = split_image_text_model(model, append_normalizer=False)
    with torch.no_grad():
        features = model(inputs)[:2]
        for i, (part, plain) in enumerate([(parts.image_model, raw.image_model), (parts.text_model, raw.text_model)]):
            assert torch.equal(part(inputs[i]), features[i])
            torch.testing.assert_close(normalize(plain(inputs[i]), dim=1), features[i])
            assert plain(inputs[i]).shape == (2, plain.feature_dim)
            assert not torch.allclose(plain(inputs[i]).norm(dim=1), torch.ones(2))
    assert torch.equal(parts.logit_scale, model.logit_scale)
    assert parts.logit_scale is not model.logit_scale
    model.logit_scale.data.fill_(7.0)
    wanted = 7.0 if model.loss == "siglip" else math.log(100)
    assert split_image_text_model(model).logit_scale.item() == pytest.approx(wanted)  # as in forward
    assert not {id(p) for p in model.parameters()} & {id(p) for part in parts[:2] for p in part.parameters()}


@every_model
def test_split_parts_can_be_saved(name, tmp_path):
    for part, inputs in zip(split_image_text_model(make(name)), make_inputs(name), strict=False):
        part.eval()
        save_pretrained(part, tmp_path / "part")
        torch.manual_seed(99)
        loaded = from_pretrained(tmp_path / "part")
        with torch.no_grad():
            assert torch.equal(loaded(inputs), part(inputs))
        assert (loaded.feature_dim, loaded.image_spec) == (part.feature_dim, part.image_spec)


def test_split_parts_know_their_images_and_tokens(tmp_path):
    from PIL import Image

    parts = split_image_text_model(make("open_clip").eval())
    image = create_image_transform(parts.image_model)(Image.new("RGB", (50, 40)))
    assert image.shape == (3, 32, 32)
    tokens = create_tokenizer(parts.text_model)(["a dog", "two cats"])
    assert parts.text_model(tokens).shape == parts.image_model(image[None]).expand(2, -1).shape
    model = append_classifier(parts.image_model, nn.Linear(16, 3), task_type="multiclass_classification")
    assert model.image_spec == parts.image_model.image_spec
    save_pretrained(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(
            from_pretrained(tmp_path).prediction_step(image[None]), as_predictor(model.eval())(image[None])
        )


def test_the_tokenizer_travels_with_models_and_their_parts(tmp_path):
    folder = save_word_tokenizer(tmp_path / "words", model_max_length=512)
    text_model = create_hf_text_encoder("bert", pretrained=False, config=BERT, tokenizer=folder)
    model = make_image_text_contrastive_model(
        create_timm_model("resnet10t"), text_model, image_feature_dim=512, projection_dim=16
    )
    save_pretrained(model, tmp_path / "model")
    save_pretrained(split_image_text_model(model).text_model, tmp_path / "part")
    shutil.rmtree(folder)
    for name in ("model", "part"):
        loaded = from_pretrained(tmp_path / name)
        tokenizer = create_tokenizer(loaded)
        assert tokenizer.max_length == 12
        assert tokenizer("a big dog")["input_ids"].tolist() == [2, 8, 6] + [0] * 9


def test_what_is_no_image_text_model_is_not_split():
    with pytest.raises(ConfigError, match=r"Linear is no image-text model: it has no image_model, text_model"):
        split_image_text_model(nn.Linear(1, 1))
