"""What lists of rows, such as the candidates of a query, lose by early answers: a metric of each list as a whole.

Rows of a list are not drawn independently of each other, so the list is what a promise is about.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import CalibrationError
from ..values import shown
from .risks import DISAGREEMENT, HARM, Losses, Tally
from .search import Array, exits_taken
from .settings import split_places
from .slices import Parts, parts_by

NAMED = ("ndcg", "mrr")
ListMetric = str | Callable[[Any, Any], float]


def list_scores(answers: Tensor) -> Array:
    """One number to rank by, `[N, E]` of answers `[N, E, C]`: the value, or how far label 1 is ahead of label 0.

    Raises:
        CalibrationError: for more than two labels, which say nothing of an order.
    """
    if answers.shape[-1] > 2:
        raise CalibrationError(
            f"The rows have {answers.shape[-1]} labels; lists are ranked by one value, or by two labels of which label 1 is "
            "the relevant one.",
            field="lists",
        )
    return (answers[..., -1] - (answers[..., 0] if answers.shape[-1] == 2 else 0)).double().numpy()


@dataclass(frozen=True)
class ListQuality:
    """A metric of each list.

    Args:
        metric: "ndcg" or "mrr", "ndcg:10" for the first ten places; or a function of scores `[n]` and labels `[n]` of a
            list, bigger being better.
        bound: the most by which it can differ; 1 for the named ones.

    Raises:
        CalibrationError: for an unknown name, or a function without a bound.
    """

    metric: ListMetric
    bound: float | None

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str):
            if not callable(self.metric):
                raise CalibrationError(
                    f"metric is {shown(self.metric)}; expected {' or '.join(NAMED)}, 'ndcg:10' for the first ten places, "
                    "or a function of a list's scores and labels.",
                    field="metric",
                )
            if self.bound is None:
                raise CalibrationError(
                    f"bound is None; certifying {self.name} of lists needs the most by which it can differ, such as "
                    "Certified(0.02, bound=1.0): bigger differences are cut to it.",
                    field="bound",
                )
            return
        name, colon, places = self.metric.partition(":")
        if name not in NAMED or (colon and not (places.isdecimal() and int(places) > 0)):
            raise CalibrationError(
                f"metric is {shown(self.metric)}; lists are judged by {' or '.join(NAMED)}, 'ndcg:10' for the first ten "
                "places, or a function of a list's scores and labels.",
                field="metric",
                value=self.metric,
            )

    @property
    def name(self) -> str:
        """The metric in words."""
        return self.metric if isinstance(self.metric, str) else getattr(self.metric, "__name__", type(self.metric).__name__)

    def of(self, scores: Array, labels: Array, member: NDArray[np.int64], count: int) -> Array:
        """The metric of each list, `[L]`.

        Rows of equal score stand in the order that is worst for the list: nothing is gained by not telling them apart.

        Args:
            scores, labels: `[N]`; the higher the label, the more relevant the row.
            member: list of each row `[N]`, from 0 to `count` - 1.
        """
        if not isinstance(self.metric, str):
            return np.array([self._given(scores[member == one], labels[member == one]) for one in range(count)])
        name, _, places = self.metric.partition(":")
        most = int(places) if places else len(scores)
        value = _gains if name == "ndcg" else _first_relevant
        found = value(np.lexsort((labels, -scores, member)), labels, member, count, most)
        best = value(np.lexsort((-labels, member)), labels, member, count, most)
        return np.divide(found, best, out=np.zeros(count), where=best > 0)  # a list without anything relevant loses nothing

    def _given(self, scores: Array, labels: Array) -> float:
        value = self.metric(scores, labels)  # type: ignore[operator]
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise CalibrationError(
                f"The metric {self.name} gave {shown(value)} for a list; expected a finite number.", field="metric"
            )
        return number


def _places(order: NDArray[np.int64], member: NDArray[np.int64], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """List and place in it, from 0 on, of rows in the order of their lists."""
    lists = member[order]
    starts = np.searchsorted(lists, np.arange(count))
    return lists, (np.arange(len(order)) - starts[lists]).astype(np.int64)


def _gains(order: NDArray[np.int64], labels: Array, member: NDArray[np.int64], count: int, most: int) -> Array:
    """Discounted cumulative gain of each list."""
    lists, places = _places(order, member, count)
    gain = np.where(places < most, (np.exp2(labels[order]) - 1) / np.log2(places + 2), 0.0)
    return np.bincount(lists, gain, count).astype(np.float64)


def _first_relevant(order: NDArray[np.int64], labels: Array, member: NDArray[np.int64], count: int, most: int) -> Array:
    """One over the place of each list's first row with a label above 0; 0 where there is none."""
    lists, places = _places(order, member, count)
    worth = np.where((labels[order] > 0) & (places < most), 1.0 / (places + 1), 0.0)
    best = np.zeros(count)
    np.maximum.at(best, lists, worth)
    return best


