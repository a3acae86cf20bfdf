"""Image classifiers learn from columns of pictures, files and pixel values alike, and keep their image processor."""

import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from transformers import AutoImageProcessor

import hf_earlyexit as ee
from hf_earlyexit.errors import DataError, TrainingError
from tests.families.tiny import IMAGES, new_model
from tests.serving.test_pictures import PROCESSOR, as_bytes, pictures, pixels

COUNT = 24


@pytest.fixture(autouse=True)
def images():
    return pictures(COUNT, seed=4)


def table(images, names=("a", "b", "c")):
    values = {"image": [as_bytes(one) for one in images], "label": [number % 3 for number in range(len(images))]}
    return Dataset.from_dict(values, features=Features({"image": ImageFeature(), "label": ClassLabel(names=list(names))}))


def prepared(batch):
    return {"pixel_values": list(pixels([one.convert("RGB") for one in batch["image"]])), "label": batch["label"]}


class Rows(torch.utils.data.Dataset):
    def __init__(self, images):
        self.pixels = pixels(images)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, place):
        return {"pixel_values": self.pixels[place], "labels": place % 3}


def files(images, folder):
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    return [{"image": str(folder / f"{number}.png"), "label": number % 3} for number in range(len(images))]


FORMS = {
    "column": lambda images, folder: table(images),
    "undecoded": lambda images, folder: table(images).cast_column("image", ImageFeature(decode=False)),
    "as torch": lambda images, folder: table(images).with_format("torch"),
    "transform": lambda images, folder: table(images).with_transform(prepared),
    "pixel values": lambda images, folder: table(images).map(prepared, batched=True, remove_columns=["image"]),
    "files": files,
    "PIL": lambda images, folder: [{"img": one, "label": number % 3} for number, one in enumerate(images)],
    "torch rows": lambda images, folder: Rows(images),
    "streamed": lambda images, folder: table(images).to_iterable_dataset(),
}


def trained(arguments, rows, name="vit", **fields):
    model = new_model(name)
    options = {"processing_class": PROCESSOR, **fields}
    args = arguments(**{"max_steps": 2, "per_device_train_batch_size": 12, "train_sampling_strategy": "sequential"})
    trainer = ee.EarlyExitTrainer(model, args, train_dataset=rows, eval_dataset=rows, **options)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def expected():
    return {}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_pictures_teaches_the_same(form, images, tmp_path, arguments, expected):
    trainer = trained(arguments, FORMS[form](images, tmp_path))
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    start = new_model("vit").state_dict()
    assert not torch.equal(weights["exit_heads.1.classifier.weight"], start["exit_heads.1.classifier.weight"])
    first = expected.setdefault("weights", weights)
    assert all(torch.allclose(weights[name], first[name], atol=1e-6) for name in first)
    metrics = trainer.evaluate()
    trace = ee.collect_trace(
        trainer.model.eval(), table(images), image_processor=PROCESSOR, progress=False
    )  # what is served sees the same pictures
    accuracy = (trace.logits.argmax(-1) == trace.labels[:, None]).double().mean(0)
    assert [metrics[f"eval_exit_{layer}_accuracy"] for layer in (1, 2, 3)] == pytest.approx(accuracy.tolist(), abs=1e-6)


def test_predict_and_evaluate_open_rows_given_to_them(images, arguments):
    trainer, rows = trained(arguments, table(images)), table(images[:6])
    with torch.inference_mode():
        expected = trainer.model.eval()(pixel_values=pixels(images[:6])).logits
    assert torch.allclose(torch.tensor(trainer.predict(rows).predictions), expected, atol=1e-5)
    assert torch.allclose(torch.tensor(trainer.predict(rows.remove_columns("label")).predictions), expected, atol=1e-5)
    right = float((expected.argmax(-1) == torch.arange(6) % 3).double().mean())
    assert trainer.evaluate(rows)["eval_exit_3_accuracy"] == pytest.approx(right)


@pytest.mark.parametrize("name", IMAGES)
def test_what_is_trained_is_saved_with_its_image_processor_and_served(name, images, tmp_path, arguments):
    trainer = trained(arguments, table(images), name)
    trainer.save_model(tmp_path / "model")
    pipe = ee.pipeline("image-classification", model=tmp_path / "model")
    assert pipe.image_processor.to_dict() == AutoImageProcessor.from_pretrained(tmp_path / "model").to_dict()
    assert pipe.image_processor.size == PROCESSOR.size
    predictions = trainer.predict(table(images)).predictions
    found = ee.predict(pipe.model, images, image_processor=pipe.image_processor).logits
    assert torch.allclose(found, torch.tensor(predictions), atol=1e-5)


