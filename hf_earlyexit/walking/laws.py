"""What every exit policy must keep, as checks that anybody can run on their own."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import PolicyError
from ..policies.base import ExitPolicy
from ..policies.scanning import Scan
from ..problem_types import REGRESSION
from ..signals import SIGNALS, ExitSignal, known_signals
from .loop import run_early
from .step import Standing, Walks, step_to_exit, stretches

ROWS = 64


class _Rows(NamedTuple):
    """The rows that still run, as the context of hidden states that are nothing but their numbers `[B]`."""

    def count(self, hidden: Tensor) -> int:
        return len(hidden)

    def take(self, hidden: Tensor, rows: Sequence[int], index: Tensor) -> tuple[Tensor, _Rows]:
        return hidden[index], self


class _Walker(Walks):
    """Walks random exits, a layer each, as the loop walks a model; what it tells of a row hangs on its number."""

    def __init__(self, signals: _Signals) -> None:
        self.signals, self.exit_layers = signals, tuple(range(1, signals.num_exits + 1))

    def run_layer(self, layer: int, hidden: Tensor, context: _Rows) -> Tensor:
        return hidden

    def exit_signal(
        self, exit_index: int, hidden: Tensor, context: _Rows, asks: Sequence[str] = (), before: Tensor | None = None
    ) -> ExitSignal:
        logits, scalars = self.signals.rows(hidden).signal(exit_index)
        return ExitSignal(logits, {name: scalars[name] for name in asks})


class _Signals(NamedTuple):
    """Random exits that often agree, as a signal source: logits `[N, E, C]`, and signals `[N, E]` by name."""

    logits: Tensor
    scalars: dict[str, Tensor]

    @property
    def num_exits(self) -> int:
        return self.logits.shape[1]

    def signal(self, exit_index: int) -> ExitSignal:
        return ExitSignal(self.logits[:, exit_index], {name: values[:, exit_index] for name, values in self.scalars.items()})

    def rows(self, rows: Tensor | slice) -> _Signals:
        return _Signals(self.logits[rows], {name: values[rows] for name, values in self.scalars.items()})

    def copy(self) -> _Signals:
        return _Signals(self.logits.clone(), {name: values.clone() for name, values in self.scalars.items()})

    def equals(self, other: _Signals) -> bool:
        return torch.equal(self.logits, other.logits) and all(
            torch.equal(values, other.scalars[name]) for name, values in self.scalars.items()
        )

    @classmethod
    def random(cls, policy: ExitPolicy, seed: int = 0) -> _Signals:
        generator = torch.Generator().manual_seed(seed)
        classes = 1 if policy.problem_type == REGRESSION else 3
        steps = torch.randn(ROWS, policy.num_exits, classes, generator=generator)
        names = known_signals(policy.asks)
        drawn = {name: torch.randn(ROWS, policy.num_exits, generator=generator) for name in names}
        return cls(steps.cumsum(1), {name: _within(SIGNALS.get(name).bounds, values) for name, values in drawn.items()})


def _within(bounds: tuple[float, float], values: Tensor) -> Tensor:
    """Any real numbers, brought between two bounds."""
    lowest, highest = bounds
    if math.isfinite(lowest) and math.isfinite(highest):
        return lowest + (highest - lowest) * values.sigmoid()
    if math.isfinite(lowest):
        return lowest + values.abs()
    return highest - values.abs() if math.isfinite(highest) else values


def served_exits(policy: ExitPolicy, signals: _Signals, drop_rows: bool = True) -> tuple[Tensor, Tensor]:
    """Step a policy as serving does: rows leave at their exit and are dropped.

    Returns:
        Exit index `[N]` and the score each row left with `[N]`.
    """
    walker, (count, _, classes) = _Walker(signals), signals.logits.shape
    numbers = torch.arange(count)
    if drop_rows:
        early = run_early(walker, numbers, _Rows(), policy, classes)
        return early.exit_index, early.score
    exits, scores = torch.full((count,), -1), torch.zeros(count)
    rows = Standing(numbers, _Rows(), policy.init_state(count, classes, signals.logits.device))
    for layers, index in stretches(walker, policy.wants):
        rows, outcome = step_to_exit(walker, layers, rows, policy, index)
        assert outcome is not None  # an exit was asked
        fresh = outcome.leave & (exits < 0)
        exits[fresh], scores[fresh] = index, outcome.score[fresh]
    return exits, scores


def _same(first: Scan, second: Scan) -> bool:
    return torch.equal(first.scores, second.scores) and torch.equal(first.answers, second.answers)


def _looked_at(policy: ExitPolicy, scores: Tensor) -> Tensor:
    return scores[:, [index for index in range(policy.num_exits) if index not in policy.muted]]


def serving_equals_scan(policy: ExitPolicy) -> bool:
    """Rows leave in serving where the scan over all exits says, with the same scores."""
    signals = _Signals.random(policy)
    scores = policy.scan(signals).scores
    exits, at_exit = served_exits(policy, signals)
    return torch.equal(exits, policy.decide(scores)) and torch.equal(at_exit, scores[torch.arange(ROWS), exits])


def dropping_rows_changes_nothing(policy: ExitPolicy) -> bool:
    """Who has left matters to nobody who stays."""
    signals = _Signals.random(policy)
    return torch.equal(served_exits(policy, signals)[0], served_exits(policy, signals, drop_rows=False)[0])


def rows_do_not_see_each_other(policy: ExitPolicy) -> bool:
    """A row alone scores what it scores in company, and leaves where it leaves in company."""
    signals = _Signals.random(policy)
    whole = policy.scan(signals)
    alone = [policy.scan(signals.rows(slice(i, i + 1))) for i in range(ROWS)]
    together = Scan(*(torch.cat(parts) for parts in zip(*alone, strict=True)))
    decided = torch.cat([policy.decide(one.scores) for one in alone])
    return _same(whole, together) and torch.equal(policy.decide(whole.scores), decided)


def order_of_rows_is_free(policy: ExitPolicy) -> bool:
    """Shuffled rows give shuffled scores."""
    signals, order = _Signals.random(policy), torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    whole = policy.scan(signals)
    return _same(Scan(whole.scores[order], whole.answers[order]), policy.scan(signals.rows(order)))


def same_input_same_output(policy: ExitPolicy) -> bool:
    """Nothing is random, nothing is remembered between calls."""
    return _same(policy.scan(_Signals.random(policy)), policy.scan(_Signals.random(policy)))


def inputs_and_policy_stay_untouched(policy: ExitPolicy) -> bool:
    """Neither the signals nor the state nor the policy are written to."""
    signals, before = _Signals.random(policy), copy.deepcopy(policy)
    kept = signals.copy()
    state = policy.init_state(ROWS, signals.logits.shape[-1], "cpu")
    for index in range(policy.num_exits):
        if index in policy.muted:
            continue
        given = copy.deepcopy(state)
        after, *_ = policy.update(state, signals.signal(index), index)
        if not all(torch.equal(a, b) for a, b in zip(state, given, strict=True)):
            return False
        state = after
    return policy == before and signals.equals(kept)


def state_is_tensors_with_rows_first(policy: ExitPolicy) -> bool:
    """The state can be cut row by row."""
    state = policy.init_state(5, 3, "cpu")
    return isinstance(state, tuple) and all(isinstance(part, Tensor) and part.shape[0] == 5 for part in state)


def shapes_and_dtype_are_right(policy: ExitPolicy) -> bool:
    """Scores are float32 `[N, E]`, answers `[N, E, C]`."""
    signals = _Signals.random(policy)
    scores, answers = policy.scan(signals)
    return (
        scores.shape == signals.logits.shape[:2] and scores.dtype == torch.float32 and answers.shape == signals.logits.shape
    )


def scores_are_finite_and_not_negative(policy: ExitPolicy) -> bool:
    """So it is for logits up to 1e4 in float32, bfloat16 and float16."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for scale in (1.0, 100.0, 1e4):
            base = _Signals.random(policy)
            logits = (base.logits / base.logits.abs().max() * scale).to(dtype)
            narrow = _Signals(logits, {name: values.to(dtype) for name, values in base.scalars.items()})
            scores = _looked_at(policy, policy.scan(narrow).scores)
            if not bool(torch.isfinite(scores).all()) or bool((scores < 0).any()):
                return False
    return True


