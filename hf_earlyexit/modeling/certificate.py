"""What ties calibrated thresholds to the exit heads and the dtype they were chosen on.

A certificate stands in the config beside its policy. Once the policy or the heads are others it vouches for nothing.
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
    HEAD_PREFIXES,
    heads_fingerprint,
    policy_fingerprint,
    tensors_fingerprint,
    tokenizer_fingerprint,
)

NEEDED = ("fingerprint", "policy", "dtype")
NARROWER = ("float16", "bfloat16")

logger = logging.get_logger(__name__)


def certify(result: CalibrationResult, model: Any) -> dict[str, Any] | None:
    """The certificate of a calibration's thresholds on this model; `None` if the calibration does not know its heads.

    Raises:
        CheckpointError: if the thresholds were chosen on other exit heads.
    """
    if not result.fingerprint:
        return None
    own = heads_fingerprint(model)
    if result.fingerprint != own:
        raise CheckpointError(
            f"The thresholds were chosen on exit heads {result.fingerprint}; this model has {own}. "
            "Collect a trace of this model and calibrate again.",
            field="fingerprint",
            value=result.fingerprint,
        )
    return {
        "fingerprint": own,
        "rounded": {name: heads_fingerprint(model, getattr(torch, name)) for name in NARROWER},
        "policy": policy_fingerprint(result.policy.to_dict()),
        "dtype": result.dtype,
        "split": result.split,
        "num_rows": result.num_rows,
        "target": result.target,
    }


def warn_of_other_tokenizer(model: Any, tokenizer: Any) -> None:
    """Warn where a tokenizer's vocabulary is not the one the model was saved with."""
    expected = model.config.exit_tokenizer
    if expected is not None and tokenizer is not None and (found := tokenizer_fingerprint(tokenizer)) != expected:
        logger.warning(
            f"The tokenizer's vocabulary is {found}; the model was saved with {expected}. Its answers and thresholds are "
            "for the latter; load the tokenizer from the model's own folder."
        )


def is_certificate(value: Any) -> bool:
    """Whether a value from a config has the form of a certificate."""
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), str) for name in NEEDED)
        and isinstance(value.get("rounded", {}), dict)
    )


def check_certificates(model: Any, path: Any, drop_uncertified: bool) -> None:
    """See that a model just loaded has the heads and the policies that its certificates are for.

    Args:
        model: just loaded; its config loses certificates that vouch for nothing.
        path: where it came from.
        drop_uncertified: where the heads are others, take the policy off instead of refusing.

    Raises:
        CheckpointError: if a policy's thresholds were chosen on other heads.
    """
    heads = [weight for name, weight in model.state_dict().items() if name.startswith("exit_heads.")]
    if any(weight.is_meta for weight in heads):
        return
    own, dtype = heads_fingerprint(model), str(model.dtype).removeprefix("torch.")
    for point, policy, certificate in list(_certified(model.config)):
        named = "exit policy" if point is None else f"operating point {point!r}"
        if policy is None or policy_fingerprint(policy) != certificate["policy"]:
            if policy is not None:
                logger.warning(f"The {named} of {path} is not the one that was calibrated; it is used without certificate.")
            _take_off(model.config, point, keep_policy=True)
        elif not _same_heads(own, certificate):
            if not drop_uncertified:
                raise CheckpointError(
                    f"The thresholds of the {named} in {path} were chosen on exit heads {certificate['fingerprint']}, but "
                    f"the heads there are {own}: the folder was saved or edited in part. Restore it, or pass "
                    "ignore_certificate=True to load without these thresholds and calibrate again.",
                    field="exit_certificate",
                    value=certificate["fingerprint"],
                    path=path,
                )
            logger.warning(f"The {named} of {path} was calibrated on other exit heads and is left out; calibrate again.")
            _take_off(model.config, point)
        elif certificate["dtype"] not in ("", dtype):
            logger.warning(
                f"The {named} of {path} was calibrated in {certificate['dtype']}, but the model is loaded in {dtype}: rows "
                f"near a threshold may leave at another layer. Calibrate in {dtype}, or load with "
                f"dtype={certificate['dtype']!r}."
            )


def drop_outdated(model: Any, tensors: Mapping[str, Tensor] | None) -> None:
    """Before saving, take off the policies whose heads have been trained since; says so.

    Args:
        model: about to be saved.
        tensors: what will be saved, if it is not the model's own state.
    """
    certified = list(_certified(model.config))
    tensors = model.state_dict() if tensors is None else tensors
    if not certified or not any(name.startswith(HEAD_PREFIXES) for name in tensors):
        return
    own = tensors_fingerprint(tensors)
    outdated = [point for point, _, certificate in certified if not _same_heads(own, certificate)]
    for point in outdated:
        _take_off(model.config, point)
    if outdated:
        logger.warning("The exits have changed since their thresholds were chosen, so these are left out; calibrate again.")


def _certified(config: Any) -> Iterator[tuple[str | None, dict[str, Any] | None, dict[str, Any]]]:
    """Operating point (`None`: the default), policy and certificate, of those that have one."""
    if config.exit_certificate is not None:
        yield None, config.exit_policy, config.exit_certificate
    points = config.exit_operating_points or {}
    for point, certificate in (config.exit_point_certificates or {}).items():
        yield point, points.get(point), certificate


def _same_heads(own: str, certificate: dict[str, Any]) -> bool:
    return own == certificate["fingerprint"] or own in certificate.get("rounded", {}).values()


def _take_off(config: Any, point: str | None, keep_policy: bool = False) -> None:
    if point is None:
        config.exit_certificate = None
        config.exit_policy = config.exit_policy if keep_policy else None
        return
    fields = ["exit_point_certificates"] if keep_policy else ["exit_point_certificates", "exit_operating_points"]
    for field in fields:
        left = {name: value for name, value in getattr(config, field).items() if name != point}
        setattr(config, field, left or None)
