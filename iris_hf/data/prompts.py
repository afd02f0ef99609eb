"""Prompts for zero-shot classification: texts that describe a class by its name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

from torch.utils.data import Dataset

from iris_hf.errors import ConfigError, DataError, require_names, unknown_name
from iris_hf.types import TargetType

logger = logging.getLogger(__name__)

GeneratorName = Literal["clip_imagenet", "clip_imagenet_short", "template"]


def create_classification_prompt_generator(
    *, name: GeneratorName = "clip_imagenet", template: str | None = None
) -> PromptGenerator:
    """Create a function from a class name to its prompts.

    Args:
        name: ``"clip_imagenet"`` for the 80 templates of CLIP (arXiv 2103.00020) for ImageNet,
            ``"clip_imagenet_short"`` for the 7 that its authors chose among them, ``"template"`` for one of your own.
        template: Your own, which has to contain ``{}``, where the class name goes. None stands for ``"{}"``, the name
            alone, and so does an empty one. With another name it has no effect, and a warning says so.

    Returns:
        A picklable function: class name -> list of prompts.

    Raises:
        ConfigError: If the name is unknown, or the template has no ``{}``.
    """
    if name not in get_args(GeneratorName):
        raise unknown_name("prompt generator", name, get_args(GeneratorName))
    if name == "template":
        template = template or "{}"
        if not isinstance(template, str) or "{}" not in template:
            raise ConfigError(f"The template {template!r} must contain {{}}, where the class name goes.")
        return PromptGenerator((template,))
    if template:
        logger.warning("template=%r has no effect with name=%r. Give name='template'.", template, name)
    import open_clip

    short = name == "clip_imagenet_short"
    templates = open_clip.SIMPLE_IMAGENET_TEMPLATES if short else open_clip.OPENAI_IMAGENET_TEMPLATES
    return PromptGenerator(tuple(fill("{}") for fill in templates))


class PromptGenerator(NamedTuple):
    """Puts a class name into templates.

    Attributes:
        templates: Each contains ``{}``; all other characters, braces included, stand for themselves.
    """

    templates: tuple[str, ...]

    def __call__(self, class_name: str) -> list[str]:
        """Give one prompt for each template.

        Args:
            class_name: What replaces ``{}``.

        Raises:
            ConfigError: If it is no string.
        """
        if not isinstance(class_name, str):
            raise ConfigError(f"A prompt is made of a class name, not of {class_name!r}. Take it from class_names.")
        return [template.replace("{}", class_name) for template in self.templates]


def build_classification_prompt_dataset(
    class_names: Sequence[str], prompt_generator: Callable[[str], list[str]] | None = None
) -> PromptDataset:
    """Make a data set of (prompt, class index) for every prompt of every class, in class order.

    Args:
        class_names: In the order of the class indices.
        prompt_generator: Class name -> prompts; None takes the name as the only prompt.

    Raises:
        ConfigError: If there are no class names, or one is not a string.
        DataError: If the generator gives something else than a list of strings, or none, for a class.
    """
    require_names("class_names", class_names)
    if prompt_generator is not None and not callable(prompt_generator):
        raise ConfigError(
            f"prompt_generator must be a function, such as create_classification_prompt_generator gives, or None, got "
            f"{prompt_generator!r}."
        )
    prompts = []
    for index, class_name in enumerate(class_names):
        texts = [class_name] if prompt_generator is None else prompt_generator(class_name)
        is_list = isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts)
        if not is_list or not texts:
            raise DataError(f"The prompts of class {index} ({class_name!r}) must be a list of strings, got {texts!r}.")
        prompts += [(text, index) for text in texts]
    return PromptDataset(prompts, list(class_names))


class PromptDataset(Dataset[Any]):
    """Prompts as (text, class index).

    Attributes:
        class_names: In the order of the class indices.
        target_type: Always multiclass.
    """

    target_type: TargetType = "multiclass"

    def __init__(self, prompts: list[tuple[str, int]], class_names: list[str]) -> None:
        self.class_names = class_names
        self._prompts = prompts

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self._prompts[index]

    def get_targets(self, index: int) -> int:
        """Give the class index of one prompt.

        Args:
            index: Position of the prompt.
        """
        return self._prompts[index][1]
