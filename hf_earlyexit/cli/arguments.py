"""Flags that several commands share. Importing them costs nothing: help texts need no model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

AUTO = "auto"
STDOUT = "-"


@dataclass(kw_only=True)
class DeviceArguments:
    """Where to compute."""

    device: str = field(default=AUTO, metadata={"help": "cpu, cuda, cuda:1 ...; auto takes a GPU where there is one"})


@dataclass(kw_only=True)
class FormArguments:
    """In which form the model answers."""

    form: str | None = field(
        default=None,
        metadata={
            "help": "fp32, bf16, int8, onnx, onnx-int8, or auto for the fastest here that has thresholds (calibrate --form "
            "keeps some); by default the model as it is saved"
        },
    )
    performance_hint: str = field(default="throughput", metadata={"help": "what auto measures: throughput or latency"})


@dataclass(kw_only=True)
class TextArguments:
    """How a model that writes goes on from its prompts."""

    lossless: bool = field(
        default=False,
        metadata={"help": "exits draft, the layers above check; texts stay the full model's own"},
    )
    chat: bool = field(default=False, metadata={"help": "a text is what a user says, in the chat template of the tokenizer"})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "longest text; 64 for language models, for captioners as their own config says"}
    )


@dataclass(kw_only=True)
class OutputArguments:
    """How rows leave, and where answers are written."""

    output: str = field(
        default=STDOUT,
        metadata={"help": "file to write: .jsonl, .csv, .tsv, .parquet or .arrow; '-' for JSON Lines on standard output"},
    )
    resume: bool | None = field(
        default=None, metadata={"help": "true goes on with the output of a run that was stopped; false begins anew"}
    )
    early_exit: bool | None = field(default=None, metadata={"help": "false runs the full model"})
    operating_point: str | None = field(default=None, metadata={"help": "name of the policy to use; exact: the full model"})


@dataclass(kw_only=True)
class FileArguments:
    """How rows are found in files."""

    text_column: list[str] | None = field(
        default=None, metadata={"help": "column of the texts, or two columns of pairs; by default the usual names"}
    )
    image_column: str | None = field(
        default=None, metadata={"help": "column of the pictures, or of their files; by default the usual names"}
    )
    max_rows: int | None = field(default=None, metadata={"help": "take so many rows from the beginning"})
    dataset_config: str | None = field(default=None, metadata={"help": "name of a configuration of the data set"})
    encoding: str | None = field(default=None, metadata={"help": "of text files, such as latin-1; UTF-8 by default"})
    separator: str | None = field(default=None, metadata={"help": "of the cells in CSV; a comma, in TSV a tab"})
    quotes: bool | None = field(default=None, metadata={"help": "false takes double quotes in CSV and TSV as they are"})
    input_format: str | None = field(
        default=None, metadata={"help": "csv, tsv, json, jsonl, parquet, arrow or text, where a name does not tell"}
    )


@dataclass(kw_only=True)
class RowArguments(FileArguments):
    """How labelled rows are found in files."""

    label_column: str | None = field(default=None, metadata={"help": "column of the labels; 'label' by default"})
    label_names: list[str] | None = field(
        default=None, metadata={"help": "names of the classes, in the order of their numbers"}
    )


@dataclass(kw_only=True)
class CertifiedArguments:
    """What promises are about, where it is not all rows, one by one."""

    group_column: str | None = field(
        default=None, metadata={"help": "column of slices that must each keep it, for certified:DROP@CONFIDENCE:by=group"}
    )
    list_column: str | None = field(
        default=None, metadata={"help": "column of each row's list, such as its query: certified is then about lists"}
    )


TRACE_FILE = "held-back.safetensors"
SPLITS = "folder with one file per split or with pictures in a folder per class, a file, '-' for standard input, or a Hub id"
SLICES = "or a slice such as 'test[:100]'"


def given(args: Any, *names: str) -> dict[str, Any]:
    """The values of those flags that were given, by name."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}
