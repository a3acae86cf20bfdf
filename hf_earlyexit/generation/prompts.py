"""Prompts in any of the forms people keep them in, as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, UsageError
from ..labels import LEFT_OUT
from ..values import shown

IDS, MASK, LABELS = "input_ids", "attention_mask", "labels"
COLUMNS = ("messages", "prompt", "text")  # columns of rows, beside token ids; the first that a row has is taken


def read_prompts(rows: Any, tokenizer: Any = None, words: int | None = None, first: int = 0) -> list[list[int]]:
    """Token ids of each prompt.

    Args:
        rows: a data set or sequence. Each row is a text; a chat, as dicts with `role` and `content`; token ids; or a dict
            of one of these under "text" or "prompt", "messages", or "input_ids". Ids at padding (`attention_mask` 0) are
            left out, and those that a model wrote itself (`labels` other than -100, as `write_samples` gives them).
        tokenizer: needed for texts and chats; chats need its template.
        words: size V of the vocabulary that ids have to be of.
        first: number of the first row, for errors.

    Raises:
        DataError: for no prompts, an empty one, and what is no prompt, naming the row.
        UsageError: for texts or chats without a tokenizer.
    """
    if isinstance(rows, str) or not hasattr(rows, "__len__") or len(rows) == 0:
        raise DataError(f"Prompts are {shown(rows)}; expected a sequence of at least one prompt.", field="prompts")
    prompts = []
    for place in range(first, first + len(rows)):
        ids = _ids(rows[place - first], place, tokenizer)
        if not ids:
            raise DataError(f"Prompt {place} is empty; expected at least one token in each.", field="prompts", value=place)
        outside = next((one for one in ids if one < 0 or (words is not None and one >= words)), None)
        if outside is not None:
            allowed = "0 or above" if words is None else f"0 to {words - 1}"
            raise DataError(
                f"Prompt {place} has the id {outside}; expected {allowed}: use the model's own tokenizer.",
                field="prompts",
                value=outside,
            )
        prompts.append(ids)
    return prompts


def _ids(row: Any, place: int, tokenizer: Any) -> list[int]:
    if isinstance(row, Mapping):
        if IDS in row:
            return _listed(row, place)
        name = next((name for name in COLUMNS if name in row), None)
        if name is None:
            raise DataError(
                f"Row {place} has {', '.join(map(str, row)) or 'no columns'}; expected one of {', '.join((IDS, *COLUMNS))}.",
                field="prompts",
                value=place,
            )
        row = row[name]
    chat = isinstance(row, Sequence) and len(row) > 0 and all(isinstance(one, Mapping) for one in row)
    if isinstance(row, str) or chat:
        if tokenizer is None:
            kind = "chat" if chat else "text"
            raise UsageError(f"Prompt {place} is a {kind}; pass the model's tokenizer.", field="tokenizer")
        return _chat(row, place, tokenizer) if chat else list(tokenizer(row)[IDS])
    return _whole(row, place)


def _chat(messages: Any, place: int, tokenizer: Any) -> list[int]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise UsageError(f"Prompt {place} is a chat, and the tokenizer has no chat template.", field="tokenizer")
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)[IDS])


def _listed(row: Mapping[str, Any], place: int) -> list[int]:
    """Ids of a row of columns, without padding and without what a model wrote."""
    ids = _whole(row[IDS], place)
    keep = [True] * len(ids)
    for name in (MASK, LABELS):
        if name in row:
            values = _whole(row[name], place)
            if len(values) != len(ids):
                raise DataError(f"Row {place} has {len(ids)} ids and {len(values)} {name}; expected as many.", field=name)
            stays = [value != 0 if name == MASK else value == LEFT_OUT for value in values]
            keep = [both and one for both, one in zip(keep, stays, strict=True)]
    return [one for one, stays in zip(ids, keep, strict=True) if stays]


def _whole(values: Any, place: int) -> list[int]:
    try:
        ids = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        ids = None
    if ids is not None and ids.numel() == 0:
        return []
    if ids is None or ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise DataError(
            f"Prompt {place} is {shown(values)}; expected a text, a chat or token ids as whole numbers.",
            field="prompts",
            value=place,
        )
    return [int(one) for one in ids.tolist()]


def left_padded(prompts: Sequence[Sequence[int]], device: Any = None) -> dict[str, Tensor]:
    """Prompts of one batch as `generate` takes them: `input_ids` and `attention_mask` `[B, T]`, padded on the left.

    Args:
        prompts: token ids of each, at least one.
        device: to put them on.
    """
    width = max(map(len, prompts))
    ids, mask = torch.zeros(len(prompts), width, dtype=torch.long), torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return {IDS: ids.to(device), MASK: mask.to(device)}
