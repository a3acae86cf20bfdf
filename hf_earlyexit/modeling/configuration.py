"""What a model with exits is told by its config.json: where the exits are, what they look like, when a row leaves."""

# No `from __future__ import annotations` here: it would turn the type checks of strict configs off without a word.
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging

from ..errors import EarlyExitConfigError, EarlyExitError
from ..families import FAMILIES
from ..files import read_json
from ..policies import ExitPolicy
from ..problem_types import REGRESSION, SINGLE_LABEL
from ..registry import Registry
from ..signals import SIGNALS, known_signals
from ..values import MOST_LAYERS, is_real, is_whole
from .certificate import is_certificate, without_policy
from .gates import GATES
from .heads import HEADS
from .shim import LoadedByShim, auto_map, write_shim
from .sizes import check_raw, check_room, check_sizes, wrong

FORMAT_VERSION = "1.0"
EXACT = "exact"
DEFAULT = "default"  # in calibration.json: the policy that serves without a name

# what transformers raises over values that it did not expect; errors of this library are ValueErrors
UNREADABLE = (StrictDataclassError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)

logger = logging.get_logger(__name__)


@dataclass(kw_only=True)
class EarlyExitConfig(LoadedByShim):
    """Fields that every early-exit config adds to its stock config.

    Args:
        exit_layers: layers (1-based, ascending, the last one included) after which rows may leave; all by default.
        exit_head: kind of the exits before the last; of a classifier "linear-mean", "linear", "pooler" or "linear-cls".
        exit_gate: kind of the gates that learn when to leave: "linear", "mlp" or "mlp+logits"; `None` for none.
        exit_policy: `policy.to_dict()`; `None` for a model that always runs in full.
        exit_certificate: which heads, dtype and rows the policy's thresholds were chosen on; `None` if that is not known.
        exit_operating_points: policies to choose from at call time, by name; "exact" is the full model and always there.
        exit_point_certificates: certificates of those, by name.
        exit_forms: policy and certificate of other forms of the model, by form, as `keep_thresholds` writes them.
        exit_tokenizer: fingerprint of the tokenizer's vocabulary the model was saved with; `None` if that is not known.
        exit_cost: cost of leaving at each exit in layers, ascending; `None` for the layers' numbers.
        early_exit_version: format of the saved folder; `None` until a model with exits has been saved.

    Raises:
        EarlyExitConfigError: naming the field, its value and what is allowed.
        PolicyError, UnknownNameError: for an impossible policy.
    """

    exit_layers: list[int] | None = None
    exit_head: str = "linear-mean"
    exit_gate: str | None = None
    exit_policy: dict[str, Any] | None = None
    exit_certificate: dict[str, Any] | None = None
    exit_operating_points: dict[str, dict[str, Any]] | None = None
    exit_point_certificates: dict[str, dict[str, Any]] | None = None
    exit_forms: dict[str, dict[str, Any]] | None = None
    exit_tokenizer: str | None = None
    exit_cost: list[float | int] | None = None
    early_exit_version: str | None = None

    # what the stock config brings; class variables, as a field would be another of this config
    model_type: ClassVar[str]
    attribute_map: ClassVar[dict[str, str]]
    if TYPE_CHECKING:
        architectures: Any
        auto_map: Any
        problem_type: Any
        num_hidden_layers: int
        num_labels: Any
        id2label: Any
        label2id: Any

    stock_model_type: ClassVar[str]
    door: ClassVar[str]  # name of the model class
    auto_models: ClassVar[tuple[str, ...]] = ("AutoModel", "AutoModelForSequenceClassification")
    heads: ClassVar[Registry[Any]] = HEADS
    gates: ClassVar[Registry[Any]] = GATES

    def __post_init__(self, **kwargs: Any) -> None:
        check_raw({**vars(self), **kwargs})
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.check_exits()

    @property
    def num_exit_layers(self) -> int:
        """Layers L of the part that has the exits."""
        return self.num_hidden_layers

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; errors tell where the config came from."""
        with _errors_name(pretrained_model_name_or_path):
            made = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
            check_room(made[0] if isinstance(made, tuple) else made, pretrained_model_name_or_path)
            return made

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; the Auto classes come this way, and say from where."""
        with _errors_name(kwargs.get("name_or_path") or config_dict.get("_name_or_path")):
            if (field := without_policy(config_dict)) is not None and not kwargs.keys() & {field, "exit_policy"}:
                raise wrong(
                    field,
                    config_dict[field],
                    "the policy that it vouches for beside it, in exit_policy or exit_operating_points: restore that, or "
                    f"pass {field}=None to run without and calibrate again",
                )
            check_raw({**config_dict, **kwargs})
            made = super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
            check_room(made[0] if isinstance(made, tuple) else made, kwargs.get("name_or_path"))
            return made

    @classmethod
    def from_stock(cls, config: Any) -> Any:
        """This config, made from one of the stock family, as the Auto classes give it; one of this class stays as it is.

        Raises:
            EarlyExitConfigError: for a config of another family.
        """
        if isinstance(config, cls):
            return config
        kind = getattr(config, "model_type", None)
        if kind != cls.stock_model_type:
            raise wrong(
                "config", type(config).__name__, f"a {cls.__name__}, or a config of the model type {cls.stock_model_type}"
            )
        values = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
        return cls(**values)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; a plain checkpoint of the same family is a legitimate place to start from."""
        values, rest = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        kind = values.get("model_type", cls.model_type)
        if kind not in (cls.model_type, cls.stock_model_type):
            raise wrong(
                "model_type",
                kind,
                f"{cls.stock_model_type!r} or {cls.model_type!r}: the layers of another family do not fit",
            )
        if kind == cls.stock_model_type:
            values = {key: value for key, value in values.items() if key not in ("model_type", "architectures")}
            for depth in {
                "num_hidden_layers",
                cls.attribute_map.get("num_hidden_layers", "num_hidden_layers"),
            } & rest.keys():
                values[depth] = rest[depth]  # before the exits take their places
        return values, rest

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict[str, Any]:
        values: dict[str, Any] = cls._decode_special_floats(read_json(json_file, finite=False))  # type: ignore[attr-defined]
        return values

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers; beside a model's config goes the file that lets it load where this package is not imported."""
        if self.architectures == [self.door]:
            self.auto_map = auto_map(type(self).__name__, self.door, self.auto_models)
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            write_shim(Path(save_directory), type(self).__name__, self.door)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    @property
    def resolved_problem_type(self) -> str:
        """`problem_type`, or what the stock model would infer from the number of labels."""
        return self.problem_type or (REGRESSION if self.num_labels == 1 else SINGLE_LABEL)

    def check_exits(self) -> None:
        """Refuse fields that cannot work, before anything is allocated. Called by the config and again by the model."""
        count = self.num_exit_layers
        if not is_whole(count, 1, MOST_LAYERS):
            raise wrong("num_hidden_layers", count, f"a whole number from 1 to {MOST_LAYERS}")
        check_sizes(self)
        if self.exit_layers is None:
            self.exit_layers = list(range(1, count + 1))
        layers = self.exit_layers
        right = isinstance(layers, list) and layers and all(is_whole(layer, 1, count) for layer in layers)
        if not right or sorted(set(layers)) != layers or layers[-1] != count:
            raise wrong("exit_layers", layers, f"layer numbers from 1 to {count}, ascending, each once, ending at {count}")
        if self.exit_cost is not None:
            numbers = all(is_real(value) for value in self.exit_cost)
            if (
                len(self.exit_cost) != len(layers)
                or not numbers
                or not all(a < b for a, b in pairwise((0, *self.exit_cost)))
            ):
                raise wrong("exit_cost", self.exit_cost, f"{len(layers)} ascending numbers above 0")
        self.heads.get(self.exit_head)
        if self.exit_gate is not None:
            GATES.get(self.exit_gate)
        self.check_labels()
        self._check_version()
        if self.exit_policy is not None:
            self.check_policy(ExitPolicy.from_dict(self.exit_policy))
        for name, policy in (self.exit_operating_points or {}).items():
            self.check_operating_point(name, ExitPolicy.from_dict(policy))
        for form, stored in (self.exit_forms or {}).items():
            if set(stored) != {"policy", "certificate"} or not is_certificate(stored["certificate"]):
                raise wrong("exit_forms", {form: stored}, "for each form a policy and its certificate, or null")
            self.check_policy(ExitPolicy.from_dict(stored["policy"]))
        certificates = {"exit_certificate": self.exit_certificate, **(self.exit_point_certificates or {})}
        for name, certificate in certificates.items():
            if certificate is not None and not is_certificate(certificate):
                raise wrong(name, certificate, "a certificate as set_exit_policy writes it, or null")

    def check_labels(self) -> None:
        """Refuse labels that do not fit each other."""
        if not self.label2id or set(self.label2id) == {f"LABEL_{number}" for number in range(len(self.label2id))}:
            self.label2id = {name: number for number, name in self.id2label.items()}  # the names given are of one side alone
        if len(self.label2id or {}) != self.num_labels:
            raise wrong("label2id", self.label2id, f"{self.num_labels} labels, as many as id2label has")

    def check_operating_point(self, name: str, policy: ExitPolicy) -> None:
        """Refuse a name that cannot be used, and what `check_policy` refuses."""
        if not name or name == EXACT:
            raise wrong("exit_operating_points", name, f"names that are not empty and not {EXACT!r}, the full model")
        self.check_policy(policy)

    def check_policy(self, policy: ExitPolicy) -> None:
        """Refuse a policy made for other exits or another problem type, or one that reads signals the model lacks."""
        for name in known_signals(policy.asks):
            if (lack := SIGNALS.get(name).lacks(self)) is not None:
                words = f"{lack.expected}: the {policy.name} policy reads them"
                raise wrong(lack.field, getattr(self, lack.field, None), words)
        if policy.exit_layers is not None and list(policy.exit_layers) != self.exit_layers:
            raise wrong("exit_policy", list(policy.exit_layers), f"a policy for the exit layers {self.exit_layers}")
        early = len(self.exit_layers or ()) - 1
        if policy.num_exits != early + 1:
            raise wrong("exit_policy", list(policy.thresholds), f"{early} thresholds, one per exit but the last")
        if policy.problem_type != self.resolved_problem_type:
            raise wrong("exit_policy", policy.problem_type, f"a policy for {self.resolved_problem_type}")

    def _check_version(self) -> None:
        version = self.early_exit_version
        if version is None:
            return
        if not re.fullmatch(r"\d+\.\d+", version):
            raise wrong("early_exit_version", version, "a version such as '1.0'")
        (major, minor), (known_major, known_minor) = ([int(x) for x in v.split(".")] for v in (version, FORMAT_VERSION))
        if major > known_major:
            raise wrong(
                "early_exit_version", version, f"at most {known_major}.x; upgrade: pip install --upgrade hf_earlyexit"
            )
        if (major, minor) > (known_major, known_minor):
            logger.warning_once(
                f"The model was saved in format {version}; this library knows {FORMAT_VERSION} and ignores what is newer."
            )


