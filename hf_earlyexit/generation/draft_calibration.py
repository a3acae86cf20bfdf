"""The draft policy that is fastest on this machine: a trace, measured costs, and a real run that confirms."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import GenerationMixin

from ..errors import CalibrationError, UsageError
from ..families.decoders import cache_name
from ..modeling.protocol import TorchExitWriter
from ..policies.base import POLICIES, ExitPolicy
from ..serving.batching import evaluating
from ..timing import seconds_in_turns
from ..values import check_flags, is_whole
from .checks import LOSSLESS
from .decoding import ExitRun
from .draft_trace import DraftCosts, Replayed, replay_drafts, trace_drafts
from .drafts import Row, Speaker, Waiting
from .language_model import EarlyExitLanguageModel
from .lossless import LosslessWalker, decode_lossless
from .prompts import LABELS, read_prompts
from .samples import write_samples

WIDTHS, ROUNDS = (1, 4), 15
LAYER_CALLS = DraftCosts(layer=1, more=0, ask=0, words=0, more_words=0)  # what counts calls of layers and nothing else


@dataclass(frozen=True, kw_only=True)
class DraftSetting:
    """A policy, how many drafts may wait, and what the trace lets expect of them."""

    policy: ExitPolicy
    drafts: int
    expected: Replayed


@dataclass(frozen=True, kw_only=True)
class DraftCalibration:
    """What `calibrate_drafts` found.

    Attributes:
        policy, drafts: of the fastest setting; with every exit closed where nothing is faster than plain decoding.
        expected: of it.
        settings: everything that was tried, the fastest first.
        costs: measured on this machine, in seconds, or those that were given.
        num_texts, num_tokens: of the trace.
        measured_speed_up: plain decoding's time over that of a real run with the chosen setting; `None` if not run.
    """

    policy: ExitPolicy
    drafts: int
    expected: Replayed
    settings: tuple[DraftSetting, ...]
    costs: DraftCosts
    num_texts: int
    num_tokens: int
    measured_speed_up: float | None = None

    def serve(self, model: TorchExitWriter, operating_point: str = LOSSLESS) -> None:
        """Draft with the chosen setting from now on, in lossless runs.

        What decides other runs is left as it is, as drafts that nobody checks lose quality.

        Args:
            model: that was calibrated.
            operating_point: name to keep the setting under; by default the one that lossless runs use by themselves.
        """
        model.set_operating_points({operating_point: self.policy}, keep_others=True)
        model.config.exit_drafts = self.drafts

    def __str__(self) -> str:
        best, measured = self.expected, self.measured_speed_up
        lines = [
            f"{self.policy.name} with thresholds {list(self.policy.thresholds)}, {self.drafts} drafts may wait",
            f"expected from {self.num_tokens} tokens of {self.num_texts} texts: {best.speed_up:.2f}x in time, "
            f"{best.layer_calls:.2f} layer calls a token, {best.drafted:.2f} drafts a token, {best.accepted:.0%} right",
        ]
        return "\n".join(lines + ([] if measured is None else [f"measured: {measured:.2f}x in time"]))


def calibrate_drafts(
    model: TorchExitWriter,
    prompts: Any,
    policy: str | ExitPolicy = "confidence",
    *,
    tokenizer: Any = None,
    drafts: Sequence[int] = (1, 2, 3, 4, 6, 8),
    levels: int = 12,
    costs: DraftCosts | None = None,
    confirm: bool = True,
    batch_size: int = 8,
    **generation: Any,
) -> DraftCalibration:
    """Choose where a language model drafts, how sure it has to be and how many drafts may wait: what is fastest here.

    Nothing can be lost, so there is no target: the output is the full model's whatever is chosen. The full model writes on
    from the prompts; a trace tells what each exit would have drafted, costs are measured on this machine for one row, and
    each setting is replayed on the trace. Settings are one exit alone, or all with one threshold, at quantiles of scores.

    Args:
        model: a language model with exits.
        prompts: in any form of `read_prompts`: texts, chats, or token ids; of the kind that is served, and not those the
            exits were trained on. Or what the full model has written after them already, greedily: rows of `write_samples`.
        policy: a registered name, or a policy whose own numbers are kept.
        tokenizer: needed for texts and chats.
        drafts: numbers of waiting drafts to try.
        levels: thresholds to try for each exit, at least 2.
        costs: of the parts of a pass; by default they are measured here. With `LAYER_CALLS` the fewest calls of layers win,
            which is the same on every machine, loaded or not.
        confirm: time a real run of the chosen setting, one text at a time, against plain decoding.
        batch_size: prompts that are written on together for the trace.
        generation: for `generate`; greedy.

    Raises:
        CalibrationError: for a model without early exits, numbers that cannot be, or sampling.
        DataError: for no prompts, or what is none.
        UsageError: for another kind of model, or texts without a tokenizer.
    """
    check_flags(confirm=confirm)
    if not isinstance(model, EarlyExitLanguageModel):
        raise UsageError(f"{type(model).__name__} is no language model with exits.", field="model")
    if len(model.exit_layers) == 1:
        raise CalibrationError("The model has no early exit; set exit_layers and train the exits.", field="exit_layers")
    if not is_whole(levels, 2, 1000) or not drafts or not all(is_whole(one, 1, 1 << 16) for one in drafts):
        raise CalibrationError(
            f"levels is {levels!r} and drafts {drafts!r}; expected whole numbers, levels from 2 and drafts from 1.",
            field="drafts",
        )
    if generation.get("do_sample") or generation.get("num_beams", 1) > 1:
        raise CalibrationError("Drafts are compared with what the full model writes greedily; leave sampling and beams out.")
    generation["do_sample"] = False
    model = evaluating(model)
    closed = (None,) * (len(model.exit_layers) - 1)
    if isinstance(policy, ExitPolicy):
        rule = replace(policy, thresholds=closed, exit_layers=model.exit_layers)
    else:
        rule = POLICIES.get(policy)(thresholds=closed, exit_layers=model.exit_layers)
    model.config.check_policy(rule)
    read = read_prompts(prompts, tokenizer, model.config.word_config.vocab_size)
    if isinstance(prompts[0], Mapping) and LABELS in prompts[0]:
        rows = [prompts[place] for place in range(len(read))]
    else:
        rows = write_samples(model, read, batch_size, **generation)
    trace = trace_drafts(model, rows, rule)
    costs = measure_costs(model, rule) if costs is None else costs
    layers, settings = model.exit_layers, []
    for thresholds in (closed, *_proposals(trace.scores, rule, levels)):
        for most in drafts if any(one is not None for one in thresholds) else drafts[:1]:
            made = rule.with_thresholds(thresholds)
            settings.append(DraftSetting(policy=made, drafts=most, expected=replay_drafts(trace, made, most, layers, costs)))
    settings.sort(key=lambda one: one.expected.cost)
    best = settings[0]
    measured = _measured(model, best, read, generation) if confirm else None
    return DraftCalibration(
        policy=best.policy,
        drafts=best.drafts,
        expected=best.expected,
        settings=tuple(settings),
        costs=costs,
        num_texts=len(trace.lengths),
        num_tokens=len(trace.scores),
        measured_speed_up=measured,
    )


def _proposals(scores: Any, rule: ExitPolicy, levels: int) -> list[tuple[float | None, ...]]:
    """Thresholds at quantiles of the scores: one exit alone, and all exits alike."""
    count, proposals = scores.shape[1], []
    shares = torch.linspace(0, 0.95, levels)
    for index in range(count):
        if index in rule.muted:
            continue
        for level in _levels(scores[:, index], shares, rule):
            proposals.append(tuple(level if one == index else None for one in range(count)))
    if count > 1:
        rows = scores[scores.isfinite()]
        for level in _levels(rows, shares, rule):
            proposals.append(tuple(None if one in rule.muted else level for one in range(count)))
    return proposals


def _levels(scores: Any, shares: Any, rule: ExitPolicy) -> list[float]:
    values = scores.quantile(shares).clamp(rule.lowest_threshold, rule.highest_threshold)
    return sorted({float(value) for value in (values.round() if rule.counts else values)})


@torch.inference_mode()
def measure_costs(model: TorchExitWriter, policy: ExitPolicy, context: int = 48) -> DraftCosts:
    """Seconds that parts of a pass take for one row: medians of several rounds, in which all parts take turns.

    On a CPU with one thread it is the processor's time that counts, which other work on the machine hardly changes.

    Args:
        model: a language model with exits.
        policy: whose step is timed.
        context: tokens that are there already.
    """
    ids = torch.ones(1, context, dtype=torch.long, device=model.device)
    output = model(ids, token_exits=ExitRun(None), use_cache=True)
    cache = output[cache_name(type(output))]  # type: ignore[arg-type]
    open_policy = policy.with_thresholds(policy.lowest_threshold)
    walker = LosslessWalker(model, ExitRun(open_policy), Speaker(1, (), (), samples=False), 1, cache, None, None, None)
    states = torch.randn(max(WIDTHS), model.config.hidden_size, device=model.device, dtype=model.dtype)
    layers, last = walker.exit_layers[-1], len(walker.exit_layers) - 1

    def run_layers(width: int) -> None:
        row, contexts = Row(0, ids[0], context, 0, 0), {}  # type: ignore[var-annotated]
        row.waits = [Waiting(0, context, states[:width])]
        for layer in range(1, layers + 1):
            walker._run(layer, [row], contexts)
        row.waits[-1].states.sum().item()  # waits for the device

    def ask() -> None:
        state = open_policy.init_state(1, walker.num_words, model.device)
        signal = walker.exit_signal(0, states[:1, None], None, open_policy.asks_at(0), states[:1, None])
        open_policy.step(state, signal, 0).leave.tolist()

    def say(width: int) -> None:
        model.exit_logits(last, states[:width]).argmax(-1).tolist()

    narrow, wide = WIDTHS
    parts = (partial(run_layers, narrow), partial(run_layers, wide), ask, partial(say, narrow), partial(say, wide))
    one, several, asked, word, words = _seconds(parts, model.device)
    more = max(several - one, 0) / layers / (wide - narrow)
    return DraftCosts(one / layers, more, asked, word, max(words - word, 0) / (wide - narrow))


def _seconds(parts: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
    """The median time of each part, all in turns; the first round warms up."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    seconds = seconds_in_turns({index: [part] for index, part in enumerate(parts)}, ROUNDS, clock=clock)
    return [float(times.quantile(0.5)) for times in seconds.values()]


def _measured(
    model: TorchExitWriter, best: DraftSetting, prompts: Sequence[Sequence[int]], generation: dict[str, Any]
) -> float:
    """Plain time over drafted time, one text at a time, the two in turns."""
    loop = partial(decode_lossless, draft_run=ExitRun(best.policy), most_drafts=best.drafts)
    drafted = partial(GenerationMixin.generate, model, custom_generate=loop, **generation)
    plain = partial(GenerationMixin.generate, model, token_exits=ExitRun(None), **generation)
    texts = [torch.as_tensor([list(prompt)], device=model.device) for prompt in prompts]
    runs = {name: [partial(way, ids) for ids in texts] for name, way in (("drafted", drafted), ("plain", plain))}
    seconds = seconds_in_turns(runs, 1, warm_up=0)
    return float(seconds["plain"].sum() / seconds["drafted"].sum())
