"""Settings of a run in which exits are learned by reward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import TrainingError
from ..losses import ESTIMATORS, ConsistentObjective
from ..losses.consistentee import ACTIONS
from ..values import check_choice
from .arguments import EarlyExitTrainingArguments
from .gates import EpsilonSchedule, GateRecipe
from .hardness import HARDNESS
from .settings import refused

CHOSEN_PHASES = ("alternate", "joint")
NO_PLACE = {  # arguments of `TrainingArguments` that a run of phases has no place for
    "label_smoothing_factor": "the chosen exits and the gates learn from the loss of the true label",
    "push_to_hub": "every phase would push its own folder; push the model when the run is over",
}


@dataclass
class ConsistentTrainingArguments(EarlyExitTrainingArguments):
    """`EarlyExitTrainingArguments` for the phase of all exits, and what the later phases do.

    Args:
        alpha, estimator, rollouts, action: see `ConsistentObjective`.
        epsilon_start, epsilon_end, epsilon_decay: see `EpsilonSchedule`; its steps are those of one phase.
        hardness: "memorized" (the paper's), "oracle", "loss" or "none".
        id_column: column of the data with each row's own id, a whole number or a text.
        exits_trained: the model's exits have learned already; the phase of all exits is left out.
        gate_epochs, gate_batch_size, gate_learning_rate: see `GateRecipe`.
        max_gate_rows: the gates learn from at most so many rows, whose states are kept in memory.
        chosen_phase: "alternate" holds the gates still while the network learns where rows leave; "joint" trains everything
            by one loss, as the released code does.
        chosen_epochs, chosen_learning_rate: of that phase; 0 epochs leave it out.
        rounds: how often gates and chosen exits take their turn.

    Raises:
        TrainingError, UnknownNameError: for settings that cannot work.

    Paper: ConsistentEE (https://arxiv.org/abs/2312.11882). The released scripts use 5 epochs at 1e-5 for all exits, 2 at
    3e-4 for the gates, 2 at 3e-5 for everything; alpha cannot be told from them. 0.02 to 0.06 are good first values.
    """

    alpha: float = field(default=0.05, metadata={"help": "price of a layer for the easiest rows, in units of the loss"})
    estimator: str = field(default="reinforce", metadata={"help": ESTIMATORS.listed()})
    rollouts: int = field(default=8, metadata={"help": "ways drawn for every row"})
    action: str = field(default="sample", metadata={"help": " or ".join(ACTIONS)})
    epsilon_start: float = field(default=0.0, metadata={"help": "chance of a coin's action at the first step"})
    epsilon_end: float = field(default=0.0, metadata={"help": "and in the end"})
    epsilon_decay: float = field(default=1000.0, metadata={"help": "steps in which the difference falls to a third"})
    hardness: str = field(default="memorized", metadata={"help": HARDNESS.listed()})
    id_column: str = field(default="idx", metadata={"help": "column with each row's own id"})
    exits_trained: bool = field(default=False, metadata={"help": "leave out the phase of all exits"})
    gate_epochs: int = field(default=2, metadata={"help": "passes over the cached states"})
    gate_batch_size: int = field(default=32, metadata={"help": "rows a step of the gates"})
    gate_learning_rate: float = field(default=3e-4, metadata={"help": "of the gates"})
    max_gate_rows: int = field(default=20_000, metadata={"help": "most rows the gates learn from"})
    chosen_phase: str = field(default="alternate", metadata={"help": " or ".join(CHOSEN_PHASES)})
    chosen_epochs: float = field(default=1.0, metadata={"help": "of the phase that trains the exits where rows leave"})
    chosen_learning_rate: float = field(default=2e-5, metadata={"help": "of that phase"})
    rounds: int = field(default=1, metadata={"help": "turns of gates and chosen exits"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.make_consistent_objective()
        self.make_epsilon()
        self.make_gate_recipe(0)
        HARDNESS.get(self.hardness)
        check_choice(CHOSEN_PHASES, error=TrainingError, chosen_phase=self.chosen_phase)
        for name, why in NO_PLACE.items():
            if getattr(self, name):
                raise refused(name, getattr(self, name), why)
        for name, lowest in (("rounds", 1), ("max_gate_rows", 1), ("chosen_epochs", 0), ("chosen_learning_rate", 0)):
            value = getattr(self, name)
            if not lowest <= value < float("inf"):
                raise TrainingError(
                    f"{name} is {value!r}; expected a finite number of at least {lowest}.", field=name, value=value
                )

    def make_consistent_objective(self) -> ConsistentObjective:
        """What the gates learn."""
        return ConsistentObjective(alpha=self.alpha, estimator=self.estimator, rollouts=self.rollouts, action=self.action)

    def make_epsilon(self) -> EpsilonSchedule:
        """Chance of a coin's action over the steps of a phase."""
        return EpsilonSchedule(start=self.epsilon_start, end=self.epsilon_end, decay=self.epsilon_decay)

    def make_gate_recipe(self, seed: int) -> GateRecipe:
        """How the gates are taught on cached states."""
        return GateRecipe(
            epochs=self.gate_epochs, batch_size=self.gate_batch_size, learning_rate=self.gate_learning_rate, seed=seed
        )

    def consistent_settings(self) -> dict[str, Any]:
        """What must be the same when a run is taken up again."""
        names = set(ConsistentTrainingArguments.__annotations__) | {"seed", "objective", "objective_options"}
        names |= {"num_train_epochs", "max_steps", "learning_rate", "per_device_train_batch_size"}
        return {name: getattr(self, name) for name in sorted(names)}
