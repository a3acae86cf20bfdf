"""Rows of a data set, with their texts and labels under the names that the library looks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset

from ..data.formats import Reading
from ..data.labelling import Labelling, class_numbers, learn_labelling
from ..data.sources import Source
from ..errors import DataError, UsageError
from ..modeling.protocol import ExitModel
from ..serving.collect import collect_trace
from ..serving.reader import reads_images
from ..serving.tables import MODEL_COLUMNS, TEXT_COLUMNS, text_columns
from ..trace import ExitTrace
from ..values import check_whole
from .arguments import CertifiedArguments, FileArguments, RowArguments, given
from .pictures import check_columns, with_pictures

LABEL, LABEL_TEXT = "label", "label_text"
USUAL = {name for names in TEXT_COLUMNS for name in names}


def reading(args: FileArguments) -> Reading:
    """How files are read, as the flags say."""
    check_whole(1, **given(args, "max_rows"))
    if args.text_column is not None and len(args.text_column) > 2:
        raise UsageError(
            f"text_column names {len(args.text_column)} columns; expected one, or two for pairs.", field="text_column"
        )
    return Reading(args.input_format, args.encoding, args.separator, args.quotes, args.dataset_config)


def read_rows(args: FileArguments, place: str, split: str | None, default: str = "train", images: bool = False) -> Dataset:
    """One split with its texts, of which none is missing; or with its pictures, which are not opened yet.

    Args:
        args: flags.
        place: a folder, a file, "-", or a Hub id.
        split: as in `Source.read`; `default` if it is `None`.
        images: whether the model reads pictures.

    Raises:
        DataError: for rows that cannot be read, naming the first.
    """
    return with_inputs(args, rows_as_given(args, place, split, default, images), place, images)


def rows_as_given(args: FileArguments, place: str, split: str | None, default: str, images: bool = False) -> Dataset:
    """One split with the columns that it came with; arguments as in `read_rows`.

    Raises:
        DataError: for a place without rows.
    """
    check_columns(args, images)
    rows = Source(place, reading(args)).read(split, default)
    if args.max_rows is not None:
        rows = rows.select(range(min(args.max_rows, len(rows))))
    if not len(rows):
        raise DataError(f"{place} has no rows here; expected at least one.", path=place)
    return rows


def with_inputs(args: FileArguments, rows: Dataset, place: str, images: bool) -> Dataset:
    """Rows from `rows_as_given` as `read_rows` gives them: only what the model reads has one of the usual names."""
    return with_pictures(rows, args, place) if images else _with_texts(rows, args.text_column, place)


def require_column(rows: Dataset, column: str, holds: str, flag: str) -> None:
    """Refuse rows without the column that a flag is for.

    Raises:
        DataError: naming the columns that there are.
    """
    if column not in rows.column_names:
        raise DataError(
            f"No column {column!r} among {', '.join(rows.column_names)}; name the column of {holds} with --{flag}.",
            field=flag,
            value=column,
        )


def rows_and_labelling(
    args: RowArguments, rows: Dataset, labelling: Labelling | None = None, problem_type: str | None = None
) -> tuple[Dataset, Labelling]:
    """Rows whose labels are numbers under "label", and what these mean.

    Args:
        args: flags.
        rows: from `read_rows`.
        labelling: of the model that answers them; without it the labels tell it.
        problem_type: what the labels are, where they could be several things.

    Raises:
        DataError: for labels that cannot be, naming the first row.
    """
    column = args.label_column or LABEL
    require_column(rows, column, "labels", "label_column")
    labels = rows[column][:]
    class_names: Sequence[str] | None = getattr(rows.features[column], "names", None)
    if labelling is None:
        texts = rows[LABEL_TEXT][:] if LABEL_TEXT in rows.column_names and column == LABEL else None
        labelling = learn_labelling(
            labels, column, class_names=class_names, names=args.label_names, texts=texts, problem_type=problem_type
        )
        as_given = labelling
    else:
        as_given = _as_given(labelling, args.label_names)
    if args.label_names is not None and class_names is not None and set(class_names) != set(args.label_names):
        class_names = None  # other words for the same classes, in the same order
    numbers = class_numbers(labels, column, as_given, class_names)
    rows = rows.remove_columns([name for name in {column, LABEL, "labels"} if name in rows.column_names])
    return rows.add_column(LABEL, numbers), labelling


def _as_given(labelling: Labelling, names: Sequence[str] | None) -> Labelling:
    """The model's labelling by the words that a column has for its classes."""
    if names is None:
        return labelling
    if len(names) != labelling.num_labels:
        raise UsageError(
            f"{len(names)} label_names for the model's {labelling.num_labels} classes; expected as many, in their order.",
            field="label_names",
            value=names,
        )
    return replace(labelling, names=tuple(names))


