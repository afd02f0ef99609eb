"""Retrieval between images and texts by the similarity of their features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iris_hf.errors import ConfigError, DataError
from iris_hf.metrics.arrays import require_rows, to_tensor

RECALL_AT = (1, 5, 10)
TILE = 2048
"""Edge of the blocks of similarities, the largest thing in memory: 16 MiB in float32."""
_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def evaluate_retrieval(
    image_features: Any,
    text_features: Any,
    image_ids: Any = None,
    text_ids: Any = None,
    *,
    recall_at: Sequence[int] = RECALL_AT,
) -> dict[str, Any]:
    """Recall at K and median rank of images searched by texts and of texts searched by images.

    Items are ranked by cosine similarity, computed in blocks, so that memory grows with `N + M` and not with `N * M`.
    A text belongs to every image with its id. The rank of a query is 1 + the number of items that don't belong to it
    and are at least as similar as the best one that does. So a tie counts against the model, also one within rounding
    (1e-6 in float32): features that are all equal find nothing. Recall at K is the part of the queries whose rank is
    at most K: of several captions of an image, finding one is enough (as in Karpathy and Fei-Fei, arXiv 1412.2306).

    Args:
        image_features: `[N, F]`, of any length above 0. Any tensor, array or list; tensors are compared on the device
            where the image features are.
        text_features: `[M, F]`.
        image_ids: Integers `[N]`. Without ids, image and text i belong together.
        text_ids: Integers `[M]`, the id of the image that each text belongs to.
        recall_at: The values of K.

    Returns:
        The scores of :class:`iris_hf.metrics.Retrieval`.

    Raises:
        ConfigError: If a K isn't a positive integer, or one kind of ids is given without the other.
        DataError: If there are no images or no texts, shapes or lengths don't fit, a feature is NaN, infinite or all
            zeros, or an image or a text has no partner.
    """
    recall_at = _checked(recall_at)
    images, texts = _to_features(image_features, "image"), _to_features(text_features, "text")
    if images.shape[1] != texts.shape[1]:
        raise DataError(f"Image features have {images.shape[1]} dimensions, text features {texts.shape[1]}.")
    if (image_ids is None) != (text_ids is None):
        given, missing = ("image_ids", "text_ids") if text_ids is None else ("text_ids", "image_ids")
        raise ConfigError(f"{given} without {missing}: give both, or none if image i belongs to text i.")
    if image_ids is None and len(images) != len(texts):
        raise DataError(
            f"{len(images)} images but {len(texts)} texts: give image_ids and text_ids to say which belong together."
        )
    positions = torch.arange(len(images))
    owners = positions if image_ids is None else _to_ids(image_ids, "image", len(images))
    owned = positions if text_ids is None else _to_ids(text_ids, "text", len(texts))
    return _scores(images, texts, owners, owned, recall_at)


class PairStatistics:
    """The features of the pairs, on the CPU; of an image with several texts, the feature that came first."""

    def __init__(self, *, recall_at: Sequence[int] = RECALL_AT) -> None:
        self._recall_at = _checked(recall_at)
        self._image_ids: dict[int, None] = {}  # in the order of the features
        self._images: list[Tensor] = []
        self._text_ids: list[Tensor] = []
        self._texts: list[Tensor] = []
        self._num_pairs = 0

    def __len__(self) -> int:
        return self._num_pairs

    def update(self, predictions: Any, targets: Any) -> None:
        """Keep a batch; see :class:`iris_hf.metrics.Retrieval` for shapes."""
        pairs = to_tensor(predictions, "Predictions").cpu()
        if pairs.ndim == 0 or (len(pairs) > 0 and (pairs.ndim != 3 or pairs.shape[1] != 2 or pairs.shape[2] == 0)):
            raise DataError(
                "Retrieval takes predictions [N, 2, F], the features of image and text of each pair, "
                f"got shape {list(pairs.shape)}."
            )
        ids = _to_ids(targets, "pair", len(pairs), self._num_pairs)
        if len(pairs) == 0:
            return
        if self._texts and pairs.shape[2] != self._texts[0].shape[1]:
            raise DataError(
                f"The features of this batch have {pairs.shape[2]} dimensions, those before {self._texts[0].shape[1]}."
            )
        _require_features(pairs[:, 0], "image", self._num_pairs)
        _require_features(pairs[:, 1], "text", self._num_pairs)
        first_rows: dict[int, int] = {}
        for row, number in enumerate(ids.tolist()):
            if number not in self._image_ids:
                first_rows.setdefault(number, row)
        self._image_ids |= dict.fromkeys(first_rows)
        self._images.append(pairs[list(first_rows.values()), 0])
        self._text_ids.append(ids)
        self._texts.append(pairs[:, 1].clone())
        self._num_pairs += len(pairs)

    def result(self) -> dict[str, Any]:
        """Return the scores, named in :class:`iris_hf.metrics.Retrieval`."""
        if self._num_pairs == 0:
            raise DataError("Retrieval among no pairs is undefined: the predictions and targets are empty.")
        image_ids = torch.tensor(list(self._image_ids))
        features = torch.cat(self._images), torch.cat(self._texts)
        return _scores(*features, image_ids, torch.cat(self._text_ids), self._recall_at)


def _scores(
    images: Tensor, texts: Tensor, image_ids: Tensor, text_ids: Tensor, recall_at: Sequence[int]
) -> dict[str, Any]:
    """Score checked features `[N, F]` and `[M, F]`."""
    has_text, has_image = torch.isin(image_ids, text_ids), torch.isin(text_ids, image_ids)
    require_rows(has_text, image_ids, "image id: must be the id of a text, too")
    require_rows(has_image, text_ids, "text id: must be the id of an image, too")
    text_ranks, image_ranks = _ranks(images, texts, image_ids, text_ids)
    scores: dict[str, Any] = {}
    for direction, ranks in (("text_to_image", text_ranks), ("image_to_text", image_ranks)):
        scores |= {f"{direction}_R@{k}": float((ranks <= k).double().mean()) for k in recall_at}
        scores[f"{direction}_median_rank"] = float(np.median(ranks.cpu().numpy()))
    return {**scores, "num_images": len(images), "num_texts": len(texts)}


@torch.no_grad()
def _ranks(images: Tensor, texts: Tensor, image_ids: Tensor, text_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ranks, from 1, of each text's best image `[M]` and of each image's best text `[N]`."""
    device, dtype = images.device, torch.promote_types(torch.promote_types(images.dtype, texts.dtype), torch.float32)
    images, texts = _normalised(images.to(dtype)), _normalised(texts.to(device, dtype))
    image_ids, text_ids = image_ids.to(device), text_ids.to(device)
    best_text, best_image = images.new_full((len(images),), -torch.inf), images.new_full((len(texts),), -torch.inf)
    for rows, columns in _tiles(len(images), len(texts)):
        belongs = image_ids[rows, None] == text_ids[columns]
        if belongs.any():
            similar = _similarities(images[rows], texts[columns]).masked_fill_(~belongs, -torch.inf)
            best_text[rows] = best_text[rows].maximum(similar.amax(1))
            best_image[columns] = best_image[columns].maximum(similar.amax(0))
    text_ranks, image_ranks = (torch.ones(len(f), dtype=torch.int64, device=device) for f in (texts, images))
    best_text, best_image = best_text - _TOLERANCE[dtype], best_image - _TOLERANCE[dtype]
    for rows, columns in _tiles(len(images), len(texts)):
        belongs = image_ids[rows, None] == text_ids[columns]
        similar = _similarities(images[rows], texts[columns]).masked_fill_(belongs, -torch.inf)
        image_ranks[rows] += (similar >= best_text[rows, None]).sum(1)
        text_ranks[columns] += (similar >= best_image[columns]).sum(0)
    return text_ranks, image_ranks


