"""Rows that come one at a time: each gets the answer of `predict`, whoever comes before, beside or after it."""

import asyncio
import gc
import logging
import math
import os
import random
import threading
import time
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.errors import DataError, EarlyExitError, UnknownNameError, UsageError
from hf_earlyexit.serving import online, online_rows
from hf_earlyexit.serving.online_rows import RowFuture
from hf_earlyexit.serving.walker import ModelWalker

SECONDS = 100  # longest wait for an answer, on a busy machine


@pytest.fixture(scope="module")
def model(tiny_model, open_policy):
    model = tiny_model()
    fast = open_policy(model, "entropy", share=0.7)
    model.set_operating_points({"fast": fast, "balanced": open_policy(model, "beem")}, default="balanced")
    return model


@pytest.fixture(scope="module")
def texts(random_texts):
    return random_texts(1200, seed=7, longest=40)


@pytest.fixture
def engine(model, tokenizer):
    with ee.Engine(model, tokenizer=tokenizer) as engine:
        yield engine


class Gate(ModelWalker):
    """Begins no layer until it is opened."""

    def __init__(self, model):
        super().__init__(model)
        self.entered, self.open = threading.Event(), threading.Event()
        self.rows = []

    def run_layer(self, layer, hidden, context):
        self.entered.set()
        assert self.open.wait(SECONDS)
        self.rows.append((layer, context.count(hidden)))
        return super().run_layer(layer, hidden, context)


@pytest.fixture
def walked(model, tokenizer, monkeypatch):
    """`walked(cls, **options)`: an engine whose model is walked by a walker of that class."""

    def make(cls, **options):
        with monkeypatch.context() as patched:
            patched.setattr(online, "walker_for", lambda model, graphs: cls(model))
            return ee.Engine(model, tokenizer=tokenizer, **options)

    return make


@pytest.fixture
def gated(walked):
    """`gated(**options)`: an engine whose worker stands before a layer of a first row, and its gate."""
    made = []

    def make(**options):
        engine = walked(Gate, **options)
        gate = engine._served["default"].walker
        made.append((engine, gate))
        engine.submit("w5", early_exit=False, deadline=1e6)  # with a deadline, rows can wait and leave after every layer
        assert gate.entered.wait(SECONDS)
        return engine, gate

    yield make
    for engine, gate in made:
        gate.open.set()
        engine.close(drain=False)


def agree(got, expected, policy, places=slice(None)):
    """Same class and exit layer in every row; scores nearer to a threshold than rounding goes are no law."""
    gap = (expected.exit_score[places, None] - torch.tensor([t for t in policy.thresholds if t is not None])).abs().amin(1)
    sure = gap > 1e-5
    assert sure.float().mean() > 0.98
    layers = torch.tensor([answer.exit_layer for answer in got])
    logits = torch.stack([answer.logits for answer in got])
    assert torch.equal(layers[sure], expected.exit_layer[places][sure])
    assert torch.equal(logits.argmax(1)[sure], expected.logits[places].argmax(1)[sure])
    assert (logits - expected.logits[places])[sure].abs().max() < 1e-5
    assert [answer.reason for answer in got] == [
        expected.reason[place] for place in torch.arange(len(expected.reason))[places]
    ]


@pytest.mark.parametrize("budget", [64, None])
def test_rows_that_come_at_random_are_answered_as_by_predict(model, tokenizer, texts, budget):
    expected = ee.predict(model, texts, tokenizer=tokenizer)
    order = list(range(len(texts)))
    random.Random(budget).shuffle(order)
    dice, answers = random.Random(1), {}
    with ee.Engine(model, tokenizer=tokenizer, max_batch_tokens=budget, max_queue=len(texts)) as engine:

        def client(places):
            for place in places:
                if dice.random() < 0.1:
                    time.sleep(dice.random() * 0.01)
                answers[place] = engine.submit(texts[place])

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(client, [order[part::4] for part in range(4)]))
        got = [answers[place].result(SECONDS) for place in range(len(texts))]
    agree(got, expected, model.exit_policy)
    assert set(expected.exit_layer.tolist()) == {1, 2, 3, 4}
    assert engine.state.answered == len(texts)
    assert engine.state.batches < 0.8 * int(expected.exit_layer.sum())  # rows have met


