"""What an export is traced and checked with: batches of several lengths, images of two sizes, texts of two lengths."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from iris_hf.errors import ConfigError
from iris_hf.export.choices import FirstOfEquals
from iris_hf.export.examples import (
    BATCH_SIZES,
    Batch,
    image_spec_of,
    is_images,
    is_tokens,
    other_sizes,
    shorter_length,
    vary,
)
from iris_hf.export.exporters import Axes
from iris_hf.export.graph import Graph
from iris_hf.models.detector import ImageDetector
from iris_hf.models.segmenter import ImageSegmenter
from iris_hf.models.text_encoder import TextEncoder


@dataclasses.dataclass(frozen=True)
class Free:
    """What may have any length beside the batch.

    Attributes:
        images: Height and width of the images.
        texts: The number of tokens.
    """

    images: bool
    texts: bool

    def __str__(self) -> str:
        words = ["images of any size"] * self.images + ["texts of any length"] * self.texts
        return " and ".join(words) or "inputs of one size"


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs of one batch size, image size and text length, and what the model gives for them.

    Attributes:
        inputs: Named tensors.
        outputs: What the graph gives in torch.
        prediction: What the model's prediction step gives.
        choose: Makes the context that settles what is chosen among equal scores.
    """

    inputs: Batch
    outputs: Batch
    prediction: Any
    choose: Callable[[], TorchFunctionMode] = FirstOfEquals

    def __str__(self) -> str:
        return f"for the inputs {_shapes(self.inputs)}"


def find_freedom(
    model: nn.Module, batch: Batch, *, dynamic_size: bool | None = None, dynamic_length: bool | None = None
) -> list[Free]:
    """What to export for: what was asked for, or all that the model says, then less where the graph for that is wrong.

    Args:
        model: Says by its `image_spec` whether it takes images of any size, and by a text encoder of iris_hf within, or
            an attention mask among its inputs, that it takes texts of any length.
        batch: Its inputs.
        dynamic_size: Whether images may have any size; None asks the model.
        dynamic_length: Whether texts may have any length; None asks the model.

    Raises:
        ConfigError: If one is asked for and there is no such input.
    """
    for name, kind, asked, varies in (
        ("dynamic_size", "images", dynamic_size, other_sizes(batch)),
        ("dynamic_length", "texts of more than one token", dynamic_length, shorter_length(batch)),
    ):
        if asked and not varies:
            shapes = _shapes(batch)
            raise ConfigError(f"{name} is for {kind}, and {type(model).__name__} takes {shapes}.")
    spec = image_spec_of(model)
    images = spec is not None and spec.variable_size and bool(other_sizes(batch))
    encodes = "attention_mask" in batch or any(isinstance(m, TextEncoder) for m in model.modules())
    texts = encodes and shorter_length(batch) is not None
    choices = [
        [asked] if asked is not None else [True, False] if possible else [False]
        for asked, possible in ((dynamic_size, images), (dynamic_length, texts))
    ]
    return [Free(*choice) for choice in itertools.product(*choices)]


def make_cases(graph: Graph, batch: Batch, free: Free) -> list[Case]:
    """Run the model on every combination of the check; the first is to be traced.

    Raises:
        ConfigError: If the model does not run on one, or gives another number of tensors, or of axes, for another
            batch.
    """
    cases = [run_case(graph, vary(batch, n)) for n in BATCH_SIZES]
    num_tokens = shorter_length(batch) if free.texts else None
    if free.images:
        odd, other = other_sizes(batch)
        try:
            varied = [run_case(graph, vary(batch, n, size=odd, num_tokens=num_tokens)) for n in BATCH_SIZES]
        except ConfigError:  # the network takes certain multiples only
            varied = [run_case(graph, vary(batch, n, size=other, num_tokens=num_tokens)) for n in BATCH_SIZES]
        cases = varied + cases
    elif free.texts:
        cases = [run_case(graph, vary(batch, n, num_tokens=num_tokens)) for n in BATCH_SIZES] + cases
    names = {tuple(case.outputs) for case in cases}
    if len(names) > 1:
        raise ConfigError(
            f"{type(graph.model).__name__} gives {' or '.join(str(len(n)) for n in sorted(names))} tensors for batches "
            "of several lengths, and a graph has fixed outputs. Let it return a tensor [N, ...], not a list of N."
        )
    for name in cases[0].outputs:
        shapes = {case.outputs[name].ndim: list(case.outputs[name].shape) for case in cases}
        if len(shapes) > 1:
            raise ConfigError(
                f"The output {name!r} of {type(graph.model).__name__} has a number of axes that depends on the batch: "
                f"{' or '.join(map(str, shapes.values()))}. Name the axis that goes: squeeze(1), not squeeze()."
            )
    return cases


def run_case(graph: Graph, inputs: Batch, choose: Callable[[], TorchFunctionMode] = FirstOfEquals) -> Case:
    """Run the model on one batch.

    Args:
        graph: The model.
        inputs: The batch.
        choose: Makes the context that settles what is chosen among equal scores, anew for each run of the network.

    Raises:
        ConfigError: If it does not run on it.
    """
    with torch.no_grad():
        try:
            with choose():
                outputs = graph.run(inputs)
            model = graph.model
            with choose():
                if isinstance(model, ImageSegmenter):
                    outputs["masks"] = graph.predict(inputs)
                prediction = _all_boxes(model, graph, inputs) if isinstance(model, ImageDetector) else None
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{type(graph.model).__name__} does not run on {_shapes(inputs)}: {type(error).__name__}: {error}. "
                "Pass example_inputs, a batch of what it takes, or input_size; dynamic_size=False or "
                "dynamic_length=False if only one size will do."
            ) from error
    return Case({name: tensor.clone() for name, tensor in inputs.items()}, outputs, prediction, choose)


def run_exactly(exact: Graph, case: Case) -> Case:
    """Compute a case in float64.

    Args:
        exact: The graph of the case with weights of float64.
        case: Its inputs are used.

    Returns:
        The same inputs, with outputs and prediction of float64.

    Raises:
        ConfigError: If the network does not run in float64, since it makes tensors of float32 itself.
    """
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in case.inputs.items()}
    return dataclasses.replace(run_case(exact, inputs, case.choose), inputs=case.inputs)


def find_axes(cases: Sequence[Case], free: Free) -> Axes:
    """Name the axes of variable length: those of the inputs, and those of the outputs that vary among the cases."""
    axes: Axes = {}
    for name, tensor in cases[0].inputs.items():
        axes[name] = {0: "batch_size"}
        if free.images and is_images(tensor):
            axes[name].update({2: "height", 3: "width"})
        if free.texts and is_tokens(tensor):
            axes[name][1] = "sequence_length"
    for name in cases[0].outputs:
        lengths = zip(*(case.outputs[name].shape for case in cases), strict=True)
        varying = [axis for axis, values in enumerate(lengths) if len(set(values)) > 1]
        axes[name] = {axis: "batch_size" if axis == 0 else f"{name}_axis_{axis}" for axis in varying}
    return axes


def _all_boxes(detector: ImageDetector, graph: Graph, inputs: Batch) -> Any:
    """The predictions of a detector without its limits."""
    limits = detector.max_detections, detector.score_threshold
    detector.max_detections, detector.score_threshold = 2**31, 0.0
    try:
        return graph.predict(inputs)
    finally:
        detector.max_detections, detector.score_threshold = limits


def _shapes(batch: Batch) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in batch.items())
