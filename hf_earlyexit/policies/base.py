"""What an exit policy is: a pure function from the stream of exits to one score per row and exit.

A row leaves at the first exit whose score reaches that exit's threshold; the comparison is written once, in
`ExitPolicy.leaves`. Serving steps a policy exit by exit, calibration folds the very same `update` over a cached trace.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ..errors import PolicyError
from ..problem_types import PROBLEM_TYPES, SINGLE_LABEL
from ..registry import Registry
from ..signals import LOGITS, SIGNALS, ExitSignal, SignalSource, known_signals, missing, names_at
from ..values import DEEPEST, check_choice, check_layers, check_real, is_whole, plain, shown
from .scanning import LearningRows, Scan, scan

POLICIES: Registry[type[ExitPolicy]] = Registry("policy", group="hf_earlyexit.policies")


class ExitStep(NamedTuple):
    """Outcome of one exit: the next state, score `[B]`, answer `[B, C]` and who leaves `[B]` (bool)."""

    state: Any
    score: Tensor
    answer: Tensor
    leave: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitPolicy(ABC):
    """A rule that says when a row is decided.

    Subclass it, fill `init_state` and `update`, and register it by name; `check_exit_policy` then tells whether the
    subclass keeps the laws that serving and calibration rely on.

    Args:
        thresholds: one per exit but the last; a row leaves where its score is at or above the threshold; `None` closes
            the exit. In `[lowest_threshold, highest_threshold]`.
        muted: indices (0-based) of exits that are not looked at: no score, no vote. They must be closed.
        problem_type: `single_label_classification`, `multi_label_classification` or `regression`.
        exit_layers: layers (1-based) of all exits the thresholds were made for; `None` if unknown.

    Raises:
        PolicyError: for numbers out of range, or a problem type the rule cannot serve.
    """

    thresholds: tuple[float | None, ...]
    muted: tuple[int, ...] = ()
    problem_type: str = SINGLE_LABEL
    exit_layers: tuple[int, ...] | None = None

    problem_types: ClassVar[frozenset[str]] = frozenset(PROBLEM_TYPES)
    uses_history: ClassVar[bool] = True  # False: a score depends on its own exit alone, so closed exits are skipped
    asks: ClassVar[tuple[str, ...]] = (LOGITS,)  # what `update` reads; costly heads are asked only if logits are among it
    learns: ClassVar[bool] = False  # True: `learn` fits numbers to labelled rows
    counts: ClassVar[bool] = False  # True: scores are whole numbers, and so are thresholds
    lowest_threshold: ClassVar[float] = 0.0
    highest_score: ClassVar[float] = math.inf  # of any row at any exit
    citation: ClassVar[tuple[str, ...]] = ()  # BibTeX of the papers the rule comes from, for model cards

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # JSON brings lists
            object.__setattr__(self, field.name, _frozen(getattr(self, field.name)))
        self._validate_frame()
        self.validate()

    # --- what a rule fills in -------------------------------------------------------------------------------------

    @abstractmethod
    def init_state(self, batch_size: int, num_classes: int, device: torch.device | str) -> Any:
        """The state before the first exit: a NamedTuple of tensors, each with the rows first."""

    @abstractmethod
    def update(self, state: Any, signal: ExitSignal, exit_index: int) -> tuple[Any, Tensor, Tensor]:
        """One exit, pure and per row.

        Args:
            state: as returned by `init_state` or the last `update`.
            signal: of the rows in `state`.
            exit_index: 0-based.

        Returns:
            The next state, score `[B]` (float32, bigger is surer, never below 0), answer `[B, C]`.
        """

    @property
    def highest_threshold(self) -> float:
        """No score is ever above this; `inf` where scores have no bound."""
        return self.highest_score

    @classmethod
    def learn(cls, trace: LearningRows, **options: Any) -> dict[str, Any]:
        """Fields of the policy fitted to the rows of `trace`, an `ExitTrace` or what stands in for one; `options` win over
        defaults."""
        return options

    # --- what every rule shares -----------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The name the policy class is registered under."""
        return self._registered_name()

    @classmethod
    def _registered_name(cls) -> str:
        for name in POLICIES.names():
            if POLICIES.get(name) is cls:
                return name
        raise PolicyError(f"{cls.__name__} is not registered; decorate it with `@register_policy(name)`.")

    @property
    def num_exits(self) -> int:
        """Number of exits E, the last one included."""
        return len(self.thresholds) + 1

    @classmethod
    def from_trace(cls, trace: LearningRows, **options: Any) -> Self:
        """The policy for the exits of `trace`, its own numbers learned from it, every exit still closed."""
        cls._require_serves(trace.problem_type)  # before anything is learned from what the rule cannot read
        for name in names_at(known_signals(cls.asks), last=trace.num_exits == 1):
            if name not in trace.scalars:
                raise missing(name)
        given = {"thresholds": (None,) * (trace.num_exits - 1), "problem_type": trace.problem_type}
        learned = cls.learn(trace, **options)
        _refuse_unknown(cls, set(learned), {field.name for field in dataclasses.fields(cls)} - set(given))
        return cls(**{"exit_layers": tuple(trace.exit_layers), **given, **learned})

    def leaves(self, score: Tensor, exit_index: int) -> Tensor:
        """Who leaves at this exit, `[B]` booleans. The only place where a score meets a threshold."""
        if exit_index == len(self.thresholds):
            return torch.ones_like(score, dtype=torch.bool)
        threshold = self.thresholds[exit_index]
        return torch.zeros_like(score, dtype=torch.bool) if threshold is None else score >= threshold

    def step(self, state: Any, signal: ExitSignal, exit_index: int) -> ExitStep:
        """`update`, and who leaves."""
        state, score, answer = self.update(state, signal, exit_index)
        return ExitStep(state, score, answer, self.leaves(score, exit_index))

    def asks_at(self, exit_index: int) -> tuple[str, ...]:
        """Names of the scalars that `update` reads at an exit; override it where they differ from exit to exit."""
        return names_at((name for name in self.asks if name != LOGITS), last=exit_index == len(self.thresholds))

    @property
    def reads_logits(self) -> bool:
        """Whether the exits' logits are read, by the rule or by a signal that it asks for."""
        return any(name == LOGITS or SIGNALS.get(name).reads_logits for name in self.asks)

    def wants(self, exit_index: int) -> bool:
        """Whether serving must compute this exit's signal at all."""
        if exit_index == len(self.thresholds):
            return True
        return exit_index not in self.muted and (self.uses_history or self.thresholds[exit_index] is not None)

    @property
    def may_leave(self) -> bool:
        """Whether any exit is open; with every exit closed a model runs in full."""
        return any(threshold is not None for threshold in self.thresholds)

    def scan(self, trace: SignalSource) -> Scan:
        """Fold `update` over all exits of a trace.

        Returns:
            Scores `[N, E]` and answers `[N, E, C]`.
        """
        return scan(self, trace)

    def decide(self, scores: Tensor) -> Tensor:
        """Exit index of each row, `[N]`, from scores `[N, E]`."""
        leave = torch.stack([self.leaves(scores[:, index], index) for index in range(scores.shape[1])], 1)
        return leave.int().argmax(1)

    def with_thresholds(self, thresholds: float | tuple[float | None, ...] | None) -> Self:
        """The same policy with other thresholds; a single number serves every exit that is not muted."""
        thresholds = plain(thresholds)
        if thresholds is None or isinstance(thresholds, (int, float)):
            thresholds = tuple(None if i in self.muted else thresholds for i in range(len(self.thresholds)))
        return dataclasses.replace(self, thresholds=tuple(thresholds))

    def all_but(self, *names: str) -> tuple[Any, ...]:
        """The class and every field but some: equal in policies that differ in nothing else."""
        return type(self), *(getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in names)

    # --- as plain numbers -----------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: the name and every field. Doubles survive JSON exactly; a closed exit is `null`."""
        return {"name": self.name, **{f.name: _thawed(getattr(self, f.name)) for f in dataclasses.fields(self)}}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> ExitPolicy:
        """The policy that `to_dict` described.

        Raises:
            UnknownNameError: for a name no registry holds.
            PolicyError: for unknown, missing or impossible fields.
        """
        if not isinstance(values, dict) or "name" not in values:
            raise PolicyError(
                f"An exit policy is a dict with a 'name' and its numbers, as `policy.to_dict()` writes it: {shown(values)}.",
                field="exit_policy",
                value=values,
            )
        cls = POLICIES.get(values["name"])
        given = {key: value for key, value in values.items() if key != "name"}
        _refuse_unknown(cls, set(given), {field.name for field in dataclasses.fields(cls)})
        needed = [field.name for field in dataclasses.fields(cls) if field.default is field.default_factory]  # both missing
        if missing := [name for name in needed if name not in given]:
            raise PolicyError(f"The {values['name']} policy needs {' and '.join(missing)}.", field=missing[0])
        return cls(**given)

    @classmethod
    def _require_serves(cls, problem_type: str) -> None:
        check_choice(PROBLEM_TYPES, error=PolicyError, problem_type=problem_type)
        if problem_type not in cls.problem_types:
            able = [name for name in POLICIES.names() if problem_type in POLICIES.get(name).problem_types]
            raise PolicyError(
                f"The {cls._registered_name()} policy cannot serve {problem_type}; these can: {', '.join(able)}.",
                field="problem_type",
                value=problem_type,
            )

    def _validate_frame(self) -> None:
        """Check what every rule has, so that `validate` can rely on it."""
        self._require_serves(self.problem_type)
        known_signals(self.asks)
        if not isinstance(self.thresholds, tuple):
            raise PolicyError(
                f"thresholds is {shown(self.thresholds)}; expected a list with one number or null per exit but the last.",
                field="thresholds",
                value=self.thresholds,
            )
        if not isinstance(self.muted, tuple) or any(index in self.muted[:place] for place, index in enumerate(self.muted)):
            raise PolicyError(
                f"muted is {shown(self.muted)}; expected a list of indices, each once.", field="muted", value=self.muted
            )
        for index in self.muted:
            if not is_whole(index, 0, len(self.thresholds) - 1) or self.thresholds[index] is not None:
                raise PolicyError(
                    f"muted holds {shown(index)}; expected indices below {len(self.thresholds)} with threshold null.",
                    field="muted",
                    value=self.muted,
                )
        if self.exit_layers is None:
            return
        layers = self.exit_layers
        check_layers(layers, PolicyError)
        if len(layers) != self.num_exits:
            raise PolicyError(
                f"thresholds has {len(self.thresholds)} entries for {len(self.exit_layers)} exits; "
                f"expected {len(self.exit_layers) - 1}, one per exit but the last.",
                field="thresholds",
                value=self.thresholds,
            )

    def validate(self) -> None:
        """Check the rule's own numbers and the thresholds.

        Raises:
            PolicyError: naming field, value and what is allowed.
        """
        for index, threshold in enumerate(self.thresholds):
            if threshold is None:
                continue
            check_real(
                self.lowest_threshold, self.highest_threshold, error=PolicyError, **{f"thresholds[{index}]": threshold}
            )
            if self.counts and threshold != int(threshold):
                raise PolicyError(
                    f"thresholds[{index}] is {threshold!r}; the {self.name} policy counts, so expected a whole number.",
                    field=f"thresholds[{index}]",
                    value=threshold,
                )


def _frozen(value: Any, depth: int = 0) -> Any:
    if depth > DEEPEST:
        raise PolicyError(
            f"A list of the policy lies more than {DEEPEST} levels deep; expected numbers.", field="exit_policy"
        )
    value = plain(value)
    return tuple(_frozen(item, depth + 1) for item in value) if isinstance(value, (list, tuple)) else value


def _thawed(value: Any) -> Any:
    return [_thawed(item) for item in value] if isinstance(value, tuple) else value


def _refuse_unknown(cls: type[ExitPolicy], given: set[str], known: set[str]) -> None:
    if unknown := given - known:
        raise PolicyError(
            f"{cls.__name__} has no field {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}.",
            field=sorted(unknown)[0],
        )


def register_policy(name: str) -> Any:
    """Class decorator that makes a policy known by name to `calibrate`, configs and the command line."""
    return POLICIES.register(name)