def test_counts_are_never_behind_what_callers_know(engine):
    """Who has an answer, or an error, finds it counted."""
    counts = Queue()
    for row, expected in (("w5", (1, 0)), ({"input_ids": [10**6]}, (1, 1)), ("w6", (2, 1))):
        engine.submit(row).add_done_callback(lambda _: counts.put((engine.state.answered, engine.state.failed)))
        assert counts.get(timeout=SECONDS) == expected


def test_one_engine_serves_operating_points_budgets_and_models(model, tiny_model, tokenizer, texts):
    other = tiny_model(seed=3)
    kinds = [
        {"model": "first"},
        {"model": "first", "operating_point": "fast"},
        {"model": "first", "operating_point": "exact"},
        {"model": "first", "early_exit": False},
        {"model": "first", "layer_budget": 2},
        {"model": "first", "operating_point": "fast", "deadline": 1e6},
        {"model": "second"},
    ]
    with ee.Engine({"first": model, "second": other}, tokenizer=tokenizer) as engine:
        futures = [(kind, [engine.submit(text, **kind) for text in texts[:40]]) for kind in kinds]
        got = [(kind, [future.result(SECONDS) for future in part]) for kind, part in futures]
        with pytest.raises(UsageError, match="serves first, second; say which"):
            engine.submit("w5")
        with pytest.raises(UnknownNameError, match="third"):
            engine.submit("w5", model="third")
    for kind, part in got:
        options = {name: value for name, value in kind.items() if name not in ("model", "deadline")}
        expected = ee.predict(other if kind["model"] == "second" else model, texts[:40], tokenizer=tokenizer, **options)
        assert [answer.exit_layer for answer in part] == expected.exit_layer.tolist()
        assert [answer.reason for answer in part] == expected.reason
        assert torch.allclose(torch.stack([answer.logits for answer in part]), expected.logits, atol=1e-5)


@pytest.mark.parametrize(
    ("max_wait", "rows"),
    [
        (SECONDS, [(1, 1), (1, 1), (2, 2), (3, 2), (4, 2)]),  # the second went on alone until it met the first
        (None, [(1, 1), (2, 1), (3, 1), (4, 1), (1, 1), (2, 1), (3, 1), (4, 1)]),  # on a processor nobody waits
    ],
)
def test_a_row_joins_while_others_are_deeper_if_they_wait(gated, max_wait, rows):
    engine, gate = gated(max_wait=max_wait)
    late = engine.submit("w6 w7", early_exit=False, deadline=1e6)
    gate.open.set()
    assert late.result(SECONDS).exit_layer == 4
    assert gate.rows == rows


def test_coroutines_await_answers_and_close_waits_for_them(model, tokenizer, texts):
    async def main():
        async with ee.Engine(model, tokenizer=tokenizer) as engine:
            some = await asyncio.gather(*(engine.submit(text) for text in texts[:50]))
            left = [engine.submit(text) for text in texts[50:60]]
        return some, left

    some, left = asyncio.run(main())
    expected = ee.predict(model, texts[:60], tokenizer=tokenizer)
    assert [answer.exit_layer for answer in some] == expected.exit_layer[:50].tolist()
    assert [future.result(0).exit_layer for future in left] == expected.exit_layer[50:].tolist()


def test_a_task_that_is_cancelled_frees_its_row(gated):
    engine, gate = gated(max_queue=1)

    async def impatient():
        await asyncio.wait_for(engine.submit("w6"), 0.01)

    with pytest.raises(TimeoutError):
        asyncio.run(impatient())
    waiting = engine.submit("w7")
    gate.open.set()
    assert waiting.result(SECONDS).exit_layer >= 1


