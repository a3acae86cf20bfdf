"""Thresholds chosen exit by exit, for a series of rules: each rule looks at no more than what it changes about the last."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .search import Array, Curve, cut_between, standard_error

Rows = NDArray[np.int64]
NOBODY: Rows = np.empty(0, dtype=np.int64)
BLOCK = 256  # rows whose sums are kept together


class LeaverRule(NamedTuple):
    """When a set of rows may leave at an exit, by their errors there.

    Attributes:
        bound: `[E - 1]`: the largest error rate allowed to the leavers; `None` to compare with the last exit's errors on
            the same rows.
        slack: errors per row allowed on top; 0 or more.
        sigmas: standard errors of the difference that must be to spare; 0 or more.
        min_leavers: fewest rows that count as evidence.
    """

    bound: Array | None
    slack: float = 0.0
    sigmas: float = 0.0
    min_leavers: int = 1

    def holds(self, count: Array, total: Array, squares: Array, exit_index: int) -> NDArray[np.bool_]:
        """Whether sets of rows may leave; more likely for more rows, a smaller total, and without a bound smaller squares.

        Args:
            count: rows of each set `[n]`.
            total, squares: sum of their errors and of the squares `[n]`; without a bound, of what they err beyond the last
                exit.
            exit_index: 0-based.
        """
        if self.bound is None:
            spent = total + self.sigmas * np.sqrt(squares) if self.sigmas else total
            fine = spent <= self.slack * count + 1e-9
        else:
            rate = total / np.maximum(count, 1)
            spare = self.sigmas * np.sqrt(rate * (1 - rate).clip(0) / np.maximum(count, 1)) if self.sigmas else 0.0
            fine = rate + spare < self.bound[exit_index] + self.slack
        return np.asarray(fine & (count >= max(self.min_leavers, 1)), dtype=np.bool_)


class Leavers(NamedTuple):
    """Whom an exit lets go.

    Attributes:
        place: of the last of them in the exit's order; -1 for nobody.
        last, next: score of the last one, and of the first that stays, -inf where none does.
        sums: how many there are, and the sums of their errors and squares `[3]`.
    """

    place: int
    last: float
    next: float
    sums: Array


NOBODY_LEAVES = Leavers(-1, math.nan, math.nan, np.zeros(3))


class _Exit:
    """The rows in the order in which they would leave at one exit, and sums over those that have reached it, by blocks.

    Args:
        score: `[N]`.
        errors: that rules judge `[N]`, as `summable` makes them.
        lowest: the smallest threshold the policy allows.
    """

    def __init__(self, score: Array, errors: Array, lowest: float) -> None:
        score = np.ascontiguousarray(score)
        self.order = falling(score)
        self.score = score[self.order]
        self.rank = np.empty(len(score), dtype=np.int32)
        self.rank[self.order] = np.arange(len(score), dtype=np.int32)
        self.may_end = np.append(self.score[1:] < self.score[:-1], True)[: len(score)]  # equal scores leave together
        self.may_end &= (self.score >= lowest) & (self.score > -np.inf)
        errors = np.ascontiguousarray(errors)[self.order]
        self.values = np.stack([errors, summable(errors * errors)])
        starts = np.arange(0, len(score), BLOCK)
        count = np.diff(starts, append=len(score)).astype(np.float64)
        self.sums = np.concatenate([count[None], np.add.reduceat(self.values, starts, axis=1)])  # [3, blocks]
        self.gains = np.add.reduceat(np.minimum(errors, 0), starts)  # sums of errors below 0 [blocks]
        self.has_end = np.logical_or.reduceat(self.may_end, starts)  # blocks in which somebody may be the last to leave
        self._add_up()

    def _add_up(self) -> None:
        self.ends = self.sums.cumsum(1)  # sums up to the end of each block, and up to its start
        self.starts = self.ends - self.sums
        self.lowest_total = self.starts[1] + self.gains  # within each block

    def change(self, come: Rows, gone: Rows) -> tuple[Rows, Rows]:
        """Count some rows as having reached the exit, and others no longer; gives their places in the order."""
        if not len(come) and not len(gone):
            return NOBODY, NOBODY
        places = self.rank[np.concatenate([come, gone])]
        blocks, signs, count = places // BLOCK, np.ones(len(places)), len(self.gains)
        signs[len(come) :] = -1
        self.sums[0] += np.bincount(blocks, signs, count)
        errors = self.values[0][places]
        some = np.flatnonzero(errors)  # most rows err neither more nor less than at the last exit
        blocks, signs, errors = blocks[some], signs[some], errors[some]
        self.sums[1] += np.bincount(blocks, signs * errors, count)
        self.sums[2] += np.bincount(blocks, signs * self.values[1][places[some]], count)
        self.gains += np.bincount(blocks, signs * np.minimum(errors, 0), count)
        self._add_up()
        return places[: len(come)], places[len(come) :]

    def leavers(self, rule: LeaverRule, left: NDArray[np.int16], index: int) -> Leavers:
        """As many rows, from the front of the order, as a rule allows.

        Args:
            rule: what the leavers must keep.
            left: where each row leaves `[N]`; those that left before this exit are not here.
            index: of the exit.
        """
        for block in self._blocks(rule, index):
            part = slice(block * BLOCK, (block + 1) * BLOCK)
            here = left[self.order[part]] >= index
            sums = self.starts[:, block, None] + np.concatenate([here[None], self.values[:, part] * here]).cumsum(1)
            fine = rule.holds(sums[0], sums[1], sums[2], index) & self.may_end[part]
            if len(ends := fine.nonzero()[0]):
                place = int(ends[-1])
                number, rows = int(sums[0, place]), here.nonzero()[0]
                leaving = int(rows.searchsorted(place, side="right"))  # of this block
                last, following = (
                    float(self.score[part.start + rows[one]])
                    if 0 <= one < len(rows)
                    else self._score_of(number + one + 1 - leaving, left, index)
                    for one in (leaving - 1, leaving)
                )
                return Leavers(part.start + place, last, following, sums[:, place])
        return NOBODY_LEAVES

    def _blocks(self, rule: LeaverRule, index: int) -> list[int]:
        """Blocks in which the last leaver can be, the last of them first."""
        if len(self.gains) == 1:
            return [0]
        if not self.ends[0, -1]:
            return []
        at_best = rule if rule.bound is None else rule._replace(sigmas=0.0)
        possible = at_best.holds(self.ends[0], self.lowest_total, self.starts[2], index) & self.has_end
        blocks: list[int] = possible.nonzero()[0][::-1].tolist()
        return blocks

    def _score_of(self, number: int, left: NDArray[np.int16], index: int) -> float:
        """Score of the row that comes at a place, from 1, among those that have reached the exit; -inf beyond the last."""
        ends = self.ends[0]
        block = int(ends.searchsorted(number))
        if block == len(ends):
            return -math.inf
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        here = (left[self.order[part]] >= index).nonzero()[0]
        return float(self.score[part.start + here[number - int(ends[block]) - 1]])


class ExitByExit:
    """Where rows leave under one rule after the other.

    Args:
        scores: `[N, E]`.
        errors: that rules judge `[N, E - 1]`.
        lowest, counts: see `search.candidates`.

    Attributes:
        left: exit index of each row under the last rule `[N]`.
        sums: of the leavers of each exit but the last: see `Leavers` `[E - 1, 3]`.
    """

    def __init__(self, scores: Array, errors: Array, lowest: float, counts: bool) -> None:
        self.lowest, self.counts, self.last = lowest, counts, scores.shape[1] - 1
        step, exits = step_of(errors), range(self.last)
        self.exits = [_Exit(scores[:, index], rounded(errors[:, index], step), lowest) for index in exits]
        self.cuts = [-1] * self.last  # how far each exit's order leaves
        self.left = np.full(len(scores), self.last, dtype=np.int16)
        self.sums = np.zeros((self.last, 3))

    def thresholds(self, rule: LeaverRule) -> Array:
        """One threshold per exit, in order: each exit takes as many of the rows that reached it as the rule allows.

        Returns:
            Thresholds `[E - 1]`, nan for exits that cannot satisfy the rule.
        """
        left, ends = self.left, np.full((2, self.last), np.nan)  # scores of who leaves last, and of who stays first
        come = gone = NOBODY  # who reaches the exit under this rule alone, and who did under the rule before alone
        for index, here in enumerate(self.exits):
            come_at, gone_at = here.change(come, gone)
            leavers = here.leavers(rule, left, index)
            cut, before = leavers.place, self.cuts[index]
            self.cuts[index], self.sums[index], ends[:, index] = cut, leavers.sums, (leavers.last, leavers.next)
            if cut == before and not len(come) and not len(gone):
                continue
            left[come[come_at <= cut]] = index
            back = here.order[cut + 1 : before + 1]
            back = back[left[back] >= index]
            left[back] = self.last
            out = here.order[before + 1 : cut + 1]
            out = out[left[out] > index]
            left[out] = index
            come = np.concatenate([back, come[come_at > max(cut, before)]])
            gone = np.concatenate([out, gone[gone_at > before]])
        last, following = ends
        thresholds: Array = np.maximum(last if self.counts else cut_between(following, last), self.lowest)
        return thresholds


def falling(values: Array) -> Rows:
    """The order in which values fall; of numbers that float32 holds, such as scores, sooner than `argsort`.

    NumPy sorts 16 bits by counting: first by the lower half of each number, then by the upper half, which keeps equals in
    their order. Bits of positive floats rise with them, those of negative ones fall.
    """
    rising = -values
    with np.errstate(over="ignore"):
        narrow = rising.astype(np.float32)
    if not np.array_equal(narrow, rising):
        return np.argsort(rising)
    bits = narrow.view(np.uint32)
    bits = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    order = np.argsort(bits.astype(np.uint16), kind="stable")
    return order[np.argsort((bits >> 16).astype(np.uint16)[order], kind="stable")]


def summable(values: Array) -> Array:
    """Values rounded so little that it does not matter, so that any sum of them is exact in whatever order it is taken.

    Whole numbers stay as they are, as long as their sums are below 2**52.
    """
    return rounded(values, step_of(values))


def step_of(values: Array) -> float:
    """What `summable` rounds to multiples of; 0 to leave values as they are."""
    most = float(max(values.max(initial=0.0), -values.min(initial=0.0))) * len(values)
    return 2.0 ** (math.ceil(math.log2(most)) - 52) if most else 0.0


def rounded(values: Array, step: float) -> Array:
    """Values as multiples of a step."""
    if not step:
        return values
    multiples: Array = values / step
    np.rint(multiples, out=multiples)
    multiples *= step
    return multiples


def thresholds_by_rule(
    scores: Array, errors: Array, rules: Sequence[LeaverRule], lowest: float, counts: bool
) -> Iterator[tuple[Array, ExitByExit]]:
    """Thresholds `[E - 1]` of each rule, nan for closed exits, and where rows leave under them.

    Args:
        scores: `[N, E]`.
        errors: `[N, E]`: error of each exit's answer, one minus its quality.
        rules: in an order in which neighbours are much alike.
        lowest, counts: see `search.candidates`.
    """
    series: dict[bool, ExitByExit] = {}
    for rule in rules:
        paired = rule.bound is None
        if paired not in series:
            early, last = errors[:, :-1], errors[:, -1:]
            series[paired] = ExitByExit(scores, early - last if paired else early, lowest, counts)
        yield series[paired].thresholds(rule), series[paired]


def per_exit_curve(
    scores: Array, quality: Array, cost: Array, rules: Sequence[LeaverRule], lowest: float, counts: bool
) -> Curve:
    """The curve of threshold vectors that a series of ever laxer rules gives.

    Args:
        scores: `[N, E]`; a column of -inf is an exit that stays closed.
        quality: `[N, E]`: quality of each exit's answer.
        cost: `[E]`: cost of leaving there.
        rules: from strict to lax.
        lowest, counts: see `search.candidates`.
    """
    count, full = len(scores), quality[:, -1]
    vectors, figures = [np.full(scores.shape[1] - 1, np.nan)], [(cost[-1], 0.0, 0.0)]
    for rule, (vector, leaving) in zip(rules, thresholds_by_rule(scores, 1 - quality, rules, lowest, counts), strict=True):
        leavers, errors, squares = leaving.sums.T
        mean_cost = (leavers @ cost[:-1] + (count - leavers.sum()) * cost[-1]) / count
        if rule.bound is None:
            figures.append((mean_cost, -errors.sum() / count, squares.sum() / count))
        else:  # its errors are not against the last exit's
            gains = quality[np.arange(count), leaving.left] - full
            figures.append((mean_cost, gains.mean(), (gains * gains).mean()))
        vectors.append(vector)
    costs, gains, squares = np.array(figures).T
    return Curve(np.stack(vectors), costs, gains + full.mean(), standard_error(gains, squares, count))
