"""Operators that exporters write down for one image size only, in terms of others that they write down for all."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_PADS_LIKE_TENSORFLOW = re.compile(r"transformers\.models\.(mobilenet_v[12])\.modeling_\1")


class ExportableOperators(TorchFunctionMode):
    """A context in which some operators are computed in another way, with the same results.

    - Tensors made of lists of sizes stay dependent on the sizes.
    - `linspace` takes a number of steps that depends on the sizes.
    - Adaptive average pooling becomes two matrix products.
    - `fold` and `unfold` of patches that don't overlap become reshapes.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace a call where it is one of those."""
        return _REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def exportable_padding() -> Iterator[None]:
    """Let MobileNets of transformers pad by what the size of the images asks for, in place of Python numbers."""
    modules = [m for name, m in list(sys.modules.items()) if _PADS_LIKE_TENSORFLOW.fullmatch(name)]
    originals = [(module, module.apply_tf_padding) for module in modules]
    try:
        for module in modules:
            module.apply_tf_padding = _pad_same  # type: ignore[attr-defined]
        yield
    finally:
        for module, function in originals:
            module.apply_tf_padding = function  # type: ignore[attr-defined]


def _pad_same(images: Tensor, convolution: nn.Conv2d) -> Tensor:
    """Pad images so that a convolution gives ceil(size / stride) pixels, the odd one at the right and the bottom."""
    padding: list[Any] = []
    for axis in (1, 0):
        kernel, stride, dilation = (getattr(convolution, n)[axis] for n in ("kernel_size", "stride", "dilation"))
        total = kernel - 1 - (images.shape[2 + axis] - 1) % stride
        total = total.clamp(min=0) if isinstance(total, Tensor) else torch.sym_max(total, 0)  # type: ignore[no-untyped-call]
        padding += [total // 2 * dilation, (total - total // 2) * dilation]
    return F.pad(images, padding)


def _replace_tensor(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def make_tensor(data: Any, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Tensor:
        if not torch._C._is_tracing() or not _holds_tensors(data):
            return make(data, dtype=dtype, device=device, **kwargs)
        return _stack(data).to(dtype=dtype, device=device)

    return make_tensor


def _holds_tensors(data: Any) -> bool:
    return isinstance(data, list | tuple) and any(isinstance(d, Tensor) or _holds_tensors(d) for d in data)


def _stack(data: Any) -> Tensor:
    return torch.stack([_stack(d) for d in data]) if isinstance(data, list | tuple) else torch.as_tensor(data)


def _linspace(start: Any, end: Any, steps: Any, **kwargs: Any) -> Tensor:
    if isinstance(steps, int):
        return torch.linspace(start, end, steps, **kwargs)
    gaps = (steps - 1).clamp(min=1) if isinstance(steps, Tensor) else torch.sym_max(steps - 1, 1)  # type: ignore[no-untyped-call]
    made: Tensor = start + torch.arange(steps, **kwargs) * ((end - start) / gaps)
    return made


def _adaptive_avg_pool2d(images: Tensor, output_size: Any) -> Tensor:
    """Pool each edge by a matrix whose row i averages the pixels floor(i n / m) to ceil((i + 1) n / m) of n."""
    sizes = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    if None in sizes or sizes == (1, 1):
        return F.adaptive_avg_pool2d(images, output_size)
    rows, columns = (_pooling_matrix(images, axis, m) for axis, m in zip((2, 3), sizes, strict=True))
    return rows @ images @ columns.T


def _pooling_matrix(images: Tensor, axis: int, m: int) -> Tensor:
    n = images.shape[axis]
    # A pixel j of n is in the bin i of m if it begins before the bin's end and ends after its beginning.
    pixels = torch.arange(n, device=images.device)[None] * m
    bins = torch.arange(m, device=images.device)[:, None] * n
    inside = ((pixels < bins + n) & (pixels + m > bins)).to(images.dtype)
    return inside / inside.sum(1, keepdim=True)


def _unfold(images: Tensor, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> Tensor:
    if not _is_tiling(kernel_size, dilation, padding, stride):
        return F.unfold(images, kernel_size, dilation, padding, stride)
    (p, q), (n, c, height, width) = _pair(kernel_size), images.shape
    rows, columns = height // p, width // q
    tiles = images[:, :, : rows * p, : columns * q].reshape(n, c, rows, p, columns, q)
    return tiles.permute(0, 1, 3, 5, 2, 4).reshape(n, c * p * q, rows * columns)


def _fold(
    patches: Tensor, output_size: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> Tensor:
    if not _is_tiling(kernel_size, dilation, padding, stride):
        return F.fold(patches, output_size, kernel_size, dilation, padding, stride)
    (p, q), (height, width), n = _pair(kernel_size), _pair(output_size), patches.shape[0]
    rows, columns = height // p, width // q
    tiles = patches.reshape(n, patches.shape[1] // (p * q), p, q, rows, columns).permute(0, 1, 4, 2, 5, 3)
    images = tiles.reshape(n, patches.shape[1] // (p * q), rows * p, columns * q)
    return F.pad(images, (0, width - columns * q, 0, height - rows * p))


def _is_tiling(kernel_size: Any, dilation: Any, padding: Any, stride: Any) -> bool:
    return _pair(kernel_size) == _pair(stride) and _pair(dilation) == (1, 1) and _pair(padding) == (0, 0)


def _pair(value: Any) -> tuple[Any, Any]:
    return tuple(value) if isinstance(value, list | tuple) else (value, value)


_REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    torch.tensor: _replace_tensor(torch.tensor),
    torch.as_tensor: _replace_tensor(torch.as_tensor),
    torch.linspace: _linspace,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    F.unfold: _unfold,
    F.fold: _fold,
}
