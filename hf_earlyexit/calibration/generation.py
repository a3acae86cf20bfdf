"""What a calibration of a model that writes found: settings that were tried by real generation, and the one chosen."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .proposals import Thresholds
from .result import CalibrationResult
from .search import Curve
from .stored import check_fields, check_known, check_thresholds, wrong

FULL = "full model"
GENERATION_FIELDS = {
    "metric": "text",
    "settings": "objects",
    "chosen": "count",
    "exit_decay": "error or null",
    "num_tokens": "rows",
    "generation": "object",
}
SETTING_FIELDS = {
    "kind": "text",
    "mean_layers": "positive",
    "mean_cost": "positive",
    "layer_speed_up": "positive",
    "score": "number",
    "difference": "number",
    "standard_error": "error",
    "trace_layers": "positive",
}


@dataclass(frozen=True, kw_only=True)
class GenerationSetting:
    """A setting and what real generation with it gave.

    Attributes:
        kind: "full model", "one threshold" or "per exit".
        thresholds: one per exit but the last; `None` closes the exit.
        mean_layers, mean_cost: per generated token; layer_speed_up: number of layers over mean layers.
        score: mean over texts; difference: to the full model's texts, one by one; standard_error: of it.
        trace_layers: mean layers that the token trace let expect.
    """

    kind: str
    thresholds: Thresholds
    mean_layers: float
    mean_cost: float
    layer_speed_up: float
    score: float
    difference: float
    standard_error: float
    trace_layers: float


@dataclass(frozen=True, kw_only=True)
class GenerationCalibrationResult(CalibrationResult):
    """Thresholds of a captioner or language model, how they were chosen and what real generation with them gave.

    What it shares with `CalibrationResult` is about texts (quality, standard error, `num_rows`) and generated tokens
    (layers, shares). In `exits`, quality is agreement with the full model's word on the token trace.

    Attributes:
        metric: name of the score; settings: everything that was tried, the full model first; chosen: its place.
        exit_decay: of the model whose texts were scored; num_tokens: of the trace.
        generation: what `generate` was told.
    """

    FORMAT: ClassVar[str] = "hf_earlyexit.generation-calibration/1"

    settings: tuple[GenerationSetting, ...]
    chosen: int
    exit_decay: float | None
    num_tokens: int
    generation: dict[str, Any]

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> GenerationCalibrationResult:
        check_fields(values, GENERATION_FIELDS)
        policy = values.get("policy")
        thresholds = policy.get("thresholds") if isinstance(policy, dict) else None
        count = len(thresholds) if isinstance(thresholds, list) else 0
        for index, setting in enumerate(values["settings"]):
            place = f"settings[{index}]."
            check_known(setting, (field.name for field in dataclasses.fields(GenerationSetting)), place)
            check_fields(setting, SETTING_FIELDS, place)
            check_thresholds(setting.get("thresholds"), count, f"{place}thresholds")
        if values["chosen"] >= len(values["settings"]):
            raise wrong("chosen", values["chosen"], f"a place among the {len(values['settings'])} settings")
        settings = tuple(GenerationSetting(**{**one, "thresholds": tuple(one["thresholds"])}) for one in values["settings"])
        return super()._from_values({**values, "settings": settings})  # type: ignore[return-value]

    def _values(self) -> dict[str, Any]:
        settings = [{**dataclasses.asdict(one), "thresholds": list(one.thresholds)} for one in self.settings]
        return {**super()._values(), "settings": settings}

    def __str__(self) -> str:
        head = [
            f"{self.policy.name} for {self.target}, thresholds chosen on the texts of {self.num_rows} rows of "
            f"{self.split!r}, {self.metric}",
            f"score {self.quality:.4f} against {self.full_quality:.4f} of the full model "
            f"({self.quality - self.full_quality:+.4f}, standard error {self.standard_error:.4f})",
            f"mean layers {self.mean_layers:.2f} of {self.exits[-1].layer} a token: layer speed-up "
            f"{self.layer_speed_up:.2f}x",
            *([] if self.promise is None else [self.promise.in_words()]),
            "",
            "   setting        on trace  layers  speed-up    score  difference  standard error",
        ]
        lines = [
            f"{'>' if place == self.chosen else ' '}  {one.kind:13} {one.trace_layers:9.2f} {one.mean_layers:7.2f} "
            f"{one.layer_speed_up:8.2f}x {one.score:8.4f} {one.difference:+11.4f} {one.standard_error:15.4f}"
            for place, one in enumerate(self.settings)
        ]
        return "\n".join(head + lines + [f"note: {note}" for note in self.notes])


def settings_curve(settings: tuple[GenerationSetting, ...]) -> Curve:
    """The settings as targets read them, the full model first."""
    vectors = [[np.nan if value is None else value for value in one.thresholds] for one in settings]
    columns = ([getattr(one, name) for one in settings] for name in ("mean_cost", "score", "standard_error"))
    return Curve(np.array(vectors, dtype=float), *(np.array(column, dtype=float) for column in columns))
