"""The README.md of a repository: metadata that the Hub reads, and a short text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from iris_hf.errors import ConfigError
from iris_hf.models.recipe import recipe_of

_MARK = "<!-- Written by iris_hf. A push replaces this text unless this line is gone. -->"
_PIPELINES = {
    "multiclass": "image-classification",
    "multilabel": "image-classification",
    "detection": "object-detection",
    "segmentation": "image-segmentation",
    "image_text": "zero-shot-image-classification",
}
_SOURCES = {
    "create_hf_model": "transformers",
    "create_hf_text_encoder": "transformers",
    "create_open_clip_model": "open_clip",
    "create_timm_model": "timm",
}
_OUR_TAGS = {"iris_hf", "onnx", *_SOURCES.values()}
_MOST_NAMES = 30


def pipeline_tag(model: nn.Module) -> str:
    """The Hub's name of a model's task."""
    features = "feature-extraction" if getattr(model, "image_spec", None) is None else "image-feature-extraction"
    return _PIPELINES.get(str(getattr(model, "target_type", None)), features)


def model_card(
    model: nn.Module,
    repo_id: str,
    *,
    is_transformers: bool,
    metrics: Mapping[str, float] | None = None,
    datasets: Sequence[str] = (),
    training_config: Mapping[str, Any] | None = None,
    description: str = "",
    license: str | None = None,
    has_onnx: bool = False,
) -> str:
    """Write the card of a model.

    Args:
        model: Its task, classes, images and size are told.
        repo_id: Its repository.
        is_transformers: Whether plain transformers loads it.
        metrics: Number by name; they become the model-index, which the Hub shows.
        datasets: Data sets that it was trained and measured on; the metrics count for the first.
        training_config: What it was trained with.
        description: The first paragraph.
        license: The Hub's name of a licence, such as `apache-2.0`.
        has_onnx: Whether the repository has a folder `onnx`.

    Raises:
        ConfigError: If a metric is no finite number.
    """
    name, task = repo_id.rpartition("/")[2], pipeline_tag(model)
    numbers = {k: _number(k, v) for k, v in (metrics or {}).items()}
    sources = _sources(model)
    metadata: dict[str, Any] = {
        "library_name": "transformers" if is_transformers else "iris_hf",
        "pipeline_tag": task,
        "tags": ["iris_hf", *sources, *(["onnx"] if has_onnx else [])],
    }
    if license:
        metadata["license"] = license
    if datasets:
        metadata["datasets"] = list(datasets)
    if numbers:
        metadata["model-index"] = [_model_index(name, task, datasets, numbers)]

    parts = [f"# {name}", description or f"A model for {task.replace('-', ' ')}."]
    parts.append(_table(["", ""], _facts(model, sources)))
    parts.append("## How to load it\n\n" + _loading(model, repo_id, is_transformers=is_transformers))
    if has_onnx:
        parts.append("The folder `onnx` holds the same model as ONNX.")
    if numbers:
        measured = f" on {datasets[0]}" if datasets else ""
        parts.append(f"## Metrics\n\nAs measured by its author{measured}.\n\n" + _table(["metric", "value"], numbers))
    if training_config:
        parts.append("## Training\n\n" + _table(["setting", "value"], training_config))
    return _render(metadata, "\n\n".join([*parts, _MARK]))


def dataset_card(
    repo_id: str,
    *,
    target_type: str,
    class_names: Sequence[str],
    sizes: Mapping[str, int],
    num_others: int = 0,
    class_counts: Mapping[str, Sequence[int]],
    columns: Mapping[str, str],
    config_name: str,
    description: str = "",
    license: str | None = None,
) -> str:
    """Write the card of a data set.

    Args:
        repo_id: Its repository.
        target_type: What its targets mean.
        class_names: Name of each class.
        sizes: Number of examples of each split.
        num_others: Number of examples of other variants in the repository.
        class_counts: For each split where that is known, in how many examples each class occurs.
        columns: Type of each column.
        config_name: The Hub's name of this variant.
        description: The first paragraph.
        license: The Hub's name of a licence.
    """
    task = _PIPELINES[target_type]
    metadata: dict[str, Any] = {"task_categories": [task], "tags": ["iris_hf"]}
    metadata["size_categories"] = [_size_category(sum(sizes.values()) + num_others)]
    if license:
        metadata["license"] = license
    split = next(iter(sizes))
    variant = "" if config_name == "default" else f', "{config_name}"'
    named = ", ".join(f"{size:,} in {name}" for name, size in sizes.items())
    parts = [
        f"# {repo_id.rpartition('/')[2]}",
        description or f"A data set for {task.replace('-', ' ')}.",
        f"Targets: {target_type.replace('_', ' ')}. Examples: {named}.",
        "## How to load it\n\n```python\nimport datasets\nimport iris_hf\n\n"
        f'rows = datasets.load_dataset("{repo_id}"{variant}, split="{split}")\n'
        "dataset = iris_hf.from_hf(rows)  # of (RGB image, target)\n```",
        "## Columns\n\n" + _table(["column", "type"], columns),
    ]
    if class_names:
        head = ["class", *(f"examples in {name}" for name in class_counts)]
        rows = [
            [f"{i}: {name}", *(str(counts[i]) for counts in class_counts.values())]
            for i, name in enumerate(class_names[:_MOST_NAMES])
        ]
        left = len(class_names) - _MOST_NAMES
        more = f"\n\nAnd {left} more classes." if left > 0 else ""
        parts.append(f"## Classes\n\n{_rows(head, rows)}{more}")
    return _render(metadata, "\n\n".join([*parts, _MARK]))


def read_split_sizes(card: str | None) -> dict[str, dict[str, int]]:
    """Give the number of examples of each split of each variant, which `datasets` keeps in a data set's card."""
    from huggingface_hub import RepoCard

    infos = [] if card is None else _listed(RepoCard(card).data.get("dataset_info"))
    return {
        info.get("config_name", "default"): {
            split["name"]: split.get("num_examples", 0) for split in info.get("splits") or ()
        }
        for info in infos
    }


