"""The one place that looks at what a model offers: its training step and its prediction step.

DDP, FSDP and torch.compile see nothing but `forward`. Loops therefore prepare the module returned by
:func:`as_trainable` or :func:`as_predictor`, whose `forward` is the step, and never call a model's methods themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from iris_hf.errors import ConfigError


def as_trainable(model: nn.Module) -> Trainable:
    """Wrap a model in a module whose `forward(inputs, targets)` runs its training step.

    The model is not copied: it is the submodule `model` of the result.

    Args:
        model: Has `training_step(inputs, targets)`, or else `criterion` (a module, a function, or a property that
            returns one) beside `forward`.

    Raises:
        ConfigError: If the model has neither.
    """
    return Trainable(model)


def as_cacheable(model: nn.Module) -> Cacheable:
    """Wrap a model in a module whose `forward(inputs)` gives the features that its criterion takes.

    The model is not copied: it is the submodule `model` of the result.

    Args:
        model: Has `forward(inputs)` and `criterion(features, targets)`.

    Raises:
        ConfigError: If the model lacks one of them.
    """
    return Cacheable(model)


def as_predictor(model: nn.Module) -> Predictor:
    """Wrap a model in a module whose `forward(inputs)` gives its predictions.

    The model is not copied: it is the submodule `model` of the result.

    Args:
        model: Has `prediction_step(inputs)`, or else `predictor` beside `forward`, or else `forward` alone.

    Raises:
        ConfigError: If the model has none of them.
    """
    return Predictor(model)


class Trainable(nn.Module):
    """A model whose `forward` is its training step. Made by :func:`as_trainable`.

    Attributes:
        model: The model itself.
        criterion: The model's criterion where that is a module which the model does not hold as a submodule, so that
            it moves to the device, and its parameters are trained, with the model. Otherwise absent.
    """

    model: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        _require_module(model)
        self.model = model
        self._has_step = callable(getattr(model, "training_step", None))
        if not self._has_step:
            if not callable(getattr(model, "criterion", None)):
                raise ConfigError(
                    f"{type(model).__name__} cannot be trained: it has neither training_step(inputs, targets) -> "
                    "{'loss': scalar} nor a criterion(outputs, targets). Add one of them, or put a classifier behind "
                    "an encoder with append_classifier."
                )
            _require_forward(model)
            _adopt(self, "criterion", model)

    def forward(self, inputs: Any, targets: Any) -> dict[str, Any]:
        """Compute the loss of one batch.

        With a criterion in place of a step, two formats of the target contract are fitted to it: class indices
        `[N, 1]` lose their last axis for `CrossEntropyLoss` and `NLLLoss` over outputs `[N, C]`, and integer 0/1
        labels take the type of the outputs for `BCEWithLogitsLoss` and `BCELoss`. Any other criterion gets the
        targets as they are.

        Returns:
            A dict with at least `loss`, a scalar.

        Raises:
            ConfigError: If the step returns anything else.
        """
        if self._has_step:
            result = cast(Any, self.model).training_step(inputs, targets)
        else:
            criterion = _adopted(self, "criterion", self.model)
            outputs = self.model(inputs)
            result = {"loss": criterion(outputs, _fit_targets(criterion, outputs, targets))}
        return _checked_result(result, self.model, has_step=self._has_step)

    @property
    def gathers(self) -> bool:
        """Whether a loss is of the examples of several processes together (attribute `gathers` of the criterion)."""
        modules = self.model._modules if self._has_step else {"criterion": _adopted(self, "criterion", self.model)}
        return bool(getattr(modules.get("criterion"), "gathers", False))


class Cacheable(nn.Module):
    """A model in two parts: its features, and their criterion. Made by :func:`as_cacheable`.

    Attributes:
        model: The model itself.
        criterion: As in :class:`Trainable`.
    """

    model: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        _require_module(model)
        self.model = model
        if not callable(getattr(model, "criterion", None)):
            raise ConfigError(
                f"{type(model).__name__} has no criterion(features, targets), which a gradient cache needs apart from "
                "forward(inputs): it computes the loss of a whole batch from features that were made in parts. "
                "Add one, or use train."
            )
        _require_forward(model)
        _adopt(self, "criterion", model)

    def forward(self, inputs: Any, gradients: Gradients | None = None) -> Any:
        """Give the features of some examples, or, with gradients, the scalar whose derivative they are.

        Args:
            inputs: The examples. None, together with gradients, stands for no examples at all.
            gradients: The derivative of a loss by the features.

        Returns:
            What the model's forward returns; with gradients, what :meth:`weigh` says. Every trainable parameter takes
            part in that of None, with a gradient of zero.
        """
        if gradients is None:
            return self.model(inputs)
        if inputs is None:
            zeros = [parameter.flatten()[:1].sum() * 0 for parameter in self.parameters() if parameter.requires_grad]
            return _total([*self._products([], gradients), *zeros])
        tensors = feature_tensors(self.model(inputs))
        if gradients.expected is not None:
            _check_replay(tensors, gradients.expected)
        return self.weigh(tensors, gradients)

    def weigh(self, tensors: Sequence[Tensor], gradients: Gradients) -> Tensor:
        """Give the scalar that has these derivatives: the sum of tensors and parameters times their gradients."""
        return _total(self._products(tensors, gradients))

    def _products(self, tensors: Sequence[Tensor], gradients: Gradients) -> list[Tensor]:
        pairs = list(zip(tensors, gradients.features, strict=True))
        if gradients.parameters:
            parameters = dict(self.named_parameters())
            pairs += [(parameters[name], gradient) for name, gradient in gradients.parameters.items()]
        return [(tensor.to(by.dtype) * by).sum() for tensor, by in pairs if by is not None]

    def criterion_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the criterion where that is a module."""
        criterion = _adopted(self, "criterion", self.model)
        return list(criterion.parameters()) if isinstance(criterion, nn.Module) else []

    def measure(self, features: Any, targets: Any) -> dict[str, Any]:
        """Give `loss`, and what else the criterion's `measure(features, targets)` says where it has one.

        Raises:
            ConfigError: If the loss is no scalar.
        """
        criterion = _adopted(self, "criterion", self.model)
        if callable(getattr(criterion, "measure", None)):
            result = criterion.measure(features, targets)
        else:
            result = {"loss": criterion(features, _fit_targets(criterion, features, targets))}
        return _checked_result(result, self.model, has_step=False)

    @property
    def gathers(self) -> bool:
        """Whether the criterion itself brings together the features of several processes (attribute `gathers`)."""
        return bool(getattr(_adopted(self, "criterion", self.model), "gathers", False))


