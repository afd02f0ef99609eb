import json
import pickle
import re
import struct
from pathlib import Path

import hub_client
import numpy as np
import pytest
from launching import run_python

from iris_hf.errors import ConfigError, DataError


class Bomb:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def timm_files(hub, client, name="alice/model"):
    if f"models/{name}" not in hub.repositories:
        client(hub_client.push, "timm-resnet", name)
    return hub.files(f"models/{name}")


def test_missing_repository_and_missing_revision_are_told_apart(client, hub):
    timm_files(hub, client)
    with pytest.raises(DataError, match=r"'alice/none' is no folder, and the Hub has no repository 'alice/none'"):
        client(hub_client.pull, "alice/none", "timm-resnet")
    with pytest.raises(ConfigError, match=r"revision of 'alice/model'.*'v9'.*main"):
        client(hub_client.pull, "alice/model", "timm-resnet", revision="v9")
    with pytest.raises(DataError, match=r"is no name of a repository"):
        client(hub_client.pull, "no/such/folder", "timm-resnet")


def test_a_local_folder_has_no_revision(client, hub, tmp_path):
    with pytest.raises(DataError, match=r"is a local folder, which has no revision 'v1'"):
        client(hub_client.pull, str(tmp_path), "timm-resnet", revision="v1")


def test_the_cache_serves_without_the_hub(client, hub, environment):
    timm_files(hub, client)
    expected = client(hub_client.pull, "alice/model", "timm-resnet")
    hub.requests.clear()
    offline = client(hub_client.pull, "alice/model", "timm-resnet", local_files_only=True)
    assert all(np.array_equal(a, b) for a, b in zip(offline, expected, strict=True))
    with pytest.raises(
        DataError, match=r"'alice/none' is no folder, and it is not in the cache.*local_files_only.*Fetch it once"
    ):
        client(hub_client.pull, "alice/none", "timm-resnet", local_files_only=True)
    with pytest.raises(DataError, match=r"'alice/model' at revision 'v9' is no folder, and it is not in the cache"):
        client(hub_client.pull, "alice/model", "timm-resnet", revision="v9", local_files_only=True)
    assert not hub.requests

    program = (
        "from iris_hf.models.hub import from_pretrained\n"
        "from iris_hf.hub.push_model import push_to_hub\n"
        "model = from_pretrained('alice/model')\n"
        "print(type(model).__name__)\n"
        "for call in (lambda: from_pretrained('alice/none'), lambda: push_to_hub(model, 'alice/model')):\n"
        "    try:\n        call()\n    except ValueError as error:\n        print(error)\n"
    )
    done = run_python("-c", program, **{**environment, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ImageClassifier\n")
    assert "'alice/none' is no folder, and it is not in the cache" in done.stdout
    assert "Pushing to 'alice/model' failed: the Hub is not to be asked (HF_HUB_OFFLINE)" in done.stdout
    assert not hub.requests


def test_an_unreachable_hub_is_named(environment):
    program = (
        "from iris_hf.models.hub import from_pretrained\n"
        "try:\n    from_pretrained('alice/far')\nexcept ValueError as error:\n    print(error)\n"
    )
    done = run_python("-c", program, **{**environment, "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert "the Hub at http://127.0.0.1:9 cannot be reached" in done.stdout, done.stderr


def test_a_download_that_broke_goes_on_where_it_stopped(client, hub):
    _, _, pushed = client(hub_client.push, "timm-resnet", "alice/halved", seed=21)
    hub.fail("GET", "/resolve/.*/model.safetensors", None)
    pulled = client(hub_client.pull, "alice/halved", "timm-resnet")
    assert all(np.array_equal(a, b) for a, b in zip(pulled, pushed, strict=True))
    answers = [status for method, path, status in hub.requests if method == "GET" and path.endswith(".safetensors")]
    assert answers == [200, 206]  # huggingface_hub keeps whole blocks of 10 MB


def test_a_failing_hub_is_named(client, hub):
    hub.plant("models/alice/failing", {"config.json": b"{}"})
    hub.fail("GET", "/api/models/alice/failing", 500, times=100)
    with pytest.raises(DataError, match=r"the Hub failed \(500\)"):
        client(hub_client.pull, "alice/failing", "timm-resnet")


def test_a_pickle_is_neither_fetched_nor_loaded(client, hub, tmp_path):
    trace = tmp_path / "trace"
    files = {n: c for n, c in timm_files(hub, client).items() if not n.endswith(".safetensors")}
    hub.plant("models/alice/pickle", {**files, "pytorch_model.bin": pickle.dumps(Bomb(trace)), "evil.py": b"1 / 0"})
    with pytest.raises(DataError, match=r"holds no weights \(model\.safetensors\)"):
        client(hub_client.pull, "alice/pickle", "timm-resnet")
    fetched = [path for _, path, _ in hub.requests if "alice/pickle/resolve" in path]
    assert fetched
    assert not [path for path in fetched if path.endswith((".bin", ".py"))]
    assert not trace.exists()


def fetched_weights(hub):
    """The safetensors that were fetched from anywhere."""
    return sorted(p.rpartition("/")[2] for m, p, _ in hub.requests if m == "GET" and p.endswith(".safetensors"))


def test_only_the_weights_that_transformers_loads_are_fetched(client, hub):
    client(hub_client.push, "hf-vit", "alice/vit")
    files = hub.files("models/alice/vit")
    weights, others = files.pop("model.safetensors"), {"open_clip_model.safetensors": b"other", "more.safetensors": b""}
    halves = hub_client.split(weights)
    index = json.dumps({"metadata": {}, "weight_map": {n: f for f, (_, names) in halves.items() for n in names}})
    sharded = {"model.safetensors.index.json": index.encode(), **{f: content for f, (content, _) in halves.items()}}
    named = {"config.json": json.dumps({**json.loads(files["config.json"]), "transformers_weights": "[x].safetensors"})}
    cases = {
        "beside": ({"model.safetensors": weights}, ["model.safetensors"]),
        "sharded": (sharded, sorted(halves)),
        "both": ({**sharded, "model.safetensors": weights}, ["model.safetensors"]),
        "named": ({"[x].safetensors": weights, "config.json": named["config.json"].encode()}, ["%5Bx%5D.safetensors"]),
    }
    expected = client(hub_client.pull, "alice/vit", "hf-vit")
    for name, (own, wanted) in cases.items():
        hub.plant(f"models/alice/{name}", {**files, **others, **own})
        hub.requests.clear()
        pulled = client(hub_client.pull, f"alice/{name}", "hf-vit")
        assert all(np.array_equal(a, b) for a, b in zip(pulled, expected, strict=True)), name
        assert fetched_weights(hub) == wanted
        assert client(hub_client.pull, f"alice/{name}", "hf-vit", local_files_only=True)
        assert client(hub_client.create, f"alice/{name}", "hf-vit")
        assert fetched_weights(hub) == wanted


def test_a_model_is_made_of_the_revision_that_is_asked_for(client, hub, tmp_path):
    client(hub_client.push, "hf-vit", "alice/vit")
    files = {n: c for n, c in hub.files("models/alice/vit").items() if n != "iris_hf.json"}
    weights = {"model.safetensors": files.pop("model.safetensors")}
    hub.plant("models/alice/pickled", {**files, "pytorch_model.bin": pickle.dumps(Bomb(tmp_path / "trace"))})
    hub.plant("models/alice/pickled", {**files, **weights}, branch="refs/pr/1")
    with pytest.raises(DataError, match=r"(?s)holds no weights.*revision='refs/pr/N' to from_pretrained, create_hf_mo"):
        client(hub_client.create, "alice/pickled", "hf-vit")
    assert client(hub_client.create, "alice/pickled", "hf-vit", revision="refs/pr/1")
    with pytest.raises(ConfigError, match=r"revision of 'alice/pickled'.*'v9'.*main"):
        client(hub_client.create, "alice/pickled", "hf-vit", revision="v9")
    with pytest.raises(DataError, match=r"is a local folder, which has no revision 'v1'"):
        client(hub_client.create, str(tmp_path), "hf-vit", revision="v1")
    with pytest.raises(ConfigError, match=r"revision='v1' is for a repository of the Hub. Leave it out"):
        client(hub_client.create, "vit", "hf-vit", revision="v1", pretrained=False)
    assert not (tmp_path / "trace").exists()


def test_a_text_encoder_of_a_revision_has_its_tokenizer(client, hub, tmp_path):
    client(hub_client.save_text_encoder, str(tmp_path))
    hub.plant("models/alice/texts", {"README.md": b"nothing here"})
    hub.plant("models/alice/texts", {p.name: p.read_bytes() for p in tmp_path.iterdir()}, branch="v1")
    expected = client(hub_client.encode, str(tmp_path))
    assert client(hub_client.encode, "alice/texts", revision="v1") == expected
    with pytest.raises(DataError, match=r"no configuration of transformers at 'alice/texts'"):
        client(hub_client.encode, "alice/texts")


def test_a_path_that_climbs_out_of_the_folder_is_left_out(client, hub, environment):
    hub.plant("models/alice/climber", {**timm_files(hub, client), "../../../../climbed.json": b"{}"})
    assert client(hub_client.pull, "alice/climber", "timm-resnet")
    assert not list(Path(environment["HF_HOME"]).parent.rglob("climbed.json"))


def test_code_in_a_configuration_is_not_run(client, hub, tmp_path):
    client(hub_client.push, "hf-vit", "alice/vit")
    files = hub.files("models/alice/vit")
    config = json.loads(files["config.json"])
    code = {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"}
    evil = {"evil.py": f"open({str(tmp_path / 'trace')!r}, 'w')".encode()}

    changed = json.dumps({**config, "model_type": "evil", "auto_map": code}).encode()
    hub.plant("models/alice/coded", {**files, **evil, "config.json": changed})
    with pytest.raises(DataError, match=r"names the model_type 'evil', which transformers does not have, and code"):
        client(hub_client.pull, "alice/coded", "hf-vit")
    hub.plant("models/alice/coded2", {"model.safetensors": files["model.safetensors"], **evil, "config.json": changed})
    with pytest.raises(DataError, match=r"names the model_type 'evil'"):
        client(hub_client.pull, "alice/coded2", "hf-vit")
    changed = json.dumps({**config, "model_type": "evil"}).encode()
    hub.plant("models/alice/coded3", {**files, "config.json": changed})
    with pytest.raises(DataError, match=r"evil"):
        client(hub_client.pull, "alice/coded3", "hf-vit")
    changed = json.dumps({"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"}}).encode()
    hub.plant("models/alice/coded4", {**files, **evil, "preprocessor_config.json": changed})
    with pytest.raises(DataError, match=r"names the image_processor_type 'Evil'"):
        client(hub_client.pull, "alice/coded4", "hf-vit")
    assert not (tmp_path / "trace").exists()
    changed = json.dumps({**config, "auto_map": code}).encode()  # a type that transformers has: its own code runs
    processor = json.loads(files["preprocessor_config.json"]) | {"auto_map": {"AutoImageProcessor": "evil.Evil"}}
    planted = {**evil, "config.json": changed, "preprocessor_config.json": json.dumps(processor).encode()}
    hub.plant("models/alice/coded5", {**files, **planted})
    assert client(hub_client.pull, "alice/coded5", "hf-vit")
    assert not (tmp_path / "trace").exists()
    client(hub_client.save_again, "alice/coded5", str(tmp_path / "saved"))  # which names that code no longer
    assert not [f.name for f in (tmp_path / "saved").iterdir() if b"evil" in f.read_bytes()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": True}, r"would load pretrained=True. Only what lies beside it is loaded"),
        ({"weights": "weights.pth"}, r"would load weights='weights.pth'"),
        ({"config": {"checkpoint_path": "x.pth"}}, r"would load checkpoint_path='x.pth'"),
        (
            {"vision_cfg": {"timm_model_name": "hf-hub:mallory/timm"}},
            r"would load timm_model_name='hf-hub:mallory/timm'",
        ),
        ({"text_cfg": {"hf_model_name": "mallory/evil"}}, r"would load hf_model_name='mallory/evil'"),
        ({"text": {"hf_tokenizer_name": "mallory/evil"}}, r"would load hf_tokenizer_name='mallory/evil'"),
        ({"tokenizer": "mallory/tokens"}, r"would load tokenizer='mallory/tokens'"),
        ({"shell": "rm"}, r"describes no model that can be made.*shell"),
    ],
)
def test_a_recipe_loads_nothing_from_elsewhere(arguments, message, client, hub):
    files = timm_files(hub, client)
    recipe = json.loads(files["iris_hf.json"])
    recipe["arguments"] |= arguments
    name = f"alice/recipe-{next(iter(arguments))}"
    hub.plant(f"models/{name}", {**files, "iris_hf.json": json.dumps(recipe).encode()})
    with pytest.raises(DataError, match=message):
        client(hub_client.pull, name, "timm-resnet")


def test_an_unknown_factory_is_refused(client, hub):
    files = timm_files(hub, client)
    for i, factory in enumerate(("os.system", "torch.nn.Module", "evil")):
        recipe = json.dumps({"format": 1, "factory": factory, "arguments": {"command": "true"}}).encode()
        hub.plant(f"models/alice/factory{i}", {**files, "iris_hf.json": recipe})
        with pytest.raises(ConfigError, match=r"Unknown (model factory|layer)"):
            client(hub_client.pull, f"alice/factory{i}", "timm-resnet")


def test_broken_weights_are_refused_by_name(client, hub):
    files = timm_files(hub, client)
    weights = files["model.safetensors"]
    hub.plant("models/alice/cut", {**files, "model.safetensors": weights[: len(weights) // 2]})
    with pytest.raises(DataError, match=r"model.safetensors' is cut short"):
        client(hub_client.pull, "alice/cut", "timm-resnet")
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    other = struct.pack("<Q", len(header)) + header + bytes(4)
    hub.plant("models/alice/misfit", {**files, "model.safetensors": other})
    with pytest.raises(DataError, match=r"don't fit the model.*missing.*superfluous: a"):
        client(hub_client.pull, "alice/misfit", "timm-resnet")


def test_shards_outside_the_folder_are_refused(client, hub):
    client(hub_client.push, "hf-vit", "alice/vit")
    index = json.dumps({"metadata": {}, "weight_map": {"w": "../../other.safetensors"}}).encode()
    hub.plant("models/alice/shards", {**hub.files("models/alice/vit"), "model.safetensors.index.json": index})
    with pytest.raises(DataError, match=r"names the weights '../../other.safetensors', which are outside its folder"):
        client(hub_client.pull, "alice/shards", "hf-vit")


DETR = {"model_type": "detr", "architectures": ["DetrForObjectDetection"], "backbone_config": None}
NO_TIMM = {**DETR, "use_timm_backbone": False, "use_pretrained_backbone": False}
TIMM_PART = {"model_type": "timm_backbone", "backbone": "hf-hub:evil/timm", "use_pretrained_backbone": True}
WRAPPER = {"architecture": "resnet18", "num_classes": 3, "pretrained_cfg": {}}
EVIL_CODE = {**NO_TIMM, "backbone": "evil/code", "backbone_kwargs": {"trust_remote_code": True}}
EVIL_CONFIGS = {
    "code-of-a-backbone": (EVIL_CODE, "backbone='evil/code'"),
    "plain-backbone": ({**NO_TIMM, "backbone": "evil"}, "backbone='evil'"),
    "backbone-without-timm": ({**DETR, "use_timm_backbone": None, "backbone": "resnet18"}, "backbone='resnet18'"),
    "nested-timm": ({**NO_TIMM, "backbone_config": TIMM_PART}, "backbone='hf-hub:evil/timm'"),
    "nested-backbone": ({**NO_TIMM, "backbone_config": EVIL_CODE}, "backbone='evil/code'"),
    "spaced-scheme": ({**DETR, "backbone": " hf-hub:evil/timm"}, "backbone=' hf-hub:evil/timm'"),
    "backbone-arguments": (
        {**DETR, "backbone": "resnet18", "backbone_kwargs": {"checkpoint_path": "evil.txt"}},
        "backbone_kwargs={'checkpoint_path': 'evil.txt'}",
    ),
    "wrapped-timm": ({**WRAPPER, "architecture": "hf-hub:evil/timm"}, "architecture='hf-hub:evil/timm'"),
    "wrapped-arguments": ({**WRAPPER, "model_args": {"checkpoint_path": "evil.txt"}}, "model_args="),
    "type-by-name-dpt": ({"architecture": None, "backbone": "resnet18"}, "backbone='resnet18'"),
    "kernel": ({"_attn_implementation_internal": "evil/kernel"}, "_attn_implementation_internal='evil/kernel'"),
    "nested-kernel": ({"backbone_config": {"_attn_implementation": "evil/kernel"}}, "'evil/kernel'"),
    "other-weights": ({"transformers_weights": "../outside.safetensors"}, "transformers_weights='../outside.safe"),
    "pickled-weights": ({"transformers_weights": "evil.txt"}, "transformers_weights='evil.txt'"),
    "other-configuration": ({"configuration_files": ["config.4.0.0.json"]}, "configuration_files="),
    "other-names": ({"attribute_map": {"x": "backbone"}, "x": "evil/code"}, "attribute_map={'x': 'backbone'}"),
    "code-of-a-part": (
        {"backbone_config": {"model_type": "bert", "auto_map": {"AutoBackbone": "evil/code--evil.Net"}}},
        "auto_map={'AutoBackbone': 'evil/code--evil.Net'}",
    ),
    "quantization": ({"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config="),
    "detector-of-keypoints": (
        {"model_type": "lightglue", "trust_remote_code": True, "keypoint_detector_config": {"model_type": "evil"}},
        "model_type='lightglue'",
    ),
    "part-by-name": ({"model_type": "xcodec", "semantic_model_config": {"_name_or_path": "evil/code"}}, "'xcodec'"),
    "other-class": ({"image_processor_type": "LightGlueConfig"}, "image_processor_type='LightGlueConfig'"),
    "classes-of-oneformer": ({"image_processor_type": "OneFormerImageProcessor"}, "image_processor_type='OneFormer"),
    "tokenizer-of-rag": ({"model_type": "rag", "question_encoder": {"model_type": "bert"}}, "model_type='rag'"),
    "model-for-tokenizer": ({"tokenizer_class": "AutoModel"}, "tokenizer_class='AutoModel'"),
}


EVIL_PROCESSOR = {
    "image_processor_type": "LightGlueConfig",
    "trust_remote_code": True,
    "keypoint_detector_config": {"model_type": "evil", "_name_or_path": "evil/code"},
}


def plant_evil(hub, files, trace):
    """Plant repositories that leave a trace where their code or their pickle runs."""
    code = f"open({str(trace)!r}, 'w')".encode()
    auto = json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}).encode()
    pickled = pickle.dumps(Bomb(trace))
    for name in ("code", "timm", "kernel"):
        hub.plant(f"models/evil/{name}", {"config.json": auto, "evil.py": code, "pytorch_model.bin": pickled})
    hub.plant("models/evil/base", {**files, "evil.py": code})


def asked(hub):
    """The repositories that were asked for anything."""
    paths = [path.removeprefix("/api/models/").strip("/") for _, path, _ in hub.requests]
    return {"/".join(path.split("/")[:2]) for path in paths}


def test_a_configuration_loads_nothing_else(client, hub, tmp_path):
    client(hub_client.push, "hf-vit", "alice/vit")
    files = hub.files("models/alice/vit")
    weights, vit = files["model.safetensors"], json.loads(files["config.json"])
    plant_evil(hub, files, tmp_path / "trace")
    evil = pickle.dumps(Bomb(tmp_path / "trace"))
    hub.requests.clear()
    for name, (config, message) in EVIL_CONFIGS.items():
        whole = config if {"model_type", "architecture"} & config.keys() else {**vit, **config}
        planted = {"model.safetensors": weights, "evil.txt": evil, "config.json": json.dumps(whole).encode()}
        hub.plant(f"models/alice/{name}", planted)
        for load in (hub_client.pull, hub_client.create)[: 2 if config is EVIL_CODE else 1]:
            with pytest.raises(DataError, match=rf"config.json' would load .*{re.escape(message)}"):
                client(load, f"alice/{name}", "hf-vit")
        assert asked(hub) == {f"alice/{name}"}, name
        hub.requests.clear()
    assert not (tmp_path / "trace").exists()


def test_a_recipe_holds_no_configuration_that_loads(client, hub, tmp_path):
    files = timm_files(hub, client)
    plant_evil(hub, files, tmp_path / "trace")
    hf = {"target_type": "detection", "class_names": ["a"], "pretrained": False}
    inner = {"factory": "create_hf_model", "arguments": {**hf, "name_or_path": EVIL_CODE}}
    changed = {**hf, "name_or_path": NO_TIMM, "config": {"backbone": "evil"}}
    hidden = {"$model": {"factory": "create_timm_model", "arguments": {"name": "evil", "pretrained": True}}}
    smuggled = {"factory": "torch.nn.Sequential", "arguments": {"name_or_path": hidden}}
    for i, (part, message) in enumerate(
        [
            (inner, "backbone='evil/code'"),
            ({"factory": "create_hf_model", "arguments": changed}, "config={'backbone'"),
            (smuggled, "name_or_path={'$model'"),
        ]
    ):
        recipe = {"factory": "make_feature_extractor_model", "arguments": {"model": {"$model": part}}}
        hub.plant(f"models/alice/in{i}", {**files, "iris_hf.json": json.dumps({"format": 1, **recipe}).encode()})
        hub.requests.clear()
        with pytest.raises(DataError, match=rf"iris_hf.json' would load {re.escape(message)}"):
            client(hub_client.pull, f"alice/in{i}", "timm-resnet")
        assert asked(hub) == {f"alice/in{i}"}
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "model.safetensors.index.json",
            {"weight_map": {"w": "evil.txt"}},
            r"weights 'evil.txt', which are no safeten",
        ),
        ("model.safetensors.index.json", {"weight_map": []}, r"must hold a weight_map of names and files, got \[\]"),
        ("model.safetensors.index.json", [], r"must hold a JSON object, got a list"),
        (
            "adapter_config.json",
            {"base_model_name_or_path": "evil/base"},
            r"adapter, base_model_name_or_path='evil/base'",
        ),
        ("tokenizer_config.json", {"vocab_file": "/etc/passwd"}, r"would load vocab_file='/etc/passwd'"),
        ("tokenizer_config.json", {"init_inputs": ["/etc/passwd"]}, r"would load init_inputs="),
        ("tokenizer_config.json", {"sp_model_kwargs": {"model_file": "../x"}}, r"would load model_file='../x'"),
        ("tokenizer_config.json", {"vocab": "/etc/passwd"}, r"would load vocab='/etc/passwd'"),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "AutoProcessorFastFast"},
            r"would load tokenizer_class='AutoProcessorFastFast'",
        ),
        (
            "tokenizer_config.json",
            {"extra_special_tokens": {"auto_map": "evil/code--evil.Evil"}},
            r"would load auto_map='evil/code--evil.Evil'",
        ),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "../../../escaped", "template": "x"}]},
            r"names a chat_template '../../../escaped', which is no name of a file",
        ),
        ("tokenizer_config.json", {"mecab_kwargs": {"mecab_option": "-d /x"}}, r"would load mecab_option='-d /x'"),
        ("preprocessor_config.json", {"class_info_file": "/etc/x.json"}, r"would load class_info_file='/etc/x.json'"),
        ("preprocessor_config.json", {"tesseract_config": "-c x=y"}, r"would load tesseract_config='-c x=y'"),
        (
            "preprocessor_config.json",
            {"image_processor": {"auto_map": {"AutoImageProcessor": "evil/code--evil.Evil"}}},
            r"would load auto_map=\{'AutoImageProcessor': 'evil/code--evil.Evil'\}",
        ),
        ("tokenizer_config.json", {"tokenizer_class": "AutoVideoProcessor"}, r"would load tokenizer_class='AutoVideo"),
        ("tokenizer_config.json", {"tokenizer_class": "RagTokenizer"}, r"would load tokenizer_class='RagTokeni"),
        ("special_tokens_map.json", {"vocab_file": "/etc/passwd"}, r"would load vocab_file='/etc/passwd'"),
        ("preprocessor_config.json", EVIL_PROCESSOR, r"would load image_processor_type='LightGlueConfig'"),
        ("processor_config.json", {"image_processor": EVIL_PROCESSOR}, r"would load image_processor_type='LightGlueC"),
        (
            "preprocessor_config.json",
            {"feature_extractor_type": "EdgeTamConfig"},
            r"would load feature_extractor_type=",
        ),
        ("preprocessor_config.json", {"repo_path": "evil/base"}, r"would load repo_path='evil/base'"),
        ("processor_config.json", {"image_processor": {"repo_path": "evil/base"}}, r"would load repo_path='evil/base'"),
    ],
)
def test_what_lies_beside_a_configuration_loads_nothing_else(name, content, message, client, hub, tmp_path):
    client(hub_client.push, "hf-vit", "alice/vit")
    files = hub.files("models/alice/vit")
    plant_evil(hub, files, tmp_path / "trace")
    evil = {"evil.txt": pickle.dumps(Bomb(tmp_path / "trace")), name: json.dumps(content).encode()}
    repo = f"alice/beside{abs(hash((name, message)))}"
    hub.plant(f"models/{repo}", {**{n: c for n, c in files.items() if n != "iris_hf.json"}, **evil})
    hub.requests.clear()
    with pytest.raises(DataError, match=message):
        client(hub_client.pull, repo, "hf-vit")
    with pytest.raises(DataError, match=message):
        client(hub_client.create, repo, "hf-vit")
    assert asked(hub) == {repo}
    assert not (tmp_path / "trace").exists()


