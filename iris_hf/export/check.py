"""The proof of an export: ONNX Runtime and torch side by side, at several batch sizes and image sizes."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iris_hf.errors import ConfigError
from iris_hf.export.cases import Case, run_case, run_exactly
from iris_hf.export.choices import SameChoice, with_choices
from iris_hf.export.examples import Batch
from iris_hf.export.graph import Graph
from iris_hf.models.detector import ImageDetector
from iris_hf.models.segmenter import ImageSegmenter

TOLERANCES = {"fp32": 1e-4, "fp16": 5e-2, "int8": None}
"""Largest error allowed, as a multiple of the output's scale."""

SMALLEST_SCALE = 1e-3
"""Scale of outputs that are smaller. 1e-4 of it is what float32 rounds numbers near 1 by: 1e-7."""

ROUNDING = 4.0
"""How many times as far from float64 as torch in float32 ONNX Runtime may be where both round by more than that."""

CHAOS = 0.01
"""How far from float64 torch in float32 may be, as a multiple of the output's scale, for that to prove anything."""

CANCELLATION = 1e-4
"""How far it may be whatever the scale, which is small where large numbers cancel."""

logger = logging.getLogger(__name__)

_QUERIES = ("logits", "pred_boxes")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far ONNX Runtime is from torch.

    Attributes:
        errors: Largest absolute difference for each output, over all cases. For `masks` it is the probability that
            separates the chosen class from the most probable one, for `detections` the distance to the nearest box
            that the model gives.
        agreement: Fraction of predictions whose decision is the same, in [0, 1]: the most probable class, or for
            multilabel which classes exceed 0.5. None where the graph gives no probabilities.
    """

    errors: dict[str, float]
    agreement: float | None


def make_session(model: bytes | Path, *, num_threads: int | None = None, providers: Sequence[str] | None = None) -> Any:
    """Open an ONNX model in ONNX Runtime.

    Args:
        model: The bytes, or the file.
        num_threads: Threads within an operation; as many as torch uses when None.
        providers: Execution providers of ONNX Runtime, in order of preference; CUDA where ONNX Runtime has it, and
            the CPU, when None.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() if num_threads is None else num_threads
    options.log_severity_level = 4  # what fails is raised
    if providers is None:
        available = onnxruntime.get_available_providers()
        providers = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in available]
    if isinstance(model, bytes):  # they hold all weights: ONNX Runtime would look for others in the working directory
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=list(providers))


def run_session(session: Any, inputs: Batch) -> Batch:
    """Run a session on named tensors, and give its outputs by name, on the CPU."""
    wanted = {i.name for i in session.get_inputs()}
    feeds = {name: tensor.detach().cpu().numpy() for name, tensor in inputs.items() if name in wanted}
    names = [o.name for o in session.get_outputs()]
    # Scalars come as NumPy scalars rather than arrays.
    return {n: torch.as_tensor(v).clone() for n, v in zip(names, session.run(names, feeds), strict=True)}


