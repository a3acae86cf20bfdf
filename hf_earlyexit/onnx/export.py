"""From a torch model with exits to a folder of ONNX files."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import ModelProto
from transformers.utils import logging

from ..calibration.targets import Target
from ..errors import UsageError
from ..files import replaced_folder
from ..modeling.certificate import drop_promises_of_other_dtypes, warn_of_other_tokenizer
from ..modeling.fingerprint import model_fingerprint
from ..modeling.protocol import ExitModel, TorchExitClassifier, Wrapped
from ..modeling.wrapped import unwrapped_without_adapters
from ..policies import ExitPolicy
from ..serving.reader import reader_for
from ..values import unexpected
from . import FOLDER, FORMS, LAYERS, LAYOUTS, ONE, TRITON
from .classifier import OnnxClassifier, open_session
from .decisions import PREFIX, asked_exits, policy_graph
from .fixed_scales import batches_of, digest, find_roundings
from .graphs import append, inputs_of, serialized, staged
from .inputs import picture_shape
from .layer_files import cut_pieces
from .manifest import ONE_FILE, write_manifest
from .one_row import OneRow
from .quantize import Rounding, quantize_graph
from .recalibrate import Recalibration, recalibrate
from .triton import triton_files
from .walk import walk_graph

logger = logging.get_logger(__name__)


def export_onnx(
    model: Wrapped,
    folder: str | PathLike[str],
    *,
    forms: Sequence[str] = FORMS,
    layout: str = FOLDER,
    int8: bool = False,
    rows: Any = None,
    labels: Sequence[Any] | None = None,
    scale_rows: Any = None,
    tokenizer: Any = None,
    image_processor: Any = None,
    target: str | Target | None = None,
    split: str = "held-back",
    max_length: int | None = None,
    progress: bool = False,
) -> Recalibration | None:
    """Write a model as ONNX files that really skip layers; the folder is replaced whole or not at all.

    Args:
        model: a float32 classifier with exits, on the CPU. It is not changed.
        folder: made if it is not there.
        forms: "one-file" writes model.onnx for one row at a time in any language, policy included; "layers" writes a file
            for each layer and exit, for `OnnxClassifier`.
        layout: "folder", or "triton" for a model's folder in a repository that Triton reads: config.pbtxt and 1/model.onnx,
            the one-file form for batches whose rows stop each for itself; `forms` is then without effect.
        int8: compute the layers in 8 bits. Their logits differ, so thresholds are chosen anew on `rows`; operating points
            are left out.
        rows, labels: held-back rows, as for `collect_trace`; with `int8` only.
        scale_rows: with `int8`, rows of the usual kind without a look at labels, best a thousand of the training set: what
            products read is then rounded by fixed scales, which fit these rows (static quantization), in fewer steps. By
            default every token is rounded by its own largest value. They should not be among `rows`, whose values would
            fit better than those of rows to come.
        tokenizer: needed for texts; saved into the folder.
        image_processor: needed for pictures; saved into the folder. The export takes pictures of the one size that it
            makes; without it, of the size in the model's config.
        target: what the new thresholds are for; by default what the policy was calibrated for.
        split, max_length, progress: as for `collect_trace`.

    Returns:
        With `int8` and `rows`, what changed.

    Raises:
        UsageError: for arguments that contradict each other, or a model without what the form needs.
        DataError: for rows that the model cannot read.
        PolicyError: for a policy that cannot be traced.
        CheckpointError: if the folder cannot be written.
    """
    if layout not in LAYOUTS:
        raise unexpected("layout", layout, " or ".join(LAYOUTS))
    forms = (ONE,) if layout == TRITON else forms
    inner: TorchExitClassifier = unwrapped_without_adapters(model, "ONNX")
    _check(inner, forms, int8, rows, scale_rows)
    warn_of_other_tokenizer(inner, tokenizer)
    picture = picture_shape(inner, image_processor)
    whole, config, fingerprint, dtype = _traced(inner, int8, picture)
    changed = roundings = None
    if scale_rows is not None:
        reader = reader_for(inner, tokenizer, max_length, image_processor)
        roundings = find_roundings(whole, batches_of(inner, scale_rows, reader, picture))
        fingerprint = _sum(fingerprint, digest(roundings))
    pieces = _pieces(whole, config, int8, roundings) if LAYERS in forms or rows is not None else {}
    if rows is not None:
        small = OnnxClassifier(config, pieces.__getitem__, fingerprint, dtype, static=roundings is not None)
        collecting = {"labels": labels, "tokenizer": tokenizer, "image_processor": image_processor}
        collecting |= {"split": split, "max_length": max_length}
        changed = recalibrate(inner, small, rows, target, **collecting, progress=progress)
    elif int8:
        logger.warning("int8 without rows to choose thresholds on: the export has no policy and runs all layers.")
    files = pieces if LAYERS in forms else {}
    if ONE in forms:
        files[ONE_FILE] = one_file(whole, config, ExitPolicy.from_dict(config.exit_policy), int8, roundings)
    if layout == TRITON:
        files = triton_files(files[ONE_FILE], config, Path(folder).resolve().name)
    with replaced_folder(folder, needs=sum(map(len, files.values()))) as new:
        for name, data in files.items():
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_bytes(data)
        for part in (tokenizer, image_processor):
            if part is not None:
                part.save_pretrained(new)
        settings = {
            "config": config.to_dict(),
            "dtype": dtype,
            "static": roundings is not None,
            "fingerprint": fingerprint,
            "forms": list(forms),
            "layout": layout,
        }
        write_manifest(new, {**settings, "calibration": None if changed is None else changed.to_dict()})
    return changed


def in_memory(model: Wrapped, int8: bool) -> OnnxClassifier:
    """The batched form without files.

    Args:
        model: a float32 classifier with exits, on the CPU. It is not changed.
        int8: compute the layers in 8 bits; there are no thresholds then.

    Raises:
        UsageError, PolicyError: as `export_onnx`.
    """
    inner: TorchExitClassifier = unwrapped_without_adapters(model, "ONNX")
    whole, config, fingerprint, dtype = _traced(inner, int8, picture_shape(inner, None))
    return OnnxClassifier(config, _pieces(whole, config, int8).__getitem__, fingerprint, dtype)


def open_one_row(model: Wrapped, served: OnnxClassifier) -> OneRow:
    """The one-file form of a model without files.

    Args:
        model: a float32 classifier with exits, on the CPU. It is not changed.
        served: its batched form, with a policy.

    Raises:
        UsageError: for one with fixed scales, which its export alone knows; and as `export_onnx`.
        PolicyError: as `export_onnx`.
    """
    if served.static:
        raise UsageError("The model has fixed scales, which its export alone knows: export both forms.", field="served")
    inner: TorchExitClassifier = unwrapped_without_adapters(model, "ONNX")
    int8, policy = served.dtype == torch.int8, served.exit_policy
    assert policy is not None  # its caller has looked
    whole = _traced(inner, int8, picture_shape(inner, None))[0]
    data = one_file(whole, served.config, policy, int8)
    session = open_session(lambda _: data, ONE_FILE, served.threads)
    return OneRow(lambda: session, dict(served.config.exit_policy))


def _pieces(whole: ModelProto, config: Any, int8: bool, roundings: Mapping[str, Rounding] | None = None) -> dict[str, bytes]:
    """The files of the batched form."""
    return cut_pieces(quantize_graph(whole, roundings=roundings) if int8 else whole, config)


def _traced(model: TorchExitClassifier, int8: bool, picture: tuple[int, ...] | None) -> tuple[ModelProto, Any, str, str]:
    """The float32 graph of all layers and exits, the config of the export, its fingerprint and the dtype of its layers."""
    whole = walk_graph(model) if picture is None else walk_graph(model, picture=picture)
    config = copy.deepcopy(model.config)
    config.exit_forms = None
    fingerprint, dtype = model_fingerprint(model), "float32"
    if int8:
        dtype = "int8"
        fingerprint = _sum(fingerprint, "int8")
        config.exit_operating_points = config.exit_point_certificates = None
        config.exit_policy = config.exit_certificate = None
    drop_promises_of_other_dtypes(config, dtype)
    return whole, config, fingerprint, dtype


def _sum(fingerprint: str, change: str) -> str:
    """The fingerprint of numbers that were changed in a way that has a name."""
    return hashlib.sha256(f"{fingerprint} {change}".encode()).hexdigest()[:16]


def _check(model: ExitModel, forms: Sequence[str], int8: bool, rows: Any, scale_rows: Any) -> None:
    if not forms or not set(forms) <= set(FORMS):
        raise unexpected("forms", forms, f"some of {', '.join(FORMS)}")
    if rows is not None and not int8:
        raise UsageError("rows are for int8, whose thresholds are chosen anew; float32 keeps the model's.", field="rows")
    if scale_rows is not None and not int8:
        raise UsageError("scale_rows are for int8; float32 rounds nothing.", field="scale_rows")
    if ONE in forms and model.exit_policy is None:
        raise UsageError(
            "The model has no exit policy, which the one-file form holds: calibrate it and call set_exit_policy first, "
            "or export forms=['layers'].",
            field="model",
        )
    if ONE in forms and int8 and rows is None:
        raise UsageError(
            "int8 logits differ from those that the thresholds were chosen on: pass held-back rows to choose them anew, "
            "or export forms=['layers'] without a policy.",
            field="rows",
        )


def one_file(
    whole: ModelProto,
    config: Any,
    policy: ExitPolicy,
    int8: bool = False,
    roundings: Mapping[str, Rounding] | None = None,
) -> bytes:
    """The file that stops at the first exit where the policy lets a row go.

    Args:
        whole: from `walk_graph`.
        config: the model's.
        policy: with thresholds for its exits.
        int8: compute the layers in 8 bits.
        roundings: by fixed scales; see `quantize_graph`.
    """
    whole = quantize_graph(whole, one_row=True, roundings=roundings) if int8 else whole
    joined = append(whole, policy_graph(policy, config.num_labels), PREFIX)
    inputs = {name: (kind, (1, *sizes[1:])) for name, (kind, sizes) in inputs_of(whole).items()}
    exits = [(config.exit_layers[index], answer, score, leave) for index, answer, score, leave in asked_exits(policy)]
    graph = staged(joined, inputs, exits)
    data = serialized(graph, "export forms=['layers'], or int8")
    onnx.checker.check_model(graph)
    return data
