"""Push a data set to the Hub."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from iris_hf.data.hf_dataset import HFDataset, from_hf
from iris_hf.errors import ConfigError
from iris_hf.hub.cards import dataset_card, merge_cards, read_split_sizes
from iris_hf.hub.repository import Push, add_tag, commit, explained, prepare_repository, read_card
from iris_hf.models.pull import patiently
from iris_hf.types import TargetType


def push_dataset_to_hub(
    dataset: Any,
    repo_id: str,
    *,
    target_type: TargetType | None = None,
    private: bool = False,
    split: str = "train",
    config_name: str = "default",
    description: str = "",
    license: str | None = None,
    revision: str | None = None,
    tag: str | None = None,
    commit_message: str = "Push a data set with iris_hf",
    dry_run: bool = False,
) -> Push:
    """Push a data set to the Hub, with a card that tells its classes, columns and sizes.

    `datasets` transfers the rows as Parquet; the card follows in a commit of its own. Images keep their encoded bytes,
    so that `from_hf(datasets.load_dataset(repo_id, split=...))` gives equal pixels and equal targets. After a failure
    the same call goes on: files that arrived are not sent again.

    Args:
        dataset: What `to_hf` gives or `from_hf` takes or gives, or several of them by the name of their split.
        repo_id: `owner/name`, or a name of the token's owner. It is made if absent.
        target_type: What the targets mean; None tells it by the columns.
        private: Whether a new repository is private. An existing public one is then refused.
        split: The split that a single data set becomes. Other splits of the repository stay; the card
            counts the classes of those that are pushed.
        config_name: The Hub's name of this variant of the data.
        description: The first paragraph of the card.
        license: The Hub's name of a licence, such as `cc-by-4.0`.
        revision: The branch, made if absent; None is `main`.
        tag: A new tag for the result, such as `v1.0`.
        commit_message: The message of the commits.
        dry_run: Whether to only say what would be uploaded. The Hub is not asked then.

    Returns:
        The page of the last commit (None for a dry run), and the size of the card and of each split's rows, which are
        compressed on the way.

    Raises:
        ConfigError: If the data set is streamed or no Hugging Face data set, its columns are not known, the repository
            exists and is public though `private` is asked, or the tag exists.
        DataError: If the Hub refuses or cannot be reached; the message says what to do.
    """
    splits = _splits(dataset, split, target_type)
    data_dir = "data" if config_name == "default" else config_name
    sizes = {f"{data_dir}/{name}-*.parquet": _num_bytes(part) for name, part in splits.items()}

    def card(name: str, held: Mapping[str, Mapping[str, int]]) -> str:
        return _card(name, splits, held, config_name=config_name, description=description, license=license)

    text = card(repo_id, {})
    if dry_run:
        return Push(None, {"README.md": len(text.encode()), **sizes})
    with explained(repo_id, kind="dataset", revision=revision):
        name = patiently(
            lambda: prepare_repository(repo_id, kind="dataset", private=private, revision=revision, tag=tag)
        )
        patiently(lambda: _push_rows(name, splits, config_name=config_name, revision=revision, message=commit_message))
        old_card = patiently(lambda: read_card(name, kind="dataset", revision=revision))
        text = merge_cards(old_card, card(name, read_split_sizes(old_card)))
        done = commit(
            name, {"README.md": text.encode()}, kind="dataset", revision=revision, message=f"{commit_message}: card"
        )
        if tag is not None:
            add_tag(name, tag, kind="dataset", commit=done.oid)
    return Push(str(done.commit_url), {"README.md": len(text.encode()), **sizes})


def _splits(dataset: Any, split: str, target_type: TargetType | None) -> dict[str, HFDataset]:
    parts = dataset if isinstance(dataset, Mapping) else {split: dataset}
    if not parts:
        raise ConfigError("There is no split to push.")
    return {str(name): _as_ours(part, target_type) for name, part in parts.items()}


def _as_ours(dataset: Any, target_type: TargetType | None) -> HFDataset:
    import datasets

    if isinstance(dataset, datasets.Dataset):
        dataset = from_hf(dataset, target_type=target_type)
    if not isinstance(dataset, HFDataset):
        raise ConfigError(
            f"A {type(dataset).__name__} cannot be pushed. Make it a Hugging Face data set first: "
            "to_hf(dataset, target_type=..., class_names=..., streaming=False)."
        )
    if not len(dataset):
        raise ConfigError("A data set without examples cannot be pushed.")
    return dataset


def _num_bytes(dataset: HFDataset) -> int:
    rows = dataset.hf_dataset
    return int(rows.data.nbytes * len(rows) / max(1, len(rows.data)))


def _push_rows(
    repo_id: str, splits: Mapping[str, HFDataset], *, config_name: str, revision: str | None, message: str
) -> None:
    for split, part in splits.items():
        part.hf_dataset.push_to_hub(
            repo_id, config_name=config_name, split=split, revision=revision, commit_message=message
        )


def _card(
    repo_id: str,
    splits: Mapping[str, HFDataset],
    held: Mapping[str, Mapping[str, int]],
    *,
    config_name: str,
    description: str,
    license: str | None,
) -> str:
    first = next(iter(splits.values()))
    counts = {}
    for name, part in splits.items():
        occurring = Counter(c for classes in part.get_all_classes() for c in set(classes))
        counts[name] = [occurring[i] for i in range(first.num_classes)]
    return dataset_card(
        repo_id,
        target_type=first.target_type,
        class_names=first.class_names,
        sizes={**held.get(config_name, {}), **{name: len(part) for name, part in splits.items()}},
        num_others=sum(sum(sizes.values()) for variant, sizes in held.items() if variant != config_name),
        class_counts=counts,
        columns={name: _described(feature) for name, feature in first.hf_dataset.features.items()},
        config_name=config_name,
        description=description,
        license=license,
    )


def _described(feature: Any) -> str:
    """A column's type in few words."""
    if isinstance(feature, dict):
        return "{" + ", ".join(f"{name}: {_described(part)}" for name, part in feature.items()) + "}"
    item = getattr(feature, "feature", None)
    if item is not None:
        return f"list of {_described(item)}"
    if hasattr(feature, "names"):
        return f"class index (of {len(feature.names)})"
    return str(getattr(feature, "dtype", None) or type(feature).__name__).replace("PIL.Image.Image", "image")
