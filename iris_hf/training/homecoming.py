"""What comes back to the caller of a model and of plugins that were trained in a worker process."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)


def leave_behind(trained: nn.Module) -> dict[str, list[str]]:
    """Take from a model what cannot travel; return the names of that, by those of the modules."""
    from iris_hf.engine.parcels import can_travel

    if can_travel(trained):
        return {}
    parts = dict(trained.named_modules())
    left_behind = {path: _unportable(part) for path, part in parts.items() if not _pickles_itself(part)}
    for path, names in left_behind.items():
        for name in names:
            del parts[path].__dict__[name]
    return left_behind


def portable_attributes(owner: Any) -> dict[str, Any]:
    """Return the attributes that can travel."""
    unportable = _unportable(owner)
    return {name: value for name, value in vars(owner).items() if name not in unportable}


def give_back(left_behind: Mapping[str, list[str]], trained: nn.Module, model: nn.Module) -> None:
    """Give a trained model, in the place of what could not travel, what the caller's model has there, if it has it."""
    parts, own = dict(trained.named_modules()), dict(model.named_modules())
    for path, names in left_behind.items():
        values = vars(own.get(path, nn.Module()))
        memo = {id(part): parts[name] for name, part in own.items() if name in parts}
        kept = {name: copy.deepcopy(values[name], memo) for name in names if name in values}
        parts[path].__dict__.update(kept)


def _unportable(owner: Any) -> list[str]:
    """Name, in a warning too, the attributes that cannot be sent to the caller; those of a module without its parts."""
    from iris_hf.engine.parcels import can_travel

    parts = ("_modules", "_parameters", "_buffers") if isinstance(owner, nn.Module) else ()
    names = [name for name, value in vars(owner).items() if name not in parts and not can_travel(value)]
    if names:
        logger.warning(
            "%s: %s cannot be pickled after the run: as before it.", type(owner).__name__, ", ".join(sorted(names))
        )
    return names


def _pickles_itself(part: nn.Module) -> bool:
    """Whether a module says how it is pickled, as torch's recurrent networks do."""
    ways = ("__getstate__", "__reduce__", "__reduce_ex__")
    return any(getattr(type(part), way) is not getattr(nn.Module, way) for way in ways)
