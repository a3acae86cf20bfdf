"""What a captioner's answer looks like to people: the text, its words, and the layer that each was decided at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def caption_entry(tokenizer: Any, ids: Sequence[int], layers: Sequence[int]) -> dict[str, Any]:
    """A caption in plain values.

    Args:
        tokenizer: the captioner's.
        ids: of the generated tokens, without prompt and padding; the token that ends a caption is one of them.
        layers: the layer each of them left after, 1 to L.

    Returns:
        `generated_text`; `tokens` and `exit_layers`, one each for every token; `words`, each with its `word` and the deepest
        `exit_layer` of its tokens; and `mean_exit_layer` over all tokens, `None` where there is none.
    """
    text, homes = _homes(tokenizer, ids)
    words: list[dict[str, Any]] = [{"word": word, "exit_layer": 0} for word in text.split()]
    for home, layer in zip(homes, layers, strict=True):
        if home is not None:
            words[home]["exit_layer"] = max(words[home]["exit_layer"], layer)
    return {
        "generated_text": text,
        "tokens": tokenizer.convert_ids_to_tokens(list(ids)),
        "exit_layers": list(layers),
        "words": words,
        "mean_exit_layer": sum(layers) / len(layers) if layers else None,
    }


def _homes(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[int | None]]:
    """The text, and the index of the word that each token is a part of; `None` for special tokens."""
    special = set(tokenizer.all_special_ids)
    homes: list[int | None] = [None] * len(ids)
    counts = [len(_text(tokenizer, ids[: end + 1]).split()) for end in range(len(ids))]
    text = _text(tokenizer, ids)
    fewest = len(text.split())
    for place in reversed(range(len(ids))):
        fewest = min(fewest, counts[place])  # a later token may join two words, as "n't" does
        if ids[place] not in special and fewest:
            homes[place] = fewest - 1
    return text, homes


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
