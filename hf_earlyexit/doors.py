"""The named classes: a config and a model for every family and task, made when somebody first asks for them.

`EarlyExitRobertaConfig` and `EarlyExitRobertaForSequenceClassification` are attributes of this module like any others: they
can be imported and pickled. Transformers' Auto classes know all of them from the start, and load no family's code for that.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from os import PathLike
from threading import RLock
from typing import Any, NamedTuple

import transformers
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_layers import GenericForSequenceClassification

from .errors import UsageError
from .families import FAMILIES
from .families.base import IMAGE, TEXT, WRITING
from .modeling.configuration import EarlyExitClassifierConfig
from .modeling.loading import check_named_checkpoint
from .modeling.tasks import TASKS
from .values import unexpected

CAPTIONING = "early-exit-captioning"
CAPTIONER = "vision-encoder-decoder"
CAPTIONS = {
    "EarlyExitVisionEncoderDecoderConfig": "configuration",
    "EarlyExitVisionEncoderDecoder": "model",
    "EarlyExitCaptionProcessor": "processor",
}
_MAKING = RLock()


class Door(NamedTuple):
    """Names of a family's classes, and the type that its configs have."""

    config: str
    model: str
    model_type: str


def door_of(stock_type: str, task: str | None = None) -> Door:
    """The classes for a stock model type, such as "roberta".

    Args:
        stock_type: as transformers calls it.
        task: "text-generation" for the language models of families that have them; by default what the family does first.
    """
    kind = f"early_exit_{stock_type.replace('-', '_')}"
    if stock_type == CAPTIONER:
        config, model, _ = CAPTIONS
        return Door(config, model, kind)
    family = FAMILIES[stock_type]
    name = f"EarlyExit{family.name}"
    if task == WRITING:
        return Door(f"{name}LMConfig", f"{name}{family.writer}", f"{kind}_lm")
    return Door(f"{name}Config", f"{name}{TASKS[family.task].suffix}", kind)


def tasks_of(stock_type: str) -> tuple[str, ...]:
    """What models of a stock type do here, as transformers names its pipelines; what they do by default comes first."""
    if stock_type == CAPTIONER:
        return (CAPTIONING,)
    family = FAMILIES[stock_type]
    return (family.task, WRITING) if family.writer else (family.task,)


def _every_door() -> Iterator[tuple[str, str, Door]]:
    """Stock types, tasks and classes, in the order of the families."""
    for stock_type in (*FAMILIES, CAPTIONER):
        for task in tasks_of(stock_type):
            yield stock_type, task, door_of(stock_type, task)


def door_names() -> list[str]:
    """Names of all classes, in the order of the families."""
    names = [name for stock_type, _, door in _every_door() if stock_type != CAPTIONER for name in door[:2]]
    return names + list(CAPTIONS)


def __getattr__(name: str) -> Any:
    at = (CAPTIONER, CAPTIONING) if name in CAPTIONS else None
    at = at or next(((stock_type, task) for stock_type, task, door in _every_door() if name in door[:2]), None)
    if at is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _MAKING:
        if name not in globals():
            globals().update(_captions() if at[0] == CAPTIONER else _classes(*at))
    return globals()[name]


def from_pretrained(name: Any, task: str | None = None, **kwargs: Any) -> Any:
    """Load a model with exits, or a plain checkpoint whose exits are then new, through the class that suits its config.

    Args:
        name: folder or Hub id.
        task: as transformers names its pipelines, "text-classification", "image-classification" or "text-generation"; by
            default what the checkpoint was saved for, else what the family does first.
        kwargs: as for the class's own `from_pretrained`.

    Raises:
        UsageError: for a model type or task without exits; with the list of those that have them.
        CheckpointError: as for the class's own `from_pretrained`.

    Examples:
        >>> import tempfile
        >>> import hf_earlyexit as ee
        >>> from transformers import RobertaConfig, RobertaForSequenceClassification
        >>> shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        >>> stock = RobertaForSequenceClassification(RobertaConfig(vocab_size=9, **shape))
        >>> folder = tempfile.mkdtemp()
        >>> stock.save_pretrained(folder)
        >>> type(ee.from_pretrained(folder)).__name__
        'EarlyExitRobertaForSequenceClassification'
    """
    if not isinstance(name, (str, PathLike)):
        raise unexpected("name", name, "a folder or a Hub id")
    hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "subfolder", "local_files_only") if key in kwargs}
    stock_type, able = _door_in(name, task, **hub)
    return __getattr__(door_of(stock_type, able).model).from_pretrained(name, **kwargs)


def checkpoint_task(name: Any, **hub: Any) -> str:
    """What `from_pretrained` makes of a checkpoint where no task is named, as transformers names its pipelines.

    Args:
        name: folder or Hub id.
        hub: as for `from_pretrained`.

    Raises:
        UsageError: for a model type without exits.
    """
    return _door_in(name, None, **hub)[1]


