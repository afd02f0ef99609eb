"""What runs on GPUs alone, as far as it can be seen without one."""

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from iris_hf.engine.loader import Examples, make_loader, to_device
from iris_hf.engine.rng import seed_generators

pytestmark = pytest.mark.torch_only

META = torch.device("meta")


class Copies(TorchDispatchMode):
    """Notes which copies do not wait, and makes up what comes from the device `meta`."""

    def __init__(self) -> None:
        super().__init__()
        self.do_not_wait: list[bool] = []

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        if op is torch.ops.aten._to_copy.default:
            self.do_not_wait.append(options.get("non_blocking", False))
            return torch.empty(arguments[0].shape, device=options["device"])
        return op(*arguments, **options)


def test_copies_to_the_host_have_arrived_and_others_are_not_waited_for() -> None:
    with Copies() as copies:
        to_device([torch.zeros(2, device=META)], torch.device("cpu"))
        to_device([torch.zeros(2)], META)
    assert copies.do_not_wait == [False, True]


def test_tensors_in_every_container_move() -> None:
    encoding = UserDict(input_ids=torch.zeros(2), note="stays")  # as a tokenizer's BatchEncoding
    packed = pack_sequence([torch.zeros(3), torch.zeros(2)])
    moved = to_device({"list": [encoding, (torch.zeros(1), None)], "packed": packed}, META)
    assert isinstance(moved["list"][0], UserDict)
    assert (moved["list"][0]["input_ids"].device, moved["list"][0]["note"]) == (META, "stays")
    assert encoding["input_ids"].device.type == "cpu"
    assert moved["list"][1][0].device == META
    assert (moved["packed"].data.device, moved["packed"].batch_sizes.device.type) == (META, "cpu")


class PairsOfInputs(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, str], int]:
        return (torch.ones(2), "text"), index


def test_a_batch_in_page_locked_memory_is_of_the_same_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions of torch that are still allowed make lists of tuples, which a gradient cache would divide otherwise."""
    pins: list[torch.Size] = []

    def pin(tensor: Tensor) -> Tensor:
        pins.append(tensor.shape)
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(
        torch.utils.data._utils.pin_memory, "pin_memory", lambda data, device=None: data.pin_memory()
    )  # it asks an object that it knows nothing of
    examples = Examples(PairsOfInputs(), None, seed=0, targets_required=True)
    keys = [[(0, 0), (0, 1)], [(0, 2), (0, 3)]]
    for batch in make_loader(examples, keys, collate_function=None, num_workers=0, pin_memory=True):
        assert isinstance(batch, tuple)
        assert isinstance(batch[0], tuple)
        assert batch[0][1] == ["text", "text"]
    assert pins == [(2, 2), (2,)] * 2


def test_a_device_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    generators = torch.Generator(), torch.Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    state = torch.get_rng_state()
    seed_generators(7, torch.device("cuda"))
    torch.set_rng_state(state)
    assert generators[1].initial_seed() == 7
    seed_generators(8, torch.device("cuda", 0))
    assert (generators[0].initial_seed(), generators[1].initial_seed()) == (8, 7)
