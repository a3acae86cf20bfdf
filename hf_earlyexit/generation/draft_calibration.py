"""The draft policy that is fastest on this machine: a trace, measured costs, and a real run that confirms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import GenerationMixin

from ..errors import CalibrationError, UsageError
from ..families.decoders import cache_name
from ..modeling.protocol import TorchExitWriter
from ..policies.base import POLICIES, ExitPolicy, ExitStep
from ..serving.batching import evaluating
from ..timing import clock_for, seconds_in_turns
from ..values import check_flags, check_whole, is_whole
from .checks import LOSSLESS, check_lossless, generation_settings
from .decoding import ExitRun
from .draft_trace import DraftCosts, DraftTrace, Replayed, replay_drafts, trace_drafts
from .drafts import Row, Speaker, Waiting
from .full_texts import FullText, texts_of_rows, written_texts
from .lossless import LosslessWalker, decode_lossless, starts_with_a_draft
from .prompts import LABELS
from .token_cache import self_attention_of
from .token_exits import ModelThatWrites

GIVEN = {
    **dict.fromkeys(("inputs", "input_ids", "inputs_embeds", "attention_mask"), "prompts come as rows"),
    **dict.fromkeys(("pixel_values", "encoder_outputs", "decoder_input_ids"), "images come as rows, captions start afresh"),
    **dict.fromkeys(("early_exit", "operating_point"), "the full model writes, and the drafts that are chosen"),
    "lossless": "that is what drafts are chosen for",
    "max_drafts": "drafts= has the numbers to try",
    "return_exit_layers": "what was found says what was drafted",
}
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
    image_processor: Any = None,
    drafts: Sequence[int] = (1, 2, 3, 4, 6, 8),
    levels: int = 12,
    costs: DraftCosts | None = None,
    confirm: bool = True,
    batch_size: int = 8,
    **generation: Any,
) -> DraftCalibration:
    """Choose where a model that writes drafts, how sure it has to be and how many drafts may wait: what is fastest here.

    Nothing can be lost, so there is no target: the output is the full model's whatever is chosen. The full model writes
    after the prompts; a trace tells what each exit would have drafted, costs are measured on this machine for one row, in
    the middle of a text of middling length, and each setting is replayed on the trace. Settings are one exit alone, or all
    with one threshold, at quantiles of scores.

    Args:
        model: a captioner or language model with exits.
        prompts: of the kind that is served, and not those the exits were trained on. Of a language model in any form of
            `read_prompts`: texts, chats, or token ids; or what it has written after them already, run in full and greedily:
            rows of `write_samples`. Of a captioner images, in any form that `calibrate_generation` takes.
        policy: a registered name, or a policy whose own numbers are kept.
        tokenizer: needed for texts and chats.
        image_processor: needed for pictures.
        drafts: numbers of waiting drafts to try.
        levels: thresholds to try for each exit, at least 2.
        costs: of the parts of a pass; by default they are measured here. With `LAYER_CALLS` the fewest calls of layers win,
            which is the same on every machine, loaded or not.
        confirm: time a real run of the chosen setting, one text at a time, against plain decoding.
        batch_size: prompts that are written on together for the trace.
        generation: for `generate`; greedy.

    Raises:
        CalibrationError: for a model without early exits, numbers that cannot be, or sampling.
        DataError: for no prompts or images, or what is none.
        UsageError: for another kind of model, beams, or texts or pictures without what reads them.
    """
    check_flags(confirm=confirm)
    if not isinstance(model, ModelThatWrites):
        raise UsageError(
            f"{type(model).__name__} does not write; expected a captioner or language model with exits.", field="model"
        )
    if len(model.exit_layers) == 1:
        raise CalibrationError("The model has no early exit; set exit_layers and train the exits.", field="exit_layers")
    if not is_whole(levels, 2, 1000) or not drafts or not all(is_whole(one, 1, 1 << 16) for one in drafts):
        raise CalibrationError(
            f"levels is {levels!r} and drafts {drafts!r}; expected whole numbers, levels from 2 and drafts from 1.",
            field="drafts",
        )
    check_whole(1, 1 << 20, batch_size=batch_size)
    if (given := next((name for name in GIVEN if name in generation), None)) is not None:
        raise UsageError(f"{given} cannot be given here: {GIVEN[given]}.", field=given)
    if generation.get("do_sample"):
        raise CalibrationError("Drafts are compared with what the full model writes greedily; leave sampling out.")
    generation["do_sample"] = False
    model = evaluating(model)
    closed = (None,) * (len(model.exit_layers) - 1)
    if isinstance(policy, ExitPolicy):
        rule = replace(policy, thresholds=closed, exit_layers=model.exit_layers)
    else:
        rule = POLICIES.get(policy)(thresholds=closed, exit_layers=model.exit_layers)
    model.config.check_policy(rule)
    settings = generation_settings(model, generation)
    check_lossless(rule, settings, 1)
    read = model.read_prompts(prompts, tokenizer, image_processor, batch_size)
    if not model.crosses and isinstance(prompts[0], Mapping) and LABELS in prompts[0]:
        texts = texts_of_rows([prompts[place] for place in range(len(read))])
    else:
        texts = written_texts(model, read, batch_size, generation)
    ends = torch.as_tensor([] if settings.eos_token_id is None else settings.eos_token_id).flatten().tolist()
    # before the trace, which leaves transformers' hooks for hidden states on the layers: plain decoding is slower with them
    costs = measure_costs(model, rule, texts) if costs is None else costs
    trace = trace_drafts(model, texts, rule, ends)
    tried = replayed_settings(trace, rule, drafts, levels, costs)
    best = tried[0]
    measured = _measured(model, best, read, generation) if confirm else None
    return DraftCalibration(
        policy=best.policy,
        drafts=best.drafts,
        expected=best.expected,
        settings=tried,
        costs=costs,
        num_texts=len(trace.lengths),
        num_tokens=len(trace.scores),
        measured_speed_up=measured,
    )


def replayed_settings(
    trace: DraftTrace, rule: ExitPolicy, drafts: Sequence[int], levels: int, costs: DraftCosts
) -> tuple[DraftSetting, ...]:
    """Every setting of a rule that is worth a try, on one trace, the cheapest first; drafting nothing is among them.

    Args:
        trace: of the rule's own scores.
        rule: with `exit_layers` and without thresholds.
        drafts, levels: as in `calibrate_drafts`.
        costs: that settings are judged by.
    """
    layers, settings = rule.exit_layers or (), []
    for thresholds in (rule.thresholds, *_proposals(trace.scores, rule, levels)):
        for most in drafts if any(one is not None for one in thresholds) else drafts[:1]:
            made = rule.with_thresholds(thresholds)
            settings.append(DraftSetting(policy=made, drafts=most, expected=replay_drafts(trace, made, most, layers, costs)))
    settings.sort(key=lambda one: one.expected.cost)
    return tuple(settings)


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
def measure_costs(model: TorchExitWriter, policy: ExitPolicy, texts: Sequence[FullText]) -> DraftCosts:
    """Seconds that parts of a run take for one row: medians of several rounds, in which all parts take turns.

    Half of what was written of the text of middling length is there already. On a CPU with one thread it is the processor's
    time that counts, which other work on the machine hardly changes.

    Args:
        model: a captioner or language model with exits.
        policy: whose step is timed.
        texts: at least one.
    """
    text = sorted(texts, key=lambda one: len(one.ids))[len(texts) // 2]
    context = max((text.start + len(text.ids)) // 2, 1)
    ids, inputs = torch.tensor([text.ids[:context]], device=model.device), model.prompt_inputs([text.prompt])
    encoder = inputs["encoder_outputs"][0] if model.crosses else None
    given = {"encoder_outputs": inputs["encoder_outputs"]} if model.crosses else {}
    ids_name = "decoder_input_ids" if model.crosses else "input_ids"
    output = model(**given, **{ids_name: ids}, token_exits=ExitRun(None), use_cache=True)
    cache = output[cache_name(type(output))]  # type: ignore[arg-type]
    open_policy = policy.with_thresholds(policy.lowest_threshold)
    speaker = Speaker(1, (), (), samples=False)
    walker = LosslessWalker(model, ExitRun(open_policy), speaker, 1, cache, None, encoder, None)
    width = model.config.word_config.hidden_size
    states = torch.randn(max(WIDTHS), width, device=model.device, dtype=model.dtype)
    layers, last = walker.exit_layers[-1], len(walker.exit_layers) - 1
    row, held = Row(0, ids[0], context + 1, 0, 0), [(layer, dict(vars(layer))) for layer in self_attention_of(cache).layers]
    row.text = torch.cat([ids[0], ids[0, -1:]])

    def begin() -> None:
        row.waits = []
        walker._embed([row])
        walker._context([row], [0], [context], row.waits[-1].states[None])

    def run_layers(width: int) -> None:
        row.waits = [Waiting(0, context, states[:width])]
        seen: dict[Any, Any] = {}
        for layer in range(1, layers + 1):
            walker._run(layer, [row], seen)
        row.waits[-1].states.sum().item()  # waits for the device

    def ask() -> ExitStep:
        state = open_policy.init_state(1, walker.num_words, model.device)
        signal = walker.exit_signal(0, states[:1, None], None, open_policy.asks_at(0), states[:1, None])
        outcome = open_policy.step(state, signal, 0)
        outcome.leave.tolist()
        return outcome

    def draft() -> None:
        walker.draft_logits(0, states[:1], answer)[0].argmax(-1).tolist()

    def say(width: int) -> None:
        model.exit_logits(last, states[:width]).argmax(-1).tolist()

    def plain() -> None:
        newest = {ids_name: ids[:, -1:], cache_name(type(output)): cache}  # type: ignore[arg-type]
        model(**given, **newest, token_exits=ExitRun(None), use_cache=True).logits[:, -1].argmax(-1).tolist()
        for layer, values in held:  # without what was written
            vars(layer).update(values)

    def write_one() -> None:
        options = {"do_sample": False, "num_beams": 1, "max_length": text.start + 1, "max_new_tokens": None}
        GenerationMixin.generate(model, **inputs, **options, token_exits=ExitRun(None))

    narrow, wide = WIDTHS
    answer = ask().answer
    parts = (partial(run_layers, narrow), partial(run_layers, wide), ask, partial(say, narrow), partial(say, wide))
    seconds = _seconds((*parts, begin, draft, plain, write_one), model.device)
    one, several, asked, word, words, token, drafted, whole, written = seconds
    return DraftCosts(
        layer=one / layers,
        more=max(several - one, 0) / layers / (wide - narrow),
        ask=asked,
        words=word,
        more_words=max(words - word, 0) / (wide - narrow),
        token=token,
        draft=drafted,
        plain=whole,
        prompt=max(written - whole * starts_with_a_draft(model, text.start), 0),
    )


def _seconds(parts: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
    """The median time of each part, all in turns; the first round warms up."""
    clock = clock_for(device)
    seconds = seconds_in_turns({index: [part] for index, part in enumerate(parts)}, ROUNDS, clock=clock)
    return [float(times.quantile(0.5)) for times in seconds.values()]


def _measured(model: TorchExitWriter, best: DraftSetting, prompts: Sequence[Any], generation: dict[str, Any]) -> float:
    """Plain time over drafted time, one text at a time, the two in turns."""
    loop = partial(decode_lossless, draft_run=ExitRun(best.policy), most_drafts=best.drafts)
    drafted = partial(GenerationMixin.generate, model, custom_generate=loop, **generation)
    plain = partial(GenerationMixin.generate, model, token_exits=ExitRun(None), **generation)
    inputs = [model.prompt_inputs([prompt]) for prompt in prompts]
    runs = {name: [partial(way, **one) for one in inputs] for name, way in (("drafted", drafted), ("plain", plain))}
    seconds = seconds_in_turns(runs, 1, warm_up=0)
    return float(seconds["plain"].sum() / seconds["drafted"].sum())
