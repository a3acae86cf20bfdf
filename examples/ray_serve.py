"""Copies of an engine behind Ray Serve, which starts more of them when more requests come.

    pip install "hf_earlyexit[ray,serve]"
    python examples/ray_serve.py bert-with-exits
    curl http://127.0.0.1:8000/v1/classify -H 'Content-Type: application/json' -d '{"inputs": ["not bad at all"]}'

Each copy is a process with one thread, which answers as `hf-earlyexit serve` does. A text joins others that are under way in
its process, and leaves when it is decided.
"""

import argparse
import signal

import ray
import torch
from fastapi import FastAPI
from ray import serve

import hf_earlyexit as ee
from hf_earlyexit.scale.ray import load_served
from hf_earlyexit.server.app import make_app

AUTOSCALING = {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 32}


@serve.deployment(
    autoscaling_config=AUTOSCALING,
    max_ongoing_requests=256,  # of a copy
    max_queued_requests=512,  # for which no copy has room; others are refused
    ray_actor_options={"num_cpus": 1},
)
@serve.ingress()
class Classifier:
    def __init__(self, folder: str, operating_point: str | None) -> None:
        torch.set_num_threads(1)
        model, self.parts = load_served(folder)
        self.engine, self.operating_point = ee.Engine(model, **self.parts), operating_point

    def __serve_build_asgi_app__(self) -> FastAPI:
        options = {"parts": self.parts, "operating_point": self.operating_point}
        return make_app(self.engine, on_stop=self.engine.close, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a model with exits, or a folder of ONNX files")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--operating_point")
    args = parser.parse_args()
    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": args.port})
    serve.run(Classifier.bind(args.model, args.operating_point))
    print(f"http://127.0.0.1:{args.port}", flush=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    serve.shutdown()


if __name__ == "__main__":
    main()
