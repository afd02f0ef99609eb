"""Shards of streams, for several files of tests."""

from pathlib import Path

import pytest
from streams import write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 rows in three shards, which two processes cannot share evenly."""
    return write_shards(tmp_path_factory.mktemp("odd") / "shards", [9, 4, 7])


@pytest.fixture(scope="module")
def even_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards, of which two processes have two each: 6 rows and 15."""
    return write_shards(tmp_path_factory.mktemp("even") / "shards", [4, 7, 2, 8])


@pytest.fixture(scope="module")
def val_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("val") / "shards", [5, 8])


@pytest.fixture(scope="module")
def bad_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("bad") / "shards", [9, 4, 7], bad=[3, 7, 8, 19])
