"""What a model wrote after held-back prompts, scored text by text against references or the full model's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..calibration.generation import GenerationSetting
from ..calibration.proposals import Proposal
from ..errors import DataError
from ..modeling.protocol import ExitModel
from .metrics import rouge_l
from .token_trace import Written

TextMetric = Callable[[list[str], list[list[str]]], Sequence[float]]


class Judge:
    """Compares texts with the full model's, prompt by prompt.

    Args:
        model: the captioner or language model.
        full: the full model's texts, by batch.
        tokenizer: `None` to compare ids.
        references: of each prompt or image; `None` for the full model's own texts.
        metric: `None` for ROUGE-L.

    Attributes:
        measure: the metric, and what texts are measured against, in words.
    """

    def __init__(
        self,
        model: ExitModel,
        full: list[Written],
        tokenizer: Any,
        references: list[list[str]] | None,
        metric: TextMetric | None,
    ) -> None:
        self.layers = model.exit_layers
        self.costs = np.asarray(model.config.exit_cost or self.layers, dtype=float)
        self.tokenizer, self.metric = tokenizer, metric or rouge_l
        self.measure = f"{self.metric_name} against {'references' if references else 'the full model'}"
        self.references = references or [[text] for text in self._texts(full)]
        self.full_scores = self._scores(full)

    @property
    def metric_name(self) -> str:
        """What the metric calls itself."""
        return getattr(self.metric, "__name__", type(self.metric).__name__)

    def setting(self, proposal: Proposal, written: list[Written]) -> GenerationSetting:
        """What a proposal's texts are worth and cost."""
        scores, exits = self._scores(written), self.exits_of(written)
        apart = scores - self.full_scores
        mean_layers = float(np.asarray(self.layers)[exits].mean())
        return GenerationSetting(
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

    def scored(self, written: list[Written]) -> tuple[np.ndarray, list[str]]:
        """The score of each text `[N]`, and the texts."""
        return self._scores(written), self._texts(written)

    def exits_of(self, written: list[Written]) -> np.ndarray:
        """Exit index of every generated token, `[T]`."""
        left = np.concatenate([part.exit_layers[part.exit_layers > 0].numpy() for part in written])
        return np.searchsorted(self.layers, left)

    def _scores(self, written: list[Written]) -> np.ndarray:
        texts = self._texts(written)
        scores = np.asarray(self.metric(texts, self.references), dtype=float)
        if scores.shape != (len(texts),):
            raise DataError(
                f"The metric {self.metric_name} gave {scores.shape} for {len(texts)} texts; expected one finite "
                "number per text.",
                field="metric",
            )
        if (wrong := np.flatnonzero(~np.isfinite(scores))).size:
            raise DataError(
                f"The metric {self.metric_name} gave {scores[wrong[0]]} for text {wrong[0]}, {texts[wrong[0]]!r}; "
                "expected one finite number per text.",
                field="metric",
            )
        return scores

    def _texts(self, written: list[Written]) -> list[str]:
        """What was written, without the prompts: as text, or its ids as words."""
        ids = [row[left > 0].tolist() for part in written for row, left in zip(*part, strict=True)]
        if self.tokenizer is None:
            return [" ".join(map(str, row)) for row in ids]
        return list(self.tokenizer.batch_decode(ids, skip_special_tokens=True))


def listed_references(references: Sequence[Any] | None, count: int, tokenizer: Any) -> list[list[str]] | None:
    """References as one list of texts for each prompt or image; `None` if there are none.

    Raises:
        DataError: for another number of prompts, or one without a reference.
    """
    if references is None:
        return None
    if tokenizer is None:
        raise DataError("references are texts; pass the tokenizer that turns ids into texts.", field="tokenizer")
    listed = [[texts] if isinstance(texts, str) else list(texts) for texts in references]
    if len(listed) != count:
        raise DataError(
            f"references has {len(listed)} entries for {count} rows; expected a text or a list of texts for each.",
            field="references",
        )
    empty = next((row for row, texts in enumerate(listed) if not texts), None)
    if empty is not None:
        raise DataError(f"references[{empty}] is empty; expected a text at least.", field="references")
    return listed
