"""A captioner goes to the Hub in one commit and comes back the same by every road."""

import json
import os
from pathlib import Path

import torch
import yaml

import hf_earlyexit as ee
from hf_earlyexit.calibration.result import CalibrationResult
from hf_earlyexit.hub.model_card import model_card_files
from tests.captions.toy import essence, make_captioner, make_image_processor, make_pictures, make_tokenizer, save_all
from tests.hub.test_round_trip import assert_no_trace
from tests.processes import python

ROOT = Path(__file__).resolve().parents[2]
PUSH = """
from tests.captions.toy import *
from hf_earlyexit.cli.main import main
parts = dict(tokenizer=make_tokenizer(), image_processor=make_image_processor())
model = make_captioner()
card = {"base_model": "nlpconnect/vit-gpt2-image-captioning", "datasets": ["jxie/flickr8k"], "license": "mit"}
out["pushed"] = ee.push_to_hub(model, "tester/captioner", **parts, card=card, commit_message="all of it").oid
ee.save(model, "folder", **parts, card=False)
assert main(["push", "folder", "--repo_id", "tester/again"]) == 0
pipe = ee.pipeline("early-exit-captioning", model=model, **parts)
points = ("careful", "fast", "exact")
out["answers"] = {point: essence(pipe(make_pictures(), operating_point=point)) for point in points}
out["thresholds"] = [model.policy_at(point).thresholds for point in points[:2]]
"""
PULL = """
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, VisionEncoderDecoderModel, pipeline
from tests.captions.toy import *
from hf_earlyexit.cli.main import main
name, pictures = "tester/captioner", make_pictures()
def described(model):
    pipe = ee.pipeline("early-exit-captioning", model=model, tokenizer=name, image_processor=name)
    points = {point: essence(pipe(pictures, operating_point=point)) for point in ("careful", "fast", "exact")}
    return [type(model).__name__, points, [model.policy_at(point).thresholds for point in ("careful", "fast")]]
out["auto"] = [described(auto.from_pretrained(name)) for auto in (AutoModel, AutoModelForImageTextToText)]
out["again"] = essence(ee.pipeline("early-exit-captioning", model="tester/again")(pictures))
out["ours"] = essence(ee.pipeline("early-exit-captioning", model=name, operating_point="fast")(pictures, batch_size=4))
out["registered"] = essence(pipeline("early-exit-captioning", model=name)(pictures))
guessed = pipeline(model=name)  # the card tells the task
out["task"] = guessed.task
out["stock"] = [guessed(picture, text="")[0]["generated_text"].strip() for picture in pictures]
processor = AutoProcessor.from_pretrained(name)
out["start"] = processor.start_token_id
plain = VisionEncoderDecoderModel.from_pretrained(name).eval()
batch = processor(images=pictures[0])
out["plain"] = processor.tokenizer.decode(plain.generate(**batch, max_new_tokens=12)[0], skip_special_tokens=True)
for number, picture in enumerate(pictures):
    picture.save(f"{number}.png")
files = [f"{number}.png" for number in range(len(pictures))]
words = ["--operating_point", "fast", "--batch_size", "2", "--html", "page.html", "--json"]
assert main(["caption", name, *files, *words]) == 0
out["page"] = Path("page.html").read_text().count("<img ")
"""


def test_everything_arrives_in_one_commit_and_tells_nobody(hub, pushed, tmp_path_factory):
    commit = hub.repos["tester/captioner"].commits[1]
    assert (commit.message, commit.sha) == ("all of it", pushed["pushed"])
    wanted = {"config.json", "model.safetensors", "generation_config.json", "modeling_hf_earlyexit.py", "README.md"}
    assert wanted | {"processor_config.json", "tokenizer.json", "tokenizer_config.json"} <= set(commit.files)
    config = json.loads(commit.files["config.json"])
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForImageTextToText"}
    assert "custom_pipelines" not in config
    assert set(hub.repos["tester/again"].files()) >= wanted | {"processor_config.json"}
    for repo in hub.repos.values():
        assert_no_trace(repo.commits, hub, tmp_path_factory.getbasetemp())


def test_every_road_gives_the_same_captions_layers_and_thresholds(pushed, pulled):
    answers = pushed["answers"]
    for name, points, thresholds in pulled["auto"]:
        assert name == "EarlyExitVisionEncoderDecoder"
        assert points == answers
        assert thresholds == pushed["thresholds"]
    assert pulled["registered"] == pulled["again"] == answers["careful"]
    assert pulled["ours"] == answers["fast"]
    assert pulled["task"] == "image-text-to-text"
    assert pulled["stock"] == [text for text, _ in answers["careful"]]
    assert pulled["start"] == 1
    assert pulled["plain"].strip() == answers["exact"][0][0]
    assert answers["fast"] != answers["careful"] != answers["exact"]
    assert essence(json.loads(pulled["stdout"].splitlines()[-1])["captions"]) == answers["fast"]
    assert pulled["page"] == 6


