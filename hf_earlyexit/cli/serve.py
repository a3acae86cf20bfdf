"""Answer over HTTP: `/predict` and `/rerank` as clients of text-embeddings-inference send them, `/v1/classify` with exits.

    hf-earlyexit serve bert-with-exits
    HF_EARLYEXIT_API_KEY=secret hf-earlyexit serve bert-with-exits --host 0.0.0.0

Only this machine is listened to unless --host says otherwise. SIGTERM finishes what was accepted; SIGHUP loads the model
anew.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..errors import UsageError
from .answer import Answer
from .arguments import DeviceArguments

LOOPBACK, API_KEY = "127.0.0.1", "HF_EARLYEXIT_API_KEY"


@dataclass
class ServeArguments(DeviceArguments):
    """Which model, where, and how much at most."""

    model: str = field(metadata={"help": "folder or Hub id of a model with exits"})
    host: str = field(default=LOOPBACK, metadata={"help": "address to listen at; 0.0.0.0 is every one of this machine"})
    port: int = field(default=8000, metadata={"help": "0 takes a free one"})
    operating_point: str | None = field(default=None, metadata={"help": "of requests that name none"})
    max_rows: int = field(default=32, metadata={"help": "most rows of a request"})
    max_body: int = field(default=2_000_000, metadata={"help": "most bytes of a request"})
    max_characters: int = field(default=100_000, metadata={"help": "most characters of a row"})
    max_queue: int = field(default=512, metadata={"help": "most rows that wait; further ones are answered by 429"})
    max_seconds: float = field(default=30.0, metadata={"help": "most seconds that a request waits; then 503"})
    max_batch_tokens: int | None = field(default=None, metadata={"help": "padded tokens in a batch; as suits the device"})


ARGUMENTS = (ServeArguments,)


def run(args: ServeArguments) -> Answer:
    """Serve until told to stop."""
    from ..server.rows import Limits
    from ..server.run import Serving, serve  # brings FastAPI

    for name in ("max_rows", "max_body", "max_characters", "max_queue"):
        if getattr(args, name) < 1:
            raise UsageError(f"{name} is {getattr(args, name)}; expected at least 1.", field=name)
    if not 0 <= args.port <= 65535:
        raise UsageError(f"port is {args.port}; expected 0 to 65535.", field="port", value=args.port)
    if not args.max_seconds > 0:
        raise UsageError(f"max_seconds is {args.max_seconds}; expected seconds, above 0.", field="max_seconds")
    limits = Limits(
        max_rows=args.max_rows,
        max_body=args.max_body,
        max_characters=args.max_characters,
        max_seconds=args.max_seconds,
    )
    serving = Serving(
        partial(_load, args),
        args.max_queue,
        args.max_batch_tokens,
        limits=limits,
        operating_point=args.operating_point,
        api_key=os.environ.get(API_KEY) or None,
    )
    (model,) = serving.engine.models.values()
    model.choose_policy(None, args.operating_point, {})  # an unknown one is refused now
    serve(serving, args.host, args.port)
    return Answer({"model": args.model, "stopped": True}, "stopped")


def _load(args: ServeArguments) -> tuple[Any, dict[str, Any]]:
    """The model and what reads its rows."""
    from transformers import AutoImageProcessor, AutoTokenizer

    from ..serving.reader import reads_images
    from .loading import load_model

    model = load_model(args.model, args.device)
    part = ("image_processor", AutoImageProcessor) if reads_images(model) else ("tokenizer", AutoTokenizer)
    return model, {part[0]: part[1].from_pretrained(args.model)}
