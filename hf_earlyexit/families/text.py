"""Text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .base import TEXT_INPUTS, Family, Frame, Framed
from .checks import check_text
from .context import Context, Part
from .masks import MASK, both_ways, framed, one_mask, positions
from .packed_bert import PackedBertLayer
from .packed_stock import PackedView

EMBEDDED = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids")
NO_SEGMENTS = tuple(name for name in TEXT_INPUTS if name != "token_type_ids")
ROTARY = "position_embeddings"


def embed(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Word, position and segment embeddings, as BERT has them."""
    return model.embeddings(**{name: inputs[name] for name in EMBEDDED if name in inputs})


def call(layer: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    """A layer that takes a mask and nothing else."""
    return layer(hidden, context.per_row[MASK], **context.options)


def pooler(model: Any, hidden: Tensor) -> Tensor:
    """The pooler of the stock backbone."""
    return model.base_model.pooler(hidden)


def pooled_answer(model: Any, part: Part) -> Tensor:
    """Pooler, dropout, classifier."""
    return model.classifier(model.dropout(model.base_model.pooler(part.hidden)))


def first_token_answer(model: Any, part: Part) -> Tensor:
    """A head that takes the first token by itself."""
    return model.classifier(part.hidden)


def after_padding(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Positions `[B or 1, T]` as RoBERTa counts them: real tokens from the padding token's id + 1 on."""
    pad, ids = model.embeddings.padding_idx, inputs.get("input_ids")
    if ids is None:
        rows = inputs["inputs_embeds"]
        return torch.arange(pad + 1, pad + 1 + rows.shape[1], device=rows.device)[None]
    real = ids.ne(pad).int()
    return (real.cumsum(1) * real).long() + pad


def mean_of(part: Part) -> Tensor:
    """The mean of the real tokens `[B, H]`, as stock heads compute it."""
    if part.tokens is None:
        return part.hidden.sum(1) / part.hidden.shape[1]
    return (part.hidden * part.tokens.long()[..., None]).sum(1) / part.tokens.sum(1, keepdim=True)


BERT = Family(
    name="Bert",
    layers="encoder.layer",
    embed=embed,
    frame=one_mask,
    call=call,
    answer=pooled_answer,
    pool=pooler,
    check=check_text,
    packed=PackedBertLayer,
    same_input=("attention.self", ("query", "key", "value")),
)
ROBERTA = replace(
    BERT,
    name="Roberta",
    answer=first_token_answer,
    pool=None,
    positions=after_padding,
    longest=lambda config: config.max_position_embeddings - config.pad_token_id - 1,
)


# --- ELECTRA, ALBERT, DistilBERT ----------------------------------------------------------------------------------------


def _embed_electra(model: Any, inputs: dict[str, Any]) -> Tensor:
    hidden = embed(model, inputs)
    return model.embeddings_project(hidden) if hasattr(model, "embeddings_project") else hidden


def _albert_groups(model: Any) -> Sequence[nn.Module]:
    """The group that each layer shares with others."""
    config, groups = model.config, model.encoder.albert_layer_groups
    return [
        groups[int(layer / (config.num_hidden_layers / config.num_hidden_groups))]
        for layer in range(config.num_hidden_layers)
    ]


def _albert_pool(model: Any, hidden: Tensor) -> Tensor:
    backbone = model.base_model
    return backbone.pooler_activation(backbone.pooler(hidden[:, 0]))


def _distilbert_pool(model: Any, hidden: Tensor) -> Tensor:
    return model.pre_classifier(hidden[:, 0]).relu()


ELECTRA = replace(ROBERTA, name="Electra", embed=_embed_electra, positions=None, longest=BERT.longest)
ALBERT = replace(
    BERT,
    name="Albert",
    layers=_albert_groups,
    embed=lambda model, inputs: model.encoder.embedding_hidden_mapping_in(embed(model, inputs)),
    answer=lambda model, part: model.classifier(model.dropout(_albert_pool(model, part.hidden))),
    pool=_albert_pool,
    dropout=("classifier_dropout_prob",),
    packed=PackedView,
    same_input=None,
)
DISTILBERT = replace(
    BERT,
    name="DistilBert",
    layers="transformer.layer",
    answer=lambda model, part: model.classifier(model.dropout(_distilbert_pool(model, part.hidden))),
    pool=_distilbert_pool,
    dropout=("seq_classif_dropout",),
    inputs=NO_SEGMENTS,
    packed=PackedView,
    same_input=None,
)


# --- attention of their own: padded only --------------------------------------------------------------------------------


def _frame_mpnet(frame: Frame) -> Framed:
    bias = frame.model.encoder.compute_position_bias(frame.hidden)  # [B, heads, T, T]
    made = framed(frame, {MASK: both_ways(frame)})
    return made._replace(per_row={**made.per_row, "position_bias": bias}, axes={**made.axes, "position_bias": (2, 3)})


def _call_mpnet(layer: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    asks = context.attentions is not None
    return context.noted(layer(hidden, context.per_row[MASK], context.per_row["position_bias"], output_attentions=asks))


def _embed_deberta(model: Any, inputs: dict[str, Any]) -> Tensor:
    given = {name: inputs[name] for name in EMBEDDED}
    return model.embeddings(mask=_deberta_mask(inputs), **given)


def _deberta_mask(inputs: dict[str, Any]) -> Tensor:
    """The attention mask `[B, T]`, ones where none is given."""
    mask, ids, embedded = inputs.get(MASK), inputs.get("input_ids"), inputs.get("inputs_embeds")
    if mask is not None:
        return mask
    rows = embedded if ids is None else ids
    assert rows is not None  # one of them is given
    return torch.ones(rows.shape[:2], device=rows.device)


def _frame_deberta(frame: Frame) -> Framed:
    encoder, hidden = frame.model.encoder, frame.hidden
    mask = hidden.new_ones(hidden.shape[:2]) if frame.attention_mask is None else frame.attention_mask.long()
    given = {MASK: encoder.get_attention_mask(mask), "tokens": mask}
    places = encoder.get_rel_pos(hidden)  # [1, T, T] or [T, T]
    shared = {
        "relative_pos": places,
        "rel_embeddings": encoder.get_rel_embedding(),
        "first": encoder.layer[0] if encoder.conv is not None else None,
        "conv": encoder.conv,
    }
    axes = {} if places is None else {"relative_pos": (places.ndim - 2, places.ndim - 1)}
    return framed(frame, given, shared, axes)


def _call_deberta(layer: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    places, embeddings = context["relative_pos"], context["rel_embeddings"]
    asks = context.attentions is not None
    given = {"relative_pos": places, "rel_embeddings": embeddings, "output_attentions": asks}
    after = context.noted(layer(hidden, context.per_row[MASK], **given))
    return context["conv"](hidden, after, context.per_row["tokens"]) if layer is context["first"] else after


MPNET = replace(
    ROBERTA,
    name="MPNet",
    is_watched=False,
    frame=_frame_mpnet,
    call=_call_mpnet,
    longest=lambda config: config.max_position_embeddings - 2,  # the padding token's id is 1 whatever the config says
    inputs=NO_SEGMENTS,
    packed=None,
    same_input=None,
)
DEBERTA = replace(
    BERT,
    name="DebertaV2",
    is_watched=False,
    embed=_embed_deberta,
    frame=_frame_deberta,
    call=_call_deberta,
    answer=lambda model, part: model.classifier(model.dropout(model.pooler(part.hidden))),
    pool=lambda model, hidden: model.pooler(hidden),
    dropout=("cls_dropout", "hidden_dropout_prob"),
    packed=None,
    same_input=None,
    between=("encoder.conv",),
)


# --- rotary positions ---------------------------------------------------------------------------------------------------


def _frame_modernbert(frame: Frame) -> Framed:
    masks = {
        "full_attention": both_ways(frame),
        "sliding_attention": both_ways(frame, frame.model.config.sliding_window),
    }
    rotary = frame.model.rotary_emb
    shared = {f"rotary {kind}": rotary(frame.hidden, positions(frame), kind) for kind in set(frame.model.config.layer_types)}
    return framed(frame, masks, shared, dict.fromkeys(shared, (1,)))


def _call_modernbert(layer: Any, hidden: Tensor, context: Context) -> Tensor:
    kind = layer.attention_type
    mask, rotary = context[kind], context[f"rotary {kind}"]
    return layer(hidden, attention_mask=mask, position_embeddings=rotary, **context.options)


def _answer_modernbert(model: Any, part: Part) -> Tensor:
    state = part.state if model.config.classifier_pooling == "cls" else mean_of(part)
    return model.classifier(model.drop(model.head(state)))


def rotary_frame(frame: Frame) -> Framed:
    """One mask and one rotary embedding."""
    rotary = frame.model.rotary_emb(frame.hidden, positions(frame))
    return framed(frame, {MASK: both_ways(frame)}, {ROTARY: rotary}, {ROTARY: (1,)})


def rotary_call(layer: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    """A layer that takes a mask and a rotary embedding."""
    return layer(hidden, attention_mask=context[MASK], position_embeddings=context[ROTARY], **context.options)


def _answer_eurobert(model: Any, part: Part) -> Tensor:
    pooling, real = model.config.classifier_pooling, part.tokens
    if pooling == "late":
        words = model.classifier(model.activation(model.dense(part.hidden)))
        return words.mean(1) if real is None else (words * real.long()[..., None]).sum(1) / real.sum(1, keepdim=True)
    mean = part.hidden.mean(1) if real is None else mean_of(part)
    return model.classifier(model.activation(model.dense(part.state if pooling == "bos" else mean)))


MODERNBERT = replace(
    BERT,
    name="ModernBert",
    layers="layers",
    embed=lambda model, inputs: model.embeddings(input_ids=inputs["input_ids"], inputs_embeds=inputs["inputs_embeds"]),
    frame=_frame_modernbert,
    call=_call_modernbert,
    final_norm="final_norm",
    answer=_answer_modernbert,
    one_token=lambda config: config.classifier_pooling == "cls",
    pool=None,
    keeps_positions=True,
    dropout=("classifier_dropout",),
    inputs=NO_SEGMENTS,
    packed=PackedView,
    same_input=None,
)
EUROBERT = replace(
    MODERNBERT,
    name="EuroBert",
    embed=lambda model, inputs: (
        model.embed_tokens(inputs["input_ids"]) if inputs["inputs_embeds"] is None else inputs["inputs_embeds"]
    ),
    frame=rotary_frame,
    call=rotary_call,
    final_norm="norm",
    answer=_answer_eurobert,
    one_token=lambda config: config.classifier_pooling == "bos",
    dropout=(),
)
NOMIC = replace(
    BERT,
    name="NomicBert",
    layers="layers",
    frame=rotary_frame,
    call=rotary_call,
    keeps_positions=True,
    packed=PackedView,
    same_input=None,
)

FAMILIES = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": replace(ROBERTA, name="XLMRoberta"),
    "camembert": replace(ROBERTA, name="Camembert"),
    "xlm-roberta-xl": replace(ROBERTA, name="XLMRobertaXL", final_norm="encoder.LayerNorm", packed=PackedView,
                              same_input=None),
    "electra": ELECTRA,
    "albert": ALBERT,
    "distilbert": DISTILBERT,
    "mpnet": MPNET,
    "deberta-v2": DEBERTA,
    "modernbert": MODERNBERT,
    "eurobert": EUROBERT,
    "nomic_bert": NOMIC,
}  # fmt: skip
