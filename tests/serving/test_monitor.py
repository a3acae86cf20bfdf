"""The monitor alarms when it should, and hardly ever when it should not, however often it is looked at."""

import json
import threading

import numpy as np
import pytest
import torch
from scipy.stats import binom

import hf_earlyexit as ee
from hf_earlyexit.errors import CheckpointError, DataError, UsageError
from hf_earlyexit.serving import monitor as module
from hf_earlyexit.serving import scheduler
from hf_earlyexit.serving.answers import Answer
from hf_earlyexit.serving.disagreement import disagreement_bounds
from hf_earlyexit.serving.monitor import DISAGREEMENT, SHIFT, Monitor
from hf_earlyexit.serving.predict import monitored

LAYERS = (2, 4, 6, 8)
SHARES = (0.4, 0.3, 0.2, 0.1)


def feed(monitor, rows, different, shares=SHARES, seed=0, step=100):
    """Let a monitor see rows of a known rate, a few at a time; rows seen before the first alarm, if any."""
    generator = np.random.default_rng(seed)
    for seen in range(step, rows + 1, step):
        layers = generator.choice(LAYERS, step, p=shares).tolist()
        shadowed = monitor.draw(step)
        monitor.record(layers, (generator.random(len(shadowed)) >= different).tolist())
        if monitor.state.alarms:
            return seen
    return None


def false_alarms(rate, streams=300, rows=20_000, limit=0.05, delta=0.1):
    generator = np.random.default_rng(0)
    steps = rows // 200
    count = 0
    for _ in range(streams):
        shadowed = generator.binomial(200, 0.05, steps).cumsum()
        different = np.array([generator.binomial(n, rate) for n in np.diff(shadowed, prepend=0)]).cumsum()
        looks = zip(different.tolist(), shadowed.tolist(), strict=True)
        count += any(module.disagreement_bounds(k, n, delta)[0] > limit for k, n in looks)
    return count


def test_a_rate_at_the_limit_gives_no_more_false_alarms_than_promised(monkeypatch):
    allowed = binom.ppf(0.999, 300, 0.1)
    assert false_alarms(0.05) <= allowed

    def one_look_only(different, shadowed, delta):
        """A bound that holds at one moment, looked at again and again."""
        from scipy.stats import beta

        return beta.ppf(delta, max(different, 1e-9), shadowed - different + 1), 1.0

    monkeypatch.setattr(module, "disagreement_bounds", one_look_only)
    assert false_alarms(0.05) > allowed


@pytest.mark.parametrize("delta", [0.01, 0.1])
def test_bounds_hold_what_they_should(delta):
    for different, shadowed in ((0, 0), (0, 50), (3, 50), (50, 50), (30, 3000)):
        lower, upper = disagreement_bounds(different, shadowed, delta)
        assert 0 <= lower <= (different / shadowed if shadowed else 0) <= upper <= 1
    assert disagreement_bounds(0, 0, delta) == (0.0, 1.0)
    wide, narrow = disagreement_bounds(3, 100, delta), disagreement_bounds(30, 1000, delta)
    assert narrow[0] > wide[0]
    assert narrow[1] < wide[1]
    assert disagreement_bounds(30, 1000, 0.2)[0] > disagreement_bounds(30, 1000, 0.01)[0]


def test_the_bound_by_hand():
    """At the edge the averaged likelihood is 1 / delta of the edge's own."""
    from math import comb

    lower, upper = disagreement_bounds(2, 10, 0.05)
    average = 1 / (11 * comb(10, 2))  # the integral of p^2 (1 - p)^8
    for edge in (lower, upper):
        assert edge**2 * (1 - edge) ** 8 == pytest.approx(0.05 * average, rel=1e-6)


def test_many_different_answers_raise_one_alarm():
    told = []
    monitor = Monitor(LAYERS, limit=0.02, shadow=0.2, reference=SHARES, on_alarm=told.append)
    seen = feed(monitor, 20_000, different=0.1)
    assert seen is not None
    assert seen <= 5_000
    feed_more = np.random.default_rng(1)
    for _ in range(20):
        monitor.record(feed_more.choice(LAYERS, 100, p=SHARES).tolist(), [False] * 20)
    assert [alarm.kind for alarm in told] == [DISAGREEMENT]
    assert told[0].num_rows == seen
    assert "the limit is 2.00%" in told[0].message