def json_round_trip_is_exact(policy: ExitPolicy) -> bool:
    """`to_dict` through JSON and `from_dict` give an equal policy."""
    return ExitPolicy.from_dict(json.loads(json.dumps(policy.to_dict(), allow_nan=False))) == policy


def last_exit_always_leaves(policy: ExitPolicy) -> bool:
    """With every exit closed, all rows take the last one."""
    closed = policy.with_thresholds((None,) * (policy.num_exits - 1))
    signals = _Signals.random(policy)
    decided = closed.decide(closed.scan(signals).scores)
    return bool((decided == policy.num_exits - 1).all()) and bool((served_exits(closed, signals)[0] >= 0).all())


def higher_thresholds_never_leave_earlier(policy: ExitPolicy) -> bool:
    """A more careful threshold never sends a row out sooner."""
    signals = _Signals.random(policy)
    scores = policy.scan(signals).scores
    levels = [x for x in sorted(set(_looked_at(policy, scores).flatten().tolist())) if x >= policy.lowest_threshold]
    exits = [policy.with_thresholds(level).decide(scores) for level in levels]
    return all(bool((low <= high).all()) for low, high in pairwise(exits))


def score_at_the_threshold_leaves(policy: ExitPolicy) -> bool:
    """Reaching the threshold is enough."""
    score = torch.tensor([policy.lowest_threshold])
    return policy.num_exits == 1 or bool(_open_first(policy).leaves(score, _first_open(policy)).all())


