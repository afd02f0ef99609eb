import pickle

import open_clip
import pytest
from launching import run_python
from torch.utils.data import DataLoader

from iris_hf.data.prompts import build_classification_prompt_dataset, create_classification_prompt_generator
from iris_hf.data.read_targets import get_targets_from_dataset
from iris_hf.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("name", "count", "templates"),
    [
        ("clip_imagenet", 80, open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("clip_imagenet_short", 7, open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ],
)
def test_the_prompts_are_those_of_clip(name, count, templates):
    generate = create_classification_prompt_generator(name=name)
    for class_name in ("cat", "{}", "{0} {x}", "%s", ""):
        prompts = generate(class_name)
        assert prompts == [template(class_name) for template in templates]
        assert len(prompts) == len(set(prompts)) == count


def test_the_80_templates_are_the_default():
    assert create_classification_prompt_generator() == create_classification_prompt_generator(name="clip_imagenet")


@pytest.mark.parametrize(
    ("template", "prompts"),
    [
        ("This is an image of {}", ["This is an image of cat"]),
        ("{} or {} in {braces} {{}}", ["cat or cat in {braces} {cat}"]),
        (None, ["cat"]),
        ("", ["cat"]),
    ],
)
def test_a_template_of_ones_own(template, prompts):
    assert create_classification_prompt_generator(name="template", template=template)("cat") == prompts


@pytest.mark.parametrize("template", ["a photo", "a {0}", "a { }"])
def test_a_template_without_a_place_for_the_name_is_an_error(template):
    with pytest.raises(ConfigError, match=r"must contain \{\}"):
        create_classification_prompt_generator(name="template", template=template)


def test_an_unknown_name_lists_the_known_ones():
    expected = "Unknown prompt generator 'clip'.*'clip_imagenet'.*Known: clip_imagenet, clip_imagenet_short, template"
    with pytest.raises(ConfigError, match=expected):
        create_classification_prompt_generator(name="clip")


def test_a_template_that_is_not_used_is_said(caplog):
    assert len(create_classification_prompt_generator(template="a {}")("cat")) == 80
    assert "template='a {}' has no effect with name='clip_imagenet'" in caplog.text


def test_generators_pickle_and_do_not_need_open_clip_to_unpickle(tmp_path):
    generate = create_classification_prompt_generator()
    path = tmp_path / "generator"
    path.write_bytes(pickle.dumps(generate))
    assert pickle.loads(path.read_bytes()) == generate
    code = (
        "import pickle, sys\n"
        f"prompts = pickle.load(open({str(path)!r}, 'rb'))('cat')\n"
        "assert prompts[0] == 'a bad photo of a cat.', prompts[0]\n"
        "assert 'open_clip' not in sys.modules\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_every_prompt_of_every_class_in_class_order():
    dataset = build_classification_prompt_dataset(["ant", "bee"], lambda name: [f"A {name}", f"B {name}"])
    assert [dataset[index] for index in range(len(dataset))] == [("A ant", 0), ("B ant", 0), ("A bee", 1), ("B bee", 1)]
    assert get_targets_from_dataset(dataset).tolist() == [0, 0, 1, 1]
    assert (dataset.class_names, dataset.num_classes, dataset.target_type) == (["ant", "bee"], 2, "multiclass")
    texts, targets = next(iter(DataLoader(pickle.loads(pickle.dumps(dataset)), batch_size=3)))
    assert list(texts) == ["A ant", "B ant", "A bee"]
    assert targets.tolist() == [0, 0, 1]


def test_without_a_generator_the_name_is_the_prompt():
    dataset = build_classification_prompt_dataset(["ant", "bee", "ant"])
    assert [dataset[index] for index in range(3)] == [("ant", 0), ("bee", 1), ("ant", 2)]


def test_the_data_set_of_the_80_templates():
    dataset = build_classification_prompt_dataset(["ant", "bee"], create_classification_prompt_generator())
    assert len(dataset) == 160
    assert [dataset.get_targets(index) for index in range(160)] == [0] * 80 + [1] * 80
    assert all("bee" in dataset[index][0] for index in range(80, 160))


@pytest.mark.parametrize("class_names", [[], "ant", (), 3, None])
def test_no_class_names_are_an_error(class_names):
    with pytest.raises(ConfigError, match="class_names must be a list of at least one name"):
        build_classification_prompt_dataset(class_names)


def test_what_is_no_generator_template_or_class_name_is_said():
    with pytest.raises(ConfigError, match=r"prompt_generator must be a function, .* got 'clip_imagenet'"):
        build_classification_prompt_dataset(["ant"], "clip_imagenet")
    with pytest.raises(ConfigError, match=r"The template 3 must contain \{\}"):
        create_classification_prompt_generator(name="template", template=3)
    with pytest.raises(ConfigError, match="A prompt is made of a class name, not of 3"):
        create_classification_prompt_generator(name="template")(3)


def test_a_class_name_has_to_be_a_string():
    with pytest.raises(ConfigError, match=r"class_names\[1\] must be a string, got 7"):
        build_classification_prompt_dataset(["ant", 7])


@pytest.mark.parametrize("prompts", ["a text", [], [1], None])
def test_a_generator_that_gives_no_list_of_texts_is_an_error(prompts):
    with pytest.raises(DataError, match=r"The prompts of class 0 \('ant'\) must be a list of strings, got "):
        build_classification_prompt_dataset(["ant"], lambda name: prompts)
