"""`evaluate` for models that write: what early exit makes of their texts, in words, layers and time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import UsageError
from ..modeling.protocol import TorchExitWriter
from ..policies.base import ExitPolicy
from .command_result import CommandResult
from .evaluate import EvaluateArguments, judgement, measured, timing_words, verdict_on
from .texts import WritingTask, writing_task_of

CLASSIFIERS_ONLY = ("metric", "max_batch_tokens", "label_names")


def evaluate_writer(args: EvaluateArguments, model: TorchExitWriter) -> CommandResult:
    """Write early and in full, compare.

    Args:
        args: flags.
        model: a captioner or language model that has been loaded.

    Raises:
        UsageError: for a model without a policy, or flags that do not fit.
    """
    task = writing_task_of(args, model, "test", CLASSIFIERS_ONLY)
    point = model.point_of(args.operating_point, args.lossless)
    policy = model.policy_at(point)
    if policy is None:
        raise UsageError(f"{args.model} has no exit policy; run `hf-earlyexit calibrate` first.", field="model")
    prompts = model.read_prompts(task.prompts, task.parts["tokenizer"], task.parts.get("image_processor"), task.batch_size)
    batches = [prompts[start : start + task.batch_size] for start in range(0, len(prompts), task.batch_size)]
    values = {"policy": policy.name, "rows": len(prompts), "num_layers": model.exit_layers[-1]}
    if args.lossless:
        runs = _lossless(model, batches, point, task, values)
    else:
        runs = _lossy(args, model, batches, policy, task, values)
    if args.time:
        values["time"] = measured(runs, args.repeats, model.device.type)
    return CommandResult(values, _sentences(values))


def _lossy(
    args: EvaluateArguments,
    model: TorchExitWriter,
    batches: list[Any],
    early_policy: ExitPolicy,
    task: WritingTask,
    values: dict[str, Any],
) -> dict[str, Callable[[], Any]]:
    """Fill in figures of texts whose tokens leave for good; gives both ways to write them."""
    import torch

    from ..calibration.proposals import Proposal
    from ..calibration.quality import Comparison
    from ..generation.judge import Judge, listed_references
    from ..generation.token_trace import write

    def written(policy: ExitPolicy | None) -> list[Any]:
        return [write(model, batch, policy, task.generation) for batch in batches]

    full, early = written(None), written(early_policy)
    tokenizer = task.parts["tokenizer"]
    judge = Judge(model, full, tokenizer, listed_references(task.references, values["rows"], tokenizer), None)
    setting = judge.setting(Proposal("early", early_policy.thresholds, 0.0), early)
    layers = torch.tensor(model.exit_layers, dtype=torch.double)[torch.as_tensor(judge.exits_of(early))]
    compared = Comparison(setting.score, setting.score - setting.difference, setting.standard_error)
    values |= {
        "measure": judge.measure,
        "tokens": len(layers),
        "same_texts": _same(full, early),
        **compared._asdict(),
        "mean_layers": setting.mean_layers,
        "layer_speed_up": setting.layer_speed_up,
        "exit_shares": {str(layer): float((layers == layer).double().mean()) for layer in model.exit_layers},
        "target": verdict_on(args, compared, layers, model.exit_layers[-1]),
    }
    return {"full": lambda: written(None), "early": lambda: written(early_policy)}


def _lossless(
    model: TorchExitWriter, batches: list[Any], point: str | None, task: WritingTask, values: dict[str, Any]
) -> dict[str, Callable[[], Any]]:
    """Fill in figures of drafts; gives both ways to write the texts."""
    from ..generation.lossless import starts_with_a_draft

    def written(**way: Any) -> list[Any]:
        options = {**task.generation, **way, "return_exit_layers": True}
        return [model.generate(**model.prompt_inputs(batch), **options) for batch in batches]

    def full() -> list[Any]:
        return written(early_exit=False)

    def early() -> list[Any]:
        return written(lossless=True, operating_point=point)

    plain, drafted = full(), early()
    counts = [output.draft_counts for output in drafted]
    by_prompt = 0 if starts_with_a_draft(model, 1) else 1  # tokens that the pass over the prompt brings along
    tokens = sum(count.tokens for count in counts) - by_prompt * values["rows"]
    passes = sum(int((output.exit_layers > 0).sum(1).max()) - by_prompt for output in plain)
    values |= {
        "tokens": tokens,
        "same_texts": _same(plain, drafted),
        "drafted": sum(sum(count.drafted) for count in counts),
        "accepted": sum(sum(count.accepted) for count in counts),
        "layer_calls": sum(count.layer_calls for count in counts),
        "full_layer_calls": passes * values["num_layers"],
    }
    return {"full": full, "early": early}


def _same(one: list[Any], two: list[Any]) -> int:
    """How many texts are alike, id by id."""

    def ids(outputs: list[Any]) -> list[list[int]]:
        rows = [row for output in outputs for row in zip(output.sequences, output.exit_layers, strict=True)]
        return [text[left > 0].tolist() for text, left in rows]

    return sum(first == second for first, second in zip(ids(one), ids(two), strict=True))


def _sentences(values: dict[str, Any]) -> str:
    lines = [f"{values['policy']} on {values['rows']} rows, {values['tokens']} tokens"]
    if "drafted" in values:
        fewer = values["full_layer_calls"] / max(values["layer_calls"], 1)
        lines += [
            f"{values['layer_calls']} calls of layers instead of {values['full_layer_calls']} ({fewer:.2f}x fewer); "
            f"{values['accepted']} of {values['drafted']} drafts right"
        ]
    else:
        lines += [
            f"{values['measure']} {values['quality']:.4f} against {values['full_quality']:.4f} of the full model "
            f"({values['quality'] - values['full_quality']:+.4f}, standard error {values['standard_error']:.4f})",
            f"mean layers {values['mean_layers']:.2f} of {values['num_layers']} a token: layer speed-up "
            f"{values['layer_speed_up']:.2f}x",
            judgement(values["target"]),
        ]
    lines.append(f"{values['same_texts']} of {values['rows']} texts are the full model's own")
    return "\n".join(lines + timing_words(values))
