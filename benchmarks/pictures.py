"""Exits on a real ViT-S, learned and judged on CIFAR-10, on one core of a CPU.

    python benchmarks/pictures.py                  # everything, about 15 minutes of one core, then the page
    python benchmarks/pictures.py --page           # only docs/results-pictures.md, from the committed results

The backbone is a DINOv2-small that was trained on for saliency (`HF_EARLYEXIT_DATA`/weights). The backbone stays as it is;
every exit, the last one as well, is a linear map that learns from the states of all training rows, which are computed once.
Rows that choose thresholds trained nothing, and rows that judge chose nothing: the test file, and what is left of the
training file. Writes benchmarks/results/pictures.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from importlib.metadata import version
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoImageProcessor, ViTModel, set_seed

import hf_earlyexit as ee
from hf_earlyexit.images import open_image
from hf_earlyexit.serving.pictures import PictureRows
from hf_earlyexit.timing import compare_speed

ROOT = Path(__file__).parent
RESULTS, PAGE = ROOT / "results" / "pictures.json", ROOT.parent / "docs" / "results-pictures.md"
DATA = Path(os.environ.get("HF_EARLYEXIT_DATA", "../shared/data"))
BACKBONE = "weights/vit-small-patch14-dinov2-saliency"
SIDE = 112
ROWS = {"train": 6000, "held-back": 2000, "spare": 2000, "test": 2000}
POLICIES = ("confidence", "margin", "patience", "beem-a", "beem-calibrated", "reward")
TARGETS = ("max-drop:0", "speed-up:1.3", "speed-up:1.5", "speed-up:2")
TIMED = 200


def load_rows() -> dict[str, datasets.Dataset]:
    """Pictures and labels of each part; the training file is split at random, once."""
    files = {split: str(DATA / "cifar10" / f"{split}.parquet") for split in ("train", "test")}
    found = datasets.load_dataset("parquet", data_files=files)
    train, test = found["train"].shuffle(seed=0), found["test"].select(range(ROWS["test"]))
    bounds = [0, *accumulate(ROWS[part] for part in ("train", "held-back", "spare"))]
    learn, choose, spare = (train.select(range(*ends)) for ends in pairwise(bounds))
    return {"train": learn, "held-back": choose, "report": datasets.concatenate_datasets([test, spare])}


def make_model(out: Path, names: list[str]) -> tuple[Any, Any]:
    """The backbone for pictures of `SIDE` pixels, with an exit after every layer that knows nothing yet."""
    plain = ViTModel.from_pretrained(DATA / BACKBONE, dtype=torch.float32, add_pooling_layer=False)
    with torch.no_grad():
        places = torch.zeros(1, 1 + (SIDE // plain.config.patch_size) ** 2, plain.config.hidden_size)
        plain.embeddings.position_embeddings.data = plain.embeddings.interpolate_pos_encoding(places, SIDE, SIDE)
    plain.config.image_size = SIDE
    plain.save_pretrained(out)
    set_seed(0)
    model = ee.from_pretrained(
        out, task="image-classification", exit_head="linear-mean", id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )  # fmt: skip
    processor = AutoImageProcessor.from_pretrained(DATA / BACKBONE, size={"height": SIDE, "width": SIDE}, backend="pil")
    return model.eval(), processor


def heads_of(model: Any) -> list[torch.nn.Linear]:
    """The linear maps of all exits, the last one included."""
    return [head.classifier for head in model.exit_heads.values()] + [model.classifier]


@torch.no_grad()
def collect_features(model: Any, processor: Any, rows: datasets.Dataset) -> tuple[Tensor, Tensor]:
    """What every exit's linear map reads `[N, E, H]`, and labels `[N]`."""
    read: list[Tensor] = []
    handles = [head.register_forward_pre_hook(lambda _, given: read.append(given[0])) for head in heads_of(model)]
    features = []
    for start in range(0, len(rows), 50):
        pictures = rows[start : start + 50]["image"]
        opened = [open_image(one) for one in pictures]
        model(processor(images=opened, return_tensors="pt")["pixel_values"], early_exit=False)
        features.append(torch.stack(read, 1))
        read.clear()
    for handle in handles:
        handle.remove()
    return torch.cat(features), torch.tensor(rows["label"])


