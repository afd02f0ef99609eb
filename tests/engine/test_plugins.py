"""Plugins: strings, entry points, hooks, and those that come with the library."""

import fcntl
import logging
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import EXAMPLES, number, run_python
from tiny import Net, Tensors

import iris_hf
from iris_hf.engine.plugins import load_plugins
from iris_hf.engine.plugins.base import Plugin
from iris_hf.engine.plugins.registry import BUILT_IN, find_plugin, parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ema", ("ema", [], {})),
        ("ema()", ("ema", [], {})),
        (" ema(0.99, 50) ", ("ema", [0.99, 50], {})),
        ("ema(decay=0.99)", ("ema", [], {"decay": 0.99})),
        ("x(-1, 'a', key=[1, None, True])", ("x", [-1, "a"], {"key": [1, None, True]})),
    ],
)
def test_a_plugin_string_is_a_name_with_literals(text: str, expected: Any) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize("text", ["", "ema(", "a.b", "ema(x)", "ema(**{})", "ema(open('f'))", "1", "a b"])
def test_anything_else_is_an_error_and_is_never_run(text: str) -> None:
    with pytest.raises(iris_hf.ConfigError, match=r"is not of the form name or name\(1, key='value'\)"):
        parse(text)


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_every_plugin_of_the_library_is_one_class(name: str) -> None:
    assert issubclass(find_plugin(name), Plugin)


def test_another_package_publishes_a_plugin_by_entry_point(tmp_path: Path) -> None:
    (tmp_path / "shouting.py").write_text(
        "import iris_hf\n"
        "class Shout(iris_hf.Plugin):\n"
        "    def __init__(self, word): self.word = word\n"
        "    def on_train_start(self, state): print(self.word * 2)\n"
        "class NotOne: pass\n"
    )
    info = tmp_path / "shouting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: shouting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[iris_hf.plugins]\nshout = shouting:Shout\nnot_one = shouting:NotOne\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import iris_hf\nfrom tiny import *\n"
        "iris_hf.train(Net(), Tensors(8), None, num_epochs=1, plugins=['shout(\"hey\")'])\n"
        "for name in ('not_one', 'shoot'):\n"
        "    try: iris_hf.train(Net(), Tensors(8), None, num_epochs=1, plugins=[name])\n"
        "    except iris_hf.ConfigError as error: print(error)\n"
    )
    printed = run_python("-c", code).stdout
    assert "heyhey" in printed
    assert "The entry point 'not_one' gives <class 'shouting.NotOne'>, which is not a subclass of" in printed
    assert "Unknown plugin 'shoot'. Did you mean 'shout'" in printed


def test_hooks_come_in_order_and_only_to_those_that_define_them() -> None:
    calls: list[str] = []

    class Everything(Plugin):
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            return (lambda *args: (calls.append(name), value(*args))[1]) if name.startswith(("on_", "tr")) else value

        def transform_model(self, model: Any) -> Any:
            return model

        def transform_batch(self, batch: Any) -> Any:
            return batch

        def on_train_start(self, state: Any) -> None: ...
        def on_epoch_start(self, state: Any) -> None: ...
        def on_gradients_ready(self, state: Any) -> None: ...
        def on_step_end(self, state: Any) -> None: ...
        def on_epoch_end(self, state: Any) -> None: ...
        def on_validation_start(self, state: Any) -> None: ...
        def on_validation_end(self, state: Any) -> None: ...
        def on_train_end(self, state: Any) -> None: ...

    settings = {"num_epochs": 1, "batch_size": 4, "accumulate_grad_batches": 2}
    iris_hf.train(Net(), Tensors(8), None, Tensors(4), **settings, plugins=[Everything(), Plugin()])
    assert calls == [
        "transform_model",
        *("on_train_start", "on_epoch_start", "transform_batch", "transform_batch", "on_gradients_ready"),
        *("on_step_end", "on_epoch_end", "on_validation_start", "on_validation_end", "on_train_end", "on_exit"),
    ]
    assert load_plugins([Plugin()]).hooks("on_step_end") == []


def test_plugins_let_go_when_a_run_fails() -> None:
    class Holding(Plugin):
        held = True

        def on_step_end(self, state: iris_hf.TrainState) -> None:
            raise RuntimeError("in the plugin")

        def on_exit(self) -> None:
            self.held = False

    plugin = Holding()
    with pytest.raises(RuntimeError, match="in the plugin"):
        iris_hf.train(Net(), Tensors(8), None, num_epochs=1, plugins=[plugin])
    assert not plugin.held


