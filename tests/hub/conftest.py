"""A Hub on the loopback, and a process that talks to it with the real client."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import hub_client
import pytest
from local_hub import LocalHub


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with LocalHub(tmp_path_factory.mktemp("hub")).running() as hub:
        yield hub


@pytest.fixture
def hub(served: LocalHub) -> LocalHub:
    """The server, without the faults and requests of other tests."""
    served.faults.clear()
    served.requests.clear()
    return served


@pytest.fixture(scope="session")
def environment(served: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What huggingface_hub reads when it is imported."""
    return {
        "HF_ENDPOINT": served.endpoint,
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


@pytest.fixture(scope="session")
def client(environment: dict[str, str]) -> Iterator[Callable[..., Any]]:
    """Runs `client(function, *args, token="hf_alice", **kwargs)` in a process of that environment."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            pool.submit(os.getpid).result()  # starts it

        def call(function: Callable[..., Any], *args: Any, token: str | None = "hf_alice", **kwargs: Any) -> Any:
            return pool.submit(hub_client.call, token, function, args, kwargs).result()

        yield call


@pytest.fixture
def onnx_folder(tmp_path: Path) -> Path:
    """A folder with a large and a small file, as an export leaves them."""
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(os.urandom(5000))
    (folder / "config.json").write_text("{}")
    return folder