class ListsAlong:
    """What lists lose along a path of settings: see `walk.Along`.

    Args:
        risk: "drop" or "harm".
        quality: the metric.
        ranking: what each exit's answer is ranked by `[N, E]`, the full model's in the last column.
        labels: relevance of the rows `[N]`.
        lists: of each row, from 0 on `[N]`.
        scores: of the policy `[N, E]`, -inf at muted exits.
        path: settings `[K, E - 1]`.
        parts: the lists of each group.

    Raises:
        CalibrationError: for "disagreement", which lists have no measure of.
    """

    def __init__(
        self,
        risk: str,
        quality: ListQuality,
        ranking: Array,
        labels: Array,
        lists: NDArray[np.int64],
        scores: Array,
        path: Array,
        parts: Parts,
    ) -> None:
        if risk == DISAGREEMENT:
            raise CalibrationError("Lists have risk='drop' and risk='harm'; certify one of these.", field="risk", value=risk)
        if isinstance(quality.metric, str) and labels.min() < 0:
            raise CalibrationError(
                f"A row has the label {labels.min():g}; {quality.name} needs relevances of at least 0.", field="labels"
            )
        if isinstance(quality.metric, str) and labels.max() <= 0:
            raise CalibrationError(
                f"No row of any list has a label above 0, so {quality.name} cannot be lost: nothing to promise.",
                field="labels",
            )
        self.quality, self.ranking, self.labels, self.lists = quality, ranking, labels, lists
        self.scores, self.path, self.parts = np.asfortranarray(scores), path, parts
        self.count = len(next(iter(parts.values())))
        low = 0.0 if risk == HARM else -1.0
        self.losses = Losses(np.full((1, 2), np.nan), low, 1.0)  # never whole
        self.full = quality.of(ranking[:, -1], labels, lists, self.count)
        self._known: dict[bytes, Array] = {}

    def __len__(self) -> int:
        return len(self.path)

    def at(self, place: int) -> Array:
        taken = exits_taken(self.scores, self.path[place])
        key = taken.tobytes()
        if key not in self._known:
            here = self.quality.of(self.ranking[np.arange(len(taken)), taken], self.labels, self.lists, self.count)
            drop = ((self.full - here) / (self.quality.bound or 1.0)).clip(self.losses.low, 1.0)
            self._known = {key: drop}
        return self._known[key]

    def tallies(self, place: int) -> list[Tally]:
        here = self.at(place)
        return [Tally(here[part], np.ones(int(part.sum()))) for part in self.parts.values()]


@dataclass(frozen=True)
class Lists:
    """Which list each row is of, from 0 on `[N]`, and what a list is worth."""

    member: NDArray[np.int64]
    quality: ListQuality

    @classmethod
    def of(cls, lists: Any, num_rows: int, metric: Any, bound: float | None) -> Lists:
        """The lists of `num_rows` rows, from a whole number or a name for each.

        Raises:
            CalibrationError: for anything else, and for what `ListQuality` refuses.
        """
        given = np.asarray(lists)
        if given.shape != (num_rows,):
            raise CalibrationError(
                f"lists has shape {given.shape}; expected the number or name of its list for each of {num_rows} rows.",
                field="lists",
            )
        if given.dtype.kind not in "iuUS":
            raise CalibrationError(
                f"lists are {given.dtype}; expected a whole number or a name for each row's list.", field="lists"
            )
        return cls(np.unique(given, return_inverse=True)[1].reshape(-1), ListQuality(metric, bound))

    @property
    def num_lists(self) -> int:
        """How many there are."""
        return int(self.member.max()) + 1

    def split(self, num_rows: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
        """Places of the rows of a share of the lists, drawn at random, and of all others; no list is torn.

        Raises:
            CalibrationError: if one part would have no list.
        """
        if round(share * self.num_lists) in (0, self.num_lists):
            raise CalibrationError(
                f"{self.num_lists} lists cannot be split into lists for the path and lists that certify; collect more.",
                field="lists",
            )
        first, _ = split_places(self.num_lists, share, seed)
        chosen = torch.from_numpy(np.isin(self.member, first.numpy()))
        return chosen.nonzero()[:, 0], (~chosen).nonzero()[:, 0]


def groups_of_lists(member: NDArray[np.int64], groups: NDArray[Any] | None) -> Parts:
    """The lists that must each keep the promise, by name; all by default.

    Args:
        member: list of each row `[N]`, from 0 on.
        groups: number or name of each row's slice `[N]`, the same for all rows of a list.
    """
    count = int(member.max()) + 1
    if groups is None:
        return {"all lists": np.ones(count, dtype=bool)}
    of_list = groups[np.unique(member, return_index=True)[1]]
    if (torn := np.flatnonzero(groups != of_list[member])).size:
        raise CalibrationError(
            f"Rows of one list are in the groups {of_list[member[torn[0]]]!r} and {groups[torn[0]]!r}; a list is drawn as a "
            "whole, so expected one group for each list.",
            field="groups",
        )
    return parts_by("group", of_list)
