"""Push a model to the Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from iris_hf.errors import ConfigError
from iris_hf.hub.cards import merge_cards, model_card
from iris_hf.hub.repository import Push, add_tag, commit, explained, prepare_repository, read_card
from iris_hf.models.hub import MODEL_FILES, save_pretrained
from iris_hf.models.pull import patiently
from iris_hf.models.sources.transformers import hf_network


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool = False,
    metrics: Mapping[str, float] | None = None,
    datasets: Sequence[str] = (),
    training_config: Mapping[str, Any] | None = None,
    description: str = "",
    license: str | None = None,
    onnx_folder: str | Path | None = None,
    revision: str | None = None,
    tag: str | None = None,
    commit_message: str = "Push a model with iris_hf",
    parent_commit: str | None = None,
    dry_run: bool = False,
) -> Push:
    """Push a model to the Hub, with a model card.

    The files are those of `save_pretrained` and a README.md. They come in one commit, so that others see the whole
    model or the one before. After a failure the same call goes on: a file that arrived is not sent again. The token is
    the one that huggingface_hub finds: HF_TOKEN, or that of `hf auth login`.

    Args:
        model: Any model that `save_pretrained` takes.
        repo_id: `owner/name`, or a name of the token's owner. It is made if absent. A model that it held is replaced,
            with the metrics on its card and its folder `onnx`; other files and the text of others stay.
        private: Whether a new repository is private. An existing public one is then refused.
        metrics: Number by name, such as `{"accuracy": 0.93}`; the Hub shows them beside the model.
        datasets: Data sets of the Hub that the model was trained and measured on; the metrics count for the first.
        training_config: Settings of the training, for the card.
        description: The first paragraph of the card.
        license: The Hub's name of a licence, such as `apache-2.0`.
        onnx_folder: A folder with the same model as ONNX; its files go to `onnx/`, in place of what was there.
        revision: The branch, made if absent; None is `main`.
        tag: A new tag for the commit, such as `v1.0`.
        commit_message: The message of the commit.
        parent_commit: The commit that has to be the last one of the branch; if others have pushed since, nothing is.
        dry_run: Whether to only say what would be uploaded. The Hub is not asked then.

    Returns:
        The page of the commit (None for a dry run) and the size of each file.

    Raises:
        ConfigError: If the model cannot be saved, a metric is no finite number, the ONNX folder holds no ONNX, the
            repository exists and is public though `private` is asked, or the tag exists.
        DataError: If the Hub refuses or cannot be reached; the message says what to do.
    """
    exported = {} if onnx_folder is None else _onnx_files(Path(onnx_folder))
    with tempfile.TemporaryDirectory(prefix="iris-hf-") as temporary:
        folder = Path(temporary)
        save_pretrained(model, folder)
        files: dict[str, Path | bytes] = {p.name: p for p in folder.iterdir()}
        files |= exported

        def card(name: str) -> str:
            return model_card(
                model,
                name,
                is_transformers=hf_network(model) is not None,
                metrics=metrics,
                datasets=datasets,
                training_config=training_config,
                description=description,
                license=license,
                has_onnx=bool(exported),
            )

        files["README.md"] = card(repo_id).encode()  # first of all, so that a wrong metric reaches no network
        if dry_run:
            return Push(None, _sizes(files))
        with explained(repo_id, kind="model", revision=revision):
            full_name = patiently(
                lambda: prepare_repository(repo_id, kind="model", private=private, revision=revision, tag=tag)
            )
            old_card = patiently(lambda: read_card(full_name, kind="model", revision=revision))
            files["README.md"] = merge_cards(old_card, card(full_name)).encode()
            done = commit(
                full_name,
                files,
                kind="model",
                revision=revision,
                message=commit_message,
                parent_commit=parent_commit,
                stale=(*MODEL_FILES, "onnx/*"),
            )
            if tag is not None:
                add_tag(full_name, tag, kind="model", commit=done.oid)
        return Push(str(done.commit_url), _sizes(files))


def _onnx_files(folder: Path) -> dict[str, Path]:
    files = {f"onnx/{p.relative_to(folder).as_posix()}": p for p in sorted(folder.rglob("*")) if p.is_file()}
    if not any(name.endswith(".onnx") for name in files):
        raise ConfigError(f"onnx_folder={str(folder)!r} holds no .onnx file. Export the model there first.")
    return files


def _sizes(files: Mapping[str, Path | bytes]) -> dict[str, int]:
    return {k: len(v) if isinstance(v, bytes) else v.stat().st_size for k, v in sorted(files.items())}