class Gradients(NamedTuple):
    """Derivatives of a loss.

    Attributes:
        features: By each of the feature tensors; None where there is none.
        parameters: By the parameters that the criterion uses, by their names; None leaves them out.
        expected: What the feature tensors are, to the bit; None when nobody checks.
    """

    features: Sequence[Tensor | None]
    parameters: Mapping[str, Tensor] | None = None
    expected: Sequence[Tensor] | None = None


def feature_tensors(features: Any) -> list[Tensor]:
    """List the tensors that a forward returned.

    Args:
        features: A tensor, or a list, tuple or dict of tensors.

    Raises:
        ConfigError: If it is anything else.
    """
    tensors: list[Any] = [features]
    if isinstance(features, Mapping):
        tensors = list(features.values())
    elif isinstance(features, (list, tuple)):
        tensors = list(features)
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise ConfigError(
            "A gradient cache needs a forward that returns a feature tensor [N, ...], or a list, tuple or dict of "
            f"feature tensors and scalars, got {_describe(features)}. Return tensors, or use train."
        )
    return tensors


def feature_names(features: Any) -> list[str]:
    """Name what :func:`feature_tensors` lists: by key in a dict, otherwise by position."""
    if isinstance(features, Mapping):
        return [repr(key) for key in features]
    return [str(position) for position in range(len(features) if isinstance(features, (list, tuple)) else 1)]


