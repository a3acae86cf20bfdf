"""An exported model in Python, with the interface of the torch model where it serves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
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
from ..families import FAMILIES, Family
from ..families.base import IMAGE
from ..families.context import Context, row_lengths
from ..modeling.certificate import Fingerprints
from ..modeling.configuration import UNREADABLE, EarlyExitConfig
from ..modeling.finite import check_finite
from ..modeling.operating import OperatingPoints
from ..modeling.outputs import EarlyExitClassifierOutput, early_output, full_output
from ..policies import ExitPolicy
from ..serving.batching import pad_batch, padding_token
from ..serving.rows import check_any_token, check_ids
from ..serving.tables import PIXELS
from ..serving.walker import BatchWalker
from ..signals import SIGNALS, ExitSignal, known_signals, names_at
from ..walking.loop import run_all, run_early
from . import ONNX_STATIC
from .inputs import check_picture, picture_batch, text_batch
from .layer_files import BEGIN, exit_file, layer_file
from .manifest import AGAIN, MANIFEST, ONE_FILE, read_manifest
from .one_row import OneRow
from .walk import SIGNAL, TOKENS, hidden_after, logits_of, scalar_of


class OnnxWalker(BatchWalker):
    """Walks an exported model layer by layer; sessions are shared by threads.

    Args:
        config: the model's.
        read: gives the bytes of a file.
        threads: that one layer may use.
    """

    best_batch_tokens = 384  # fewer cost layers of width 384 in 8 bits 5 %; more gain nothing at any width measured
    device = torch.device("cpu")

    def __init__(self, config: Any, read: Callable[[str], bytes], threads: int) -> None:
        self.config = config
        self.exit_layers = tuple(config.exit_layers)
        self.num_classes = config.num_labels
        family = FAMILIES[config.stock_model_type]
        self.images = family.task == IMAGE
        if not self.images:  # a config takes its time to answer, so it is not asked for every row
            self.known = (config.vocab_size, family.longest(config), family.segments_of(config))
        self._begin = open_session(read, BEGIN, threads)
        self._layers = [open_session(read, layer_file(layer), threads) for layer in range(1, config.num_hidden_layers + 1)]
        self._exits = [open_session(read, exit_file(index), threads) for index in range(len(self.exit_layers))]
        self._read = [{info.name for info in session.get_inputs()} for session in self._exits]  # asking takes long
        names = [info.name for info in self._exits[0].get_outputs() if info.name.startswith(SIGNAL)]
        self.signals = tuple(name.removeprefix(SIGNAL).rpartition("_")[0] for name in names)
        self.one_row: OneRow | None = None

    @property
    def picture(self) -> tuple[int, ...]:
        """Channels, height and width of the pictures it was exported for."""
        return tuple(self._begin.get_inputs()[0].shape[1:])

    def check(self, row: Any, number: int) -> DataError | None:
        """What keeps the model from reading this row, if anything."""
        if self.images:
            why = check_picture(row[PIXELS].shape, self.picture)
            return None if why is None else DataError(f"Row {number} {why}", field="rows", value=tuple(row[PIXELS].shape))
        ids = check_ids(row, number, *self.known)
        return ids or check_any_token(row, number)  # runtimes differ in what attention to nothing gives

    def length(self, row: Any) -> int:
        """Tokens of a row; of a picture, its patches."""
        return self._begin.get_outputs()[0].shape[1] if self.images else super().length(row)

    def begin(self, rows: Sequence[Any]) -> tuple[Tensor, Context]:
        """Hidden states `[B, T, H]` before the first layer, and their context."""
        return self.begin_batch(self.read(dict(pad_batch(rows, padding_token(self.config)))))

    def read(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """A batch as the first graph takes it, checked: see `text_batch` and `picture_batch`."""
        if self.images:
            return picture_batch(given, self.picture)
        return text_batch(given, *self.known)

    def begin_batch(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Context]:
        """As `begin`, from what `read` gives."""
        mask, rows = batch.get("attention_mask"), next(iter(batch.values()))
        if not len(rows):
            width = self._begin.get_outputs()[0].shape[1] if self.images else rows.shape[1]
            return torch.zeros(0, width, self.config.hidden_size), _context(None if mask is None else mask.bool())
        (hidden,) = self._begin.run(None, {name: values.contiguous().numpy() for name, values in batch.items()})
        return torch.from_numpy(hidden), _context(None if mask is None else mask.bool())

    def run_layer(self, layer: int, hidden: Tensor, context: Context) -> Tensor:
        """Hidden states after layer `layer` (1-based)."""
        return torch.from_numpy(_run(self._layers[layer - 1], {hidden_after(layer - 1): hidden}, context)[0])

    def exit_signal(
        self, exit_index: int, hidden: Tensor, context: Context, asks: Sequence[str] = (), before: Tensor | None = None
    ) -> ExitSignal:
        """What exit `exit_index` (0-based) tells: see `walking.step.Walker`."""
        session, layer = self._exits[exit_index], self.exit_layers[exit_index]
        states = {hidden_after(layer): hidden}
        if before is not None and hidden_after(layer - 1) in self._read[exit_index]:
            states[hidden_after(layer - 1)] = before
        wanted = [logits_of(exit_index), *(scalar_of(name, exit_index) for name in asks)]
        logits, *scalars = map(torch.from_numpy, _run(session, states, context, wanted))
        return ExitSignal(logits, dict(zip(asks, scalars, strict=True)))

    def alone(self, row: Any, policy: ExitPolicy | None) -> tuple[Tensor, int, Tensor] | None:
        """What a row leaves with by the one-file form, if that holds the policy."""
        if policy is None or self.one_row is None or policy != self.one_row.policy:
            return None
        logits, layer, score = self.one_row(self.read(dict(pad_batch([row], padding_token(self.config)))))
        return logits, self.exit_layers.index(int(layer)), score

    def join(self, parts: Sequence[tuple[Tensor, Context]]) -> tuple[Tensor, Context]:
        """Batches of the same depth as one, padded to the widest."""
        width = max(hidden.shape[1] for hidden, _ in parts)
        joined = torch.cat([pad(hidden, (0, 0, 0, width - hidden.shape[1])) for hidden, _ in parts])
        tokens = [pad(c.tokens, (0, width - c.tokens.shape[1])) for _, c in parts if c.tokens is not None]
        return joined, _context(torch.cat(tokens) if tokens else None)


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

    def __init__(
        self,
        config: Any,
        read: Callable[[str], bytes],
        fingerprint: str,
        dtype: str,
        threads: int | None = None,
        static: bool = False,
    ) -> None:
        self.config, self.fingerprint, self.dtype, self.static = config, fingerprint, getattr(torch, dtype), static
        self.threads = threads or torch.get_num_threads()
        self.walker = OnnxWalker(config, read, self.threads)

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str], *, threads: int | None = None) -> Self:
        """Load the batched form of an exported folder, once each of its files has been found unchanged.

        Where the folder holds the one-file form as well, a row that comes alone runs through that: in a call, in `predict`,
        and in an `Engine` that has nothing else to do.

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

        def read(name: str) -> bytes:
            return (Path(folder) / name).read_bytes()

        model = cls(config, read, manifest["fingerprint"], manifest["dtype"], threads, manifest["static"])
        if ONE_FILE in manifest["files"] and config.exit_policy is not None:
            model.walker.one_row = OneRow(partial(open_session, read, ONE_FILE, model.threads), dict(config.exit_policy))
        return model

    @property
    def family(self) -> Family:
        """The row of the model's family."""
        return FAMILIES[self.config.stock_model_type]

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Layers (1-based) after which rows may leave, the last one included."""
        return self.walker.exit_layers

    @property
    def form(self) -> str:
        """Of its answers: see `convert`."""
        return ONNX_STATIC if self.static else "onnx-int8" if self.dtype == torch.int8 else "onnx"

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
        input_ids: Tensor | np.ndarray | None = None,
        attention_mask: Tensor | np.ndarray | None = None,
        token_type_ids: Tensor | np.ndarray | None = None,
        early_exit: bool | None = None,
        operating_point: str | None = None,
        exit_signals: Sequence[str] | None = None,
        shadowed: Sequence[int] = (),
        pixel_values: Tensor | np.ndarray | None = None,
    ) -> EarlyExitClassifierOutput:
        """Classify a batch.

        Args:
            input_ids, attention_mask, token_type_ids: `[B, T]`, of torch or NumPy.
            early_exit, operating_point, exit_signals, shadowed: as in the torch model's `forward`.
            pixel_values: `[B, channels, height, width]` of an image classifier.

        Raises:
            UsageError: for early exit without a policy, and inputs of another kind of model.
            DataError: for inputs longer than the model takes, of another shape or with numbers that the model does not know,
                and for answers that are not finite.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        batch = self.walker.read({**given, PIXELS: pixel_values})
        plain = early_exit is None or early_exit is True
        plain = plain and operating_point is None and exit_signals is None and not len(shadowed)
        one_row = self.walker.one_row if plain and len(next(iter(batch.values()))) == 1 else None
        if one_row is not None and self.config.exit_policy == one_row.values:  # the file holds it: none need be made of it
            logits, layer, score = one_row(batch)
            check_finite(logits, [0])
            return EarlyExitClassifierOutput(logits=logits, exit_layer=layer, exit_score=score)
        policy = self.choose_policy(early_exit, operating_point, {})
        asks = self.signals_for(exit_signals, policy)
        hidden, context = self.walker.begin_batch(batch)
        if policy is not None:
            early = run_early(self.walker, hidden, context, policy, self.num_labels, shadowed)
            check_finite(early.logits, range(len(hidden)))
            return early_output(early, self.exit_layers)
        exit_logits, scalars = run_all(self.walker, hidden, context, self.num_labels, asks)
        check_finite(exit_logits, range(len(hidden)))
        return full_output(exit_logits, scalars, self.exit_layers[-1], shadowed)

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
    given = states if context.tokens is None else {**states, TOKENS: context.tokens}
    outputs: list[np.ndarray] = session.run(wanted, {name: values.contiguous().numpy() for name, values in given.items()})
    return outputs


def _context(tokens: Tensor | None) -> Context:
    """Of rows whose real tokens `[B, T]` are known; of pictures, which have no others."""
    return Context() if tokens is None else Context(tokens=tokens, lengths=row_lengths(tokens))
