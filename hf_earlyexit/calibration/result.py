"""What a calibration found, as numbers that can be printed, saved and trusted later."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar

from ..errors import CheckpointError
from ..files import read_json, write_json
from ..policies.base import ExitPolicy
from .replay import ExitReport


@dataclass(frozen=True, kw_only=True)
class CalibrationResult:
    """Thresholds, how they were chosen and what they did on the rows that chose them.

    Attributes:
        policy: ready for `model.set_exit_policy`.
        target: the wish, in words.
        quality: of the early answers; full_quality: of the last exit; both on `num_rows` rows. Accuracy for one label.
        standard_error: of the difference of the two.
        mean_layers, mean_cost: per row; layer_speed_up: number of layers over mean layers.
        exits: one report per exit.
        curve: points (mean cost, quality, thresholds) from the full model to the cheapest setting.
        num_rows: rows that chose the thresholds; num_learning_rows: other rows, that the policy's own numbers came from.
        seed: of the split of the two; split, dtype, fingerprint, versions: where the rows and the model came from.
        notes: what a user should know, in sentences.
    """

    FORMAT: ClassVar[str] = "hf_earlyexit.calibration/1"

    policy: ExitPolicy
    target: str
    quality: float
    full_quality: float
    standard_error: float
    mean_layers: float
    mean_cost: float
    layer_speed_up: float
    exits: tuple[ExitReport, ...]
    curve: tuple[tuple[float, float, tuple[float | None, ...]], ...]
    num_rows: int
    num_learning_rows: int
    seed: int
    split: str
    dtype: str
    fingerprint: str
    versions: dict[str, str]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["exits"] = [dataclasses.asdict(report) for report in self.exits]
        return {"format": self.FORMAT, **fields, "policy": self.policy.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CalibrationResult:
        """The result that `to_dict` described, a captioner's as such.

        Raises:
            CheckpointError: for another format.
        """
        kinds = {kind.FORMAT: kind for kind in (cls, *cls.__subclasses__())}
        kind = kinds.get(values.get("format", ""))
        if kind is None:
            raise CheckpointError(
                f"Calibration has format {values.get('format')!r}; expected {' or '.join(map(repr, kinds))}.", field="format"
            )
        return kind._from_values({key: value for key, value in values.items() if key != "format"})

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> CalibrationResult:
        given = dict(values)
        given["policy"] = ExitPolicy.from_dict(given["policy"])
        given["exits"] = tuple(ExitReport(**report) for report in given["exits"])
        given["curve"] = tuple((cost, quality, tuple(thresholds)) for cost, quality, thresholds in given["curve"])
        given["notes"] = tuple(given["notes"])
        return cls(**given)

    def save(self, path: str | PathLike[str]) -> None:
        """Write one JSON file."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> CalibrationResult:
        """Read what `save` wrote."""
        try:
            return cls.from_dict(read_json(path))
        except (OSError, KeyError, TypeError, AttributeError, CheckpointError) as error:
            raise CheckpointError(f"{path} is not a saved calibration ({error}); calibrate again.", path=path) from error

    def __str__(self) -> str:
        rows = f"{self.num_rows} rows of {self.split!r}"
        if self.num_learning_rows:
            rows += f" (and {self.num_learning_rows} others for the policy's own numbers)"
        drop = self.quality - self.full_quality
        head = [
            f"{self.policy.name} for {self.target}, thresholds chosen on {rows}",
            f"quality {self.quality:.4f} against {self.full_quality:.4f} of the full model "
            f"({drop:+.4f}, standard error {self.standard_error:.4f})",
            f"mean layers {self.mean_layers:.2f} of {self.exits[-1].layer}: layer speed-up {self.layer_speed_up:.2f}x",
            "",
            "layer  threshold   share  quality  of leavers  last exit on them",
        ]
        return "\n".join(head + [_line(report) for report in self.exits] + [f"note: {note}" for note in self.notes])


def _line(report: ExitReport) -> str:
    def number(value: float | None, width: int) -> str:
        return "-".rjust(width) if value is None else f"{value:{width}.4f}"

    return (
        f"{report.layer:5d} {number(report.threshold, 10)} {report.share:7.1%} {report.quality:8.4f} "
        f"{number(report.quality_of_leavers, 11)} {number(report.last_quality_of_leavers, 18)}"
    )
