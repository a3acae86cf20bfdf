"""The card of a model with exits: what it says is data gathered here; how it says it is in the template beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResultEntry, ModelCardData
from huggingface_hub._eval_results import eval_result_entries_to_yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from transformers.utils import logging

from ..calibration.by_class import MOST as MOST_CLASSES
from ..calibration.by_class import to_show
from ..calibration.replay import Replay
from ..calibration.result import CalibrationResult
from ..doors import CAPTIONING
from ..errors import UsageError
from ..families.base import IMAGE, TEXT
from ..losses import OBJECTIVES
from ..metrics import f1_name
from ..modeling.protocol import ExitModel
from ..policies import POLICIES
from ..problem_types import REGRESSION, SINGLE_LABEL, quality_name
from ..timing import Timing
from .markdown import escape, hub_id, without_private

METRICS = {SINGLE_LABEL: ["accuracy"], REGRESSION: ["mse"]}
MOST_LABELS = 20


class CardKind(NamedTuple):
    """What a card calls things.

    Attributes:
        task: of our pipeline.
        tag: task on the Hub.
        about: template of the card's beginning.
        title: of a card that goes to no repository.
        unit: what leaves early.
        inputs: what is answered.
        example: one of them, in code.
        measure: name of the quality; `None` for that of the problem.
    """

    task: str
    tag: str
    about: str
    title: str
    unit: str
    inputs: str
    example: str
    measure: str | None = None


TEXT_CARD = CardKind(
    task=TEXT,
    tag=TEXT,
    about="about_classifier.md",
    title="Text classifier",
    unit="text",
    inputs="texts",
    example="one text",
)
IMAGE_CARD = CardKind(
    task=IMAGE, tag=IMAGE, about="about_image_classifier.md", title="Image classifier", unit="picture", inputs="pictures",
    example="one.jpg",
)  # fmt: skip
CAPTIONER_CARD = CardKind(
    task=CAPTIONING, tag="image-text-to-text", about="about_captioner.md", title="Captioner", unit="token",
    inputs="pictures", example="one.jpg", measure="token accuracy",
)  # fmt: skip

logger = logging.get_logger(__name__)


def model_card_files(
    model: ExitModel,
    calibration: Mapping[str, CalibrationResult],
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    datasets: Iterable[str] = (),
    language: str | list[str] | None = None,
    license: str | None = None,
    evaluations: Mapping[str, Replay] | None = None,
    evaluated_on: str | None = None,
    timings: Mapping[str, Timing] | None = None,
    timed_on: str | None = None,
    objective: str | None = None,
    f1s: Mapping[str, tuple[float, float]] | None = None,
) -> dict[str, bytes]:
    """The files that describe a model on the Hub: card, results and plots.

    Args:
        model: with exits; its config gives layers, labels and the policy in service.
        calibration: how the thresholds of each operating point were chosen, by its name; a card without any says so.
        repo_id: where the card goes, for the examples in it.
        base_model: Hub id of the checkpoint the exits were put on; by default where the model was loaded from. Left out if
            it is a local path.
        datasets: Hub ids of the data; local paths are left out.
        language: code or codes of ISO 639.
        license: an identifier of the Hub, such as "apache-2.0".
        evaluations: what the operating points did on rows that chose nothing, by name.
        evaluated_on: Hub id of the data the evaluations are from; by default the only one of `datasets`.
        timings: measured speed against the full model, by name of the operating point.
        timed_on: rows and machine of the timings, in words.
        objective: registered name of what the exits were trained with, to tell and to cite.
        f1s: F1 of the early answers and of the full model on the rows of `evaluations`, by name of the operating point.

    Returns:
        Contents by path: `README.md`; for each accuracy on named data `.eval_results/<point>.yaml`; and, with a calibration
        and where matplotlib is installed, `plots/pareto.svg` and `plots/exits.svg`.

    Raises:
        UsageError: for figures of an operating point that calibration does not have, or two points with one file name.
        UnknownNameError: for an objective that is not registered.
    """
    evaluations, timings = dict(evaluations or {}), dict(timings or {})
    f1s = dict(f1s or {})
    _check_points(calibration, evaluations=evaluations, timings=timings, f1s=f1s)
    base_model = hub_id(base_model or model.config.name_or_path or None)
    known = [name for name in map(hub_id, datasets) if name is not None]
    data_name = hub_id(evaluated_on) or (known[0] if len(known) == 1 else None)
    problem = model.config.resolved_problem_type
    kind = _kind_of(model.config)
    measure = kind.measure or quality_name(problem)
    served = model.exit_policy
    rules = [result.policy for result in calibration.values()] + ([] if served is None else [served])
    policies = list(dict.fromkeys(rule.name for rule in rules))
    meta = ModelCardData(
        library_name="transformers",  # any other value makes `pipeline(model=...)` refuse the model
        pipeline_tag=kind.tag,
        tags=["hf_earlyexit", "early-exit", *policies],
        base_model=base_model,
        base_model_relation=None if base_model is None else "finetune",
        datasets=known or None,
        language=language,
        license=license,
        metrics=None if kind is CAPTIONER_CARD else METRICS.get(problem),
    )
    files = _plots(model, calibration, evaluations, measure)
    labels = [] if kind is CAPTIONER_CARD else [str(name) for _, name in sorted(model.config.id2label.items())]
    judged = {name: evaluations.get(name, result) for name, result in calibration.items()}
    files["README.md"] = _render(
        meta=Markup(meta.to_yaml()),
        title=(hub_id(repo_id) or kind.title).split("/")[-1],
        where=Markup(hub_id(repo_id) or "FOLDER_OR_HUB_ID"),
        base_model=base_model,
        about=kind.about,
        objective=objective,
        task=kind.task,
        unit=kind.unit,
        inputs=kind.inputs,
        example=kind.example,
        layers=model.exit_layers,
        labels=labels[:MOST_LABELS],
        more_labels=max(len(labels) - MOST_LABELS, 0),
        measure=measure,
        points=calibration,
        served=[name for name, result in calibration.items() if result.policy == served],
        callable_points=[Markup(json.dumps(name)) for name in getattr(model.config, "exit_operating_points", None) or {}],
        evaluations=evaluations,
        data_name=data_name,
        timings=timings,
        f1s=f1s,
        f1_name=f1_name(problem),
        classes={name: to_show(done.classes) for name, done in judged.items() if done.classes and labels},  # not of words
        class_names=labels,
        all_classes=len(labels),
        most_classes=MOST_CLASSES,
        plain_metrics=("accuracy", "mse"),  # named by the heading already
        timed_on=None if timed_on is None else without_private(timed_on),
        has_plots=bool(files),
        notes={name: [without_private(note) for note in result.notes] for name, result in calibration.items()},
        citations=[Markup(text) for text in _citations(policies, objective)],
    ).encode()
    if data_name is not None and problem == SINGLE_LABEL and kind is not CAPTIONER_CARD:
        for name, done in evaluations.items():
            path = f".eval_results/{file_name(name)}.yaml"
            if path in files:
                raise UsageError(f"Two operating points would both be written to {path}; rename {name!r}.", value=name)
            files[path] = _eval_result(name, done, data_name).encode()
    return files


def _kind_of(config: Any) -> CardKind:
    """What a model's card calls things, by the Auto class that loads it."""
    autos = getattr(config, "auto_models", ())
    if "AutoModelForImageTextToText" in autos:
        return CAPTIONER_CARD
    return IMAGE_CARD if "AutoModelForImageClassification" in autos else TEXT_CARD


