"""What early exit brings on the clock in a decoder of GPT-2's size and vocabulary, whatever its words are worth.

    OMP_NUM_THREADS=1 python benchmarks/captioning_speed.py --report benchmarks/results/captioning-speed.json

Weights are random; tokens leave at layers drawn at random, 1 to 11 alike, so half of the depth on average, but every test
is really made: the cosine of two states (saturation), a gate, the confidence over a shortlist or over all words. Decoding
alone is timed: what one token more costs, after the prompt.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, ViTConfig
from transformers.modeling_outputs import BaseModelOutput

import hf_earlyexit as ee
from hf_earlyexit.families.decoders import TokenContext, cache_name
from hf_earlyexit.generation.decoding import DecoderWalker, ExitRun
from hf_earlyexit.policies import POLICIES, ConfidencePolicy, GatePolicy, SaturationPolicy, register_policy

LAYERS, PATCHES = 12, 197


def scripted(rule: type[ee.policies.ExitPolicy], name: str) -> type[ee.policies.ExitPolicy]:
    """A rule that computes its score and then leaves by lot, at each of layers 1 to 11 with the same chance."""

    @register_policy(name)
    @dataclass(frozen=True, kw_only=True)
    class Scripted(rule):
        def leaves(self, score: Tensor, exit_index: int) -> Tensor:
            left = LAYERS - 1 - exit_index
            return torch.rand(len(score)) < (1 / left if left else 1)

    return Scripted


RULES = {
    "saturation": (scripted(SaturationPolicy, "scripted-saturation"), "vocabulary"),
    "gate": (scripted(GatePolicy, "scripted-gate"), "vocabulary"),
    "confidence, shortlist of 2,000": (scripted(ConfidencePolicy, "scripted-shortlist"), "shortlist"),
    "confidence, all words": (scripted(ConfidencePolicy, "scripted-vocabulary"), "vocabulary"),
}


def make_model(width: int, words: int) -> ee.EarlyExitVisionEncoderDecoder:
    heads = {"hidden_size": width, "num_attention_heads": width // 64}
    encoder = ViTConfig(num_hidden_layers=1, intermediate_size=width, **heads)
    decoder = GPT2Config(
        vocab_size=words, n_embd=width, n_layer=LAYERS, n_head=width // 64, add_cross_attention=True, is_decoder=True,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    config = ee.EarlyExitVisionEncoderDecoderConfig(
        encoder=encoder, decoder=decoder, exit_gate="linear", exit_shortlist=min(2000, words)
    )
    model = ee.EarlyExitVisionEncoderDecoder(config).eval()
    model.generation_config.update(decoder_start_token_id=1, bos_token_id=1, pad_token_id=0, eos_token_id=None)
    return model


def time_tests(model: ee.EarlyExitVisionEncoderDecoder, repeats: int) -> dict[str, float]:
    """What a test of one row costs, as a share of what a layer costs for its token: medians of calls in turn."""
    states = torch.randn(1, PATCHES, model.config.decoder.n_embd)
    encoded, prompt = BaseModelOutput(last_hidden_state=states), torch.ones(1, 8, dtype=torch.long)
    output = model(encoder_outputs=encoded, decoder_input_ids=prompt, use_cache=True)
    cache = output[cache_name(type(output))]
    hidden, before = (torch.randn(1, 1, states.shape[-1]) for _ in range(2))
    context = TokenContext(cache, None, torch.full((1, 1), 8), states)
    layer = model.backbone.layers(model.decoder)[5]
    calls = {"layer": lambda: model.backbone.step(layer, hidden, context)}
    for name in ("saturation", "gate"):
        policy = POLICIES.get(name)(thresholds=[0.5] * (LAYERS - 1))
        walker = DecoderWalker(model, policy, ExitRun(policy))
        calls[name] = partial(_test, walker, policy, policy.init_state(1, 0, "cpu"), hidden, before)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(21 * repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        cache.self_attention_cache.layers[5].crop(-1)
    medians = {name: statistics.median(own[repeats:]) for name, own in times.items()}  # the first warm up
    return {name: medians[name] / medians["layer"] for name in ("saturation", "gate")}


def _test(
    walker: DecoderWalker, policy: ee.policies.ExitPolicy, state: object, hidden: Tensor, before: Tensor
) -> list[bool]:
    return policy.step(state, walker.signal(5, hidden, before), 5)[-1].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--words", type=int, default=50257)
    parser.add_argument("--tokens", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--report", type=Path, default=Path("benchmarks/results/captioning-speed.json"))
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    model = make_model(args.width, args.words)

    def write(states: Tensor, tokens: int, rule: str | None) -> tuple[float, float]:
        """CPU seconds, and the mean layer of the tokens that may leave early."""
        if rule is not None:
            kind, model.config.exit_signal = RULES[rule]
            model.set_exit_policy(kind(thresholds=[0.5] * (LAYERS - 1)))
        encoded = BaseModelOutput(last_hidden_state=states)
        start = time.process_time()
        output = model.generate(
            encoder_outputs=encoded, max_new_tokens=tokens, early_exit=None if rule else False, return_exit_layers=True
        )
        return time.process_time() - start, float(output.exit_layers[:, 2:].float().mean()) if tokens > 1 else LAYERS

    tests = time_tests(model, args.repeats)
    print(json.dumps({"a test's share of a layer": tests}))
    found = {}
    for batch in (1, 8):
        states = torch.randn(batch, PATCHES, args.width)
        rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in ("full", *RULES)}
        for number in range(args.repeats + 1):  # the first warms up
            for name in rounds:
                rule = None if name == "full" else name
                prompt = write(states, 1, rule)[0]
                seconds, layer = write(states, 1 + args.tokens, rule)
                if number:
                    rounds[name].append((seconds - prompt, layer))
        found[f"batch {batch}"] = {
            name: {
                "speed_up": statistics.median(
                    full / own for (full, _), (own, _) in zip(rounds["full"], own_rounds, strict=True)
                ),
                "all": [full / own for (full, _), (own, _) in zip(rounds["full"], own_rounds, strict=True)],
                "mean_layers": statistics.mean(layer for _, layer in own_rounds),
            }
            for name, own_rounds in rounds.items()
        }
        print(
            json.dumps(
                {name: [round(v["speed_up"], 2), round(v["mean_layers"], 2)] for name, v in found[f"batch {batch}"].items()}
            )
        )
    report = {
        "width": args.width, "layers": LAYERS, "words": args.words, "tokens": args.tokens, "repeats": args.repeats,
        "cpu_time": True, "test_over_layer": tests, "decode": found,
    }  # fmt: skip
    args.report.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
