"""Texts as the full model writes them, which is what lossless runs write too: what drafts are traced along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..labels import LEFT_OUT
from ..modeling.protocol import TorchExitWriter
from .prompts import IDS, LABELS
from .token_trace import write


class FullText(NamedTuple):
    """One text of the full model.

    Attributes:
        prompt: as the model's `prompt_inputs` takes it: token ids, or an image's states.
        ids: of the whole text, with what was there before the first token that was written.
        start: place of that token.
    """

    prompt: Any
    ids: list[int]
    start: int


def texts_of_rows(rows: Sequence[Mapping[str, Any]]) -> list[FullText]:
    """Texts that a language model has written already.

    Args:
        rows: from `write_samples`: `input_ids`, and `labels` with -100 at the prompt.
    """
    texts = []
    for row in rows:
        ids = list(row[IDS])
        start = next((place for place, label in enumerate(row[LABELS]) if label != LEFT_OUT), len(ids))
        texts.append(FullText(ids[:start], ids, start))
    return texts


def written_texts(
    model: TorchExitWriter, prompts: Sequence[Any], batch_size: int, generation: dict[str, Any]
) -> list[FullText]:
    """What the full model writes, in the order of the prompts.

    Args:
        model: a captioner or language model with exits, in evaluation mode.
        prompts: from its `read_prompts`.
        batch_size: prompts that are written on together, those of like length.
        generation: for `generate`.
    """
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    texts: dict[int, FullText] = {}
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        batch = write(model, [prompts[place] for place in places], None, generation)
        for place, ids, left in zip(places, batch.sequences, batch.exit_layers > 0, strict=True):
            before = prompts[place] if not model.crosses else ids[: int(left.int().argmax())].tolist()
            texts[place] = FullText(prompts[place], [*before, *ids[left].tolist()], len(before))
    return [texts[place] for place in range(len(prompts))]
