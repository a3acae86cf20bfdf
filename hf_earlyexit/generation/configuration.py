"""What the configurations of captioners and language models add: how tokens are looked at where they may leave."""

# No `from __future__ import annotations` here: it would turn the type checks of strict configs off without a word.
from dataclasses import dataclass
from typing import Any, ClassVar

from ..families import FAMILIES
from ..families.decoders import CACHE_NAMES
from ..modeling.configuration import EarlyExitConfig
from ..modeling.sizes import wrong
from ..problem_types import SINGLE_LABEL
from ..registry import Registry
from ..values import is_real, is_whole
from .word_heads import WORD_HEADS

SIGNALS = ("vocabulary", "shortlist")


@dataclass(kw_only=True)
class EarlyExitTokenConfig(EarlyExitConfig):
    """Fields of models that write text token by token, beside those of `EarlyExitConfig`.

    Args:
        exit_head: "tied" (the decoder's own head), "tuned" (a linear map, then that head), "linear" (a head of its own) or
            "low-rank".
        exit_rank: width of "low-rank" heads.
        exit_signal: what rules that read answers look at: "vocabulary", every word, or "shortlist", the words of
            `set_exit_shortlist`; the answer is then made once, by the full head, where the token leaves.
        exit_shortlist: how many words the shortlist has; `None` for no shortlist.
        exit_decay: thresholds of bounded rules start higher and fall with every token, by `exp(-exit_decay * token)`; 0 or
            above; `None` for thresholds that stay as they are. Lossless runs pass it over.
        exit_drafts: in lossless runs, drafts that may wait before the last layer checks them; 1 or more.

    Raises:
        EarlyExitConfigError: naming the field, its value and what is allowed.
    """

    heads: ClassVar[Registry[Any]] = WORD_HEADS
    # a list, as Trainer adds another to it
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["exit_logits", "exit_scalars", "exit_layer", *CACHE_NAMES]

    exit_head: str = "tied"
    exit_rank: int = 64
    exit_signal: str = "vocabulary"
    exit_shortlist: int | None = None
    exit_decay: float | None = None
    exit_drafts: int = 4

    @property
    def word_config(self) -> Any:
        """The config of the part that writes: where its width and the size of its vocabulary stand."""
        return self

    @property
    def resolved_problem_type(self) -> str:
        """The next token is one of the vocabulary."""
        return SINGLE_LABEL

    def check_labels(self) -> None:
        """There are none; refuses what decoding cannot use instead."""
        words = self.word_config.vocab_size
        if not is_whole(self.exit_rank, 1, 1 << 20):
            raise wrong("exit_rank", self.exit_rank, "a whole number above 0")
        if self.exit_signal not in SIGNALS:
            raise wrong("exit_signal", self.exit_signal, f"one of {', '.join(SIGNALS)}")
        if self.exit_shortlist is not None and not is_whole(self.exit_shortlist, 2, words):
            raise wrong("exit_shortlist", self.exit_shortlist, f"a number of words from 2 to {words}")
        if self.exit_signal == "shortlist" and self.exit_shortlist is None:
            raise wrong("exit_shortlist", None, "a number of words, as exit_signal is 'shortlist'")
        if self.exit_gate == "mlp+logits":
            raise wrong("exit_gate", self.exit_gate, "'linear' or 'mlp': here gates are asked so that no logits are needed")
        if self.exit_decay is not None and not is_real(self.exit_decay, 0):
            raise wrong("exit_decay", self.exit_decay, "a number of at least 0, or null")
        if not is_whole(self.exit_drafts, 1, 1 << 16):
            raise wrong("exit_drafts", self.exit_drafts, "a whole number above 0")


class EarlyExitLanguageModelConfig(EarlyExitTokenConfig):
    """What the configurations of all language models add; the rest comes from the row of their family.

    Raises:
        EarlyExitConfigError: for a decoder that looks at an encoder, which is a captioner's.
    """

    def check_labels(self) -> None:
        super().check_labels()
        if getattr(self, "add_cross_attention", False):
            name = FAMILIES[self.stock_model_type].name
            raise wrong("add_cross_attention", True, f"False: {name} writes without an encoder here; captioners have one")