def compare(
    graph: Graph,
    file: Path,
    cases: Sequence[Case],
    *,
    precision: str,
    tolerance: float | None,
    make_exact: Callable[[], Graph] | None = None,
) -> Comparison:
    """Compare an ONNX file with the model that it was made of.

    Args:
        graph: What made the cases.
        file: The ONNX file.
        cases: What to compare.
        precision: Of the file, for messages.
        tolerance: Largest error allowed, as a multiple of an output's scale, see :func:`distance`. None allows any.
        make_exact: Gives the graph in float64. With it, an output may differ by more than the tolerance if ONNX Runtime
            is at most `ROUNDING` times as far from float64 as torch is, in this case or for its scale in another, or as
            1.2e-7, by which numbers near 1 are rounded; and torch itself not further than `CHAOS` or `CANCELLATION`.
            Then the network amplifies the rounding of float32, in torch as well.

    Raises:
        ConfigError: If ONNX Runtime cannot run it for one of the cases, or an output differs by more than is allowed;
            the message names output, error and case.
    """
    try:
        session = make_session(file, num_threads=1, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ConfigError(f"ONNX Runtime does not take the {precision} graph: {error}") from error
    choosing = functools.cache(lambda: _make_choosing_session(file))
    runs, failure = [], None
    for case in cases:
        try:
            got = run_session(session, case.inputs)
        except Exception as error:
            failure = ConfigError(f"The {precision} graph fails {case}: {error} {_advice(graph)}")
            failure.__cause__ = error
            break  # what differs in the cases before tells more
        if not _agrees(graph, case, got, tolerance):
            case, got = _choose_alike(graph, choosing, case, got, tolerance)
        runs.append((case, got))
    settled = [case for case, _ in runs]
    find_truths = None if make_exact is None else functools.cache(lambda: _run_all_exactly(make_exact(), settled))
    errors = dict.fromkeys(graph.output_names, 0.0)
    agreements: list[Tensor] = []
    for case, got in runs:
        for name in graph.output_names:
            difference, allowed = _error(graph, name, case, got, tolerance)
            errors[name] = max(errors[name], difference)
            if not difference <= allowed:
                message = (
                    f"The {precision} graph differs from the model: output {name!r} by {difference:.3g} {case}; "
                    f"allowed is {allowed:.3g}. {_advice(graph)}"
                )
                if find_truths is None:
                    raise ConfigError(message)
                _require_rounding(graph, find_truths, name, case, got, message)
        agreements += _agreements(graph, case, got)
    if failure is not None:
        raise failure
    share = torch.cat(agreements).float().mean().item() if agreements else None
    return Comparison(errors, share)


def _error(graph: Graph, name: str, case: Case, got: Batch, tolerance: float | None) -> tuple[float, float]:
    """The error of one output, and the largest that is allowed."""
    difference, scale = distance(graph, name, case, got)
    return difference, sys.float_info.max if tolerance is None else tolerance * scale


def _agrees(graph: Graph, case: Case, got: Batch, tolerance: float | None) -> bool:
    errors = (_error(graph, name, case, got, tolerance) for name in graph.output_names)
    return all(difference <= allowed for difference, allowed in errors)


def _make_choosing_session(file: Path) -> tuple[Any, list[str]]:
    data, names = with_choices(file)
    return make_session(data, num_threads=1, providers=["CPUExecutionProvider"]) if names else None, names


def _choose_alike(
    graph: Graph,
    choosing: Callable[[], tuple[Any, list[str]]],
    case: Case,
    got: Batch,
    tolerance: float | None,
) -> tuple[Case, Batch]:
    """The same case where torch chooses what ONNX Runtime chose, as far as that is as good but for rounding."""
    session, names = choosing()
    if session is None or tolerance is None:
        return case, got
    chosen = run_session(session, case.inputs)
    choose = functools.partial(SameChoice, [chosen[name] for name in names], tolerance)
    return run_case(graph, case.inputs, choose), chosen


def _run_all_exactly(exact: Graph, cases: Sequence[Case]) -> list[tuple[Case, Case]]:
    return [(case, run_exactly(exact, case)) for case in cases]


def _require_rounding(
    graph: Graph,
    find_truths: Callable[[], list[tuple[Case, Case]]],
    name: str,
    case: Case,
    got: Batch,
    message: str,
) -> None:
    """Raise the message unless ONNX Runtime and torch are about as far from what the model gives in float64."""
    again = distance(graph, name, run_case(graph, case.inputs, case.choose), case.outputs)[0]
    if again > 0:
        raise ConfigError(
            f"Two runs of {type(graph.model).__name__} on the same inputs differ: output {name!r} by {again:.3g}. It "
            "draws random numbers, and no graph gives the same. Leave out in evaluation mode what draws them."
        )
    try:
        truths = find_truths()
    except ConfigError as error:
        raise ConfigError(message) from error
    truth = next(truth for run, truth in truths if run is case)
    (in_torch, scale), (in_onnx, _) = (distance(graph, name, truth, outputs) for outputs in (case.outputs, got))
    if not in_torch <= max(CHAOS * scale, CANCELLATION):
        raise ConfigError(
            f"{message} Nor does float64 tell which is right: torch itself is {in_torch:.3g} off, so that the output "
            "means little in float32. Pass a tolerance to export it nevertheless."
        )
    in_torch = _rounding_of_torch(graph, truths, name, scale)
    if not in_onnx <= ROUNDING * in_torch:
        raise ConfigError(f"{message} In float64 it is not rounding: torch is {in_torch:.3g} off, ONNX {in_onnx:.3g}.")
    logger.warning(
        "%s amplifies the rounding of float32: output %r of torch is %.3g from float64, that of ONNX Runtime %.3g, %s.",
        type(graph.model).__name__,
        name,
        in_torch,
        in_onnx,
        case,
    )


def _rounding_of_torch(graph: Graph, truths: list[tuple[Case, Case]], name: str, scale: float) -> float:
    """How far torch is from float64, at an output's scale.

    Of all cases, since few numbers may happen to be rounded by less than others of their kind; but no larger a part of
    the scale than in any of them, since those with larger outputs are rounded by more.
    """
    errors = [distance(graph, name, truth, run.outputs) for run, truth in truths]
    meaningful = [(error, own) for error, own in errors if error <= max(CHAOS * own, CANCELLATION)]
    largest = max(error for error, _ in meaningful)
    part = max(error / own for error, own in meaningful)
    return max(torch.finfo(torch.float32).eps, min(largest, part * scale))


def distance(graph: Graph, name: str, case: Case, got: Batch) -> tuple[float, float]:
    """Measure the error of one output, and the scale of its values.

    Args:
        graph: What made the case.
        name: The output.
        case: What is right.
        got: What came out instead, by name.

    Returns:
        The largest absolute difference, as :class:`Comparison` has it, and the largest absolute value, at least
        `SMALLEST_SCALE`; 1 for probabilities and boxes.
    """
    expected, actual = case.outputs[name], got[name]
    if expected.shape != actual.shape:
        return float("inf"), 1.0
    if isinstance(graph.model, ImageDetector) and name == "detections":
        return _distance_of_boxes(graph.model, case, actual), 1.0
    if isinstance(graph.model, ImageDetector) and name in _QUERIES:
        expected = _in_order_of(case.outputs, got, name)
    if isinstance(graph.model, ImageSegmenter) and name == "masks":
        probabilities = case.outputs["probabilities"]
        chosen = (probabilities * actual).sum(1)
        is_one_class = bool((actual.sum(1) == 1).all())
        return float((probabilities.amax(1) - chosen).max()) if is_one_class else float("inf"), 1.0
    if not expected.is_floating_point():
        return float((expected.double() - actual.double()).abs().max()) if expected.numel() else 0.0, 1.0
    a, b = expected.detach().double(), actual.double()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=float("inf"))
    finite = a[a.isfinite()].abs()
    smallest = 1.0 if name == "probabilities" else SMALLEST_SCALE
    scale = max(smallest, float(finite.max())) if finite.numel() else smallest
    return float(difference.max()) if difference.numel() else 0.0, scale


