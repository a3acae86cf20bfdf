"""Traces tell what lossless runs cost, and the fastest setting is found."""

import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit import timing
from hf_earlyexit.errors import CalibrationError, UsageError
from hf_earlyexit.families.decoders import CACHE_NAMES
from hf_earlyexit.generation.draft_calibration import LAYER_CALLS
from hf_earlyexit.generation.draft_trace import DraftCosts, DraftTrace, replay_drafts, trace_drafts
from hf_earlyexit.generation.full_texts import FullText, texts_of_rows, written_texts
from tests.generation.conftest import LAYERS, PAD, prompts
from tests.generation.test_lossless import drafter  # noqa: F401

UNIT = DraftCosts(layer=1, more=0.25, ask=0.1, words=2, more_words=0.5)
WRITING = {"max_new_tokens": 16, "eos_token_id": None, "pad_token_id": PAD}


def test_a_replay_by_hand():
    """Exits after layers 1 and 3 of 4; tokens leave at exit 0, at exit 1, not at all; then one more text of one token."""
    scores = torch.tensor([[0.9, 0.0], [0.1, 0.8], [0.2, 0.3], [0.0, 0.0]])
    right = torch.tensor([[True, True], [True, False], [False, False], [False, False]])
    trace = DraftTrace(scores, right, torch.zeros_like(right), (3, 1), (False, False))
    policy = ee.ConfidencePolicy(thresholds=(0.5, 0.5))
    found = replay_drafts(trace, policy, 4, (1, 3, 4), UNIT)
    # Token 0 runs layer 1 and waits. Token 1 runs layer 1; both run layers 2 and 3 and wait: 1 + 2 * 1.25.
    # Token 2, the last, asks nobody: layers 1 to 3 alone, layer 4 with all three: 3 + 1.5; words 2 + 2 * 0.5.
    # Asks: token 0 once, token 1 twice. Draft 1 is wrong, so tokens 0 and 1 come out, and token 2 runs again: 4 + 2.
    first = 1 + 1 + 2 * 1.25 + 3 + 1.5 + 3 + 3 * 0.1
    again, alone = 4 + 2, 4 + 2
    assert found.cost == pytest.approx((first + again + alone) / 4)
    assert found.layer_calls == pytest.approx((1 + 3 + 4 + 4 + 4) / 4)
    assert (found.drafted, found.accepted) == (pytest.approx(2 / 4), pytest.approx(1 / 2))
    assert found.plain == 6
    closed = replay_drafts(trace, policy.with_thresholds((None, None)), 4, (1, 3, 4), UNIT)
    assert closed.cost == closed.plain


@pytest.mark.parametrize(
    ("ended", "second_ends", "cost", "calls", "drafted", "accepted"),
    [
        # Both tokens leave after layer 1 of 4. The second, the last of a text that had to end, is not asked.
        (False, False, 2 * 0.05 + 0.1 + 1 + 1 + 3 * 1.25 + 2.5, 5, 1, 1),
        # Its draft ends the text, as it should: it goes on at once, and both are checked.
        (True, True, 2 * 0.05 + 2 * 0.1 + 1 + 1 + 3 * 1.25 + 2.5, 5, 2, 2),
        # Its draft is wrong: a third token runs behind the end of the text, and asks nobody, as two drafts wait.
        (True, False, 3 * 0.05 + 2 * 0.1 + 3 + 3 * 1.5 + 3, 6, 2, 1),
    ],
)
def test_the_end_of_a_text_by_hand(ended, second_ends, cost, calls, drafted, accepted):
    right = torch.tensor([[True], [second_ends]])
    trace = DraftTrace(torch.ones(2, 1), right, torch.tensor([[False], [second_ends]]), (2,), (ended,))
    costs = UNIT._replace(token=0.05, draft=0.4, plain=7, prompt=3)
    found = replay_drafts(trace, ee.ConfidencePolicy(thresholds=(0.5,)), 2, (1, 4), costs)
    assert found.cost == pytest.approx((cost + 0.4 * drafted + 3) / 2)
    assert found.plain == pytest.approx(7 + 3 / 2)
    assert (found.layer_calls, found.drafted) == (calls / 2, drafted / 2)
    assert found.accepted == pytest.approx(accepted / drafted)


