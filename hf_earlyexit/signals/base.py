"""What a signal is: one number per row, made by name from what stands at an exit.

A policy asks for signals by name; models, traces and exported graphs hold them under these names.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from ..errors import PolicyError, UnknownNameError
from ..registry import Registry

SIGNALS: Registry[type[Signal]] = Registry("signal", group="hf_earlyexit.signals")
LOGITS = "logits"  # what policies may ask for besides scalars: the exit's own answer


class ExitSignal(NamedTuple):
    """What one exit tells about the rows that reached it.

    Attributes:
        logits: the exit head's output `[B, C]`, any float dtype; `[B, 0]` where the rule does not read it.
        scalars: the signals that were asked for `[B]`, any float dtype, by the names of `SIGNALS`.
    """

    logits: Tensor
    scalars: Mapping[str, Tensor] = MappingProxyType({})

    def scalar(self, name: str) -> Tensor:
        """A signal `[B]` in float32.

        Raises:
            PolicyError: if the exit does not give it, with what to do.
        """
        if name not in self.scalars:
            raise missing(name)
        return self.scalars[name].float()


class SignalSource(Protocol):
    """Anything that holds every exit's signals for a set of rows, such as an `ExitTrace`."""

    @property
    def num_exits(self) -> int: ...

    def signal(self, exit_index: int) -> ExitSignal: ...


class ExitPoint(NamedTuple):
    """What stands at an exit, for the B rows that reached it.

    Attributes:
        logits: the exit's answer `[B, C]`; `None` where neither the policy nor a signal that it asks for reads it.
        pooled: what the exit's head and gate read `[B, H]`; `None` at the last exit, which has no head of its own.
        before, after: states before and after the exit's layer `[B, H]`: of the token that answers where the exit reads one
            token, else the mean of the real tokens; `None` where no signal asked for reads them.
        gate: the exit's gate; `None` where it has none.
    """

    logits: Tensor | None
    pooled: Tensor | None = None
    before: Tensor | None = None
    after: Tensor | None = None
    gate: nn.Module | None = None


class Lack(NamedTuple):
    """Why a model cannot give a signal: the config's field at fault, and what was expected of it."""

    field: str
    expected: str


class Signal(ABC):
    """A number per row and exit. Subclass it, fill `of`, and register it by name; instances are never made.

    Class variables say what `of` reads and what comes of it, so that nothing is computed that nobody asks for.
    """

    words: ClassVar[str] = "numbers"  # the plural that errors use
    cure: ClassVar[str] = "collect the trace again, from a model that gives them"  # what to do where they are missing
    reads_logits: ClassVar[bool] = False  # decoders compute words only where somebody reads them
    reads_states: ClassVar[bool] = False  # the states before and after the layer
    at_last: ClassVar[bool] = True  # whether the last exit, where everybody leaves, gives it too
    learned: ClassVar[bool] = False  # made by weights that training teaches, so a full pass always gives it
    bounds: ClassVar[tuple[float, float]] = (-math.inf, math.inf)  # no value is outside

    @staticmethod
    @abstractmethod
    def of(point: ExitPoint) -> Tensor:
        """The signal `[B]` of any float dtype, finite; per row, and the same to the bit in every batch size."""

    @classmethod
    def lacks(cls, config: Any) -> Lack | None:
        """Why models with this config cannot give the signal; `None` where they can."""
        return None


def register_signal(name: str) -> Callable[[type[Signal]], type[Signal]]:
    """Class decorator that makes a signal known by name to policies, models and traces.

    Raises:
        UnknownNameError: for a name that is taken, or that is no identifier with `-` for `_`.
    """
    if name == LOGITS or not name.replace("-", "_").isidentifier():
        raise UnknownNameError(
            f"A signal cannot be called {name!r}; expected a word such as 'similarity', and not {LOGITS!r}.",
            field="name",
            value=name,
        )
    return SIGNALS.register(name)


def known_signals(names: Iterable[str]) -> tuple[str, ...]:
    """The names of scalars among what a policy asks for, each known.

    Raises:
        UnknownNameError: with the nearest name and the whole list.
    """
    scalars = tuple(name for name in names if name != LOGITS)
    for name in scalars:
        SIGNALS.get(name)
    return scalars


def names_at(names: Iterable[str], last: bool) -> tuple[str, ...]:
    """Those of some signals that an exit gives, the last one or another."""
    return tuple(name for name in names if not last or SIGNALS.get(name).at_last)


def signals_of(config: Any) -> tuple[str, ...]:
    """Names of the signals that models with this config can give."""
    return tuple(name for name in SIGNALS.names() if SIGNALS.get(name).lacks(config) is None)


def scalars_of(names: Iterable[str], point: ExitPoint) -> dict[str, Tensor]:
    """Some signals of the rows at an exit, `[B]` each, by name."""
    return {name: SIGNALS.get(name).of(point) for name in names}


def missing(name: str) -> PolicyError:
    """The error of a rule that reads a signal which is not there."""
    signal = SIGNALS.get(name)
    return PolicyError(f"The policy reads {signal.words} ({name!r}), and there are none: {signal.cure}.", field=name)
