"""Full models behind servers of others, for `load.py`: Ray Serve, LitServe and infinity.

Ray Serve comes with `hf_earlyexit[ray]`, LitServe with `pip install litserve`. infinity needs an environment of its own, as
it works with an older transformers only:

    pip install torch==2.13.0 "infinity-emb[server,optimum,torch]==0.0.78" optimum==2.1.0 transformers==4.48.3 "pyarrow<22"
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

try:
    from litserve import LitAPI, LitServer
except ImportError:
    LitAPI = object

MOST, WAIT, QUEUE = 32, 0.005, 512  # of a dynamic batch: rows, and seconds of the first; rows that may wait
STOCK = "stock"  # of the work folder: what infinity loads
Answer = Callable[[list[str]], list[int]]


def left_out(name: str, infinity: Path | None) -> str | None:
    """Why a contestant cannot take part."""
    kind = name.split("-", 1)[-1]
    missing = infinity is None if kind == "infinity" else kind in ("ray", "litserve") and find_spec(kind) is None
    return "not installed" if missing else None


def serve_ray(load: Callable[[], Answer], port: int) -> None:
    """Ray Serve on one replica, whose `@serve.batch` holds what `load` gives."""
    os.environ |= {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    import ray
    from ray import serve

    @serve.deployment(max_ongoing_requests=2 * MOST, max_queued_requests=QUEUE, ray_actor_options={"num_cpus": 1})
    class Batches:
        def __init__(self) -> None:
            self.answer_all = load()

        @serve.batch(max_batch_size=MOST, batch_wait_timeout_s=WAIT)
        async def answer(self, texts: list[str]) -> list[int]:
            return await asyncio.to_thread(self.answer_all, texts)

        async def __call__(self, request: Any) -> list[dict[str, str]]:
            texts = (await request.json())["inputs"]
            return [{"label": str(label)} for label in await asyncio.gather(*map(self.answer, texts))]

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Batches.bind())
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    serve.shutdown()


class LitBatches(LitAPI):
    """Batches that LitServe gathers; `load` gives what answers them."""

    load: Callable[[], Answer]

    def setup(self, device: str) -> None:
        self.answer_all = self.load()

    def decode_request(self, request: dict[str, list[str]]) -> str:
        (text,) = request["inputs"]
        return text

    def predict(self, texts: list[str]) -> list[int]:
        return self.answer_all(texts)

    def encode_response(self, label: int) -> list[dict[str, str]]:
        return [{"label": str(label)}]


def serve_litserve(load: Callable[[], Answer], port: int) -> None:
    """LitServe with one worker, and its HTTP in the first process."""
    batches = LitBatches(max_batch_size=MOST, batch_timeout=WAIT, api_path="/v1/classify")
    batches.load = load
    server, quiet = LitServer(batches, accelerator="cpu"), {"log_level": "warning", "access_log": False}
    server.run("127.0.0.1", port, 1, api_server_worker_type="thread", generate_client_file=False, **quiet)


def infinity_command(python: Path, form: str, port: int) -> list[str]:
    """infinity on the folder it is started in: as given to it, ONNX files are found in no other."""
    engine = "torch" if form == "torch" else "optimum"
    words = [str(python), "-c", INFINITY, "v2", "--model-id", ".", "--engine", engine, "--device", "cpu"]
    words.append("--no-model-warmup")  # of texts that are too long, which `optimum` does not cut
    return [*words, "--batch-size", str(MOST), "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]


# It has no option for the threads of ONNX Runtime, which takes all cores.
INFINITY = """
import onnxruntime

class OneThread(onnxruntime.InferenceSession):
    def __init__(self, path, sess_options=None, **options):
        sess_options = sess_options or onnxruntime.SessionOptions()
        sess_options.intra_op_num_threads = 1
        super().__init__(path, sess_options=sess_options, **options)

onnxruntime.InferenceSession = OneThread
from infinity_emb.cli import cli
cli()
"""
