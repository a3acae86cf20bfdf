"""`ee.pipeline`: picks the pipeline of a task, and tells what keeps a model from it."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import AutoConfig, Pipeline

from ..doors import CAPTIONING
from ..errors import CheckpointError, EarlyExitError, UsageError
from ..families.base import IMAGE, TEXT, WRITING
from ..forms.convert import convert
from ..forms.speed import THROUGHPUT
from ..modeling.certificate import warn_of_other_tokenizer
from ..modeling.loading import check_input_parts, check_named_checkpoint
from ..modeling.tasks import TASKS
from ..modeling.wrapped import unwrapped
from ..registry import unknown_name
from .captioning import EarlyExitCaptioningPipeline
from .options import other_model, task_of
from .pictures import EarlyExitImageClassificationPipeline
from .texts import EarlyExitTextClassificationPipeline
from .writing import EarlyExitTextGenerationPipeline

LOADERS = {"tokenizer": "AutoTokenizer", "image_processor": "AutoImageProcessor"}


class PipelineKind(NamedTuple):
    """A task's pipeline, the Auto class of its models, and what makes its inputs."""

    pipeline: type[Pipeline]
    auto_model: str
    parts: tuple[str, ...]


KINDS = {
    TEXT: PipelineKind(EarlyExitTextClassificationPipeline, TASKS[TEXT].auto_model, ("tokenizer",)),
    IMAGE: PipelineKind(EarlyExitImageClassificationPipeline, TASKS[IMAGE].auto_model, ("image_processor",)),
    CAPTIONING: PipelineKind(EarlyExitCaptioningPipeline, "AutoModelForImageTextToText", ("tokenizer", "image_processor")),
    WRITING: PipelineKind(EarlyExitTextGenerationPipeline, "AutoModelForCausalLM", ("tokenizer",)),
}


def pipeline(
    task: str = "text-classification",
    model: Any = None,
    *,
    form: str | None = None,
    performance_hint: str = THROUGHPUT,
    **kwargs: Any,
) -> Any:
    """`transformers.pipeline` for models with exits: answers also tell where they left.

    Args:
        task: "text-classification", "image-classification", "text-generation" or "early-exit-captioning".
        model: a model with exits, also within torch.compile, DataParallel or PEFT; or the folder or Hub id of one; or an
            `OnnxClassifier`, together with `tokenizer` or `image_processor`.
        form, performance_hint: of a classifier, as in `convert`, with the thresholds that are kept for the form; each answer
            then tells its `form`.
        kwargs: as in `transformers.pipeline`; `operating_point`, the name of the policy to use; and for
            classifiers `cuda_graphs`, as in `predict`.

    Returns:
        A pipeline; call it with a text or a picture, or a list of them.

    Raises:
        UsageError: for a model without exits, or one for another task.
        UnknownNameError: for another task.
        CheckpointError: if the model is damaged.
    """
    if task not in KINDS:
        raise unknown_name("task", task, tuple(KINDS))
    kind = KINDS[task]
    if form is not None and task not in (TEXT, IMAGE):
        raise UsageError(f"form is {form!r}; forms are for classifiers, and the task is {task}.", field="form", value=form)
    if isinstance(model, (str, PathLike)):
        check_named_checkpoint(model)
        _check_task(model, kind)
        if "image_processor" in kind.parts:  # transformers tells of a missing tokenizer in so many words
            check_input_parts(model, kwargs, kind.parts)
    elif model is not None:
        model = unwrapped(model)
        if task_of(model) != task:
            raise other_model(model)
    try:
        pipe: Any = transformers.pipeline(  # type: ignore[call-overload]  # tasks of this library are none of its own
            task, model=model, pipeline_class=kind.pipeline, **kwargs
        )
    except EarlyExitError:
        raise
    except Exception as error:  # transformers wraps what a class said of a damaged folder into pages of its own
        if isinstance(model, (str, PathLike)) and Path(model).is_dir():
            _check_parts(Path(model), kind, kwargs, error)
        missing = [part for part in kind.parts if kwargs.get(part) is None]
        if model is not None and not isinstance(model, (str, PathLike)) and missing:
            raise UsageError(
                f"The {task} pipeline has no {missing[0]}, and the model does not tell where one is ({error}); pass "
                f"{missing[0]}=...",
                field=missing[0],
            ) from error
        raise
    if task_of(pipe.model) != task:
        raise other_model(pipe.model)
    warn_of_other_tokenizer(pipe.model, pipe.tokenizer)
    if form is not None:
        pipe.model = convert(pipe.model, form, performance_hint=performance_hint)
        pipe.tells_form = True
    return pipe


def _check_task(name: str | PathLike[str], kind: PipelineKind) -> None:
    """Refuse a folder whose model is for another task; what cannot be read is told of when it is loaded."""
    if not Path(name).is_dir():
        return
    try:
        config = AutoConfig.from_pretrained(name)
    except EarlyExitError:
        raise
    except Exception:
        return
    if kind.auto_model not in getattr(config, "auto_models", (kind.auto_model,)):
        raise UsageError(f"{name} holds an {config.door}, which is for another task.", field="task", value=config.door)


def _check_parts(folder: Path, kind: PipelineKind, given: dict[str, Any], error: Exception) -> None:
    """Load the parts of a folder one by one, to tell which of them is damaged.

    Raises:
        CheckpointError: naming it.
    """
    parts = {"model": kind.auto_model, **{part: LOADERS[part] for part in kind.parts if part not in given}}
    for part, loader in parts.items():
        try:
            getattr(transformers, loader).from_pretrained(folder)
        except EarlyExitError as fault:
            raise fault from None
        except Exception as fault:  # files of many kinds fail in many ways
            reason = next(iter(str(fault).splitlines()), type(fault).__name__)[:300]
            raise CheckpointError(
                f"The {part.replace('_', ' ')} in {folder} cannot be loaded ({reason}). Restore the folder's files.",
                field=part,
                path=folder,
            ) from error
