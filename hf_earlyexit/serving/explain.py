"""One row's way through the layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UsageError
from ..images import picture_name
from ..modeling.finite import check_finite
from ..modeling.protocol import ExitModel, Wrapped
from ..policies import ExitPolicy
from ..problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL, predictions
from ..signals import known_signals
from ..trace import ExitTrace
from .batching import pad_batch
from .exit_reasons import ExitView, in_words
from .graph_walker import walker_for
from .reader import first_error, reader_for
from .served import served_classifier


@dataclass(frozen=True)
class Explanation:
    """A row's exits in order, the layer it leaves after, and why, in a few sentences."""

    text: str
    exit_layer: int
    exits: tuple[ExitView, ...]
    reason: str

    def __str__(self) -> str:
        width = max(18, *(len(view.prediction) for view in self.exits))  # an answer cut short would be another one
        head = [repr(self.text), self.reason, f"layer  {'prediction':{width}s}    score  threshold  verdict"]
        return "\n".join(head + [_line(view, width) for view in self.exits])


def explain(
    model: Wrapped,
    row: Any,
    *,
    tokenizer: Any = None,
    image_processor: Any = None,
    max_length: int | None = None,
    operating_point: str | None = None,
) -> Explanation:
    """Show what every exit says of a row, and why it leaves where it does. All layers are run for it.

    Args:
        model: a model with a policy.
        row: a text, or a pair of texts; for image classifiers a picture, in any form that `predict` takes.
        tokenizer: the model's, for texts.
        image_processor: the model's, for pictures.
        max_length: cut a longer text; the tokenizer's own limit by default.
        operating_point: name of the policy to explain; `exit_policy` by default.

    Raises:
        UsageError: if there is no policy: none is set, or "exact" is asked for.
        UnknownNameError: for an unknown operating point.
    """
    served = served_classifier(model)
    policy = served.policy_at(operating_point)
    if operating_point is not None and policy is None:
        raise UsageError(f"At {operating_point!r} every row runs through all layers; there is nothing to explain.")
    if policy is None:
        raise UsageError("The model has no exit policy; calibrate first and call `model.set_exit_policy(result.policy)`.")
    reader = reader_for(served, tokenizer, max_length, image_processor)
    encoded = reader.encode_all([row])[:]
    first_error(encoded, walker_for(served, cuda_graphs=False).check, 0)
    batch = pad_batch(encoded)
    with torch.inference_mode():
        output = served(**batch.to(served.device), early_exit=False, exit_signals=known_signals(policy.asks))
    check_finite(output.exit_logits, [0])
    trace = ExitTrace(
        logits=output.exit_logits.float().cpu(),
        labels=torch.zeros(1, dtype=torch.long),
        exit_layers=served.exit_layers,
        scalars={name: values.float().cpu() for name, values in (output.exit_scalars or {}).items()},
    )
    scores = policy.scan(trace).scores
    taken = int(policy.decide(scores)[0])
    views = tuple(_view(served, policy, trace, scores, index, taken) for index in range(trace.num_exits))
    text = _name_of(row) if reader.images else _text_of(row)
    reason = in_words(views, taken, classes=policy.problem_type != REGRESSION)
    return Explanation(text, served.exit_layers[taken], views, reason)


def _name_of(row: Any) -> str:
    return picture_name(row.get("path") if isinstance(row, Mapping) else row) or "picture"


def _text_of(row: Any) -> str:
    if isinstance(row, Mapping):
        return f"{len(row['input_ids'])} token ids"
    return row if isinstance(row, str) else " | ".join(row)


def _answer(model: ExitModel, logits: torch.Tensor, problem_type: str) -> str:
    """What an exit answers, in words: its class, the labels that it gives, or its values.

    Args:
        model: for the names of its labels.
        logits: `[C]`.
        problem_type: one of `PROBLEM_TYPES`.
    """
    prediction = predictions(logits, problem_type)
    if problem_type == SINGLE_LABEL:
        return str(model.config.id2label[int(prediction)])
    if problem_type == MULTI_LABEL:
        return ", ".join(model.config.id2label[place] for place in prediction.nonzero()[:, 0].tolist()) or "no label"
    return ", ".join(f"{value:.3g}" for value in prediction.tolist())


def _view(model: ExitModel, policy: ExitPolicy, trace: ExitTrace, scores: torch.Tensor, index: int, taken: int) -> ExitView:
    last = index == trace.num_exits - 1
    threshold = None if last else policy.thresholds[index]
    muted = index in policy.muted
    if index > taken:
        verdict = "not reached"
    elif index == taken:
        verdict = "leaves: last layer" if last else "leaves: score reaches the threshold"
    else:
        verdict = "muted" if muted else "closed" if threshold is None else "stays: score below the threshold"
    answer = _answer(model, trace.logits[0, index], policy.problem_type)
    return ExitView(model.exit_layers[index], answer, None if muted else float(scores[0, index]), threshold, verdict)


def _line(view: ExitView, width: int) -> str:
    score, threshold = ("-" if x is None else f"{x:.4f}" for x in (view.score, view.threshold))
    return f"{view.layer:5d}  {view.prediction:{width}s} {score:>8s} {threshold:>10s}  {view.verdict}"
