"""Exits learned by reward: train all phases, look at the gates, serve with them, and draw a curve from one model.

    python examples/consistentee.py [--model FOLDER_OR_HUB_ID] [--dataset FOLDER_OR_HUB_ID] [--out FOLDER] [--alpha PRICE]

Without --model: a tiny BERT of random numbers that learns questions to a bank (examples/data) in about a minute, offline; it
shows how things work and says nothing about real models.
"""

import argparse
from pathlib import Path

from transformers import AutoTokenizer, BertTokenizer, set_seed

import hf_earlyexit as ee
from hf_earlyexit.training.data import encode, label_names, load_splits, with_ids


def tiny(texts, names):
    """A tokenizer of the commonest words and a BERT of 4 layers, both made on the spot."""
    words = [word for text in texts for word in text.lower().split()]
    common = sorted(set(words), key=lambda word: (-words.count(word), word))[:1500]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *common]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}, model_max_length=64)
    shape = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 128}
    config = ee.EarlyExitBertConfig(vocab_size=len(vocabulary), exit_gate="mlp", **shape, **names)
    return tokenizer, ee.EarlyExitBertForSequenceClassification(config)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a real BERT; a tiny one of random numbers by default")
    parser.add_argument("--dataset", default=str(Path(__file__).parent / "data"), help="splits train, validation and test")
    parser.add_argument("--out", default="build/consistentee")
    parser.add_argument("--alpha", type=float, default=0.05)
    args = parser.parse_args()
    set_seed(0)
    splits = load_splits(args.dataset)
    labels = dict(enumerate(label_names(splits["train"])))
    names = {"id2label": labels, "label2id": {name: label for label, name in labels.items()}}
    if args.model:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = ee.EarlyExitBertForSequenceClassification.from_pretrained(args.model, exit_gate="mlp", **names)
    else:
        tokenizer, model = tiny(splits["train"]["text"], names)
    train = encode(with_ids(splits["train"], "idx"), tokenizer, 64, keep=["idx"])  # each row's own id, from its content
    held_back, test = (encode(splits[name], tokenizer, 64) for name in ("validation", "test"))

    settings = ee.ConsistentTrainingArguments(
        args.out, alpha=args.alpha, num_train_epochs=3 if args.model else 6, learning_rate=5e-5 if args.model else 4e-3,
        chosen_learning_rate=2e-5 if args.model else 1e-3, gate_learning_rate=1e-3, per_device_train_batch_size=64,
        save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1000,
    )  # fmt: skip
    trainer = ee.ConsistentTrainer(model, settings, train, held_back, processing_class=tokenizer)
    log = trainer.train(resume_from_checkpoint=True)  # begins, or goes on where a run in this folder was stopped
    print("\nphase         last exit  gates at one half   leaving after layer 1, 2, ...")
    for phase in trainer.phases:
        last = [entry for entry in log if entry["phase"] == phase.folder][-1]
        shares = " ".join(f"{last[f'exit_{layer}_share']:6.1%}" for layer in model.exit_layers)
        print(f"{phase.folder:13s} {last[f'exit_{model.exit_layers[-1]}_quality']:9.3f} {last['gate_quality']:10.3f}"
              f" at {last['gate_layers']:.2f}  {shares}")  # fmt: skip
    print(
        "\nhardness of the training rows, by layer:", {k: round(v, 3) for k, v in trainer.hardness_table.histogram().items()}
    )

    trace, report = (ee.collect_trace(model, rows, tokenizer=tokenizer, progress=False) for rows in (held_back, test))
    half = ee.policies.GatePolicy.half(trace.num_exits)
    chosen = ee.calibrate(trace, "gate", ee.MaxDrop(0.005)).policy  # another threshold: another point of the same gates
    for name, policy in (("one half", half), ("calibrated", chosen), ("full model", half.with_thresholds(None))):
        done = ee.replay(policy, report)
        print(f"{name:11s} accuracy {done.quality:.3f} on test rows, at {done.mean_layers:.2f} layers")
    model.set_exit_policy(half)
    trainer.save_model()
    answers = ee.predict(model, splits["test"]["text"][:3], tokenizer=tokenizer)
    print("\nserved, leaving after layers", answers.exit_layer.tolist(), "- saved to", args.out)


if __name__ == "__main__":
    main()
