"""Trainer that teaches the exits of a language model from text, its own or any other, and reports on each of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import DataError
from ..generation.language_model import EarlyExitLanguageModel
from ..labels import LEFT_OUT
from ..values import check_whole, is_whole, shown
from .token_trainer import LABELS, TokenTrainer, require_labels

IDS, MASK = "input_ids", "attention_mask"


class EarlyExitLanguageModelTrainer(TokenTrainer):
    """`Trainer` for language models with exits: every exit learns what follows every token.

    The objectives are those of `EarlyExitTrainer`, over the tokens whose label is not -100. "two-stage" trains the exits
    alone, on a network that stays as it is to the bit: with `strength` and `direction="last-to-exit"` they learn the full
    model's own distribution, so that any text will do, above all what the model itself writes (`write_samples`). "weighted"
    and "distillation" train all weights together, and so does "layerskip", which also drops layers at random and teaches
    some exits at a time. What does not learn has no dropout. Evaluations log
    `exit_<layer>_token_accuracy`, `exit_<layer>_agreement` (with the full model's first word) and `exit_<layer>_loss`, and
    with gates `gate_agreement`, `gate_layers` and `exit_<layer>_share`.

    Args:
        model: a language model with exits.
        args: `EarlyExitTrainingArguments`.
        learn_gates: teach the gates, and them alone, whether an exit's first word is the full model's; the objective is not
            used.
        data_collator: `TokenCollator` by default.
        train_dataset, eval_dataset, processing_class, ...: as in `Trainer`. Rows hold `input_ids` and may hold `labels`, as
            long, -100 where nothing is learned; without them all tokens are learned. `pack_texts` makes such rows.

    Raises:
        DataError: before the first step, for rows that cannot be learned; with the batch, where rows cannot be looked
            through.
        TrainingError: for what cannot be trained, or if one exit's loss is not finite.

    Papers: tuned lens (https://arxiv.org/abs/2303.08112) for exits on a frozen network; LayerSkip
    (https://arxiv.org/abs/2404.16710) for exits trained with the network through the shared head: "layerskip" with
    `exit_head="tied"`.
    """

    trains: ClassVar[type] = EarlyExitLanguageModel
    writes = "texts"

    def _usual_collator(self) -> TokenCollator:
        return TokenCollator()

    def _check_rows(self, rows: Any, name: str, needed: bool = True) -> None:
        check_token_rows(rows, name, self.exit_model.config.vocab_size)

    def _truth(self, labels: Tensor | None) -> Tensor:
        return functional.pad(require_labels(labels), (0, 1), value=LEFT_OUT)[:, 1:]

    def _given(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in inputs.items() if name != LABELS}


class TokenCollator:
    """Batches of texts: ids padded on the right, a mask, and labels that are the ids where rows have none of their own."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row[IDS]) for row in rows)
        shape = (len(rows), width)
        ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, LEFT_OUT)
        for place, row in enumerate(rows):
            length = len(row[IDS])
            ids[place, :length] = torch.as_tensor(row[IDS])
            mask[place, :length] = 1
            labels[place, :length] = torch.as_tensor(row.get(LABELS, row[IDS]))
        return {IDS: ids, MASK: mask, LABELS: labels}


def check_token_rows(rows: Any, name: str, words: int) -> None:
    """Refuse rows that cannot be learned; those that cannot be looked through are let through.

    Raises:
        DataError: naming row and column.
    """
    if not hasattr(rows, "__len__"):
        return
    if len(rows) == 0:
        raise DataError(f"{name} has no rows.", field=name)
    learned = 0
    for place in range(len(rows)):
        row = rows[place]
        ids = row.get(IDS) if hasattr(row, "get") else None
        if ids is None or len(ids) == 0:
            raise DataError(
                f"{name} has no {IDS} in row {place}; expected token ids, as `pack_texts` makes them.", field=IDS, value=ids
            )
        labels = row.get(LABELS, ids)
        for column, values in ((IDS, ids), (LABELS, labels)):
            for value in values:
                if not is_whole(int(value), 0, words - 1) and not (column == LABELS and value == LEFT_OUT):
                    raise DataError(
                        f"{column} of row {place} of {name} has {shown(int(value))}; expected ids from 0 to {words - 1}.",
                        field=column,
                        value=int(value),
                    )
        if len(labels) != len(ids):
            raise DataError(
                f"Row {place} of {name} has {len(ids)} ids and {len(labels)} labels; expected as many.", field=LABELS
            )
        learned += sum(1 for label in labels[1:] if label != LEFT_OUT)
    if not learned:
        raise DataError(f"{name} has nothing to learn: no token with a label follows another.", field=name)


def pack_texts(texts: Iterable[str], tokenizer: Any, length: int = 256) -> list[dict[str, list[int]]]:
    """Texts end to end, each closed by the tokenizer's end token, cut into rows of `length` ids; the rest makes a last row.

    Args:
        texts: any.
        tokenizer: with an end token.
        length: ids of a row, at least 2.

    Raises:
        DataError: for no text, or a tokenizer without an end token.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("The tokenizer has no eos token to close texts with; set tokenizer.eos_token.", field="tokenizer")
    check_whole(2, 1 << 20, error=DataError, length=length)
    ids = [token for text in texts for token in (*tokenizer(text, add_special_tokens=False)[IDS], tokenizer.eos_token_id)]
    rows = [{IDS: ids[start : start + length]} for start in range(0, len(ids), length)]
    rows = [row for row in rows if len(row[IDS]) > 1]
    if not rows:
        raise DataError("There is no text to pack.", field="texts")
    return rows
