"""Those that certify along a path of settings: rows, lists of rows or texts."""

from __future__ import annotations

import datetime
import math
from functools import cache
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .evidence import STARTS, fallback, fixed_sequence, holm, least_rows
from .paired import SMALL
from .promise import GroupEvidence, Promise
from .risks import Losses, Plan, Tally, edge
from .search import Array
from .slices import Parts

if TYPE_CHECKING:
    from .certify import Certified


class Along(Protocol):
    """What N units lose at each of K settings; its length is K."""

    losses: Losses

    def __len__(self) -> int: ...

    def at(self, place: int) -> Array:
        """Losses `[N]` at a setting."""

    def tallies(self, place: int) -> list[Tally]:
        """The same, counted group by group."""


class Walk:
    """The certifying units along a path.

    Args:
        target: what is promised.
        along: their losses.
        before: losses of those that made the path, as one group; tests are planned on them.
        parts: the units of each group, which must all keep the promise.
        unit: what is drawn, in words.
        measure: what quality is, in words, where it is not that of rows.
    """

    def __init__(
        self,
        target: Certified,
        along: Along,
        before: Along,
        parts: Parts,
        unit: str = "rows",
        measure: str | None = None,
    ) -> None:
        self.target, self.along, self.before, self.parts = target, along, before, parts
        self.unit, self.measure, self.losses = unit, measure, along.losses
        self.num_units = len(next(iter(parts.values())))
        self.plans = self._plans()
        self.p_values = cache(self._p_values)

    def _plans(self) -> list[Plan]:
        """How each group is tested, at every setting alike: as suits that at about the edge of what it can certify."""
        level = first_level(self.target)
        means = [tally.total / tally.counts.sum() for tally in (self.before.tallies(k)[0] for k in range(len(self.before)))]
        return [self._plan(means, int(part.sum()), level) for part in self.parts.values()]

    def _plan(self, means: list[float], num_units: int, level: float) -> Plan:
        hoped = edge(num_units, self.target.drop)
        decisive = min(range(len(means)), key=lambda place: (abs(means[place] - hoped), -place))
        return self.before.losses.plan(self.before.tallies(decisive)[0], num_units, self.target.drop, level)

    def _p_values(self, place: int) -> list[float]:
        return self._tested(place, (first_level(self.target), 1 - self.target.confidence))

    def _tested(self, place: int, levels: tuple[float, float]) -> list[float]:
        pairs = zip(self.along.tallies(place), self.plans, strict=True)
        return [self.losses.p_value(here, self.target.drop, plan, levels) for here, plan in pairs]

    def p_value(self, place: int) -> float:
        """Of "some group's risk is above the limit": the largest of the groups' own, as one of their nulls is then true."""
        return max(self.p_values(place))

    def last_certified(self) -> int:
        """The last setting that holds; 0, the full model, always does."""
        if self.target.procedure == "crc":
            return self._last_controlled()
        test = fixed_sequence if self.target.procedure == "fixed-sequence" else fallback
        fallen = test(self.p_value, len(self.along), 1 - self.target.confidence)
        return max(fallen, default=0)

    def _last_controlled(self) -> int:
        """Conformal risk control: losses are made to grow along the path, one by one, as its theorem needs."""
        worst, chosen = np.full(self.num_units, self.losses.low), 0
        for place in range(len(self.along)):
            worst = np.maximum(worst, self.along.at(place))
            for part in self.parts.values():
                if (worst[part].sum() + self.losses.high) / (part.sum() + 1) > self.target.drop:
                    return chosen
            chosen = place
        return chosen

    def promise(self, chosen: int, num_path_units: int) -> Promise:
        """The evidence at the setting that was picked."""
        here, p_values = self.along.at(chosen), self._tested(chosen, (SMALL, 1.0))
        groups = tuple(
            GroupEvidence(name=name, num_rows=int(part.sum()), mean_loss=float(here[part].mean()), p_value=float(adjusted))
            for (name, part), adjusted in zip(self.parts.items(), holm(p_values), strict=True)
        )
        return Promise(
            risk=self.target.risk,
            limit=self.target.drop,
            confidence=self.target.confidence,
            procedure=self.target.procedure,
            num_rows=len(here),
            num_path_rows=num_path_units,
            num_settings=len(self.along),
            mean_loss=float(here.mean()),
            p_value=max(p_values),
            groups=groups,
            rows_needed=self._units_for(chosen + 1),
            bound=self.target.bound,
            date=datetime.date.today().isoformat(),
            unit=self.unit,
            measure=self.measure,
        )

    def _units_for(self, place: int) -> int | None:
        """How many would about certify a setting, more than there are, at the losses seen in its worst group."""
        if place >= len(self.along):
            return None
        tallies, limit = self.along.tallies(place), self.target.drop
        means = [tally.total / max(tally.counts.sum(), 1.0) for tally in tallies]
        if self.target.procedure == "crc":
            worst = np.max([self.along.at(one) for one in range(place + 1)], axis=0)
            means = [float(worst[part].mean()) for part in self.parts.values()]
        group = int(np.argmax(means if self.target.procedure == "crc" else self.p_values(place)))
        seen, have = tallies[group], int(tallies[group].counts.sum())
        if means[group] >= limit or not have:
            return None
        if self.target.procedure == "crc":
            needed: int | None = math.ceil((self.losses.high - limit) / (limit - means[group]))
        else:
            level = first_level(self.target)

            def p_value(count: int) -> float:
                scaled = Tally(seen.values, seen.counts * (count / have))
                return self.losses.p_value(scaled, limit, self.plans[group], (level, level))

            needed = least_rows(p_value, level, most=10**7, least=have)
        return None if needed is None else math.ceil(needed * self.num_units / have)


def first_level(target: Certified) -> float:
    """What the first p-value of a walk is held against."""
    return (1 - target.confidence) / (STARTS if target.procedure == "fallback" else 1)
