"""What a model with exits is to everything that calibrates, serves, saves or describes one, in torch or exported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..families.base import Family
from ..policies.base import ExitPolicy
from ..walking.step import Walker

if TYPE_CHECKING:  # nobody who classifies needs a decoder's modelling file
    from transformers import GenerationConfig

    from ..families.decoders import DecoderBackbone


class ExitModel(Protocol):
    """A model with exits: a torch classifier or captioner, or an exported classifier.

    Attributes:
        config: an `EarlyExitConfig`.
    """

    config: Any

    @property
    def training(self) -> bool:
        """Whether it is being trained; early exits are for evaluation."""

    @property
    def device(self) -> torch.device:
        """Where its hidden states are."""

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Layers (1-based) after which rows may leave, the last one included."""

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the signals that its exits can give beside their logits."""

    @property
    def exit_policy(self) -> ExitPolicy | None:
        """The policy that decides when rows leave; `None` to run in full."""

    @property
    def operating_points(self) -> tuple[str, ...]:
        """Names of policies to choose from at call time, "exact" among them."""

    def set_exit_policy(self, policy: Any) -> None:
        """Serve with this policy, or calibration result, from now on; `None` runs the model in full."""

    def set_operating_points(
        self, points: Mapping[str, Any] | None, default: str | None = None, *, keep_others: bool = False
    ) -> None:
        """Keep several policies, to be chosen by name at call time."""

    def policy_at(self, operating_point: str | None) -> ExitPolicy | None:
        """The policy of an operating point, `None` for "exact"; without a name, `exit_policy`."""

    def choose_policy(
        self, early_exit: bool | None, operating_point: str | None, kwargs: dict[str, Any]
    ) -> ExitPolicy | None:
        """The policy that a call asks for; `None` to run in full."""

    def require_signals(self, names: Iterable[str]) -> None:
        """Refuse signals that the model does not give."""

    def modules(self) -> Iterable[nn.Module]:
        """Its modules; none of an exported one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A batch through the model: see the `forward` of each."""


class ExitClassifier(ExitModel, Protocol):
    """A classifier with exits."""

    @property
    def family(self) -> Family:
        """The row of its family."""

    @property
    def num_labels(self) -> int:
        """Classes C."""


class TorchExitModel(ExitModel, Protocol):
    """A model with exits that is a torch module of transformers.

    Attributes:
        exit_heads, exit_gates: by layer; what the stock model does not have.
        base_model: the stock backbone.
        generation_config: of transformers; of models that write.
    """

    exit_heads: nn.ModuleDict
    exit_gates: nn.ModuleDict
    base_model: Any
    base_model_prefix: str
    generation_config: Any

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """The model itself, moved to a device or cast to a dtype."""

    def eval(self) -> Any:
        """The model itself, no longer in training mode."""

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """The model itself, whose weights learn or do not."""

    def set_attn_implementation(self, attn_implementation: Any) -> None:
        """Choose how attention is computed, by name."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All weights."""

    def buffers(self) -> Iterator[Tensor]:
        """All other tensors."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All weights by name."""

    def children(self) -> Iterator[nn.Module]:
        """Its direct parts."""

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Its direct parts by name."""

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors that are saved, by name."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        """Take up tensors by name."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """A model from a folder or the Hub."""

    def get_submodule(self, target: str) -> nn.Module:
        """A module by path."""

    def get_memory_footprint(self) -> int:
        """Bytes of all tensors."""

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Write a folder, whole or not at all."""


class TorchExitClassifier(Walker, ExitClassifier, TorchExitModel, Protocol):
    """A classifier with exits that is a torch module, which can be walked layer by layer."""


class TorchExitWriter(TorchExitModel, Protocol):
    """A captioner or language model with exits, whose tokens leave early.

    Attributes:
        crosses: whether its layers look at an encoder's states.
        exit_shortlist: ids of the words that "shortlist" signals look at; there where the config asks for them.
    """

    crosses: bool
    exit_shortlist: Tensor

    @property
    def backbone(self) -> DecoderBackbone:
        """How to walk the decoder's layers."""

    @property
    def token_decoder(self) -> Any:
        """The stock model whose layers have the exits."""

    def features(self, exit_index: int, hidden: Tensor) -> Tensor:
        """What the vocabulary layer of exit `exit_index` (0-based) reads, `[..., F]`."""

    def exit_logits(self, exit_index: int, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of exit `exit_index` (0-based) from the states after its layer `[..., H]`."""

    def gate_states(self, hidden: Tensor) -> Tensor:
        """What gates look at, `[..., H]`."""

    def words(self, features: Tensor) -> Tensor:
        """Logits `[..., V]` from what the decoder's own vocabulary layer reads `[..., H]`."""

    def vocabulary(self, exit_index: int) -> tuple[Tensor, Tensor | None]:
        """Weight `[V, F]` and bias `[V]` of the vocabulary layer of exit `exit_index` (0-based)."""

    def read_prompts(self, rows: Any, tokenizer: Any, image_processor: Any, batch_size: int) -> Sequence[Any]:
        """What the model writes after, one for each row, as `prompt_inputs` takes it."""

    def prompt_inputs(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """What `generate` takes of the prompts of one batch."""

    def full_pass(self, inputs: dict[str, Any], ids: Tensor, start: int) -> tuple[list[Tensor], Tensor]:
        """States before and after every layer, and logits of whole texts, all layers run."""

    def read_images(self, states: Tensor, cache: Any) -> None:
        """Give an empty cache what every layer's cross attention makes of the encoder's states."""

    def point_of(self, operating_point: str | None, lossless: bool) -> str | None:
        """The operating point of a call of `generate`."""

    def check_inputs(self, inputs: Any, settings: GenerationConfig, options: dict[str, Any]) -> int:
        """Refuse inputs of `generate` that the model cannot read; says how many images or prompts there are."""

    def check_tokens(self, settings: GenerationConfig, options: Mapping[str, Any]) -> None:
        """Refuse generation without tokens that it needs."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; with a policy, tokens leave where they are decided."""

    def _prefill(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' own pass over the prompts."""

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[GenerationConfig, dict[str, Any]]:
        """Transformers' own settings of a call."""


Wrapped = ExitModel | nn.Module
"""A model with exits, or what other libraries put around one: `torch.compile`, `DataParallel`, PEFT."""
