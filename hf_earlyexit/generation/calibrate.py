"""Thresholds of a model that writes: proposed by a token trace, confirmed by generating texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from tqdm.auto import tqdm

from ..calibration.certify import Certified
from ..calibration.generation import FULL, GenerationCalibrationResult, settings_curve
from ..calibration.notes import on_drop
from ..calibration.promise import Promise
from ..calibration.proposals import Proposal, propose
from ..calibration.replay import ExitReport
from ..calibration.search import exits_taken
from ..calibration.slices import check_groups
from ..calibration.targets import LayerBudget, MaxDrop, SpeedUp, Target, parse_target
from ..errors import CalibrationError, UsageError
from ..modeling.certificate import computing_dtype
from ..modeling.fingerprint import model_fingerprint
from ..modeling.protocol import TorchExitWriter, Wrapped
from ..modeling.wrapped import unwrapped
from ..policies.base import POLICIES, ExitPolicy
from ..serving.batching import evaluating
from ..signals import known_signals
from ..values import check_whole
from .certify import Certifying, check_certifies_texts
from .checks import check_generation, generation_settings
from .judge import Judge, TextMetric, listed_references
from .token_exits import ModelThatWrites
from .token_trace import TokenTrace, TracedTokens, Written, token_trace, write

NOT_HERE = {
    "decoder_input_ids": "images come as rows, captions start afresh",
    **dict.fromkeys(("pixel_values", "encoder_outputs", "inputs"), "images come as rows"),
    **dict.fromkeys(("input_ids", "inputs_embeds", "attention_mask"), "prompts come as rows"),
    **dict.fromkeys(("early_exit", "operating_point"), "the full model is compared with the policy that is calibrated"),
    **dict.fromkeys(("lossless", "max_drafts"), "lossless texts are the full model's own; calibrate_drafts is for them"),
    "return_exit_layers": "they are in the result",
}


def calibrate_generation(
    model: Wrapped,
    rows: Any,
    policy: str | ExitPolicy = "confidence",
    target: str | Target = "max-drop:0",
    *,
    tokenizer: Any = None,
    image_processor: Any = None,
    references: Sequence[str | Sequence[str]] | None = None,
    metric: TextMetric | None = None,
    options: dict[str, Any] | None = None,
    proposals: int = 12,
    learning_share: float = 0.2,
    groups: ArrayLike | None = None,
    seed: int = 0,
    split: str = "held-back",
    batch_size: int = 32,
    progress: bool = True,
    **generation: Any,
) -> GenerationCalibrationResult:
    """Choose thresholds so that a target is met by the texts that a model really writes after held-back prompts or images.

    The full model's own texts are traced token by token; the trace proposes thresholds, shared by all exits or one for each.
    Every proposal then writes all texts, since a token that leaves early changes what follows. A text is scored as a whole,
    and compared with the full model's of the same row. `config.exit_decay` is used as it is served. For thresholds of drafts
    in lossless runs, where nothing can be lost, see `calibrate_drafts`.

    With `Certified`, the texts of some rows put the settings in the order of their cost, and those of the others certify
    them one after the other, until one cannot be certified: the promise is about whole texts.

    Args:
        model: a captioner or language model with exits.
        rows: what the exits were not trained on. Of a language model prompts, in any form of `read_prompts`: texts, chats,
            token ids, or rows with one of these. Of a captioner images: a data set or list with `image`, `pixel_values` or
            `encoder_hidden_states`; or pictures; or pixel values `[N, channels, height, width]`. The encoder runs once, and
            its states are kept on the CPU.
        policy: a registered name, or a policy whose own numbers are kept. What a policy learns, such as beem-a's weights, is
            agreement with the full model's word, on other rows than those that choose the thresholds.
        target: `MaxDrop` in the unit of the score, `SpeedUp`, `LayerBudget`, `Certified`, or words such as "max-drop:0.01".
            `Certified` needs a `bound` for a metric of your own.
        tokenizer: reads prompts that are texts, and turns ids into texts; without one, scores compare ids, which needs
            `references=None`.
        image_processor: needed for pictures.
        references: for each row a text or several; by default the full model's own text.
        metric: gets texts and references, gives one score per text, bigger is better; ROUGE-L by default.
        options: fields of the policy or of its `learn`; with a name only.
        proposals: settings to try, at least 2. Each writes all texts once.
        learning_share: share of the rows that a policy learns its own numbers from, in `(0, 1)`; for `Certified`, of those
            that make the path of settings.
        groups: for `Certified(by="group")`, the number or name of each row's slice `[N]`.
        seed: of the split between these and the others.
        split: where the rows come from; "train" is refused.
        batch_size: rows in a batch.
        progress: show a bar.
        generation: for `generate`, such as `max_new_tokens` or `num_beams`; no sampling.

    Returns:
        The policy with thresholds, everything that was tried, and what it gave. Report figures on other rows.

    Raises:
        CalibrationError: for rows tagged "train", a model without early exits, a policy that cannot learn from tokens, a
            target that cannot be met, or too few texts to certify.
        DataError: for no rows, or references that do not fit.
        UnknownNameError, PolicyError, EarlyExitConfigError: for a policy that is unknown or cannot serve the model.
        UsageError: for a model that does not write, sampling, or texts, pictures or references without what they need.
    """
    target = parse_target(target) if isinstance(target, str) else target
    inner: TorchExitWriter = unwrapped(model)
    _check(inner, policy, options, target, split, proposals, batch_size, generation)
    if isinstance(target, Certified):
        check_certifies_texts(target, metric, groups)
    elif groups is not None:
        raise CalibrationError(f"groups go with Certified(by='group'); {target} would not see them.", field="groups")
    inner = evaluating(inner)
    with tqdm(unit="batch", disable=not progress) as bar:
        writer = _Writer(inner, batch_size, generation, bar)
        prompts = inner.read_prompts(rows, tokenizer, image_processor, batch_size)
        known = listed_references(references, len(prompts), tokenizer)
        slices = check_groups(groups, len(prompts))
        certifies = isinstance(target, Certified)
        learners, kept = _split(certifies or _learns(policy), len(prompts), learning_share, seed)
        taught = [prompts[place] for place in learners] if _learns(policy) else []
        rule = _make_policy(policy, options, writer, taught)
        others = None
        if isinstance(target, Certified):
            others = Certifying(target, inner, writer.write, prompts, known, kept, tokenizer, metric, slices)
        kept = learners if certifies else kept
        prompts = [prompts[place] for place in kept]
        full = writer.write(prompts, None)
        trace = token_trace(inner, zip(writer.batches(prompts), full, strict=True), rule)
        judge = Judge(inner, full, tokenizer, known and [known[place] for place in kept], metric)
        deep = float(inner.exit_layers[-1])
        candidates = propose(
            trace.scores.double().numpy(),
            trace.agrees.double().numpy(),
            np.asarray(inner.exit_layers, dtype=float),
            proposals,
            rule.lowest_threshold,
            rule.counts,
        )
        share = len(trace.words) / (len(trace.words) + len(prompts))  # the first token of a text runs in full
        candidates = [one._replace(trace_layers=deep + share * (one.trace_layers - deep)) for one in candidates]
        bar.reset(len(candidates) * len(full))
        tried = [(Proposal(FULL, rule.thresholds, deep), full)]
        tried += [(one, writer.write(prompts, rule.with_thresholds(one.thresholds))) for one in candidates]
        settings, promise = tuple(judge.setting(*one) for one in tried), None
        if others is not None:
            order = [0, *sorted(range(1, len(tried)), key=lambda place: -settings[place].mean_cost)]
            tried, settings = [tried[place] for place in order], tuple(settings[place] for place in order)
            chosen, promise = others.certify([one for one, _ in tried], rule, [judge.scored(texts) for _, texts in tried])
        else:
            chosen = target.pick(settings_curve(settings))
    full_score, best, texts = settings[0].score, settings[chosen], tried[chosen][1]
    if others is not None:
        full_score, best, texts, judge = others.judged(tried[chosen][0], chosen)
    rule = rule.with_thresholds(best.thresholds)
    return GenerationCalibrationResult(
        policy=rule,
        target=str(target),
        quality=best.score,
        full_quality=full_score,
        standard_error=best.standard_error,
        mean_layers=best.mean_layers,
        mean_cost=best.mean_cost,
        layer_speed_up=best.layer_speed_up,
        exits=_reports(rule, trace, judge.exits_of(texts), inner.exit_layers),
        curve=tuple((one.mean_cost, one.score, one.thresholds) for one in sorted(settings, key=lambda one: -one.mean_cost)),
        num_rows=len(prompts) if others is None else len(others.prompts),
        num_learning_rows=len(learners),
        seed=seed,
        split=split,
        dtype=computing_dtype(inner),
        fingerprint=model_fingerprint(inner),
        versions={name: version(name) for name in ("hf_earlyexit", "torch", "transformers")},
        promise=promise,
        notes=(*_notes(rule, inner.config.exit_decay), *on_drop(target, settings[0].score), *_on_path(promise, others)),
        metric=judge.measure,
        settings=settings,
        chosen=chosen,
        exit_decay=inner.config.exit_decay,
        num_tokens=len(trace.words),
        generation={
            name: value if isinstance(value, (bool, int, float, str)) else repr(value) for name, value in generation.items()
        },
    )


class _Writer:
    """Writes after prompts, batch by batch."""

    def __init__(self, model: TorchExitWriter, batch_size: int, options: dict[str, Any], bar: Any) -> None:
        self.model, self.batch_size, self.options, self.bar = model, batch_size, options, bar

    def batches(self, prompts: Sequence[Any]) -> list[Sequence[Any]]:
        return [prompts[start : start + self.batch_size] for start in range(0, len(prompts), self.batch_size)]

    def write(self, prompts: Sequence[Any], policy: ExitPolicy | None) -> list[Written]:
        written = []
        for batch in self.batches(prompts):
            written.append(write(self.model, batch, policy, self.options))
            self.bar.update()
        return written


def _check(
    model: TorchExitWriter,
    policy: str | ExitPolicy,
    options: dict[str, Any] | None,
    target: Target,
    split: str,
    proposals: int,
    batch_size: int,
    generation: dict[str, Any],
) -> None:
    """Refuse what cannot work before anything runs."""
    if not isinstance(model, ModelThatWrites):
        raise UsageError(
            f"{type(model).__name__} does not write; expected a captioner or language model with exits. Classifiers are "
            "calibrated on a trace, by `calibrate`.",
            field="model",
        )
    if not isinstance(target, (MaxDrop, SpeedUp, LayerBudget, Certified)):
        raise CalibrationError(
            f"target is {target!r}; models that write take MaxDrop, SpeedUp, LayerBudget or Certified: their unit of error "
            "is the text, not the exit.",
            field="target",
            value=target,
        )
    if split == "train":
        raise CalibrationError(
            "The rows are tagged 'train': on what the exits were trained on, every exit looks better than it is. Use rows "
            "held back from training.",
            field="split",
            value=split,
        )
    if len(model.exit_layers) == 1:
        raise CalibrationError("The model has no early exit; set exit_layers and train the exits.", field="exit_layers")
    check_whole(2, 1 << 16, error=CalibrationError, proposals=proposals)
    check_whole(1, 1 << 20, batch_size=batch_size)
    if isinstance(policy, ExitPolicy):
        if options:
            raise UsageError("options go with a policy's name; a ready policy keeps its own numbers.", field="options")
        model.config.check_policy(policy)
    else:
        try:
            model.require_signals(known_signals(POLICIES.get(policy).asks))
        except UsageError as error:
            raise CalibrationError(f"The {policy} policy cannot decide: {error}", field="policy", value=policy) from error
    given = next((name for name in NOT_HERE if name in generation), None)
    if given is not None:
        raise UsageError(f"{given} cannot be given here: {NOT_HERE[given]}.", field=given)
    settings = generation_settings(model, generation)
    for name, most in (("do_sample", False), ("num_return_sequences", 1)):
        value = getattr(settings, name)
        if value is not None and value > most:
            raise UsageError(
                f"{name} is {value!r}; texts are compared one by one with the full model's, so expected one text per row "
                "and no chance in it. Calibrate with greedy or beam search.",
                field=name,
                value=value,
            )
    model.check_tokens(settings, generation)
    check_generation(settings, generation, early=True, wants_layers=True)


def _learns(policy: str | ExitPolicy) -> bool:
    return not isinstance(policy, ExitPolicy) and POLICIES.get(policy).learns


def _split(wanted: bool, count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Places of the rows that teach a policy or make the path, if wanted, and of those that choose the thresholds."""
    if not wanted:
        return [], list(range(count))
    learners = round(share * count)
    if not 0 < learners < count:
        raise CalibrationError(
            f"learning_share is {share!r} of {count} rows; expected a share that leaves rows on both sides.",
            field="learning_share",
            value=share,
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[:learners]), sorted(order[learners:])


