"""A signal and a policy that reads it, written here and nowhere else, decide wherever the library decides."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnxruntime as ort
import pytest
import torch
from transformers import GPT2Config, ViTConfig

import hf_earlyexit as ee
from hf_earlyexit.errors import EarlyExitConfigError, PolicyError, UnknownNameError, UsageError
from hf_earlyexit.onnx.manifest import ONE_FILE
from hf_earlyexit.policies import POLICIES, ExitPolicy
from hf_earlyexit.policies.memoryless import MemorylessPolicy
from hf_earlyexit.serving.batching import pad_batch
from hf_earlyexit.signals import SIGNALS, Lack, Signal
from tests.onnx.test_decisions import random_rows

TARGET = ee.LayerBudget(2.5)


class ChangeSignal(Signal):
    """How far a layer moves the state, in units of its length."""

    words: ClassVar[str] = "lengths of the state's change"
    reads_states: ClassVar[bool] = True
    at_last: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float]] = (0.0, float("inf"))

    @staticmethod
    def of(point):
        change, length = (point.after - point.before).float(), point.before.float()
        return change.square().sum(-1).sqrt() / length.square().sum(-1).sqrt().clamp_min(1e-6)


class PairEntropySignal(Signal):
    """Entropy of the two most likely classes in nats, taken alone."""

    reads_logits: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (0.0, 0.7)

    @staticmethod
    def of(point):
        return torch.special.entr(point.logits.float().topk(2, dim=-1).values.softmax(-1)).sum(-1)

    @classmethod
    def lacks(cls, config):
        return None if config.num_labels > 1 else Lack("num_labels", "at least 2")


@dataclass(frozen=True, kw_only=True)
class SettledPolicy(MemorylessPolicy):
    """Leave where the answer is clear and the state stays: asks for one signal at odd exits, for both at even ones."""

    asks: ClassVar[tuple[str, ...]] = ("pair-entropy", "change")

    def asks_at(self, exit_index):
        names = super().asks_at(exit_index)
        return names[:1] if exit_index % 2 else names

    def update(self, state, signal, exit_index):
        score = 1 / (1 + signal.scalar("pair-entropy"))
        if "change" in self.asks_at(exit_index):
            score = score / (1 + signal.scalar("change"))
        return state, score, signal.logits


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Known in this file, forgotten after it."""
    POLICIES.names(), SIGNALS.names()
    with pytest.MonkeyPatch.context() as patch:
        for registry in (POLICIES, SIGNALS):
            patch.setattr(registry, "_items", dict(registry._items))
        ee.signals.register_signal("change")(ChangeSignal)
        ee.signals.register_signal("pair-entropy")(PairEntropySignal)
        ee.policies.register_policy("settled")(SettledPolicy)
        yield


@pytest.fixture(scope="module")
def rows():
    return random_rows(300, seed=3)


@pytest.fixture(scope="module")
def served(tiny_model, rows, registered):
    """A model, its trace, and its policy chosen on that trace."""
    model = tiny_model()
    trace = ee.collect_trace(model, rows, labelled=False, progress=False)
    result = ee.calibrate(trace, "settled", TARGET, keep_weak_exits=True, per_exit=False)
    model.set_exit_policy(result)
    return model, trace, result


def test_the_laws_hold_and_are_told_values_within_the_bounds():
    assert len(ee.check_exit_policy(SettledPolicy(thresholds=(0.5, 0.6, 0.7)))) > 10


def test_a_trace_holds_the_signals_by_name_through_a_file(served, rows, tmp_path):
    model, trace, _ = served
    assert {name: tuple(values.shape) for name, values in trace.scalars.items()} == {
        "change": (300, 3),
        "pair-entropy": (300, 4),
        "similarity": (300, 4),
    }
    trace.save(tmp_path / "trace.safetensors")
    again = ee.ExitTrace.load(tmp_path / "trace.safetensors")
    assert all(torch.equal(again.scalars[name], values) for name, values in trace.scalars.items())
    assert torch.equal(again.signal(1).scalar("change"), trace.scalars["change"][:, 1])
    with torch.inference_mode():
        alone = model(**pad_batch([rows[5]]), early_exit=False, output_hidden_states=True)
    before, after = (alone.hidden_states[layer].mean(1) for layer in (1, 2))
    assert torch.allclose(trace.scalars["change"][5, 1], (after - before).norm() / before.norm(), atol=1e-4)


def test_calibrated_is_served_by_predict_and_by_forward(served, rows):
    model, trace, result = served
    expected = torch.from_numpy(ee.replay(result.policy, trace).exit_layer)
    assert len(expected.unique()) > 2
    assert torch.equal(ee.predict(model, rows).exit_layer, expected)
    with torch.inference_mode():
        alone = [model(**pad_batch([row])).exit_layer for row in rows[:50]]
    assert torch.equal(torch.cat(alone), expected[:50])
    told = str(ee.explain(model, rows[0]))
    assert f"layer {int(expected[0])}" in told or "all 4 layers" in told


def test_another_policy_over_the_same_signals_leaves_elsewhere(served, rows):
    """The mutant of the test above."""
    model, trace, result = served
    other = replace(result.policy, thresholds=tuple(0.97 * threshold for threshold in result.policy.thresholds))
    assert not np.array_equal(ee.replay(other, trace).exit_layer, ee.predict(model, rows).exit_layer.numpy())


