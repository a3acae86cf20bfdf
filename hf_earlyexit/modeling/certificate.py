"""What ties calibrated thresholds to the model and the dtype they were chosen on.

A certificate stands in the config beside its policy. Once the policy, a weight or a setting that answers depend on is
another, it vouches for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..calibration.result import CalibrationResult
from ..errors import CheckpointError
from .fingerprint import (
    answering_settings,
    answering_state,
    model_fingerprint,
    policy_fingerprint,
    short_sum,
    state_fingerprint,
    tokenizer_fingerprint,
)
from .protocol import ExitModel, TorchExitModel

NEEDED = {"fingerprint": str, "policy": str, "dtype": str, "rounded": dict, "settings": dict}
NARROWER = ("float16", "bfloat16")

logger = logging.get_logger(__name__)


class Fingerprints:
    """Fingerprints of a model, each taken once: several certificates need the same.

    Args:
        model: as it is now.
    """

    def __init__(self, model: ExitModel) -> None:
        self._model = model
        self._known: dict[torch.dtype, str] = {}

    def rounded_to(self, dtype: torch.dtype = torch.float32) -> str:
        """The model's fingerprint with weights rounded to a dtype."""
        if dtype not in self._known:
            self._known[dtype] = model_fingerprint(self._model, dtype)
        return self._known[dtype]


def computing_dtype(model: ExitModel) -> str:
    """What a model computes its layers in: "int8" for a copy in 8 bits, else the dtype of its layers."""
    modules = model.modules() if hasattr(model, "modules") else ()
    rounded = (str(module.computes_in) for module in modules if hasattr(module, "computes_in"))
    return next(rounded, str(getattr(model, "layer_dtype", None) or model.dtype).removeprefix("torch."))


def certify(
    result: CalibrationResult, model: ExitModel, fingerprints: Fingerprints, point: str | None = None
) -> dict[str, Any] | None:
    """The certificate of a calibration's thresholds on this model; `None` if the calibration does not know its model.

    What was promised in another dtype than the model computes in is left out, and that is said.

    Args:
        result: of a calibration.
        model: that is to have the thresholds.
        fingerprints: the model's.
        point: the operating point's name; `None` for the default policy.

    Raises:
        CheckpointError: if the thresholds were chosen on another model.
    """
    if not result.fingerprint:
        return None
    fingerprint = fingerprints.rounded_to()
    if result.fingerprint != fingerprint:
        raise CheckpointError(
            f"The thresholds were chosen on a model of fingerprint {result.fingerprint}; this one has {fingerprint}: its "
            "weights or settings are others. Collect a trace of this model and calibrate again.",
            field="fingerprint",
            value=result.fingerprint,
        )
    certificate = {
        "fingerprint": fingerprint,
        "rounded": {name: fingerprints.rounded_to(getattr(torch, name)) for name in NARROWER},
        "settings": answering_settings(model.config),
        "policy": policy_fingerprint(result.policy.to_dict()),
        "dtype": result.dtype,
        "split": result.split,
        "num_rows": result.num_rows,
        "target": result.target,
        "exit_shares": [report.share for report in result.exits],
        "promise": None if result.promise is None else result.promise.to_dict(),
    }
    certificate = _summed(certificate)
    if result.dtype not in ("", computing_dtype(model)):
        _drop_promise(point, certificate)
    return certificate


def _summed(certificate: dict[str, Any]) -> dict[str, Any]:
    values = {name: value for name, value in certificate.items() if name != "sum"}
    return {**values, "sum": short_sum(values)}


def warn_of_other_tokenizer(model: ExitModel, tokenizer: Any) -> None:
    """Warn where a tokenizer's vocabulary is not the one the model was saved with."""
    expected = model.config.exit_tokenizer
    if expected is not None and tokenizer is not None and (vocabulary := tokenizer_fingerprint(tokenizer)) != expected:
        logger.warning(
            f"The tokenizer's vocabulary is {vocabulary}; the model was saved with {expected}. Its answers and thresholds "
            "are for the latter; load the tokenizer from the model's own folder."
        )


def is_certificate(value: Any) -> bool:
    """Whether a value from a config is a certificate, unchanged since it was written."""
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), kind) for name, kind in NEEDED.items())
        and value.get("sum") == _summed(value)["sum"]
    )


def without_policy(values: dict[str, Any]) -> str | None:
    """The field of a config's certificate that stands there without its policy, or `None`.

    Args:
        values: fields of a config.
    """
    if values.get("exit_certificate") is not None and values.get("exit_policy") is None:
        return "exit_certificate"
    points, certificates = (values.get(f"exit_{name}") for name in ("operating_points", "point_certificates"))
    if isinstance(certificates, dict) and certificates.keys() - (points if isinstance(points, dict) else {}).keys():
        return "exit_point_certificates"
    return None


