"""A model in the form that suits this machine, with thresholds that were chosen in that form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.utils import logging

from ..calibration.targets import Target
from ..errors import CheckpointError, EarlyExitError, UsageError
from ..modeling.fingerprint import model_fingerprint, policy_fingerprint
from ..modeling.protocol import ExitClassifier, Wrapped
from ..modeling.wrapped import unwrapped_without_adapters
from ..onnx.recalibrate import recalibrate
from ..registry import unknown_name
from ..serving.served import form_of, served_classifier
from .speed import HINTS, LATENCY, THROUGHPUT, fastest
from .table import FORMS, FP32, ONNX, SAME_NUMBERS, made, what_lacks

AUTO = "auto"

logger = logging.get_logger(__name__)


class _FormError(UsageError):
    """A model cannot have a form."""


def convert(
    model: Wrapped,
    form: str = AUTO,
    *,
    performance_hint: str = THROUGHPUT,
    rows: Any = None,
    labels: Sequence[Any] | None = None,
    tokenizer: Any = None,
    image_processor: Any = None,
    target: str | Target | None = None,
    split: str = "held-back",
    max_length: int | None = None,
    progress: bool = False,
) -> Any:
    """A classifier in another form: another number format, or another engine. What it answers tells the form.

    Thresholds hold for the numbers they were chosen on. "onnx" computes in float32 as the model does and keeps them; for
    every other form they are chosen anew on `rows`, or are those that `keep_thresholds` put into the model's config. Where
    there are neither, a model with a policy is refused.

    Args:
        model: a float32 classifier with exits. It is not changed. One in another form has that form only.
        form: "fp32" (the model itself), "bf16", "int8", "onnx" (ONNX Runtime), "onnx-int8"; or "auto" for the one that is
            the fastest here of those that the model can have and that have thresholds, by a short measurement of each; ONNX
            Runtime is among these where the hint is "latency" or it has thresholds of its own.
        performance_hint: what "auto" measures: "throughput" for many rows at once, "latency" for one at a time. With
            "latency" a model in ONNX Runtime with a policy has one file more, for rows that come alone, which holds its
            weights once more and stops by itself.
        rows, labels: held-back rows to choose thresholds on, as for `collect_trace`.
        tokenizer, image_processor, split, max_length, progress: as for `collect_trace`.
        target: what the new thresholds are for; by default what the model's were calibrated for.

    Returns:
        A model for `predict`, `stream`, `collect_trace`, `Engine` and the pipelines. Only the default policy is there: no
        operating points.

    Raises:
        UsageError: for a form that does not run here, with what it lacks, and for thresholds that are not to be had.
        UnknownNameError: for another form or hint.
        CheckpointError: for kept thresholds that were chosen on other weights, or on another kind of processor.

    Examples:
        >>> import hf_earlyexit as ee
        >>> config = ee.EarlyExitBertConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
        >>> model = ee.EarlyExitBertForSequenceClassification(config)
        >>> ee.convert(model, "int8").form
        'int8'
    """
    if not isinstance(performance_hint, str) or performance_hint not in HINTS:
        raise unknown_name("performance hint", performance_hint, HINTS)
    inner = served_classifier(unwrapped_without_adapters(model, "another form"))
    own = form_of(inner)
    if not isinstance(form, str) or form not in (AUTO, own, *FORMS):
        raise unknown_name("form", form, (AUTO, *FORMS))
    if own != FP32 and form in (AUTO, own) and rows is None:
        return inner
    if own != FP32 and form == FP32:
        raise UsageError(
            f"The model is in {own}, and float32 is not to be had of it: take the model it was made from.",
            field="form",
            value=form,
        )
    collecting = {"labels": labels, "split": split, "max_length": max_length, "progress": progress}
    parts = {
        name: part for name, part in (("tokenizer", tokenizer), ("image_processor", image_processor)) if part is not None
    }

    def convert_to(name: str) -> Any:
        try:
            new = made(inner, name)
        except UsageError as error:
            raise _FormError(str(error), field=error.field, value=error.value) from error
        if name in SAME_NUMBERS or inner.exit_policy is None:
            return new
        if rows is not None:
            recalibrate(inner, new, rows, target, **collecting, **parts)
        else:
            _take_kept(inner, new)
        return new

    if form != AUTO:
        if rows is not None and form in SAME_NUMBERS:
            raise UsageError(
                f"rows choose thresholds anew, and {form!r} computes in float32, whose thresholds the model has; leave "
                "them out.",
                field="rows",
            )
        return _with_one_row(inner, convert_to(form), performance_hint)
    kept = inner.config.exit_forms or {}

    def may(name: str) -> bool:
        if what_lacks(name, inner.device) is not None:
            return False
        if name.startswith(ONNX) and name not in kept and performance_hint == THROUGHPUT:
            return False  # an export takes longer than it saves
        return name in SAME_NUMBERS or inner.exit_policy is None or rows is not None or name in kept

    models = {}
    for name in filter(may, FORMS):
        try:
            models[name] = convert_to(name)
        except (_FormError, CheckpointError) as error:
            if name == FP32:
                raise
            logger.warning(f"The form {name} is left out of the choice: {error}")
    return _with_one_row(inner, fastest(models, performance_hint), performance_hint)


def keep_thresholds(model: Wrapped, converted: Any) -> None:
    """Put the thresholds of a converted model into the config of the model it was made from, to be saved with it.

    `convert` then finds them after loading, makes sure that they were chosen on the very numbers, and needs no rows.

    Args:
        model: in float32; its config changes.
        converted: from `convert` with `rows`, or a copy that was calibrated.

    Raises:
        UsageError: for a model whose thresholds no calibration vouches for, and for one in float32.
    """
    inner: Any = unwrapped_without_adapters(model, "another form")
    form, policy, certificate = form_of(converted), converted.config.exit_policy, converted.config.exit_certificate
    if form in SAME_NUMBERS or form not in FORMS:
        raise UsageError(f"The model is in {form}; expected one that `convert` made in another form.", field="converted")
    if policy is None or certificate is None:
        raise UsageError(
            f"The {form} model has no thresholds that a calibration vouches for: convert with rows=..., or calibrate it.",
            field="converted",
        )
    inner.config.exit_forms = {**(inner.config.exit_forms or {}), form: {"policy": policy, "certificate": certificate}}


def _with_one_row(model: Any, new: Any, performance_hint: str) -> Any:
    """A model in ONNX Runtime that answers rows that come alone by the one-file form, where that is wanted and can be."""
    if performance_hint == LATENCY and form_of(new).startswith(ONNX) and new.exit_policy is not None:
        from ..onnx.export import open_one_row  # needs the extra

        try:
            new.walker.one_row = open_one_row(model, new)
        except EarlyExitError as error:
            logger.warning(f"Rows that come alone go through the files of the layers, one after the other: {error}")
    return new


def _take_kept(model: ExitClassifier, new: Any) -> None:
    """Give a model in another form the thresholds that are kept for it.

    Raises:
        UsageError: if there are none.
        CheckpointError: if they were chosen on other numbers.
    """
    form = new.form
    stored = (model.config.exit_forms or {}).get(form)
    if stored is None:
        raise UsageError(
            f"The model's thresholds were chosen in {form_of(model)} and do not hold in {form}, whose logits differ: pass "
            f"rows=..., held-back rows to choose them anew on, or keep some in the model's folder (keep_thresholds, or "
            f"`hf-earlyexit calibrate MODEL --form {form}`).",
            field="form",
            value=form,
        )
    policy, certificate = stored["policy"], stored["certificate"]
    if certificate["policy"] != policy_fingerprint(policy) or certificate["fingerprint"] != model_fingerprint(new):
        raise CheckpointError(
            f"The thresholds kept for {form} were chosen on other numbers than this model has here: its weights or the "
            f"policy have changed since, or the processor rounds otherwise. Calibrate {form} again on this machine.",
            field="exit_forms",
            value=certificate["fingerprint"],
        )
    new.config.exit_policy, new.config.exit_certificate = dict(policy), dict(certificate)
