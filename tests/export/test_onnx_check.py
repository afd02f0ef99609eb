"""No graph is handed out that is not what the model is; what float32 rounds is no difference."""

import functools

import pytest
import torch
from onnx_models import (
    HAS_RUNTIME,
    Baked,
    Cancelling,
    Dropping,
    Faint,
    Masking,
    Noisy,
    Sampled,
    Stepped,
    Unlikely,
)
from torch import nn

from iris_hf.errors import ConfigError
from iris_hf.export.cases import Free, make_cases, run_case
from iris_hf.export.check import compare
from iris_hf.export.examples import split_inputs
from iris_hf.export.graph import make_graph
from iris_hf.export.onnx import export_onnx, export_onnx_model

pytestmark = pytest.mark.skipif(not HAS_RUNTIME, reason="the packages of the extra onnx are not installed")


class Amplifier(nn.Module):
    """Turns the compared bits of a product into the first: sine of an angle of thousands of turns, times an input."""

    def __init__(self, turns: float = 1e3) -> None:
        super().__init__()
        self.angles = nn.Linear(64, 16)
        nn.init.normal_(self.angles.weight, std=turns, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(self.angles.bias)
        self.shift = 0.0

    def prediction_step(self, features: torch.Tensor) -> torch.Tensor:
        return self.angles(features).sin() * features[:, :1] + self.shift


class TwoStages(nn.Module):
    """Chooses the best 3 of 8 rows by scores that are equal but for a tilt, and gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.tilt = 0.0

    def prediction_step(self, rows: torch.Tensor) -> torch.Tensor:
        scores = 2 - rows[..., 0].round() + torch.arange(rows.shape[1]) * self.tilt
        chosen = scores.topk(3, dim=1).indices
        return rows.gather(1, chosen[..., None].expand(-1, -1, rows.shape[2]))


def test_another_choice_among_equal_scores_is_no_difference(tmp_path):
    model, rows = TwoStages(), torch.rand(2, 8, 4, generator=torch.Generator().manual_seed(1)) * 0.4
    export_onnx(model, rows, folder=tmp_path)
    compared = {}
    for tilt in (1e-6, 1e-2):
        model.tilt = tilt  # torch then prefers the last rows, the graph still the first
        batch, layout = split_inputs(rows)
        graph = make_graph(model, batch, layout)
        cases = make_cases(graph, batch, Free(images=False, texts=False))
        compared[tilt] = functools.partial(
            compare, graph, tmp_path / "model.onnx", cases, precision="fp32", tolerance=1e-4
        )
        assert torch.equal(model.prediction_step(rows)[:, 0], rows[:, -1])
    assert compared[1e-6]().errors == {"predictions": 0}
    with pytest.raises(ConfigError, match=r"output 'predictions' by 0\.\d+ for the inputs features \(2, 8, 4\)"):
        compared[1e-2]()


def test_a_baked_batch_size_is_an_error(tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(ConfigError, match=r"Baked") as caught:
        export_onnx(Baked(), input_size=16, folder=folder)
    assert "int(x.shape[0])" in str(caught.value)
    assert "(1, 3, 16, 16)" in str(caught.value)
    assert not folder.exists()


def test_a_graph_that_differs_is_an_error_that_names_output_and_error(tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(ConfigError, match=r"output 'logits' by"):
        export_onnx(Sampled(), input_size=16, folder=folder)
    assert not folder.exists()
    with pytest.raises(
        ConfigError, match=r"output 'logits' by [0-9.e-]+ for the inputs pixel_values \([125], 3, 16, 16"
    ):
        export_onnx(Stepped(), input_size=16, tolerance=0.0, folder=folder)
    assert not folder.exists()


def test_a_graph_is_wrong_that_differs_in_small_numbers_only():
    with pytest.raises(ConfigError, match=r"output 'logits' by .*In float64 it is not rounding"):
        export_onnx(Faint(), input_size=16)


def test_small_numbers_that_float32_rounds_are_no_error():
    features = torch.rand(2, 64, generator=torch.Generator().manual_seed(1))
    for num_outputs, large in ((1, 10.0), (1, 100.0), (8, 100.0), (1, 1000.0)):
        export_onnx(Cancelling(num_outputs, large), features)


def test_an_error_of_probabilities_counts_as_it_is():
    export = export_onnx_model(Unlikely(), input_size=16, tolerance=1e-6)
    assert export.errors["probabilities"] < 1e-6  # more than that of 0.02


def test_outputs_that_are_called_as_those_of_a_segmenter_are_compared_as_numbers():
    assert export_onnx_model(Masking(), input_size=16).errors["masks"] == 0


def test_a_network_that_amplifies_rounding_exports_with_a_warning(caplog):
    model, features = Amplifier(), torch.rand(2, 64, generator=torch.Generator().manual_seed(1))
    export = export_onnx_model(model, features)
    assert export.max_error > 2e-4  # twice what any other network is allowed
    assert "Amplifier amplifies the rounding of float32: output 'predictions' of torch is" in caplog.text
    with pytest.raises(ConfigError, match=r"differs from the model: output 'predictions' by .*; allowed is [0-9.e-]+"):
        export_onnx_model(model, features, tolerance=1e-4)
    with pytest.raises(ConfigError, match=r"Nor does float64 tell which is right: torch itself is 0\.\d+ off"):
        export_onnx_model(Amplifier(turns=1e5), features)


@pytest.mark.parametrize("model", [Dropping(), Noisy()])
def test_a_network_that_draws_random_numbers_is_no_graph(model, tmp_path):
    with pytest.raises(ConfigError, match=rf"Two runs of {type(model).__name__} on the same inputs differ.*random"):
        export_onnx(model, input_size=16, folder=tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_wrong_graph_is_told_from_rounding(tmp_path):
    model, features = Amplifier(), torch.rand(2, 64, generator=torch.Generator().manual_seed(1))
    features[:, 0] = 1
    export_onnx(model, features, folder=tmp_path)
    with torch.no_grad():
        model.angles.bias += 0.1
    batch, layout = split_inputs(features)
    graph = make_graph(model, batch, layout)
    cases = make_cases(graph, batch, Free(images=False, texts=False))
    with pytest.raises(ConfigError, match=r"it is not rounding: torch is .* off, ONNX 0\.(099|1)"):
        compare(
            graph,
            tmp_path / "model.onnx",
            cases,
            precision="fp32",
            tolerance=1e-4,
            make_exact=lambda: make_graph(model, batch, layout).double(),
        )


def test_a_wrong_graph_is_not_hidden_by_the_rounding_of_a_batch_with_larger_outputs(tmp_path):
    model, features = Amplifier(turns=50), torch.rand(2, 64, generator=torch.Generator().manual_seed(1))
    features[:, 0] = 1
    faint = features.clone()
    faint[:, 0] = 1e-3
    export_onnx(model, features, folder=tmp_path)

    def compare_both():
        graph = make_graph(model, *split_inputs(features))
        cases = [run_case(graph, split_inputs(inputs)[0]) for inputs in (features, faint)]
        exact = make_graph(model, *split_inputs(features)).double()
        file = tmp_path / "model.onnx"
        return compare(graph, file, cases, precision="fp32", tolerance=1e-4, make_exact=lambda: exact)

    compare_both()
    model.shift = 3e-5  # 3 % of what is faint, less than what is rounded in the other
    with pytest.raises(ConfigError, match=r"it is not rounding: torch is .*e-0[67] off, ONNX 3"):
        compare_both()
