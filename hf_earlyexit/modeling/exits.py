"""What every model with exits has: a policy to choose, folders that are saved whole and checked when loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..errors import UsageError
from ..files import replaced_folder
from .certificate import check_certificates, drop_outdated
from .configuration import FORMAT_VERSION
from .loading import check_tensors, unreadable_weights
from .operating import OperatingPoints
from .protocol import ExitModel
from .shim import LoadedByShim


class ModelWithExits(OperatingPoints, LoadedByShim):
    """Put before a stock model class; `exit_heads` and `exit_gates` hold what is new."""

    exit_heads: nn.ModuleDict
    exit_gates: nn.ModuleDict
    # what the stock class brings
    config_class: Any
    base_model: Any
    device: torch.device
    dtype: torch.dtype
    post_init: Callable[[], None]
    get_memory_footprint: Any
    __call__: Callable[..., Any]

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Layers (1-based) after which rows may leave, the last one included."""
        return tuple(self.config.exit_layers)

    # --- saving and loading ---------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in transformers, but the folder is replaced whole or not at all.

        After an error it is as it was. A policy whose model has changed since it was calibrated is left out. With
        `distributed_checkpoint` every process writes its part of a sharded model straight into the folder, the config first;
        a failure there leaves what was written. Give it a new folder.

        Args:
            save_directory, is_main_process, state_dict, push_to_hub, kwargs: as in transformers.

        Raises:
            CheckpointError: if the folder cannot be written.
            UsageError: for `distributed_checkpoint` with a model that is not sharded.
        """
        distributed = bool(kwargs.get("distributed_checkpoint"))
        if distributed and getattr(self, "_device_mesh", None) is None:  # transformers finds out after writing the config
            raise UsageError(
                "distributed_checkpoint=True is for a model sharded over processes, which this one is not; leave it out.",
                field="distributed_checkpoint",
                value=True,
            )
        self.config.early_exit_version = FORMAT_VERSION
        if not is_main_process or distributed:
            super().save_pretrained(  # type: ignore[misc]
                save_directory, is_main_process, state_dict, push_to_hub, **kwargs
            )
            return
        drop_outdated(self, state_dict)  # type: ignore[arg-type]
        with replaced_folder(save_directory, needs=self.get_memory_footprint()) as new:
            copied = state_dict and dict(state_dict)  # it empties what it is given
            super().save_pretrained(new, state_dict=copied, **kwargs)  # type: ignore[misc]
        if push_to_hub:
            with TemporaryDirectory() as copy:  # the client uploads whatever it finds changed in a folder
                named = {"repo_id": Path(save_directory).name, **kwargs}
                super().save_pretrained(copy, state_dict=state_dict, push_to_hub=True, **named)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model with exits, or a plain checkpoint of the family, whose exits are then new.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            args, kwargs: as in transformers, and `init_missing_exits=True` to accept a checkpoint with exits whose
                exits differ from the config's: missing ones are initialised, others dropped. For training only.
                `ignore_certificate=True` leaves out policies that were calibrated on another model.

        Raises:
            CheckpointError: if tensors are missing, of another shape, not finite, not those that the thresholds were chosen
                on, or the file is damaged.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        init_missing = kwargs.pop("init_missing_exits", False)
        ignore_certificate = kwargs.pop("ignore_certificate", False)
        any_size = kwargs.pop("ignore_mismatched_sizes", False)
        path = pretrained_model_name_or_path
        if isinstance(kwargs.get("config"), PreTrainedConfig):
            kwargs["config"] = cls.config_class.from_stock(kwargs["config"])
        try:
            model, info = super().from_pretrained(  # type: ignore[misc]
                path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except SafetensorError as error:
            raise unreadable_weights(path, error) from error
        check_tensors(model, info, path, init_missing, any_size)
        check_certificates(model, path, drop_uncertified=ignore_certificate or init_missing)
        return (model, info) if wants_info else model


def require_float32_on_cpu(model: ExitModel, purpose: str) -> None:
    """Refuse models that cannot be copied into another form.

    Args:
        model: any model.
        purpose: what the model is wanted for, for the error.

    Raises:
        UsageError: for a model on another device or of another precision.
    """
    kind = getattr(model, "form", None) or str(model.dtype).removeprefix("torch.")  # copies in other forms have one
    if model.device.type != "cpu" or kind != "float32":
        raise UsageError(
            f"The model is {kind} on {model.device}; {purpose} needs float32 on the CPU: "
            'call model.to("cpu").float() first, or take the model that a copy was made from.',
            field="model",
        )
