"""A promise about rows that nobody has seen, as it is stored and told."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError

RISK_WORDS = {
    "drop": "the full model's mean quality exceeds the early answers' by at most {limit:g}",
    "harm": "the early answer is wrong where the full model is right for at most {percent:g} % of rows",
    "disagreement": "the early answer differs from the full model's for at most {percent:g} % of rows",
}
VOID = (
    "retrained exits or heads, another dtype or an int8 copy, rows of another origin than the certifying ones, and a policy "
    "or target that was picked after looking at the same rows"
)


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
        num_rows: that certified; num_path_rows: others, that made the path; num_settings: on it.
        mean_loss: of the certifying rows at the setting picked; p_value: of its mean being above the limit.
        groups: the evidence of each group; one, "all rows", by default.
        rows_needed: about as many certifying rows would have certified the next setting, at the rate seen; `None` where no
            number would, or no setting is left.
        bound: of a difference in quality, for values; `None` otherwise.
        date: of the certificate, ISO.
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

    @property
    def worst(self) -> GroupEvidence:
        """The group with the least evidence."""
        return max(self.groups, key=lambda group: (group.p_value, group.mean_loss))

    def in_words(self) -> str:
        """The claim, as a statistician would word it, and what voids it."""
        risk = RISK_WORDS[self.risk].format(limit=self.limit, percent=100 * self.limit)
        scope = "" if len(self.groups) == 1 else f" in each of {len(self.groups)} groups"
        if self.procedure == "crc":
            claim = f"On average over draws of {self.num_rows} certifying rows, {risk}{scope}"
        else:
            claim = (
                f"With {100 * self.confidence:g} % confidence over the draw of the {self.num_rows} certifying rows, {risk} "
                f"among rows drawn like them{scope}"
            )
        return f"{claim}. Void with {VOID}."

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
            if promise.risk not in RISK_WORDS or not promise.groups or not all(0 <= float(share) <= 1 for share in shares):
                raise ValueError("a risk, limit or p-value is out of range")
            if not math.isfinite(promise.mean_loss) or promise.num_rows < 1:
                raise ValueError("mean_loss or num_rows is out of range")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"The promise of a calibration cannot be read ({error}).", field="promise") from error
        return promise