def test_a_full_queue_refuses_and_recovers(gated):
    engine, gate = gated(max_queue=3)
    accepted = [engine.submit("w6") for _ in range(3)]
    with pytest.raises(UsageError, match="3 rows wait already") as refused:
        engine.submit("w6")
    assert (refused.value.field, engine.state.refused, engine.state.queued) == ("max_queue", 1, 3)
    gate.open.set()
    assert all(future.result(SECONDS).exit_layer for future in accepted)
    assert engine.submit("w6").result(SECONDS).exit_layer
    assert engine.state.queued == 0


def test_a_cancelled_row_frees_its_place_and_runs_no_further_layer(gated):
    engine, gate = gated(max_queue=2)
    for _ in range(500):  # neither the queue nor what stands in it grows
        future = engine.submit("w6 w7", early_exit=False)
        assert future.cancel()
        assert engine.state.queued == 0
    assert len(next(iter(engine._worker.lines.values())).queue) < 30
    running = engine.submit("w6 w7", early_exit=False)
    gate.open.set()
    assert running.result(SECONDS).exit_layer == 4
    engine.close()  # the row before the gate may be under way still
    assert {layer: sum(rows for at, rows in gate.rows if at == layer) for layer in (1, 2, 3, 4)} == dict.fromkeys(
        (1, 2, 3, 4), 2
    )
    with pytest.raises(CancelledError):
        future.result(SECONDS)


def test_a_row_cancelled_between_two_layers_is_dropped(walked):
    futures = []

    class Cancelling(ModelWalker):
        def run_layer(self, layer, hidden, context):
            counts.append((layer, context.count(hidden)))
            if layer == 2:
                futures[0].cancel()
            return super().run_layer(layer, hidden, context)

    counts = []
    engine = walked(Cancelling)
    with engine._worker.lock:
        futures += [engine.submit("w6 w7", layer_budget=3, deadline=1e6, operating_point="exact") for _ in range(3)]
    assert [future.result(SECONDS).exit_layer for future in futures[1:]] == [3, 3]
    assert counts == [(1, 3), (2, 3), (3, 2)]
    engine.close()


def test_rows_whose_deadline_passes_in_the_queue_have_no_answer_as_in_predict(gated):
    engine, gate = gated()
    late = [engine.submit("w6", deadline=0.001) for _ in range(20)]
    time.sleep(0.01)
    good = [engine.submit("w6", deadline=1e6) for _ in range(20)]
    gate.open.set()
    for future in late:
        answer = future.result(SECONDS)
        assert (answer.reason, answer.exit_layer, bool(answer.logits.isnan().all())) == ("deadline", 0, True)
    assert all(future.result(SECONDS).reason in ("policy", "last layer") for future in good)


def test_a_row_whose_deadline_passed_in_the_queue_is_not_even_read(engine):
    late = engine.submit({"input_ids": []}, deadline=0).result(SECONDS)
    assert (late.reason, late.exit_layer) == ("deadline", 0)
    with pytest.raises(DataError):
        engine.submit({"input_ids": []}).result(SECONDS)


def test_a_row_whose_time_is_up_leaves_at_the_exit_it_has_passed(walked):
    futures, counts = [], []

    class Late(ModelWalker):
        def run_layer(self, layer, hidden, context):
            counts.append((layer, context.count(hidden)))
            if layer == 3:
                futures[0].ends_at = 0.0  # the clock strikes meanwhile
            return super().run_layer(layer, hidden, context)

    with walked(Late) as engine:
        with engine._worker.lock:
            futures += [engine.submit("w6 w7", operating_point="exact", deadline=1e6) for _ in range(2)]
        late, good = (future.result(SECONDS) for future in futures)
    assert (late.reason, late.exit_layer) == ("deadline", 3)
    assert (good.reason, good.exit_layer) == ("last layer", 4)
    assert counts == [(1, 2), (2, 2), (3, 2), (4, 1)]


