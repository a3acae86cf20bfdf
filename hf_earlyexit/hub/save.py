"""One folder that holds all it takes to use and to judge a model: weights, tokenizer, calibration, card."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from ..calibration.result import CalibrationResult, named_in
from ..calibration.stored import SUM, wrong
from ..captions.processor import EarlyExitCaptionProcessor
from ..errors import CheckpointError, UsageError
from ..files import inside, read_json, replaced_folder, write_json
from ..modeling.classifier import EarlyExitClassifier
from ..modeling.configuration import DEFAULT
from ..modeling.fingerprint import model_fingerprint, tokenizer_fingerprint
from ..modeling.protocol import ExitModel, TorchExitModel
from ..serving.reader import reads_images
from ..values import json_sum

CALIBRATION_FILE = "calibration.json"
SEVERAL = "hf_earlyexit.calibrations/1"

Calibrations = CalibrationResult | Mapping[str, CalibrationResult] | None


def save(
    model: TorchExitModel,
    folder: str | PathLike[str],
    *,
    tokenizer: Any = None,
    image_processor: Any = None,
    calibration: Calibrations = None,
    card: bool | Mapping[str, Any] = True,
    repo_id: str | None = None,
) -> None:
    """Save model, tokenizer, image processor, calibration and card; the folder is replaced whole or not at all.

    Args:
        model: a model with exits.
        folder: made if it is not there; files in it that are not written again stay.
        tokenizer: the model's; without it pipelines cannot load the folder.
        image_processor: that of a captioner or image classifier; the same holds for it.
        calibration: how the model's thresholds were chosen: a result, or several by operating point.
        card: write a model card; a mapping gives its `base_model`, `datasets`, `language`, `license`,
            `objective`, `evaluated_on`, and what `card_figures` returned.
        repo_id: where the folder will be pushed to, for the card.

    Raises:
        UsageError: for a calibration whose policy the model does not use.
        CheckpointError: for a calibration of another model, or a folder that cannot be written.
    """
    results = {} if calibration is None else by_name(calibration)
    _check(model, results)
    _check_parts(model, tokenizer, image_processor)
    if tokenizer is not None:
        model.config.exit_tokenizer = tokenizer_fingerprint(tokenizer)
    with replaced_folder(folder, needs=model.get_memory_footprint()) as new:
        model.save_pretrained(new)
        for part in _input_parts(model, tokenizer, image_processor):
            part.save_pretrained(new)
        if results:
            _write_calibrations(new, results)
        if card is not False:
            _write_card(new, model, results, repo_id, {} if card is True else dict(card))


def _check_parts(model: ExitModel, tokenizer: Any, image_processor: Any) -> None:
    """Refuse what a classifier does not read with: it would be loaded with the model."""
    if not isinstance(model, EarlyExitClassifier):
        return
    images = reads_images(model)
    name, part = ("tokenizer", tokenizer) if images else ("image_processor", image_processor)
    if part is not None:
        kind = "pictures" if images else "texts"
        raise UsageError(f"{type(model).__name__} reads {kind}; leave the {name.replace('_', ' ')} out.", field=name)


def _input_parts(model: TorchExitModel, tokenizer: Any, image_processor: Any) -> list[Any]:
    """What makes inputs, as it is saved: both parts of a captioner's as the one that image-text-to-text wants."""
    if tokenizer is not None and image_processor is not None:
        start = model.generation_config.decoder_start_token_id
        return [EarlyExitCaptionProcessor(image_processor, tokenizer, start_token_id=start)]
    return [part for part in (tokenizer, image_processor) if part is not None]


def load_calibrations(folder: str | PathLike[str]) -> Calibrations:
    """The calibration that `save` put into a folder: a result, several by operating point, or `None`.

    Raises:
        CheckpointError: naming the file, and the field where one is at fault.
    """
    path = Path(folder) / CALIBRATION_FILE
    if not path.is_file():
        return None
    values = read_json(path)
    if values.get("format") != SEVERAL:
        return CalibrationResult.load(path)
    stored = values.get("results")
    if not isinstance(stored, dict) or not stored:
        with named_in(path):
            raise wrong("results", stored, "calibrations by the names of their operating points")
    results = {}
    for name, one in stored.items():
        with named_in(path, f"results.{name}."):
            results[name] = CalibrationResult.from_dict(one)
    if values.pop(SUM, None) != json_sum(values):
        with named_in(path):
            raise CheckpointError("Its calibrations changed places or names since they were written.", field=SUM)
    return results


def save_calibrated(
    model: TorchExitModel,
    folder: str | PathLike[str],
    result: CalibrationResult | None = None,
    operating_point: str | None = None,
) -> None:
    """Save a model with one more result in the folder's calibration file; results the model no longer uses leave it.

    Args:
        model: uses the policy of the result already.
        folder: of the saved model.
        result: takes the place of a former one of the same name; `None` where another part of the config is new.
        operating_point: its name; `None` for the default policy.
    """
    try:
        former = load_calibrations(folder)
    except CheckpointError:  # what is damaged cannot be kept
        former = None
    known = {} if former is None else by_name(former)
    served, fingerprint = _served(model), model_fingerprint(model)
    results = {
        name: one for name, one in known.items() if one.policy.to_dict() in served and one.fingerprint in ("", fingerprint)
    }
    with replaced_folder(folder, needs=model.get_memory_footprint()) as new:
        model.save_pretrained(new)
        results |= {} if result is None else {operating_point or DEFAULT: result}
        if results:
            _write_calibrations(new, results)


def _write_calibrations(folder: Path, results: dict[str, CalibrationResult]) -> None:
    if list(results) == [DEFAULT]:
        results[DEFAULT].save(folder / CALIBRATION_FILE)
        return
    values = {"format": SEVERAL, "results": {name: result.to_dict() for name, result in results.items()}}
    write_json(folder / CALIBRATION_FILE, {**values, SUM: json_sum(values)})


def by_name(calibration: CalibrationResult | Mapping[str, CalibrationResult]) -> dict[str, CalibrationResult]:
    """Results by operating point; one alone is that of the default policy."""
    return {DEFAULT: calibration} if isinstance(calibration, CalibrationResult) else dict(calibration)


def _served(model: ExitModel) -> list[dict[str, Any]]:
    """All policies of a model, as in its config."""
    points = [None, *model.operating_points]
    return [policy.to_dict() for policy in map(model.policy_at, points) if policy is not None]


def _check(model: ExitModel, results: dict[str, CalibrationResult]) -> None:
    served, fingerprint = _served(model), model_fingerprint(model)
    for name, result in results.items():
        if result.policy.to_dict() not in served:
            raise UsageError(
                f"The model does not use the policy of the calibration {name!r}; call model.set_exit_policy(result) or "
                "model.set_operating_points({...}) first.",
                field="calibration",
                value=name,
            )
        if result.fingerprint not in ("", fingerprint):
            raise CheckpointError(
                f"The calibration {name!r} is of a model of fingerprint {result.fingerprint}; this one has {fingerprint}. "
                "Calibrate again.",
                field="calibration",
                value=result.fingerprint,
            )


def _write_card(
    folder: Path, model: ExitModel, results: dict[str, CalibrationResult], repo_id: str | None, fields: dict[str, Any]
) -> None:
    from .model_card import model_card_files  # brings plots with it, which saving alone does not need

    for name, data in model_card_files(model, results, repo_id=repo_id, **fields).items():
        place = inside(folder, name)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
