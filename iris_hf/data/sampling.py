"""Fewer examples of each class, or more of the rare ones.

Examples are told apart by the classes that occur in them. One in which no class occurs (no boxes, no positive labels,
no pixels, no label) belongs to no class: it is never part of a few-shot sample and keeps weight 1 when classes are
balanced.
"""

from __future__ import annotations

import math
import random
import warnings
from collections import Counter
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from iris_hf.data.read_targets import get_classes_from_dataset
from iris_hf.data.selection import open_examples, select_examples
from iris_hf.errors import ConfigError, DataError, require_integer, require_number


def sample_few_shot_dataset(
    dataset: Dataset[Any], *, n_shot: int, random_seed: int = 0, strict: bool = False
) -> Dataset[Any]:
    """Pick at least `n_shot` examples of each class.

    The examples are shuffled, by ``random.Random(random_seed).shuffle`` as in irisml, so that a seed picks the same
    ones. Then each is added in which a class occurs that has fewer than `n_shot` examples so far. Images are not read
    where the data set can tell its targets alone.

    Args:
        dataset: Map-style; a data set of :func:`from_hf`, or a ``datasets.Dataset``, stays one.
        n_shot: Examples wanted of each class, positive.
        random_seed: Any integer.
        strict: Whether a class with fewer than `n_shot` examples is an error. The classes are those of the data set's
            ``num_classes`` if it has any, else those that occur.

    Returns:
        The examples in shuffled order.

    Raises:
        ConfigError: If `n_shot` is not positive, or the seed is no integer.
        DataError: If no class occurs, or, when strict, a class has too few examples.
    """
    require_integer("n_shot", n_shot, at_least=1)
    require_integer("random_seed", random_seed)
    examples = open_examples(dataset)
    classes = get_classes_from_dataset(examples)
    counts = _count_examples(classes)
    if strict:
        _check_enough(counts, n_shot, examples)
    order = list(range(len(classes)))
    random.Random(int(random_seed)).shuffle(order)
    missing = {index: min(n_shot, count) for index, count in counts.items()}
    chosen = []
    for example in order:
        if not missing:
            break
        useful = missing.keys() & classes[example]
        if not useful:
            continue
        chosen.append(example)
        for index in useful:
            missing[index] -= 1
            if missing[index] == 0:
                del missing[index]
    return select_examples(dataset, np.array(chosen, dtype=np.int64))  # type: ignore[no-any-return]


