"""What thresholds are chosen for."""

from __future__ import annotations

import ast
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import CalibrationError
from ..registry import Registry
from ..values import check_real, plain, shown
from .exit_by_exit import LeaverRule
from .search import Array, Curve

TARGETS: Registry[type[Target]] = Registry("target")
LONGEST = 100_000  # characters; two constants for each of 1,024 exits take half of it


@dataclass(frozen=True)
class Target(ABC):
    """A wish that picks one point of a curve."""

    per_exit: ClassVar[bool] = False  # whether thresholds are chosen exit by exit unless the caller says otherwise
    example: ClassVar[str] = ""  # its fields in words, for errors
    named_by_words: ClassVar[frozenset[str]] = frozenset()  # fields that hold a word, not a number

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # numbers of NumPy or torch would not be read back from a printed target
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))

    @property
    def serves_single_threshold(self) -> bool:
        """Whether the wish makes sense for one threshold shared by all exits."""
        return True

    @property
    def promised_drop(self) -> float | None:
        """The most quality that is to be lost; `None` where the wish is about something else."""
        return None

    @abstractmethod
    def pick(self, curve: Curve) -> int:
        """Index of the point of `curve` that fulfils the wish best; point 0 is the full model.

        Raises:
            CalibrationError: if no point does.
        """

    def rules(self, quality: Array, min_leavers: int) -> list[LeaverRule]:
        """Ever laxer rules for per-exit thresholds; `pick` chooses among the outcomes.

        Args:
            quality: `[N, E]`.
            min_leavers: fewest rows an exit must have taken to be opened.
        """
        careful = [LeaverRule(None, sigmas=float(sigmas), min_leavers=min_leavers) for sigmas in np.linspace(3, 0, 25)]
        slacks = np.geomspace(1e-4, 1.0, 160) * max(float(np.ptp(quality)), 1e-12)
        return careful + [LeaverRule(None, slack=float(slack), min_leavers=min_leavers) for slack in slacks]

    def __str__(self) -> str:
        numbers = [f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self)]
        return f"{type(self).__name__}({', '.join(numbers)})"


@TARGETS.register("max-drop")
@dataclass(frozen=True)
class MaxDrop(Target):
    """The cheapest point that loses at most `drop` of the full model's quality on the calibration rows.

    Args:
        drop: in the unit of quality: 0.01 is one point of accuracy; 0 or more.
        sigmas: standard errors of the difference to keep in reserve. The cheapest point that just meets the target does
            so partly by luck; 1 takes most of that back.

    A drop of all the full model's quality permits every answer; calibrating with it warns, and the result notes it.

    Note:
        This is what the calibration rows showed, not a promise about others: see the standard error in the result.
    """

    example: ClassVar[str] = "0.01:sigmas=1"

    drop: float
    sigmas: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real(0, error=CalibrationError, drop=self.drop)
        check_real(0, error=CalibrationError, sigmas=self.sigmas)

    @property
    def promised_drop(self) -> float | None:
        return self.drop

    def pick(self, curve: Curve) -> int:
        spare = self.sigmas * curve.standard_error
        return _cheapest(curve, curve.quality - spare >= curve.quality[0] - self.drop - 1e-12)


@TARGETS.register("speed-up")
@dataclass(frozen=True)
class SpeedUp(Target):
    """The best point at which the full model's cost over the mean cost is at least `ratio`.

    Args:
        ratio: layer speed-up, from 1.
    """

    example: ClassVar[str] = "2"

    ratio: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real(1, error=CalibrationError, ratio=self.ratio)

    def pick(self, curve: Curve) -> int:
        return _best_within(curve, float(curve.cost[0]) / self.ratio, f"a layer speed-up of {self.ratio:g}")


@TARGETS.register("layer-budget")
@dataclass(frozen=True)
class LayerBudget(Target):
    """The best point whose mean cost is at most `layers`.

    Args:
        layers: mean layers per row, above 0.
    """

    example: ClassVar[str] = "5"

    layers: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real(1e-9, error=CalibrationError, layers=self.layers)

    def pick(self, curve: Curve) -> int:
        return _best_within(curve, self.layers, f"a budget of {self.layers:g} layers")


