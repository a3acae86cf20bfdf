"""What a model with exits is to everything that calibrates, serves, saves or describes one, in torch or exported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..policies.base import ExitPolicy
from ..walking.step import Walker


class ExitModel(Protocol):
    """A model with exits: a torch classifier or captioner, or an exported classifier.

    Attributes:
        config: an `EarlyExitConfig`.
    """

    config: Any

    @property
    def training(self) -> bool:
        """Whether it is being trained; early exits are for evaluation."""

    @property
    def device(self) -> torch.device:
        """Where its hidden states are."""

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Layers (1-based) after which rows may leave, the last one included."""

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the signals that its exits can give beside their logits."""

    @property
    def exit_policy(self) -> ExitPolicy | None:
        """The policy that decides when rows leave; `None` to run in full."""

    @property
    def operating_points(self) -> tuple[str, ...]:
        """Names of policies to choose from at call time, "exact" among them."""

    def set_exit_policy(self, policy: Any) -> None:
        """Serve with this policy, or calibration result, from now on; `None` runs the model in full."""

    def set_operating_points(
        self, points: Mapping[str, Any] | None, default: str | None = None, *, keep_others: bool = False
    ) -> None:
        """Keep several policies, to be chosen by name at call time."""

    def policy_at(self, operating_point: str | None) -> ExitPolicy | None:
        """The policy of an operating point, `None` for "exact"; without a name, `exit_policy`."""

    def choose_policy(
        self, early_exit: bool | None, operating_point: str | None, kwargs: dict[str, Any]
    ) -> ExitPolicy | None:
        """The policy that a call asks for; `None` to run in full."""

    def require_signals(self, names: Iterable[str]) -> None:
        """Refuse signals that the model does not give."""

    def modules(self) -> Iterable[nn.Module]:
        """Its modules; none of an exported one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A batch through the model: see the `forward` of each."""


class ExitClassifier(ExitModel, Protocol):
    """A classifier with exits."""

    @property
    def num_labels(self) -> int:
        """Classes C."""


class TorchExitModel(ExitModel, Protocol):
    """A model with exits that is a torch module of transformers.

    Attributes:
        exit_heads, exit_gates: by layer; what the stock model does not have.
        base_model: the stock backbone.
    """

    exit_heads: nn.ModuleDict
    exit_gates: nn.ModuleDict
    base_model: Any
    base_model_prefix: str

    def eval(self) -> Any:
        """The model itself, no longer in training mode."""

    def set_attn_implementation(self, attn_implementation: Any) -> None:
        """Choose how attention is computed, by name."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All weights."""

    def buffers(self) -> Iterator[Tensor]:
        """All other tensors."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All weights by name."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """All modules by path."""

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors that are saved, by name."""

    def get_submodule(self, target: str) -> nn.Module:
        """A module by path."""

    def get_memory_footprint(self) -> int:
        """Bytes of all tensors."""

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Write a folder, whole or not at all."""


class TorchExitClassifier(Walker, TorchExitModel, Protocol):
    """A classifier with exits that is a torch module, which can be walked layer by layer.

    Attributes:
        family: the row of its family, a `Family`.
    """

    family: Any

    @property
    def num_labels(self) -> int:
        """Classes C."""


Wrapped = ExitModel | nn.Module
"""A model with exits, or what other libraries put around one: `torch.compile`, `DataParallel`, PEFT."""
