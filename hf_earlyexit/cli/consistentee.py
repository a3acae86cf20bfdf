"""Train exits and gates by reward (ConsistentEE): all exits, hardness, gates, and the exits where rows leave.

A run that was stopped goes on with `--resume_from_checkpoint true`.

    hf-earlyexit consistentee --model bert-base-uncased --dataset reviews --output_dir bert-with-gates --alpha 0.05
    hf-earlyexit consistentee --model llama --dataset texts.txt --objective two-stage --output_dir llama-with-gates

Of a language model each token counts for itself, and there is no trace.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .command_result import CommandResult
from .train import TrainArguments, checkpoint, prepare, save_held_back, settings

if TYPE_CHECKING:
    from ..training import ConsistentTrainingArguments

MORE = """Every setting of hf_earlyexit.training.ConsistentTrainingArguments is a flag as well, and so is every one of
transformers' TrainingArguments: --output_dir, --alpha, --estimator, --hardness, --id_column, --gate_epochs, --chosen_epochs,
--rounds, --num_train_epochs, --learning_rate, ...; --help_all lists them all."""


@dataclass
class GateArguments:
    """What the gates look like."""

    exit_gate: str = field(default="mlp", metadata={"help": "linear, mlp or mlp+logits, which sees the exit's answer too"})


ARGUMENTS = (TrainArguments, GateArguments)


def more_arguments() -> tuple[type, ...]:
    """What training takes beside these."""
    from .training_settings import ConsistentSettings

    return (ConsistentSettings,)


def run(args: TrainArguments, gates: GateArguments, training: ConsistentTrainingArguments) -> CommandResult:
    """Train in phases, save, trace."""
    from ..training import ConsistentTrainer

    model, parts, train, held = prepare(
        args,
        training.seed,
        training.id_column,
        training.make_objective().writers_only,
        exit_gate=gates.exit_gate,
        init_missing_exits=training.exits_trained,
    )
    (processing,) = parts.values()
    with settings():
        trainer = ConsistentTrainer(model, training, train, held, processing_class=processing)
    log = trainer.train(resume_from_checkpoint=checkpoint(training.resume_from_checkpoint) is True)
    trainer.save_model()
    trace = save_held_back(model, held, parts, training.output_dir)
    lines, phases = [], []
    for phase in trainer.phases:
        log_entry = [entry for entry in log if entry["phase"] == phase.folder][-1]
        last = log_entry[f"exit_{model.exit_layers[-1]}_quality"]
        gates, layers = log_entry["gate_quality"], log_entry["gate_layers"]
        phases.append(log_entry)
        lines.append(f"{phase.folder:12s} last exit {last:.4f}   gates {gates:.4f} at {layers:.2f} layers")
    rows = " --dataset prompts.txt" if trace is None else ""
    lines.append(
        f"saved {training.output_dir}; next: hf-earlyexit calibrate --model {training.output_dir} --policy gate{rows}"
    )
    return CommandResult({"model": training.output_dir, "held_back": trace, "phases": phases}, "\n".join(lines))
