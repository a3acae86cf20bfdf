"""What must hold by theory, in draws from pools whose risk is known: certified settings, and the monitor's alarms.

Called by benchmarks/promises.py; the pools are made up, with the shapes that are said beside each table.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from promises_splits import in_float32
from scipy.special import betaln
from scipy.stats import binom

from hf_earlyexit import ExitTrace
from hf_earlyexit.calibration import Certified, calibrate
from hf_earlyexit.calibration.certify import walk_of_rows
from hf_earlyexit.calibration.risks import Losses
from hf_earlyexit.serving.monitor import MOST_SHIFT, Monitor

POOL, PLANNING, STEPS, MOST = 20_000, 1_000, 50, 0.12
GAINS = 0.005  # share of rows on which the early answer is right and the full model wrong, in the pools for "drop"


class Pool:
    """Rows with one exit before the last, whose answer is likelier to do harm the lower its score."""

    def __init__(self, risk: str, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        rows = POOL + PLANNING
        score = draw.random(rows)
        harmed = draw.random(rows) < 2 * MOST * (1 - score)
        loss = harmed.astype(float)
        if risk == "drop":
            loss -= (draw.random(rows) < GAINS) & ~harmed
        self.low = -1.0 if risk == "drop" else 0.0
        self.scores, self.losses = (np.stack([column, np.zeros(rows)], 1) for column in (score, loss))
        self.path = np.append(np.nan, np.linspace(1, 0, STEPS))[:, None]
        self.planning = self.scores[POOL:], self.losses[POOL:]
        leaves = score[:POOL, None] >= np.nan_to_num(self.path.T, nan=2.0)
        self.risks = (leaves * loss[:POOL, None]).mean(0)
        self.gains = (leaves * (loss[:POOL, None] < 0)).mean(0)

    def certified(self, target: Certified, count: int, draws: int) -> np.ndarray:
        """True risk of the setting that each draw of `count` rows certified, `[draws]`."""
        draw, used = np.random.default_rng(1), np.empty(draws)
        everyone = {"all rows": np.ones(count, dtype=bool)}
        for place in range(draws):
            rows = draw.integers(0, POOL, count)
            losses = Losses(self.losses[rows], self.low, 1.0)
            walk = walk_of_rows(target, losses, self.scores[rows], self.path, everyone, self.planning)
            used[place] = self.risks[walk.last_certified()]
        return used


def validity(draws: int) -> list[dict[str, Any]]:
    """Broken promises and the risk used, for every size, limit, confidence and risk."""
    rows = []
    for risk in ("harm", "drop"):
        pool = Pool(risk)
        for limit in (0.01, 0.02, 0.05):
            for delta in (0.05, 0.10):
                for count in (100, 300, 1000, 3000):
                    used = pool.certified(Certified(limit, 1 - delta, risk=risk), count, draws)
                    broken = int((used > limit + 1e-12).sum())
                    rows.append(
                        {
                            "risk": risk,
                            "limit": limit,
                            "delta": delta,
                            "rows": count,
                            "draws": draws,
                            "broken": broken,
                            "most": int(binom.ppf(0.999, draws, delta)),
                            "used": float(used.mean()),
                            "possible": (possible if risk == "harm" else possible_with_gains)(pool, limit, delta, count),
                            "without_coin": possible(pool, limit, delta, count, False) if risk == "harm" else None,
                        }
                    )
    return rows


def possible(pool: Pool, limit: float, delta: float, count: int, with_coin: bool = True) -> float:
    """The most mean true risk that certifying by the number of harmful rows can use here, whatever the procedure.

    A setting whose risk is above the limit may be certified with chance delta at most. The most powerful such test of a
    count is binomial, with a coin at its edge (Neyman-Pearson; likelihood ratios of counts are monotone), and a setting of
    risk r is then certified with the chance that the test has at r. Risks grow along the path, so that the mean risk of
    what is chosen is at most the sum of these chances, each times the step in risk. Without the coin, which nobody wants to
    toss for a certificate, it is the limit of the plain binomial test.
    """
    edge = int(binom.ppf(delta, count, limit))  # fewer losses are certified, so many by a coin
    coin = with_coin * (delta - binom.cdf(edge - 1, count, limit)) / binom.pmf(edge, count, limit)
    chance = binom.cdf(edge - 1, count, pool.risks) + coin * binom.pmf(edge, count, pool.risks)
    return float(np.diff(pool.risks, prepend=0.0) @ chance)


def possible_with_gains(pool: Pool, limit: float, delta: float, count: int) -> float:
    """A bound of the mean true risk, up to the limit, that certifying by numbers of losses and gains can use here.

    As in `possible`; a setting whose risk is above the limit may have any share of gains. Against each of them alone the
    most powerful test is that of Neyman and Pearson, and a test that has to hold against all of them can be no more powerful
    than the least of these.
    """
    chances = [
        min(
            delta if risk > limit else _most_power(count, risk + gain, gain, limit, share, delta)
            for share in (0.0, *(gain * np.geomspace(0.5, 4, 7)))
        )
        for risk, gain in zip(pool.risks, pool.gains, strict=True)
    ]
    return float(np.diff(pool.risks.clip(max=limit), prepend=0.0).clip(min=0) @ np.array(chances))


def _most_power(count: int, losing: float, gaining: float, limit: float, share: float, delta: float) -> float:
    """Chance of the most powerful test of a share of gains and losses above it by the limit, where the shares are others."""
    most = [int(count * top + 9 * math.sqrt(count * top) + 9) for top in (max(losing, share + limit), max(gaining, share))]
    losses, gains = (part.ravel() for part in np.meshgrid(*(np.arange(top + 1) for top in most), indexing="ij"))
    under, over = (
        binom.pmf(gains, count, down) * binom.pmf(losses, count - gains, up / (1 - down))
        for up, down in ((share + limit, share), (losing, gaining))
    )
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        order = np.argsort(-np.nan_to_num(over / under, posinf=np.inf))
    spent = np.cumsum(under[order])
    certain = int(np.searchsorted(spent, delta, side="right"))
    power = float(over[order][:certain].sum())
    if certain < len(order):
        left = delta - (spent[certain - 1] if certain else 0.0)
        power += float(over[order][certain] * left / under[order][certain])
    return min(1.0, power)


LIMIT = 0.02
SHARES = np.array([0, 0, 0.1, 0.2, 0.2, 0.15, 0.1, 0.1, 0.05, 0.04, 0.03, 0.03])


def first_alarms(
    streams: int, rows: int, rate: float, shares: np.ndarray, shadow: float, confidence: float, seed: int
) -> dict[str, np.ndarray]:
    """Rows after which a monitor of reference SHARES first alarms in each stream, by kind; infinite without an alarm.

    As `Monitor` does, for all streams at once: it is looked at every 100 rows, and exits are compared every 1,000.
    """
    draw, looks = np.random.default_rng(seed), rows // 100
    shadowed = draw.binomial(100, shadow, (streams, looks))
    total, different = shadowed.cumsum(1), draw.binomial(shadowed, rate).cumsum(1)
    counts = draw.multinomial(1000, shares, (streams, rows // 1000))
    expected, found = 1000 * SHARES + 0.5, counts + 0.5
    expected, found = expected / expected.sum(), found / found.sum(-1, keepdims=True)
    shift = ((found - expected) * np.log(found / expected)).sum(-1)
    return {
        "disagreement": _first(bound_passes(different, total, 1 - confidence), 100),
        "shift": _first(shift > MOST_SHIFT, 1000),
    }


def bound_passes(different: np.ndarray, shadowed: np.ndarray, delta: float, limit: float = LIMIT) -> np.ndarray:
    """Whether the lower one of `disagreement_bounds` is above the limit, for arrays of counts."""
    seen = different * math.log(limit) + (shadowed - different) * math.log1p(-limit)
    above: np.ndarray = different > limit * shadowed
    return above & (seen <= betaln(different + 1, shadowed - different + 1) + math.log(delta))


def _first(alarms: np.ndarray, step: int) -> np.ndarray:
    return np.where(alarms.any(1), step * (alarms.argmax(1) + 1.0), np.inf)


def false_alarms(streams: int, rows: int = 20_000) -> list[dict[str, Any]]:
    """Streams in which nothing changes, with a rate of disagreement at the limit itself: the hardest that is fine."""
    tables = []
    for confidence, shadow in ((0.9, 0.01), (0.9, 0.1), (0.9, 1.0), (0.99, 0.01), (0.99, 0.1)):
        found = first_alarms(streams, rows, LIMIT, SHARES, shadow, confidence, 1)
        counts = {kind: int(np.isfinite(first).sum()) for kind, first in found.items()}
        tables.append({"confidence": confidence, "shadow": shadow, "streams": streams, "rows": rows, **counts})
    return tables


def detection(streams: int, rows: int = 20_000) -> list[dict[str, Any]]:
    """Rows until an alarm once the rate of disagreement has risen, or rows leave elsewhere; the limit is 0.02."""
    tables = []
    later = np.roll(SHARES, 2)
    for rate, shares, what in (
        (0.06, SHARES, "rate"),
        (0.10, SHARES, "rate"),
        (0.20, SHARES, "rate"),
        (0.02, later, "exits"),
    ):
        for shadow in (0.01, 0.1) if what == "rate" else (0.01,):
            first = first_alarms(streams, rows, rate, shares, shadow, 0.99, 2)["disagreement" if what == "rate" else "shift"]
            median = float(np.median(first))
            tables.append(
                {
                    "what": what,
                    "rate": rate,
                    "shadow": shadow,
                    "streams": streams,
                    "noticed": int(np.isfinite(first).sum()),
                    "within_5000": int((first <= 5000).sum()),
                    "median": median if np.isfinite(median) else None,
                }
            )
    return tables


def shifts(streams: int, before: int = 5_000, most: int = 10_000) -> list[dict[str, Any]]:
    """Rows of SST-2, then rows of another set, drawn with replacement: rows until an alarm after the change.

    The policy is confidence, certified at one point with 90 % confidence on half of SST-2's pool; the rest is streamed.
    """
    home = _loaded("sst2-0")
    certified = calibrate(home.select(range(home.num_rows // 2)), "confidence", Certified(0.01, 0.9), metric="accuracy")
    depth, tables = home.exit_layers[-1], []
    reference = tuple(report.share for report in certified.exits)
    usual = _stream_of(certified.policy, home.select(range(home.num_rows // 2, home.num_rows)))
    for name in sorted(path.stem for path in TRACES.glob("shift-*.safetensors")):
        other = _stream_of(certified.policy, _loaded(name))
        for shadow in (0.01, 0.1):
            found: dict[str, list[int | None]] = {"disagreement": [], "shift": []}
            false = 0
            for seed in range(streams):
                draw = np.random.default_rng([3, seed])
                monitor = Monitor(home.exit_layers, LIMIT, shadow=shadow, confidence=0.99, reference=reference, seed=seed)
                for (layers, same), rows in ((usual, before), (other, most)):
                    for _ in range(rows // 100):
                        places, shadowed = draw.integers(0, len(layers), 100), monitor.draw(100)
                        monitor.record(layers[places].tolist(), same[places[shadowed]].tolist())
                alarms = {alarm.kind: alarm.num_rows - before for alarm in monitor.state.alarms}
                false += any(place <= 0 for place in alarms.values())
                for kind, places_ in found.items():
                    places_.append(alarms.get(kind))
            pairs = zip(*found.values(), strict=True)
            earliest = [min((place for place in pair if place is not None), default=None) for pair in pairs]
            tables.append(
                {
                    "to": name.removeprefix("shift-"),
                    "shadow": shadow,
                    "streams": streams,
                    "false": false,
                    "before": {"different": float(1 - usual[1].mean()), "layers": float(usual[0].mean())},
                    "after": {"different": float(1 - other[1].mean()), "layers": float(other[0].mean())},
                    "depth": depth,
                    "within_5000": {
                        kind: sum(place is not None and place <= 5000 for place in places)
                        for kind, places in (*found.items(), ("either", earliest))
                    },
                    "median": float(np.median([most if place is None else place for place in earliest])),
                }
            )
    return tables


TRACES = Path(__file__).parent / "traces"


def _loaded(name: str) -> ExitTrace:
    return in_float32(ExitTrace.load(TRACES / f"{name}.safetensors"))


def _stream_of(policy: Any, trace: ExitTrace) -> tuple[np.ndarray, np.ndarray]:
    """Layer each row leaves after, and whether its answer is the full model's."""
    scores, answers = policy.scan(trace)
    taken = policy.decide(scores).numpy()
    same = answers[np.arange(trace.num_rows), taken].argmax(-1) == trace.logits[:, -1].argmax(-1)
    return np.asarray(trace.exit_layers)[taken], same.numpy()
