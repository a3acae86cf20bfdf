"""What a calibration found, as numbers that can be printed, saved and trusted later."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar

from ..errors import CheckpointError, EarlyExitError
from ..files import read_json, write_json
from ..policies.base import ExitPolicy
from ..values import json_sum
from .by_class import ClassReport, class_lines
from .cross_fit import Expectation
from .promise import Promise
from .replay import ExitReport, Outcome
from .stored import SUM, check_calibration, check_known


@dataclass(frozen=True, kw_only=True)
class CalibrationResult(Outcome):
    """Thresholds, how they were chosen and, as `Outcome`, what they did on the rows that chose them.

    Attributes:
        policy: ready for `model.set_exit_policy`.
        target: the wish, in words; metric: the unit of quality, in words.
        curve: points (mean cost, quality, thresholds) from the full model to the cheapest setting.
        num_rows: rows that chose the thresholds; num_learning_rows: other rows, that the policy's own numbers came from.
        seed: of the split of the two; split, dtype, fingerprint, versions: where the rows and the model came from.
        expected: what rows not seen can be expected to get; `None` where the rows were too few to tell, or not asked to.
        promise: what was certified; `None` where nothing was.
        notes: what a user should know, in sentences.
    """

    FORMAT: ClassVar[str] = "hf_earlyexit.calibration/1"

    policy: ExitPolicy
    target: str
    metric: str
    curve: tuple[tuple[float, float, tuple[float | None, ...]], ...]
    num_rows: int
    num_learning_rows: int
    seed: int
    split: str
    dtype: str
    fingerprint: str
    versions: dict[str, str]
    expected: Expectation | None = None
    promise: Promise | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values and their sum; `from_dict` reads them back."""
        values = self._values()
        return {**values, SUM: json_sum(values)}

    def _values(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["exits"] = [dataclasses.asdict(report) for report in self.exits]
        fields["classes"] = [dataclasses.asdict(report) for report in self.classes]
        fields["curve"] = [[cost, quality, list(thresholds)] for cost, quality, thresholds in self.curve]
        fields["expected"] = None if self.expected is None else dataclasses.asdict(self.expected)
        fields["promise"] = None if self.promise is None else self.promise.to_dict()
        return {"format": self.FORMAT, **fields, "policy": self.policy.to_dict(), "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CalibrationResult:
        """The result that `to_dict` described, one of a model that writes as such.

        Raises:
            CheckpointError: for another format, a field that is missing or cannot be, figures that do not fit each other, or
                values that were changed since they were written.
            PolicyError, UnknownNameError: for an impossible policy.
        """
        kinds = {kind.FORMAT: kind for kind in (cls, *cls.__subclasses__())}
        form = values.get("format") if isinstance(values, dict) else None
        if not isinstance(form, str) or form not in kinds:
            raise CheckpointError(
                f"Calibration has format {form!r}; expected {' or '.join(map(repr, kinds))}.", field="format"
            )
        given = {name: value for name, value in values.items() if name != SUM}
        result = kinds[form]._from_values({name: value for name, value in given.items() if name != "format"})
        if values.get(SUM) != json_sum(given):
            raise CheckpointError(
                "Its numbers were changed since calibrate wrote them, so nothing vouches for them.",
                field=SUM,
                value=values.get(SUM),
            )
        return result

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> CalibrationResult:
        policy = ExitPolicy.from_dict(values.get("policy"))  # type: ignore[arg-type]
        check_known(values, (field.name for field in dataclasses.fields(cls)))
        check_calibration(values, policy)
        given = {**values, "policy": policy, "notes": tuple(values["notes"])}
        given["exits"] = tuple(ExitReport(**report) for report in values["exits"])
        given["classes"] = tuple(ClassReport(**report) for report in values.get("classes", ()))
        given["curve"] = tuple((cost, quality, tuple(thresholds)) for cost, quality, thresholds in values["curve"])
        for name, kind in (("expected", Expectation), ("promise", Promise)):
            given[name] = None if values.get(name) is None else kind.from_dict(values[name])
        return cls(**given)

    def save(self, path: str | PathLike[str]) -> None:
        """Write one JSON file."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> CalibrationResult:
        """Read what `save` wrote.

        Raises:
            CheckpointError: naming the file, and the field where one is at fault.
        """
        values = read_json(path)
        with named_in(path):
            return cls.from_dict(values)

    def __str__(self) -> str:
        rows = f"{self.num_rows} rows of {self.split!r}"
        if self.num_learning_rows:
            rows += f" (and {self.num_learning_rows} others for the policy's own numbers)"
        drop = self.quality - self.full_quality
        head = [
            f"{self.policy.name} for {self.target}, thresholds chosen on {rows}",
            f"{self.metric} {self.quality:.4f} against {self.full_quality:.4f} of the full model "
            f"({drop:+.4f}, standard error {self.standard_error:.4f})",
            f"mean layers {self.mean_layers:.2f} of {self.exits[-1].layer}: layer speed-up {self.layer_speed_up:.2f}x",
            *([] if self.expected is None else [str(self.expected)]),
            *([] if self.promise is None else [self.promise.in_words()]),
            "",
            "layer  threshold   share  quality  of leavers  last exit on them",
        ]
        exits, classes = [_line(report) for report in self.exits], class_lines(self.classes)
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([*head, *exits, *([""] if classes else []), *classes, *notes])


@contextmanager
def named_in(path: str | PathLike[str], place: str = "") -> Iterator[None]:
    """Add to errors about a stored calibration the file that it is in, and its place there.

    Args:
        path: of the file.
        place: such as "results.fast.".
    """
    try:
        yield
    except EarlyExitError as error:
        field = None if error.field is None else place + error.field
        raise CheckpointError(
            f"{path} is not a saved calibration ({place}{error} Calibrate again.)", field=field, value=error.value, path=path
        ) from error


def _line(report: ExitReport) -> str:
    def number(value: float | None, width: int) -> str:
        return "-".rjust(width) if value is None else f"{value:{width}.4f}"

    return (
        f"{report.layer:5d} {number(report.threshold, 10)} {report.share:7.1%} {report.quality:8.4f} "
        f"{number(report.quality_of_leavers, 11)} {number(report.last_quality_of_leavers, 18)}"
    )
