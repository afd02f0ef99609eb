"""irisml, and tasks of another package."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

OTHER_TASKS = Path(__file__).parent / "other_tasks"

pytest.importorskip("irisml.core", reason='irisml jobs need the extra "irisml"')


@pytest.fixture(autouse=True)
def other_tasks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put another package's tasks where irisml finds them."""
    import iris_hf.irisml

    monkeypatch.syspath_prepend(str(OTHER_TASKS))
    yield
    iris_hf.irisml.uninstall()
    for name in ("make_shrinker", "make_tiny", "note_down"):
        sys.modules.pop(f"irisml.tasks.{name}", None)
