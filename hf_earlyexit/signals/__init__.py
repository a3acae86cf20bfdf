"""What exits tell beside their logits: one file per signal, known by name. Importing this does not import transformers."""

from .base import (
    LOGITS,
    SIGNALS,
    ExitPoint,
    ExitSignal,
    Lack,
    Signal,
    SignalSource,
    known_signals,
    missing,
    names_at,
    register_signal,
    scalars_of,
    signals_of,
)
from .gate import GateSignal
from .similarity import SimilaritySignal

__all__ = [
    "LOGITS",
    "SIGNALS",
    "ExitPoint",
    "ExitSignal",
    "GateSignal",
    "Lack",
    "Signal",
    "SignalSource",
    "SimilaritySignal",
    "known_signals",
    "missing",
    "names_at",
    "register_signal",
    "scalars_of",
    "signals_of",
]
