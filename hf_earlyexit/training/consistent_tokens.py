"""What a run in which exits are learned by reward does with a language model: each token leaves once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import DataError
from ..labels import LEFT_OUT
from ..losses.base import row_losses
from ..losses.noise import row_keys, row_noise
from ..modeling.finite import check_finite
from ..modeling.protocol import TorchExitWriter
from ..problem_types import SINGLE_LABEL
from .chosen import HARDNESS_COLUMN, KEY_COLUMN, ChosenTokenTrainer
from .consistent_arguments import ConsistentTrainingArguments
from .consistent_data import row_ids
from .hardness import ExampleId
from .language_model import IDS, EarlyExitLanguageModelTrainer, TokenCollator, check_token_rows
from .outcomes import Outcomes
from .states import TokenStates, pooled_states
from .token_trainer import LABELS


class TokenLessons:
    """Tokens of texts: what gates and exits of a language model learn from.

    A token is that after which a labelled one follows. Its id is that of its text and its place there.

    Args:
        model: with gates.
        args: of the run.
        processing_class: not needed.
    """

    trainer: type = EarlyExitLanguageModelTrainer
    chosen_trainer: type = ChosenTokenTrainer

    def __init__(self, model: TorchExitWriter, args: ConsistentTrainingArguments, processing_class: Any) -> None:
        self.model, self.args = model, args

    def checked(self, rows: Any, name: str) -> Any:
        """The same rows, looked through.

        Raises:
            DataError: for what is no data set with columns, or has a row that cannot be learned.
        """
        columns = getattr(rows, "column_names", None)
        if columns is None or isinstance(columns, dict) or not hasattr(rows, "__len__"):
            raise DataError(
                f"{name} is {type(rows).__name__}; expected one datasets.Dataset: rows are read several times, by number. "
                "datasets.Dataset.from_list makes one of what pack_texts and write_samples give.",
                field=name,
            )
        rows = rows.with_format(None)
        check_token_rows(rows, name, self.model.config.vocab_size)
        return rows

    def ids(self, rows: Any) -> tuple[ExampleId, ...]:
        """The id of each token, text after text."""
        texts = row_ids(rows, self.args.id_column)
        return tuple(f"{texts[row]}:{column}" for row, column in self._tokens(rows))

    def outcomes(self, rows: Any) -> Outcomes:
        """How every exit fares on each token."""
        return self._run(rows, None, keeps_states=False).outcomes

    def states(self, rows: Any, places: Tensor | None = None, split: str = "train") -> TokenStates:
        """What the gates see of some tokens, or of all there is room for."""
        if places is None:  # rows to report on need no ids
            keys = row_keys(range(sum(1 for _ in self._tokens(rows))))
            places = row_noise(keys, self.args.seed, 0, (1,))[:, 0].argsort(stable=True)[: self.args.max_gate_rows]
        return self._run(rows, places, keeps_states=True)

    def with_hardness(self, rows: Any, hardness: Tensor, keys: Tensor) -> Any:
        """Rows with the columns that the last phase reads, from hardness and keys of all tokens `[N]`."""
        lengths = [len(ids) for ids in rows[IDS]]
        all_layers, all_keys = [[0.0] * length for length in lengths], [[0] * length for length in lengths]
        for (row, column), layers, key in zip(self._tokens(rows), hardness.tolist(), keys.tolist(), strict=True):
            all_layers[row][column], all_keys[row][column] = layers, key
        return rows.add_column(HARDNESS_COLUMN, all_layers).add_column(KEY_COLUMN, all_keys)

    def report(self, rows: Any) -> dict[str, float]:
        """Share of right words of every exit, and what the gates do, on as many tokens as gates learn from."""
        data = self.states(rows)
        each = zip(data.outcomes.exit_layers, data.outcomes.right.float().mean(0).tolist(), strict=True)
        metrics = data.metrics(self.model.exit_gates, self.args.make_consistent_objective(), self.args.hardness)
        return {f"exit_{layer}_quality": quality for layer, quality in each} | metrics

    def _tokens(self, rows: Any) -> Iterator[tuple[int, int]]:
        """Row and column of every token."""
        for row in range(len(rows)):
            labels = rows[row].get(LABELS) or rows[row][IDS]
            for column, label in enumerate(labels[1:]):
                if label != LEFT_OUT:
                    yield row, column

    def _run(self, rows: Any, places: Tensor | None, keeps_states: bool) -> TokenStates:
        """Every exit on some tokens, in the order of their places, or on all."""
        tokens = list(self._tokens(rows))
        chosen = range(len(tokens)) if places is None else places.tolist()
        wanted: dict[int, list[int]] = {}  # columns of each row
        for place in chosen:
            row, column = tokens[place]
            wanted.setdefault(row, []).append(column)
        made: dict[tuple[int, int], int] = {}  # place of each token in what was run
        states, losses, right = [], [], []
        texts = sorted(wanted, key=lambda row: len(rows[row][IDS]))
        size = self.args.per_device_eval_batch_size
        self.model.eval()
        with torch.inference_mode(), pooled_states(self.model) as seen, tqdm(
            total=len(texts), unit="text", disable=self.args.disable_tqdm
        ) as bar:  # fmt: skip
            for start in range(0, len(texts), size):
                numbers = texts[start : start + size]
                made_batch = TokenCollator()([rows[number] for number in numbers])
                batch = {name: part.to(self.model.device) for name, part in made_batch.items()}
                following = torch.nn.functional.pad(batch.pop(LABELS), (0, 1), value=LEFT_OUT)[:, 1:]
                asked = torch.zeros_like(following, dtype=torch.bool)
                for line, number in enumerate(numbers):
                    asked[line, wanted[number]] = True
                output = self.model(**batch, use_cache=False, early_exit=False, exit_tokens=asked)
                where = asked.nonzero().tolist()
                check_finite(output.exit_logits, [numbers[line] for line, _ in where])
                words = following[asked]
                losses.append(row_losses(output.exit_logits, words, SINGLE_LABEL).cpu())
                right.append((output.exit_logits.argmax(-1) == words[:, None]).cpu())
                if keeps_states:
                    made_states = torch.stack(seen, 1).to(self.model.device, self.model.dtype)
                    states.append(self.model.gate_states(made_states).float().cpu())
                seen.clear()
                for line, column in where:
                    made[numbers[line], column] = len(made)
                bar.update(len(numbers))
        order = torch.tensor([made[tokens[place]] for place in chosen])
        kept = torch.cat(states)[order] if keeps_states else torch.zeros(len(order), 0, 0)
        all_losses, all_right = torch.cat(losses)[order].float(), torch.cat(right)[order]
        outcomes = Outcomes.of_tokens(all_losses, all_right, tuple(self.model.exit_layers))
        return TokenStates(states=kept, outcomes=outcomes)
