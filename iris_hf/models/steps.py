"""The one place that looks at what a model offers: its training step and its prediction step.

DDP, FSDP and torch.compile see nothing but `forward`. Loops therefore prepare the module returned by
:func:`as_trainable` or :func:`as_predictor`, whose `forward` is the step, and never call a model's methods themselves.
"""

from __future__ import annotations

from typing import Any, cast

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
        loss = result.get("loss") if isinstance(result, dict) else None
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            source = (
                "training_step must return {'loss': scalar}" if self._has_step else "criterion must return a scalar"
            )
            raise ConfigError(f"{type(self.model).__name__}.{source}, got {_describe(result)}.")
        return {**result, "loss": loss.reshape(())} if loss.dim() else cast("dict[str, Any]", result)


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
        raise ConfigError(f"A model must be a torch.nn.Module, got {type(model).__name__}.")


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


def _describe(result: object) -> str:
    if isinstance(result, dict):
        shown = {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in result.items()}
        return f"a dict with {shown}"
    return f"a tensor {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
