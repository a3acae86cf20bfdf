"""Rules of when an exit drafts, compared on what a language model wrote from prompts it was not trained on.

    python benchmarks/lossless_rules.py --model EXITS

EXITS is a folder that `benchmarks/lossless_exits.py` wrote. Gates learn by reward from states of its training texts, once
for each price of a layer: the reward is minus the exit's loss on the full model's word, minus the price of its layers. Every
rule is then traced on the held-back texts, and the setting with the fewest layer calls is found for each by
`calibrate_drafts`: thresholds and figures are of the same texts, so all figures are a little too good. The best gates are
saved beside the exits.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from lossless_exits import Row, states_of
from torch.nn import functional

import hf_earlyexit as ee
from hf_earlyexit.generation.draft_calibration import LAYER_CALLS, calibrate_drafts
from hf_earlyexit.generation.draft_trace import replay_drafts, trace_drafts
from hf_earlyexit.generation.full_texts import texts_of_rows
from hf_earlyexit.losses import ConsistentObjective
from hf_earlyexit.losses.noise import row_keys
from hf_earlyexit.training.gates import GateRecipe, train_gates
from hf_earlyexit.training.hardness import HARDNESS
from hf_earlyexit.training.outcomes import Outcomes
from hf_earlyexit.training.states import TokenStates

RESULT = Path(__file__).parent / "results" / "lossless-rules.json"
PRICES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
DRAFTS = (1, 2, 3, 4)
MOST_LOSS = 12.0  # of a word that is not on the exits' shortlist


@torch.no_grad()
def tokens_of(model: object, rows: list[Row]) -> TokenStates:
    """States, losses and right words of every exit on the tokens that the model wrote; the truth is its own first word."""
    states, words = states_of(model, rows), model.exit_shortlist
    last = model.lm_head(states[-1])
    truth = last.argmax(-1)
    place = torch.full((model.config.vocab_size,), -1)
    place[words] = torch.arange(len(words))
    listed = place[truth] >= 0
    losses, right = [], []
    for index in range(len(model.exit_layers) - 1):
        logits = model.features(index, states[index]) @ model.lm_head.weight[words].T
        loss = functional.cross_entropy(logits, place[truth].clamp_min(0), reduction="none")
        losses.append(torch.where(listed, loss, MOST_LOSS).clamp_max(MOST_LOSS))
        right.append(words[logits.argmax(-1)] == truth)
    losses.append(functional.cross_entropy(last, truth, reduction="none"))
    right.append(torch.ones_like(right[0]))
    outcomes = Outcomes.of_tokens(torch.stack(losses, 1), torch.stack(right, 1), tuple(model.exit_layers))
    return TokenStates(states=model.gate_states(torch.stack(states[:-1], 1)), outcomes=outcomes)


def described(rule: str, found: object, **more: object) -> dict[str, object]:
    best = next(one for one in found.settings if one.policy.may_leave)
    return {"rule": rule, "thresholds": list(best.policy.thresholds), "drafts": best.drafts,
            "layer_calls": best.expected.layer_calls, "drafted": best.expected.drafted,
            "accepted": best.expected.accepted, **more}  # fmt: skip


def fixed_depth(model: object, rows: list[Row]) -> dict[str, object]:
    """Every token leaves at the same exit."""
    layers, best = model.exit_layers, None
    closed = ee.ConfidencePolicy(thresholds=(None,) * (len(layers) - 1), exit_layers=layers)
    trace = trace_drafts(model, texts_of_rows(rows), closed)
    for index in range(len(layers) - 1):
        policy = closed.with_thresholds(tuple(0.0 if one == index else None for one in range(len(layers) - 1)))
        for drafts in DRAFTS:
            made = replay_drafts(trace, policy, drafts, layers, LAYER_CALLS)
            if best is None or made.layer_calls < best["layer_calls"]:
                best = {"rule": "fixed depth", "exit_layer": layers[index], "drafts": drafts,
                        "layer_calls": made.layer_calls, "drafted": made.drafted, "accepted": made.accepted}  # fmt: skip
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--training_texts", type=int, default=648)
    parser.add_argument("--texts", type=int, default=40)
    parser.add_argument("--rules", nargs="*", default=["confidence", "entropy", "patience"])
    parser.add_argument("--report", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    options = {"task": "text-generation", "exit_gate": "linear", "init_missing_exits": True}
    model = ee.from_pretrained(args.model, **options).eval()
    samples = json.loads((args.model / "samples.json").read_text())
    held = samples["held_back"][: args.texts]
    table, begin = [], time.process_time()
    for rule in args.rules:
        table.append(described(rule, calibrate_drafts(model, held, rule, drafts=DRAFTS, costs=LAYER_CALLS, confirm=False)))
        print(table[-1], time.process_time() - begin, flush=True)
    table.append(fixed_depth(model, held))
    print(table[-1], flush=True)
    data = tokens_of(model, samples["training"][-args.training_texts :])
    keys, hardness = row_keys(range(len(data.states))), HARDNESS.get("memorized")(data.outcomes)
    best = None
    for estimator in ("exact", "reinforce"):
        for price in PRICES if estimator == "exact" else [best[0]]:
            torch.manual_seed(0)
            for gate in model.exit_gates.values():
                gate.outer.reset_parameters()
            objective = ConsistentObjective(alpha=price, estimator=estimator, rollouts=4)
            train_gates(model.exit_gates, data, hardness, keys, objective, GateRecipe(epochs=4, learning_rate=1e-3))
            found = calibrate_drafts(model, held, "gate", drafts=DRAFTS, costs=LAYER_CALLS, confirm=False)
            table.append(described(f"gate, {estimator}", found, alpha=price))
            print(table[-1], time.process_time() - begin, flush=True)
            if best is None or table[-1]["layer_calls"] < best[1]:
                best = price, table[-1]["layer_calls"], {k: v.clone() for k, v in model.exit_gates.state_dict().items()}
    model.exit_gates.load_state_dict(best[2])
    model.save_pretrained(args.model)
    right = bounds(model, held)
    result = {
        "layers": model.exit_layers[-1], "exit_layers": list(model.exit_layers), "texts": len(held), "rules": table,
        "gate_tokens": len(data.states), "tokens": right.pop("tokens"), **right, "torch": torch.__version__,
    }  # fmt: skip
    args.report.write_text(json.dumps(result, indent=1) + "\n")


def bounds(model: object, rows: list[Row]) -> dict[str, object]:
    """What a rule that always knew would reach with these exits: drafts at the first right exit and nowhere else."""
    layers = model.exit_layers
    closed = ee.ConfidencePolicy(thresholds=(None,) * (len(layers) - 1), exit_layers=layers)
    trace = trace_drafts(model, texts_of_rows(rows), closed)
    knowing = trace._replace(scores=trace.right.float())
    policy = closed.with_thresholds((0.5,) * (len(layers) - 1))
    calls = min(replay_drafts(knowing, policy, drafts, layers, LAYER_CALLS).layer_calls for drafts in (*DRAFTS, 6, 8))
    return {"tokens": len(trace.right), "agreement": trace.right.float().mean(0).tolist(), "knowing_layer_calls": calls}


if __name__ == "__main__":
    main()
