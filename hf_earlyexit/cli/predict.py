"""Classify the lines of a file, the rows of a data set or a folder of pictures, each with the layer it left after.

    hf-earlyexit predict --model bert-with-exits --input texts.txt --output answers.jsonl
    hf-earlyexit predict bert-with-exits --input reviews.csv --text_column body --output answers.csv
    hf-earlyexit predict vit-with-exits --input photos --output answers.csv
    hf-earlyexit predict bert-with-exits --engine ray --input 'reviews/*.parquet' --output answers --workers 8
    cat rows.jsonl | hf-earlyexit predict bert-with-exits --input - --input_format jsonl | head
    hf-earlyexit predict bert-with-exits --input texts.txt --output answers.csv --form auto

Every answer keeps the columns of its row. Rows are read, answered and written as they come, whatever their number. With
--engine ray, several processes each answer a file at a time; a run that was stopped goes on with the files that are left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..values import unexpected
from .arguments import SLICES, STDOUT, DeviceArguments, FileArguments, FormArguments, OutputArguments
from .command_result import CommandResult

if TYPE_CHECKING:
    from ..modeling.protocol import ExitClassifier, ExitModel
    from .incoming import Incoming

ANSWERS = ("label", "score", "logits", "exit_layer", "error")
FORM = "form"  # a column of its own where a form was asked for
CHANGES_NO_ANSWER = (
    "output", "resume", "max_rows", "max_batch_tokens", "device", "performance_hint", "engine", "workers",
)  # fmt: skip
ENGINES = ("here", "ray")
PIPED = 256  # rows that are answered at a time: whoever writes into a pipe wants to see answers come


@dataclass
class PredictArguments(FileArguments, OutputArguments, FormArguments, DeviceArguments):
    """Which model on which texts or pictures."""

    model: str = field(metadata={"help": "folder or Hub id of a model with exits, or a folder of ONNX files"})
    input: str = field(
        metadata={
            "help": "text file with one text, or name of a picture, a line, a picture, '-' for standard input, or a data set"
        }
    )
    split: str | None = field(default=None, metadata={"help": f"split of the data set, {SLICES}; test by default"})
    errors: str = field(
        default="raise", metadata={"help": "raise ends at a row that cannot be answered; slot says why under 'error'"}
    )
    max_batch_tokens: int | None = field(default=None, metadata={"help": "padded tokens in a batch; as suits the device"})
    engine: str = field(
        default=ENGINES[0],
        metadata={"help": "here, or ray: processes for the files of a pattern, and a folder of answers, a file for each"},
    )
    workers: int = field(default=0, metadata={"help": "with ray: how many processes; 0 is one for each core"})


ARGUMENTS = (PredictArguments,)


def run(args: PredictArguments) -> CommandResult:
    """Read, classify, write."""
    from ..modeling.certificate import warn_of_other_tokenizer
    from .loading import in_form, load_exported_or_model, reading_parts
    from .outgoing import check_output

    if args.engine not in ENGINES:
        raise unexpected("engine", args.engine, " or ".join(ENGINES))
    if args.engine == ENGINES[1]:
        from .predict_files import answer_files

        return answer_files(args)
    if args.output != STDOUT:
        check_output(args.output)
    elif args.resume:
        raise UsageError("Standard output cannot be gone on with; name an --output.", field="resume")
    model = in_form(load_exported_or_model(args.model, args.device), args)
    parts = reading_parts(args.model, model)
    warn_of_other_tokenizer(model, parts.get("tokenizer"))
    return answer_input(args, model, parts)


def answer_input(args: PredictArguments, model: ExitClassifier, parts: dict[str, Any]) -> CommandResult:
    """Answer what the flags name.

    Args:
        args: flags.
        model: that has been loaded.
        parts: its tokenizer or image processor, from `reading_parts`.
    """
    from ..serving.reader import reads_images
    from ..serving.served import form_of
    from .incoming import incoming
    from .outgoing import OutputFile, skipped

    source = incoming(args, args.input, args.split, reads_images(model))
    tally: dict[str, Any] = {"rows": 0, "form": form_of(model), "mean_layers": None, "num_layers": model.exit_layers[-1]}
    if args.output == STDOUT:
        return CommandResult(tally, lines=_answered(args, model, parts, source, source.rows, 0, tally))
    file = OutputFile(args.output, run_of(args, model), args.resume)
    rows = _answered(args, model, parts, source, skipped(source.rows, file.done), file.done, tally)
    file.write_all(rows)
    tally["output"] = args.output
    text = f"saved {args.output}: {file.done + tally['rows']} {'pictures' if reads_images(model) else 'texts'}"
    if args.form is not None:
        text += f" in the form {tally['form']}"
    if file.done:
        text += f", {file.done} of them by the run that was stopped"
        tally["rows_before"] = file.done
    if tally.get("failed"):
        text += f"; {tally['failed']} could not be answered, see their 'error'"
    return CommandResult(tally, text)


def run_of(args: PredictArguments, model: ExitModel) -> dict[str, Any]:
    """What decides the answers of a run."""
    from ..serving.served import form_of

    settings = {name: value for name, value in asdict(args).items() if name not in CHANGES_NO_ANSWER}
    path = Path(args.input)
    changed = [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None
    certificate = getattr(model.config, "exit_certificate", None)
    settings["form"] = form_of(model)  # what auto chose then may not be what it chooses now
    return {**settings, "input as it is": changed, "certificate": certificate}


def _answered(
    args: PredictArguments, model: ExitClassifier, parts: dict[str, Any], source: Incoming, rows: Iterator[dict[str, Any]],
    first: int, tally: dict[str, Any],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Each row with its answer; `tally` counts along."""
    from tqdm.auto import tqdm

    from ..data.formats import STDIN
    from ..problem_types import SINGLE_LABEL
    from ..serving.predict import WINDOW, stream
    from ..serving.reader import PICTURES

    taken = ANSWERS if args.form is None else (*ANSWERS, FORM)
    waiting: deque[dict[str, Any]] = deque()
    layers = failed = 0

    def texts() -> Iterator[Any]:
        for row in rows:
            waiting.append(row)
            yield source.text(row)

    window = PICTURES if source.folder is not None else PIPED if args.input == STDIN else WINDOW
    answers = stream(
        model,
        texts(),
        **parts,
        window=window,
        max_batch_tokens=args.max_batch_tokens,
        early_exit=args.early_exit,
        operating_point=args.operating_point,
        errors=args.errors,
    )
    single = model.config.resolved_problem_type == SINGLE_LABEL
    names = model.config.id2label
    bar = tqdm(answers, total=source.total, initial=first, disable=args.output == STDOUT, unit="row")
    for answer in bar:
        row = waiting.popleft()
        known = {f"input_{name}" if name in taken else name: value for name, value in source.kept(row).items()}
        columns: dict[str, Any]
        if single:
            score, index = (None, None) if answer.error is not None else answer.logits.softmax(-1).max(-1)
            columns = {
                "label": None if index is None else names[int(index)],
                "score": None if score is None else float(score),
            }
        else:
            columns = {"logits": None if answer.error is not None else answer.logits.tolist()}
        columns["exit_layer"] = answer.exit_layer if answer.error is None else None
        if args.form is not None:
            columns[FORM] = tally["form"]
        if args.errors == "slot":
            columns["error"] = None if answer.error is None else str(answer.error)
        failed += answer.error is not None
        layers += answer.exit_layer
        tally["rows"] += 1
        answered = tally["rows"] - failed
        tally["mean_layers"] = layers / answered if answered else None
        if args.errors == "slot":
            tally["failed"] = failed
        yield {**known, **columns}