def _make_policy(
    policy: str | ExitPolicy, options: dict[str, Any] | None, writer: _Writer, learners: Sequence[Any]
) -> ExitPolicy:
    """The policy, every exit closed."""
    model = writer.model
    closed = (None,) * (len(model.exit_layers) - 1)
    if isinstance(policy, ExitPolicy):
        return replace(policy, thresholds=closed, exit_layers=model.exit_layers)
    trace = None
    if learners:
        trace = token_trace(model, zip(writer.batches(learners), writer.write(learners, None), strict=True))
    return POLICIES.get(policy).from_trace(TracedTokens(model, trace), **(options or {}))


def _reports(policy: ExitPolicy, trace: TokenTrace, exits: np.ndarray, layers: tuple[int, ...]) -> tuple[ExitReport, ...]:
    """Shares of the generated tokens; agreement with the full model's word on the trace."""
    agrees = trace.agrees.numpy()
    thresholds = (*policy.thresholds, None)
    vector = np.array([np.nan if value is None else value for value in policy.thresholds], dtype=float)
    taken = exits_taken(trace.scores.numpy(), vector)
    return tuple(
        ExitReport(
            layer=layer,
            threshold=thresholds[index],
            share=float((exits == index).mean()),
            quality=float(agrees[:, index].mean()),
            quality_of_leavers=float(agrees[taken == index, index].mean()) if (taken == index).any() else None,
            last_quality_of_leavers=1.0 if (taken == index).any() else None,
        )
        for index, layer in enumerate(layers)
    )


def _on_path(promise: Promise | None, others: Certifying | None) -> list[str]:
    if promise is None or others is None:
        return []
    notes = [
        f"the table is of the {promise.num_path_rows} texts that put the settings in order; all other figures are of the "
        f"{promise.num_rows} texts that certify"
    ]
    if promise.rows_needed is not None:
        notes.append(f"about {promise.rows_needed:,} certifying texts would allow the next faster setting")
    if copies := others.num_copies:
        notes.append(
            f"{copies} of {promise.num_rows} prompts are copies of others, so texts are not drawn independently: leave "
            "copies out, or the promise is worth less than it says"
        )
    return notes


def _notes(policy: ExitPolicy, decay: float | None) -> list[str]:
    notes = []
    if not policy.may_leave:
        notes.append("no token leaves early: nothing that was tried meets the target on these rows")
    elif decay is not None and not policy.counts:
        notes.append(f"thresholds fall along the text by config.exit_decay={decay:g}, and hold for that value only")
    return notes
