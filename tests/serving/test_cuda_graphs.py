"""Segments on fixed buffers: what a graph repeats is what the plain walk says, and nothing of one batch reaches the next.

The captures here repeat the very function on the very buffers, on the CPU; only CUDA's own calls are not run.
"""

import gc
import itertools
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.overrides import TorchFunctionMode

import hf_earlyexit as ee
from hf_earlyexit import transfer
from hf_earlyexit.errors import UsageError
from hf_earlyexit.families import FAMILIES, packed, packed_bert
from hf_earlyexit.families.base import IMAGE, LAST
from hf_earlyexit.families.packed import Packed
from hf_earlyexit.modeling.gates import GATES
from hf_earlyexit.modeling.heads import HEADS
from hf_earlyexit.policies import POLICIES
from hf_earlyexit.serving import graph_walker, predict
from hf_earlyexit.serving.answers import Answers
from hf_earlyexit.serving.capturing import HeldNumbers, nothing_from_the_host
from hf_earlyexit.serving.chunks import some_rows
from hf_earlyexit.serving.course import Course
from hf_earlyexit.serving.cuda_graphs import Bucket, SegmentGraphs, Shape, bucket
from hf_earlyexit.serving.graph_walker import GraphWalker, Name, captures, is_captured, stayers_first, walker_for
from hf_earlyexit.serving.scheduler import Scheduler
from hf_earlyexit.serving.shadow import Shadow
from hf_earlyexit.serving.walker import ModelWalker
from hf_earlyexit.signals import names_at
from hf_earlyexit.walking.step import Standing
from tests.families.calibrated import opened
from tests.families.tiny import batch_of, new_model, rows_of

from .conftest import alone
from .test_scheduler import NAMES, assert_same

NEAR = 1e-5


