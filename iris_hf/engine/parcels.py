"""What travels to worker processes and back, by cloudpickle.

Classes and functions of a script or notebook travel by value, and a worker makes its own of them. In what it sends
back it names those that it was sent by their places in the call's pickle, where both sides have them: the caller gets
its own classes and functions back, not copies. (cloudpickle by itself would give the caller's classes the attributes
that they had when they were sent.)
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable
from types import FunctionType, ModuleType
from typing import IO, Any

import cloudpickle
import torch

Known = dict[int, Any]
"""Classes, functions and modules that both sides have, by their places in the call's pickle."""


def send_call(call: Any, file: IO[bytes]) -> Known:
    """Write a call; return what the other side will know."""
    pickler = cloudpickle.Pickler(file)
    pickler.dump(call)
    return _known(pickler.memo.copy().values())


def receive_call(file: IO[bytes]) -> tuple[Any, Known]:
    """Read a call; return it with what the sender knows of it."""
    unpickler = pickle.Unpickler(file)
    call = unpickler.load()
    return call, _known(unpickler.memo.copy().items())


def send_back(value: Any, file: IO[bytes], known: Known) -> None:
    """Write what came of a call: a result or an error."""
    _Answer(file, known).dump(value)


def receive_back(file: IO[bytes], known: Known) -> Any:
    """Read what came of a call."""
    return _Opened(file, known).load()


def can_travel(value: Any) -> bool:
    """Whether a value can be sent between processes. Tensors can, and cost nothing here."""
    try:
        with open(os.devnull, "wb") as nowhere:
            _Trial(nowhere).dump(value)
    except Exception:  # a class may raise anything of its own when it is pickled
        return False
    return True


def _known(memo: Iterable[tuple[int, Any]]) -> Known:
    return {place: value for place, value in memo if isinstance(value, type | FunctionType | ModuleType)}


class _Answer(cloudpickle.Pickler):  # type: ignore[misc]  # no types
    def __init__(self, file: IO[bytes], known: Known) -> None:
        super().__init__(file)
        self._known = known
        self._places = {id(value): place for place, value in known.items()}

    def persistent_id(self, value: Any) -> int | None:
        return self._places.get(id(value))


class _Opened(pickle.Unpickler):
    def __init__(self, file: IO[bytes], known: Known) -> None:
        super().__init__(file)
        self._known = known

    def persistent_load(self, place: int) -> Any:
        return self._known[place]


class _Trial(cloudpickle.Pickler):  # type: ignore[misc]  # no types
    def persistent_id(self, value: Any) -> str | None:
        return "tensor" if type(value) in (torch.Tensor, torch.nn.Parameter) else None