def test_a_published_detector_loads_without_the_weights_of_its_backbone(client, hub, tmp_path):
    client(hub_client.save_timm_detector, str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("backbone_config", None)  # transformers 5 writes one; published ones have the older fields
    config |= hub_client.timm_detector()
    config |= {
        "_attn_implementation_autoset": True,
        "_attn_implementation": "flash_attention_2",
        "torch_dtype": "float32",
    }
    config["_name_or_path"] = "facebook/detr-resnet-50"
    (tmp_path / "config.json").write_text(json.dumps(config))
    hub.plant("models/alice/detr", {p.name: p.read_bytes() for p in tmp_path.iterdir()})
    hub.requests.clear()
    assert client(hub_client.detector_facts, "alice/detr") == client(hub_client.detector_facts, str(tmp_path))
    assert asked(hub) == {"alice/detr"}
    offline = client(hub_client.detector_facts, "alice/detr", local_files_only=True)
    assert offline == client(hub_client.detector_facts, str(tmp_path))


def test_a_backbone_that_the_user_names_is_saved_with_the_model(client, hub, tmp_path):
    resnet = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
    hub.plant("models/alice/resnet", {"config.json": json.dumps(resnet).encode()})
    expected = client(hub_client.save_detector_around, "alice/resnet", str(tmp_path))
    hub.requests.clear()
    assert client(hub_client.detector_facts, str(tmp_path)) == expected
    assert not hub.requests