@TARGETS.register("final-layer-error")
@dataclass(frozen=True)
class FinalLayerError(Target):
    """No exit does worse than the last layer on the rows it takes (BEEM's condition, exit by exit).

    The largest error rate q allowed at exit i follows from the last layer's error rate p by
    q / (1 - q) = a_i / b_i^(i-1) * p / (1 - p). Exits that cannot satisfy it are closed.

    Args:
        paired: `True` compares each exit's leavers with the last layer's errors on the same rows. `False` is the paper's
            literal rule, p over all rows; since leavers are the easy rows it allows far more errors than the last layer
            makes on them, and loses accuracy.
        a, b: optional constants, one per exit but the last; 1 by default.
        sigmas: standard errors to keep in reserve.

    Paper: BEEM (https://arxiv.org/abs/2502.00745), Theorem 3.1 and section 3.4; `paired` and `sigmas` are ours.
    """

    paired: bool = True
    a: Sequence[float] | None = None
    b: Sequence[float] | None = None
    sigmas: float = 0.0

    per_exit: ClassVar[bool] = True
    example: ClassVar[str] = "sigmas=1"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real(0, error=CalibrationError, sigmas=self.sigmas)
        if self.paired and (self.a is not None or self.b is not None):
            raise CalibrationError(
                "The constants a and b belong to the literal rule; pass paired=False with them.", field="paired", value=True
            )

    def bound(self, last_error: float, num_exits: int) -> Array:
        """The largest error rate each exit's leavers may have, `[E - 1]`.

        Args:
            last_error: p, in `[0, 1]`.
            num_exits: E.
        """
        index = np.arange(num_exits - 1)
        a, b = (_constants(name, values, num_exits - 1) for name, values in (("a", self.a), ("b", self.b)))
        odds = a / b**index * last_error / max(1 - last_error, 1e-12)
        return odds / (1 + odds)

    def rules(self, quality: Array, min_leavers: int) -> list[LeaverRule]:
        if self.paired:
            return [LeaverRule(None, sigmas=self.sigmas, min_leavers=min_leavers)]
        if quality.min() < 0:
            raise CalibrationError("The literal rule needs error rates; on regression use FinalLayerError(paired=True).")
        bound = self.bound(1 - float(quality[:, -1].mean()), quality.shape[1])
        return [LeaverRule(bound, sigmas=self.sigmas, min_leavers=min_leavers)]

    @property
    def serves_single_threshold(self) -> bool:
        return self.paired

    @property
    def promised_drop(self) -> float | None:
        return 0.0 if self.paired else None

    def pick(self, curve: Curve) -> int:
        if self.paired:
            return _cheapest(curve, curve.quality >= curve.quality[0] - 1e-12)
        return len(curve.cost) - 1  # what its own rule gave


def parse_target(text: str) -> Target:
    """A target from words, or a printed one.

    Words are a name, its number if it has one, and any other field by name: `max-drop:0.01`, `max-drop:0.01:sigmas=1`,
    `speed-up:2`, `layer-budget:5`, `final-layer-error:paired=false`, `certified:0.01@0.95:risk=harm`.

    Raises:
        UnknownNameError: for an unknown name.
        CalibrationError: for a missing or impossible number, or a field the target has not.
    """
    if not isinstance(text, str) or len(text) > LONGEST:
        raise CalibrationError(
            f"target is {shown(text)}; expected words such as 'max-drop:0.01'.", field="target", value=text
        )
    for printed in map(TARGETS.get, TARGETS.names()):
        if text.startswith(f"{printed.__name__}(") and text.endswith(")"):
            return _parse_printed(printed, text)
    name, *words = (word.strip() for word in text.split(":"))
    cls = TARGETS.get(name)
    fields = [field.name for field in dataclasses.fields(cls)]
    has_number = any(field.default is dataclasses.MISSING for field in dataclasses.fields(cls))
    given: dict[str, object] = {}
    try:
        for place, word in enumerate(words):
            field, equals, value = (part.strip() for part in word.partition("="))
            if not equals and (place or not has_number):
                raise CalibrationError(f"{name} takes no number {word!r}; name its field")
            numbers = [(field, value)] if equals else zip(fields, word.split("@"), strict=False)  # 0.01@0.95
            for field, value in numbers:
                if field not in fields or field in given:
                    raise CalibrationError(f"{field!r} is given twice" if field in given else f"{name} has no {field!r}")
                given[field] = value if field in cls.named_by_words else _plain_value(value)
        if has_number and fields[0] not in given:
            raise CalibrationError(f"it has no {fields[0]}")
        return cls(**given)
    except CalibrationError as error:
        problem, example = str(error).removesuffix("."), ":".join(filter(None, (name, cls.example)))
        raise CalibrationError(
            f"Target {shown(text)}: {problem}; write it like `{example}`.", field="target", value=text
        ) from error


def _plain_value(word: str) -> object:
    """A number, a truth value or a list, as in Python; the first two in any case, as on a command line."""
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    try:
        value = ast.literal_eval(word)
        return float(value) if isinstance(value, int) else value
    except (ValueError, TypeError, SyntaxError, OverflowError, RecursionError, MemoryError) as error:
        raise CalibrationError(f"{shown(word)} is no number") from error


def _parse_printed(cls: type[Target], text: str) -> Target:
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call):
            raise ValueError("it is no call")
        numbers = [ast.literal_eval(value) for value in call.args]
        return cls(*numbers, **{word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg is not None})
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise CalibrationError(f"Target {shown(text)} cannot be read: {error}.", field="target", value=text) from error


def _constants(name: str, values: Sequence[float] | None, count: int) -> Array:
    try:
        array = np.ones(count) if values is None else np.asarray(values, dtype=float)
    except (TypeError, ValueError, OverflowError):
        array = np.empty(0)
    if array.shape != (count,) or not np.isfinite(array).all() or (array <= 0).any():
        raise CalibrationError(f"{name} is {values!r}; expected {count} numbers above 0.", field=name, value=values)
    return array


def _cheapest(curve: Curve, allowed: np.ndarray) -> int:
    cost = np.where(allowed, curve.cost, np.inf)
    return int(np.lexsort((-curve.quality, cost))[0])


def _best_within(curve: Curve, most: float, wish: str) -> int:
    allowed = curve.cost <= most + 1e-9
    if not allowed.any():
        raise CalibrationError(
            f"No threshold reaches {wish}: the cheapest setting still costs {curve.cost.min():.2f} layers a row. "
            "Ask for less, or add earlier exits; with classifiers, keep weak exits open with keep_weak_exits=True.",
            field="target",
        )
    quality = np.where(allowed, curve.quality, -np.inf)
    return int(np.lexsort((curve.cost, -quality))[0])