def test_broken_rows_fail_alone(model, walked, tokenizer, texts):
    class Fails(ModelWalker):
        def run_layer(self, layer, hidden, context):
            if layer == 2 and 50 in context.lengths:
                raise RuntimeError("this row breaks a layer")
            return super().run_layer(layer, hidden, context)

    breaking = {"input_ids": [7] * 50}
    bad = [3, None, ["w5", 4], {"input_ids": [1000]}, {"input_ids": []}, {"input_ids": [5.5]}, breaking, {"input_ids": "x"}]
    rows = [row for place in range(25) for row in (*texts[4 * place : 4 * place + 4], bad[place % len(bad)])]
    with walked(Fails) as engine:
        futures = [engine.submit(row, early_exit=False) for row in rows]
        good = [future.result(SECONDS) for place, future in enumerate(futures) if place % 5 < 4]
        errors = [future.exception(SECONDS) for place, future in enumerate(futures) if place % 5 == 4]
    expected = ee.predict(model, texts[:100], tokenizer=tokenizer, early_exit=False)
    assert torch.allclose(torch.stack([answer.logits for answer in good]), expected.logits, atol=1e-5)
    for place, error in enumerate(errors):
        broke = bad[place % len(bad)] is breaking
        assert (type(error), error.field == "engine") == ((EarlyExitError, True) if broke else (DataError, False))
        assert ("this row breaks a layer" if broke else "Row 0 ") in str(error)
        assert error.__cause__ is None or error.__cause__.__traceback__ is None
    assert (engine.state.failed, engine.state.answered) == (25, 100)


def test_each_row_has_its_own_answer_whatever_becomes_of_the_others(model, tokenizer, texts):
    """Good rows, some called off, some out of time, some broken, from four threads at once."""
    by_depth = {0: ee.predict(model, texts, tokenizer=tokenizer)}  # and at every exit:
    by_depth |= {
        layer: ee.predict(model, texts, tokenizer=tokenizer, early_exit=False, layer_budget=layer) for layer in range(1, 5)
    }
    dice = random.Random(2)
    kinds = dice.choices(["good", "called off", "late", "broken"], [8, 4, 2, 1], k=len(texts))
    futures, called_off = [None] * len(texts), set()
    with ee.Engine(model, tokenizer=tokenizer, max_queue=len(texts)) as engine:

        def client(part):
            chosen = random.Random(part)
            for place in range(part, len(texts), 4):
                deadline = chosen.choice([0, 0.001, 0.01]) if kinds[place] == "late" else None
                row = {"input_ids": [5, 10**6]} if kinds[place] == "broken" else texts[place]
                futures[place] = engine.submit(row, deadline=deadline)
                mine = [other for other in range(part, place + 1, 4) if kinds[other] == "called off"]
                if mine and chosen.random() < 0.5 and futures[other := mine[-1]].cancel():
                    called_off.add(other)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(client, range(4)))
    assert len(called_off) > 50
    got, places = [], []
    for place, (kind, future) in enumerate(zip(kinds, futures, strict=True)):
        if place in called_off:
            assert future.cancelled()
        elif kind == "broken":
            assert "token ids this model does not know" in str(future.exception(0))
        elif (answer := future.result(0)).reason == "deadline":
            assert kind == "late"
            if answer.exit_layer:
                own = by_depth[answer.exit_layer].logits[place]
                assert torch.allclose(answer.logits, own, atol=1e-5)
        else:
            got.append(answer)
            places.append(place)
    agree(got, by_depth[0], model.exit_policy, torch.tensor(places))
    assert len(got) > kinds.count("good")
    state = engine.state
    assert state.failed == kinds.count("broken")
    assert state.answered + state.failed + len(called_off) == len(texts)
    assert (state.queued, state.running) == (0, 0)


