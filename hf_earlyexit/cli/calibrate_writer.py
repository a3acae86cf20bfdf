"""`calibrate` for models that write: thresholds by texts that they really write, or drafts that lose nothing."""

from __future__ import annotations

from dataclasses import asdict, fields
from functools import partial
from typing import Any

from ..errors import DataError, UsageError
from ..values import unexpected
from .answer import Answer
from .calibrate import MAX_DROP, CalibrateArguments, keep

CLASSIFIERS_ONLY = ("metric", "unlabelled", "per_exit", "form", "keep_weak_exits", "label_names")
WRITERS_ONLY = ("lossless", "chat", "max_new_tokens", "proposals", "batch_size")
LOSSLESS = "lossless"  # the operating point of drafts where no other name is given
NEW_TOKENS = 64  # of language models
BATCH, PROPOSALS = 8, 12


def refuse_flags_of_writers(args: CalibrateArguments) -> None:
    """Refuse what a classifier has no use for.

    Raises:
        UsageError: naming the flag.
    """
    _refuse(args, WRITERS_ONLY, "captioners and language models, and this is a classifier")


def _refuse(args: CalibrateArguments, names: tuple[str, ...], whose: str) -> None:
    defaults = {field.name: field.default for field in fields(args)}
    for name in names:
        value = getattr(args, name)
        if value != defaults[name]:
            raise UsageError(f"--{name} is for {whose}; leave it out.", field=name, value=value)


def calibrate_writer(args: CalibrateArguments, model: Any, options: dict[str, Any]) -> Answer:
    """Calibrate a captioner or language model and save it.

    Args:
        args: flags.
        model: that has been loaded from the folder.
        options: of the policy.

    Raises:
        UsageError: for flags that do not fit.
    """
    from ..generation.calibrate import calibrate_generation
    from ..generation.language_model import EarlyExitLanguageModel
    from .rows import read_rows, texts_of
    from .texts import as_prompts, text_rows

    _refuse(args, CLASSIFIERS_ONLY, "classifiers, and this model writes")
    for name in ("max_new_tokens", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise unexpected(name, value, "at least 1")
    speaks = isinstance(model, EarlyExitLanguageModel)
    if not speaks:
        _refuse(args, ("lossless", "chat"), "language models, and this is a captioner")
    if args.dataset is None:
        raise UsageError(f"Name {'prompts' if speaks else 'pictures'} to choose on with --dataset.", field="dataset")
    read = text_rows if speaks else partial(read_rows, images=True)
    rows = read(args, args.dataset, args.split, "validation")
    references = None if args.label_column is None else _references(rows, args.label_column)
    generation: dict[str, Any] = {} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens}
    if speaks:
        from .loading import reading_parts

        parts = reading_parts(args.model, model)
        prompts = rows if "input_ids" in rows.column_names else as_prompts(texts_of(rows), args.chat)
        generation = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **generation}
        if args.lossless:
            return _calibrate_drafts(args, model, prompts, parts["tokenizer"], generation, options)
    else:
        from .loading import load_input_parts

        parts, prompts = load_input_parts(args.model), rows
    result = calibrate_generation(
        model,
        prompts,
        args.policy,
        args.target or MAX_DROP,
        **parts,
        references=references,
        options=options or None,
        proposals=PROPOSALS if args.proposals is None else args.proposals,
        seed=args.seed,
        split=args.split or "validation",
        batch_size=args.batch_size or BATCH,
        **generation,
    )
    return keep(args, model, result)


def _references(rows: Any, column: str) -> list[Any]:
    if column not in rows.column_names:
        raise DataError(
            f"No column {column!r} among {', '.join(rows.column_names)}; --label_column names that of the references.",
            field="label_column",
            value=column,
        )
    references = rows[column][:]
    for row, one in enumerate(references):
        if not isinstance(one, str) and not (isinstance(one, list) and all(isinstance(text, str) for text in one)):
            raise DataError(
                f"Row {row} of {column!r} holds {type(one).__name__}; expected a reference, or a list of references.",
                field="label_column",
                value=row,
            )
    return list(references)


def _calibrate_drafts(
    args: CalibrateArguments,
    model: Any,
    prompts: Any,
    tokenizer: Any,
    generation: dict[str, Any],
    options: dict[str, Any],
) -> Answer:
    from ..generation.draft_calibration import calibrate_drafts
    from ..hub.save import save_calibrated

    for name, value in (("target", args.target), ("label_column", args.label_column), ("proposals", args.proposals)):
        if value is not None:
            raise UsageError(
                f"--{name} is given, but lossless texts are the full model's own, so that only time is left to choose for; "
                "leave it out.",
                field=name,
                value=value,
            )
    if options:
        raise UsageError("--options go with policies that learn; drafts take a policy by its name.", field="options")
    batch_size = args.batch_size or BATCH
    found = calibrate_drafts(model, prompts, args.policy, tokenizer=tokenizer, batch_size=batch_size, **generation)
    point = args.operating_point or LOSSLESS
    model.set_operating_points({point: found.policy}, keep_others=True)
    model.config.exit_drafts = found.drafts
    save_calibrated(model, args.model)
    values = {
        "model": args.model, "operating_point": point, "policy": found.policy.to_dict(), "drafts": found.drafts,
        "texts": found.num_texts, "tokens": found.num_tokens, "expected": asdict(found.expected),
        "expected_speed_up": found.expected.speed_up, "measured_speed_up": found.measured_speed_up,
        "costs": found.costs._asdict(),
    }  # fmt: skip
    text = f"{found}\nkept as the operating point {point!r}; next: hf-earlyexit generate {args.model} --lossless true"
    if not found.policy.may_leave:
        text += "\nnote: plain decoding is the fastest here, so nothing is drafted"
    return Answer(values, text)
