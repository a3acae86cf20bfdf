"""Decoders, as they classify: the last real token answers, and layers look backwards only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .base import LAST, TEXT_INPUTS, Family, Frame, Framed
from .checks import check_text
from .context import Context, Part
from .masks import MASK, backwards, framed, positions
from .packed_stock import PackedView
from .text import NO_SEGMENTS, ROTARY, rotary_call

NO_GRAPH = "which token answers is found from token ids, which the exported exits do not see."


def last_token_answer(model: Any, part: Part) -> Tensor:
    """The score of the token that answers; the stock model scores every token, and so does this, for equal bits."""
    return part._replace(hidden=model.score(part.hidden)).state


def _embed_gpt2(model: Any, inputs: dict[str, Any]) -> Tensor:
    ids, hidden, places = inputs["input_ids"], inputs["inputs_embeds"], inputs["position_ids"]
    hidden = model.wte(ids) if hidden is None else hidden
    if places is None:
        places = torch.arange(hidden.shape[1], device=hidden.device)[None]
    hidden = hidden + model.wpe(places)
    segments = inputs["token_type_ids"]
    return model.drop(hidden if segments is None else hidden + model.wte(segments))


def _frame_gpt2(frame: Frame) -> Framed:
    return framed(frame, {MASK: backwards(frame)})


def _call_gpt2(layer: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    return layer(hidden, None, context[MASK], **context.options)


def _frame_llama(frame: Frame) -> Framed:
    rotary = frame.model.rotary_emb(frame.hidden, position_ids=positions(frame))
    return framed(frame, {MASK: backwards(frame)}, {ROTARY: rotary}, {ROTARY: (1,)})


def _frame_qwen(frame: Frame) -> Framed:
    """As Llama's, with a second mask where some layers look no further than a window."""
    config, kinds = frame.model.config, set(frame.model.config.layer_types)
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    masks = {kind: backwards(frame, windows[kind]) for kind in kinds}
    rotary = frame.model.rotary_emb(frame.hidden, positions(frame))
    return framed(frame, masks, {ROTARY: rotary}, {ROTARY: (1,)})


def _call_qwen(layer: Any, hidden: Tensor, context: Context) -> Tensor:
    kind = layer.self_attn.layer_type
    return layer(hidden, attention_mask=context[kind], position_embeddings=context[ROTARY], **context.options)


LLAMA = Family(
    name="Llama",
    layers="layers",
    embed=lambda model, inputs: (
        model.embed_tokens(inputs["input_ids"]) if inputs["inputs_embeds"] is None else inputs["inputs_embeds"]
    ),
    frame=_frame_llama,
    call=rotary_call,
    final_norm="norm",
    answer=last_token_answer,
    one_token=False,
    token=LAST,
    check=check_text,
    keeps_positions=True,
    dropout=(),
    inputs=NO_SEGMENTS,
    packed=PackedView,
    untraced=NO_GRAPH,
    writer="ForCausalLM",
)
QWEN2 = replace(LLAMA, name="Qwen2", frame=_frame_qwen, call=_call_qwen)
FAMILIES = {
    "gpt2": replace(
        LLAMA,
        name="GPT2",
        layers="h",
        embed=_embed_gpt2,
        frame=_frame_gpt2,
        call=_call_gpt2,
        final_norm="ln_f",
        keeps_positions=True,
        dropout=("resid_pdrop",),
        inputs=TEXT_INPUTS,
        writer="LMHeadModel",
    ),
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": replace(QWEN2, name="Qwen3"),
}
