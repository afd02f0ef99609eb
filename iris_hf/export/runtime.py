"""An exported folder as a model: predictions by ONNX Runtime behind the model interface."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from iris_hf.errors import ConfigError, DataError, MissingDependencyError
from iris_hf.export.check import make_session, run_session
from iris_hf.export.examples import Batch, is_list_of_images, split_inputs
from iris_hf.export.folder import MODEL_FILE, make_spec, read_description
from iris_hf.export.structure import names_in, rebuild
from iris_hf.models.hub import EXPORT_FILE
from iris_hf.models.sources.open_clip_text import comes_with_open_clip
from iris_hf.models.trust.recipes import HERE


class OnnxModel(nn.Module):
    """An exported model that predicts with ONNX Runtime. Made by :func:`load_onnx`.

    It holds the bytes of the file beside the session, so it can be pickled and copied: the copy opens a session of its
    own. Threads share one. It has no parameters.

    Attributes:
        target_type: As the model's.
        num_classes: As the model's.
        class_names: As the model's.
        image_spec: The images it takes, without normalisation, or None.
        tokenizer_name: As the model's; the folder, where that holds the tokenizer.
        max_length: The largest number of tokens, as the model's, or None.
        dynamic_size: Whether it takes images of any size.
        dynamic_length: Whether it takes texts of any length.
    """

    def __init__(
        self,
        data: bytes,
        description: dict[str, Any],
        *,
        num_threads: int | None = None,
        providers: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.target_type = description.get("target_type")
        self.num_classes = description.get("num_classes")
        self.class_names = description.get("class_names")
        self.tokenizer_name = description.get("tokenizer_name")
        self.max_length = description.get("max_length")
        self.dynamic_size = bool(description.get("dynamic_size"))
        self.dynamic_length = bool(description.get("dynamic_length"))
        self.image_spec = make_spec(description)
        self._data = data
        self._prediction = dict(description["prediction"])
        self._num_threads = num_threads
        self._providers = providers
        self._session = self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._session = self._open()

    def forward(self, inputs: Any) -> Batch:
        """Give all outputs of the graph by name, for a batch of what the model took.

        Raises:
            DataError: If the inputs don't fit the graph; the message names the input, and what the graph takes. If ONNX
                Runtime fails on them, as on more tokens than the model has places for.
        """
        try:
            batch, _ = split_inputs(inputs, "inputs")
        except ConfigError as error:
            raise DataError(str(error)) from error
        device = next(iter(batch.values())).device
        self._check(batch)
        try:
            outputs = run_session(self._session, batch)
        except Exception as error:
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in batch.items())
            raise DataError(f"ONNX Runtime fails on {shapes}: {error}") from error
        return {name: tensor.to(device) for name, tensor in outputs.items()}

    def prediction_step(self, inputs: Any) -> Any:
        """Give what the model's own prediction step gave.

        Args:
            inputs: A batch of what the model took. A list of images of several sizes is run one by one.
        """
        if is_list_of_images(inputs) and len({image.shape for image in inputs}) > 1:
            return [self.prediction_step(image[None])[0] for image in inputs]
        outputs = self(inputs)
        if "boxes" in self._prediction:
            threshold = max(0.0, self._prediction["score_threshold"])
            return [rows[~(rows[:, 1] < threshold)] for rows in outputs[self._prediction["boxes"]]]
        return rebuild(self._prediction["layout"], outputs)

    @property
    def output_names(self) -> list[str]:
        """The names of the outputs of the graph."""
        return [output.name for output in self._session.get_outputs()]

    def _open(self) -> Any:
        return make_session(self._data, num_threads=self._num_threads, providers=self._providers)

    def _check(self, batch: Batch) -> None:
        taken = {i.name: i for i in self._session.get_inputs()}
        for name, graph_input in taken.items():
            if name not in batch:
                raise DataError(f"The graph takes {', '.join(taken)}, and the inputs are {', '.join(batch)}.")
            shape = tuple(batch[name].shape)
            fits = len(shape) == len(graph_input.shape) and all(
                isinstance(wanted, str) or wanted is None or wanted == got
                for wanted, got in zip(graph_input.shape, shape, strict=True)
            )
            if not fits:
                wanted = ", ".join(map(str, graph_input.shape))
                raise DataError(f"The graph takes {name} of the shape [{wanted}], got {list(shape)}.")


def load_onnx(
    folder: str | Path, *, num_threads: int | None = None, providers: Sequence[str] | None = None
) -> OnnxModel:
    """Load a folder of :func:`iris_hf.export.onnx.export_onnx` as a model that `predict` takes.

    Args:
        folder: Holds model.onnx and iris_hf_onnx.json.
        num_threads: Threads within an operation; as many as torch uses when None.
        providers: Execution providers of ONNX Runtime, in order of preference; CUDA where ONNX Runtime has it, and
            the CPU, when None.

    Raises:
        DataError: If the folder holds no export, its description is damaged or names a tokenizer from elsewhere, or
            ONNX Runtime cannot read it.
        MissingDependencyError: If ONNX Runtime is missing.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise MissingDependencyError("load_onnx needs onnxruntime: pip install onnxruntime.")
    path = Path(folder)
    description = read_description(path)
    description["tokenizer_name"] = _tokenizer_beside(path, description.get("tokenizer_name"))
    data = (path / MODEL_FILE).read_bytes()
    try:
        model = OnnxModel(data, description, num_threads=num_threads, providers=providers)
    except Exception as error:
        raise DataError(f"ONNX Runtime cannot read {str(path / MODEL_FILE)!r}: {error}") from error
    prediction, given = description["prediction"], model.output_names
    wanted = names_in(prediction["layout"]) if "layout" in prediction else [prediction["boxes"]]
    if not {*wanted} <= {*given}:
        raise DataError(
            f"{str(path / EXPORT_FILE)!r} is damaged: prediction is made of {', '.join(wanted)}, and {MODEL_FILE} "
            f"gives {', '.join(given)}. Export the model anew."
        )
    return model


def _tokenizer_beside(folder: Path, name: object) -> str | None:
    """The name of an export's tokenizer: its folder, one that comes with open_clip, or None."""
    if name is None or name == HERE:
        return None if name is None else str(folder)
    if not isinstance(name, str) or not comes_with_open_clip(name):
        raise DataError(f"{str(folder)!r} names the tokenizer {name!r}. Only what lies beside it is loaded.")
    return name
