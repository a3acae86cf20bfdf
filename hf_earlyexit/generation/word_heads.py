"""What stands at an exit of a decoder: a way from the state after a layer to logits over the vocabulary."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..families.decoders import DecoderBackbone
from ..registry import Registry

WORD_HEADS: Registry[type[WordHead]] = Registry("word head")


class StockHead(NamedTuple):
    """The decoder's own way from its last layer to the vocabulary, as exits may borrow it."""

    backbone: DecoderBackbone
    decoder: nn.Module

    def features(self, hidden: Tensor) -> Tensor:
        """What the vocabulary layer reads, `[..., H]`, from hidden states `[..., H]`."""
        return self.backbone.features(self.decoder, hidden)

    def words(self, features: Tensor) -> Tensor:
        """Logits `[..., V]`."""
        return self.backbone.vocabulary(self.decoder)(features)

    @property
    def matrix(self) -> tuple[Tensor, Tensor | None]:
        """Weight `[V, H]` and bias `[V]` of the vocabulary layer."""
        layer = self.backbone.vocabulary(self.decoder)
        return layer.weight, layer.bias


class WordHead(ABC, nn.Module):
    """Gives the hidden states after one layer a distribution over the vocabulary.

    Args:
        hidden_size: H.
        vocab_size: V.
        rank: width of a "low-rank" head.
        epsilon: of the head's own layer norm.
    """

    borrows: ClassVar[bool] = True  # whether its vocabulary layer is the decoder's own

    def __init__(self, hidden_size: int, vocab_size: int, rank: int, epsilon: float) -> None:
        super().__init__()

    @abstractmethod
    def features(self, hidden: Tensor, stock: StockHead) -> Tensor:
        """What the vocabulary layer reads, `[..., F]`."""

    def matrix(self, stock: StockHead) -> tuple[Tensor, Tensor | None]:
        """Weight `[V, F]` and bias `[V]` of the vocabulary layer."""
        return stock.matrix

    def forward(self, hidden: Tensor, stock: StockHead) -> Tensor:
        """Logits `[..., V]` from hidden states `[..., H]`."""
        return stock.words(self.features(hidden, stock))


@WORD_HEADS.register("tied")
class TiedHead(WordHead):
    """The decoder's own final norm and vocabulary layer, with nothing new: right where all exits are trained together."""

    def features(self, hidden: Tensor, stock: StockHead) -> Tensor:
        return stock.features(hidden)


class Shift(nn.Linear):
    """What is added to a state; new ones add nothing."""


@WORD_HEADS.register("tuned")
class TunedHead(WordHead):
    """A linear map of the state, then the decoder's own norm and vocabulary layer: small, and good on a frozen decoder.

    Paper: the tuned lens (https://arxiv.org/abs/2303.08112). It starts as the identity.
    """

    def __init__(self, hidden_size: int, vocab_size: int, rank: int, epsilon: float) -> None:
        super().__init__(hidden_size, vocab_size, rank, epsilon)
        self.shift = Shift(hidden_size, hidden_size)

    def features(self, hidden: Tensor, stock: StockHead) -> Tensor:
        return stock.features(hidden + self.shift(hidden))


class OwnHead(WordHead):
    """A vocabulary layer of the exit's own."""

    borrows: ClassVar[bool] = False
    vocabulary: nn.Linear

    def matrix(self, stock: StockHead) -> tuple[Tensor, Tensor | None]:
        return self.vocabulary.weight, self.vocabulary.bias

    def forward(self, hidden: Tensor, stock: StockHead) -> Tensor:
        return self.vocabulary(self.features(hidden, stock))


@WORD_HEADS.register("linear")
class LinearWordHead(OwnHead):
    """A norm and a vocabulary layer of the exit's own: what the paper trains; V x H weights per exit."""

    def __init__(self, hidden_size: int, vocab_size: int, rank: int, epsilon: float) -> None:
        super().__init__(hidden_size, vocab_size, rank, epsilon)
        self.norm = nn.LayerNorm(hidden_size, eps=epsilon)
        self.vocabulary = nn.Linear(hidden_size, vocab_size, bias=False)

    def features(self, hidden: Tensor, stock: StockHead) -> Tensor:
        return self.norm(hidden)


@WORD_HEADS.register("low-rank")
class LowRankHead(OwnHead):
    """A norm, a narrow layer and a vocabulary layer of that width: an answer for a fraction of the full head's cost."""

    def __init__(self, hidden_size: int, vocab_size: int, rank: int, epsilon: float) -> None:
        super().__init__(hidden_size, vocab_size, rank, epsilon)
        self.norm = nn.LayerNorm(hidden_size, eps=epsilon)
        self.narrow = nn.Linear(hidden_size, rank, bias=False)
        self.vocabulary = nn.Linear(rank, vocab_size, bias=False)

    def features(self, hidden: Tensor, stock: StockHead) -> Tensor:
        return self.narrow(self.norm(hidden))


class Shortlist:
    """The vocabulary layers of all exits cut to some words, each made when it is first asked for.

    Args:
        words: vocabulary ids `[K]`.
    """

    def __init__(self, words: Tensor) -> None:
        self.words = words
        self._cut: dict[int, tuple[Tensor, Tensor | None]] = {}

    def logits(self, features: Tensor, matrix: tuple[Tensor, Tensor | None]) -> Tensor:
        """Logits `[B, K]` from features `[B, F]` and a vocabulary layer `[V, F]`."""
        weight, bias = matrix
        cut = self._cut.get(id(weight))
        if cut is None:  # a copy, as gathering the rows at every token would cost more than the product
            cut = weight[self.words], None if bias is None else bias[self.words]
            self._cut[id(weight)] = cut
        return functional.linear(features, *cut)


LAST = TiedHead(0, 0, 0, 0.0)  # the last exit is the stock head; it has no weights


def new_word_head(kind: str, config: Any, rank: int) -> WordHead:
    """A head of this kind for a decoder with this config."""
    epsilon = getattr(config, "layer_norm_epsilon", 0.0) or getattr(config, "layer_norm_eps", 1e-5)
    return WORD_HEADS.get(kind)(config.hidden_size, config.vocab_size, rank, epsilon)


def frequent_words(ids: Tensor, size: int, vocab_size: int) -> Tensor:
    """The `size` most frequent of some vocabulary ids, ascending; words never seen come last."""
    counts = torch.bincount(ids.flatten(), minlength=vocab_size)
    return counts.argsort(descending=True, stable=True)[:size].sort().values
