"""Caption pictures with words that leave the decoder early, and write a page that shows where each word left.

Without --model and --images: draws shapes, trains a small captioner with exits on them, and captions others, all offline.
"""

import argparse
from random import Random

import transformers
from PIL import Image, ImageDraw
from transformers import BertTokenizer, GPT2Config, Trainer, TrainingArguments, ViTConfig, ViTImageProcessorPil

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
        pictures, texts = zip(*(draw(random) for _ in range(count)), strict=True)
        pixels = processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        labels = tokenizer([f"{text} [SEP]" for text in texts], add_special_tokens=False, return_tensors="pt")["input_ids"]
        return [{"pixel_values": one, "labels": label} for one, label in zip(pixels, labels, strict=True)]

    recipe = {"max_steps": steps, "learning_rate": 2e-3, "per_device_train_batch_size": 64, "warmup_steps": 0.1}
    args = TrainingArguments(out, **recipe, save_strategy="no", report_to=[], logging_steps=100)
    Trainer(model, args, train_dataset=rows(3000)).train()  # every exit at once: in training that is the model's loss
    batch = transformers.default_data_collator(rows(500))
    said = model.eval()(**batch, early_exit=False).exit_logits.detach()  # [pictures, tokens, exits, words]
    trace = ee.ExitTrace(logits=said.flatten(0, 1), labels=batch["labels"].flatten(), exit_layers=model.exit_layers)
    print("\nshare of right words at each exit:", *(f"{share:.3f}" for share in trace.quality.mean(0)))
    # A rule by hand; `ee.calibrate(trace, "confidence", ee.MaxDrop(0.01))` chooses thresholds that may lose a little.
    model.set_exit_policy(ee.ConfidencePolicy(thresholds=(0.9,) * 5))
    ee.save(model, out, tokenizer=tokenizer, image_processor=processor)


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
    ee.caption_page(images, early, f"{args.out}/captions.html", num_layers=pipe.model.exit_layers[-1], full=full)
    print(f"\nOpen {args.out}/captions.html in a browser.")


if __name__ == "__main__":
    main()
