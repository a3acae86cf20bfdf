"""Copies of an engine behind Ray Serve, which starts more of them when more requests come.

    pip install "hf_earlyexit[ray,serve]"
    python examples/ray_serve.py bert-with-exits
    curl http://127.0.0.1:8000/ -d '{"inputs": ["not bad at all"]}'

Each copy is a process with one thread. A text joins others that are under way in its process, and leaves when it is decided.
"""

import argparse
import asyncio
import time

import ray
import torch
from ray import serve
from starlette.requests import Request

import hf_earlyexit as ee
from hf_earlyexit.scale.ray import load_served

AUTOSCALING = {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 32}


@serve.deployment(autoscaling_config=AUTOSCALING, max_ongoing_requests=256, ray_actor_options={"num_cpus": 1})
class Classifier:
    def __init__(self, folder: str, operating_point: str | None) -> None:
        torch.set_num_threads(1)
        self.model, parts = load_served(folder)
        self.engine, self.operating_point = ee.Engine(self.model, **parts), operating_point

    async def __call__(self, request: Request) -> list[dict]:
        texts = (await request.json())["inputs"]
        futures = [self.engine.submit(text, operating_point=self.operating_point) for text in texts]
        return [self.told(answer) for answer in await asyncio.gather(*map(asyncio.wrap_future, futures))]

    def told(self, answer: ee.serving.predict.Answer) -> dict:
        score, index = answer.logits.softmax(-1).max(-1)
        label = self.model.config.id2label[int(index)]
        return {"label": label, "score": float(score), "exit_layer": answer.exit_layer, "reason": answer.reason}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--operating_point")
    args = parser.parse_args()
    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": args.port})
    serve.run(Classifier.bind(args.model, args.operating_point))
    print(f"http://127.0.0.1:{args.port}/", flush=True)
    while True:
        time.sleep(1)


if __name__ == "__main__":
    main()
