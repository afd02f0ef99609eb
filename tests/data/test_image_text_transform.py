import pickle
import random
from collections import Counter

import datasets
import pytest
import torch
from PIL import Image

from iris_hf.data.collate import collate
from iris_hf.data.convert import to_hf
from iris_hf.data.hf_dataset import from_hf
from iris_hf.data.image_text_transform import make_image_caption_transform, make_image_text_transform
from iris_hf.data.prompts import create_classification_prompt_generator
from iris_hf.engine.loader import Examples
from iris_hf.errors import ConfigError, DataError
from iris_hf.models.image_spec import ImageSpec
from iris_hf.models.sources.open_clip import create_tokenizer
from iris_hf.models.transforms import create_image_transform

NAMES = ["cat", "dog", "car"]
PICTURE = Image.effect_noise((8, 8), 50).convert("RGB")


def to_pixels(image):
    return torch.tensor(image.getpixel((0, 0)))


def to_pixels_and_target(image, target):
    return to_pixels(image), target


def to_codes(text):
    return torch.tensor([ord(c) for c in text])


def to_text(tokens):
    return "".join(map(chr, tokens))


def make_transform(image_transform=to_pixels, name="clip_imagenet_short", tokenizer=to_codes):
    return make_image_text_transform(
        image_transform, NAMES, create_classification_prompt_generator(name=name), tokenizer
    )


@pytest.mark.parametrize("image_transform", [to_pixels, to_pixels_and_target, torch.nn.Identity(), None])
@pytest.mark.parametrize("target", [1, torch.tensor(1), torch.tensor([1]), [1], [torch.tensor(1)], (1,)])
def test_an_image_becomes_a_pair_with_a_prompt_of_its_class(image_transform, target):
    (image, tokens), index = make_transform(image_transform)(PICTURE, target)
    assert to_text(tokens) in create_classification_prompt_generator(name="clip_imagenet_short")("dog")
    assert (index, type(index)) == (1, int)
    expected = to_pixels(PICTURE) if image_transform in (to_pixels, to_pixels_and_target) else PICTURE
    assert torch.equal(image, expected) if isinstance(image, torch.Tensor) else image is expected


def test_every_prompt_comes_equally_often():
    torch.manual_seed(0)
    transform = make_transform()
    counts = Counter(to_text(transform(PICTURE, 0)[0][1]) for _ in range(1400))
    assert set(counts) == set(create_classification_prompt_generator(name="clip_imagenet_short")("cat"))
    assert all(130 < count < 270 for count in counts.values())  # 200 expected, five standard deviations


def test_prompts_follow_torchs_seed():
    transform = make_transform(name="clip_imagenet")
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append([to_text(transform(PICTURE, i % 3)[0][1]) for i in range(20)])
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 10


def test_prompts_depend_on_the_example_and_the_epoch_alone():
    data = [(PICTURE, i % 3) for i in range(6)]

    def prompts(keys):
        examples = Examples(data, make_transform(name="clip_imagenet"), seed=3, targets_required=True)
        return [to_text(tokens) for (_, tokens), _ in examples.__getitems__(keys)]

    together = prompts([(0, i) for i in range(6)])
    random.seed(1)
    torch.manual_seed(99)
    assert [prompts([(0, i)])[0] for i in (5, 2)] == [together[5], together[2]]
    assert prompts([(1, i) for i in range(6)]) != together


@pytest.mark.parametrize("tokenizer", [to_codes, "ViT-B-32"])
def test_transforms_pickle(tokenizer):
    tokenizer = create_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    for transform, raw in (
        (make_transform(tokenizer=tokenizer), (PICTURE, 2)),
        (make_image_caption_transform(to_pixels, tokenizer), ((PICTURE, ["a", "b", "c"]), None)),
    ):
        results = []
        for twin in (transform, pickle.loads(pickle.dumps(transform))):
            torch.manual_seed(0)
            results.append(twin(*raw)[0][1])
        assert torch.equal(*results)


def test_a_class_name_stands_for_itself_without_a_generator():
    transform = make_image_text_transform(to_pixels, NAMES, None, to_codes)
    assert to_text(transform(PICTURE, 2)[0][1]) == "car"