def _tiles(num_rows: int, num_columns: int) -> Iterator[tuple[slice, slice]]:
    for row in range(0, num_rows, TILE):
        for column in range(0, num_columns, TILE):
            yield slice(row, row + TILE), slice(column, column + TILE)


def _normalised(features: Tensor) -> Tensor:
    features = features / features.abs().amax(1, keepdim=True)  # whose squares don't overflow
    return torch.nn.functional.normalize(features, dim=1)


def _similarities(images: Tensor, texts: Tensor) -> Tensor:
    with torch.autocast(images.device.type, enabled=False):
        return images @ texts.T


def _checked(recall_at: Sequence[int]) -> tuple[int, ...]:
    values = tuple(recall_at) if isinstance(recall_at, Sequence) else ()
    if not values or not all(isinstance(k, int) and not isinstance(k, bool) and k >= 1 for k in values):
        raise ConfigError(f"recall_at must be a list of positive integers, such as [1, 5, 10], got {recall_at!r}.")
    return values


def _to_features(values: Any, name: str) -> Tensor:
    features = to_tensor(values, f"{name.capitalize()} features")
    if features.ndim > 0 and len(features) == 0:
        raise DataError(f"Retrieval is undefined without {name}s: there are no {name} features.")
    if features.ndim != 2 or features.shape[1] == 0:
        raise DataError(f"{name.capitalize()} features must have the shape [N, F], got {list(features.shape)}.")
    _require_features(features, name)
    return features


def _require_features(features: Tensor, name: str, first: int = 0) -> None:
    for what, bad in (("NaN or infinite", ~features.isfinite().all(1)), ("all zeros", (features == 0).all(1))):
        if bool(bad.any()):
            row = first + int(bad.to(torch.int8).argmax())
            raise DataError(f"Example {row}: the {name} feature is {what}, so it has no direction to compare.")


def _to_ids(values: Any, name: str, number: int, first: int = 0) -> Tensor:
    """Make int64 ids `[N]` on the CPU of `[N]` or `[N, 1]` whole numbers."""
    ids = to_tensor(values, f"The {name} ids").cpu()
    if ids.ndim not in (1, 2) or (ids.ndim == 2 and ids.shape[1] != 1):
        raise DataError(f"The {name} ids must be integers [N] or [N, 1], got shape {list(ids.shape)}.")
    if len(ids) != number:
        raise DataError(f"{number} {name}s but {len(ids)} ids: there must be one for each.")
    ids = ids.reshape(-1)
    whole = ids.to(torch.int64, copy=True)
    require_rows(whole == ids, ids, f"{name} id: must be an integer", first)
    return whole