def test_rows_that_leave_elsewhere_raise_an_alarm_without_a_shadow():
    monitor = Monitor(LAYERS, shadow=0.01, reference=SHARES)
    assert feed(monitor, 5_000, different=0.0, shares=(0.1, 0.2, 0.3, 0.4)) == 1000
    assert [alarm.kind for alarm in monitor.state.alarms] == [SHIFT]


def test_rows_as_ever_raise_none():
    """20,000 windows of 1,000 rows, as in 1,000 streams of 20,000: no shift is seen where none is."""
    monitor, generator = Monitor(LAYERS, reference=SHARES), np.random.default_rng(0)
    counts = generator.multinomial(1000, SHARES, size=20_000)
    assert max(monitor.shift(window) for window in counts) < 0.1
    assert feed(Monitor(LAYERS, shadow=0.2, limit=0.05), 20_000, different=0.03) is None


def test_the_first_window_is_the_reference_where_none_was_given():
    monitor = Monitor(LAYERS)
    assert feed(monitor, 1000, 0.0) is None
    assert monitor.reference == tuple(count / 1000 for count in monitor.state.exits)
    assert feed(monitor, 1000, 0.0, shares=(0, 0, 0, 1)) == 1000


def test_the_share_of_shadowed_rows():
    monitor = Monitor(LAYERS, shadow=0.1, seed=3)
    places = [place for _ in range(100) for place in monitor.draw(200)]
    assert len(places) == pytest.approx(2000, abs=200)
    assert set(places) <= set(range(200))
    assert Monitor(LAYERS, shadow=1.0).draw(5) == [0, 1, 2, 3, 4]
    assert Monitor(LAYERS, shadow=0.1, seed=3).draw(200) == Monitor(LAYERS, shadow=0.1, seed=3).draw(200)


def test_it_goes_on_from_its_file(tmp_path):
    monitor = Monitor(LAYERS, limit=0.03, shadow=0.5, reference=SHARES, fall_back=True)
    feed(monitor, 3000, different=0.2)
    monitor.save(tmp_path / "monitor.json")
    again = Monitor.load(tmp_path / "monitor.json")
    assert again.to_dict() == monitor.to_dict()
    assert again.falls_back
    assert again.bounds() == monitor.bounds()
    assert str(again) == str(monitor)
    assert "ALARM" in str(again)


def test_states_of_several_processes_add_up():
    parts = [Monitor(LAYERS, shadow=0.5, reference=SHARES, seed=seed) for seed in range(3)]
    for seed, part in enumerate(parts):
        feed(part, 900, different=0.01, seed=seed)
    whole = Monitor(LAYERS, shadow=0.5, reference=SHARES, state=parts[0].state + parts[1].state + parts[2].state)
    assert whole.state.num_rows == 2700
    assert whole.state.num_different == sum(part.state.num_different for part in parts)
    assert np.array_equal(whole.state.exits, np.sum([part.state.exits for part in parts], 0))
    with pytest.raises(UsageError, match="two models"):
        parts[0].state + Monitor((1, 2), state=module.MonitorState(exits=(1, 2))).state


def test_a_monitor_that_goes_on_does_not_draw_what_it_drew_before(tmp_path):
    monitor = Monitor(LAYERS, shadow=0.5, reference=SHARES, seed=3)
    first = monitor.draw(200)
    monitor.record([LAYERS[0]] * 200)
    monitor.save(tmp_path / "monitor.json")
    assert Monitor(LAYERS, shadow=0.5, seed=3).draw(200) == first
    assert Monitor.load(tmp_path / "monitor.json").draw(200) != first


