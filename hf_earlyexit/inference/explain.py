"""One row's way through the layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UsageError
from ..problems import SINGLE_LABEL, predictions
from ..trace import ExitTrace
from .batching import evaluation_mode, pad_batch
from .rows import encode_rows


@dataclass(frozen=True)
class ExitView:
    """What one exit saw: its layer, prediction, score (`None` if muted), threshold (`None` if closed) and verdict."""

    layer: int
    prediction: str
    score: float | None
    threshold: float | None
    verdict: str


@dataclass(frozen=True)
class Explanation:
    """A row's exits in order, and the layer it leaves after."""

    text: str
    exit_layer: int
    exits: tuple[ExitView, ...]

    def __str__(self) -> str:
        head = [
            f"{self.text!r} leaves after layer {self.exit_layer}",
            "layer  prediction            score  threshold  verdict",
        ]
        return "\n".join(head + [_line(view) for view in self.exits])


def explain(model: Any, text: str | tuple[str, str], *, tokenizer: Any) -> Explanation:
    """Show what every exit says of a text, and why it leaves where it does. All layers are run for it.

    Args:
        model: a model with a policy.
        text: a text, or a pair of texts.
        tokenizer: the model's.

    Raises:
        UsageError: if the model has no policy.
    """
    policy = model.exit_policy
    if policy is None:
        raise UsageError("The model has no exit policy; calibrate first and call `model.set_exit_policy(result.policy)`.")
    batch = pad_batch(encode_rows([text], tokenizer), tokenizer.pad_token_id or 0)
    with torch.inference_mode(), evaluation_mode(model):
        logits = model(**batch.to(model.device), early_exit=False).exit_logits.float().cpu()
    trace = ExitTrace(logits=logits, labels=torch.zeros(1, dtype=torch.long), exit_layers=model.exit_layers)
    scores = policy.scan(trace).scores
    taken = int(policy.decide(scores)[0])
    views = tuple(_view(model, policy, trace, scores, index, taken) for index in range(trace.num_exits))
    return Explanation(text if isinstance(text, str) else " | ".join(text), model.exit_layers[taken], views)


def _view(model: Any, policy: Any, trace: ExitTrace, scores: torch.Tensor, index: int, taken: int) -> ExitView:
    last = index == trace.num_exits - 1
    threshold = None if last else policy.thresholds[index]
    muted = index in policy.muted
    if index > taken:
        verdict = "not reached"
    elif index == taken:
        verdict = "leaves: last layer" if last else "leaves: score reaches the threshold"
    else:
        verdict = "muted" if muted else "closed" if threshold is None else "stays: score below the threshold"
    prediction = predictions(trace.logits[0, index], policy.problem_type)
    if policy.problem_type == SINGLE_LABEL:
        said = model.config.id2label[int(prediction)]
    else:
        said = ", ".join(f"{value:.3g}" for value in prediction.float().tolist())
    return ExitView(model.exit_layers[index], said, None if muted else float(scores[0, index]), threshold, verdict)


def _line(view: ExitView) -> str:
    score, threshold = ("-" if x is None else f"{x:.4f}" for x in (view.score, view.threshold))
    return f"{view.layer:5d}  {view.prediction[:18]:18s} {score:>8s} {threshold:>10s}  {view.verdict}"
