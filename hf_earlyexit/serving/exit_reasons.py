"""Why a row left where it did, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ExitView:
    """What one exit saw: its layer, prediction, score (`None` if muted), threshold (`None` if closed) and verdict."""

    layer: int
    prediction: str
    score: float | None
    threshold: float | None
    verdict: str


def in_words(views: Sequence[ExitView], taken: int, classes: bool = True) -> str:
    """Why the row left at one of its exits and not before, whether the exits up to there agreed, and what the last one says.

    Args:
        views: all exits in order.
        taken: index (0-based) of the one it leaves at.
        classes: whether predictions are classes, so that two exits can agree.
    """
    sentences = [_why(views, taken)]
    asked = [view for view in views[: taken + 1] if view.verdict != "muted"]
    if classes:
        sentences += _agreement(asked)
        if taken < len(views) - 1 and views[-1].prediction != views[taken].prediction:
            sentences.append(f"The last layer would say {views[-1].prediction}.")
    muted = [view for view in views[: taken + 1] if view.verdict == "muted"]
    if muted:
        sentences.append(f"{_layers(muted).capitalize()} {_is(muted)} muted and had no say.")
    return " ".join(sentences)


def _why(views: Sequence[ExitView], taken: int) -> str:
    here = views[taken]
    if taken < len(views) - 1:
        return (
            f"Left after layer {here.layer} of {views[-1].layer} because its score {here.score:.4g} reached the threshold "
            f"{here.threshold:.4g}."
        )
    asked = ((view.layer, view.score, view.threshold) for view in views[:-1])
    short = [(layer, score, bar) for layer, score, bar in asked if score is not None and bar is not None]
    if not short:
        return f"Went through all {here.layer} layers because no exit before the last is open."
    layer, score, bar = min(short, key=lambda one: (one[2] - one[1]) / max(abs(one[2]), 1e-12))
    return (
        f"Went through all {here.layer} layers because no score reached its threshold; nearest was layer {layer} "
        f"with {score:.4g} of {bar:.4g}."
    )


def _agreement(asked: Sequence[ExitView]) -> list[str]:
    """Where neighbouring exits said different things."""
    changes = [index for index in range(1, len(asked)) if asked[index].prediction != asked[index - 1].prediction]
    if len(asked) < 2:
        return []
    if not changes:
        return [f"{_layers(asked).capitalize()} agreed on {asked[-1].prediction}."]
    if len(changes) == 1:
        before, after = asked[changes[0] - 1], asked[changes[0]]
        clash = f"{_layers([before, after]).capitalize()} disagreed"
        return [f"{clash}: {before.prediction} before, {after.prediction} from then on."]
    steps = [f"{asked[0].prediction} at layer {asked[0].layer}"]
    steps += [f"{asked[index].prediction} from layer {asked[index].layer}" for index in changes]
    return [f"The answer changed {len(changes)} times: {', '.join(steps)}."]


def _layers(views: Sequence[ExitView]) -> str:
    numbers = [str(view.layer) for view in views]
    return f"layer {numbers[0]}" if len(views) == 1 else f"layers {', '.join(numbers[:-1])} and {numbers[-1]}"


def _is(views: Sequence[ExitView]) -> str:
    return "is" if len(views) == 1 else "are"