def empty_batches_and_single_rows_work(policy: ExitPolicy) -> bool:
    """No row and one row give outputs of that size."""
    signals = _Signals.random(policy)
    sizes = [policy.scan(signals.rows(slice(0, n))).scores.shape for n in (0, 1)]
    nobody = served_exits(policy, signals.rows(slice(0, 0)))[0]
    return sizes == [(0, policy.num_exits), (1, policy.num_exits)] and nobody.shape == (0,)


def a_single_exit_works(policy: ExitPolicy) -> bool:
    """A model whose only exit is its last layer can be served."""
    fields: dict[str, Any] = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    last = {k: v[-1:] for k, v in fields.items() if isinstance(v, tuple) and len(v) == policy.num_exits}
    single = type(policy)(**{**fields, **last, "thresholds": (), "muted": ()})
    return bool((served_exits(single, _Signals.random(single))[0] == 0).all())


def _first_open(policy: ExitPolicy) -> int:
    return next(index for index in range(policy.num_exits) if index not in policy.muted)


def _open_first(policy: ExitPolicy) -> ExitPolicy:
    first = _first_open(policy)
    return policy.with_thresholds(
        tuple(policy.lowest_threshold if i == first else None for i in range(len(policy.thresholds)))
    )


LAWS: tuple[Callable[[ExitPolicy], bool], ...] = (
    serving_equals_scan,
    dropping_rows_changes_nothing,
    rows_do_not_see_each_other,
    order_of_rows_is_free,
    same_input_same_output,
    inputs_and_policy_stay_untouched,
    state_is_tensors_with_rows_first,
    shapes_and_dtype_are_right,
    scores_are_finite_and_not_negative,
    json_round_trip_is_exact,
    last_exit_always_leaves,
    higher_thresholds_never_leave_earlier,
    score_at_the_threshold_leaves,
    empty_batches_and_single_rows_work,
    a_single_exit_works,
)


def check_exit_policy(policy: ExitPolicy) -> list[str]:
    """Run every law on a policy, yours or ours, with random exits that often agree.

    Args:
        policy: a registered policy with thresholds for at least two exits, some of them open.

    Returns:
        Names of the laws that were checked.

    Raises:
        PolicyError: naming the law that does not hold.

    Examples:
        >>> import hf_earlyexit as ee
        >>> len(ee.check_exit_policy(ee.ConfidencePolicy(thresholds=[0.9, 0.8]))) > 10
        True
    """
    for law in LAWS:
        try:
            kept = law(policy)
        except Exception as error:
            raise PolicyError(
                f"{type(policy).__name__} breaks the law '{_words(law)}': {error}", field=law.__name__
            ) from error
        if not kept:
            raise PolicyError(f"{type(policy).__name__} breaks the law '{_words(law)}'.", field=law.__name__)
    return [law.__name__ for law in LAWS]


def _words(law: Callable[[ExitPolicy], bool]) -> str:
    return law.__name__.replace("_", " ")
