"""Train exits and gates by reward (ConsistentEE): all exits, hardness, gates, and the exits where rows leave.

A run that was stopped goes on with `--resume_from_checkpoint true`.

    hf-earlyexit consistentee --model bert-base-uncased --dataset reviews --output_dir bert-with-gates --alpha 0.05
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..modeling.gates import GATES
from ..serving.collect import collect_trace
from ..training import ConsistentTrainer, ConsistentTrainingArguments
from .answer import Answer
from .train import TRACE_FILE, TrainArguments, prepare


@dataclass
class GateArguments:
    """What the gates look like."""

    exit_gate: str = field(default="mlp", metadata={"help": f"{GATES.listed()}; mlp+logits sees the exit's answer too"})


ARGUMENTS = (TrainArguments, GateArguments, ConsistentTrainingArguments)


def run(args: TrainArguments, gates: GateArguments, training: ConsistentTrainingArguments) -> Answer:
    """Train in phases, save, trace."""
    model, tokenizer, train, held = prepare(
        args, training.seed, training.id_column, exit_gate=gates.exit_gate, init_missing_exits=training.exits_trained
    )
    trainer = ConsistentTrainer(model, training, train, held, processing_class=tokenizer)
    log = trainer.train(resume_from_checkpoint=str(training.resume_from_checkpoint).lower() == "true")
    trainer.save_model()
    trace = Path(training.output_dir) / TRACE_FILE
    collect_trace(model, held, tokenizer=tokenizer).save(trace)
    lines, phases = [], []
    for phase in trainer.phases:
        told = [entry for entry in log if entry["phase"] == phase.folder][-1]
        last = told[f"exit_{model.exit_layers[-1]}_quality"]
        phases.append(told)
        lines.append(
            f"{phase.folder:12s} last exit {last:.4f}   gates {told['gate_quality']:.4f} at {told['gate_layers']:.2f} layers"
        )
    lines.append(f"saved {training.output_dir}; next: hf-earlyexit calibrate --model {training.output_dir} --policy gate")
    return Answer({"model": training.output_dir, "held_back": str(trace), "phases": phases}, "\n".join(lines))