@pytest.mark.parametrize("most", [1, 3])
def test_replays_expect_what_real_runs_do(drafter, most):  # noqa: F811
    """With one draft at a time nothing that is taken back is guessed: every call and draft is as in the run."""
    model = drafter("llama", dtype=torch.float32)
    ids = [row.tolist() for row in prompts(10, 5)[0]]
    rows = ee.generation.write_samples(model, ids, **WRITING)
    trace = trace_drafts(model, texts_of_rows(rows), model.exit_policy)
    expected = replay_drafts(trace, model.exit_policy, most, model.exit_layers, UNIT)
    calls = drafted = accepted = 0
    for prompt in ids:
        output = model.generate(torch.tensor([prompt]), lossless=True, max_drafts=most, return_exit_layers=True, **WRITING)
        counts = output.draft_counts
        calls, drafted = calls + counts.layer_calls, drafted + sum(counts.drafted)
        accepted += sum(counts.accepted)
    tokens = len(trace.scores)
    assert tokens == 10 * 15
    apart = 1e-9 if most == 1 else 0.05
    assert expected.layer_calls == pytest.approx(calls / tokens, rel=apart)
    assert expected.drafted == pytest.approx(drafted / tokens, rel=apart)
    assert expected.accepted == pytest.approx(accepted / drafted, rel=apart)


def test_the_fastest_setting_is_chosen_and_served(drafter, monkeypatch):  # noqa: F811
    model = drafter("qwen3", dtype=torch.float32)
    ids = [row.tolist() for row in prompts(8, 5)[0]]
    monkeypatch.setattr("hf_earlyexit.generation.draft_calibration.measure_costs", lambda *_: UNIT)
    before = model.train().config.to_dict()
    found = ee.generation.calibrate_drafts(model, ids, drafts=(1, 3), levels=4, do_sample=False, **WRITING)
    assert model.config.to_dict() == before, "nothing is written on the model"
    assert all(part.training for part in model.modules()), "nor is its mode"
    model.eval()
    costs = [one.expected.cost for one in found.settings]
    assert costs == sorted(costs)
    assert found.expected == found.settings[0].expected
    assert found.expected.speed_up > 1
    assert found.measured_speed_up > 0
    assert f"{found.expected.speed_up:.2f}x" in str(found)
    usual = model.exit_policy
    found.serve(model)
    assert (model.policy_at("lossless"), model.config.exit_drafts) == (found.policy, found.drafts)
    assert model.exit_policy == usual, "what nobody checks is left as it was"
    model.set_exit_policy(None)
    inputs = torch.tensor(ids[:1])
    options = {"max_new_tokens": 6, "pad_token_id": 0, "return_exit_layers": True}
    full, drafted = (model.generate(inputs, **options, lossless=lossless) for lossless in (False, True))
    assert sum(drafted.draft_counts.drafted) > 0, "lossless runs know where their drafts are kept"
    assert torch.equal(full.sequences, drafted.sequences)
    assert set(full.exit_layers[0, inputs.shape[1] :].tolist()) == {LAYERS}
    with pytest.raises(UsageError, match="no policy makes drafts"):
        model.generate(inputs, **options, lossless=True, operating_point="exact")
    model.set_exit_policy(usual)
    written = ee.generation.write_samples(model, ids, **WRITING)
    given = ee.generation.calibrate_drafts(
        model, written, drafts=(1, 3), levels=4, costs=LAYER_CALLS, confirm=False, **WRITING
    )
    assert given.costs == LAYER_CALLS, "costs that are given are not measured"
    for one in given.settings:
        assert one.expected.cost == pytest.approx(one.expected.layer_calls)
    assert given.expected.layer_calls == min(one.expected.layer_calls for one in found.settings) < LAYERS
    assert given.num_tokens == found.num_tokens, "what was written already is the same trace"
    dear = DraftCosts(layer=1, more=5, ask=9, words=2, more_words=0)
    monkeypatch.setattr("hf_earlyexit.generation.draft_calibration.measure_costs", lambda *_: dear)
    plain = ee.generation.calibrate_drafts(model, ids, drafts=(1,), levels=4, confirm=False, **WRITING)
    assert not plain.policy.may_leave, "where drafts cost more than they save, none are made"


def test_texts_are_those_of_samples_in_the_order_of_the_prompts(drafter):  # noqa: F811
    """Written in batches of like length, or taken from rows that were written before."""
    model = drafter("qwen3", dtype=torch.float32)
    ids = [row.tolist()[: 2 + place % 4] for place, row in enumerate(prompts(6, 5)[0])]
    options = {"max_new_tokens": 12, "pad_token_id": PAD, "eos_token_id": list(range(0, 90, 7))}
    texts = written_texts(model, ids, 2, options)
    assert [text.prompt for text in texts] == ids
    assert [text.start for text in texts] == [len(one) for one in ids]
    for text, prompt in zip(texts, ids, strict=True):
        assert text.ids == model.generate(torch.tensor([prompt]), early_exit=False, **options)[0].tolist()
    assert texts == texts_of_rows(ee.generation.write_samples(model, ids, **options))
    assert len({len(text.ids) - text.start for text in texts}) > 1, "some must end early"
    assert texts_of_rows([{"input_ids": [4, 5], "labels": [-100, -100]}]) == [FullText([4, 5], [4, 5], 2)]


