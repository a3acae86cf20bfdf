"""What pipelines refuse, in words."""

from __future__ import annotations

import difflib

from ..captions.model import EarlyExitVisionEncoderDecoder
from ..doors import CAPTIONING
from ..errors import UsageError
from ..families.base import IMAGE, TEXT, WRITING
from ..generation.language_model import EarlyExitLanguageModel
from ..modeling.operating import OperatingPoints
from ..serving.reader import reads_images


def task_of(model: object) -> str | None:
    """What a model with exits is for; `None` for other models."""
    if not isinstance(model, OperatingPoints):
        return None
    if isinstance(model, EarlyExitVisionEncoderDecoder):
        return CAPTIONING
    if isinstance(model, EarlyExitLanguageModel):
        return WRITING
    return IMAGE if reads_images(model) else TEXT  # type: ignore[arg-type]  # the rest comes with the stock class


def unknown_option(name: str, known: set[str]) -> UsageError:
    """The error for an option that no pipeline of the kind takes."""
    near = difflib.get_close_matches(name, known, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UsageError(f"The pipeline takes no {name!r}.{hint} It takes {', '.join(sorted(known))}.", field=name)


def other_model(model: object) -> UsageError:
    """The error for a model without exits, or one for another task."""
    name, task = type(model).__name__, task_of(model)
    if task is not None:
        return UsageError(f"{name} is for another task: ee.pipeline({task!r}, ...).", field="task", value=task)
    return UsageError(f"{name} has no exits; use transformers.pipeline, or give it exits first.", field="model")