def _with_texts(rows: Dataset, chosen: Sequence[str] | None, place: str) -> Dataset:
    if chosen is not None:
        for name in chosen:
            if name not in rows.column_names:
                raise DataError(
                    f"{place} has no column {name!r}; it has {', '.join(rows.column_names)}.",
                    field="text_column",
                    value=name,
                )
        rows = rows.remove_columns([name for name in rows.column_names if name in USUAL and name not in chosen])
        new = ("text", "text_pair")[: len(chosen)]
        rows = rows.rename_columns({name: f"_{name}_" for name in chosen}).rename_columns(
            {f"_{name}_": text for name, text in zip(chosen, new, strict=True)}
        )
    elif set(MODEL_COLUMNS[:1]) <= set(rows.column_names):
        return rows  # token ids already
    for name in text_columns(rows.column_names):
        kind = getattr(rows.features[name], "dtype", "list")
        if kind not in ("string", "large_string"):
            raise DataError(
                f"The column {name!r} of {place} holds {kind}; expected texts. Name another with --text_column.", field=name
            )
        missing = next((row for row, text in enumerate(rows[name]) if text is None), None)
        if missing is not None:
            raise DataError(
                f"Row {missing} of {place} has no text: its column {name!r} is null. Drop the row, or write an empty text.",
                field=name,
            )
    return rows


def collected(args: Any, model: ExitModel, parts: dict[str, Any], labelled: bool = True) -> tuple[ExitTrace, dict[str, Any]]:
    """The trace of the rows that `dataset` and `split` name, validation rows by default, and their groups and lists.

    Args:
        args: flags of a command that calibrates.
        model: a model with exits.
        parts: the model's tokenizer or image processor, from `reading_parts`.
        labelled: False leaves labels out, whether they are there or not.
    """
    images = reads_images(model)
    given_rows = rows_as_given(args, args.dataset, args.split, "validation", images)
    certified = certified_columns(args, given_rows)
    rows = with_inputs(args, given_rows, args.dataset, images)
    if labelled:
        rows, _ = rows_and_labelling(args, rows, Labelling.of_model(model.config))
    return collect_trace(model, rows, **parts, labelled=labelled, split=args.split or "validation"), certified


def certified_columns(args: CertifiedArguments, rows: Dataset) -> dict[str, Any]:
    """The `groups` and `lists` of rows from `rows_as_given`, where flags name their columns.

    Raises:
        DataError: for a column that is not there or has no value in some row, naming it.
    """
    found = {}
    for flag, name in (("group_column", "groups"), ("list_column", "lists")):
        column = getattr(args, flag)
        if column is None:
            continue
        require_column(rows, column, name, flag)
        found[name] = rows[column][:]
        missing = next((row for row, value in enumerate(found[name]) if value is None), None)
        if missing is not None:
            raise DataError(f"Row {missing} has nothing in its column {column!r}; expected its {name[:-1]}.", field=flag)
    return found


def texts_of(rows: Dataset) -> list[Any]:
    """The texts, or pairs of texts, of rows from `read_rows`."""
    columns = [list(rows[name]) for name in text_columns(rows.column_names)]
    return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
