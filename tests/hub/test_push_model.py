import json
import os
import signal
import subprocess
import sys
import time

import hub_client
import numpy as np
import pytest
from launching import ROOT
from models.families import NAMES

from iris_hf.errors import ConfigError, DataError


def equal(ours, theirs):
    return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ["hf-vit", "timm-resnet", "open_clip", "append_classifier"])
def test_a_pushed_model_comes_back_with_equal_outputs(name, client, hub):
    repo_id = f"alice/{name}"
    url, files, pushed = client(hub_client.push, name, repo_id)
    assert url.startswith(f"{hub.endpoint}/{repo_id}/commit/")
    assert {n: len(c) for n, c in hub.files(f"models/{repo_id}").items()} == files
    assert all(n.endswith((".json", ".safetensors", ".md")) for n in files)
    assert equal(client(hub_client.pull, repo_id, name, token=None), pushed)


def test_plain_transformers_loads_a_pushed_model(client, hub):
    _, files, pushed = client(hub_client.push, "hf-vit", "alice/plain")
    assert "preprocessor_config.json" in files
    probabilities, names = client(hub_client.pull_plainly, "alice/plain")
    assert np.array_equal(probabilities, np.stack(pushed))
    assert names == NAMES


def test_the_tokenizer_travels_along(client, hub, tmp_path):
    folder = tmp_path / "words"
    folder.mkdir()
    files, features, tokens = client(hub_client.push_pairs, "alice/pairs", str(folder))
    assert {"tokenizer.json", "tokenizer_config.json"} < files.keys()
    assert not folder.exists()
    assert str(folder).encode() not in b"".join(hub.files("models/alice/pairs").values())
    pulled, pulled_tokens = client(hub_client.pull_pairs, "alice/pairs")
    assert equal(pulled, features)
    assert pulled_tokens == tokens


def test_a_text_tower_of_open_clip_travels_along(client, hub, tmp_path):
    files, pushed = client(hub_client.push_open_clip, "alice/bert-clip", str(tmp_path / "bert"))
    assert {"iris_hf.json", "model.safetensors", "tokenizer_open_clip.json"} < set(files)
    assert "config.json" not in files
    hub.requests.clear()
    assert equal(client(hub_client.pull_open_clip, "alice/bert-clip"), pushed)
    assert hub.requests
    assert all("/alice/bert-clip" in path for _, path, _ in hub.requests)


def test_the_hub_shows_task_metrics_and_licence(client, hub):
    client(
        hub_client.push,
        "timm-resnet",
        "alice/shown",
        metrics={"accuracy": 0.875, "macro f1": 0.5},
        datasets=["alice/birds"],
        training_config={"num_epochs": 3, "optimizer": "adamw", "base_lr": 1e-3},
        license="apache-2.0",
    )
    shown = client(hub_client.shown, "alice/shown")
    assert (shown["library"], shown["task"], shown["private"]) == ("iris_hf", "image-classification", False)
    assert shown["tags"] == ["iris_hf", "timm"]
    assert shown["metrics"] == {"accuracy": ("alice/birds", 0.875), "macro f1": ("alice/birds", 0.5)}
    assert (shown["metadata"]["license"], shown["metadata"]["datasets"]) == ("apache-2.0", ["alice/birds"])
    for text in ('from_pretrained("alice/shown")', "| accuracy | 0.875 |", "| optimizer | adamw |", "176 x 176"):
        assert text in shown["text"], shown["text"]
    assert "transformers" not in shown["text"]
    client(hub_client.push, "hf-vit", "alice/shown-plainly")
    plain = client(hub_client.shown, "alice/shown-plainly")
    assert plain["library"] == "transformers"
    assert 'pipeline("image-classification", model="alice/shown-plainly")' in plain["text"]
    assert f"3: {', '.join(NAMES)}" in plain["text"]
    assert not plain["metrics"]


def test_a_private_model_needs_its_owners_token(client, hub):
    _, _, pushed = client(hub_client.push, "timm-resnet", "alice/secret", private=True)
    assert equal(client(hub_client.pull, "alice/secret", "timm-resnet", token="hf_reader"), pushed)
    assert client(hub_client.shown, "alice/secret")["private"]


