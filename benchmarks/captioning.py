"""Early exit on a captioner: every policy against the full model, a static half, and the clock.

    python benchmarks/captioning_data.py  --out build/captioning     # once: vocabulary, encoder, features
    python benchmarks/captioning_train.py full12 static6 --out build/captioning
    python benchmarks/captioning_eval.py  full12 static6 --out build/captioning
    python benchmarks/captioning_exits.py tuned linear whole --out build/captioning
    python benchmarks/captioning.py frozen whole --out build/captioning

writes benchmarks/results/captioning-<name>.json: `frozen` adds exits to a trained decoder, `whole` trained both together.

Thresholds are chosen on photos of dev by captions really written, CIDEr photo by photo; figures are those of test, which
nothing was chosen on. Times are ratios of decoding, the encoder's part told beside, interleaved in one run.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captioning_data import IMAGE_SIZE, load_captions, load_encoder, load_features, load_tokenizer, run_parser
from captioning_metrics import TOKENISER, per_photo, score
from transformers import VisionEncoderDecoderModel
from transformers.modeling_outputs import BaseModelOutput

import hf_earlyexit as ee
from hf_earlyexit.calibration.generation import settings_curve
from hf_earlyexit.timing import compare_speed

RESULTS = Path(__file__).parent / "results"
TARGETS = {
    "at least as good on dev": ee.MaxDrop(0.0),
    "1.67x in layers on dev": ee.SpeedUp(1.67),
    "1.8x in layers on dev": ee.SpeedUp(1.8),
}
FROZEN = {  # rule: model, signal, policy
    "saturation": ("tuned", "vocabulary", "saturation"),
    "gate": ("tuned", "vocabulary", "gate"),
    "confidence, shortlist": ("tuned", "shortlist", "confidence"),
    "margin, shortlist": ("tuned", "shortlist", "margin"),
    "beem-c, shortlist": ("tuned", "shortlist", "beem-c"),
    "confidence, tuned": ("tuned", "vocabulary", "confidence"),
    "confidence": ("linear", "vocabulary", "confidence"),
    "margin": ("linear", "vocabulary", "margin"),
    "patience": ("linear", "vocabulary", "patience"),
    "beem-c": ("linear", "vocabulary", "beem-c"),
    "beem-a": ("linear", "vocabulary", "beem-a"),
    "static": ("tuned", "vocabulary", "static"),
}
WHOLE = {rule: ("whole", *parts) for rule, (_, *parts) in FROZEN.items() if rule != "confidence, tuned"}
RULES = {"frozen": FROZEN, "whole": {"all layers": ("whole", "vocabulary", "full"), **WHOLE}}


def cider(captions: list[str], references: list[list[str]]) -> list[float]:
    """CIDEr of each caption."""
    return list(per_photo(captions, references)["CIDEr"])


class Captioner:
    """A model, a policy and a way to write captions from the encoder's features."""

    def __init__(
        self, model: VisionEncoderDecoderModel, policy: ee.policies.ExitPolicy | None, signal: str = "vocabulary"
    ) -> None:
        self.model, self.policy, self.signal = model, policy, signal

    def write(self, features: np.ndarray, batch_size: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Ids and, from a model with exits, the layer of each token, per batch."""
        options = {}
        if isinstance(self.model, ee.EarlyExitVisionEncoderDecoder):
            self.model.config.exit_signal = self.signal
            self.model.set_exit_policy(self.policy)
            options = {"return_exit_layers": True}
        ids, layers = [], []
        for first in range(0, len(features), batch_size):
            hidden = torch.from_numpy(features[first : first + batch_size].astype(np.float32))
            output = self.model.generate(encoder_outputs=BaseModelOutput(last_hidden_state=hidden), **options)
            ids.append(output.sequences if options else output)
            layers += [output.exit_layers] if options else []
        return ids, layers


def judge(captioner: Captioner, tokenizer, features: np.ndarray, references: list) -> dict:
    """Scores on one split, and mean layers."""
    ids, layers = captioner.write(features, 50)
    captions = [text for batch in ids for text in tokenizer.batch_decode(batch, skip_special_tokens=True)]
    left = torch.cat([part.flatten() for part in layers]) if layers else torch.zeros(0)
    mean = float(left[left > 0].float().mean()) if len(left) else float(captioner.model.config.decoder.n_layer)
    row = {"photos": len(captions), "mean_layers": mean, "layer_speed_up": 12 / mean, **score(captions, references)}
    return row | {"captions": captions, "per_photo": np.asarray(cider(captions, references)), "shares": _shares(left)}


def apart(row: dict, other: dict) -> dict[str, float]:
    """CIDEr's difference to another row, photo by photo."""
    each = row["per_photo"] - other["per_photo"]
    return {"difference": float(each.mean()), "standard_error": float(each.std() / len(each) ** 0.5)}


def _shares(left: torch.Tensor) -> list[float]:
    return [float((left[left > 0] == layer).float().mean()) for layer in range(1, 13)] if len(left) else []


def time_decoding(captioners: dict[str, Captioner], features: np.ndarray, batch_size: int, repeats: int) -> dict:
    """Decoding time of each against the full model's, in turn."""
    runs = {
        name: (lambda captioner=captioner: captioner.write(features, batch_size)) for name, captioner in captioners.items()
    }
    return {name: timing._asdict() for name, timing in compare_speed(runs, "full model", repeats).items()}


def compare(rules: dict[str, tuple[str, str, str]], known: dict[str, Any], args: argparse.Namespace) -> dict:
    """Every rule's thresholds from dev, or known ones, and what they do on test and on the clock."""
    out, seed = args.out, args.seed
    tokenizer, start = load_tokenizer(out), time.perf_counter()
    models = {
        name: ee.EarlyExitVisionEncoderDecoder.from_pretrained(out / f"{name}-{seed}").eval()
        for name in sorted({name for name, *_ in rules.values()})
    }
    whole = ee.EarlyExitVisionEncoderDecoder.from_pretrained(out / f"full12-{seed}").eval()
    half = VisionEncoderDecoderModel.from_pretrained(out / f"static6-{seed}").eval()
    dev, test = load_features(out, "dev")[: args.dev], load_features(out, "test")
    dev_captions, test_captions = load_captions("dev")[: args.dev], load_captions("test")
    captioners = {"full model": Captioner(whole, None), "half-depth model": Captioner(half, None)}
    rows, chosen = {}, {}
    rows["full model"] = judge(captioners["full model"], tokenizer, test, test_captions)
    rows["half-depth model"] = judge(captioners["half-depth model"], tokenizer, test, test_captions)
    for rule, (name, signal, policy) in rules.items():
        model = models[name]
        model.config.exit_signal = signal
        if policy == "full":
            policies = {"12 of 12 layers": None}
        elif policy == "static":
            layers = model.exit_layers
            policies = {"6 of 12 layers": ee.policies.StaticPolicy.at(layers.index(6), len(layers))}
        elif known:
            found = {key: values for key, values in known.items() if key.startswith(f"{rule}: ")}
            chosen |= found
            policies = {
                key.split(": ")[1]: ee.policies.ExitPolicy.from_dict(v) for key, v in found.items() if "refused" not in v
            }
        else:
            result = ee.generation.calibrate_generation(
                model,
                [{"encoder_hidden_states": torch.from_numpy(states.astype(np.float32))} for states in dev],
                policy,
                ee.MaxDrop(0.0),
                tokenizer=tokenizer,
                references=dev_captions,
                metric=cider,
                proposals=args.proposals,
                batch_size=50,
                progress=False,
            )
            print(f"{rule}\n{result}", flush=True)
            curve = settings_curve(result.settings)
            policies = {}
            for target, goal in TARGETS.items():
                try:
                    thresholds = result.settings[goal.pick(curve)].thresholds
                except ee.EarlyExitError as error:
                    chosen[f"{rule}: {target}"] = {"refused": str(error)}
                    continue
                policies[target] = result.policy.with_thresholds(thresholds)
        for target, ready in policies.items():
            key = f"{rule}: {target}"
            captioners[key] = Captioner(model, ready, signal)
            rows[key] = judge(captioners[key], tokenizer, test, test_captions)
            chosen[key] = ready and ready.to_dict()
            shown = {name: value for name, value in rows[key].items() if isinstance(value, float)}
            print(key, {name: round(value, 4) for name, value in shown.items()}, flush=True)
    full, own = rows["full model"], rows.get("all layers: 12 of 12 layers")
    for name, row in rows.items():
        row["against_full"] = apart(row, full)
        if own is not None and name in chosen:
            row["against_own_depth"] = apart(row, own)
    plain = np.asarray(full["captions"])
    for name, row in rows.items():
        row["same_caption"] = float(np.mean(np.asarray(row["captions"]) == plain))
        row["examples"] = row.pop("captions")[:5]
        row.pop("per_photo")
        if name in captioners:
            row["signal"] = captioners[name].signal
    timings = {
        f"batch {batch}": time_decoding(captioners, test[:count], batch, args.repeats)
        for batch, count in zip((1, 8), args.timed, strict=True)
    }
    pixels = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    encoder = load_encoder(out)[0]
    one = test[:1]
    share = compare_speed(
        {"decode": lambda: captioners["full model"].write(one, 1), "encode": lambda: encoder(pixels)}, "decode", args.repeats
    )
    return {
        "data": "Flickr8k", "seed": seed, "dev_photos": len(dev), "test_photos": len(test), "tokeniser": TOKENISER,
        "vocabulary": len(tokenizer), "rows": rows, "policies": chosen, "decode_time": timings,
        "encoder_over_decode": share["encode"].seconds / share["decode"].seconds, "repeats": args.repeats,
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
                    "torch": torch.__version__},
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }  # fmt: skip


def main() -> None:
    parser = run_parser(__doc__, RULES)
    parser.add_argument("--dev", type=int, default=300, help="photos that choose thresholds")
    parser.add_argument("--known", action="store_true", help="take the thresholds that the last run chose")
    parser.add_argument("--proposals", type=int, default=24)
    parser.add_argument("--timed", type=int, nargs=2, default=(12, 48), help="photos timed at batch 1 and batch 8")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    for name in args.names:
        file = RESULTS / f"captioning-{name}.json"
        report = compare(RULES[name], json.loads(file.read_text())["policies"] if args.known else {}, args)
        file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