def test_costs_are_measured(drafter):  # noqa: F811
    from hf_earlyexit.generation.draft_calibration import measure_costs

    model = drafter("gpt2", dtype=torch.float32)
    texts = written_texts(model, [row.tolist() for row in prompts(3, 5)[0]], 2, WRITING)
    costs = measure_costs(model, model.exit_policy, texts)
    assert min(costs.layer, costs.ask, costs.words, costs.token, costs.draft, costs.plain, costs.prompt) > 0
    assert min(costs.more, costs.more_words) >= 0


def test_times_become_costs(drafter, monkeypatch):  # noqa: F811
    """And the token that plain decoding is timed with is taken back, so that no round has a longer text than another."""
    from hf_earlyexit.generation import draft_calibration

    model, lengths = drafter("gpt2", dtype=torch.float32), []
    texts = written_texts(model, [row.tolist() for row in prompts(3, 5)[0]], 2, WRITING)
    forward = type(model).forward

    def watched(self, *args, **kwargs):
        lengths.extend(cache.get_seq_length() for name, cache in kwargs.items() if name in CACHE_NAMES)
        return forward(self, *args, **kwargs)

    def seconds(parts, device):
        monkeypatch.setattr(type(model), "forward", watched)
        for _ in range(3):
            parts[-2]()
        return [LAYERS * 1.0, LAYERS * 1.75, 0.1, 2.0, 3.5, 0.05, 0.4, 7.0, 10.0]

    monkeypatch.setattr(draft_calibration, "_seconds", seconds)
    costs = draft_calibration.measure_costs(model, model.exit_policy, texts)
    assert costs == pytest.approx(UNIT._replace(token=0.05, draft=0.4, plain=7, prompt=10))
    assert len(lengths) == 3
    assert len(set(lengths)) == 1


def test_costs_are_measured_before_the_trace(drafter, monkeypatch):  # noqa: F811
    """It leaves hooks of transformers on the layers, with which plain decoding is slower than where nobody traced."""
    from hf_earlyexit.generation import draft_calibration

    order, trace = [], draft_calibration.trace_drafts
    monkeypatch.setattr(draft_calibration, "measure_costs", lambda *_: order.append("costs") or UNIT)
    monkeypatch.setattr(draft_calibration, "trace_drafts", lambda *given: order.append("trace") or trace(*given))
    ids = [row.tolist() for row in prompts(2, 5)[0]]
    ee.generation.calibrate_drafts(drafter("gpt2", dtype=torch.float32), ids, confirm=False, **WRITING)
    assert order == ["costs", "trace"]


def test_one_slow_round_does_not_count(monkeypatch):
    """Parts take turns, and each has the median of its times: a burst of other work moves none of them."""
    from hf_earlyexit.generation import draft_calibration

    now, calls = [0.0], []

    def part(name, seconds):
        calls.append(name)
        burst = 3 <= len(calls) // 2 < 8
        now[0] += seconds * (20 if burst else 1)

    for clock in ("process_time", "perf_counter"):
        monkeypatch.setattr(timing.time, clock, lambda: now[0])
    parts = [lambda: part("a", 1.0), lambda: part("b", 5.0)]
    assert draft_calibration._seconds(parts, torch.device("cpu")) == pytest.approx([1.0, 5.0])
    assert {*calls[:2]} == {*calls[2:4]} == {"a", "b"}


def test_what_cannot_be_chosen_is_refused(drafter, writer):  # noqa: F811
    model, ids = drafter("llama"), [[5, 6]]
    for options, words in (
        ({"drafts": (0,)}, "whole numbers"),
        ({"levels": 1}, "whole numbers"),
        ({"do_sample": True}, "greedily"),
        ({"max_new_tokens": 1}, "No text has a token"),
    ):
        with pytest.raises(CalibrationError, match=words):
            ee.generation.calibrate_drafts(model, ids, **{**WRITING, **options})
    for options, words in (
        ({"num_beams": 2}, "num_beams is 2"),
        ({"input_ids": torch.ones(1, 1)}, "input_ids cannot be given here: prompts come as rows"),
        ({"lossless": True}, "lossless cannot be given here"),
        ({"max_drafts": 3}, "drafts= has the numbers to try"),
        ({"operating_point": "fast"}, "operating_point cannot be given here"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"image_processor": 1}, "reads no pictures"),
    ):
        with pytest.raises(UsageError, match=words):
            ee.generation.calibrate_drafts(model, ids, **{**WRITING, **options})
    with pytest.raises(CalibrationError, match="no early exit"):
        ee.generation.calibrate_drafts(writer("llama", exit_layers=[LAYERS]), ids)
