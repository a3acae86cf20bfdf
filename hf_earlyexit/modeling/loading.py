"""What is refused when a model with exits is loaded: tensors that are missing, of another shape, or not finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not listed for checkers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import logging

from ..errors import CheckpointError
from ..files import CONFIG, read_json
from .fingerprint import NEW_PARTS
from .protocol import TorchExitModel

INPUT_PARTS = {
    "tokenizer": ("tokenizer_config.json",),
    "image_processor": ("processor_config.json", "preprocessor_config.json"),
}

logger = logging.get_logger(__name__)


def check_named_checkpoint(name: Any) -> None:
    """Refuse what is neither a folder nor the id of a repository, and a folder whose config.json holds no JSON object, which
    the Auto classes do not do in so many words.

    Raises:
        CheckpointError: naming the folder or the file.
    """
    if not Path(name).is_dir():
        try:
            validate_repo_id(str(name))
        except HFValidationError as error:
            words = f"There is no folder {name}; expected a folder or a Hub id, such as owner/name."
            raise CheckpointError(words, field="model", value=name, path=name) from error
    if (Path(name) / CONFIG).is_file():
        read_json(Path(name) / CONFIG, finite=False)


def unreadable_weights(name: Any, error: SafetensorError) -> CheckpointError:
    """The error for weights that cannot be read; tells the damaged file and its size where they lie in a folder."""
    damaged = [path for path in sorted(Path(name).glob("*.safetensors")) if not _opens(path)]
    place = f"{damaged[0]} ({damaged[0].stat().st_size:,} bytes)" if damaged else str(name)
    return CheckpointError(
        f"The weights in {place} cannot be read ({error}); the file is cut short or damaged. Download it again.",
        path=damaged[0] if damaged else name,
    )


def _opens(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except SafetensorError:
        return False


def has_input_part(folder: Path, part: str) -> bool:
    """Whether a folder holds a "tokenizer" or an "image_processor"."""
    return any((folder / file).is_file() for file in INPUT_PARTS[part])


def check_input_parts(name: Any, given: Mapping[str, Any], needed: Iterable[str] = tuple(INPUT_PARTS)) -> None:
    """Refuse a folder without the files that make its model's inputs; transformers tells of them in words of its own.

    Args:
        name: a folder; a Hub id is let through.
        given: parts that are not looked for, by name.
        needed: names of the parts.

    Raises:
        CheckpointError: naming what is missing.
    """
    if not Path(name).is_dir():
        return
    for part in needed:
        files = INPUT_PARTS[part]
        if given.get(part) is None and not has_input_part(Path(name), part):
            raise CheckpointError(
                f"{name} holds no {part.replace('_', ' ')} ({' or '.join(files)}); save it there, as ee.save does with "
                f"{part}=..., or pass one.",
                field=part,
                path=name,
            )


def check_tensors(model: TorchExitModel, info: Any, path: Any, init_missing: bool, any_size: bool) -> None:
    """Refuse a model whose tensors do not fit its config.

    Args:
        model: just loaded.
        info: transformers' loading info.
        path: where it came from.
        init_missing: accept exits that are missing or surplus.
        any_size: accept tensors of another shape.

    Raises:
        CheckpointError: naming the tensor.
    """
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    mismatched = sorted(info["mismatched_keys"])
    if mismatched and not any_size:
        name, shape, expected = mismatched[0]
        raise CheckpointError(
            f"{len(mismatched)} tensors in {path} have another shape than the config asks for; first {name}: found "
            f"{list(shape)}, expected {list(expected)}. Check num_labels and exit_head, or pass "
            "ignore_mismatched_sizes=True to start those afresh.",
            field=name,
            path=path,
        )
    stray = [name for name in unexpected if name.startswith(NEW_PARTS) and not init_missing]
    lost = [name for name in missing if not (init_missing and name.startswith(NEW_PARTS))]
    backbone = [name for name in missing if name.startswith(f"{model.base_model_prefix}.") and ".pooler." not in name]
    if model.config.early_exit_version is None and backbone:
        raise CheckpointError(
            f"{path} lacks {len(backbone)} tensors of the backbone, first {backbone[0]}: they would be random. It is of "
            "another family, cut, or has fewer layers than the config says; load a checkpoint that fits.",
            field=backbone[0],
            path=path,
        )
    if model.config.early_exit_version is not None and (lost or stray):
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in (("missing", lost), ("surplus", stray)) if names)
        raise CheckpointError(
            f"{path} says it holds a model with exits, but its tensors do not fit the config ({listed}). Restore the "
            "folder, or pass init_missing_exits=True to train those exits anew.",
            field=(lost or stray)[0],
            path=path,
        )
    for name, tensor in model.state_dict().items():
        if not is_finite(tensor):
            raise CheckpointError(
                f"{name} in {path} holds values that are not finite, so its answers would not be either. Download "
                "the folder again, or train again with a lower learning rate.",
                field=name,
                path=path,
            )
    if any(name.startswith("exit_heads.") for name in missing):
        logger.warning_once(
            "The exits are new and know nothing yet: train them (EarlyExitTrainer), then calibrate, before exiting early."
        )
    elif any(name.startswith("exit_gates.") for name in missing):
        logger.warning_once("The gates are new and know nothing yet: train them (ConsistentTrainer) before they decide.")


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither nan nor an infinity; read once, without a copy. One that is not in memory counts."""
    if tensor.is_meta or not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    lowest, highest = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))