def _citations(policies: Iterable[str], objective: str | None) -> list[str]:
    """BibTeX of the policies and the objective, each entry once, in their order."""
    used = [POLICIES.get(name).citation for name in policies]
    used += [] if objective is None else [OBJECTIVES.get(objective).citation]
    return list(dict.fromkeys(entry for entries in used for entry in entries))


def file_name(point: str) -> str:
    """The name of an operating point as a file name: letters, digits, `-` and `_`, whatever the point is called."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", point).strip("-") or "point"


def _check_points(calibration: Mapping[str, Any], **figures: Mapping[str, Any]) -> None:
    known = ", ".join(calibration) or "none"
    for field, by_name in figures.items():
        for name in by_name:
            if name not in calibration:
                raise UsageError(
                    f"{field} has {name!r}; expected operating points of calibration: {known}.",
                    field=field,
                    value=name,
                )


def _render(**data: Any) -> str:
    environment = Environment(
        loader=PackageLoader("hf_earlyexit.hub", "."),
        finalize=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["public"] = without_private
    return environment.get_template("model_card_template.md").render(**data)


def _eval_result(name: str, done: Replay, data_name: str) -> str:
    """One operating point in the Hub's form for results."""
    depth = done.exits[-1].layer
    entry = EvalResultEntry(
        dataset_id=data_name,
        task_id="default",
        value=done.quality,
        notes=f"{name}: mean exit {done.mean_layers:.2f}/{depth}, full model {done.full_quality:.4f}, "
        f"standard error of the difference {done.standard_error:.4f}",
    )
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)


def _plots(
    model: ExitModel, calibration: Mapping[str, CalibrationResult], evaluations: Mapping[str, Replay], measure: str
) -> dict[str, bytes]:
    if not calibration:
        return {}
    if find_spec("matplotlib") is None:
        logger.warning_once("The card has no plots: they need matplotlib. Run `pip install 'hf_earlyexit[report]'`.")
        return {}
    from ..plots.figures import Mark, PlotLine, exit_shares_svg, pareto_svg

    lines: dict[tuple[str, tuple[tuple[float, float], ...]], list[str]] = {}
    for name, result in calibration.items():
        points = tuple(sorted((cost, quality) for cost, quality, _ in result.curve))
        lines.setdefault((result.policy.name, points), []).append(name)
    drawn = [
        PlotLine(f"{policy} ({', '.join(names)})", [cost for cost, _ in points], [quality for _, quality in points], "bold")
        for (policy, points), names in lines.items()
    ]
    shown = [Mark(name, result.mean_cost, result.quality, result.standard_error) for name, result in calibration.items()]
    first = next(iter(calibration.values()))
    full = Mark("full model", first.curve[0][0], first.full_quality)
    done = {name: evaluations.get(name, result) for name, result in calibration.items()}
    shares = {name: [report.share for report in outcome.exits] for name, outcome in done.items()}
    return {
        "plots/pareto.svg": pareto_svg(drawn, shown, full, measure).encode(),
        "plots/exits.svg": exit_shares_svg(shares, model.exit_layers).encode(),
    }
