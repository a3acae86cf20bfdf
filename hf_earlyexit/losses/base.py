"""What an objective is: a loss for every exit, and how the exits' losses become one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import TrainingError
from ..problem_types import MULTI_LABEL, REGRESSION
from ..registry import Registry

LabelLosses = Callable[[Tensor, Tensor, str], Tensor]  # exit logits [B, E, C], labels, problem type -> [E]
OBJECTIVES: Registry[type[Objective]] = Registry("objective")


class Progress(NamedTuple):
    """Where a run of training stands: steps that are done, and steps in all."""

    step: int
    steps: int


class ObjectiveValue(NamedTuple):
    """The loss to minimise (scalar) and each exit's own loss `[E]`, float32."""

    loss: Tensor
    per_exit: Tensor


def task_loss(logits: Tensor, labels: Tensor, problem_type: str, smoothing: float = 0.0) -> Tensor:
    """Mean loss of answers `[B, C]`: cross entropy (label -100 is left out), binary cross entropy or squared error.

    `smoothing` is the share of a class label, 0 to 1, that is spread over all classes.
    """
    if problem_type == REGRESSION:
        return functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).reshape(logits.squeeze(-1).shape))
    if problem_type == MULTI_LABEL:
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    # a batch whose labels are all ignored has loss 0, not 0 / 0
    total = functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    return total / (labels != -100).sum().clamp_min(1)


def row_losses(exit_logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """Every exit's loss on every row, in float32: `[B, E, C]` to `[B, E]`; 0 where the label is -100."""
    logits = exit_logits.float()
    if problem_type == REGRESSION:
        return (logits - labels.to(logits.dtype).reshape(len(labels), 1, -1)).square().mean(-1)
    if problem_type == MULTI_LABEL:
        truth = labels.to(logits.dtype)[:, None].expand_as(logits)
        return functional.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(-1)
    return functional.cross_entropy(logits.transpose(1, 2), labels[:, None].expand(logits.shape[:2]), reduction="none")


def label_losses(exit_logits: Tensor, labels: Tensor, problem_type: str, smoothing: float = 0.0) -> Tensor:
    """`task_loss` of every exit: `[B, E, C]` to `[E]`."""
    return torch.stack([task_loss(logits, labels, problem_type, smoothing) for logits in exit_logits.unbind(1)])


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """A loss over all exits.

    Args:
        weights: "linear" (an exit weighs its layer's number, the papers' choice), "uniform", or one number per exit.
            They are divided by their sum.

    Raises:
        TrainingError: for weights that cannot work.
    """

    weights: str | Sequence[float] = "linear"

    named_weights: ClassVar[tuple[str, ...]] = ("linear", "uniform")
    freezes_backbone: ClassVar[bool] = False  # True: only what the exits added is trained
    writers_only: ClassVar[bool] = False  # True: for models that write, whose exits share the decoder's head
    citation: ClassVar[tuple[str, ...]] = ()  # BibTeX of the papers it comes from, for model cards

    def __post_init__(self) -> None:
        if isinstance(self.weights, str):
            if self.weights not in self.named_weights:
                names = ", ".join(map(repr, self.named_weights))
                raise TrainingError(
                    f"weights is {self.weights!r}; expected {names} or one number per exit.",
                    field="weights",
                    value=self.weights,
                )
            return
        numbers = torch.as_tensor(list(self.weights), dtype=torch.float64)
        if not bool(torch.isfinite(numbers).all()) or bool((numbers < 0).any()) or float(numbers.sum()) <= 0:
            raise TrainingError(
                f"weights is {self.weights!r}; expected finite numbers, none below 0 and not all 0.",
                field="weights",
                value=self.weights,
            )

    @abstractmethod
    def exit_losses(
        self, exit_logits: Tensor, labels: Tensor, problem_type: str, label_losses: LabelLosses = label_losses
    ) -> Tensor:
        """Mean loss of each exit over the rows.

        Args:
            exit_logits: `[B, E, C]`, float32.
            labels: `[B]` or `[B, C]`.
            problem_type: what the labels mean.
            label_losses: what the labels cost at every exit; another one where the Trainer is given a loss of its own.

        Returns:
            `[E]`.
        """

    def exit_weights(self, exit_layers: Sequence[int]) -> Tensor:
        """Weight of each exit, `[E]`, summing to 1."""
        if self.weights == "linear":
            raw = torch.tensor(exit_layers, dtype=torch.float32)
        elif self.weights == "uniform":
            raw = torch.ones(len(exit_layers))
        else:
            raw = torch.tensor([float(weight) for weight in self.weights])
            if len(raw) != len(exit_layers):
                raise TrainingError(
                    f"weights has {len(raw)} numbers for {len(exit_layers)} exits; expected one per exit.", field="weights"
                )
        return raw / raw.sum()

    def taught(self, exit_layers: Sequence[int], progress: Progress) -> list[int] | None:
        """Numbers (0-based, ascending, the last among them) of the exits that learn at a step; `None` for all."""
        return None

    def drop_chances(self, num_layers: int) -> Tensor | None:
        """Chance of each layer to be passed over by a row in training, `[num_layers]`; `None` where none ever is."""
        return None

    def __call__(
        self,
        exit_logits: Tensor,
        labels: Tensor,
        problem_type: str,
        exit_layers: Sequence[int],
        label_losses: LabelLosses = label_losses,
        taught: Sequence[int] | None = None,
    ) -> ObjectiveValue:
        """The weighted sum of the exits' losses, in float32.

        Args:
            exit_logits, labels, problem_type, label_losses: as in `exit_losses`.
            exit_layers: layer (1-based) of every exit, the last being L.
            taught: the exits that `exit_logits` is of, from `taught`; `None` for all.
        """
        losses = self.exit_losses(exit_logits.float(), labels, problem_type, label_losses)
        weights = self.exit_weights(exit_layers)
        if taught is not None:
            weights = weights[list(taught)]
            weights = weights / weights.sum()
        return ObjectiveValue((weights.to(losses.device) * losses).sum(), losses)
