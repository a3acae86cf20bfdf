"""Every file that the library reads, damaged in a thousand small ways.

Each damage has one of two outcomes: an error of this library that names the file or its folder, or a load that means the
same, or says that it does not. Never another error, never a hang, and never other answers under a certificate that stands.
"""

import hashlib
import json
import os
import random
import shutil
import signal
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from transformers.utils import logging

import hf_earlyexit as ee
from hf_earlyexit.errors import EarlyExitError
from hf_earlyexit.hub.save import load_calibrations
from hf_earlyexit.onnx.classifier import OnnxClassifier
from hf_earlyexit.onnx.layer_files import BEGIN
from hf_earlyexit.onnx.manifest import read_manifest, write_manifest
from hf_earlyexit.trace import ExitTrace
from hf_earlyexit.training.hardness import HardnessTable
from hf_earlyexit.values import json_sum
from tests.captions.toy import make_image_processor
from tests.captions.toy import make_tokenizer as make_caption_tokenizer
from tests.fuzz.mutate import damaged, edited, edited_header
from tests.hub.toy import make_model, make_tokenizer, texts

SECONDS = 5  # that no load may take
Door = ee.EarlyExitBertForSequenceClassification


class Hang(BaseException):
    """A load took too long."""


@contextmanager
def limited():
    def stop(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(folder, name, change, load, cases, is_silent):
    """Counts of outcomes over damages of one file; fails with a list of those that must not be.

    Args:
        folder: with the file, whole; it is whole again afterwards.
        name: of the file.
        change: from its bytes and a `Random` to other bytes, and words for the damage.
        load: from the folder to what it means.
        cases: number of damages.
        is_silent: whether a load that means something else hides it, from the whole meaning and the other.
    """
    path = folder / name
    whole = path.read_bytes()
    right, faults, counts = load(folder), [], Counter()
    for case in range(int(os.environ.get("HF_EARLYEXIT_FUZZ", 1)) * cases):
        draw = random.Random(f"{name} {case}")
        data, words = change(whole, draw)
        if data == whole:
            continue
        path.write_bytes(data)
        outcome = "same"
        try:
            with limited():
                meaning = load(folder)
            if meaning != right:
                outcome = "silent" if is_silent(right, meaning) else "other"
        except EarlyExitError as error:
            place = str(error.path)
            outcome = "refused" if str(folder) in place or name in place or str(folder) in str(error) else "unnamed"
            words = f"{words}: {error}"
        except Hang:
            outcome = "hang"
        except Exception as error:
            outcome, words = "crash", f"{words}: {type(error).__name__}: {error}"
        counts[outcome] += 1
        if outcome in ("silent", "unnamed", "hang", "crash"):
            faults.append(f"{case} {outcome}: {words}"[:300])
    path.write_bytes(whole)
    assert not faults, f"{dict(counts)}\n" + "\n".join(faults)
    return counts


def json_edits(whole, draw):
    """Edits of JSON values, mostly; else damage to the text."""
    if draw.random() < 0.25:
        return damaged(whole, draw)
    values, words = edited(json.loads(whole), draw)
    return json.dumps(values).encode(), words


def tensor_edits(whole, draw):
    return damaged(whole, draw) if draw.random() < 0.5 else edited_header(whole, draw)


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with all that `ee.save` writes of a calibrated classifier with gates."""
    folder = tmp_path_factory.mktemp("fuzzed")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "max_position_embeddings": 16}
    model = make_model(2, exit_gate="mlp", exit_head="linear", **small)
    rows = [" ".join(text.split()[:10]) for text in texts(60)]
    labels = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    trace = ee.collect_trace(model, rows, tokenizer=make_tokenizer(), labels=labels, progress=False)
    results = {
        "fast": ee.calibrate(trace, "confidence", ee.LayerBudget(1.5), keep_weak_exits=True),
        "slow": ee.calibrate(trace, "beem-a", ee.LayerBudget(2.5), keep_weak_exits=True),
    }
    model.set_operating_points(results, default="slow")
    ee.save(model, folder, calibration=results, card=False)
    trace.save(folder / "held-back.safetensors")
    HardnessTable.measured(trace, range(60)).save(folder / "hardness.safetensors")
    return folder


BATCH = torch.tensor([[2, 7, 9, 30, 3], [2, 50, 3, 0, 0], [2, 41, 12, 8, 3], [2, 5, 6, 3, 0]])


def answers(folder):
    """What a folder's model says, and whether certificates vouch for it."""
    model = Door.from_pretrained(folder).eval()
    with torch.inference_mode():
        mask = (BATCH > 0).long()
        full = model(BATCH, attention_mask=mask, early_exit=False)
        said = [full.exit_logits, full.exit_scalars["gate"]]
        policies = [name for name in (None, *model.operating_points) if model.policy_at(name) is not None]
        early = {
            name: model(BATCH, attention_mask=mask, **({"operating_point": name} if name else {})).exit_layer.tolist()
            for name in policies
        }
    config = model.config
    vouched = [None] if config.exit_certificate is not None else []
    vouched += list(config.exit_point_certificates or ())
    digest = hashlib.sha256(b"".join(one.float().numpy().tobytes() for one in said)).hexdigest()
    return {"logits": digest, "layers": early, "vouched": vouched}


def hides(right, meaning):
    """Whether answers differ under a certificate that stands."""
    if meaning["logits"] != right["logits"]:
        return bool(meaning["vouched"])
    return any(meaning["layers"].get(name) != right["layers"][name] for name in meaning["vouched"])


def never(right, meaning):
    """Files that are tied by a sum never mean something else."""
    return True


def test_config(saved):
    counts = judge(saved, "config.json", json_edits, answers, 150, hides)
    assert counts["refused"] > 60
    assert counts["same"] > 10


def test_weights(saved):
    counts = judge(saved, "model.safetensors", tensor_edits, answers, 40, hides)
    assert counts["refused"] > 25


def test_calibration(saved):
    def load(folder):
        return {name: result.to_dict() for name, result in load_calibrations(folder).items()}

    counts = judge(saved, "calibration.json", json_edits, load, 150, never)
    assert counts["refused"] > 130


def test_calibration_with_sums_that_fit(saved):
    """Whoever edits a file may make its sums fit: then every field has to stand by itself."""

    def edits(whole, draw):
        values = json.loads(whole)
        name = draw.choice(list(values["results"]))
        one, words = edited(values["results"][name], draw)
        one["sha256"] = json_sum({key: value for key, value in one.items() if key != "sha256"})
        values["results"][name] = one
        values["sha256"] = json_sum({key: value for key, value in values.items() if key != "sha256"})
        return json.dumps(values).encode(), words

    def load(folder):
        return {name: str(result) and json_sum(result.to_dict()) for name, result in load_calibrations(folder).items()}

    counts = judge(saved, "calibration.json", edits, load, 120, lambda right, meaning: False)
    assert counts["refused"] > 70


def test_trace(saved):
    def load(folder):
        trace = ExitTrace.load(folder / "held-back.safetensors")
        return (
            trace.logits.tolist(),
            trace.labels.tolist(),
            trace.scalars["gate"].tolist(),
            trace.exit_layers,
            trace.fingerprint,
        )

    counts = judge(saved, "held-back.safetensors", tensor_edits, load, 200, never)
    assert counts["refused"] > 100


def test_hardness(saved):
    def load(folder):
        table = HardnessTable.load(folder / "hardness.safetensors")
        return table.ids, table.layers.tolist(), table.histogram()

    counts = judge(saved, "hardness.safetensors", tensor_edits, load, 200, never)
    assert counts["refused"] > 100


def test_the_shim_is_never_run(saved):
    def edits(whole, draw):
        return draw.choice([b"", b"raise SystemExit(1)\n", whole + b"import sys; sys.exit(1)\n", draw.randbytes(50)]), "shim"

    assert judge(saved, "modeling_hf_earlyexit.py", edits, answers, 4, never).keys() == {"same"}


@pytest.fixture(scope="module")
def exported(saved, tmp_path_factory):
    """A manifest as an export writes it, beside files that are none of ONNX."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / BEGIN).write_bytes(b"no graph")
    config = Door.from_pretrained(saved).config
    values = {"config": json.loads(json.dumps(config.to_dict(), default=str)), "dtype": "float32", "fingerprint": "0" * 16}
    write_manifest(folder, {**values, "static": False, "forms": ["layers"], "calibration": None})
    return folder


def test_manifest(exported):
    counts = judge(exported, "manifest.json", json_edits, read_manifest, 150, never)
    assert counts["refused"] > 130


def test_manifest_with_a_sum_that_fits(exported):
    def edits(whole, draw):
        values = json.loads(whole)
        del values["sha256"]
        values, words = edited(values, draw)
        return json.dumps({**values, "sha256": json_sum(values)}).encode(), words

    def load(folder):
        try:
            OnnxClassifier.from_pretrained(folder)
        except EarlyExitError as error:
            if "is no ONNX file that runs here" in str(error):
                return "good but for the graphs"
            raise

    counts = judge(exported, "manifest.json", edits, load, 200, never)
    assert counts["refused"] > 50


@pytest.fixture(scope="module")
def processor_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    ee.EarlyExitCaptionProcessor(make_image_processor(), make_caption_tokenizer(), start_token_id=1).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_processor(processor_folder, name):
    def load(folder):
        return ee.EarlyExitCaptionProcessor.from_pretrained(folder).start_token_id

    judge(processor_folder, name, json_edits, load, 60, lambda right, meaning: False)


def test_the_judge_sees_each_fault(tmp_path):
    """A reader with every fault there is: the fuzz would be worth nothing if it passed."""
    (tmp_path / "file.json").write_text(json.dumps({"a": 1, "b": [1, 2, 3]}))

    def careless(folder):
        values = json.loads((folder / "file.json").read_text())
        return values["a"], sum(values["b"])

    with pytest.raises(AssertionError, match="crash") as caught:
        judge(tmp_path, "file.json", json_edits, careless, 60, never)
    assert "silent" in str(caught.value)
    shutil.rmtree(tmp_path)
