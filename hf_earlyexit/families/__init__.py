"""Families of networks: the only place that knows transformers' layer lists."""

from . import causal, text, vision
from .base import Family
from .context import Context

FAMILIES: dict[str, Family] = text.FAMILIES | vision.FAMILIES | causal.FAMILIES
"""The rows, by transformers' model type."""

__all__ = ["FAMILIES", "Context", "Family"]