def make_oversampled_dataset(
    dataset: Dataset[Any],
    *,
    min_num_samples: int,
    oversampling_rate: float = 1.0,
    balance: bool = False,
    balance_weights_max: float = 5.0,
    balance_weights_min: float = 0.2,
    random_seed: int | None = None,
) -> Dataset[Any]:
    """Append examples that are drawn again, with replacement.

    Of `n` examples, ``max(0, min_num_samples - n, int((oversampling_rate - 1) * n))`` are drawn. With `balance`, a
    class that occurs in `count` examples weighs ``sqrt(mean count / count)``, clamped, and an example the product over
    its classes, at most `balance_weights_max`. Images are not read where the data set can tell its targets alone.

    Args:
        dataset: Map-style; a data set of :func:`from_hf`, or a ``datasets.Dataset``, stays one.
        min_num_samples: Least length of the result; 0 asks for none.
        oversampling_rate: Length of the result relative to the data set's, at least 1; rounded down.
        balance: Whether examples of rare classes are drawn more often. All are drawn alike otherwise.
        balance_weights_max: Greatest weight of a class, and of an example.
        balance_weights_min: Least weight of a class.
        random_seed: Any integer. None draws one from torch's global generator; give one where several processes make
            the data set that they train on together.

    Returns:
        All examples in order, then those drawn; the data set itself if none are.

    Raises:
        ConfigError: If an argument is out of its range.
        DataError: If there are no examples, or no classes to balance.
    """
    require_integer("min_num_samples", min_num_samples, at_least=0)
    for name, value in (
        ("oversampling_rate", oversampling_rate),
        ("balance_weights_min", balance_weights_min),
        ("balance_weights_max", balance_weights_max),
    ):
        require_number(name, value)
    if random_seed is not None:
        require_integer("random_seed", random_seed)
    if oversampling_rate < 1:
        raise ConfigError(f"oversampling_rate must be at least 1, which adds nothing, got {oversampling_rate}.")
    if not 0 <= balance_weights_min <= balance_weights_max or balance_weights_max == 0:
        raise ConfigError(
            "The balance weights need 0 <= balance_weights_min <= balance_weights_max and a positive maximum, "
            f"got balance_weights_min={balance_weights_min} and balance_weights_max={balance_weights_max}."
        )
    examples = open_examples(dataset)
    num_examples = len(examples)
    # 0.2 * 10 is less than 2 in floating point where 0.2 is 1.2 - 1
    num_draws = max(0, min_num_samples - num_examples, int((oversampling_rate - 1) * num_examples + 1e-9))
    if num_draws == 0:
        if balance:
            warnings.warn(
                f"balance has no effect: min_num_samples={min_num_samples} and oversampling_rate={oversampling_rate} "
                f"add nothing to {num_examples} examples.",
                stacklevel=2,
            )
        return dataset
    generator = torch.Generator().manual_seed(
        int(random_seed) if random_seed is not None else int(torch.randint(1 << 62, ()))
    )
    if balance:
        weights = balance_weights(
            get_classes_from_dataset(examples), minimum=balance_weights_min, maximum=balance_weights_max
        )
        drawn = _draw(weights, num_draws, generator)
    else:
        drawn = torch.randint(num_examples, (num_draws,), generator=generator)
    indices = np.concatenate([np.arange(num_examples), drawn.numpy()])
    return select_examples(dataset, indices)  # type: ignore[no-any-return]


def balance_weights(classes: list[list[int]], *, minimum: float, maximum: float) -> npt.NDArray[np.float64]:
    """How often each example is drawn, relative to the others, when classes are balanced.

    Args:
        classes: The classes that occur in each of N examples, each once.
        minimum: Least weight of a class.
        maximum: Greatest weight of a class, and of an example.

    Returns:
        Positive weights `[N]`, scaled so that the greatest is 1.

    Raises:
        DataError: If no class occurs.
    """
    counts = _count_examples(classes)
    mean = sum(counts.values()) / len(counts)
    log_weights = {
        index: math.log(min(max(math.sqrt(mean / count), minimum), maximum)) for index, count in counts.items()
    }
    # In logarithms: the product over hundreds of frequent classes would be zero.
    sums = np.array([math.fsum(log_weights[index] for index in row) for row in classes])
    capped = np.minimum(sums, math.log(maximum))
    weights: npt.NDArray[np.float64] = np.exp(capped - capped.max())
    return weights


def _draw(weights: npt.NDArray[np.float64], num_draws: int, generator: torch.Generator) -> torch.Tensor:
    """Draw indices with replacement; unlike `torch.multinomial`, from any number of examples."""
    ends = torch.from_numpy(weights).cumsum(0)
    points = torch.rand(num_draws, dtype=torch.float64, generator=generator) * ends[-1]
    return torch.searchsorted(ends, points, right=True).clamp(max=len(ends) - 1)


def _count_examples(classes: list[list[int]]) -> Counter[int]:
    counts = Counter(chain.from_iterable(classes))
    if not counts:
        raise DataError("No example of the data set has a class. Give targets with boxes, labels or masks.")
    return counts


def _check_enough(counts: Counter[int], n_shot: int, examples: Any) -> None:
    names = getattr(examples, "class_names", None) or []
    known = range(getattr(examples, "num_classes", None) or 0)
    few = [index for index in sorted(counts.keys() | set(known)) if counts[index] < n_shot]
    if few:
        listed = ", ".join(
            f"class {index}{f' ({names[index]!r})' if index < len(names) else ''} has {counts[index]}" for index in few
        )
        raise DataError(
            f"Fewer than n_shot={n_shot} examples: {listed}. Lower n_shot, add examples, or leave out strict."
        )
