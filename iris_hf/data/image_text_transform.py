"""Transforms that make (image, tokens) pairs, from labelled images or from images with captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch

from iris_hf.data.transforms import as_pair_transform
from iris_hf.errors import ConfigError, DataError, require_names, unknown_name
from iris_hf.types import Transform

CaptionChoice = Literal["random", "first"]


def make_image_text_transform(
    image_transform: Transform,
    class_names: Sequence[str],
    prompt_generator: Callable[[str], list[str]] | None,
    tokenizer: Callable[[str], Any],
) -> ImageTextTransform:
    """Make the transform (image, class index) -> ((image, tokens of a prompt for the class), class index).

    The prompt is drawn from torch's global generator, which `train` seeds for every example and epoch: neither
    loader workers nor a resumed run change the choice.

    Args:
        image_transform: image -> tensor, or `(image, target) -> (tensor, target)`.
        class_names: In the order of the class indices.
        prompt_generator: Class name -> prompts, see :func:`iris_hf.create_classification_prompt_generator`; None
            takes the name as the only prompt.
        tokenizer: One text -> its tokens, see :func:`iris_hf.create_tokenizer`.

    Returns:
        A transform that pickles if its parts do. Class indices are ints, integer tensors `[]` or `[1]`, or lists of
        one; they come back as ints.

    Raises:
        ConfigError: If there are no class names, one is not a string, or a part is not callable.
    """
    require_names("class_names", class_names)
    for name, part in (("prompt_generator", prompt_generator or str), ("tokenizer", tokenizer)):
        _require_callable(name, part)
    return ImageTextTransform(image_transform, class_names, prompt_generator, tokenizer)


def make_image_caption_transform(
    image_transform: Transform, tokenizer: Callable[[str], Any], *, caption: CaptionChoice = "random"
) -> ImageCaptionTransform:
    """Make the transform ((image, caption), target) -> ((image, tokens), target).

    It is for data sets of captioned images, such as :func:`iris_hf.from_hf` makes with `target_type="image_text"`.

    Args:
        image_transform: image -> tensor, or `(image, target) -> (tensor, target)`.
        tokenizer: One text -> its tokens, see :func:`iris_hf.create_tokenizer`.
        caption: Which one is taken where an image has a list of captions: a `random` one, from torch's global
            generator, or the `first`, for evaluation.

    Returns:
        A transform that pickles if its parts do. Targets, as a rule None, pass through.

    Raises:
        ConfigError: If the choice is unknown or a part is not callable.
    """
    if caption not in get_args(CaptionChoice):
        raise unknown_name("caption choice", caption, get_args(CaptionChoice))
    _require_callable("tokenizer", tokenizer)
    return ImageCaptionTransform(image_transform, tokenizer, caption)


class ImageTextTransform:
    """Made by :func:`make_image_text_transform`.

    Attributes:
        class_names: In the order of the class indices.
    """

    def __init__(
        self,
        image_transform: Transform,
        class_names: Sequence[str],
        prompt_generator: Callable[[str], list[str]] | None,
        tokenizer: Callable[[str], Any],
    ) -> None:
        self.class_names = list(class_names)
        self._image_transform = as_pair_transform(image_transform)
        self._prompt_generator = prompt_generator
        self._tokenizer = tokenizer

    def __call__(self, image: Any, target: Any) -> tuple[tuple[Any, Any], int]:
        """Transform an image, and tokenize a random prompt for its class.

        Raises:
            DataError: If the target is no class index, or the class has no prompt.
        """
        pixels, target = self._image_transform(image, target)
        index = self._class_index(target)
        name = self.class_names[index]
        prompts = [name] if self._prompt_generator is None else self._prompt_generator(name)
        if not isinstance(prompts, list | tuple) or not prompts:
            raise DataError(f"The prompts of class {index} ({name!r}) must be a list of strings, got {prompts!r}.")
        prompt = _draw(prompts)
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"A prompt of class {index} ({name!r}) must be a text, got {prompt!r}.")
        return (pixels, self._tokenizer(prompt)), index

    def _class_index(self, target: Any) -> int:
        value = target
        if isinstance(value, torch.Tensor | list | tuple):
            values = value.flatten().tolist() if isinstance(value, torch.Tensor) else list(value)
            value = values[0] if len(values) == 1 else None
        index = value.__index__() if hasattr(value, "__index__") and not isinstance(value, bool) else None
        if index is None:
            raise DataError(f"The target must be one class index (an int, or a tensor or list of one), got {target!r}.")
        if not 0 <= index < len(self.class_names):
            raise DataError(
                f"The class index {index} is beyond the {len(self.class_names)} class_names "
                f"(0 to {len(self.class_names) - 1})."
            )
        return int(index)


class ImageCaptionTransform:
    """Made by :func:`make_image_caption_transform`.

    Attributes:
        caption: Which of several captions is taken.
    """

    def __init__(self, image_transform: Transform, tokenizer: Callable[[str], Any], caption: CaptionChoice) -> None:
        self.caption = caption
        self._image_transform = as_pair_transform(image_transform)
        self._tokenizer = tokenizer

    def __call__(self, pair: tuple[Any, Any], target: Any) -> tuple[tuple[Any, Any], Any]:
        """Transform the image, and tokenize its caption or one of them.

        Raises:
            DataError: If there is no pair of an image and captions, or a caption is empty, whether chosen or not.
        """
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise DataError(
                f"The input must be (image, caption), got a {type(pair).__name__}. For images with class indices there "
                "is make_image_text_transform."
            )
        image, captions = pair
        texts = [captions] if isinstance(captions, str) else captions
        if not isinstance(texts, list | tuple) or not texts:
            raise DataError(f"The caption must be a string or a list of strings, got {captions!r}.")
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"A caption is empty: {captions!r}. Drop the example or give it a caption.")
        text = _draw(texts) if self.caption == "random" else texts[0]
        pixels, target = self._image_transform(image, target)
        return (pixels, self._tokenizer(text)), target


def _draw(texts: Sequence[str]) -> str:
    return texts[int(torch.randint(len(texts), ()))] if len(texts) > 1 else texts[0]


def _require_callable(name: str, part: object) -> None:
    if not callable(part):
        raise ConfigError(f"{name} must be callable, got {part!r}.")
