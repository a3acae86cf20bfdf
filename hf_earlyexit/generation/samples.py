"""What a language model writes by itself, as rows to train its exits on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import DataError
from ..labels import LEFT_OUT


@torch.no_grad()
def write_samples(
    model: Any, prompts: Sequence[Sequence[int]], batch_size: int = 16, **generation: Any
) -> list[dict[str, list[int]]]:
    """What the full model writes after some prompts, as rows to train its exits on; the prompts are not learned.

    Args:
        model: a language model with exits, in evaluation mode.
        prompts: token ids of each.
        batch_size: prompts that are written on together.
        generation: for `generate`, such as `max_new_tokens`, `do_sample` and `temperature`.

    Raises:
        DataError: for no prompts, or an empty one.
    """
    if not len(prompts) or not all(len(prompt) for prompt in prompts):
        raise DataError("Expected at least one prompt, and at least one token in each.", field="prompts")
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    written: dict[int, dict[str, list[int]]] = {}
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        width = max(len(prompts[place]) for place in places)
        ids = torch.zeros(len(places), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, place in enumerate(places):
            ids[row, width - len(prompts[place]) :] = torch.as_tensor(prompts[place])
            mask[row, width - len(prompts[place]) :] = 1
        given = {"attention_mask": mask.to(model.device), **generation}
        output = model.generate(ids.to(model.device), early_exit=False, return_exit_layers=True, **given)
        for row, place in enumerate(places):
            prompt = list(map(int, prompts[place]))
            new = output.sequences[row][output.exit_layers[row] > 0].tolist()
            written[place] = {"input_ids": prompt + new, "labels": [LEFT_OUT] * len(prompt) + new}
    return [written[place] for place in range(len(prompts))]
