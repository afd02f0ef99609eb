"""irisml, and tasks of another package."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

OTHER_TASKS = Path(__file__).parent / "other_tasks"

pytest.importorskip("irisml.core", reason='irisml jobs need the extra "irisml"')


@pytest.fixture(autouse=True)
def other_tasks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put another package's tasks, `make_tiny` and `note_down`, where irisml finds them."""
    import iris_hf.irisml

    monkeypatch.syspath_prepend(str(OTHER_TASKS))
    yield
    iris_hf.irisml.uninstall()
    sys.modules.pop("irisml.tasks.make_tiny", None)
    sys.modules.pop("irisml.tasks.note_down", None)