def test_a_private_model_is_refused_to_others(client, hub):
    hub.plant("models/alice/hidden", {"config.json": b"{}"}, private=True)
    with pytest.raises(DataError, match=r"'alice/hidden', or it is private and there is no token.*HF_TOKEN"):
        client(hub_client.pull, "alice/hidden", "timm-resnet", token=None)
    with pytest.raises(DataError, match=r"or it is private and this token may not see it"):
        client(hub_client.pull, "alice/hidden", "timm-resnet", token="hf_bob")
    with pytest.raises(DataError, match=r"does not accept the token. Log in again.*HF_TOKEN"):
        client(hub_client.pull, "alice/hidden", "timm-resnet", token="hf_wrong")


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (
            "hf_reader",
            r"Pushing to 'alice/new' failed: the Hub forbids it with this token \(403\).*under the namespace",
        ),
        ("hf_bob", r"forbids it with this token"),
        ("hf_wrong", r"does not accept the token"),
        (None, r"does not accept the token|there is no token"),
    ],
)
def test_a_push_without_the_right_to_write_is_refused(token, message, client, hub):
    with pytest.raises(DataError, match=message):
        client(hub_client.push, "timm-resnet", "alice/new", token=token)
    assert "models/alice/new" not in hub.repositories


def test_a_public_repository_takes_no_private_model(client, hub):
    hub.plant("models/alice/public", {"notes.txt": b"hello"})
    with pytest.raises(ConfigError, match=r"'alice/public' exists and is public: nothing was pushed"):
        client(hub_client.push, "timm-resnet", "alice/public", private=True)
    assert hub.files("models/alice/public") == {"notes.txt": b"hello"}


def test_a_repository_that_somebody_makes_in_between_is_taken(client, hub):
    for name, is_private in (("alice/raced", False), ("alice/raced-secretly", True)):
        hub.plant(f"models/{name}", {"notes.txt": b"hello"}, private=is_private)
        hub.fail("GET", f"/api/models/{name}$", 404, code="RepoNotFound")
        client(hub_client.push, "timm-resnet", name, private=is_private)
        assert {"notes.txt", "model.safetensors"} < hub.files(f"models/{name}").keys()
    hub.plant("models/alice/raced-publicly", {"notes.txt": b"hello"})
    hub.fail("GET", "/api/models/alice/raced-publicly$", 404, code="RepoNotFound")
    with pytest.raises(ConfigError, match=r"exists and is public: nothing was pushed"):
        client(hub_client.push, "timm-resnet", "alice/raced-publicly", private=True)


def test_a_second_push_replaces_the_model_and_keeps_the_rest(client, hub):
    others = ("notes.txt", "models_2023/weights.safetensors", "tokenizer_old/a.json", "model_cards/old.safetensors.md")
    hub.plant("models/alice/again", {**dict.fromkeys(others, b"hello"), "model-00001-of-00002.safetensors": b"old"})
    client(hub_client.push, "hf-vit", "alice/again")
    _, _, pushed = client(hub_client.push, "timm-resnet", "alice/again", seed=6)
    held = hub.files("models/alice/again")
    assert [held[name] for name in others] == [b"hello"] * 4
    assert not {"model-00001-of-00002.safetensors", "config.json", "preprocessor_config.json"} & held.keys()
    assert json.loads(held["iris_hf.json"])["factory"] == "create_timm_model"
    assert equal(client(hub_client.pull, "alice/again", "timm-resnet"), pushed)
    commits = len(hub.repositories["models/alice/again"].commits)
    client(hub_client.push, "timm-resnet", "alice/again", seed=6)  # the same once more
    assert len(hub.repositories["models/alice/again"].commits) == commits


def test_a_second_push_leaves_nothing_that_the_first_told_of_its_model(client, hub, onnx_folder):
    options = {"metrics": {"accuracy": 0.93}, "onnx_folder": onnx_folder}
    client(hub_client.push, "timm-resnet", "alice/twice", **options)
    assert client(hub_client.shown, "alice/twice")["tags"] == ["iris_hf", "timm", "onnx"]
    client(hub_client.push, "hf-vit", "alice/twice")
    shown = client(hub_client.shown, "alice/twice")
    assert (shown["tags"], shown["metrics"]) == (["iris_hf", "transformers"], {})
    assert not [name for name in hub.files("models/alice/twice") if name.startswith("onnx/")]


