"""Caption pictures with words that leave the decoder early, and write a page that shows where each word left.

Without --model and --images: draws shapes, trains a small captioner with exits on them, and captions others, all offline.
"""

import argparse
from random import Random

import transformers
from PIL import Image, ImageDraw
from transformers import BertTokenizer, GPT2Config, ViTConfig, ViTImageProcessorPil

import hf_earlyexit as ee

COLOURS, SIDES = ["red", "green", "blue", "yellow", "white"], {"circle": 24, "square": 4, "triangle": 3}
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "a", "beside", "above", *COLOURS, *SIDES]


def draw(random):
    """Two shapes on grey, and what to say of them."""
    picture, phrases, place = Image.new("RGB", (32, 32), "#777777"), [], random.choice(["beside", "above"])
    for near, far in ((8, random.randint(10, 22)), (24, random.randint(10, 22))):
        colour, shape = random.choice(COLOURS), random.choice(list(SIDES))
        at = (near, far, 7) if place == "beside" else (far, near, 7)
        ImageDraw.Draw(picture).regular_polygon(at, SIDES[shape], fill=colour)
        phrases.append(f"a {colour} {shape}")
    return picture, f" {place} ".join(phrases)


def train(out, steps):
    transformers.set_seed(0)
    random, processor = Random(0), ViTImageProcessorPil(size={"height": 32, "width": 32})
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})
    small = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    encoder = ViTConfig(image_size=32, patch_size=8, **small)
    decoder = {"vocab_size": len(WORDS), "n_embd": 64, "n_layer": 6, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    parts = {"encoder": encoder, "decoder": GPT2Config(**decoder, add_cross_attention=True), "exit_head": "tuned"}
    model = ee.EarlyExitVisionEncoderDecoder(ee.EarlyExitVisionEncoderDecoderConfig(**parts))
    for settings in (model.config, model.generation_config):
        settings.decoder_start_token_id, settings.pad_token_id, settings.eos_token_id = 1, 0, 2
    model.generation_config.max_new_tokens = 12

    def rows(count):
        return [dict(zip(("image", "captions"), draw(random), strict=True)) for _ in range(count)]

    recipe = {"max_steps": steps, "learning_rate": 2e-3, "per_device_train_batch_size": 64, "warmup_steps": 0.1}
    args = ee.EarlyExitTrainingArguments(out, **recipe, save_strategy="no", report_to=[], logging_steps=100)
    train, judged = (ee.captions.CaptionRows(rows(count), processor, tokenizer) for count in (3000, 500))
    trainer = ee.captions.EarlyExitCaptioningTrainer(model, args, train_dataset=train, eval_dataset=judged)
    trainer.train()
    right = [value for name, value in trainer.evaluate().items() if name.endswith("token_accuracy")]
    print("\nshare of right words at each exit:", *(f"{share:.3f}" for share in right))
    held_back, inputs = rows(150), {"image_processor": processor, "tokenizer": tokenizer}
    wanted = {"target": ee.MaxDrop(0.01), "references": [row["captions"] for row in held_back]}
    result = ee.generation.calibrate_generation(model, held_back, "confidence", **wanted, **inputs)
    print(result)
    model.set_exit_policy(result)
    ee.save(model, out, calibration=result, **inputs)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or Hub id of a captioner with exits; by default one is trained")
    parser.add_argument("--images", nargs="+", help="pictures to caption")
    parser.add_argument("--out", default="build/captioner", help="folder for a model that is trained, and for the page")
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    if args.model is None:
        train(args.out, args.steps)
    images = args.images or [draw(random)[0].resize((320, 320), 0) for random in map(Random, range(10_000, 10_012))]
    pipe = ee.pipeline("early-exit-captioning", model=args.model or args.out)
    early, full = pipe(images, batch_size=8), pipe(images, batch_size=8, early_exit=False)
    for caption in early:
        print(f"{caption['mean_exit_layer']:.2f}", *(f"{one['word']}/{one['exit_layer']}" for one in caption["words"]))
    ee.captions.caption_page(images, early, f"{args.out}/captions.html", num_layers=pipe.model.exit_layers[-1], full=full)
    print(f"\nOpen {args.out}/captions.html in a browser.")


if __name__ == "__main__":
    main()
