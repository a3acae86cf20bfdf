"""Give an image classifier exits, train them, choose thresholds, and see which pictures leave early.

Without arguments: draws shapes and trains a small ViT on them, offline. --dataset: a folder with a folder of pictures per
class, in one of train/, validation/ and test/ or not, or a Hub id; --model: a plain ViT, DeiT, BEiT or DINOv2.
"""

import argparse
from random import Random

from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from PIL import Image as Picture
from PIL import ImageDraw
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessorPil, set_seed

import hf_earlyexit as ee

COLOURS = ["red", "green", "blue", "yellow"]


def drawn(count, seed):
    """Two shapes on grey; the class is the colour of the larger, and the less it is larger, the harder."""
    random, rows = Random(seed), {"image": [Picture.new("RGB", (32, 32), "#777777") for _ in range(count)], "label": []}
    for picture in rows["image"]:
        pair, small = random.sample(range(len(COLOURS)), 2), random.uniform(3, 6.5)
        sizes = random.uniform(small + 0.7, 8), small
        for x, size, colour in zip(random.sample((8, 23), 2), sizes, pair, strict=True):
            at, sides = (x, random.randint(8, 23), size), random.randint(3, 8)
            ImageDraw.Draw(picture).regular_polygon(at, sides, fill=COLOURS[colour])
        rows["label"].append(pair[0])
    return Dataset.from_dict(rows, Features({"image": Image(), "label": ClassLabel(names=COLOURS)}))


def read(name):
    """Splits train, validation (chooses thresholds) and test; those that are missing are parted off at random."""
    if name is None:
        return {"train": drawn(4000, 0), "validation": drawn(600, 1), "test": drawn(600, 2)}
    splits = load_dataset(name)
    for new, source, share in (("validation", "train", 0.2), ("test", "validation", 0.5)):
        if new not in splits:
            splits[source], splits[new] = splits[source].train_test_split(share, seed=0).values()
    return splits


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or Hub id of a plain image encoder; by default a small ViT is trained")
    parser.add_argument("--dataset", help="folder of pictures or Hub id; by default, shapes are drawn")
    parser.add_argument("--out", default="build/images", help="folder for the model and its report")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    set_seed(0)
    splits, name = read(args.dataset), args.model or f"{args.out}/plain"
    if args.model is None:
        shape = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 128}
        ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **shape)).save_pretrained(name)
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(name)
    names = splits["train"].features["label"].names
    labels = {"id2label": dict(enumerate(names)), "label2id": {label: number for number, label in enumerate(names)}}
    model = ee.from_pretrained(name, task="image-classification", ignore_mismatched_sizes=True, **labels)
    reading = {"image_processor": AutoImageProcessor.from_pretrained(name)}
    recipe = {"max_steps": args.steps, "learning_rate": 1e-3, "per_device_train_batch_size": 64, "warmup_steps": 0.1}
    settings = ee.EarlyExitTrainingArguments(args.out, **recipe, save_strategy="no", report_to=[], logging_steps=100)
    ee.EarlyExitTrainer(model, settings, train_dataset=splits["train"], processing_class=reading["image_processor"]).train()
    held_back, test = (ee.collect_trace(model, splits[s], split=s, **reading) for s in ("validation", "test"))
    print("\naccuracy of each exit on test:", *(f"{value:.3f}" for value in test.quality.mean(0)))
    model.set_exit_policy(result := ee.calibrate(held_back, "confidence", ee.MaxDrop(0.01)))
    judged = ee.replay(result.policy, test)
    print(f"full model {judged.full_quality:.4f}, early {judged.quality:.4f} after {judged.mean_layers:.2f} layers")
    ee.save(model, args.out, calibration=result, **reading)
    shown = {"label_names": names, "pictures": (pictures := splits["test"]["image"])}
    ee.reports.write_report(test, f"{args.out}/report.html", policy=result.policy, **shown)
    answers = ee.pipeline("image-classification", model=args.out)(pictures[:8])
    for answer, label in zip(answers, splits["test"]["label"], strict=False):
        print(f"layer {answer[0]['exit_layer']}  {answer[0]['label']} ({answer[0]['score']:.2f}), really {names[label]}")
    print(f"\nOpen {args.out}/report.html in a browser.")


if __name__ == "__main__":
    main()