def merge_cards(old: str | None, new: str) -> str:
    """Lay a new card over the one that the repository has.

    The new metadata count, old ones that they lack stay, tags of others add up. What the old ones say of the model that
    goes, the model-index and our tags, does not stay. The text is replaced if we wrote it, or there is none; somebody
    else's stays.
    """
    from huggingface_hub import RepoCard

    if old is None:
        return new
    held, ours = RepoCard(old), RepoCard(new)
    before: dict[str, Any] = held.data.to_dict()  # type: ignore[no-untyped-call]
    now: dict[str, Any] = ours.data.to_dict()  # type: ignore[no-untyped-call]
    before.pop("model-index", None)
    ours_then = _OUR_TAGS if "library_name" in now else {"iris_hf"}  # a data set's card has but this one
    tags = list(dict.fromkeys([*now["tags"], *(tag for tag in _listed(before.get("tags")) if tag not in ours_then)]))
    keeps_text = bool(held.text.strip()) and _MARK not in held.text
    return _render({**before, **now, "tags": tags}, held.text if keeps_text else ours.text)


def _listed(value: Any) -> list[Any]:
    """A list of the metadata, which may be a single value or absent."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _render(metadata: Mapping[str, Any], text: str) -> str:
    from huggingface_hub import CardData

    return f"---\n{CardData(**metadata).to_yaml()}\n---\n\n{text.strip()}\n"


def _model_index(name: str, task: str, datasets: Sequence[str], numbers: Mapping[str, float]) -> dict[str, Any]:
    dataset = datasets[0] if datasets else "unknown"
    return {
        "name": name,
        "results": [
            {
                "task": {"type": task},
                "dataset": {"type": dataset, "name": dataset},
                "metrics": [{"type": key, "value": value, "name": key} for key, value in numbers.items()],
            }
        ],
    }


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not hasattr(value, "__float__") or not math.isfinite(float(value)):
        raise ConfigError(f"The metric {name!r} must be a finite number, got {value!r}.")
    return float(value)


def _sources(model: nn.Module) -> list[str]:
    """The libraries that a model's networks come from."""
    found = [_SOURCES.get(recipe.factory) for part in model.modules() if (recipe := recipe_of(part)) is not None]
    return list(dict.fromkeys(source for source in found if source is not None))


def _facts(model: nn.Module, sources: Sequence[str]) -> dict[str, str]:
    facts = {"Task": str(getattr(model, "target_type", None) or "features").replace("_", " ")}
    if sources:
        facts["Made with"] = ", ".join(sources)
    facts["Parameters"] = f"{sum(p.numel() for p in model.parameters()):,}"
    names = getattr(model, "class_names", None)
    if names:
        shown = ", ".join(names[:_MOST_NAMES]) + (", ..." if len(names) > _MOST_NAMES else "")
        facts["Classes"] = f"{len(names)}: {shown}"
    elif getattr(model, "num_classes", None):
        facts["Classes"] = str(model.num_classes)
    spec = getattr(model, "image_spec", None)
    if spec is not None:
        facts["Images"] = f"RGB in [0, 1], {spec.height} x {spec.width}; the model normalises them itself"
    return facts


def _loading(model: nn.Module, repo_id: str, *, is_transformers: bool) -> str:
    lines = ["import iris_hf", "", f'model = iris_hf.from_pretrained("{repo_id}")']
    if getattr(model, "image_spec", None) is not None:
        lines.append("transform = iris_hf.create_image_transform(model)  # of a PIL image")
        if hasattr(model, "prediction_step") and getattr(model, "target_type", None) != "image_text":
            lines.append("prediction = model.prediction_step(transform(image)[None])[0]")
    code = "\n".join(lines)
    text = f"```python\n{code}\n```"
    if is_transformers:
        plain = f'from transformers import pipeline\n\npredict = pipeline("{pipeline_tag(model)}", model="{repo_id}")'
        text += f"\n\nPlain transformers loads it, too:\n\n```python\n{plain}\n```"
    return text


def _table(head: Sequence[str], values: Mapping[str, Any]) -> str:
    return _rows(head, [[key, _shown(value)] for key, value in values.items()])


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in lines
    )


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _size_category(count: int) -> str:
    bounds = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    if count < 1000:
        return "n<1K"
    power = min(int(math.log10(count)) - 3, len(bounds) - 1)
    return f"{bounds[power]}<n<{bounds[power + 1]}" if power + 1 < len(bounds) else "n>1T"