def test_checkpoints_hold_the_image_processor_and_are_taken_up(images, tmp_path, arguments):
    def run(steps, folder, **options):
        args = arguments(
            output_dir=str(tmp_path / folder), max_steps=steps, per_device_train_batch_size=8, save_steps=2,
            save_strategy="steps", seed=3,
        )  # fmt: skip
        trainer = ee.EarlyExitTrainer(new_model("vit"), args, train_dataset=table(images), processing_class=PROCESSOR)
        trainer.train(**options)
        return trainer.model.state_dict()

    straight = run(4, "straight")
    assert AutoImageProcessor.from_pretrained(tmp_path / "straight" / "checkpoint-2").size == PROCESSOR.size
    run(2, "cut")
    resumed = run(4, "cut", resume_from_checkpoint=True)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_a_run_ends_with_its_best_weights(images, tmp_path, arguments):
    args = arguments(
        output_dir=str(tmp_path), max_steps=2, learning_rate=0.3, save_strategy="steps", eval_strategy="steps", save_steps=1,
        eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    rows = table(images)
    trainer = ee.EarlyExitTrainer(
        new_model("vit"), args, train_dataset=rows, eval_dataset=rows, processing_class=PROCESSOR
    )  # the first step is the worst, and is taken for the best
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    best = type(trainer.model).from_pretrained(tmp_path / "checkpoint-1").state_dict()
    assert all(torch.equal(value, best[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("accumulated", [2, 4])
def test_accumulated_batches_of_pictures_are_one_big_batch(accumulated, images, arguments):
    def weights(batch_size, steps):
        args = arguments(per_device_train_batch_size=batch_size, gradient_accumulation_steps=steps, max_steps=2, optim="sgd")
        trainer = ee.EarlyExitTrainer(new_model("vit"), args, train_dataset=table(images), processing_class=PROCESSOR)
        trainer.train()
        return trainer.model.state_dict()

    whole, parts = weights(8, 1), weights(8 // accumulated, accumulated)
    assert all(torch.allclose(whole[name], parts[name], atol=2e-5) for name in whole)


def test_broken_rows_are_named_when_their_batch_comes(images, arguments):
    rows = table(images)
    whole = rows.cast_column("image", ImageFeature(decode=False))["image"][:9]
    values = {"image": [*whole, {"bytes": b"broken", "path": None}], "label": [0] * 10}
    bad = Dataset.from_dict(values, features=rows.features)
    with pytest.raises(DataError, match="Row 9 cannot be read"):
        trained(arguments, bad)
    with pytest.raises(DataError, match="Row 9 cannot be read"):
        trained(arguments, bad.to_iterable_dataset())


def test_what_cannot_be_trained_on_is_refused_before_the_first_step(images, arguments, tokenizer):
    for rows, options, error, words in (
        (table(images), {"processing_class": None}, TrainingError, "pass processing_class=AutoImageProcessor"),
        (table(images), {"processing_class": tokenizer}, TrainingError, "is a BertTokenizer, and the model reads pictures"),
        (table(images).rename_column("image", "photo"), {}, DataError, "no column of pictures among photo, label"),
        (table(images).remove_columns("label"), {}, DataError, "no column of labels"),
    ):
        with pytest.raises(error, match=words):
            ee.EarlyExitTrainer(
                new_model("vit"), arguments(), train_dataset=rows, **{"processing_class": PROCESSOR, **options}
            )


def test_a_collator_of_the_users_own_gets_the_rows_as_they_are(images, arguments):
    def collate(rows):
        return {
            "pixel_values": pixels([row["image"] for row in rows]),
            "labels": torch.tensor([row["label"] for row in rows]),
        }

    args = arguments(max_steps=1, remove_unused_columns=False)
    trainer = ee.EarlyExitTrainer(new_model("vit"), args, train_dataset=table(images), data_collator=collate)
    trainer.train()
    assert trainer.state.global_step == 1


def test_gates_learn_from_pictures(images, tmp_path):
    rows = table(images).add_column("id", list(range(COUNT)))
    args = ee.ConsistentTrainingArguments(
        output_dir=str(tmp_path),
        id_column="id",
        num_train_epochs=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    model = new_model("vit", exit_gate="mlp")
    before = {name: value.clone() for name, value in model.exit_gates.state_dict().items()}
    ee.ConsistentTrainer(model, args, rows, eval_dataset=rows, processing_class=PROCESSOR).train()
    assert all(
        not torch.equal(value, before[name]) for name, value in model.exit_gates.state_dict().items() if "weight" in name
    )
    again = new_model("vit", seed=1, exit_gate="mlp")
    ee.ConsistentTrainer(again, args, rows, eval_dataset=rows, processing_class=PROCESSOR).train(resume_from_checkpoint=True)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
