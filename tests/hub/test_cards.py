from huggingface_hub import RepoCard

from iris_hf.hub.cards import dataset_card, merge_cards, read_split_sizes


def make_card(**options):
    described = {"class_names": ["a"], "class_counts": {"validation": [7]}, "columns": {"image": "image"}}
    return dataset_card("me/data", target_type="multiclass", config_name="default", **described, **options)


def test_a_single_tag_of_somebody_else_stays_whole():
    for tags, expected in (("vision", ["iris_hf", "vision"]), ("[a, iris_hf]", ["iris_hf", "a"]), ("", ["iris_hf"])):
        merged = merge_cards(f"---\ntags: {tags}\n---\nMine.\n", make_card(sizes={"train": 1}))
        assert RepoCard(merged).data.tags == expected


def test_the_size_of_a_data_set_is_that_of_all_splits_and_variants():
    splits = "splits: [{name: train, num_examples: 900}, {name: test, num_examples: 50}]"
    one = f"---\ndataset_info:\n  {splits}\n---\n"
    several = (
        f"---\ndataset_info:\n- {splits}\n- {{config_name: small, splits: [{{name: train, num_examples: 60}}]}}\n---\n"
    )
    assert read_split_sizes(None) == read_split_sizes("Mine.") == {}
    assert read_split_sizes(one) == {"default": {"train": 900, "test": 50}}
    assert read_split_sizes(several) == {"default": {"train": 900, "test": 50}, "small": {"train": 60}}
    assert RepoCard(make_card(sizes={"train": 900})).data.size_categories == ["n<1K"]
    assert RepoCard(make_card(sizes={"train": 900, "test": 50}, num_others=60)).data.size_categories == ["1K<n<10K"]
