"""What a language model writes by itself, as rows to train its exits on."""

from __future__ import annotations

from typing import Any

import torch

from ..labels import LEFT_OUT
from ..modeling.protocol import TorchExitWriter
from .prompts import IDS, LABELS, left_padded, read_prompts


@torch.no_grad()
def write_samples(
    model: TorchExitWriter, prompts: Any, batch_size: int = 16, *, tokenizer: Any = None, **generation: Any
) -> list[dict[str, list[int]]]:
    """What the full model writes after some prompts, as rows to train its exits on; the prompts are not learned.

    Args:
        model: a language model with exits, in evaluation mode.
        prompts: token ids of each; or texts or chats, in any form of `read_prompts`.
        batch_size: prompts that are written on together.
        tokenizer: needed for texts and chats.
        generation: for `generate`, such as `max_new_tokens`, `do_sample` and `temperature`.

    Raises:
        DataError: for no prompts, or what is none.
        UsageError: for texts without a tokenizer.
    """
    read = read_prompts(prompts, tokenizer, model.config.word_config.vocab_size)
    order = sorted(range(len(read)), key=lambda place: len(read[place]))
    written: dict[int, dict[str, list[int]]] = {}
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        given = {**left_padded([read[place] for place in places], model.device), **generation}
        output = model.generate(**given, early_exit=False, return_exit_layers=True)
        for row, place in enumerate(places):
            new = output.sequences[row][output.exit_layers[row] > 0].tolist()
            written[place] = {IDS: read[place] + new, LABELS: [LEFT_OUT] * len(read[place]) + new}
    return [written[place] for place in range(len(read))]
