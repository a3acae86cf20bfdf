"""Thresholds of a captioner: proposed by a token trace, confirmed by generating captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..calibration.notes import on_drop
from ..calibration.proposals import Proposal, propose
from ..calibration.replay import ExitReport
from ..calibration.search import exits_taken
from ..calibration.targets import LayerBudget, MaxDrop, SpeedUp, Target, parse_target
from ..errors import CalibrationError, UsageError
from ..generation.checks import check_generation, generation_settings
from ..modeling.fingerprint import model_fingerprint
from ..policies.base import POLICIES, ExitPolicy
from ..serving.batching import evaluating
from ..signals import known_signals
from .checks import check_caption_tokens
from .judge import CaptionMetric, Judge, listed_references
from .result import FULL, CaptionCalibrationResult, curve_of
from .token_trace import Captions, TokenLessons, TokenTrace, encoded_images, token_trace, write_captions


def calibrate_captions(
    model: Any,
    rows: Any,
    policy: str | ExitPolicy = "confidence",
    target: str | Target = "max-drop:0",
    *,
    image_processor: Any = None,
    tokenizer: Any = None,
    references: Sequence[str | Sequence[str]] | None = None,
    metric: CaptionMetric | None = None,
    options: dict[str, Any] | None = None,
    proposals: int = 12,
    learning_share: float = 0.2,
    seed: int = 0,
    split: str = "held-back",
    batch_size: int = 32,
    progress: bool = True,
    **generation: Any,
) -> CaptionCalibrationResult:
    """Choose a captioner's thresholds so that a target is met by the captions it really writes of held-back images.

    The full model's own captions are traced token by token; the trace proposes thresholds, shared by all exits or one for
    each. Every proposal then writes all captions, since a token that leaves early changes what follows. A caption is scored
    as a whole, and compared with the full model's of the same image. `config.exit_decay` is used as it is served.

    Args:
        model: a captioner with exits.
        rows: images the exits were not trained on: a data set or list with `image`, `pixel_values` or
            `encoder_hidden_states`; or pictures; or pixel values `[N, channels, height, width]`. The encoder runs once, and
            its states are kept on the CPU.
        policy: a registered name, or a policy whose own numbers are kept. What a policy learns, such as beem-a's weights, is
            agreement with the full model's word, on other images than those that choose the thresholds.
        target: `MaxDrop` in the unit of the score, `SpeedUp`, `LayerBudget`, or words such as "max-drop:0.01".
        image_processor: needed for pictures.
        tokenizer: turns ids into captions; without one, scores compare ids, which needs `references=None`.
        references: for each image a caption or several; by default the full model's own caption.
        metric: gets captions and references, gives one score per caption, bigger is better; ROUGE-L by default.
        options: fields of the policy or of its `learn`; with a name only.
        proposals: settings to try, at least 2. Each writes all captions once.
        learning_share: share of the images that a policy learns its own numbers from, in `(0, 1)`.
        seed: of the split between these and the others.
        split: where the images come from; "train" is refused.
        batch_size: images in a batch.
        progress: show a bar.
        generation: for `generate`, such as `max_new_tokens` or `num_beams`; no sampling.

    Returns:
        The policy with thresholds, everything that was tried, and what it gave. Report figures on other images.

    Raises:
        CalibrationError: for images tagged "train", a model without early exits, a policy that cannot learn from tokens, or
            a target that cannot be met.
        DataError: for no images, or references that do not fit.
        UnknownNameError, PolicyError, EarlyExitConfigError: for a policy that is unknown or cannot serve the model.
        UsageError: for sampling, or pictures or references without what they need.
    """
    target = parse_target(target) if isinstance(target, str) else target
    _check(model, policy, options, target, split, proposals, generation)
    model = evaluating(model)
    with tqdm(unit="batch", disable=not progress) as bar:
        writer = _Writer(model, batch_size, generation, bar)
        states = torch.cat(encoded_images(model, rows, image_processor, batch_size))
        known = listed_references(references, len(states), tokenizer)
        learners, kept = _split(policy, len(states), learning_share, seed)
        rule = _make_policy(policy, options, writer, states[learners])
        states = states[kept]
        full = writer.write(states, None)
        trace = token_trace(model, zip(states.split(batch_size), full, strict=True), rule)
        judge = Judge(model, full, tokenizer, known and [known[row] for row in kept.tolist()], metric)
        deep = float(model.exit_layers[-1])
        candidates = propose(
            trace.scores.double().numpy(),
            trace.agrees.double().numpy(),
            np.asarray(model.exit_layers, dtype=float),
            proposals,
            rule.lowest_threshold,
            rule.counts,
        )
        share = len(trace.words) / (len(trace.words) + len(states))  # the first token of a caption runs in full
        candidates = [one._replace(trace_layers=deep + share * (one.trace_layers - deep)) for one in candidates]
        bar.reset(len(candidates) * len(full))
        tried = [(Proposal(FULL, rule.thresholds, deep), full)]
        tried += [(one, writer.write(states, rule.with_thresholds(one.thresholds))) for one in candidates]
    settings = tuple(judge.setting(*one) for one in tried)
    chosen = target.pick(curve_of(settings))
    best, rule = settings[chosen], rule.with_thresholds(settings[chosen].thresholds)
    return CaptionCalibrationResult(
        policy=rule,
        target=str(target),
        quality=best.score,
        full_quality=settings[0].score,
        standard_error=best.standard_error,
        mean_layers=best.mean_layers,
        mean_cost=best.mean_cost,
        layer_speed_up=best.layer_speed_up,
        exits=_reports(rule, trace, judge.exits_of(tried[chosen][1]), model.exit_layers),
        curve=tuple((one.mean_cost, one.score, one.thresholds) for one in sorted(settings, key=lambda one: -one.mean_cost)),
        num_rows=len(states),
        num_learning_rows=len(learners),
        seed=seed,
        split=split,
        dtype=str(model.dtype).removeprefix("torch."),
        fingerprint=model_fingerprint(model),
        versions={name: version(name) for name in ("hf_earlyexit", "torch", "transformers")},
        notes=(*_notes(rule, model.config.exit_decay), *on_drop(target, settings[0].score)),
        metric=f"{judge.metric_name} against {'the full model' if references is None else 'references'}",
        settings=settings,
        chosen=chosen,
        exit_decay=model.config.exit_decay,
        num_tokens=len(trace.words),
        generation={
            name: value if isinstance(value, (bool, int, float, str)) else repr(value) for name, value in generation.items()
        },
    )


class _Writer:
    """Writes captions of encoded images, batch by batch."""

    def __init__(self, model: Any, batch_size: int, options: dict[str, Any], bar: Any) -> None:
        self.model, self.batch_size, self.options, self.bar = model, batch_size, options, bar

    def write(self, states: Tensor, policy: ExitPolicy | None) -> list[Captions]:
        written = []
        for batch in states.split(self.batch_size):
            written.append(write_captions(self.model, batch, policy, self.options))
            self.bar.update()
        return written


def _check(
    model: Any,
    policy: str | ExitPolicy,
    options: dict[str, Any] | None,
    target: Target,
    split: str,
    proposals: int,
    generation: dict[str, Any],
) -> None:
    """Refuse what cannot work before the encoder runs."""
    if not isinstance(target, (MaxDrop, SpeedUp, LayerBudget)):
        raise CalibrationError(
            f"target is {target!r}; captions take MaxDrop, SpeedUp or LayerBudget: their unit of error is the caption, not "
            "the exit.",
            field="target",
            value=target,
        )
    if split == "train":
        raise CalibrationError(
            "The images are tagged 'train': on what the exits were trained on, every exit looks better than it is. Use "
            "images held back from training.",
            field="split",
            value=split,
        )
    if len(model.exit_layers) == 1:
        raise CalibrationError("The model has no early exit; set exit_layers and train the exits.", field="exit_layers")
    if isinstance(proposals, bool) or not isinstance(proposals, int) or proposals < 2:
        raise CalibrationError(f"proposals is {proposals!r}; expected a whole number from 2.", field="proposals")
    if isinstance(policy, ExitPolicy):
        if options:
            raise UsageError("options go with a policy's name; a ready policy keeps its own numbers.", field="options")
        model.config.check_policy(policy)
    else:
        try:
            model.require_signals(known_signals(POLICIES.get(policy).asks))
        except UsageError as error:
            raise CalibrationError(f"The {policy} policy cannot decide: {error}", field="policy", value=policy) from error
    settings = generation_settings(model, generation)
    for name, most in (("do_sample", False), ("num_return_sequences", 1)):
        value = getattr(settings, name)
        if value is not None and value > most:
            raise UsageError(
                f"{name} is {value!r}; captions are compared one by one with the full model's, so expected one caption per "
                "image and no chance in it. Calibrate with greedy or beam search.",
                field=name,
                value=value,
            )
    given = sorted({"decoder_input_ids", "pixel_values", "encoder_outputs", "early_exit"} & set(generation))
    if given:
        raise UsageError(f"{given[0]} cannot be given here; images come as `rows`, captions start afresh.", field=given[0])
    check_caption_tokens(settings, generation)
    check_generation(settings, generation, early=True, wants_layers=True)


def _split(policy: str | ExitPolicy, count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Places of the images that a policy learns its numbers from, and of those that choose the thresholds."""
    if isinstance(policy, ExitPolicy) or not POLICIES.get(policy).learns:
        return torch.arange(0), torch.arange(count)
    learners = round(share * count)
    if not 0 < learners < count:
        raise CalibrationError(
            f"learning_share is {share!r} of {count} images; expected a share that leaves images on both sides.",
            field="learning_share",
            value=share,
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[:learners].sort().values, order[learners:].sort().values


def _make_policy(policy: str | ExitPolicy, options: dict[str, Any] | None, writer: _Writer, learners: Tensor) -> ExitPolicy:
    """The policy, every exit closed."""
    model = writer.model
    closed = (None,) * (len(model.exit_layers) - 1)
    if isinstance(policy, ExitPolicy):
        return replace(policy, thresholds=closed, exit_layers=model.exit_layers)
    trace = None
    if len(learners):
        trace = token_trace(model, zip(learners.split(writer.batch_size), writer.write(learners, None), strict=True))
    return POLICIES.get(policy).from_trace(TokenLessons(model, trace), **(options or {}))


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


def _notes(policy: ExitPolicy, decay: float | None) -> list[str]:
    notes = []
    if not policy.may_leave:
        notes.append("no token leaves early: nothing that was tried meets the target on these images")
    elif decay is not None and not policy.counts:
        notes.append(f"thresholds fall along the caption by config.exit_decay={decay:g}, and hold for that value only")
    return notes