def test_a_name_without_owner_is_the_tokens(client, hub):
    url, _, _ = client(hub_client.push, "timm-resnet", "ownerless")
    assert f"{hub.endpoint}/alice/ownerless/commit/" in url
    assert b'from_pretrained("alice/ownerless")' in hub.files("models/alice/ownerless")["README.md"]


def test_text_that_somebody_wrote_on_the_card_stays(client, hub):
    card = b"---\nlanguage: en\ntags: [birds]\nlicense: mit\n---\n# My birds\n\nHand-written.\n"
    hub.plant("models/alice/carded", {"README.md": card})
    client(hub_client.push, "timm-resnet", "alice/carded", metrics={"accuracy": 1})
    shown = client(hub_client.shown, "alice/carded")
    assert shown["text"].strip() == "# My birds\n\nHand-written."
    assert shown["tags"] == ["iris_hf", "timm", "birds"]
    assert (shown["metadata"]["language"], shown["metadata"]["license"]) == ("en", "mit")
    assert shown["metrics"] == {"accuracy": ("unknown", 1.0)}


def test_branches_and_tags_keep_models_apart(client, hub):
    _, _, first = client(hub_client.push, "timm-resnet", "alice/versions", seed=1, tag="v1")
    url, _, second = client(hub_client.push, "timm-resnet", "alice/versions", seed=2, revision="next/try", tag="v2")
    refs = client(hub_client.shown_refs, "alice/versions")
    assert url.endswith(refs["next/try"])
    assert refs["v1"] == refs["main"] != refs["v2"] == refs["next/try"]
    for revision, expected in (
        (None, first),
        ("v1", first),
        ("v2", second),
        ("next/try", second),
        (refs["v2"], second),
    ):
        assert equal(client(hub_client.pull, "alice/versions", "timm-resnet", revision=revision), expected)
    with pytest.raises(ConfigError, match=r"'alice/versions' has the tag 'v1' already. Choose another"):
        client(hub_client.push, "timm-resnet", "alice/versions", seed=3, tag="v1")
    assert client(hub_client.shown_refs, "alice/versions") == refs


def test_a_dry_run_tells_the_files_and_touches_nothing(client, hub, onnx_folder):
    url, files, _ = client(hub_client.push, "hf-vit", "alice/dry", onnx_folder=onnx_folder, dry_run=True)
    assert url is None
    assert files["onnx/model.onnx"] == 5000
    assert {"README.md", "config.json", "iris_hf.json", "model.safetensors", "preprocessor_config.json"} < files.keys()
    assert not hub.requests
    assert "models/alice/dry" not in hub.repositories
    _, pushed, _ = client(hub_client.push, "hf-vit", "alice/dry", onnx_folder=onnx_folder)
    assert pushed == files


def test_the_onnx_folder_travels_along_and_is_not_pulled(client, hub, onnx_folder):
    _, _, pushed = client(hub_client.push, "timm-resnet", "alice/exported", onnx_folder=onnx_folder)
    assert hub.files("models/alice/exported")["onnx/model.onnx"] == (onnx_folder / "model.onnx").read_bytes()
    assert equal(client(hub_client.pull, "alice/exported", "timm-resnet"), pushed)
    assert not any("/onnx/" in path for _, path, _ in hub.requests if "/resolve/" in path)
    (onnx_folder / "model.onnx").unlink()
    with pytest.raises(ConfigError, match=r"onnx_folder=.*holds no .onnx file"):
        client(hub_client.push, "timm-resnet", "alice/exported", onnx_folder=onnx_folder)


