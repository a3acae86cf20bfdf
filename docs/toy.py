"""A toy for the examples of this documentation: reviews that call a film good or bad, and a tiny BERT to read them.

Also plain pictures, and a tiny captioner that has learned nothing. The models start from random numbers, so everything
here runs in seconds without a network. It is no benchmark.
"""

import random

from datasets import Dataset
from transformers import BertTokenizer, set_seed

import hf_earlyexit as ee

LABELS = {0: "negative", 1: "positive"}
FILLERS = ["film", "plot", "cast", "music", "and", "also"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "not", *FILLERS]


def make_tokenizer() -> BertTokenizer:
    """A tokenizer for the toy's few words."""
    return BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}, model_max_length=32)


def make_rows(count: int, seed: int = 0) -> Dataset:
    """Short reviews with labels: three or five verdicts, each turned around by a "not" before it; the majority decides."""
    draw = random.Random(seed)
    texts, labels = [], []
    for _ in range(count):
        words, balance = [], 0
        for _ in range(draw.choice([3, 5])):
            verdict, turned = draw.choice(["bad", "good"]), draw.random() < 0.3
            words += [draw.choice(FILLERS), *["not"] * turned, verdict]
            balance += 1 if (verdict == "good") != turned else -1
        texts.append(" ".join(words))
        labels.append(int(balance > 0))
    return Dataset.from_dict({"text": texts, "label": labels})


def encode(rows: Dataset) -> Dataset:
    """Token ids beside texts and labels."""
    tokenizer = make_tokenizer()
    return rows.map(lambda batch: tokenizer(batch["text"]), batched=True)


def make_config(**fields: object) -> ee.EarlyExitBertConfig:
    """Four layers of width 32, an exit after each."""
    shape = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    shape |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    names = {"id2label": LABELS, "label2id": {name: number for number, name in LABELS.items()}}
    return ee.EarlyExitBertConfig(**{"vocab_size": len(WORDS), "max_position_embeddings": 32, **shape, **names, **fields})


def make_model(**fields: object) -> ee.EarlyExitBertForSequenceClassification:
    """A new model; fields of the configuration may be given."""
    set_seed(0)
    return ee.EarlyExitBertForSequenceClassification(make_config(**fields))


def trained_model() -> ee.EarlyExitBertForSequenceClassification:
    """A model that has seen 1,000 reviews."""
    model = make_model()
    args = ee.EarlyExitTrainingArguments(
        "toy-run", num_train_epochs=6, learning_rate=3e-3, per_device_train_batch_size=32,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    rows, tokenizer = encode(make_rows(1000)), make_tokenizer()
    ee.EarlyExitTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer).train()
    return model.eval()


def make_pictures(count: int = 4) -> list:
    """Pictures of one colour each."""
    from PIL import Image

    return [Image.new("RGB", (64, 48), (60 * number % 256, 200 - 40 * number, 90)) for number in range(count)]


def make_captioner(**fields: object) -> tuple:
    """A captioner of four decoder layers that has learned nothing, its tokenizer and its image processor."""
    from transformers import GPT2Config, ViTConfig, ViTImageProcessorPil

    set_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    encoder = ViTConfig(**shape, image_size=16, patch_size=8)
    decoder = GPT2Config(
        vocab_size=len(WORDS), n_embd=32, n_layer=4, n_head=2, n_positions=32, add_cross_attention=True,
        bos_token_id=2, eos_token_id=3, initializer_range=0.3,
    )  # fmt: skip
    config = ee.EarlyExitVisionEncoderDecoderConfig(encoder=encoder, decoder=decoder, **fields)
    model = ee.EarlyExitVisionEncoderDecoder(config).eval()
    for settings in (model.config, model.generation_config):
        settings.decoder_start_token_id, settings.eos_token_id, settings.pad_token_id = 2, 3, 0
    model.generation_config.max_new_tokens = 8
    return model, make_tokenizer(), ViTImageProcessorPil(size={"height": 16, "width": 16})