def test_an_answer_that_is_not_finite_fails_alone(tiny_model):
    model = tiny_model()
    with torch.no_grad():
        model.base_model.embeddings.word_embeddings.weight[77] = torch.nan
    with ee.Engine(model) as engine:
        futures = [engine.submit({"input_ids": [2, number, 3]}) for number in (76, 77, 78)]
        assert isinstance(futures[1].exception(SECONDS), DataError)
        assert all(futures[place].result(SECONDS).logits.isfinite().all() for place in (0, 2))


@pytest.mark.parametrize("kind", [SystemExit, MemoryError])
def test_a_worker_that_dies_fails_its_rows_and_is_started_anew(model, tokenizer, caplog, monkeypatch, kind):
    with ee.Engine(model, tokenizer=tokenizer) as engine:
        dying = threading.Event()

        def deadly(line):
            line._admit()
            dying.wait(SECONDS)
            raise kind("the text w6 is no secret")

        monkeypatch.setattr(online_rows.Line, "step", deadly)
        futures = [engine.submit("w6", early_exit=False) for _ in range(5)]
        dying.set()
        errors = [future.exception(SECONDS) for future in futures]
        monkeypatch.undo()
        assert all(error.field == "engine" and kind.__name__ in str(error) for error in errors)
        assert len({id(error) for error in errors}) == 5
        assert engine.submit("w6").result(SECONDS).exit_layer >= 1
        assert engine.state.restarts == 1
        assert engine.state.queued == 0
    assert "w6" not in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_close_drains_or_drops_and_then_refuses(model, tokenizer, gated):
    engine, gate = gated()
    waiting = [engine.submit("w6") for _ in range(5)]
    closing = threading.Thread(target=engine.close, kwargs={"drain": False})
    closing.start()
    while not engine._worker.drops:
        time.sleep(0.001)
    gate.open.set()
    closing.join(SECONDS)
    assert all("was closed before" in str(future.exception(0)) for future in waiting)
    with pytest.raises(UsageError, match="is closed") as refused:
        engine.submit("w6")
    assert refused.value.field == "engine"
    engine = ee.Engine(model, tokenizer=tokenizer)
    engine.close()
    engine.close()


def test_rows_of_higher_priority_go_first(gated):
    engine, gate = gated(max_batch_tokens=8)
    order = []
    for priority in (0, 5, -1, 5, 1.5):
        future = engine.submit("w6 w7 w8 w9 w10 w11", early_exit=False, priority=priority)
        future.add_done_callback(lambda _, priority=priority: order.append(priority))
    gate.open.set()
    engine.close()
    assert order == [5, 5, 1.5, 0, -1]


def test_an_idle_engine_burns_no_cpu(engine):
    engine.submit("w5").result(SECONDS)
    (thread,) = [thread for thread in threading.enumerate() if thread is engine._worker.thread]
    task = Path(f"/proc/self/task/{thread.native_id}/status")
    switches = lambda: [line for line in task.read_text().splitlines() if "ctxt_switches" in line]  # noqa: E731
    before, ends_at = None, time.monotonic() + SECONDS
    while before != switches():  # until it sleeps
        assert time.monotonic() < ends_at, "it never sleeps"
        before = switches()
        time.sleep(0.1)
    time.sleep(0.5)
    assert switches() == before  # it has not woken once
    assert len(before) == 2