def test_an_upload_that_broke_can_be_repeated(client, hub, onnx_folder):
    _, _, before = client(hub_client.push, "timm-resnet", "alice/broken", seed=11)
    hub.requests.clear()
    hub.fail("POST", "/commit/", 403, message="Storage quota exceeded")
    options = {"seed": 12, "onnx_folder": onnx_folder}
    local = {path.name: path.read_bytes() for path in onnx_folder.iterdir()}
    with pytest.raises(DataError, match=r"'alice/broken' failed: the Hub forbids it.*Storage quota exceeded"):
        client(hub_client.push, "timm-resnet", "alice/broken", **options)
    assert {path.name: path.read_bytes() for path in onnx_folder.iterdir()} == local
    assert len([r for r in hub.requests if r[0] == "PUT"]) == 2
    assert equal(client(hub_client.pull, "alice/broken", "timm-resnet"), before)
    hub.requests.clear()
    _, _, after = client(hub_client.push, "timm-resnet", "alice/broken", **options)
    assert not [r for r in hub.requests if r[0] == "PUT"]
    assert equal(client(hub_client.pull, "alice/broken", "timm-resnet"), after)


def test_an_upload_whose_process_was_killed_can_be_repeated(client, hub, environment):
    hub.fail("PUT", "/lfs/", None, times=99)
    code = (
        "import hub_client; hub_client.call('hf_alice', hub_client.push, ['timm-resnet', 'alice/killed'], {'seed': 13})"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "hub")])
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **environment, "PYTHONPATH": path})
    while process.poll() is None and not any(method == "PUT" for method, _, _ in hub.requests):
        time.sleep(0.1)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not hub.files("models/alice/killed")
    hub.faults.clear()
    _, _, pushed = client(hub_client.push, "timm-resnet", "alice/killed", seed=13)
    assert equal(client(hub_client.pull, "alice/killed", "timm-resnet"), pushed)


def test_a_dropped_connection_and_a_failing_server_are_tried_again(client, hub):
    hub.fail("PUT", "/lfs/", None)
    hub.fail("POST", "/preupload/", 500)
    _, _, pushed = client(hub_client.push, "timm-resnet", "alice/shaky", seed=7)
    answers = [status for method, _, status in hub.requests if method == "PUT"]
    assert answers == [0, 200]
    assert equal(client(hub_client.pull, "alice/shaky", "timm-resnet"), pushed)


def test_a_server_that_keeps_failing_is_named_and_nothing_changes(client, hub, onnx_folder):
    hub.plant("models/alice/down", {"notes.txt": b"hello"})
    local = {path.name: path.read_bytes() for path in onnx_folder.iterdir()}
    hub.fail("POST", "/commit/", 500, times=99)
    with pytest.raises(DataError, match=r"Pushing to 'alice/down' failed: the Hub failed \(500\)"):
        client(hub_client.push, "timm-resnet", "alice/down", onnx_folder=onnx_folder)
    assert hub.files("models/alice/down") == {"notes.txt": b"hello"}
    assert {path.name: path.read_bytes() for path in onnx_folder.iterdir()} == local


def test_a_commit_of_somebody_else_in_between_is_noticed(client, hub):
    client(hub_client.push, "timm-resnet", "alice/shared")
    parent = hub.repositories["models/alice/shared"].branches["main"]
    hub.plant("models/alice/shared", {"notes.txt": b"in between"})
    with pytest.raises(DataError, match=r"the repository has changed since.*\(412\)"):
        client(hub_client.push, "timm-resnet", "alice/shared", seed=8, parent_commit=parent)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "good", None, True])
def test_a_metric_that_is_no_number_reaches_no_network(value, client, hub):
    with pytest.raises(ConfigError, match=r"The metric 'accuracy' must be a finite number, got"):
        client(hub_client.push, "timm-resnet", "alice/numbers", metrics={"accuracy": value})
    assert not hub.requests


def test_bad_arguments_are_refused_by_name(client, hub):
    with pytest.raises(ConfigError, match="make this Conv2d again"):
        client(hub_client.push_unsavable, "alice/conv")
    assert not hub.requests
    with pytest.raises(DataError, match=r"'a/b/c' is no name of a repository: give 'owner/name'"):
        client(hub_client.push, "timm-resnet", "a/b/c")
    with pytest.raises(DataError, match=r"Invalid metadata \"datasets\" holds 'my birds', which is no repository"):
        client(hub_client.push, "timm-resnet", "alice/metadata", datasets=["my birds"])