def card_of(files):
    meta, text = files["README.md"].decode().removeprefix("---\n").split("\n---\n", 1)
    return yaml.safe_load(meta), " ".join(text.split())


def test_the_card_is_that_of_a_captioner(hub, pushed):
    meta, text = card_of(hub.repos["tester/captioner"].files())
    assert meta["pipeline_tag"] == "image-text-to-text"
    assert meta["library_name"] == "transformers"
    assert meta["base_model"] == "nlpconnect/vit-gpt2-image-captioning"
    assert {"hf_earlyexit", "early-exit", "confidence"} <= set(meta["tags"])
    assert "metrics" not in meta
    assert 'ee.pipeline("early-exit-captioning", model="tester/captioner")' in text
    assert 'pipe("one.jpg", operating_point="fast")' in text
    assert "after one of the layers 1, 2, 3, 4 of 4" in text
    assert "LABEL_0" not in text
    assert "text classifier" not in text
    assert "It tells apart" not in text


def test_the_card_tells_how_thresholds_were_chosen(tmp_path):
    model = make_captioner()
    trace = token_trace(model)
    result = ee.calibrate(trace, "confidence", ee.LayerBudget(3.0), metric="accuracy", keep_weak_exits=True)
    model.set_exit_policy(result)
    ee.save(model, tmp_path, tokenizer=make_tokenizer(), image_processor=make_image_processor(), calibration=result)
    text = " ".join((tmp_path / "README.md").read_text().split())
    assert "| token accuracy | full model | difference (standard error) | mean layers of 4 |" in text
    assert "A token leaves where its score is at or above the threshold" in text
    assert "They hold for pictures like those rows" in text
    loaded = ee.EarlyExitVisionEncoderDecoder.from_pretrained(tmp_path)
    assert loaded.exit_policy == result.policy
    assert loaded.exit_policy.thresholds == result.policy.thresholds
    files = model_card_files(
        model, {"default": result}, datasets=["me/photos"], evaluations={"default": ee.replay(result.policy, trace)}
    )
    assert not [name for name in files if name.startswith(".eval_results")]  # those are accuracies of classifiers
    assert CalibrationResult.load(tmp_path / "calibration.json") == result


def token_trace(model):
    """Every exit's answer to random tokens."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 50, (30, 10), generator=generator)
    with torch.no_grad():
        output = model(torch.randn(30, 3, 16, 16, generator=generator), labels=ids, early_exit=False)
    logits = output.exit_logits.flatten(0, 1)
    return ee.ExitTrace(logits=logits, labels=ids.flatten(), exit_layers=model.exit_layers, split="dev")


LOAD = """
import json
from transformers import AutoModel, AutoModelForImageTextToText, pipeline
def tried(call, *args, **kwargs):
    try:
        return call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
out = {"untrusted": str(tried(AutoModelForImageTextToText.from_pretrained, "model"))[:2000]}
for auto in (AutoModel, AutoModelForImageTextToText):
    out[auto.__name__] = type(tried(auto.from_pretrained, "model", trust_remote_code=True)).__name__
pipe = pipeline("image-text-to-text", model="model", trust_remote_code=True)
out["stock"] = pipe("0.png", text="")[0]["generated_text"].strip()
out["ours"] = pipeline("early-exit-captioning", model="model")("0.png")["generated_text"]
print("\\n" + json.dumps(out))
"""


def test_installed_but_not_imported_loads_with_trust(tmp_path):
    model = save_all(tmp_path / "model")
    make_pictures(1)[0].save(tmp_path / "0.png")
    parts = {"tokenizer": make_tokenizer(), "image_processor": make_image_processor()}
    expected = ee.pipeline("early-exit-captioning", model=model, **parts)(make_pictures(1)[0])["generated_text"]
    child = python(LOAD, cwd=tmp_path, environment=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")})
    assert child.returncode == 0, child.stderr[-3000:]
    found = json.loads(child.stdout.splitlines()[-1])
    assert "trust_remote_code=True" in found["untrusted"]
    assert found["AutoModel"] == found["AutoModelForImageTextToText"] == "EarlyExitVisionEncoderDecoder"
    assert found["stock"] == found["ours"] == expected
