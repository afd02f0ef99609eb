"""Fixtures that every room's tests share."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any Hugging Face library is imported: no test reaches a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads that wait for each other cost more


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the examples first: each is minutes long, and on two cores the other tests run beside them."""
    items.sort(key=lambda item: not item.path.name.startswith("test_examples"))


@pytest.fixture(autouse=True)
def accelerate_forgets() -> Iterator[None]:
    """Undo what a test's own Accelerator leaves in the process."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets; tests that need it skip on machines that lack it."""
    folder = Path(os.environ.get("IRIS_HF_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the real data sets are not on this machine; set IRIS_HF_SHARED_DATA to their folder")
    return folder