def test_threads_lose_no_row():
    monitor = Monitor(LAYERS, shadow=0.5, reference=SHARES)
    threads = [threading.Thread(target=feed, args=(monitor, 5000, 0.0, SHARES, seed, 10)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert monitor.state.num_rows == sum(monitor.state.exits) == 40_000


@pytest.mark.parametrize(
    "edit",
    [
        lambda values: values["state"].update(num_different=10**6),
        lambda values: values["state"].update(exits=[1, 2, 3, 4]),
        lambda values: values.update(format="other"),
        lambda values: values.pop("limit"),
        lambda values: values.update(limit=2),
        lambda values: values.update(state=None),
    ],
)
def test_damaged_files_are_refused(tmp_path, edit):
    monitor = Monitor(LAYERS, shadow=0.5)
    feed(monitor, 500, 0.0)
    monitor.save(tmp_path / "monitor.json")
    values = json.loads((tmp_path / "monitor.json").read_text())
    edit(values)
    (tmp_path / "monitor.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"monitor\.json is no saved monitor"):
        Monitor.load(tmp_path / "monitor.json")


@pytest.mark.parametrize(
    "options",
    [{"limit": 0}, {"limit": 1}, {"shadow": 0}, {"shadow": 1.5}, {"confidence": 1}, {"window": 5}, {"reference": (1.0,)}],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(UsageError) as caught:
        Monitor(LAYERS, **options)
    assert caught.value.field == next(iter(options))


def test_a_layer_without_an_exit_is_refused():
    with pytest.raises(UsageError, match="after layer 3"):
        Monitor(LAYERS).record([2, 3])


# --- beside predict -----------------------------------------------------------------------------------------------------


@pytest.fixture
def served(tiny_model):
    """A model whose rows leave after several layers, and token ids for it."""
    model = tiny_model().eval()
    ids = [{"input_ids": [2, *(5 + (place * step) % 20 for step in range(1, 3 + place % 9)), 3]} for place in range(300)]
    scores = ee.collect_trace(model, ids, labelled=False, progress=False)
    model.set_exit_policy(ee.calibrate(scores, "confidence", ee.LayerBudget(2.5), keep_weak_exits=True))
    return model, ids


def test_predict_and_stream_show_the_monitor_what_they_answer(served):
    model, ids = served
    for serve in (ee.predict, lambda *given, **options: list(ee.stream(*given, window=64, **options))):
        monitor = Monitor(model, shadow=0.5)
        answers, bare = serve(model, ids, monitor=monitor), ee.predict(model, ids)
        layers = answers.exit_layer if serve is ee.predict else torch.tensor([answer.exit_layer for answer in answers])
        assert torch.equal(layers, bare.exit_layer)
        assert monitor.state.num_rows == 300
        assert monitor.state.layers == int(bare.exit_layer.sum())
        assert 100 < monitor.state.num_shadowed < 200
    full = ee.predict(model, ids, early_exit=False).logits.argmax(-1)
    whole = Monitor(model, shadow=1.0)
    ee.predict(model, ids, monitor=whole)
    assert whole.state.num_shadowed == 300
    assert whole.state.num_different == int((full != bare.logits.argmax(-1)).sum())
    assert whole.state.num_different > 0


def test_the_reference_is_that_of_the_calibration(served):
    model, ids = served
    shares = model.config.exit_certificate["exit_shares"]
    monitor = Monitor(model)
    assert monitor.reference == tuple(shares)
    ee.predict(model, ids, monitor=monitor)
    assert monitor.shift(monitor.state.exits) < 1e-3  # the very rows


@pytest.mark.parametrize(("risk", "limit"), [("disagreement", 0.4), ("harm", 0.02), ("drop", 0.02)])
def test_the_limit_is_what_was_promised_of_disagreement_and_of_nothing_else(served, risk, limit):
    """Answers may differ where no quality is lost, so that the limit of another risk would give alarms on the very rows."""
    model, ids = served
    trace = ee.collect_trace(model, ids, labelled=False, progress=False)
    result = ee.calibrate(trace, "confidence", ee.Certified(0.4, 0.9, risk=risk), keep_weak_exits=True)
    model.set_operating_points({"fast": result})
    assert model.config.exit_point_certificates["fast"]["promise"]["limit"] == 0.4
    assert Monitor(model, operating_point="fast").limit == limit
    assert Monitor(model, limit=0.3, operating_point="fast").limit == 0.3


def test_it_falls_back_to_the_full_model_and_only_then(served):
    model, ids = served
    monitor = Monitor(model, limit=1e-4, shadow=1.0, confidence=0.6, fall_back=True)
    before = ee.predict(model, ids, monitor=monitor)
    assert (before.exit_layer < model.exit_layers[-1]).any()
    assert monitor.falls_back
    after = ee.predict(model, ids, monitor=monitor)
    assert (after.exit_layer == model.exit_layers[-1]).all()
    assert monitor.state.num_rows == 300  # the full model's own answers are not early ones


def in_engine(model, ids, monitor):
    with ee.Engine(model, monitor=monitor) as engine:
        with engine._worker.lock:  # no row is let in before all are there, so that who meets whom is the same in each run
            futures = [engine.submit(row) for row in ids]
        return [future.result(100) for future in futures]


def in_batches(model, ids, monitor):
    answers = []
    for start in range(0, len(ids), 16):
        batch = {"input_ids": torch.tensor([row["input_ids"] for row in ids[start : start + 16]])}
        output = model(**batch) if monitor is None else monitored(monitor, model, batch, None, None)
        answers += as_rows(output)
    return answers


def as_rows(output):
    layers = output.exit_layer.tolist()
    return [Answer(logits, layer, 0.0, "", None) for logits, layer in zip(output.logits, layers, strict=True)]


@pytest.mark.parametrize(
    "serve",
    [
        lambda model, ids, monitor: as_rows(ee.predict(model, ids, monitor=monitor)),
        lambda model, ids, monitor: as_rows(ee.predict(model, ids, monitor=monitor, max_batch_tokens=64)),
        lambda model, ids, monitor: as_rows(ee.predict(model, ids, monitor=monitor, deadline=1e6)),
        lambda model, ids, monitor: list(ee.stream(model, ids, window=64, monitor=monitor)),
        in_batches,
        in_engine,
    ],
    ids=["predict", "small batches", "deadline", "stream", "forward", "engine"],
)
@pytest.mark.parametrize("policy", ["confidence", "beem-a"])
def test_a_shadowed_row_goes_on_from_where_it_left(served, serve, policy):
    """No layer is run twice, who is not shadowed is in the same batches, and no answer changes in any bit."""
    model, _ = served
    ids = [{"input_ids": [2, *(5 + (place * step) % 20 for step in range(1, 7)), 3]} for place in range(300)]
    trace = ee.collect_trace(model, ids, labelled=False, progress=False)
    model.set_exit_policy(ee.calibrate(trace, policy, ee.LayerBudget(2.5), keep_weak_exits=True, folds=0))
    tokens = [0] * 4

    def count(layer):
        def hook(part, given, output):
            tokens[layer] += output.numel() // output.shape[-1]

        return hook

    for layer, part in enumerate(model.base_model.encoder.layer):
        part.intermediate.dense.register_forward_hook(count(layer))
    bare = serve(model, ids, None)
    layers = torch.tensor([answer.exit_layer for answer in bare])
    assert tokens == [8 * int((layers > layer).sum()) for layer in range(4)]  # each row runs the layers it needs
    for shadow in (0.2, 1.0):
        tokens[:] = [0] * 4
        monitor = Monitor(model, shadow=shadow)
        watched = serve(model, ids, monitor)
        assert monitor.state.num_rows == 300
        assert [answer.exit_layer for answer in watched] == layers.tolist()
        logits = [torch.stack([answer.logits for answer in answers]) for answers in (watched, bare)]
        assert torch.equal(*logits)
        if serve is not in_engine or shadow == 1:
            shadowed = torch.zeros(300, dtype=torch.bool)
            shadowed[Monitor(model, shadow=shadow).draw(300)] = True  # the draws are the same, window by window
            assert tokens == [8 * int(((layers > layer) | shadowed).sum()) for layer in range(4)]
            assert monitor.state.num_shadowed == int(shadowed.sum())
            full = ee.predict(model, ids, early_exit=False).logits.argmax(-1)
            assert monitor.state.num_different == int((full != logits[0].argmax(-1))[shadowed].sum()) > 0


def test_a_window_cut_off_by_the_clock_is_not_compared(served, monkeypatch):
    """Whom the time cuts off depends on where rows leave, so the rest would not be a fair sample."""
    model, ids = served
    clock = iter(range(10**6))
    monkeypatch.setattr(scheduler.time, "monotonic", lambda: float(next(clock)))
    monitor = Monitor(model, shadow=1.0)
    answers = ee.predict(model, ids, deadline=60, monitor=monitor, max_batch_tokens=64)
    assert {"deadline", "policy"} <= set(answers.reason)
    assert monitor.state.num_rows == int((answers.exit_layer > 0).sum()) > 20
    assert monitor.state.num_shadowed == 0


def test_an_answer_that_is_not_finite_is_compared_with_nothing(served):
    model, ids = served
    with torch.no_grad():
        model.classifier.bias.fill_(torch.nan)  # of the last exit
    monitor = Monitor(model, shadow=1.0)
    answers = ee.predict(model, ids, errors="slot", monitor=monitor)
    assert monitor.state.num_rows == 300 - len(answers.errors) > 100
    assert monitor.state.num_shadowed == 0


@pytest.mark.parametrize("rows", [[0, 3], [-1], [1, 1]])
def test_shadowed_rows_that_are_not_there_are_refused(served, rows):
    with pytest.raises(DataError, match="expected different positions of the 2 rows"):
        served[0](input_ids=torch.tensor([[2, 5, 3], [2, 6, 3]]), shadowed=rows)


def test_rows_without_an_answer_are_not_counted(served):
    model, ids = served
    monitor = Monitor(model, shadow=1.0)
    broken = [*ids[:10], {"input_ids": [10**6]}, *ids[10:20]]
    ee.predict(model, broken, errors="slot", monitor=monitor)
    assert monitor.state.num_rows == monitor.state.num_shadowed == 20


# --- in pipelines -------------------------------------------------------------------------------------------------------


@pytest.fixture
def piped(served, tokenizer, random_texts):
    model, texts = served[0], random_texts(120)
    scores = ee.collect_trace(model, texts, tokenizer=tokenizer, labelled=False, progress=False)
    model.set_exit_policy(ee.calibrate(scores, "confidence", ee.LayerBudget(2.5), keep_weak_exits=True))
    return model, tokenizer, texts


@pytest.mark.parametrize("how", ["list", "generator", "batches", "one by one"])
def test_pipelines_show_the_monitor_what_they_answer(piped, how):
    model, tokenizer, texts = piped
    monitor = Monitor(model, shadow=1.0)
    pipe = ee.pipeline(model=model, tokenizer=tokenizer, monitor=monitor)
    if how == "one by one":
        answers = [pipe(text)[0] for text in texts]
    else:
        given = (text for text in texts) if how == "generator" else texts
        answers = list(pipe(given, **({"batch_size": 7} if how == "batches" else {})))
    early = ee.predict(model, texts, tokenizer=tokenizer)
    full = ee.predict(model, texts, tokenizer=tokenizer, early_exit=False)
    assert [answer["exit_layer"] for answer in answers] == early.exit_layer.tolist()
    assert monitor.state.num_rows == monitor.state.num_shadowed == 120
    assert monitor.state.layers == int(early.exit_layer.sum()) < 4 * 120
    assert monitor.state.num_different == int((early.logits.argmax(-1) != full.logits.argmax(-1)).sum()) > 0


@pytest.mark.parametrize("batch_size", [None, 8])
def test_a_pipeline_falls_back_after_an_alarm(piped, batch_size):
    model, tokenizer, texts = piped
    monitor = Monitor(model, limit=1e-4, shadow=1.0, confidence=0.6, fall_back=True)
    pipe = ee.pipeline(model=model, tokenizer=tokenizer)
    early = list(pipe(texts, batch_size=batch_size, monitor=monitor))
    assert min(answer["exit_layer"] for answer in early) < 4
    assert monitor.falls_back
    assert {answer["exit_layer"] for answer in pipe(texts, batch_size=batch_size, monitor=monitor)} == {4}
    assert min(answer["exit_layer"] for answer in pipe(texts, batch_size=batch_size)) < 4  # it was of those calls


def test_the_full_model_is_not_watched(piped):
    model, tokenizer, texts = piped
    monitor = Monitor(model, shadow=1.0)
    ee.pipeline(model=model, tokenizer=tokenizer, monitor=monitor, batch_size=8, operating_point="exact")(texts)
    assert monitor.state.num_rows == 0