def check_certificates(model: TorchExitModel, path: Any, drop_uncertified: bool) -> None:
    """See that a model just loaded is the one, and has the policies, that its certificates are for.

    Args:
        model: just loaded; its config loses certificates that vouch for nothing.
        path: where it came from.
        drop_uncertified: where the model is another, take the policy off instead of refusing.

    Raises:
        CheckpointError: if a policy's thresholds were chosen on other weights or settings.
    """
    certified = list(_certified(model.config))
    if not certified:
        return
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        logger.warning(
            f"Weights of {path} are not in memory, so nobody can see whether they are those that were calibrated."
        )
        return
    fingerprint, dtype = model_fingerprint(model), computing_dtype(model)
    for point, policy, certificate in certified:
        named = _named(point)
        if policy is None or policy_fingerprint(policy) != certificate["policy"]:
            if policy is not None:
                logger.warning(f"The {named} of {path} is not the one that was calibrated; it is used without certificate.")
            _take_off(model.config, point, keep_policy=True)
        elif not _same_model(fingerprint, certificate):
            if not drop_uncertified:
                raise CheckpointError(
                    f"The thresholds of the {named} in {path} were chosen on another model: "
                    f"{_difference(fingerprint, certificate, model.config)}. The folder was saved or edited in part. "
                    "Restore it, or pass ignore_certificate=True to load without these thresholds and calibrate again.",
                    field="exit_certificate",
                    value=certificate["fingerprint"],
                    path=path,
                )
            logger.warning(f"The {named} of {path} was calibrated on another model and is left out; calibrate again.")
            _take_off(model.config, point)
        elif certificate["dtype"] not in ("", dtype):
            logger.warning(
                f"The {named} of {path} was calibrated in {certificate['dtype']}, but the model is loaded in {dtype}: rows "
                f"near a threshold may leave at another layer. Calibrate in {dtype}, or load with "
                f"dtype={certificate['dtype']!r}."
            )
            _drop_promise(point, certificate)


def drop_promises_of_other_dtypes(config: Any, dtype: str) -> None:
    """Take off what was promised of thresholds in another dtype than the one that computes from now on; says so.

    Args:
        config: of the model.
        dtype: such as "float32".
    """
    for point, _, certificate in _certified(config):
        if certificate["dtype"] not in ("", dtype):
            _drop_promise(point, certificate)


def _named(point: str | None) -> str:
    """An operating point in words; `None` is the default policy."""
    return "exit policy" if point is None else f"operating point {point!r}"


def _drop_promise(point: str | None, certificate: dict[str, Any]) -> None:
    if certificate.get("promise") is None:
        return
    named = _named(point)
    logger.warning(f"What was promised of the {named} held in {certificate['dtype']} only, and is left out.")
    certificate.update(_summed({**certificate, "promise": None}))


def drop_outdated(model: TorchExitModel, tensors: Mapping[str, Tensor] | None) -> None:
    """Before saving, take off the policies whose model has changed since, and certificates without a policy; says so.

    Args:
        model: about to be saved.
        tensors: what will be saved, if it is not the model's own state.
    """
    for point, policy, _ in list(_certified(model.config)):
        if policy is None:
            _take_off(model.config, point)
    certified, answering = list(_certified(model.config)), answering_state(model)
    if not certified or (tensors is not None and not answering.keys() <= tensors.keys()):
        return
    state = answering if tensors is None else {name: tensors[name] for name in answering}
    fingerprint = state_fingerprint(state, model.config)
    outdated = [point for point, _, certificate in certified if not _same_model(fingerprint, certificate)]
    for point in outdated:
        _take_off(model.config, point)
    if outdated:
        logger.warning("The model has changed since its thresholds were chosen, so these are left out; calibrate again.")


def _difference(fingerprint: str, certificate: dict[str, Any], config: Any) -> str:
    """What is another than it was, in words: a setting where it is one, else the weights."""
    before, now = certificate["settings"], answering_settings(config)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            was, is_now = (repr(values[name]) if name in values else "the default" for values in (before, now))
            return f"{name} is {is_now}, and was {was}"
    return f"its weights have the fingerprint {fingerprint}, and had {certificate['fingerprint']}"


def _certified(config: Any) -> Iterator[tuple[str | None, dict[str, Any] | None, dict[str, Any]]]:
    """Operating point (`None`: the default), policy and certificate, of those that have one."""
    if config.exit_certificate is not None:
        yield None, config.exit_policy, config.exit_certificate
    points = config.exit_operating_points or {}
    for point, certificate in (config.exit_point_certificates or {}).items():
        yield point, points.get(point), certificate


def _same_model(fingerprint: str, certificate: dict[str, Any]) -> bool:
    return fingerprint == certificate["fingerprint"] or fingerprint in certificate["rounded"].values()


def _take_off(config: Any, point: str | None, keep_policy: bool = False) -> None:
    if point is None:
        config.exit_certificate = None
        config.exit_policy = config.exit_policy if keep_policy else None
        return
    fields = ["exit_point_certificates"] if keep_policy else ["exit_point_certificates", "exit_operating_points"]
    for field in fields:
        left = {name: value for name, value in getattr(config, field).items() if name != point}
        setattr(config, field, left or None)