def test_batches_are_what_a_model_takes():
    spec = ImageSpec(height=4, width=4)
    transform = make_transform(create_image_transform(spec), tokenizer=create_tokenizer("ViT-B-32"))
    (images, tokens), targets = collate([transform(PICTURE, i % 3) for i in range(5)])
    assert (images.shape, tokens.shape, targets.tolist()) == ((5, 3, 4, 4), (5, 77), [0, 1, 2, 0, 1])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (3, r"class index 3 is beyond the 3 class_names \(0 to 2\)"),
        (-1, r"class index -1 is beyond"),
        (torch.tensor([0, 1]), r"must be one class index .* got tensor\(\[0, 1\]\)"),
        ([], r"must be one class index .* got \[\]"),
        (1.0, r"must be one class index .* got 1.0"),
        (True, r"must be one class index .* got True"),
        (None, r"must be one class index .* got None"),
        ("cat", r"must be one class index .* got 'cat'"),
    ],
)
def test_what_is_no_class_index_is_refused(target, message):
    with pytest.raises(DataError, match=message):
        make_transform()(PICTURE, target)


def test_wrong_arguments_are_refused():
    for names in ([], "cat", ["cat", 3]):
        with pytest.raises(ConfigError, match=r"class_names.* must be a (string|list of at least one name), got"):
            make_image_text_transform(to_pixels, names, None, to_codes)
    with pytest.raises(ConfigError, match="tokenizer must be callable, got None"):
        make_image_text_transform(to_pixels, NAMES, None, None)
    with pytest.raises(ConfigError, match="prompt_generator must be callable, got 'a photo'"):
        make_image_text_transform(to_pixels, NAMES, "a photo", to_codes)
    with pytest.raises(ConfigError, match=r"Unknown caption choice 'frist'. Did you mean 'first'"):
        make_image_caption_transform(to_pixels, to_codes, caption="frist")
    for prompts, message in (([], r"class 0 \('cat'\) must be a list of strings, got \[\]"), ([" "], "text, got ' '")):
        with pytest.raises(DataError, match=message):
            make_image_text_transform(to_pixels, NAMES, lambda name, p=prompts: p, to_codes)(PICTURE, 0)


# ---- captions


def test_captioned_images_of_a_hugging_face_data_set_become_pairs():
    rows = {"image": [PICTURE, PICTURE], "caption": ["a cat", "two dogs"]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    examples = from_hf(datasets.Dataset.from_dict(rows, features=features), target_type="image_text")
    transform = make_image_caption_transform(create_image_transform(ImageSpec(height=4, width=4)), to_codes)
    (image, tokens), target = transform(*examples[1])
    assert (image.shape, to_text(tokens), target) == ((3, 4, 4), "two dogs", None)


def test_lists_of_captions_survive_and_one_is_drawn():
    captions = ["a cat", "a pet", "a feline"]
    pairs = [((PICTURE, captions), None)]
    examples = from_hf(to_hf(pairs, target_type="image_text"))
    transform = make_image_caption_transform(to_pixels, to_codes)
    torch.manual_seed(0)
    drawn = Counter(to_text(transform(*examples[0])[0][1]) for _ in range(300))
    assert set(drawn) == set(captions)
    assert min(drawn.values()) > 60
    first = make_image_caption_transform(to_pixels, to_codes, caption="first")
    assert {to_text(first(*examples[0])[0][1]) for _ in range(20)} == {"a cat"}


def test_labels_of_captioned_images_pass_through():
    transform = make_image_caption_transform(to_pixels_and_target, to_codes)
    assert transform((PICTURE, "a cat"), 4)[1] == 4


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ((PICTURE, ""), "A caption is empty: ''. Drop the example"),
        ((PICTURE, " \n"), "A caption is empty"),
        ((PICTURE, ["a cat", ""]), r"A caption is empty: \['a cat', ''\]"),
        ((PICTURE, []), r"must be a string or a list of strings, got \[\]"),
        ((PICTURE, None), r"must be a string or a list of strings, got None"),
        (PICTURE, r"must be \(image, caption\), got a Image.*make_image_text_transform"),
    ],
)
def test_wrong_captions_are_refused(raw, message):
    with pytest.raises(DataError, match=message):
        make_image_caption_transform(to_pixels, to_codes)(raw, None)


def test_an_empty_caption_is_named_by_its_example():
    data = [((PICTURE, "a cat"), None), ((PICTURE, ""), None)]
    examples = Examples(data, make_image_caption_transform(to_pixels, to_codes), seed=0, targets_required=True)
    failure = examples.__getitems__([(0, 0), (0, 1)])
    with pytest.raises(DataError, match=r"Example 1: A caption is empty"):
        failure.reraise()