def _door_in(name: Any, task: str | None, **hub: Any) -> tuple[str, str]:
    """The stock model type that a checkpoint's config tells, and the task.

    Raises:
        UsageError: for a type or task without exits; with the list of those that have them.
    """
    check_named_checkpoint(name)
    values = PreTrainedConfig.get_config_dict(name, **hub)[0]
    kind = values.get("model_type")
    at = next(((stock_type, able) for stock_type, able, door in _every_door() if kind == door.model_type), None)
    if at is None and kind in (*FAMILIES, CAPTIONER):
        tasks = tasks_of(kind)
        writes = len(tasks) > 1 and values.get("architectures") == [f"{FAMILIES[kind].name}{FAMILIES[kind].writer}"]
        at = kind, task if task in tasks else tasks[-1 if writes else 0]
    if at is None:
        raise UsageError(
            f"{name} is a model of type {kind!r}; types that can have exits are {', '.join((*FAMILIES, CAPTIONER))}.",
            field="model",
            value=kind,
        )
    if task not in (None, at[1]):
        able = " or ".join(map(repr, (at[1],) if kind not in (*FAMILIES, CAPTIONER) else tasks_of(kind)))
        raise UsageError(f"task is {task!r}; models of type {kind!r} do {able} here.", field="task", value=task)
    return at


# --- making classes -----------------------------------------------------------------------------------------------------


class _OwnBackbone:
    """Put before a stock classifier that asks AutoModel for its backbone: AutoModel would give it this very class."""

    stock_backbone: str

    def __init__(self, config: Any) -> None:
        super(GenericForSequenceClassification, self).__init__(config)  # type: ignore[misc]
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, getattr(transformers, self.stock_backbone)(config))  # type: ignore[attr-defined]
        self.score = nn.Linear(config.get_text_config().hidden_size, self.num_labels, bias=False)
        self.post_init()  # type: ignore[attr-defined]


def _classes(stock_type: str, task: str) -> dict[str, type]:
    """A family's config and model classes for a task, by name, known to the Auto classes."""
    door, family = door_of(stock_type, task), FAMILIES[stock_type]
    if task == WRITING:
        suffix, auto_model = family.writer, "AutoModelForCausalLM"
        own_config = import_module("hf_earlyexit.generation.configuration").EarlyExitLanguageModelConfig
        mixin = import_module("hf_earlyexit.generation.language_model").EarlyExitLanguageModel
    else:
        (suffix, auto_model, mixin), own_config = TASKS[task], EarlyExitClassifierConfig
    stock_config, stock = (getattr(transformers, f"{family.name}{end}") for end in ("Config", suffix))
    config: Any = strict(
        type(
            door.config,
            (own_config, stock_config),
            {
                "__module__": __name__,
                "__doc__": f"Fields of `{stock_config.__name__}` and of `{own_config.__name__}`, for `{door.model}`.",
                "model_type": door.model_type,
                "stock_model_type": stock_type,
                "door": door.model,
                "auto_models": ("AutoModel", auto_model),
            },
        )
    )
    generic = issubclass(stock, GenericForSequenceClassification)
    model = type(
        door.model,
        (mixin, *((_OwnBackbone,) if generic else ()), stock),
        {
            "__module__": __name__,
            "__doc__": f"`{stock.__name__}` with exits. It loads plain checkpoints and keeps their last answers to the bit; "
            "the stock class reads the folders it saves.",
            "__annotations__": {"config": config},
            "config_class": config,
            "family": family,
            "stock_backbone": f"{family.name}Model",
        },
    )
    for known, new in ((stock.__name__, door.model), (stock_type, door.model_type)):
        names = get_checkpoint_conversion_mapping(
            known
        )  # of tensors in older checkpoints; classes of others are passed over
        if names is not None:
            register_checkpoint_conversion_mapping(new, names, overwrite=True)
    _tell_auto_classes(config, model)
    return {door.config: config, door.model: model}


def _captions() -> dict[str, type]:
    """The captioner's classes, by name, known to the Auto classes."""
    classes = {name: getattr(import_module(f"hf_earlyexit.captions.{home}"), name) for name, home in CAPTIONS.items()}
    config, model, processor = classes.values()
    _tell_auto_classes(config, model)
    transformers.AutoProcessor.register(config, processor, exist_ok=True)
    return classes


def _tell_auto_classes(config: Any, model: type) -> None:
    AutoConfig.register(config.model_type, config, exist_ok=True)
    for name in config.auto_models:
        getattr(transformers, name).register(config, model, exist_ok=True)


# --- what transformers knows from the start -----------------------------------------------------------------------------


def _later(name: str) -> type:
    """Stands for a config class until somebody asks AutoConfig for it."""

    def made(cls: type, *args: Any, **kwargs: Any) -> Any:
        return __getattr__(name)(*args, **kwargs)

    def from_dict(*args: Any, **kwargs: Any) -> Any:
        return __getattr__(name).from_dict(*args, **kwargs)

    return type(name, (), {"__module__": __name__, "__new__": made, "from_dict": staticmethod(from_dict)})


def register_auto_classes() -> None:
    """Make AutoConfig know every model type; harmless when repeated. The other Auto classes learn of a family with it."""
    for _, _, door in _every_door():
        if door.config not in globals():
            AutoConfig.register(door.model_type, _later(door.config), exist_ok=True)


def register_processors() -> None:
    """Make AutoProcessor know the captioner's processor, which it looks for by name."""
    __getattr__("EarlyExitCaptionProcessor")


def register_pipelines() -> None:
    """Make `transformers.pipeline` know the task of captioners; the pipeline itself is loaded by who asks for it."""
    from transformers.pipelines import PIPELINE_REGISTRY  # brings all of transformers' pipelines with it

    PIPELINE_REGISTRY.supported_tasks[CAPTIONING] = {
        "impl": "hf_earlyexit.pipelines.EarlyExitCaptioningPipeline",
        "pt": (transformers.AutoModelForImageTextToText,),
        "type": "image",
    }


__all__ = ["IMAGE", "TEXT", "WRITING", "checkpoint_task", "door_names", "door_of", "from_pretrained"]
