"""Write on from the lines of a file or the rows of a data set, each text with the layers that its tokens left after.

    hf-earlyexit generate llama-with-exits --input prompts.txt --output texts.jsonl
    hf-earlyexit generate llama-with-exits --input prompts.txt --output texts.jsonl --lossless true
    hf-earlyexit generate llama-with-exits --input chats.csv --text_column question --chat true --max_new_tokens 200

Every answer keeps the columns of its row. With --lossless, texts are the full model's own, and exits only save work: drafts
are made by the operating point that `calibrate --lossless true` kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EarlyExitError, UsageError
from ..values import check_whole, unexpected
from .arguments import SLICES, STDOUT, DeviceArguments, FileArguments, OutputArguments, TextArguments, given
from .command_result import CommandResult

if TYPE_CHECKING:
    from ..modeling.protocol import TorchExitWriter
    from .incoming import Incoming

TAKEN = ("generated_text", "exit_layers", "mean_exit_layer")
FLAGS = ("max_new_tokens", "early_exit", "operating_point", "lossless", "batch_size")
OURS = ("inputs", "input_ids", "attention_mask", "return_exit_layers", "num_return_sequences", "streamer")
CHANGES_NO_TEXT = ("output", "resume", "max_rows", "device")


@dataclass
class GenerateArguments(FileArguments, OutputArguments, TextArguments, DeviceArguments):
    """Which model after which prompts."""

    model: str = field(metadata={"help": "folder or Hub id of a language model with exits"})
    input: str = field(metadata={"help": "text file with one prompt a line, '-' for standard input, or a data set"})
    split: str | None = field(default=None, metadata={"help": f"split of the data set, {SLICES}; test by default"})
    batch_size: int = field(default=1, metadata={"help": "texts that are written together"})
    options: str = field(
        default="{}", metadata={"help": 'more for generate, JSON, such as \'{"do_sample": true, "temperature": 0.7}\''}
    )
    seed: int = field(default=0, metadata={"help": "of what is drawn where texts are sampled"})


ARGUMENTS = (GenerateArguments,)


def run(args: GenerateArguments) -> CommandResult:
    """Read, write on, write down."""
    from transformers import set_seed

    from ..modeling.certificate import warn_of_other_tokenizer
    from .incoming import incoming
    from .loading import drafting_point, load_language_model, reading_parts
    from .outgoing import OutputFile, check_output, skipped

    check_whole(1, **given(args, "batch_size", "max_new_tokens"))
    options = _options(args)
    if args.output != STDOUT:
        check_output(args.output)
    elif args.resume:
        raise UsageError("Standard output cannot be gone on with; name an --output.", field="resume")
    model = load_language_model(args.model, args.device)
    tokenizer = reading_parts(args.model, model)["tokenizer"]
    warn_of_other_tokenizer(model, tokenizer)
    drafting_point(args, model)  # refused before anything is opened
    source = incoming(args, args.input, args.split)
    set_seed(args.seed)
    tally: dict[str, Any] = {"rows": 0, "tokens": 0, "mean_exit_layer": None, "num_layers": model.exit_layers[-1]}
    if args.output == STDOUT:
        return CommandResult(tally, lines=_written(args, model, tokenizer, source, source.rows, options, tally))
    file = OutputFile(args.output, _run_of(args, model), args.resume)
    rows = skipped(source.rows, file.done)
    file.write_all(_written(args, model, tokenizer, source, rows, options, tally, file.done))
    tally["output"] = args.output
    text = f"saved {args.output}: {file.done + tally['rows']} texts"
    if tally["tokens"]:
        text += f", mean layer {tally['mean_exit_layer']:.2f} of {tally['num_layers']} a token"
    if args.lossless:
        text += f"; {tally['drafted']} drafts, {tally['accepted']} of them right"
    if file.done:
        text += f"; {file.done} texts are of the run that was stopped"
        tally["rows_before"] = file.done
    return CommandResult(tally, text)


def _options(args: GenerateArguments) -> dict[str, Any]:
    """What `generate` is told, as far as it is the same for every batch."""
    from .texts import NEW_TOKENS

    try:
        options = json.loads(args.options)
    except json.JSONDecodeError as error:
        raise UsageError(f"options is {args.options!r}; expected JSON ({error}).", field="options") from error
    if not isinstance(options, dict):
        raise unexpected("options", args.options, "a JSON object")
    for name in (*FLAGS, *OURS):
        if name in options:
            hint = f"give --{name}" if name in FLAGS else "leave it out, each prompt gets one text"
            raise UsageError(f"options has {name!r}; {hint}.", field="options", value=name)
    return {"max_new_tokens": args.max_new_tokens or NEW_TOKENS, **options}


def _run_of(args: GenerateArguments, model: TorchExitWriter) -> dict[str, Any]:
    """What decides the texts of a run."""
    settings = {name: value for name, value in asdict(args).items() if name not in CHANGES_NO_TEXT}
    path = Path(args.input)
    changed = [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None
    points = {"exit_policy": model.config.exit_policy, "exit_operating_points": model.config.exit_operating_points}
    return {**settings, **points, "input as it is": changed}


def _written(
    args: GenerateArguments, model: TorchExitWriter, tokenizer: Any, source: Incoming, rows: Iterator[dict[str, Any]],
    options: dict[str, Any], tally: dict[str, Any], first: int = 0,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Each row with its text; `tally` counts along."""
    from tqdm.auto import tqdm

    from ..generation.prompts import left_padded, read_prompts
    from .loading import drafting_point
    from .texts import as_prompts

    if args.lossless:
        tally |= {"layer_calls": 0, "drafted": 0, "accepted": 0}
    if tokenizer.pad_token_id is not None:
        options = {"pad_token_id": tokenizer.pad_token_id, **options}
    layers, place = 0, first
    bar = tqdm(total=source.total, initial=first, disable=args.output == STDOUT, unit="text")
    while batch := list(islice(rows, args.batch_size)):
        texts = ["" if (text := source.text(row)) is None else text for row in batch]
        prompts = read_prompts(as_prompts(texts, args.chat), tokenizer, model.config.vocab_size, first=place)
        given = {"early_exit": args.early_exit, "operating_point": drafting_point(args, model), "lossless": args.lossless}
        try:
            output = model.generate(**left_padded(prompts, model.device), **options, **given, return_exit_layers=True)
        except EarlyExitError:
            raise
        except ValueError as error:  # transformers' own words on options that it does not know or cannot use
            raise UsageError(" ".join(str(error).split()), field="options") from error
        if args.lossless:
            counts = output.draft_counts
            tally["layer_calls"] += counts.layer_calls
            tally["drafted"] += sum(counts.drafted)
            tally["accepted"] += sum(counts.accepted)
        for row, ids, left in zip(batch, output.sequences, output.exit_layers.tolist(), strict=True):
            left_after = [layer for layer in left if layer > 0]
            new = [token for token, layer in zip(ids.tolist(), left, strict=True) if layer > 0]
            layers += sum(left_after)
            tally["rows"] += 1
            tally["tokens"] += len(new)
            tally["mean_exit_layer"] = layers / tally["tokens"] if tally["tokens"] else None
            known = {f"input_{name}" if name in TAKEN else name: value for name, value in source.kept(row).items()}
            mean = sum(left_after) / len(left_after) if left_after else None
            text = tokenizer.decode(new, skip_special_tokens=True)
            yield {**known, "generated_text": text, "exit_layers": left_after, "mean_exit_layer": mean}
        place += len(batch)
        bar.update(len(batch))
    bar.close()
