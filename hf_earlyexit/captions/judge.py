"""Captions of held-back images, scored one by one against references or the full model's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..calibration.proposals import Proposal
from ..errors import DataError
from .metrics import rouge_l
from .result import CaptionSetting
from .token_trace import Captions

CaptionMetric = Callable[[list[str], list[list[str]]], Sequence[float]]


class Judge:
    """Compares captions with the full model's, image by image.

    Args:
        model: the captioner.
        full: the full model's captions, by batch.
        tokenizer: `None` to compare ids.
        references: of each image; `None` for the full model's own captions.
        metric: `None` for ROUGE-L.
    """

    def __init__(
        self,
        model: Any,
        full: list[Captions],
        tokenizer: Any,
        references: list[list[str]] | None,
        metric: CaptionMetric | None,
    ) -> None:
        self.layers = model.exit_layers
        self.costs = np.asarray(model.config.exit_cost or self.layers, dtype=float)
        self.tokenizer, self.metric = tokenizer, metric or rouge_l
        self.references = references or [[caption] for caption in self._texts(full)]
        self.full_scores = self._scores(full)

    @property
    def metric_name(self) -> str:
        """What the metric calls itself, and what it is measured against."""
        return getattr(self.metric, "__name__", type(self.metric).__name__)

    def setting(self, proposal: Proposal, written: list[Captions]) -> CaptionSetting:
        """What a proposal's captions are worth and cost."""
        scores, exits = self._scores(written), self.exits_of(written)
        apart = scores - self.full_scores
        mean_layers = float(np.asarray(self.layers)[exits].mean())
        return CaptionSetting(
            kind=proposal.kind,
            thresholds=proposal.thresholds,
            mean_layers=mean_layers,
            mean_cost=float(self.costs[exits].mean()),
            layer_speed_up=self.layers[-1] / mean_layers,
            score=float(scores.mean()),
            difference=float(apart.mean()),
            standard_error=float(apart.std() / math.sqrt(len(apart))),
            trace_layers=proposal.trace_layers,
        )

    def exits_of(self, written: list[Captions]) -> np.ndarray:
        """Exit index of every generated token, `[T]`."""
        left = np.concatenate([part.exit_layers[part.exit_layers > 0].numpy() for part in written])
        return np.searchsorted(self.layers, left)

    def _scores(self, written: list[Captions]) -> np.ndarray:
        captions = self._texts(written)
        scores = np.asarray(self.metric(captions, self.references), dtype=float)
        if scores.shape != (len(captions),):
            raise DataError(
                f"The metric {self.metric_name} gave {scores.shape} for {len(captions)} captions; expected one finite "
                "number per caption.",
                field="metric",
            )
        if (wrong := np.flatnonzero(~np.isfinite(scores))).size:
            raise DataError(
                f"The metric {self.metric_name} gave {scores[wrong[0]]} for caption {wrong[0]}, {captions[wrong[0]]!r}; "
                "expected one finite number per caption.",
                field="metric",
            )
        return scores

    def _texts(self, written: list[Captions]) -> list[str]:
        if self.tokenizer is not None:
            ids = [row for part in written for row in part.sequences.tolist()]
            return list(self.tokenizer.batch_decode(ids, skip_special_tokens=True))
        return [_spelled(*row) for part in written for row in zip(part.sequences, part.exit_layers, strict=True)]


def _spelled(ids: Tensor, exit_layers: Tensor) -> str:
    """The generated ids as words."""
    return " ".join(map(str, ids[exit_layers > 0].tolist()))


def listed_references(references: Sequence[Any] | None, count: int, tokenizer: Any) -> list[list[str]] | None:
    """References as one list of captions per image; `None` if there are none.

    Raises:
        DataError: for another number of images, or an image without a caption.
    """
    if references is None:
        return None
    if tokenizer is None:
        raise DataError("references are texts; pass the tokenizer that turns ids into captions.", field="tokenizer")
    listed = [[captions] if isinstance(captions, str) else list(captions) for captions in references]
    if len(listed) != count:
        raise DataError(
            f"references has {len(listed)} entries for {count} images; expected a caption or a list of captions for each.",
            field="references",
        )
    empty = next((row for row, captions in enumerate(listed) if not captions), None)
    if empty is not None:
        raise DataError(f"references[{empty}] is empty; expected a caption at least.", field="references")
    return listed
