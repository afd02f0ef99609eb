import hub_client
import pytest

from iris_hf.errors import ConfigError, DataError


def test_a_pushed_data_set_comes_back_bit_equal(client, hub):
    url, files = client(hub_client.push_dataset, "alice/cells")
    assert url.startswith(f"{hub.endpoint}/datasets/alice/cells/commit/")
    assert set(files) == {"README.md", "data/train-*.parquet"}
    assert client(hub_client.differences, "alice/cells", token=None) == (7, [], ["red", "white"])


@pytest.mark.parametrize("target_type", ["multiclass", "multilabel", "segmentation", "image_text"])
def test_every_target_type_comes_back(target_type, client, hub):
    assert client(hub_client.targets_differ, f"alice/{target_type}", target_type) == []


def test_a_failing_server_is_tried_again_and_a_quota_is_named(client, hub):
    hub.fail("POST", "/datasets/.*/commit/", 500)
    hub.fail("POST", "/datasets/.*/preupload/", 500)
    client(hub_client.push_dataset, "alice/shaky-cells")
    assert client(hub_client.differences, "alice/shaky-cells")[:2] == (7, [])
    hub.fail("POST", "/datasets/alice/full/commit/", 403, message="Storage quota exceeded")
    with pytest.raises(DataError, match=r"Pushing to 'alice/full' failed: the Hub forbids it.*Storage quota exceeded"):
        client(hub_client.push_dataset, "alice/full")


def test_the_card_tells_classes_columns_and_sizes(client, hub):
    client(hub_client.push_dataset, "alice/carded", license="cc-by-4.0", description="Cells of nobody.")
    metadata, text = client(hub_client.dataset_metadata, "alice/carded")
    assert metadata["task_categories"] == ["object-detection"]
    assert (metadata["size_categories"], metadata["license"], metadata["tags"]) == (["n<1K"], "cc-by-4.0", ["iris_hf"])
    assert metadata["dataset_info"]["splits"][0]["num_examples"] == 7
    for line in ("Cells of nobody.", "7 in train", "| 0: red |", "| 1: white |", "| image | image |", "load_dataset("):
        assert line in text, text
    client(hub_client.push_dataset, "alice/carded")
    assert client(hub_client.dataset_metadata, "alice/carded")[0]["license"] == "cc-by-4.0"


def test_splits_add_up(client, hub):
    client(hub_client.push_two_splits, "alice/splits")
    client(hub_client.push_dataset, "alice/splits", split="validation")
    assert client(hub_client.split_sizes, "alice/splits") == {"train": 5, "test": 2, "validation": 7}
    text = client(hub_client.dataset_metadata, "alice/splits")[1]
    assert "Examples: 5 in train, 2 in test, 7 in validation." in text
    assert "| class | examples in validation |" in text
    assert 'load_dataset("alice/splits", split="train")' in text


def test_private_data_need_a_token(client, hub):
    client(hub_client.push_dataset, "alice/private-cells", private=True)
    assert hub.repositories["datasets/alice/private-cells"].private
    assert client(hub_client.differences, "alice/private-cells")[:2] == (7, [])
    client(hub_client.push_dataset, "alice/open-cells")
    with pytest.raises(ConfigError, match=r"'alice/open-cells' exists and is public: nothing was pushed"):
        client(hub_client.push_dataset, "alice/open-cells", private=True)
    with pytest.raises(DataError, match=r"Pushing to 'alice/denied' failed: the Hub forbids it"):
        client(hub_client.push_dataset, "alice/denied", token="hf_bob")


def test_branches_and_tags_of_data(client, hub):
    client(hub_client.push_dataset, "alice/versioned", revision="draft", tag="v1")
    refs = client(hub_client.shown_refs, "alice/versioned", "dataset")
    assert refs["draft"] == refs["v1"] != refs["main"]
    assert client(hub_client.differences, "alice/versioned", revision="v1")[:2] == (7, [])
    with pytest.raises(ConfigError, match=r"has the tag 'v1' already"):
        client(hub_client.push_dataset, "alice/versioned", tag="v1")


def test_a_dry_run_of_data_touches_nothing(client, hub):
    url, files = client(hub_client.push_dataset, "alice/dry-cells", dry_run=True)
    assert url is None
    assert files["data/train-*.parquet"] > 7 * 600
    assert not hub.requests


def test_what_is_no_data_set_is_refused(client, hub):
    with pytest.raises(ConfigError, match=r"A list cannot be pushed.*to_hf\(dataset"):
        client(hub_client.push_dataset, "alice/list", dataset=[1])
    assert not hub.requests
