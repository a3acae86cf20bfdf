"""A promise about rows that nobody has seen, as it is stored and told."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError

RISK_WORDS = {
    "drop": "the full model's mean quality{measure} exceeds the early answers' by at most {limit:g}{cut}",
    "harm": "the early answer is wrong where the full model is right for at most {percent:g} % of {unit}",
    "disagreement": "the early answer differs from the full model's for at most {percent:g} % of {unit}",
}
HARM_OF_A_MEASURE = "the early answers lose at most {limit:g} of quality{measure} on average, gains not counted{cut}"
VOID = (
    "retrained exits or heads, another dtype or an int8 copy, {unit} of another origin than the certifying ones, and a "
    "policy or target that was picked after looking at the same {unit}"
)
UNITS = ("rows", "lists", "texts")


@dataclass(frozen=True, kw_only=True)
class GroupEvidence:
    """What the certifying rows of one group showed: number, mean loss, and the p-value, adjusted by Holm for all groups."""

    name: str
    num_rows: int
    mean_loss: float
    p_value: float


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What was certified, on which evidence.

    Attributes:
        risk: "drop", "harm" or "disagreement"; limit: that its mean keeps below; confidence: with which.
        procedure: how the setting was picked along the path.
        num_rows: rows, lists or texts that certified; num_path_rows: others, that made the path; num_settings: on it.
        mean_loss: of the certifying rows at the setting picked; p_value: of its mean being above the limit.
        groups: the evidence of each group; one, "all rows", by default.
        rows_needed: about as many certifying rows would have certified the next setting, at the rate seen; `None` where no
            number would, or no setting is left.
        bound: of a difference in quality, where it was given. The limit and the mean loss are then in units of it.
        date: of the certificate, ISO.
        unit: what was drawn: "rows", "lists" or "texts".
        measure: what quality is, in words; `None` where it is right or wrong, row by row.
    """

    risk: str
    limit: float
    confidence: float
    procedure: str
    num_rows: int
    num_path_rows: int
    num_settings: int
    mean_loss: float
    p_value: float
    groups: tuple[GroupEvidence, ...]
    rows_needed: int | None
    bound: float | None
    date: str
    unit: str = "rows"
    measure: str | None = None

    @property
    def worst(self) -> GroupEvidence:
        """The group with the least evidence."""
        return max(self.groups, key=lambda group: (group.p_value, group.mean_loss))

    def in_words(self) -> str:
        """The claim, as a statistician would word it, and what voids it."""
        words = HARM_OF_A_MEASURE if self.risk == "harm" and self.measure is not None else RISK_WORDS[self.risk]
        risk = words.format(
            limit=self.limit * (self.bound or 1.0),
            percent=100 * self.limit,
            unit=self.unit,
            measure="" if self.measure is None else f" ({self.measure})",
            cut="" if self.bound is None else f", differences cut to {self.bound:g}",
        )
        scope = "" if len(self.groups) == 1 else f" in each of {len(self.groups)} groups"
        if self.procedure == "crc":
            claim = f"On average over draws of {self.num_rows} certifying {self.unit}, {risk}{scope}"
        else:
            claim = (
                f"With {100 * self.confidence:g} % confidence over the draw of the {self.num_rows} certifying {self.unit}, "
                f"{risk} among {self.unit} drawn like them{scope}"
            )
        return f"{claim}. Void with {VOID.format(unit=self.unit)}."

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "groups": [dataclasses.asdict(group) for group in self.groups]}

    @classmethod
    def from_dict(cls, values: Any) -> Promise:
        """What `to_dict` described.

        Raises:
            CheckpointError: for missing, unknown or impossible values.
        """
        try:
            given = dict(values)
            given["groups"] = tuple(GroupEvidence(**group) for group in given["groups"])
            promise = cls(**given)
            shares = (promise.limit, promise.confidence, promise.p_value, *(group.p_value for group in promise.groups))
            if promise.unit not in UNITS or not (promise.measure is None or isinstance(promise.measure, str)):
                raise ValueError("unit or measure is not known")
            if promise.risk not in RISK_WORDS or not promise.groups or not all(0 <= float(share) <= 1 for share in shares):
                raise ValueError("a risk, limit or p-value is out of range")
            if not math.isfinite(promise.mean_loss) or promise.num_rows < 1:
                raise ValueError("mean_loss or num_rows is out of range")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"The promise of a calibration cannot be read ({error}).", field="promise") from error
        return promise
