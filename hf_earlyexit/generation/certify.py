"""Thresholds of a model that writes, with a promise about texts that nobody has seen.

Texts after some prompts put settings in the order of their cost; texts after others say how far along it what is lost stays
below a limit. A setting writes the certifying texts only once all before it were certified.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..calibration.certify import Certified, check_enough
from ..calibration.generation import GenerationSetting
from ..calibration.promise import Promise
from ..calibration.proposals import Proposal
from ..calibration.risks import DISAGREEMENT, DROP, Losses, Tally
from ..calibration.search import Array
from ..calibration.slices import Parts, parts_by
from ..calibration.walk import Walk
from ..errors import CalibrationError
from ..modeling.protocol import ExitModel
from ..policies.base import ExitPolicy
from .judge import Judge, TextMetric
from .metrics import bleu_1, rouge_l
from .token_trace import Written

WITHIN_ONE = (rouge_l, bleu_1)
Scored = tuple[Array, Sequence[str]]  # the score of each text [N], and the texts


def check_certifies_texts(target: Certified, metric: TextMetric | None, groups: Any) -> None:
    """Refuse what no number of texts could certify.

    Raises:
        CalibrationError: for labels, groups that are not there, or a metric whose differences have no bound.
    """
    if target.by not in (None, "group"):
        raise CalibrationError(
            f"by is {target.by!r}; texts are certified all together or by 'group'.", field="by", value=target.by
        )
    if (target.by is None) != (groups is None):
        raise CalibrationError(
            "groups and Certified(by='group') go together: pass the slice of each row as groups, or neither.", field="groups"
        )
    if target.risk != DISAGREEMENT and target.bound is None and metric is not None and metric not in WITHIN_ONE:
        name = getattr(metric, "__name__", type(metric).__name__)
        raise CalibrationError(
            f"bound is None; certifying texts by {name} needs the most by which two of them can differ, such as "
            "Certified(0.02, bound=10.0) for CIDEr: bigger differences are cut to it, and 0.02 is 0.02 of it.",
            field="bound",
        )


def everybody(count: int) -> Parts:
    """All texts as one group."""
    return {"all texts": np.ones(count, dtype=bool)}


class TextsAlong:
    """What texts lose along a path of settings, each looked at when it is asked for: see `calibration.walk.Along`.

    Args:
        target: what is promised.
        scored: of a setting by its place along the path; place 0 is the full model.
        count: settings.
        parts: the texts of each group.
        losses: the range of losses, and whether they are whole; by default as the texts show.
    """

    def __init__(
        self, target: Certified, scored: Callable[[int], Scored], count: int, parts: Parts, losses: Losses | None = None
    ) -> None:
        self.target, self.scored, self.count, self.parts = target, scored, count, parts
        self._known: dict[int, Array] = {}
        if losses is None:
            low = -1.0 if target.risk == DROP else 0.0
            losses = Losses(np.stack([self.at(place) for place in range(count)], 1), low, 1.0)
        self.losses = losses

    def __len__(self) -> int:
        return self.count

    def at(self, place: int) -> Array:
        if place not in self._known:
            (full, full_texts), (scores, texts) = self.scored(0), self.scored(place)
            if self.target.risk == DISAGREEMENT:
                loss = np.array([ours != theirs for ours, theirs in zip(texts, full_texts, strict=True)], dtype=float)
            else:
                loss = ((full - scores) / (self.target.bound or 1.0)).clip(-1.0 if self.target.risk == DROP else 0.0, 1.0)
            self._known[place] = loss
        return self._known[place]

    def tallies(self, place: int) -> list[Tally]:
        here = self.at(place)
        return [Tally(here[part], np.ones(int(part.sum()))) for part in self.parts.values()]


class Certifying:
    """The prompts that certify.

    Args:
        target: what is promised.
        model: the captioner or language model.
        write: texts after prompts, by the full model or a policy.
        prompts, known: of all rows, with their references if there are any; places: of those that certify.
        tokenizer, metric: as for `Judge`.
        groups: slice of each of all rows; `None` certifies them together.
    """

    def __init__(
        self,
        target: Certified,
        model: ExitModel,
        write: Callable[[Sequence[Any], ExitPolicy | None], list[Written]],
        prompts: Sequence[Any],
        known: list[list[str]] | None,
        places: Sequence[int],
        tokenizer: Any,
        metric: TextMetric | None,
        groups: NDArray[Any] | None,
    ) -> None:
        self.parts = everybody(len(places)) if groups is None else parts_by("group", groups[list(places)])
        self.target, self.model, self.write = target, model, write
        self.prompts, self.known = [prompts[place] for place in places], known and [known[place] for place in places]
        self.tokenizer, self.metric = tokenizer, metric or rouge_l
        self._written: dict[int, list[Written]] = {}

    @cached_property
    def judge(self) -> Judge:
        """Of their texts, once the full model has written them."""
        self._written[0] = self.write(self.prompts, None)
        return Judge(self.model, self._written[0], self.tokenizer, self.known, self.metric)

    @property
    def num_copies(self) -> int:
        """Prompts that are copies of others."""
        return len(self.prompts) - len({torch.as_tensor(prompt).numpy().tobytes() for prompt in self.prompts})

    def certify(self, path: Sequence[Proposal], rule: ExitPolicy, before: Sequence[Scored]) -> tuple[int, Promise]:
        """The last setting of a path that these texts certify, and the evidence.

        Args:
            path: settings, the full model first.
            rule: the policy that they are of.
            before: what those prompts wrote under them that made the path.

        Raises:
            CalibrationError: for too few texts to certify anything, before any of them is written.
        """
        seen = TextsAlong(self.target, before.__getitem__, len(path), everybody(len(before[0][1])))
        check_enough(self.target, seen.losses, self.parts, "texts")
        judge, scored = self.judge, {}

        def here(place: int) -> Scored:
            if place not in self._written:
                self._written[place] = self.write(self.prompts, rule.with_thresholds(path[place].thresholds))
            if place not in scored:
                scored[place] = judge.scored(self._written[place])
            return scored[place]

        along = TextsAlong(self.target, here, len(path), self.parts, seen.losses)
        measure = None if self.target.risk == DISAGREEMENT else judge.measure
        walk = Walk(self.target, along, seen, self.parts, "texts", measure)
        chosen = walk.last_certified()
        return chosen, walk.promise(chosen, len(before[0][1]))

    def judged(self, proposal: Proposal, place: int) -> tuple[float, GenerationSetting, list[Written], Judge]:
        """The full model's mean score, what the texts of a setting are worth, these, and who judged them."""
        texts = self._written[place]
        return float(self.judge.full_scores.mean()), self.judge.setting(proposal, texts), texts, self.judge