def _in_order_of(outputs: Batch, got: Batch, name: str) -> Tensor:
    """Expected queries of a detector in the order of the actual ones, each the nearest by logits and box.

    A detector that chooses its queries by their scores may meet near ties, which change places.
    """
    a, b = (torch.cat([values[n] for n in _QUERIES], -1) for values in (outputs, got))
    distance = (b[:, :, None] - a[:, None]).abs().amax(-1).nan_to_num(nan=float("inf"))
    nearest = distance.argmin(2)
    if (nearest.sort(1).values != torch.arange(nearest.shape[1])).any():
        return outputs[name]
    expected = outputs[name]
    return expected.gather(1, nearest[..., None].expand_as(expected))


def _distance_of_boxes(detector: ImageDetector, case: Case, actual: Tensor) -> float:
    """How far detections are from the model's own, in whatever order: near ties change places.

    Probabilities are compared in order; each box with the nearest of its class and probability.
    """
    worst = 0.0
    for rows, all_boxes in zip(actual.double(), case.prediction, strict=True):
        boxes = all_boxes.double()
        scores = rows[:, 1].sort(descending=True).values
        count = min(len(scores), len(boxes))
        best = boxes[:, 1].sort(descending=True).values[:count]
        worst = max([worst, *(scores[:count] - best).abs().tolist()])
        found = rows[rows[:, 1] >= 0]
        if len(found) > len(boxes):
            return float("inf")
        if len(found):
            distance = (found[:, None, 1:] - boxes[None, :, 1:]).abs().amax(-1)
            distance = distance.masked_fill(found[:, None, 0] != boxes[None, :, 0], float("inf"))
            worst = max(worst, float(distance.amin(1).max()))
    return worst


def _agreements(graph: Graph, case: Case, got: Batch) -> list[Tensor]:
    expected, actual = case.outputs.get("probabilities"), got.get("probabilities")
    if expected is None or actual is None or expected.ndim < 2:
        return []
    if getattr(graph.model, "target_type", None) == "multilabel":
        return [((expected > 0.5) == (actual > 0.5)).flatten()]
    return [(expected.argmax(1) == actual.argmax(1)).flatten()]


def _advice(graph: Graph) -> str:
    return (
        f"Look in {type(graph.model).__name__} for Python numbers made of tensors or shapes, such as int(x.shape[0]): "
        "they are written down as constants. If only the image size is at fault, pass dynamic_size=False; if only the "
        "number of tokens, dynamic_length=False."
    )
