"""Fixtures shared by all tests: tiny models whose rows leave at different layers, and a tiny tokenizer. No network."""

import gc
import io
import os
import pickle

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import BertTokenizer, PreTrainedConfig
from transformers.models.beit.modeling_beit import BeitRelativePositionBias

import hf_earlyexit as ee
from hf_earlyexit.policies import POLICIES
from hf_earlyexit.problem_types import REGRESSION, SINGLE_LABEL

settings.register_profile("repeatable", deadline=None, database=None, derandomize=True, max_examples=60)
settings.load_profile("repeatable")
torch.set_num_threads(1)

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(5, 100))]
SHAPE = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "num_labels": 3,
}
NO_PART_OF_A_GRAPH = ("_name_or_path", "architectures", "dtype", "early_exit_version", "exit_policy", "exit_certificate",
                      "exit_operating_points", "exit_point_certificates", "exit_forms", "exit_cost")  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def frozen_heap():
    """What is there before a file's tests is no garbage of theirs: Trainer collects at the end of every run, and would look
    at all that is imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def places_of_beit():
    """transformers keeps BEiT's tables of relative places for the whole process, and what a stock model that only answers
    made in inference mode cannot be learned with: the tiny models' table is made before any does."""
    BeitRelativePositionBias.generate_relative_position_index((2, 2))


class _Same(pickle.Pickler):
    """Equal bytes for modules from which equal graphs are made, wherever their numbers lie and whatever policy they have."""

    def reducer_override(self, thing):
        if isinstance(thing, torch.Tensor):
            numbers = thing.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            return tuple, ((str(thing.dtype), tuple(thing.shape), numbers),)
        if isinstance(thing, PreTrainedConfig):
            return str, (repr({name: value for name, value in thing.to_dict().items() if name not in NO_PART_OF_A_GRAPH}),)
        return NotImplemented


@pytest.fixture(scope="session", autouse=True)
def exported_once():
    """torch takes seconds to make an ONNX program of a module; the tests of one process share those of equal modules."""
    export, known = torch.onnx.export, {}

    def once(module, example, **options):
        key = io.BytesIO()
        try:
            _Same(key).dump((module, example, repr(options)))
        except (AttributeError, pickle.PicklingError):  # of classes that a test has made
            return export(module, example, **options)
        if key.getvalue() not in known:
            known[key.getvalue()] = export(module, example, **options)
        return known[key.getvalue()]

    torch.onnx.export = once
    yield
    torch.onnx.export = export


@pytest.fixture(scope="session")
def tiny_config():
    """`tiny_config(**fields)`: an early-exit BERT configuration of 4 layers and width 32."""

    def make(**fields):
        return ee.EarlyExitBertConfig(**{**SHAPE, **fields})

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """`tiny_model(seed=0, **fields)`: a seeded model in eval mode; large head weights make rows differ in confidence."""

    def make(seed=0, **fields):
        torch.manual_seed(seed)
        model = ee.EarlyExitBertForSequenceClassification(tiny_config(**fields)).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.startswith(("exit_heads.", "exit_gates.", "classifier.")):
                    weight.normal_(0, 0.1 if weight.ndim == 1 else 0.3 if "gate" in name else 1.0)
        return model

    return make


@pytest.fixture(scope="session")
def tokenizer():
    """A BERT tokenizer for the words w5 ... w99."""
    vocabulary = {word: number for number, word in enumerate(VOCABULARY)}
    return BertTokenizer(vocab=vocabulary, model_max_length=SHAPE["max_position_embeddings"])


@pytest.fixture(scope="session")
def random_batch():
    """`random_batch(rows, width=16, seed=0, padded=True)`: ids, attention mask and segments, padded on the right."""

    def make(rows, width=16, seed=0, padded=True):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, len(VOCABULARY), (rows, width), generator=generator)
        lengths = torch.randint(2, width + 1, (rows,), generator=generator) if padded else torch.full((rows,), width)
        lengths[:1] = width
        mask = (torch.arange(width) < lengths[:, None]).long()
        return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}

    return make


@pytest.fixture(scope="session")
def random_texts():
    """`random_texts(count, seed=0, longest=12)`: texts of 1 to `longest` known words."""

    def make(count, seed=0, longest=12):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
        words = [torch.randint(5, len(VOCABULARY), (length,), generator=generator).tolist() for length in lengths]
        return [" ".join(f"w{number}" for number in numbers) for numbers in words]

    return make


@pytest.fixture(scope="session")
def open_policy(random_batch):
    """`open_policy(model, name, share=0.4)`: a policy of that name; each threshold lets `share` of 100 random rows go."""

    def make(model, name, share=0.4, **options):
        cls = POLICIES.get(name)
        problem = model.config.resolved_problem_type
        with torch.inference_mode():
            output = model(**random_batch(100, seed=12345), early_exit=False, exit_signals=model.signals)
        logits, scalars = output.exit_logits, output.exit_scalars or {}
        labels = logits[:, -1].argmax(-1) if problem == SINGLE_LABEL else (logits[:, -1] > 0).float()
        exits = {"exit_layers": model.exit_layers, "problem_type": problem}
        trace = ee.ExitTrace(logits=logits, labels=labels, scalars=scalars, **exits)
        if name == "beem":
            options.setdefault("weights", tuple(0.5 + index for index in range(trace.num_exits)))
        if name == "patience" and problem == REGRESSION:
            options.setdefault("tolerance", float((logits[:, 1:] - logits[:, :-1]).abs().median()))
        policy = cls.from_trace(trace, **options)
        if name == "static":
            return type(policy).at(1, trace.num_exits, problem_type=problem)
        levels = policy.scan(trace).scores[:, :-1].quantile(1 - share, dim=0)
        levels = levels.round() if cls.counts else levels
        return policy.with_thresholds(tuple(levels.clamp(policy.lowest_threshold, policy.highest_threshold).tolist()))

    return make


@pytest.fixture(scope="session")
def data_path():
    """`data_path("sst2", "train.parquet")`: a file of the data folder HF_EARLYEXIT_DATA; skips where it is absent."""
    folder = Path(os.environ.get("HF_EARLYEXIT_DATA", Path(__file__).parents[2] / "shared" / "data"))

    def find(*parts):
        path = folder.joinpath(*parts)
        if not path.exists():
            pytest.skip(f"{path} is absent; set HF_EARLYEXIT_DATA to the data folder")
        return path

    return find


@pytest.fixture
def arguments(tmp_path):
    """`arguments(cls=..., **fields)`: a short quiet run on the CPU."""

    def make(cls=ee.EarlyExitTrainingArguments, **fields):
        usual = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
        }
        return cls(**{**usual, **fields})

    return make


def pytest_collection_modifyitems(items):
    """Refuse names that hold an address: processes side by side would not know them as the same test."""
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(f"{item.nodeid} is named after an address; give its parameters ids.")
