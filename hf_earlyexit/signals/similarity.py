"""How little a layer changed the state."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from .base import ExitPoint, Signal, missing, register_signal


@register_signal("similarity")
class SimilaritySignal(Signal):
    """The cosine of the states before and after the exit's layer."""

    words: ClassVar[str] = "cosines of the states before and after a layer"
    reads_states: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (-1.0, 1.0)

    @staticmethod
    def of(point: ExitPoint) -> Tensor:
        if point.before is None or point.after is None:
            raise missing("similarity")
        return cosine(point.before, point.after)


def cosine(before: Tensor, after: Tensor) -> Tensor:
    """Cosine of states `[..., H]`, `[...]`, in float32; the same to the bit in every batch size."""
    before, after = before.float(), after.float()
    inner, first, second = (before * after).sum(-1), before.square().sum(-1), after.square().sum(-1)
    return inner / (first * second).sqrt().clamp_min(1e-12)
