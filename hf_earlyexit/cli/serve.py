"""Answer over HTTP: `/predict` and `/rerank` as clients of text-embeddings-inference send them, `/v1/classify` with exits.

    hf-earlyexit serve bert-with-exits
    hf-earlyexit serve bert-with-exits --workers 4 --monitor monitor.json --shadow 0.01
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
from ..values import check_whole, unexpected
from .arguments import DeviceArguments, FormArguments, given
from .command_result import CommandResult

LOOPBACK, API_KEY = "127.0.0.1", "HF_EARLYEXIT_API_KEY"
TEXTS, PICTURES, RANKING = SERVED = ("text-classification", "image-classification", "text-ranking")


@dataclass
class ServeArguments(FormArguments, DeviceArguments):
    """Which model, where, and how much at most."""

    model: str = field(metadata={"help": "folder or Hub id of a model with exits, or a folder of ONNX files"})
    task: str | None = field(default=None, metadata={"help": f"{', '.join(SERVED)}: refuses a model for another"})
    host: str = field(default=LOOPBACK, metadata={"help": "address to listen at; 0.0.0.0 is every one of this machine"})
    port: int = field(default=8000, metadata={"help": "0 takes a free one"})
    workers: int = field(
        default=1, metadata={"help": "processes, each with one thread; 0 is one for each core; 1 uses all threads"}
    )
    operating_point: str | None = field(default=None, metadata={"help": "of requests that name none"})
    max_rows: int = field(default=32, metadata={"help": "most rows of a request"})
    max_body: int = field(default=2_000_000, metadata={"help": "most bytes of a request"})
    max_characters: int = field(default=100_000, metadata={"help": "most characters of a row"})
    max_tokens: int | None = field(
        default=None, metadata={"help": "most tokens of a row; longer texts are cut, or refused if truncate is false"}
    )
    max_pixels: int = field(default=25_000_000, metadata={"help": "most pixels of a picture"})
    max_queue: int = field(default=512, metadata={"help": "most rows that wait, of a process; further ones get 429"})
    max_seconds: float = field(
        default=30.0,
        metadata={"help": "most seconds that a request, its body, or a client in between, waits; then 503, 408, or an end"},
    )
    max_batch_tokens: int | None = field(default=None, metadata={"help": "padded tokens in a batch; as suits the device"})
    monitor: str | None = field(
        default=None, metadata={"help": "file in which a monitor keeps what it sees; `hf-earlyexit monitor` prints it"}
    )
    limit: float | None = field(
        default=None,
        metadata={
            "help": "with monitor: largest share of answers that may differ from the full model's; as was promised of "
            "disagreement, or 0.02"
        },
    )
    shadow: float = field(default=0.01, metadata={"help": "with monitor: share of rows the full model answers as well"})
    fall_back: bool = field(default=False, metadata={"help": "with monitor: run every layer after an alarm"})


ARGUMENTS = (ServeArguments,)


def run(args: ServeArguments) -> CommandResult:
    """Serve until told to stop."""
    from ..server.rows import Limits
    from ..server.run import Serving, serve  # brings FastAPI

    _check(args)
    limits = Limits(
        max_rows=args.max_rows,
        max_body=args.max_body,
        max_characters=args.max_characters,
        max_tokens=args.max_tokens,
        max_pixels=args.max_pixels,
        max_seconds=args.max_seconds,
    )
    engine = {"max_queue": args.max_queue, "max_batch_tokens": args.max_batch_tokens, "max_length": args.max_tokens}
    watch = None
    if args.monitor is not None:
        watch = {"path": args.monitor, "limit": args.limit, "shadow": args.shadow, "fall_back": args.fall_back}
        watch["operating_point"] = args.operating_point
    app = {"limits": limits, "operating_point": args.operating_point, "api_key": os.environ.get(API_KEY) or None}
    make = partial(Serving, partial(_load, args), engine, watch, app)
    if args.workers == 1:
        serve(make(), args.host, args.port, args.max_seconds)
    else:
        from ..server.workers import serve_in_workers

        serve_in_workers(make, args.host, args.port, args.workers or _cores(), args.max_seconds)
    return CommandResult({"model": args.model, "stopped": True}, "stopped")


def _check(args: ServeArguments) -> None:
    check_whole(1, **given(args, "max_rows", "max_body", "max_characters", "max_queue", "max_tokens", "max_pixels"))
    check_whole(workers=args.workers)
    check_whole(0, 65535, port=args.port)
    if args.limit is not None and args.monitor is None:
        raise UsageError("limit is that of a monitor; name the file it keeps its counts in with --monitor.", field="limit")
    if args.task not in (None, *SERVED):
        raise unexpected("task", args.task, ", ".join(SERVED))
    if not args.max_seconds > 0:
        raise UsageError(f"max_seconds is {args.max_seconds}; expected seconds, above 0.", field="max_seconds")


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load(args: ServeArguments) -> tuple[Any, dict[str, Any]]:
    """The model and what reads its rows.

    Raises:
        UsageError: for a model of another task, or that cannot do what the flags ask.
    """
    from ..serving.reader import reads_images
    from .loading import in_form, load_exported_or_model, reading_parts

    model = in_form(load_exported_or_model(args.model, args.device), args)
    images = reads_images(model)
    task = PICTURES if images else RANKING if len(model.config.id2label) == 1 else TEXTS
    if args.task not in (None, task):
        raise UsageError(f"{args.model} is a model for {task}, not for {args.task}.", field="task", value=args.task)
    if images and args.max_tokens is not None:
        raise UsageError(f"max_tokens is for texts, and {args.model} reads pictures.", field="max_tokens")
    model.choose_policy(None, args.operating_point, {})  # an unknown one is refused now
    return model, reading_parts(args.model, model)