def test_batches_and_contexts_of_plugins_reach_the_model() -> None:
    seen: list[Any] = []

    class Doubles(Plugin):
        inside = False

        def transform_batch(self, batch: Any) -> Any:
            return batch[0] * 2, batch[1]

        def forward_context(self) -> Any:
            import contextlib

            @contextlib.contextmanager
            def entered() -> Any:
                self.inside = True
                yield
                self.inside = False

            return entered()

    plugin = Doubles()

    class Sees(Net):
        def forward(self, images: Any) -> Any:
            seen.append((float(images.max()) > 1.5, plugin.inside))
            return super().forward(images)

    iris_hf.train(Sees(), Tensors(8), None, num_epochs=1, batch_size=8, plugins=[plugin])
    assert seen == [(True, True)]


def test_log_summary_gives_the_mean_loss_of_an_epoch(caplog: pytest.LogCaptureFixture) -> None:
    from tiny import train_tiny

    with caplog.at_level(logging.INFO, logger="iris_hf"):
        _, recorder = train_tiny(plugins=["log_summary"], val_dataset=Tensors(8), num_epochs=2)
    lines = [record.getMessage() for record in caplog.records if "epoch" in record.getMessage()]
    assert lines[0].startswith(f"epoch 1/2: loss {sum(recorder.losses[:8]) / 8:.4f}, 8 steps in ")
    assert lines[0].endswith(" examples/s")
    assert lines[1] == f"epoch 1/2: val_loss {recorder.val_losses[0]:.4f}"


def test_log_summary_prints_where_nobody_listens_to_the_logger(capsys: pytest.CaptureFixture[str]) -> None:
    iris_hf.train(Net(), Tensors(8), None, num_epochs=1, plugins=["log_summary"])
    out, err = capsys.readouterr()
    assert "epoch 1/1: loss " in err
    assert not out


class Sometimes(Net):
    """Measures something in every fourth micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def training_step(self, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        aux = {} if self.calls % 4 else {"aux": torch.tensor(10.0)}
        return {"loss": self.criterion(self(inputs), targets), **aux}


def test_the_mean_of_what_some_steps_measure_is_over_those_steps(capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"num_epochs": 1, "batch_size": 4, "num_dataloader_workers": 0, "plugins": ["log_summary"]}
    for accumulate in (1, 2):
        iris_hf.train(Sometimes(), Tensors(64), None, accumulate_grad_batches=accumulate, **settings)
        assert ", aux 10.0000, " in capsys.readouterr().err


CODE = (
    "import logging, iris_hf\nfrom tiny import *\nlogging.basicConfig(level='INFO', format='%(message)s')\n"
    "plugins = ['progressbar', 'log_summary']\n"
    "iris_hf.train(Net(), Tensors(64), None, Tensors(8), num_epochs=2, num_dataloader_workers=0, plugins=plugins)\n"
    "iris_hf.predict(Tensors(64), Net(), plugins=['progressbar'])\n"
)


def test_the_progress_bar_is_silent_without_a_terminal() -> None:
    done = run_python("-c", CODE)
    assert done.returncode == 0, done.stderr
    assert "%|" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs a pseudo-terminal")
def test_on_a_terminal_the_bar_moves_and_log_lines_stay_whole() -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    if os.fork() == 0:  # pragma: no cover
        os.setsid()
        for descriptor in (0, 1, 2):
            os.dup2(slave, descriptor)
        root = Path(__file__).parents[2]
        environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}", "TERM": "xterm"}
        os.execve(sys.executable, [sys.executable, "-c", CODE], environment)
    os.close(slave)
    output = b""
    while True:
        try:
            chunk = os.read(master, 4096)
        except OSError:
            break
        if not chunk:
            break
        output += chunk
    os.wait()
    text = output.decode()
    assert "train: 100%" in text
    assert "loss=" in text
    assert "predict: 100%" in text
    lines = [line.strip("\r").rpartition("\r")[2] for line in text.replace("\x1b[A", "").split("\n")]
    assert any(re.fullmatch(r"epoch 1/2: loss \d\.\d{4}, 64 steps in .* examples/s", line) for line in lines)


def test_a_plugin_of_ones_own_is_one_small_class() -> None:
    done = run_python(str(EXAMPLES / "own_plugin.py"))
    assert done.returncode == 0, done.stderr
    assert number("epoch 1: the largest gradient norm was", done.stdout) == pytest.approx(1.0, abs=0.1)
    assert number("epoch 3: the largest gradient norm was", done.stdout) > 0
    assert number("validation accuracy:", done.stdout) == pytest.approx(0.85, abs=0.04)