def test_futures_leave_nothing_behind(model, tokenizer, texts):
    with ee.Engine(model, tokenizer=tokenizer) as engine:

        def some():
            futures = [engine.submit(text, deadline=1e6 if place % 2 else None) for place, text in enumerate(texts[:300])]
            for future in futures[::7]:
                future.cancel()
            bad = engine.submit(3)
            for future in futures:
                if not future.cancelled():
                    future.result(SECONDS)
            assert bad.exception(SECONDS) is not None
            return [weakref.ref(future) for future in (*futures, bad)]

        some()
        deadline = time.monotonic() + SECONDS
        while engine._worker.lines and time.monotonic() < deadline:
            time.sleep(0.001)
        gc.collect()
        objects = len(gc.get_objects())
        refs = some()
        while engine._worker.lines and time.monotonic() < deadline:
            time.sleep(0.001)
        gc.collect()
        assert not [ref for ref in refs if ref() is not None]
        assert not [one for one in gc.get_objects() if type(one) is RowFuture]
        assert len(gc.get_objects()) < objects + 400  # the weak references themselves
    assert (engine.state.queued, engine.state.running) == (0, 0)


def test_an_engine_that_nobody_holds_ends_its_thread(model, tokenizer):
    engine = ee.Engine(model, tokenizer=tokenizer)
    engine.submit("w5").result(SECONDS)
    thread, ref = engine._worker.thread, weakref.ref(engine)
    del engine
    gc.collect()
    thread.join(SECONDS)
    assert (ref(), thread.is_alive()) == (None, False)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("used", [False, True])
def test_a_forked_process_may_start_an_engine_but_not_share_one(model, tokenizer, used):
    engine = ee.Engine(model, tokenizer=tokenizer)
    if used:
        engine.submit("w5").result(SECONDS)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            try:
                told = str(engine.submit("w5").result(SECONDS).exit_layer >= 1)
            except Exception as error:
                told = f"{error.field} {engine.closed} {type(error).__name__}: {error}"
            os.write(writing, told.encode())
            engine.close()
        finally:
            os._exit(0)
    os.close(writing)
    told = os.read(reading, 1000).decode()
    os.waitpid(child, 0)
    refused = f"engine True UsageError: This engine runs in process {os.getpid()}; a process forked from it has no worker."
    assert told.startswith(refused) if used else told == "True"
    assert not engine.closed
    engine.close()


def test_a_replaced_model_answers_later_rows_and_the_former_one_those_before(model, tiny_model, tokenizer, gated):
    engine, gate = gated()
    before = [engine.submit(f"w{number}", early_exit=False) for number in range(5, 15)]
    other = tiny_model(seed=5)
    engine.replace(other, tokenizer=tokenizer)
    after = [engine.submit(f"w{number}", early_exit=False) for number in range(5, 15)]
    gate.open.set()
    for one, futures in ((model, before), (other, after)):
        expected = ee.predict(one, [f"w{number}" for number in range(5, 15)], tokenizer=tokenizer, early_exit=False)
        got = torch.stack([future.result(SECONDS).logits for future in futures])
        assert torch.allclose(got, expected.logits, atol=1e-5)
    assert not torch.allclose(before[0].result().logits, after[0].result().logits, atol=1e-2)


def test_a_model_that_has_been_replaced_is_kept_by_nobody_while_the_engine_idles(tiny_model, tokenizer):
    model = tiny_model()
    with ee.Engine(model, tokenizer=tokenizer) as engine:
        engine.submit("w5").result(SECONDS)
        engine.replace(tiny_model(), tokenizer=tokenizer)
        former, ends_at = weakref.ref(model), time.monotonic() + SECONDS
        del model
        while former() is not None:  # the thread may be about to fall asleep
            assert time.monotonic() < ends_at
            gc.collect()


def test_a_monitor_sees_every_answer_and_a_share_again(model, tokenizer, texts):
    monitor = ee.Monitor(model, shadow=0.3, limit=0.5)
    with ee.Engine(model, tokenizer=tokenizer, monitor=monitor) as engine:
        answers = [future.result(SECONDS) for future in [engine.submit(text) for text in texts[:300]]]
        engine.submit(texts[0], early_exit=False).result(SECONDS)
    full = ee.predict(model, texts[:300], tokenizer=tokenizer, early_exit=False).logits.argmax(1)
    different = sum(int(answer.logits.argmax()) != label for answer, label in zip(answers, full.tolist(), strict=True))
    assert monitor.state.num_rows == 300
    assert monitor.state.layers == sum(answer.exit_layer for answer in answers)
    assert 50 < monitor.state.num_shadowed < 130
    assert 0 < monitor.state.num_different <= different