def learn_heads(model: Any, features: Tensor, labels: Tensor) -> list[float]:
    """Fit every exit's linear map by itself; each picks its weight decay on a sixth of the training rows.

    Returns:
        The weight decays.
    """
    cut, chosen = len(features) * 5 // 6, []
    for index, head in enumerate(heads_of(model)):
        own = features[:, index]
        mean, spread = own.mean(0), own.std(0) + 1e-6
        scaled = (own - mean) / spread
        scores = {
            decay: _accuracy(_fit(scaled[:cut], labels[:cut], decay), scaled[cut:], labels[cut:])
            for decay in (1e-4, 1e-3, 1e-2, 1e-1)
        }
        chosen.append(max(scores, key=lambda decay: scores[decay]))
        weight, bias = _fit(scaled, labels, chosen[-1])
        with torch.no_grad():
            head.weight.copy_(weight / spread)
            head.bias.copy_(bias - (weight / spread) @ mean)
    return chosen


def _fit(inputs: Tensor, labels: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(int(labels.max()) + 1, inputs.shape[1], requires_grad=True)
    bias = torch.zeros(len(weight), requires_grad=True)
    steps = torch.optim.LBFGS([weight, bias], max_iter=100, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        steps.zero_grad()
        loss = cross_entropy(inputs @ weight.T + bias, labels) + decay * weight.square().sum() / 2
        loss.backward()
        return loss

    steps.step(closure)
    return weight.detach(), bias.detach()


def _accuracy(line: tuple[Tensor, Tensor], inputs: Tensor, labels: Tensor) -> float:
    return float(((inputs @ line[0].T + line[1]).argmax(-1) == labels).float().mean())


def judge(model: Any, processor: Any, rows: dict[str, datasets.Dataset]) -> dict[str, Any]:
    """Every policy's points, chosen on held-back rows and judged on test rows, and what is really served."""
    traces = {
        part: ee.collect_trace(model, rows[part], image_processor=processor, split=part, progress=False)
        for part in ("held-back", "report")
    }
    report = traces["report"]
    accuracy = (report.logits.argmax(-1) == report.labels[:, None]).float().mean(0).tolist()
    chosen = (traces["held-back"].logits.argmax(-1) == traces["held-back"].labels[:, None]).float().mean(0).tolist()
    points, results = {}, {}
    for policy in POLICIES:
        for target in TARGETS:
            result = ee.calibrate(traces["held-back"], policy, target)
            done = ee.replay(result.policy, report)
            results[policy, target] = result
            points[f"{policy}|{target}"] = {
                "accuracy": done.quality, "full_accuracy": done.full_quality, "standard_error": done.standard_error,
                "mean_layers": done.mean_layers, "layer_speed_up": done.layer_speed_up,
                "static": _static(accuracy, report.exit_layers, done.mean_layers),
            }  # fmt: skip
    served = results["confidence", "max-drop:0"]
    model.set_exit_policy(served)
    answers = ee.predict(model, rows["report"], image_processor=processor)
    early = report.exit_layers.index
    replayed = served.policy.decide(served.policy.scan(report).scores)
    same = [early(layer) == int(index) for layer, index in zip(answers.exit_layer.tolist(), replayed, strict=True)]
    few = PictureRows(rows["report"].select(range(TIMED)), processor)[:]
    runs = {
        name: lambda early=early: ee.predict(model, few, early_exit=early)
        for name, early in (("full", False), ("early", True))
    }
    timing = compare_speed(runs, "full", 3)["early"]
    return {
        "exit_layers": list(report.exit_layers),
        "report_accuracy": accuracy,
        "held_back_accuracy": chosen,
        "points": points,
        "served": {
            "accuracy": float((answers.logits.argmax(-1) == report.labels).float().mean()),
            "exit_shares": {str(layer): float((answers.exit_layer == layer).float().mean()) for layer in report.exit_layers},
            "same_exit_as_replayed": sum(same),
            "rows": len(same),
            "time_speed_up": timing.speed_up,
            "time_middle_half": [timing.low, timing.high],
            "timed_rows": TIMED,
        },
    }


def _static(accuracy: list[float], layers: tuple[int, ...], mean_layers: float) -> dict[str, Any]:
    """The model cut off at the first exit that costs at least as much."""
    index = next(place for place, layer in enumerate(layers) if layer >= mean_layers - 1e-9)
    return {"layer": layers[index], "accuracy": accuracy[index]}


def run(out: Path) -> None:
    torch.set_num_threads(1)
    rows = load_rows()
    names = dict(zip(rows["report"]["label"], rows["report"]["label_text"], strict=True))
    model, processor = make_model(out / "plain", [names[number] for number in sorted(names)])
    start = time.process_time()
    decays = learn_heads(model, *collect_features(model, processor, rows["train"]))
    results = judge(model, processor, rows)
    results["cpu_minutes"] = round((time.process_time() - start) / 60, 1)
    results["setting"] = {
        "rows": {name: len(part) for name, part in rows.items()}, "side": SIDE, "weight_decays": decays,
        "versions": {name: version(name) for name in ("hf_earlyexit", "torch", "transformers")},
    }  # fmt: skip
    ee.save(model, out / "model", image_processor=processor, card=False)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def _gains(results: dict[str, Any]) -> str:
    """How often early exit reads more than the full model, of the settings chosen for a speed-up of 1.3."""
    full = results["report_accuracy"][-1]
    chosen = [point for name, point in results["points"].items() if name.endswith("|speed-up:1.3")]
    gains = [(point["accuracy"] - full) / point["standard_error"] for point in chosen]
    return (
        f"Chosen for a speed-up of 1.3, {sum(gain > 0 for gain in gains)} of {len(gains)} policies are more accurate than "
        f"full depth, {sum(gain > 2 for gain in gains)} by more than two standard errors."
    )


def page(results: dict[str, Any]) -> str:
    """The page of what was measured."""
    full, setting, served = results["report_accuracy"][-1], results["setting"], results["served"]
    exits = [
        f"| {layer} | {value:.3f} |" for layer, value in zip(results["exit_layers"], results["report_accuracy"], strict=True)
    ]
    lines = []
    for name, point in results["points"].items():
        policy, target = name.split("|")
        lines.append(
            f"| {policy} | {target} | {point['layer_speed_up']:.2f}x | {100 * point['accuracy']:.1f} | "
            f"{100 * (point['accuracy'] - full):+.1f} ± {100 * point['standard_error']:.1f} | "
            f"{100 * point['static']['accuracy']:.1f} after layer {point['static']['layer']} |"
        )
    rows = setting["rows"]
    return "\n".join([
        "# Results of pictures",
        "",
        "Generated by `python benchmarks/pictures.py` from `benchmarks/results/pictures.json`; nothing is typed by hand.",
        "",
        f"A real ViT-S of 12 layers (DINOv2-small, trained on for saliency) on CIFAR-10, pictures of {setting['side']} "
        "pixels. The backbone stays as it is; each exit, the last one too, is a linear map that learned from "
        f"{rows['train']:,} pictures. Thresholds are chosen on {rows['held-back']:,} others and judged on "
        f"{rows['report']:,}, the test file and what was left of the training file: one seed, {results['cpu_minutes']} "
        "minutes of one core.",
        "",
        f"The full model reads {100 * full:.1f} %; differences below two standard errors are none. {_gains(results)}",
        "",
        "| policy | target | layer speed-up | accuracy, % | against the full model, points | cut off at the same cost, % |",
        "|---|---|---|---|---|---|",
        *lines,
        "",
        "*Cut off at the same cost*: the model that always stops at the first exit that runs at least as many layers.",
        "",
        f"Served by `predict` with confidence for max-drop:0, {served['same_exit_as_replayed']:,} of {served['rows']:,} "
        f"pictures left where the replay says, at {100 * served['accuracy']:.1f} %. In time that was "
        f"{served['time_speed_up']:.2f}x, middle half {served['time_middle_half'][0]:.2f} to "
        f"{served['time_middle_half'][1]:.2f} ({served['timed_rows']} pictures, in turns, on a machine that was busy with "
        "other work: not to be relied on).",
        "",
        "## Every exit alone",
        "",
        "| layer | accuracy |",
        "|---|---|",
        *exits,
        "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/pictures"))
    parser.add_argument("--page", action="store_true", help="only write the page")
    args = parser.parse_args()
    if not args.page:
        run(args.out)
    PAGE.write_text(page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