class NothingIsMade(TorchFunctionMode):
    """Refuses to make a tensor of numbers, which would have to be copied to the device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.Tensor.new_tensor)
        return func(*args, **(kwargs or {}))


class Recorder:
    """Captures as CUDA does: warming up writes on the buffers, capturing computes nothing and takes nothing from the host, a
    replay fills what it made."""

    def __init__(self):
        self.captured, self.replayed, self.running = 0, 0, False

    def __call__(self, body):
        body()
        with NothingIsMade():
            made = body()
        outputs = [torch.full_like(part, torch.nan if part.is_floating_point() else 1) for part in made]
        self.captured += 1

        def replay():
            self.replayed, self.running = self.replayed + 1, True
            for static, part in zip(outputs, body(), strict=True):
                static.copy_(part)
            self.running = False

        return replay, outputs


def graphed(model, limit=1000):
    return GraphWalker(model, SegmentGraphs(Recorder(), limit))


def twice(walker, policy, budget, rows, **options):
    """Answers from the second time on, when buckets that came again are replayed."""
    scheduler = Scheduler(walker, policy, budget, **options)
    scheduler.run(rows)
    return scheduler.run(rows)


# --- the same answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_answers_as_in_forward(in_forward, rows, name):
    model, expected = in_forward(name, 150)
    walker = graphed(model)
    got = twice(walker, model.exit_policy, 96, rows[:150])
    assert walker.graphs.capture.replayed > 10
    assert_same(got, expected, model.exit_policy)


@pytest.mark.parametrize("budget", [1, 40, 512, 100_000])
@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_order_budget_and_lanes_change_no_answer(in_forward, rows, budget, lanes):
    model, expected = in_forward("confidence", 500)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(budget)).tolist()
    got = twice(graphed(model), model.exit_policy, budget, [rows[place] for place in order], lanes=lanes)
    assert_same(got, expected, model.exit_policy, order)
    assert len(set(got.exit_index.tolist())) == 4


@pytest.mark.parametrize("head", HEADS.names())
@pytest.mark.parametrize("exits", [[1, 2, 3, 4], [2, 4], [3, 4]])
def test_exits_of_every_kind_and_place(tiny_model, open_policy, rows, head, exits):
    model = tiny_model(exit_head=head, exit_layers=exits)
    policy = open_policy(model, "confidence")
    model.set_exit_policy(policy)
    assert_same(twice(graphed(model), policy, 128, rows[:100]), alone(model, rows[:100]), policy)


@pytest.mark.parametrize("gate", GATES.names())
def test_gates_travel_with_their_exit(tiny_model, rows, gate):
    model = tiny_model(exit_gate=gate)
    policy = POLICIES.get("gate")(thresholds=(0.5,) * 3)
    model.set_exit_policy(policy)
    assert_same(twice(graphed(model), policy, 128, rows[:100]), alone(model, rows[:100]), policy)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_whose_rows_stand_end_to_end(name):
    model = new_model(name)
    if not captures(model):
        assert (
            model.family.packed is None or model.family.untraced or model.family.token == LAST or model.family.task == IMAGE
        )
        return
    rows = rows_of(batch_of(name, rows=24))
    plain = ModelWalker(model)
    for policy in (None, opened("confidence", ee.collect_trace(model, rows, labelled=False, progress=False))):
        expected, walker = Scheduler(plain, policy, 96).run(rows), graphed(model)
        got = twice(walker, policy, 96, rows)
        assert walker.graphs.capture.replayed
        assert torch.equal(got.exit_index, expected.exit_index)
        assert torch.allclose(got.logits, expected.logits, atol=NEAR)


def test_masks_with_holes_and_segments(model):
    generator = torch.Generator().manual_seed(3)
    masked = [
        {"input_ids": torch.randint(5, 99, (width,), generator=generator).tolist(), "attention_mask": mask}
        for width, mask in [(4, [0, 0, 1, 1]), (5, [1, 1, 0, 1, 1]), (3, [1, 1, 1]), (4, [1] * 4)]
    ]
    for rows in (masked, [{**row, "token_type_ids": [1] * len(row["input_ids"])} for row in masked]):
        for some in (rows, rows[2:]):  # rows with holes are walked without graphs, and those in their company
            walker = graphed(model)
            got = twice(walker, model.exit_policy, 1000, some)
            plain = Scheduler(ModelWalker(model), model.exit_policy, 1000).run(some)
            assert torch.equal(got.exit_index, plain.exit_index)
            assert torch.allclose(got.logits, plain.logits, atol=NEAR)
            assert (walker.graphs.capture.replayed > 0) is (some is not rows)


def test_the_full_model_a_layer_budget_and_a_deadline(model, rows):
    plain, walker = ModelWalker(model), graphed(model)
    for options in ({}, {"layer_budget": 2}, {"ends_at": 1e18}):
        for policy in (None, model.exit_policy):
            got, expected = twice(walker, policy, 256, rows, **options), Scheduler(plain, policy, 256, **options).run(rows)
            assert got.reason == expected.reason
            assert torch.equal(got.exit_index, expected.exit_index)
            assert torch.allclose(got.logits, expected.logits, atol=NEAR)
    assert twice(walker, None, 256, rows, ends_at=0.0).reason == ["deadline"] * len(rows)


def test_at_a_deadline_rows_that_changed_places_keep_their_own_answers(model, rows, monkeypatch):
    """The clock ticks at every launch and strikes midway, when some have left at every exit."""
    walker, ticks = graphed(model), itertools.count()
    with torch.inference_mode():
        expected = torch.cat([model(torch.tensor([row["input_ids"]]), early_exit=False).exit_logits for row in rows])
    sure = expected.softmax(-1).amax(-1)
    policy = ee.ConfidencePolicy(thresholds=sure[:, :3].quantile(0.6, dim=0).tolist())
    twice(walker, policy, 256, rows, ends_at=1e18)
    monkeypatch.setattr(Scheduler, "late", lambda self: next(ticks) > 100)
    got = Scheduler(walker, policy, 256, ends_at=1e18).run(rows)
    late = [place for place, reason in enumerate(got.reason) if reason == "deadline" and got.exit_index[place] >= 0]
    assert len({int(got.exit_index[place]) for place in late}) > 1
    assert got.reason.count("policy") > 50
    answered = (got.exit_index >= 0).nonzero().flatten()
    assert torch.allclose(got.logits[answered], expected[answered, got.exit_index[answered]], atol=NEAR)
    assert torch.allclose(got.score[answered], sure[answered, got.exit_index[answered]], atol=NEAR)


@pytest.mark.parametrize("layer_budget", [None, 2])
def test_a_shadow_compares_with_the_full_model_and_changes_no_answer(model, rows, layer_budget):
    walker, same = graphed(model), []
    scheduler = Scheduler(walker, model.exit_policy, 256, layer_budget)
    bare = twice(walker, model.exit_policy, 256, rows, layer_budget=layer_budget)
    shadow = Shadow(scheduler, lambda place: place % 2 == 0, same.extend)
    got = [scheduler.run(rows, shadow=shadow) for _ in range(2)][1]  # by graphs
    assert torch.equal(got.logits, bare.logits)
    full = Scheduler(walker, None, 256).run(rows).logits.argmax(1)
    expected = (got.logits.argmax(1) == full)[::2].sum()
    assert len(same) == 500
    assert sum(same) == 2 * int(expected) < 500


def test_half_precision_keeps_labels_layers_and_scores_in_single(tiny_model, open_policy, rows):
    model = tiny_model().bfloat16()
    policy = open_policy(model, "confidence")
    rows = rows[:200]
    plain = Scheduler(ModelWalker(model), policy, 256).run(rows)
    got = twice(graphed(model), policy, 256, rows)
    with torch.inference_mode():
        logits = [model(input_ids=torch.tensor([row["input_ids"]]), early_exit=False).exit_logits for row in rows]
    trace = ee.ExitTrace(logits=torch.cat(logits), labels=torch.zeros(200).long(), exit_layers=model.exit_layers)
    gap = (policy.scan(trace).scores[:, :-1] - torch.tensor(policy.thresholds)).abs().amin(1)
    same = (got.exit_index == plain.exit_index) & (got.logits.argmax(1) == plain.logits.argmax(1))
    assert bool((same | (gap < 0.005)).all())  # a score moves by as much, since the numbers have eight bits
    assert same.float().mean() > 0.98
    hidden, context = graphed(model).begin(rows[:3])
    assert hidden.dtype == torch.bfloat16
    with torch.inference_mode():
        hidden, signal = graphed(model).run(range(1, 2), hidden, context, 0)
        step = policy.step(policy.init_state(3, 3, "cpu"), signal, 0)
    assert (hidden.dtype, signal.logits.dtype, step.score.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_predict_streams_and_pipelines_take_the_walker_that_suits(model, tokenizer, random_texts, monkeypatch):
    texts, asked = random_texts(60), []

    def chosen(given, cuda_graphs=True):
        asked.append(cuda_graphs)
        return graphed(given) if cuda_graphs else ModelWalker(given)

    plain = ee.predict(model, texts, tokenizer=tokenizer)
    monkeypatch.setattr(predict, "walker_for", chosen)
    pipe = ee.pipeline(model=model, tokenizer=tokenizer)
    for cuda_graphs in (True, False):
        got = ee.predict(model, texts, tokenizer=tokenizer, cuda_graphs=cuda_graphs)
        streamed = list(ee.stream(model, texts, tokenizer=tokenizer, window=16, cuda_graphs=cuda_graphs))
        told = pipe(texts, cuda_graphs=cuda_graphs)
        assert torch.equal(got.exit_layer, plain.exit_layer)
        assert torch.allclose(got.logits, plain.logits, atol=NEAR)
        assert [one.exit_layer for one in streamed] == [one["exit_layer"] for one in told] == plain.exit_layer.tolist()
    pipe(texts)
    assert asked == [True, True, True, False, False, False, True]
    assert pipe(texts[0], cuda_graphs=False)[0]["exit_layer"] == int(plain.exit_layer[0])


# --- the policy within the graph ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_steps_within_the_graph(in_forward, rows, name):
    model, _ = in_forward(name, 150)
    walker, stepped = graphed(model), []
    step = type(model.exit_policy).step
    scheduler = Scheduler(walker, model.exit_policy, 96)
    for _ in range(3):
        scheduler.run(rows[:150])

    def noted(self, *given):
        stepped.append(walker.graphs.capture.running)
        return step(self, *given)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(model.exit_policy), "step", noted)
        scheduler.run(rows[:150])
    assert len(stepped) > 10
    assert all(stepped)


def test_numbers_are_brought_to_the_device_once():
    held, like = HeldNumbers(), torch.ones(2, dtype=torch.float64)
    with held:
        made = [
            (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), like.new_tensor((1, 2)), torch.tensor(5, dtype=torch.int32))
            for _ in range(2)
        ]
        other = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor((1, 2)), torch.tensor(5)
    assert all(first is second for first, second in zip(*made, strict=True))
    assert [part.tolist() for part in (*made[0], *other)] == [[[1, 2], [3, 4]], [1, 2], 5, [[1, 2], [3, 5]], [1, 2], 5]
    assert [part.dtype for part in made[0][1:] + other[1:]] == [torch.float64, torch.int32, torch.int64, torch.int64]


def test_rules_that_differ_in_a_number_have_graphs_of_their_own(model, rows):
    walker, plain, kept = graphed(model), ModelWalker(model), []
    for policy in (model.exit_policy, model.exit_policy.with_thresholds((0.6, 0.5, 0.4))):
        expected = Scheduler(plain, policy, 96).run(rows[:100])
        assert_same(twice(walker, policy, 96, rows[:100]), expected, policy)
        kept.append(expected.exit_index)
    assert not torch.equal(*kept)


class Looks(ee.ConfidencePolicy):
    def update(self, state, signal, exit_index):
        state, score, answer = super().update(state, signal, exit_index)
        return state, score if score.max() < 2 else score - 1, answer


class Brings(ee.ConfidencePolicy):
    def update(self, state, signal, exit_index):
        state, score, answer = super().update(state, signal, exit_index)
        return state, score + torch.as_tensor([0.0], device=score.device), answer


class Lists(ee.ConfidencePolicy):
    def update(self, state, signal, exit_index):
        state, score, answer = super().update(state, signal, exit_index)
        return state, score + 0 * signal.logits[:, [0, 1]].sum(1), answer


class Unnamed(ee.ConfidencePolicy):
    __hash__ = None


def test_rules_that_no_graph_can_hold_step_outside_of_them(model, rows):
    policy, expected = model.exit_policy, twice(graphed(model), model.exit_policy, 96, rows)
    assert is_captured(policy, model.num_labels)
    numbers = {"thresholds": policy.thresholds, "exit_layers": policy.exit_layers}
    for kind in (Looks, Brings, Lists, Unnamed):
        assert not is_captured(kind(**numbers), model.num_labels)
        got = twice(graphed(model), kind(**numbers), 96, rows)
        assert torch.equal(got.exit_index, expected.exit_index)
        assert torch.equal(got.logits, expected.logits)


@pytest.mark.parametrize("seed", range(20))
def test_those_who_stay_come_first_each_with_its_tokens(seed):
    generator = torch.Generator().manual_seed(seed)
    count = 1 + seed % 7
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist() + [0] * (seed % 3)
    leave, bounds = torch.rand(len(lengths), generator=generator) < 0.5, torch.tensor([0, *lengths]).cumsum(0)
    order, ends, tokens = stayers_first(bounds, leave, sum(lengths) + 5)
    real, kept = range(count), leave.tolist()
    expected = [row for row in real if not kept[row]] + [row for row in real if kept[row]]
    assert order.tolist()[:count] == expected
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert ends.tolist() == torch.tensor([lengths[row] for row in order.tolist()]).cumsum(0).tolist()
    of_rows = [token for row in expected for token in range(int(bounds[row]), int(bounds[row + 1]))]
    assert tokens.tolist()[: sum(lengths)] == of_rows
    assert len(tokens) == sum(lengths) + 5
    assert int(tokens.max()) < sum(lengths) + 5


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_what_goes_on_is_the_front_of_what_the_graph_left(family):
    """Nothing is brought from the host but new rows; layers of ModernBERT read tensors of every token beside the states."""
    model, brought = new_model(family), []
    rows = rows_of(batch_of(family, rows=24))
    policy = opened("confidence", ee.collect_trace(model, rows, labelled=False, progress=False))
    scheduler = Scheduler(graphed(model), policy, 100_000)
    expected = scheduler.run(rows)
    assert len(set(expected.exit_index.tolist())) > 2

    def placed(values, device):
        brought.append(tuple(values.shape))
        return values.to(device)

    with pytest.MonkeyPatch.context() as patched:
        for module in (transfer, packed):
            patched.setattr(module, "placed", placed)
        begun = scheduler.begin(list(enumerate(rows)))
        of_new_rows = len(brought)
        got = scheduler.run(rows)
    assert begun.places == list(range(24))
    assert torch.equal(got.exit_index, expected.exit_index)
    assert len(brought) == 2 * of_new_rows


def test_rows_that_changed_places_can_go_on_without_graphs():
    """As they must among rows with masked tokens: what layers of ModernBERT read of every token has changed places, too."""
    model = new_model("modernbert")
    rows = rows_of(batch_of("modernbert", rows=24))
    policy = opened("confidence", ee.collect_trace(model, rows, labelled=False, progress=False))
    walker, plain = graphed(model), ModelWalker(model)
    scheduler = Scheduler(walker, policy, 100_000)
    with torch.inference_mode():
        chunk, decided = scheduler.launch(scheduler.begin(list(enumerate(rows))), [].append).landed()
        hidden, context, *_ = chunk.standing
        assert chunk.places != list(range(24))
        assert decided == sorted(decided)
        layers = range(chunk.depth + 1, chunk.depth + 2)
        by_graph, without = (by.run(layers, hidden, context, None)[0] for by in (walker, plain))
    assert torch.allclose(by_graph, without, atol=NEAR)


# --- a batch that goes on -----------------------------------------------------------------------------------------------


def memory_of(chunk):
    return chunk.standing.hidden.untyped_storage().data_ptr()


@pytest.fixture
def patient(model):
    """A policy of which nobody leaves before the last exit."""
    return model.exit_policy.with_thresholds((1.0,) * 3)


@pytest.fixture
def begun(model, patient, rows):
    """A scheduler of graphs and what makes chunks of rows before the first layer."""
    scheduler = Scheduler(graphed(model), patient, 100_000)
    with torch.inference_mode():
        yield scheduler, lambda first: scheduler.begin(list(enumerate(rows[first : first + 8], first)))


def launched(scheduler, chunk):
    after, decided = scheduler.launch(chunk, [].append).landed()
    assert not any(decided)
    return after


def test_a_batch_that_goes_on_is_not_copied(begun):
    scheduler, begin = begun
    for _ in range(3):  # as it comes, captured, replayed
        chunk = begin(0)
        fresh, memories = memory_of(chunk), set()
        while chunk.depth < 3:
            chunk = launched(scheduler, chunk)
            memories.add(memory_of(chunk))
        assert len(memories) == 1
        assert memories.isdisjoint({fresh})
        assert memories <= {held.hidden.untyped_storage().data_ptr() for held in scheduler.walker.graphs.buckets.values()}


def test_no_memory_is_lent_to_two_and_it_is_lent_again_when_nobody_refers_to_it(begun):
    scheduler, begin = begun
    chunks = [launched(scheduler, begin(first)) for first in (0, 8, 16, 24)]
    before = [chunk.standing.hidden.clone() for chunk in chunks]
    lent = [chunk.standing.stay is not None for chunk in chunks]
    assert lent == [True, True, False, False]
    assert len(set(map(memory_of, chunks))) == 4
    later = [launched(scheduler, chunk) for chunk in reversed(chunks)][::-1]
    alone = Scheduler(ModelWalker(scheduler.walker.model), scheduler.policy, 100_000)
    for chunk, states, after in zip(chunks, before, later, strict=True):
        first = launched(alone, begin(chunk.places[0]))
        assert torch.allclose(states, first.standing.hidden, atol=NEAR)
        assert torch.allclose(after.standing.hidden, launched(alone, first).standing.hidden, atol=NEAR)
    first, second = memory_of(chunks[0]), memory_of(chunks[1])
    del chunk, chunks[1], later[1]
    assert memory_of(launched(scheduler, begin(8))) == second != first


def test_who_waits_or_is_followed_has_a_memory_of_its_own(model, rows):
    """A chunk that stays is the front of what was lent; whatever else is taken of it is copied."""
    scheduler = Scheduler(graphed(model), model.exit_policy, 100_000)
    with torch.inference_mode():
        flight = scheduler.launch(scheduler.begin(list(enumerate(rows[:40]))), [].append)
        chunk, leave = flight.landed()
        count = leave.count(False)
        assert 0 < count < 40
        staying, leaving = some_rows(chunk, range(count)), some_rows(chunk, range(count, 40))
        assert memory_of(staying) == memory_of(chunk)
        assert leaving.standing.stay is None
        course = Course(scheduler, lambda: None, [].append)
        course.enter(staying)
        (waiting,) = course.waiting[1]
    assert waiting.standing.stay is None
    assert len({memory_of(chunk), memory_of(leaving), memory_of(waiting)}) == 3
    assert torch.equal(waiting.standing.hidden, staying.standing.hidden)


def test_states_that_have_gone_on_are_not_used_again(begun):
    scheduler, begin = begun
    chunk = launched(scheduler, begin(0))
    launched(scheduler, chunk)
    with pytest.raises(RuntimeError, match="have gone on in the memory of a graph"):
        launched(scheduler, chunk)
    for rows in ([1, 2], [3, 1]):
        with pytest.raises(RuntimeError, match="have gone on"):
            some_rows(chunk, rows)


def test_a_capture_that_fails_leaves_the_states_of_a_batch_that_goes_on(begun):
    scheduler, begin = begun
    graphs, capture = scheduler.walker.graphs, scheduler.walker.graphs.capture
    launched(scheduler, launched(scheduler, begin(0)))
    chunk = launched(scheduler, begin(0))
    before = chunk.standing.hidden.clone()

    def refuse(body):
        body()
        raise RuntimeError("out of memory")

    graphs.capture = refuse
    with pytest.raises(UsageError, match="out of memory"):
        launched(scheduler, chunk)
    assert torch.equal(chunk.standing.hidden, before)
    graphs.capture = capture
    assert torch.allclose(launched(scheduler, chunk).standing.hidden, walked(scheduler, begin(0), 2), atol=NEAR)


def walked(scheduler, chunk, steps):
    """The states of a chunk some steps on, without graphs."""
    plain = Scheduler(ModelWalker(scheduler.walker.model), scheduler.policy, 100_000)
    for _ in range(steps):
        chunk = launched(plain, chunk)
    return chunk.standing.hidden


def test_a_row_at_fault_takes_nobody_with_it(model, rows, monkeypatch):
    """Its batch has gone on from layer to layer when it fails: the others go on from there one by one."""
    walker = graphed(model)
    third, call = walker.layers[2], packed_bert.PackedBertLayer.__call__
    plain = Scheduler(ModelWalker(model), model.exit_policy, 256).run(rows)
    length = len(rows[int((plain.exit_index >= 2).nonzero()[0])]["input_ids"])
    bad = {place for place, row in enumerate(rows) if len(row["input_ids"]) == length}

    def failing(self, hidden, context):
        if self is third and (context.bounds.diff() == length).any():
            raise RuntimeError("this row breaks the layer")
        return call(self, hidden, context)

    monkeypatch.setattr(packed_bert.PackedBertLayer, "__call__", failing)
    scheduler = Scheduler(walker, model.exit_policy, 256)
    for _ in range(2):
        answers, broken = answered_but_for_the_broken(scheduler, rows)
        assert broken == {place for place in bad if plain.exit_index[place] >= 2} != set()
        others = [place for place in range(len(rows)) if place not in broken]
        assert torch.equal(answers.exit_index[others], plain.exit_index[others])
        assert torch.allclose(answers.logits[others], plain.logits[others], atol=NEAR)


@torch.inference_mode()
def answered_but_for_the_broken(scheduler, rows):
    answers, broken, gone = Answers.blank(len(rows), scheduler.walker.num_classes), set(), []
    new_rows = scheduler._let_in(list(enumerate(rows)))
    course = Course(scheduler, lambda: next(new_rows, None), gone.append, broken=lambda places, error: broken.update(places))
    while course.step():
        pass
    answers.write(gone)
    return answers, broken


def states_leak(model, policy, change=lambda: None):
    """Whether what a policy remembers of one batch reaches the next in the same buffers."""
    walker, fresh = graphed(model), graphed(model)

    def stepped(by, lengths, seed, poison=None):
        hidden, context = random_part(lengths, seed)
        state = policy.init_state(len(lengths), model.num_labels, "cpu")
        if poison is not None:
            state = type(state)(*(part.fill_(poison) for part in state))
        with torch.inference_mode():
            return by.step(range(1, 3), Standing(hidden, context, state), policy, 1)

    for _ in range(3):
        stepped(walker, [16, 9, 12, 11], 0, poison=1)
    change()
    (_, got, _), (_, expected, _) = stepped(walker, [14, 13, 15], 1), stepped(fresh, [14, 13, 15], 1)
    assert walker.graphs.capture.captured == 1
    return not all(
        torch.equal(*parts) for parts in zip((*got.state, got.score), (*expected.state, expected.score), strict=True)
    )


def forget_what_is_known_of_rows(self, hidden, bounds, of_rows):
    FILL(self, hidden, bounds, self.of_rows)


FILL = Bucket.fill


def test_what_a_rule_remembers_of_one_batch_reaches_no_other(in_forward, monkeypatch):
    model, _ = in_forward("reward", 150)
    assert not states_leak(model, model.exit_policy)
    assert states_leak(model, model.exit_policy, partial(monkeypatch.setattr, Bucket, "fill", forget_what_is_known_of_rows))


# --- buffers and graphs -------------------------------------------------------------------------------------------------


def test_buckets_add_less_than_a_quarter():
    assert [bucket(count) for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 17, 33, 100, 128, 129)] == [
        *(1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 20, 40, 112, 128, 160)
    ]
    assert all(count <= bucket(count) < 1.25 * count for count in range(1, 20_000))


def random_part(lengths, seed):
    """States of rows that stand end to end, and their context."""
    hidden = torch.randn(sum(lengths), 32, generator=torch.Generator().manual_seed(seed))
    return hidden, Packed.of(tuple(lengths), None, hidden.device)


def leaks(model, poison=float("nan")):
    """Whether a batch that follows a larger one in the same bucket is answered otherwise than in fresh buffers."""
    walker, fresh = graphed(model), graphed(model)
    with torch.inference_mode():
        hidden, context = random_part([16, 9, 12, 11], 0)
        for values in (hidden, torch.full_like(hidden, poison), torch.full_like(hidden, poison)):
            walker.run(range(1, 3), values, context, 1)
        small = random_part([14, 13, 15], 1)
        got, signal = walker.run(range(1, 3), *small, 1)
        expected, told = fresh.run(range(1, 3), *small, 1)
    assert (walker.graphs.capture.captured, fresh.graphs.capture.captured) == (1, 0)
    return not (torch.equal(got, expected) and torch.equal(signal.logits, told.logits))


def test_nothing_of_the_batch_before_reaches_the_next(tiny_model):
    model = tiny_model(exit_head="linear-mean")
    assert not leaks(model)
    assert not leaks(model, poison=7.0)


def forget_the_states(self, hidden, bounds, of_rows):
    self.bounds[: len(bounds)], self.bounds[len(bounds) :] = bounds, bounds[-1]
    self.hidden[: len(hidden)] = hidden


def test_buffers_that_are_not_cleared_are_found_out(tiny_model, monkeypatch):
    monkeypatch.setattr(Bucket, "fill", forget_the_states)
    assert leaks(tiny_model(exit_head="linear-mean"))


def test_a_batch_stands_at_the_front_and_further_rows_are_empty():
    held = Bucket(torch.full((48, 2), 7.0), torch.full((5,), 9), [torch.zeros(4, 2)])
    held.fill(torch.ones(42, 2), torch.tensor([0, 14, 27, 42]), [torch.ones(3, 2)])
    assert held.bounds.tolist() == [0, 14, 27, 42, 42]
    assert held.of_rows[0].tolist() == [[1.0, 1.0]] * 3 + [[0.0, 0.0]]
    assert held.hidden.tolist() == [[1.0, 1.0]] * 42 + [[0.0, 0.0]] * 6


def test_buffers_that_warming_up_has_written_on_are_filled_again(tiny_model, monkeypatch):
    model, calls, fill = tiny_model(), [], Bucket.fill

    def answers():
        walker = graphed(model)
        with torch.inference_mode():
            part = random_part([9, 2, 5, 9], 4)
            return [walker.run(range(1, 3), *part, 1)[1].logits for _ in range(3)]

    first, second, third = answers()
    assert torch.equal(first, second)
    assert torch.equal(second, third)
    monkeypatch.setattr(Bucket, "fill", lambda *given: (calls.append(0), len(calls) == 3 or fill(*given)))
    first, second, _ = answers()
    assert not torch.equal(first, second)


def test_what_comes_again_is_captured_once_and_then_replayed(model):
    walker = graphed(model)
    capture = walker.graphs.capture
    with torch.inference_mode():
        for calls, lengths in enumerate([[13, 9, 20], [18, 5, 20, 1], [9] * 4 + [6], [48]]):  # the first two in one
            walker.run(range(1, 3), *random_part(lengths, 0), 1)
            assert (capture.captured, capture.replayed) == (min(calls, 1), min(calls, 1))
        for layers, exit_index, asks in [(range(1, 2), 0, ()), (range(1, 3), None, ()), (range(1, 3), 1, ("similarity",))]:
            walker.run(layers, *random_part([13, 9, 20], 0), exit_index, asks)
    assert (capture.captured, len(walker.graphs.buckets)) == (1, 6)


def test_the_number_of_tokens_makes_a_bucket_and_rows_hardly_do():
    lengths = [[7] * 6, [6] * 7, [5] * 8, [10, 10, 1, 1, 9, 9], [16, 16, 2, 2, 2, 2]]
    assert {Shape.for_rows(some) for some in lengths} == {Shape(48, 8, 16)} | {Shape(40, 8, 16)}
    assert Shape.for_rows([1]) == Shape(1, 1, 16)
    assert Shape.for_rows([512] * 32) == Shape(16384, 32, 512)
    assert Shape.for_rows([17, 300]) == Shape(320, 2, 512)


def test_graphs_are_bounded_and_the_least_used_goes_first(model):
    walker = graphed(model, limit=3)
    with torch.inference_mode():
        for tokens in (1, 2, 3, 1, 4, 1, 2):
            walker.run(range(1, 2), *random_part([tokens], 0), 0)
            assert len(walker.graphs.buckets) <= 3
    assert [shape.tokens for _, shape, _ in walker.graphs.buckets] == [4, 1, 2]
    assert walker.graphs.capture.captured == 1  # only 1 came again before it was dropped


def test_all_buckets_share_one_memory(model):
    walker = graphed(model)
    with torch.inference_mode():
        for rows in (64, 40, 7, 1):
            walker.run(range(1, 2), *random_part([16] * rows, 0), 0)
    for name in ("hidden", "bounds"):
        assert len({getattr(held, name).data_ptr() for held in walker.graphs.buckets.values()}) == 1


def test_answers_are_no_views_of_buffers(model):
    walker = graphed(model)
    with torch.inference_mode():
        part = random_part([8] * 4, 0)
        for _ in range(3):
            hidden, signal = walker.run(range(1, 2), *part, 0)
            before = hidden.clone(), signal.logits.clone()
            walker.run(range(1, 2), *random_part([8] * 4, 1), 0)
            assert torch.equal(hidden, before[0])
            assert torch.equal(signal.logits, before[1])


def test_threads_take_turns_at_the_buffers(model, rows):
    scheduler = Scheduler(graphed(model), model.exit_policy, 64)
    parts = [rows[start : start + 5] for start in range(0, 100, 5)]
    expected = [scheduler.run(part) for part in parts]

    def call(number):
        got, same = scheduler.run(parts[number % 20]), expected[number % 20]
        return torch.equal(got.logits, same.logits) and torch.equal(got.exit_index, same.exit_index)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(200)))


def test_what_cannot_be_captured_is_told(model):
    def refuse(body):
        raise RuntimeError("operation not permitted when stream is capturing")

    walker = GraphWalker(model, SegmentGraphs(refuse))
    with torch.inference_mode():
        part = random_part([8] * 4, 0)
        walker.run(range(1, 3), *part, 1)
        with pytest.raises(UsageError, match=r"layers 1 to 2, exit 1.*not permitted.*Pass cuda_graphs=False"):
            walker.run(range(1, 3), *part, 1)


def segment_on_no_device(model, policy=None):
    """A segment, and one with its policy, where tensors have no values: a look at one is an error."""
    walker = GraphWalker(model.to("meta"), SegmentGraphs(Recorder()))
    hidden, bounds = torch.empty(40, 32, device="meta"), torch.empty(9, dtype=torch.long, device="meta")
    with torch.inference_mode(), nothing_from_the_host():
        for layers, exit_index in ((range(1, 3), 1), (range(3, 5), 3)):
            asks = names_at(model.signals, last=exit_index == 3)
            result, order, (logits, *scalars) = walker._segment(Name(layers, exit_index, asks), hidden, bounds, 16)
            assert (result.shape, order, logits.shape) == ((40, 32), None, (8, 3))
            assert [values.shape for values in scalars] == [(8,)] * len(asks)
            if policy is not None:
                name, state = Name(layers, exit_index, policy.asks_at(exit_index), policy), policy.init_state(8, 3, "meta")
                result, order, (leave, *of_rows) = walker._decided(type(state), name, hidden, bounds, 16, *(state or ()))
                assert (result.shape, order.shape, leave.dtype) == ((40, 32), (40,), torch.bool)
                assert {len(part) for part in of_rows} == {8}


def test_rows_are_put_end_to_end_before_they_reach_the_device(tiny_model, rows):
    """The model's device has no values that could be looked at."""
    model = tiny_model().to("meta")
    holes = {"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}
    with torch.inference_mode():
        hidden, context = GraphWalker(model, SegmentGraphs(Recorder())).begin([*rows[:5], holes])
        hidden, context = context.take(hidden, [5, 1], torch.empty(2, dtype=torch.long, device="meta"))
    assert hidden.shape == (3 + len(rows[1]["input_ids"]), 32)
    assert {part.device.type for part in (hidden, context.bounds, context.real)} == {"meta"}


@pytest.mark.parametrize("head", HEADS.names())
@pytest.mark.parametrize("gate", GATES.names())
def test_a_segment_looks_at_no_value_and_takes_nothing_from_the_host(tiny_model, head, gate):
    segment_on_no_device(tiny_model(exit_head=head, exit_gate=gate))


def test_a_number_in_where_is_found_out(tiny_model, monkeypatch):
    call = packed_bert.PackedBertLayer.__call__

    def looked_at(self, hidden, context):
        after = call(self, hidden, context)
        return torch.where(after > 0, after, 0.5)

    monkeypatch.setattr(packed_bert.PackedBertLayer, "__call__", looked_at)
    with pytest.raises(AssertionError, match="copies from the host"):
        segment_on_no_device(tiny_model())


# --- which walker -------------------------------------------------------------------------------------------------------


class NoCuda:
    """Stands for `CudaCapture` where there is no CUDA."""

    def __init__(self, device):
        self.device = device


@pytest.fixture
def on_cuda(tiny_model, monkeypatch):
    """A model that says it is on a CUDA device."""
    model = tiny_model()
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(graph_walker, "CudaCapture", NoCuda)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    return model


def test_graphs_are_for_cuda_devices_and_can_be_turned_off(model, on_cuda):
    walker = walker_for(on_cuda)
    assert isinstance(walker, GraphWalker)
    assert (walker.lanes, walker.best_batch_tokens) == (2, 16384)
    assert type(walker_for(on_cuda, cuda_graphs=False)) is ModelWalker


def test_on_a_cpu_nothing_is_captured_and_one_lane_is_walked(model):
    walker = walker_for(model)
    assert type(walker) is ModelWalker
    assert Scheduler(walker, None, 128).lanes == walker.lanes == 1


def hooked(model):
    model.bert.encoder.layer[2].output.register_forward_hook(lambda *_: None)


def wrapped(model):
    model.exit_heads["1"].forward = model.exit_heads["1"].forward


@pytest.mark.parametrize("change", [hooked, wrapped])
def test_models_that_a_replay_would_bypass_are_walked_plainly(on_cuda, change):
    assert captures(on_cuda)
    change(on_cuda)
    assert type(walker_for(on_cuda)) is ModelWalker


def test_families_that_cannot_be_traced_are_walked_plainly(on_cuda, monkeypatch):
    untraced = replace(on_cuda.family, untraced="its mask is made in Python.")
    monkeypatch.setattr(type(on_cuda), "family", untraced)
    assert type(walker_for(on_cuda)) is ModelWalker


def test_graphs_are_kept_as_long_as_stream_modules_and_weights_are_the_same(on_cuda, monkeypatch):
    graphs = walker_for(on_cuda).graphs
    assert walker_for(on_cuda).graphs is graphs
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "another")
    other = walker_for(on_cuda).graphs
    assert other is not graphs
    on_cuda.bfloat16()
    half = walker_for(on_cuda).graphs
    assert half is not other
    on_cuda.bert.encoder.layer[0].intermediate.intermediate_act_fn = torch.nn.ReLU()
    assert walker_for(on_cuda).graphs is not half
    assert len(graph_walker._KNOWN[on_cuda]) == 1  # those of the former weights are gone


def test_graphs_keep_no_model_alive(on_cuda, tiny_model):
    other = tiny_model()
    walker_for(other)
    there = weakref.ref(other)
    assert other in graph_walker._KNOWN
    del other
    gc.collect()
    assert there() is None


def test_threads_find_the_same_graphs(on_cuda):
    found, start = [], threading.Barrier(8)

    def look():
        start.wait()
        found.append(walker_for(on_cuda).graphs)

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1
