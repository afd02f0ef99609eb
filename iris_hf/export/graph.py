"""A model as a function of named tensors to named tensors, which is what an exporter can write down."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from iris_hf.errors import ConfigError
from iris_hf.export.examples import Batch
from iris_hf.export.structure import Layout, flatten, rebuild
from iris_hf.models.detector import ImageDetector
from iris_hf.models.segmenter import ImageSegmenter
from iris_hf.models.steps import as_predictor

_PAIR_NAMES = ("image_features", "text_features", "logit_scale", "logit_bias")


class Graph(nn.Module):
    """A copy of a model, on the CPU and in evaluation mode, whose forward takes and gives named tensors.

    `forward` takes the tensors in the order of `input_names`, by position or by name, and gives a tuple in the order of
    `output_names`. Made by :func:`make_graph`.

    Attributes:
        model: The copy.
        input_names: Names of the inputs.
        output_names: Names of the outputs, known after :meth:`run`. One that an input has gets a number behind it.
        input_layout: How the inputs are nested for the model.
        prediction: How the prediction is made of the outputs, in JSON: `{"layout": ...}`, or
            `{"boxes": output, "score_threshold": p}`.
    """

    def __init__(self, model: nn.Module, input_names: tuple[str, ...], input_layout: Layout) -> None:
        super().__init__()
        self.predictor = as_predictor(model)
        self.input_names = input_names
        self.output_names: tuple[str, ...] = ()
        self.input_layout = input_layout
        self.prediction: dict[str, Any] = {}
        self._seen: list[Any] = []
        self._is_probable: bool | None = None
        model.register_forward_hook(lambda module, inputs, output: self._seen.append(output))

    @property
    def model(self) -> nn.Module:
        """The copy of the model."""
        return self.predictor.model

    def run(self, batch: Batch) -> Batch:
        """Compute the outputs of a batch by name."""
        inputs = rebuild(self.input_layout, batch)
        if isinstance(self.model, ImageDetector):
            names = ("logits", "pred_boxes", "detections")
            outputs = dict(zip(names, self.model.detect(inputs), strict=True))
            self.prediction = {"boxes": "detections", "score_threshold": self.model.score_threshold}
        elif isinstance(self.model, ImageSegmenter):
            outputs = dict(zip(("logits", "probabilities", "masks"), self.model.segment(inputs), strict=True))
            self.prediction = {"layout": "masks"}
        else:
            outputs = self._run_predictor(inputs)
        self.output_names = tuple(outputs)
        return outputs

    def predict(self, batch: Batch) -> Any:
        """Give the predictions of the model itself."""
        inputs = rebuild(self.input_layout, batch)
        return self.model(**inputs) if self._takes_names(inputs) else self.predictor(inputs)

    def _run_predictor(self, inputs: Any) -> Batch:
        self._seen.clear()
        prediction = self.model(**inputs) if self._takes_names(inputs) else self.predictor(inputs)
        forward = self._seen[0] if len(self._seen) == 1 and self._seen[0] is not prediction else None
        self._seen.clear()
        outputs: Batch = {}
        if forward is not None:
            outputs, _ = flatten(forward, lambda path, tensor: self._name(path, tensor, "logits"), self.input_names)
        known = {id(tensor): name for name, tensor in outputs.items()}
        if self._is_probable is None:  # not anew while it is traced
            self._is_probable = _are_probabilities(prediction, of=forward)
        encodes = forward is None and getattr(self.model, "num_classes", None) == 0
        base = "probabilities" if self._is_probable else "features" if encodes else "predictions"

        def name_prediction(path: tuple[str | int, ...], tensor: Tensor) -> str:
            return known.get(id(tensor)) or self._name(path, tensor, base)

        predicted, layout = flatten(prediction, name_prediction, self.input_names)
        self.prediction = {"layout": layout}
        if not predicted:
            raise ConfigError(f"{type(self.model).__name__} gives no tensor.")
        return {**outputs, **predicted}

    def _takes_names(self, inputs: Any) -> bool:
        """Whether the model has no steps and its forward takes the entries of a dict by name, as in transformers."""
        if not isinstance(inputs, dict) or any(hasattr(self.model, n) for n in ("prediction_step", "predictor")):
            return False
        return inputs.keys() <= inspect.signature(self.model.forward).parameters.keys()

    def _name(self, path: tuple[str | int, ...], tensor: Tensor, base: str) -> str:
        if path and isinstance(path[-1], str):
            return path[-1]
        if len(path) == 1 and getattr(self.model, "target_type", None) == "image_text" and path[0] in range(4):
            return _PAIR_NAMES[int(path[0])]
        return base


def _are_probabilities(prediction: Any, *, of: Any) -> bool:
    """Whether a prediction has a number in [0, 1] for every logit."""
    if not isinstance(of, Tensor) or not isinstance(prediction, Tensor) or of.shape != prediction.shape:
        return False
    return prediction.is_floating_point() and bool(((prediction > -1e-5) & (prediction < 1 + 1e-5)).all())


def make_graph(model: nn.Module, batch: Batch, layout: Layout) -> Graph:
    """Copy a model into a :class:`Graph` for inputs of such names and layout.

    Weights of half precision are turned into float32.

    Raises:
        ConfigError: If the model is no module, or has neither a prediction step nor a forward.
    """
    names = tuple(batch)
    parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]

    def forward(self: Graph, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        return tuple(self.run(named).values())

    # Exporters read the names of the inputs from the signature.
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *parameters]
    )
    graph_type = type("Graph", (Graph,), {"forward": forward})
    as_predictor(model)  # complains before anything is copied
    duplicate = copy.deepcopy(model).cpu().eval()
    for module in duplicate.modules():
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16):
                    tensor.data = tensor.data.float()
    graph: Graph = graph_type(duplicate, names, layout)
    return graph.eval()
