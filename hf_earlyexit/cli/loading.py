"""What every command says where a model cannot be used."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForSequenceClassification

from ..errors import CheckpointError, EarlyExitError, UsageError
from ..modeling.loading import check_config_file
from ..modeling.operating import OperatingPoints


def load_model(name: Any) -> Any:
    """A model with exits, from a folder or the Hub.

    Raises:
        CheckpointError: if it is damaged.
        UsageError: if it has no exits.
    """
    check_config_file(name)
    try:
        model = AutoModelForSequenceClassification.from_pretrained(name, trust_remote_code=False)  # never asks
    except EarlyExitError:
        raise
    except ValueError as error:  # such as a model type that transformers does not know
        raise CheckpointError(f"{name} cannot be loaded: {error}", path=name) from error
    if not isinstance(model, OperatingPoints):
        raise UsageError(
            f"{name} is a {type(model).__name__}, which has no exits; run `hf-earlyexit train --model {name}` first.",
            field="model",
        )
    return model