def like_features(features: Any, tensors: Sequence[Tensor]) -> Any:
    """Put tensors into the form of what a forward returned."""
    if isinstance(features, Mapping):
        return dict(zip(features, tensors, strict=True))
    if isinstance(features, tuple) and hasattr(features, "_fields"):
        return type(features)(*tensors)
    return type(features)(tensors) if isinstance(features, (list, tuple)) else tensors[0]


def _check_replay(tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for position, (again, before) in enumerate(zip(tensors, expected, strict=True)):
        if not torch.equal(again.detach(), before):
            difference = (again.detach().double() - before.double()).abs().max().item()
            raise ConfigError(
                f"Feature tensor {position} is another one in the second pass (largest difference {difference:.3g}): "
                "the model keeps state between calls, or draws random numbers from a generator of its own. Draw from "
                "the global generators of torch, numpy or python."
            )


def _total(products: Sequence[Tensor]) -> Tensor:
    """Add up scalars in the widest of their types, float32 at least."""
    dtype = functools.reduce(torch.promote_types, [product.dtype for product in products], torch.float32)
    return torch.stack([product.to(dtype) for product in products]).sum() if products else torch.zeros((), dtype=dtype)


class Predictor(nn.Module):
    """A model whose `forward` gives predictions. Made by :func:`as_predictor`.

    Attributes:
        model: The model itself.
        predictor: The model's predictor where that is a module which the model does not hold as a submodule.
            Otherwise absent.
    """

    model: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        _require_module(model)
        self.model = model
        self._has_step = callable(getattr(model, "prediction_step", None))
        self._has_predictor = not self._has_step and callable(getattr(model, "predictor", None))
        if not self._has_step:
            _require_forward(model)
        if self._has_predictor:
            _adopt(self, "predictor", model)

    def forward(self, inputs: Any) -> Any:
        """Give one prediction per example: a tensor `[N, ...]` or a list of N."""
        if self._has_step:
            return cast(Any, self.model).prediction_step(inputs)
        outputs = self.model(inputs)
        return _adopted(self, "predictor", self.model)(outputs) if self._has_predictor else outputs


def _require_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        advice = " Load a saved one with from_pretrained, an export with load_onnx." * isinstance(model, str | Path)
        raise ConfigError(f"A model must be a torch.nn.Module, got {type(model).__name__}.{advice}")


def _require_forward(model: nn.Module) -> None:
    if getattr(type(model), "forward", None) is nn.Module.forward:
        raise ConfigError(f"{type(model).__name__} has no forward(inputs). Define it, or define the steps themselves.")


def _adopt(wrapper: nn.Module, name: str, model: nn.Module) -> None:
    """Register the model's `name` on the wrapper if it is a module that the model does not hold."""
    function = getattr(model, name)
    if isinstance(function, nn.Module) and not any(function is m for m in model.modules()):
        wrapper.add_module(name, function)


def _adopted(wrapper: nn.Module, name: str, model: nn.Module) -> Any:
    return getattr(wrapper if name in wrapper._modules else model, name)


def _fit_targets(criterion: Any, outputs: Any, targets: Any) -> Any:
    if not isinstance(targets, Tensor) or not isinstance(outputs, Tensor) or targets.is_floating_point():
        return targets
    if isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss) and outputs.ndim == 2 and targets.shape[1:] == (1,):
        return targets.flatten()
    if isinstance(criterion, nn.BCEWithLogitsLoss | nn.BCELoss):
        return targets.to(outputs.dtype)
    return targets


def _checked_result(result: Any, model: nn.Module, *, has_step: bool) -> dict[str, Any]:
    loss = result.get("loss") if isinstance(result, dict) else None
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        source = "training_step must return {'loss': scalar}" if has_step else "criterion must return a scalar"
        raise ConfigError(f"{type(model).__name__}.{source}, got {_describe(result)}.")
    return {**result, "loss": loss.reshape(())} if loss.dim() else result


def _describe(result: object) -> str:
    if isinstance(result, dict):
        shown = {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in result.items()}
        return f"a dict with {shown}"
    return f"a tensor {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
