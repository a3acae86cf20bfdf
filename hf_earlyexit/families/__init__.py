"""Families of networks: the only place that knows transformers' layer lists."""

from .base import Backbone, Context
from .decoders import DecoderBackbone, TokenContext, decoder_backbone
from .text import BertBackbone

__all__ = ["Backbone", "BertBackbone", "Context", "DecoderBackbone", "TokenContext", "decoder_backbone"]
