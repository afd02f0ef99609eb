"""How far ONNX exports are from torch, for every family of models, and what smaller numbers cost.

    python benchmarks/onnx_errors.py [FAMILY ...]

Small models from configurations, with random weights that make their outputs vary (tests/models/families.py). The
promise: at most 1e-5 in float32.
"""

import logging
import sys
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / folder) for folder in ("", "export")]

from models.families import FAMILIES, TOWERS, make  # noqa: E402
from onnx_models import enliven  # noqa: E402

from iris_hf.export.onnx import export_onnx_model  # noqa: E402


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print("| family | maximum error | fp16 | int8 | image sizes | exporter |\n|---|---|---|---|---|---|")
    for name in names:
        size = FAMILIES[name].size if name in FAMILIES else 32
        model = enliven(make(name), size)
        exact = export_onnx_model(model, input_size=size)
        errors = [f"{exact.max_error:.1e}", *(smaller(model, size, p) for p in ("fp16", "int8"))]
        sizes = "any" if exact.dynamic_size else "one"
        print(f"| {name} | {' | '.join(errors)} | {sizes} | {exact.exporter} |", flush=True)


def smaller(model: object, size: int, precision: str) -> str:
    try:
        return f"{export_onnx_model(model, input_size=size, precision=precision, tolerance=1e9).max_error:.1e}"
    except ValueError as error:
        return "nothing to convert" if "has neither" in str(error) else "refused"


if __name__ == "__main__":
    main(sys.argv[1:] or [*FAMILIES, *TOWERS])
