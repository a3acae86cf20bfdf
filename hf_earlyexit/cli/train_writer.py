"""What `train` and `consistentee` read where the model is a language model: texts, end to end."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from ..errors import UsageError
from .texts import single_texts, text_rows
from .train import TrainArguments

LENGTH = 256  # tokens of a row
HEAD, SHARED = "tuned", "tied"
IDS = "input_ids"


def prepare_writer(
    args: TrainArguments, seed: int, id_column: str | None, shared_head: bool, **fields: Any
) -> tuple[Any, dict[str, Any], Dataset, Dataset]:
    """Model, its tokenizer by name, rows to learn from and rows that are held back.

    Rows with token ids are taken as they are, such as those of `write_samples`; texts are packed.

    Args:
        args: which.
        seed: of the split and of what is new in the model.
        id_column: kept, or made where it is absent.
        shared_head: whether new exits borrow the model's own head, where no kind of head is named.
        fields: given to `from_pretrained`.

    Raises:
        UsageError: for flags of labels, which texts have none of.
    """
    import torch
    from transformers import AutoConfig, AutoTokenizer, set_seed

    from ..doors import WRITING, from_pretrained
    from ..modeling.configuration import EarlyExitConfig
    from ..training.data import hold_back, with_ids

    for name in ("label_column", "label_names", "problem_type"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name} is for classifiers; a language model learns from texts. Leave it out.", field=name)
    if args.exit_head is not None:
        fields["exit_head"] = args.exit_head
    elif not isinstance(AutoConfig.from_pretrained(args.model), EarlyExitConfig):
        fields["exit_head"] = SHARED if shared_head else HEAD
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def rows_of(split: str) -> Dataset:
        rows = _packed(text_rows(args, args.dataset, split, "train"), tokenizer, args.max_length or LENGTH)
        return rows if id_column is None else with_ids(rows, id_column)

    train = rows_of(args.train_split)
    if args.held_back.replace(".", "", 1).isdigit():
        train, held = hold_back(train, float(args.held_back), seed)
    else:
        held = rows_of(args.held_back)
    set_seed(seed)
    if args.exit_layers is not None:
        fields["exit_layers"] = args.exit_layers
    model = from_pretrained(args.model, task=WRITING, dtype=torch.float32, **fields)
    return model, {"tokenizer": tokenizer}, train, held


def _packed(rows: Dataset, tokenizer: Any, length: int) -> Dataset:
    from ..training import pack_texts
    from .rows import texts_of

    if IDS in rows.column_names:
        return rows
    return Dataset.from_list(pack_texts(single_texts(texts_of(rows)), tokenizer, length))
