"""An exported model in Python, with the interface of the torch model where it serves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoConfig

from ..calibration.result import CalibrationResult
from ..errors import CheckpointError, DataError, UsageError
from ..families import FAMILIES
from ..families.context import Context, row_lengths
from ..modeling.certificate import Fingerprints
from ..modeling.configuration import UNREADABLE, EarlyExitConfig
from ..modeling.finite import check_finite
from ..modeling.operating import OperatingPoints
from ..modeling.outputs import EarlyExitClassifierOutput
from ..policies import ExitPolicy
from ..serving.batching import pad_batch
from ..serving.rows import TokenIds, check_any_token, check_ids
from ..serving.walker import BatchWalker
from ..signals import SIGNALS, ExitSignal, known_signals, names_at
from ..walking.loop import run_all, run_early
from .layer_files import BEGIN, exit_file, layer_file
from .manifest import AGAIN, MANIFEST, read_manifest
from .walk import SIGNAL, TOKENS, hidden_after, logits_of, scalar_of


class OnnxWalker(BatchWalker):
    """Walks an exported model layer by layer; sessions are shared by threads.

    Args:
        config: the model's.
        read: gives the bytes of a file.
        threads: that one layer may use.
    """

    best_batch_tokens = 256  # a core is at its full rate, and what a layer works on stays in its cache
    device = torch.device("cpu")

    def __init__(self, config: Any, read: Callable[[str], bytes], threads: int) -> None:
        self.config = config
        self.exit_layers = tuple(config.exit_layers)
        self.num_classes = config.num_labels
        family = FAMILIES[config.stock_model_type]
        self.longest, self.segments = family.longest(config), family.segments_of(config)
        self._begin = open_session(read, BEGIN, threads)
        self._layers = [open_session(read, layer_file(layer), threads) for layer in range(1, config.num_hidden_layers + 1)]
        self._exits = [open_session(read, exit_file(index), threads) for index in range(len(self.exit_layers))]
        names = [info.name for info in self._exits[0].get_outputs() if info.name.startswith(SIGNAL)]
        self.signals = tuple(name.removeprefix(SIGNAL).rpartition("_")[0] for name in names)

    def check(self, row: TokenIds, number: int) -> DataError | None:
        """What keeps the model from reading this row, if anything."""
        ids = check_ids(row, number, self.config.vocab_size, self.longest, self.segments)
        return ids or check_any_token(row, number)  # runtimes differ in what attention to nothing gives

    def begin(self, rows: Sequence[TokenIds]) -> tuple[Tensor, Context]:
        """Hidden states `[B, T, H]` before the first layer, and their context."""
        batch = pad_batch(rows, self.config.pad_token_id or 0)
        return self.begin_batch(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))

    def begin_batch(self, ids: Tensor, mask: Tensor, segments: Tensor | None) -> tuple[Tensor, Context]:
        """As `begin`, from `[B, T]` tensors."""
        segments = torch.zeros_like(ids) if segments is None else segments
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments}
        (hidden,) = self._begin.run(None, {name: values.long().numpy() for name, values in given.items()})
        return torch.from_numpy(hidden), _context(mask.bool())

    def run_layer(self, layer: int, hidden: Tensor, context: Context) -> Tensor:
        """Hidden states after layer `layer` (1-based)."""
        return torch.from_numpy(_run(self._layers[layer - 1], {hidden_after(layer - 1): hidden}, context)[0])

    def exit_signal(
        self, exit_index: int, hidden: Tensor, context: Context, asks: Sequence[str] = (), before: Tensor | None = None
    ) -> ExitSignal:
        """What exit `exit_index` (0-based) tells: see `walking.step.Walker`."""
        session, layer = self._exits[exit_index], self.exit_layers[exit_index]
        states = {hidden_after(layer): hidden}
        if before is not None and hidden_after(layer - 1) in {info.name for info in session.get_inputs()}:
            states[hidden_after(layer - 1)] = before
        wanted = [logits_of(exit_index), *(scalar_of(name, exit_index) for name in asks)]
        logits, *scalars = map(torch.from_numpy, _run(session, states, context, wanted))
        return ExitSignal(logits, dict(zip(asks, scalars, strict=True)))

    def join(self, parts: Sequence[tuple[Tensor, Context]]) -> tuple[Tensor, Context]:
        """Batches of the same depth as one, padded to the widest."""
        width = max(hidden.shape[1] for hidden, _ in parts)
        joined = torch.cat([pad(hidden, (0, 0, 0, width - hidden.shape[1])) for hidden, _ in parts])
        tokens = [_tokens(context) for _, context in parts]
        return joined, _context(torch.cat([pad(part, (0, width - part.shape[1])) for part in tokens]))


class OnnxClassifier(OperatingPoints):
    """A model that `export_onnx` wrote, for `predict`, `stream`, `collect_trace` and the pipeline.

    Layers run in ONNX Runtime, the policy is the very one that torch models use. Threads may share it.

    Examples:
        >>> import tempfile
        >>> import hf_earlyexit as ee
        >>> shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        >>> model = ee.EarlyExitBertForSequenceClassification(ee.EarlyExitBertConfig(vocab_size=9, **shape))
        >>> folder = tempfile.mkdtemp()
        >>> report = ee.export_onnx(model, folder, forms=["layers"])
        >>> ee.OnnxClassifier.from_pretrained(folder).exit_layers
        (1, 2)
    """

    training = False
    device = torch.device("cpu")

    def __init__(self, config: Any, read: Callable[[str], bytes], fingerprint: str, dtype: str, threads: int | None = None):
        self.config, self.fingerprint, self.dtype = config, fingerprint, getattr(torch, dtype)
        self.walker = OnnxWalker(config, read, threads or torch.get_num_threads())

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str], *, threads: int | None = None) -> Self:
        """Load the batched form of an exported folder, once each of its files has been found unchanged.

        Args:
            folder: what `export_onnx` wrote.
            threads: that one layer may use; as many as torch uses by default.

        Raises:
            CheckpointError: naming the file that is missing, damaged or changed.
            UsageError: for a folder that holds the one-file form only.
        """
        manifest = read_manifest(folder)
        if BEGIN not in manifest["files"]:
            raise UsageError(
                f"{folder} holds no layers, only one file for ONNX Runtime itself; export it with forms=['layers'].",
                field="forms",
            )
        config = _config(manifest["config"], Path(folder) / MANIFEST)
        return cls(
            config, lambda name: (Path(folder) / name).read_bytes(), manifest["fingerprint"], manifest["dtype"], threads
        )

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Layers (1-based) after which rows may leave, the last one included."""
        return self.walker.exit_layers

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the signals that the exported exits give."""
        return self.walker.signals

    def require_signals(self, names: Iterable[str]) -> None:
        """Refuse signals that the export does not hold.

        Raises:
            UsageError: naming the first, and what to do.
        """
        for name in names:
            if name not in self.signals:
                raise UsageError(
                    f"The export holds no {SIGNALS.get(name).words} ({name!r}): it holds what the model's policies asked "
                    "for when it was written. Set a policy that asks for them, or an operating point, and export again.",
                    field="exit_signals",
                    value=name,
                )

    def _accept(
        self, source: ExitPolicy | CalibrationResult, fingerprints: Fingerprints, name: str | None = None
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        accepted = super()._accept(source, fingerprints, name)
        policy = ExitPolicy.from_dict(accepted[0])
        self.require_signals(names_at(known_signals(policy.asks), last=policy.num_exits == 1))
        return accepted

    @property
    def num_labels(self) -> int:
        """Classes C."""
        return self.walker.num_classes

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: Tensor | np.ndarray,
        attention_mask: Tensor | np.ndarray | None = None,
        token_type_ids: Tensor | np.ndarray | None = None,
        early_exit: bool | None = None,
        operating_point: str | None = None,
        exit_signals: Sequence[str] | None = None,
        shadowed: Sequence[int] = (),
    ) -> EarlyExitClassifierOutput:
        """Classify a batch.

        Args:
            input_ids, attention_mask, token_type_ids: `[B, T]`, of torch or NumPy.
            early_exit, operating_point, exit_signals, shadowed: as in the torch model's `forward`.

        Raises:
            UsageError: for early exit without a policy.
            DataError: for inputs longer than the model takes, of another shape or with numbers that the model does not know,
                and for answers that are not finite.
        """
        policy = self.choose_policy(early_exit, operating_point, {})
        asks = self.signals_for(exit_signals, policy)
        input_ids = _ids("input_ids", input_ids, self.config.vocab_size, None)
        mask = None if attention_mask is None else _ids("attention_mask", attention_mask, 2, input_ids.shape)
        known, token_types = self.walker.segments, None
        if token_type_ids is not None and known is not None:  # models without token types pass them over
            token_types = _ids("token_type_ids", token_type_ids, known, input_ids.shape)
        limit = self.walker.longest
        if not 1 <= input_ids.shape[1] <= limit:
            raise DataError(
                f"The input is {input_ids.shape[1]} tokens long; this model takes 1 to {limit}. "
                "Pass truncation=True to the tokenizer, or split the text.",
                field="input_ids",
                value=input_ids.shape[1],
            )
        mask = torch.ones_like(input_ids) if mask is None else mask
        if len(input_ids):
            hidden, context = self.walker.begin_batch(input_ids, mask, token_types)
        else:
            hidden, context = torch.zeros(*input_ids.shape, self.config.hidden_size), _context(mask.bool())
        if policy is not None:
            early = run_early(self.walker, hidden, context, policy, self.num_labels, shadowed)
            check_finite(early.logits, range(len(input_ids)))
            return EarlyExitClassifierOutput(
                logits=early.logits,
                exit_layer=torch.tensor(self.exit_layers)[early.exit_index],
                exit_score=early.score,
                full_logits=early.full_logits if len(shadowed) else None,
            )
        exit_logits, scalars = run_all(self.walker, hidden, context, self.num_labels, asks)
        check_finite(exit_logits, range(len(input_ids)))
        depth = torch.full(hidden.shape[:1], self.exit_layers[-1])
        return EarlyExitClassifierOutput(
            logits=exit_logits[:, -1],
            exit_logits=exit_logits,
            exit_scalars=scalars or None,
            exit_layer=depth,
            full_logits=exit_logits[list(shadowed), -1] if len(shadowed) else None,
        )

    def modules(self) -> tuple[()]:
        """None: nothing here can be in training mode."""
        return ()


def _config(values: dict[str, Any], path: Path) -> Any:
    """The config that a manifest holds.

    Raises:
        CheckpointError: naming the manifest.
    """
    try:
        rest = {name: value for name, value in values.items() if name != "model_type"}
        config = AutoConfig.for_model(str(values.get("model_type")), **rest)
        if not isinstance(config, EarlyExitConfig):
            raise UsageError(f"model_type is {values.get('model_type')!r}, which has no exits.", field="model_type")
        return config
    except UNREADABLE as error:
        raise CheckpointError(
            f"The config in {path} cannot be used: {' '.join(str(error).split())}",
            field=getattr(error, "field", None),
            path=path,
        ) from error


def _ids(name: str, values: Any, count: int, shape: Any) -> Tensor:
    """Whole numbers `[B, T]` from 0 to `count - 1`, as int64.

    Raises:
        DataError: telling what came.
    """
    ids = torch.as_tensor(values)
    if ids.ndim != 2 or (shape is not None and ids.shape != shape):
        expected = "[rows, tokens]" if shape is None else str(list(shape))
        raise DataError(f"{name} has shape {list(ids.shape)}; expected {expected}.", field=name)
    whole = not (ids.is_complex() or (ids.is_floating_point() and bool((ids != ids.round()).any())))
    if not whole or bool(((ids < 0) | (ids >= count)).any()):
        raise DataError(f"{name} holds other numbers than the model knows; expected 0 to {count - 1}.", field=name)
    return ids.long()


def open_session(read: Callable[[str], bytes], name: str, threads: int) -> ort.InferenceSession:
    """One file of the export, ready to run.

    Raises:
        CheckpointError: naming the file.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # each session has threads of its own
    try:
        return ort.InferenceSession(read(name), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime has kinds of its own, below no common one
        first = str(error).strip().splitlines()[:1]
        raise CheckpointError(
            f"{name} is no ONNX file that runs here ({''.join(first)}). {AGAIN}", field=name, path=name
        ) from error


def _run(
    session: ort.InferenceSession, states: dict[str, Tensor], context: Context, wanted: list[str] | None = None
) -> list[np.ndarray]:
    given = {**states, TOKENS: _tokens(context)}
    found: list[np.ndarray] = session.run(wanted, {name: values.contiguous().numpy() for name, values in given.items()})
    return found


def _tokens(context: Context) -> Tensor:
    """Which tokens are real `[B, T]`: always known here."""
    assert context.tokens is not None
    return context.tokens


def _context(tokens: Tensor) -> Context:
    return Context(tokens=tokens, lengths=row_lengths(tokens))
