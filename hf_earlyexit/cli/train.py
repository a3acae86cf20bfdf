"""Fine-tune a model with exits on a data set.

Rows held back from training are run through the trained model once; the trace is saved beside it for `calibrate`.

    hf-earlyexit train --model bert-base-uncased --dataset reviews --output_dir bert-with-exits
    hf-earlyexit train --model llama --dataset texts.txt --objective two-stage --output_dir llama-with-exits

A language model learns from texts, end to end, and has no trace.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EarlyExitError, UsageError
from .arguments import SPLITS, TRACE_FILE, RowArguments
from .command_result import CommandResult

if TYPE_CHECKING:
    from datasets import Dataset

    from ..training import EarlyExitTrainingArguments

LONGEST = 128
MORE = """Every setting of hf_earlyexit.EarlyExitTrainingArguments is a flag as well, and so is every one of transformers'
TrainingArguments: --output_dir, --objective, --objective_options, --exit_metric, --num_train_epochs, --learning_rate,
--resume_from_checkpoint, --seed, --use_cpu, ...; --help_all lists them all."""


@dataclass
class TrainArguments(RowArguments):
    """What is trained on what."""

    model: str = field(metadata={"help": "folder or Hub id of a checkpoint"})
    dataset: str = field(metadata={"help": SPLITS})
    train_split: str = field(default="train", metadata={"help": "split to train on, or a slice such as 'train[:90%%]'"})
    held_back: str = field(
        default="0.1", metadata={"help": "share of the train split, or a split or slice of its own, for thresholds"}
    )
    problem_type: str | None = field(
        default=None,
        metadata={"help": "single_label_classification, multi_label_classification or regression; as the labels tell"},
    )
    exit_layers: list[int] | None = field(default=None, metadata={"help": "layers with an exit; all by default"})
    exit_head: str | None = field(
        default=None,
        metadata={
            "help": "linear, linear-cls, linear-mean or pooler, linear-mean by default; of language models tied, tuned, "
            "linear or low-rank, tuned by default, tied with --objective layerskip"
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": f"tokens of a text, in training and when the model is used, {LONGEST} by default; language models learn "
            "from rows of 256"
        },
    )


ARGUMENTS = (TrainArguments,)


def more_arguments() -> tuple[type, ...]:
    """What training takes beside these."""
    from .training_settings import TrainSettings

    return (TrainSettings,)


def run(args: TrainArguments, training: EarlyExitTrainingArguments) -> CommandResult:
    """Train, save, trace."""
    from ..training import EarlyExitLanguageModelTrainer, EarlyExitTrainer
    from .texts import writes

    model, parts, train, held = prepare(args, training.seed, shared_head=training.make_objective().writers_only)
    (processing,) = parts.values()
    kind = EarlyExitLanguageModelTrainer if writes(model) else EarlyExitTrainer
    with settings():
        trainer = kind(model, training, train_dataset=train, eval_dataset=held, processing_class=processing)
    trainer.train(resume_from_checkpoint=checkpoint(training.resume_from_checkpoint))
    trainer.save_model()
    trace = save_held_back(model, held, parts, training.output_dir)
    metrics = trainer.evaluate()
    by_layer = sorted((key for key in metrics if "_exit_" in key), key=lambda key: int(key.split("_")[2]))
    lines = [f"{name.removeprefix('eval_'):20s} {metrics[name]:.4f}" for name in by_layer]
    rows = " --dataset prompts.txt" if trace is None else ""
    lines.append(f"saved {training.output_dir}; next: hf-earlyexit calibrate --model {training.output_dir}{rows}")
    values = {"model": training.output_dir, "held_back": trace, "steps": trainer.state.global_step, "metrics": metrics}
    return CommandResult(values, "\n".join(lines))


@contextmanager
def settings() -> Iterator[None]:
    """Where a trainer is made: settings that transformers refuses are a mistake in what was given."""
    try:
        yield
    except EarlyExitError:
        raise
    except (ValueError, RuntimeError) as error:
        raise UsageError(" ".join(str(error).split())) from error


def checkpoint(given: str | bool | None) -> str | bool | None:
    """What `--resume_from_checkpoint` means: true for the newest, false for none, or a folder."""
    words = {"true": True, "false": False}
    return words.get(given.lower(), given) if isinstance(given, str) else given


def save_held_back(model: Any, held: Dataset, parts: dict[str, Any], folder: str | None) -> str | None:
    """Write what every exit says of the rows that are held back, for `calibrate`; nothing of a model that writes.

    Args:
        model: that has been trained.
        held: the rows.
        parts: what reads them, by name.
        folder: where the model was saved.

    Returns:
        The file.
    """
    from ..serving.collect import collect_trace
    from .texts import writes

    if writes(model):
        return None
    trace = str(Path(str(folder)) / TRACE_FILE)
    collect_trace(model, held, **parts).save(trace)
    return trace


def prepare(
    args: TrainArguments, seed: int, id_column: str | None = None, shared_head: bool = False, **fields: Any
) -> tuple[Any, dict[str, Any], Dataset, Dataset]:
    """Model, its tokenizer or image processor by name, training rows and held-back rows: token ids, or pictures.

    Those of a language model come from `prepare_writer`.

    Args:
        args: which.
        seed: of the split and of what is new in the model.
        id_column: kept, or made where it is absent.
        shared_head: whether new exits of a language model borrow its own head, where no kind of head is named.
        fields: given to `from_pretrained`.
    """
    import torch
    from transformers import set_seed

    from ..doors import IMAGE, WRITING, checkpoint_task, from_pretrained
    from ..problem_types import MULTI_LABEL
    from ..training.data import encode, hold_back, with_ids
    from .loading import reading_parts
    from .rows import read_rows, rows_and_labelling

    task = checkpoint_task(args.model)
    if task == WRITING:
        from .train_writer import prepare_writer

        return prepare_writer(args, seed, id_column, shared_head, **fields)
    images = task == IMAGE
    if images and args.max_length is not None:
        raise UsageError("The model reads pictures, which have no max_length; leave it out.", field="max_length")
    train = read_rows(args, args.dataset, args.train_split, images=images)
    if id_column is not None:
        train = with_ids(train, id_column)
    train, labelling = rows_and_labelling(args, train, problem_type=args.problem_type)
    if args.held_back.replace(".", "", 1).isdigit():
        train, held = hold_back(train, float(args.held_back), seed)
    else:
        held, _ = rows_and_labelling(args, read_rows(args, args.dataset, args.held_back, images=images), labelling)
    for note in labelling.notes:
        warn(note)
    set_seed(seed)
    names = labelling.shown_names
    labels: dict[str, Any] = {"num_labels": 1} if names is None else {
        "id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}
    }  # fmt: skip
    if labelling.problem_type == MULTI_LABEL:
        labels["problem_type"] = MULTI_LABEL
    model = from_pretrained(
        args.model,
        dtype=torch.float32,
        exit_layers=args.exit_layers,
        exit_head=args.exit_head or "linear-mean",
        **labels,
        **fields,
    )
    parts = reading_parts(args.model, model)
    if images:
        return model, parts, train, held
    tokenizer, longest = parts["tokenizer"], args.max_length or LONGEST
    tokenizer.model_max_length = min(longest, tokenizer.model_max_length)  # served as it was trained
    keep = () if id_column is None else (id_column,)
    return model, parts, encode(train, tokenizer, longest, keep), encode(held, tokenizer, longest)


def warn(note: str) -> None:
    """Say on standard error what was taken as meant."""
    print(f"note: {note}", file=sys.stderr)
