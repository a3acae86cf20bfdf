"""What `generate` is told, and what of it early exit refuses before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..errors import DataError, UsageError
from ..modeling.protocol import TorchExitWriter
from ..policies.base import ExitPolicy
from ..values import check_whole, shown

LOSSLESS = "lossless"  # the operating point of drafts where no other is named


def generation_settings(model: TorchExitWriter, options: Mapping[str, Any]) -> GenerationConfig:
    """What a call of `generate` goes by: its arguments, then its generation config, then the model's own.

    Args:
        model: the captioner or language model.
        options: arguments of `generate` by name.

    Raises:
        UsageError: for a generation config that is none.
    """
    given = options.get("generation_config")
    if given is not None and not isinstance(given, GenerationConfig):
        raise UsageError(
            f"generation_config is {type(given).__name__}; expected a GenerationConfig, or its values as keywords.",
            field="generation_config",
            value=type(given).__name__,
        )
    settings, _ = model._prepare_generation_config(**{**options, "generation_config": given})
    return settings


def check_generation(settings: GenerationConfig, options: Mapping[str, Any], early: bool, wants_layers: bool) -> None:
    """Refuse settings of `generate` that cannot work.

    Args:
        settings: from `generation_settings`.
        options: arguments of the call by name.
        early: whether tokens may leave early.
        wants_layers: whether exit layers are asked for.

    Raises:
        UsageError: for early exit over a cache that it cannot use, or with a way of decoding other than greedy search,
            sampling and beam search.
    """
    if early or wants_layers:
        _check_way(settings, options)
    if not early:
        return
    if settings.use_cache is False:
        raise UsageError(
            "Early exit decodes over a cache; leave use_cache out, or pass early_exit=False.", field="use_cache"
        )
    if settings.cache_implementation not in (None, "dynamic"):
        raise UsageError(
            f"cache_implementation is {settings.cache_implementation!r}; rows leave at different layers, so early exit "
            "needs the dynamic cache. Leave cache_implementation out, or pass early_exit=False.",
            field="cache_implementation",
            value=settings.cache_implementation,
        )
    for name in GUIDANCE:
        if is_given(options, name) or is_given(vars(settings), name):
            raise UsageError(
                f"{name} runs the model a second time on another prompt, in passes that early exit does not see; leave it "
                "out, or pass early_exit=False.",
                field=name,
            )
    if getattr(settings, "prefill_chunk_size", None) is not None:
        raise UsageError(
            "prefill_chunk_size runs a prompt in parts; with early exit it runs whole. Leave it out, or pass "
            "early_exit=False.",
            field="prefill_chunk_size",
            value=settings.prefill_chunk_size,
        )


ONE_BY_ONE = ("greedy_search", "sample", "beam_search", "beam_sample")
ASSISTANTS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
GUIDANCE = ("guidance_scale", "negative_prompt_ids", "negative_prompt_attention_mask")
OTHER_WAYS = ("custom_generate", "constraints", "force_words_ids", "penalty_alpha", "num_beam_groups", "dola_layers")


def _check_way(settings: GenerationConfig, options: Mapping[str, Any]) -> None:
    """Refuse ways of decoding that do not write one token of each row after the other."""
    way = settings.get_generation_mode(options.get("assistant_model")).value
    asked = [name for name in (*ASSISTANTS, *OTHER_WAYS) if is_given(options, name) or is_given(vars(settings), name)]
    if any(name in ASSISTANTS for name in asked):
        raise UsageError(
            f"An assistant ({asked[0]}) proposes several tokens at once, which early exit cannot take; pass "
            "early_exit=False and leave return_exit_layers out.",
            field=asked[0],
        )
    if way not in ONE_BY_ONE or "custom_generate" in asked:
        raise UsageError(
            f"{asked[0] if asked else way} asks for another way of decoding ({way}); early exit takes greedy search, "
            "sampling and beam search. Pass early_exit=False and leave return_exit_layers out.",
            field=asked[0] if asked else "generation_config",
        )


def is_given(values: Mapping[str, Any], name: str) -> bool:
    """Whether an option is set to something that changes what is done."""
    value = values.get(name)
    return value is not None and value is not False and not (name in ("num_beam_groups", "guidance_scale") and value == 1)


def check_lossless(policy: ExitPolicy | None, settings: GenerationConfig, most: Any) -> None:
    """Refuse calls of `generate` whose output drafts cannot keep.

    Args:
        policy: of the call, or `None`.
        settings: from `generation_settings`.
        most: drafts that may wait.

    Raises:
        UsageError: without a policy, for beams, for processors with a memory of their own, and for a number below 1.
    """
    if policy is None:
        raise UsageError(
            "lossless=True, but no policy makes drafts; set one with `model.set_exit_policy(policy)`, and leave early_exit "
            "out.",
            field="lossless",
        )
    check_whole(1, 1 << 16, max_drafts=most)
    if (settings.num_beams or 1) > 1:
        raise UsageError(
            f"num_beams is {settings.num_beams}; drafts are checked one text at a time, and beams change places at "
            "every token. Use greedy search or sampling, or leave lossless out.",
            field="num_beams",
            value=settings.num_beams,
        )
    if getattr(settings, "watermarking_config", None) is not None:
        raise UsageError(
            "watermarking_config marks tokens by what it has seen before, and would see drafts that are taken back; leave "
            "it out, or leave lossless out.",
            field="watermarking_config",
        )


def check_prompts(ids: Any, words: int) -> None:
    """Refuse what are no prompts.

    Args:
        ids: token ids of prompts `[B, T]`.
        words: size V of the vocabulary.

    Raises:
        DataError: for anything else, naming the first row with an id out of range.
    """
    right = isinstance(ids, Tensor) and ids.ndim == 2 and ids.numel() > 0
    if not right or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        came = f"{ids.dtype} of shape {list(ids.shape)}" if isinstance(ids, Tensor) else shown(ids)
        raise DataError(
            f"The prompts are {came}; expected token ids [rows, tokens] as whole numbers, at least one of each.",
            field="input_ids",
        )
    outside = ((ids < 0) | (ids >= words)).any(1)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise DataError(
            f"Row {row} of the prompts has ids from {int(ids[row].min())} to {int(ids[row].max())}; expected 0 to "
            f"{words - 1}: use the model's own tokenizer.",
            field="input_ids",
            value=row,
        )


def check_lossless_call(model: TorchExitWriter, options: dict[str, Any]) -> None:
    """Refuse calls whose rows cannot be taken apart.

    Raises:
        UsageError: naming what stands in the way.
    """
    attention = model.config.word_config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise UsageError(
            f"The attention is {attention!r}; lossless early exit makes its masks for 'sdpa' and 'eager'. Load the model "
            "with attn_implementation='sdpa'.",
            field="attn_implementation",
            value=attention,
        )
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = options.get(name)
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise UsageError(
                f"{name} is no mask [rows, tokens]; lossless early exit makes the masks of its passes from one.", field=name
            )