class EarlyExitClassifierConfig(EarlyExitConfig):
    """What the configurations of all classifiers add: the row of their family.

    Raises:
        EarlyExitConfigError: for heads that borrow a pooler where the family has none, or a decoder's setting.
    """

    # a list, as Trainer adds another to it
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "exit_logits",
        "exit_scalars",
        "exit_layer",
        "exit_score",
        "hidden_states",
        "attentions",
    ]

    def check_exits(self) -> None:
        super().check_exits()
        family = FAMILIES[self.stock_model_type]
        if self.heads.get(self.exit_head).borrows_pooler and family.pool is None:
            able = ", ".join(name for name in self.heads.names() if not self.heads.get(name).borrows_pooler)
            raise wrong("exit_head", self.exit_head, f"one of {able}: {family.name} models have no pooler to borrow")
        if getattr(self, "is_decoder", False):
            raise wrong("is_decoder", True, "False: this class classifies with an encoder")


@contextmanager
def _errors_name(place: Any) -> Iterator[None]:
    """Add to errors the folder or Hub id whose config is at fault; wrong types become errors of this library."""
    try:
        yield
    except UNREADABLE as error:
        if place is None or (isinstance(error, EarlyExitError) and error.path is not None):
            raise
        kind = type(error) if isinstance(error, EarlyExitError) else EarlyExitConfigError
        field = re.search(r"field '(\w+)'", str(error))
        raise kind(
            f"config.json of {place}: {' '.join(str(error).split())}",
            field=getattr(error, "field", field and field[1]),
            value=getattr(error, "value", None),
            path=place,
        ) from error