def test_a_monitor_that_falls_back_runs_every_layer(model, tokenizer, texts):
    monitor = ee.Monitor(model, shadow=1.0, limit=0.001, fall_back=True)
    with ee.Engine(model, tokenizer=tokenizer, monitor=monitor) as engine:
        for text in texts[:300]:
            engine.submit(text, operating_point="fast").result(SECONDS)
        ends_at = time.monotonic() + SECONDS
        while not monitor.falls_back and time.monotonic() < ends_at:
            time.sleep(0.001)
        assert {engine.submit(text).result(SECONDS).exit_layer for text in texts[:20]} == {4}


def test_a_monitor_watches_the_exits_of_its_own_model(model, tiny_model, tokenizer):
    other = tiny_model(num_hidden_layers=2)
    with pytest.raises(UsageError, match=r"exits behind \(1, 2\), and this one has them behind \(1, 2, 3, 4\)"):
        ee.Engine(model, tokenizer=tokenizer, monitor=ee.Monitor(other))
    with ee.Engine(model, tokenizer=tokenizer, monitor=ee.Monitor(model)) as engine:
        with pytest.raises(UsageError, match=r"behind \(1, 2\); give it a monitor of its own"):
            engine.replace(other, tokenizer=tokenizer)
        assert engine.submit("w5").result(SECONDS).exit_layer


@pytest.mark.parametrize("shadow", [0.01, 1.0])
def test_rows_are_answered_though_what_a_monitor_calls_fails(model, tokenizer, texts, caplog, shadow):
    def fail(alarm):
        raise RuntimeError(f"the text {texts[0]} is no secret")

    reference = (0.0, 0.0, 0.0, 1.0)
    monitor = ee.Monitor(model, shadow=shadow, limit=0.001, window=100, reference=reference, on_alarm=fail)
    with ee.Engine(model, tokenizer=tokenizer, monitor=monitor, max_queue=len(texts)) as engine:
        futures = [engine.submit(text) for text in texts[:600]]
        assert all(future.result(SECONDS).exit_layer for future in futures)
    assert monitor.state.alarms
    assert (engine.state.restarts, engine.state.failed) == (0, 0)
    assert "what it calls at an alarm, failed with RuntimeError" in caplog.text
    assert texts[0] not in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_wait": -1}, "max_wait is -1"),
        ({"max_wait": math.nan}, "max_wait is nan"),
        ({"max_queue": 0}, "max_queue is 0"),
        ({"max_batch_tokens": 0}, "max_batch_tokens is 0"),
        ({"image_processor": object()}, "image_processor is given"),
    ],
)
def test_options_out_of_range_are_refused(model, options, message):
    with pytest.raises(UsageError, match=message):
        ee.Engine(model, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deadline": -1}, "deadline is -1"),
        ({"deadline": "soon"}, "deadline is 'soon'"),
        ({"priority": math.nan}, "priority is nan"),
        ({"layer_budget": 0}, "layer_budget is 0"),
        ({"layer_budget": 2.5}, "layer_budget is 2.5"),
        ({"early_exit": True, "operating_point": "exact"}, "contradicts"),
    ],
)
def test_requests_out_of_range_are_refused_at_once(engine, options, message):
    with pytest.raises(UsageError, match=message):
        engine.submit("w5", **options)
    with pytest.raises(UnknownNameError, match="balanced"):
        engine.submit("w5", operating_point="balancd")


def test_budgets_of_any_size_keep_no_scheduler_each(engine):
    for budget in (4, 5, 1000, 10**9):
        assert engine.submit("w5", layer_budget=budget).result(SECONDS).exit_layer
    assert len(engine._served["default"].schedulers) == 2
