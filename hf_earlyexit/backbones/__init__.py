"""Families of networks: the only place that knows transformers' layer lists."""

from .base import Backbone, Context
from .text import BertBackbone

__all__ = ["Backbone", "BertBackbone", "Context"]
