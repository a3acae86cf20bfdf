"""Families of networks: the only place that knows transformers' layer lists."""

from .base import Family
from .context import Context
from .text import FAMILIES

__all__ = ["FAMILIES", "Context", "Family"]
