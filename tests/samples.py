"""Traces and signals that several tests share."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_earlyexit.policies import ExitPolicy, ExitSignal, Scan
from hf_earlyexit.problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from hf_earlyexit.trace import ExitTrace


def learned_trace(
    rows: int = 400, exits: int = 4, classes: int = 3, seed: int = 0, problem_type: str = SINGLE_LABEL, **fields
) -> ExitTrace:
    """Exits that know more the deeper they are, and gates that know a little of it."""
    generator = torch.Generator().manual_seed(seed)
    depth = torch.arange(1, exits + 1).view(1, exits, 1)
    noise = 2 * torch.rand(rows, 1, 1, generator=generator) * torch.randn(rows, exits, classes, generator=generator)
    if problem_type == SINGLE_LABEL:
        labels = torch.randint(classes, (rows,), generator=generator)
        logits = torch.eye(classes)[labels][:, None] * depth + noise
    elif problem_type == MULTI_LABEL:
        labels = torch.randint(2, (rows, classes), generator=generator).float()
        logits = (2 * labels - 1)[:, None] * depth + noise
    else:
        labels = torch.randn(rows, classes, generator=generator)
        logits = labels[:, None] + noise / depth
    calm = 2 - noise.abs().amax(-1)
    fields = {
        "exit_layers": tuple(range(1, exits + 1)),
        "scalars": {"gate": calm[:, :-1], "similarity": calm.tanh()},
        **fields,
    }
    return ExitTrace(logits=logits, labels=labels, problem_type=problem_type, **fields)


def options_for(name, problem_type=SINGLE_LABEL, exits=4) -> dict:
    """What a policy must be told to be made from a trace of so many exits."""
    if name == "beem":
        return {"weights": tuple(0.5 + index for index in range(exits))}
    return {"tolerance": 0.2} if name == "patience" and problem_type == REGRESSION else {}


def sst2_trace(data_path, heads: str, part: str = "heldback") -> ExitTrace:
    """Logits of a really trained BGE-small with 12 exits on SST-2; `data_path` is the fixture, which skips."""
    tensors = load_file(data_path("traces", f"sst2_bge-small_{heads}.safetensors"))
    return ExitTrace(
        logits=tensors[f"{part}_logits"], labels=tensors[f"{part}_labels"], exit_layers=tuple(range(1, 13)), split=part
    )


class Exits:
    """Logits `[N, E, C]` as a source of signals."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    @property
    def num_exits(self) -> int:
        return self.logits.shape[1]

    def signal(self, exit_index: int) -> ExitSignal:
        logits = self.logits[:, exit_index]
        any_value = logits.abs().amax(-1) - 1  # any gate and any cosine will do
        return ExitSignal(logits, {"gate": any_value, "similarity": any_value.tanh()})


def two_class_row(confidences, classes) -> Tensor:
    """One row `[1, E, 2]` whose exits give these classes these probabilities."""
    pairs = [(p, 1 - p) if c == 0 else (1 - p, p) for p, c in zip(confidences, classes, strict=True)]
    return torch.tensor(pairs, dtype=torch.float64).log()[None]


def scan(policy: ExitPolicy, logits: Tensor) -> Scan:
    return policy.scan(Exits(logits))


def exits_of(policy: ExitPolicy, logits: Tensor) -> list[int]:
    return policy.decide(scan(policy, logits).scores).tolist()