def test_a_saved_model_decides_the_same(served, rows, tmp_path):
    model, _, result = served
    model.save_pretrained(tmp_path)
    again = ee.EarlyExitBertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert again.exit_policy == result.policy
    assert torch.equal(ee.predict(again, rows).exit_layer, ee.predict(model, rows).exit_layer)


def test_both_forms_of_an_export_decide_the_same(served, rows, tmp_path):
    model, trace, result = served
    ee.export_onnx(model, tmp_path)
    loaded = ee.OnnxClassifier.from_pretrained(tmp_path)
    assert loaded.signals == ("change", "pair-entropy")  # what the policy asks for, no more
    expected = torch.from_numpy(ee.replay(result.policy, trace).exit_layer)
    assert torch.equal(ee.predict(loaded, rows).exit_layer, expected)
    told = ee.collect_trace(loaded, rows[:40], labelled=False, progress=False)
    for name in loaded.signals:
        assert torch.allclose(told.scalars[name], trace.scalars[name][:40], atol=2e-4)
    session = ort.InferenceSession(str(tmp_path / ONE_FILE), providers=["CPUExecutionProvider"])
    for place, row in enumerate(rows[:40]):
        ids = np.array([row["input_ids"]])
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.array([row["token_type_ids"]])}
        assert session.run(["exit_layer"], given)[0].item() == expected[place]
    with pytest.raises(UsageError, match=r"holds no cosines .* \('similarity'\).*export again"):
        loaded.set_exit_policy(ee.policies.SaturationPolicy(thresholds=(0.9, 0.9, 0.9)))
    with pytest.raises(UsageError, match="holds no cosines"):
        loaded(np.array([[5, 6]]), early_exit=False, exit_signals=["similarity"])


def test_tokens_of_a_captioner_leave_by_them():
    torch.manual_seed(0)
    encoder = ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=16,
                        patch_size=8)  # fmt: skip
    decoder = GPT2Config(n_embd=32, n_layer=4, n_head=2, n_positions=40, vocab_size=50, add_cross_attention=True,
                         is_decoder=True, initializer_range=0.3, bos_token_id=1, eos_token_id=2)  # fmt: skip
    config = ee.EarlyExitVisionEncoderDecoderConfig(encoder=encoder, decoder=decoder)
    model = ee.EarlyExitVisionEncoderDecoder(config).eval()
    options = {"max_new_tokens": 12, "decoder_start_token_id": 1, "pad_token_id": 0, "progress": False}
    images = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    result = ee.generation.calibrate_generation(model, images, "settled", ee.LayerBudget(3.5), proposals=4, **options)
    model.set_exit_policy(result)
    del options["progress"]
    written = model.generate(images, return_exit_layers=True, **options)
    layers = written.exit_layers[written.exit_layers > 0]
    assert len(layers.unique()) > 1
    assert layers.float().mean() == pytest.approx(result.mean_layers)


def test_signals_are_given_where_every_exit_runs_and_by_known_names(served, random_batch):
    model, batch = served[0], random_batch(3)
    with torch.inference_mode():
        assert model(**batch, early_exit=False).exit_scalars is None  # none is learned
        given = model(**batch, early_exit=False, exit_signals=["change"]).exit_scalars
        assert {name: values.shape for name, values in given.items()} == {"change": (3, 3)}
        empty = {name: values[:0] for name, values in batch.items()}
        given = model(**empty, early_exit=False, exit_signals=model.signals).exit_scalars
    assert {name: values.shape for name, values in given.items()} == {
        "change": (0, 3), "pair-entropy": (0, 4), "similarity": (0, 4),
    }  # fmt: skip
    with pytest.raises(UsageError, match="pass early_exit=False"):
        model(**batch, early_exit=True, exit_signals=["change"])
    with pytest.raises(UnknownNameError, match="Did you mean 'change'"):
        model(**batch, early_exit=False, exit_signals=["chance"])
    with pytest.raises(UsageError, match=r"give no gates \('gate'\): load the model with exit_gate='mlp'"):
        model(**batch, early_exit=False, exit_signals=["gate"])


def test_a_model_that_cannot_give_a_signal_refuses_its_policy(tiny_model):
    one_label = tiny_model(num_labels=1, problem_type="regression")
    policy = SettledPolicy(thresholds=(0.5, 0.5, 0.5), problem_type="regression")
    with pytest.raises(EarlyExitConfigError, match="num_labels is 1; expected at least 2: the settled policy reads them"):
        one_label.set_exit_policy(policy)
    assert one_label.signals == ("change", "similarity")


def test_a_trace_without_the_signal_is_refused_before_anything_is_computed(served):
    _, trace, result = served
    bare = replace(trace, scalars={})
    with pytest.raises(PolicyError, match=r"reads numbers \('pair-entropy'\), and there are none: collect the trace again"):
        ee.calibrate(bare, "settled", TARGET)
    with pytest.raises(PolicyError, match="there are none"):
        ee.replay(result.policy, bare)


@pytest.mark.parametrize("name", ["logits", "", "a b", "signal_0/"])
def test_names_that_graphs_and_files_could_not_hold_are_refused(name):
    with pytest.raises(UnknownNameError, match="expected a word"):
        ee.signals.register_signal(name)


def test_a_policy_that_asks_for_what_nobody_makes_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Misspelt(SettledPolicy):
        asks: ClassVar[tuple[str, ...]] = ("similarty",)

    with pytest.raises(UnknownNameError, match="Did you mean 'similarity'"):
        Misspelt(thresholds=(0.5,))
    assert issubclass(Misspelt, ExitPolicy)
