"""How far ONNX exports are from torch, for every family of models, and what smaller numbers cost.

    python benchmarks/onnx_errors.py [--trained] [FAMILY ...]

Small models from configurations, with random weights that make their outputs vary (tests/models/families.py), at the
batch sizes 1, 2 and 5, at two image sizes and two text lengths where the model takes any. The promise: ONNX Runtime is
at most 1e-5 from torch in float32. Both round, so both are compared with torch in float64, too: a network that is deep
enough is that far from it in torch itself. With --trained, detectors and segmenters are trained on digits first
(tests/export/trained.py), as models are that leave the house.
"""

import logging
import sys
import tempfile
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / folder) for folder in ("", "export")]

import torch  # noqa: E402
from models.families import FAMILIES, TOWERS, make  # noqa: E402
from onnx_models import FURTHER, enliven, far_from_exact  # noqa: E402
from trained import train_on_digits  # noqa: E402

from iris_hf.errors import ConfigError  # noqa: E402
from iris_hf.export.cases import Free, make_cases  # noqa: E402
from iris_hf.export.check import compare  # noqa: E402
from iris_hf.export.examples import choose_size, image_spec_of, make_inputs, split_inputs  # noqa: E402
from iris_hf.export.graph import make_graph  # noqa: E402
from iris_hf.export.onnx import export_onnx_model  # noqa: E402
from iris_hf.export.precision import convert  # noqa: E402


def main(names: list[str], *, is_trained: bool) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print("| family | ONNX - torch | torch - fp64 | ONNX - fp64 | largest | fp16 | int8 | any | exporter |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in names:
        size = FAMILIES[name].size if name in FAMILIES else 32
        if is_trained:
            print(f"| {name} | {' | '.join(measure(train_on_digits(name), size))} |", flush=True)
            continue
        model = FURTHER[name]() if name in FURTHER else make(name)
        spec = image_spec_of(model)
        size = size if spec is None or spec.variable_size else spec.height
        print(f"| {name} | {' | '.join(measure(enliven(model, size), size))} |", flush=True)


def measure(model: torch.nn.Module, size: int) -> list[str]:
    """The cells of one model."""
    export = export_onnx_model(model, input_size=size)
    batch, layout = split_inputs(make_inputs(model, *choose_size(model, size)))
    graph = make_graph(model, batch, layout)
    cases = make_cases(graph, batch, Free(export.dynamic_size, export.dynamic_length))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        file.write_bytes(export.data)
        try:
            far = far_from_exact(graph, make_graph(model, batch, layout).double(), cases, file)
            in_torch, in_onnx = (f"{error:.1e}" for error in far)
        except ConfigError:  # the network itself mixes precisions
            in_torch = in_onnx = "-"
        smaller = []
        for precision in ("fp16", "int8"):
            file.write_bytes(export.data)
            try:
                convert(file, precision)
                errors = compare(graph, file, cases, precision=precision, tolerance=None).errors
                smaller.append(f"{max(errors.values()):.1e}")
            except ConfigError as error:
                smaller.append("nothing to convert" if "has neither" in str(error) else "refused")
    largest = max(
        float(t.detach().abs().max()) for case in cases for t in case.outputs.values() if t.is_floating_point()
    )
    free = ["images"] * export.dynamic_size + ["texts"] * export.dynamic_length
    return [
        f"{export.max_error:.1e}",
        *(in_torch, in_onnx, f"{largest:.2g}"),
        *smaller,
        ", ".join(free) or "-",
        export.exporter,
    ]


if __name__ == "__main__":
    chosen = [name for name in sys.argv[1:] if name != "--trained"]
    if trained := len(chosen) < len(sys.argv) - 1:
        chosen = chosen or [n for n, family in FAMILIES.items() if family.target_type in ("detection", "segmentation")]
    main(chosen or [*FAMILIES, *TOWERS, *FURTHER], is_trained=trained)
