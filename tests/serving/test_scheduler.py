"""Full chunks, same answers: whatever the order, the budget and the company."""

import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.errors import UsageError
from hf_earlyexit.families.context import Context
from hf_earlyexit.policies import POLICIES
from hf_earlyexit.serving import scheduler as engine
from hf_earlyexit.serving.chunks import Chunk, Flight
from hf_earlyexit.serving.course import Course
from hf_earlyexit.serving.rows import encode_rows
from hf_earlyexit.serving.scheduler import Scheduler
from hf_earlyexit.serving.walker import ModelWalker
from hf_earlyexit.walking.step import Standing

NEAR = 1e-5
NAMES = [name for name in POLICIES.names() if "gate" not in POLICIES.get(name).asks]


class CountingWalker(ModelWalker):
    """Remembers every layer call as (layer, rows, padded tokens, real tokens)."""

    def __init__(self, model):
        super().__init__(model)
        self.calls, self.asked = [], set()

    def run_layer(self, layer, hidden, context):
        padded = hidden.shape[:-1].numel()
        real = padded if context.lengths is None else sum(context.lengths)
        self.calls.append((layer, context.count(hidden), padded, real))
        return super().run_layer(layer, hidden, context)

    def exit_signal(self, exit_index, hidden, context, asks=(), before=None):
        self.asked.add(exit_index)
        return super().exit_signal(exit_index, hidden, context, asks, before)


@pytest.fixture(params=[1, 2, 3])
def lanes(request):
    """Chunks under way at once; no number of them changes a law."""
    return request.param


@pytest.fixture(scope="module")
def every_exit(model, rows):
    """`[N, E, C]`: the logits of each row by itself at every exit."""
    with torch.inference_mode():
        each = [model(input_ids=torch.tensor([row["input_ids"]]), early_exit=False).exit_logits for row in rows]
    return torch.cat(each)


def assert_same(got, expected, policy, places=slice(None)):
    thresholds = [threshold for threshold in policy.thresholds if threshold is not None]
    gap = torch.stack([(expected.score[places] - threshold).abs() for threshold in thresholds]).amin(0)
    sure = (gap > NEAR) | torch.tensor(policy.counts)
    assert torch.equal(got.exit_index[sure], expected.exit_index[places][sure])
    assert (got.logits - expected.logits[places])[sure].abs().max() <= NEAR
    assert torch.allclose(got.score[sure], expected.score[places][sure], atol=1e-4)
    assert sure.float().mean() > 0.98


def clock_of(walker, monkeypatch):
    """The scheduler's clock tells the layers this walker has run, so that a busy machine changes no test."""
    clock = SimpleNamespace(monotonic=lambda: len(walker.calls))
    monkeypatch.setattr(engine, "time", clock)


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_answers_as_in_forward(in_forward, rows, name, lanes):
    model, expected = in_forward(name, 150)
    got = Scheduler(ModelWalker(model), model.exit_policy, 96, lanes=lanes).run(rows[:150])
    assert_same(got, expected, model.exit_policy)


@pytest.mark.parametrize("budget", [1, 40, 128, 512, 100_000])
def test_order_and_budget_change_no_answer(in_forward, rows, budget, lanes):
    model, expected = in_forward("confidence", 500)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(budget))
    got = Scheduler(ModelWalker(model), model.exit_policy, budget, lanes=lanes).run(
        [rows[place] for place in order.tolist()]
    )
    assert_same(got, expected, model.exit_policy, order)
    assert len(set(got.exit_index.tolist())) == 4


def test_the_threads_of_torch_change_no_answer(in_forward, rows):
    (model, expected), threads = in_forward("confidence", 500), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        got = Scheduler(ModelWalker(model), model.exit_policy, 128).run(rows[:100])
    finally:
        torch.set_num_threads(threads)
    assert_same(got, expected, model.exit_policy, slice(100))


def test_layers_run_exactly_the_rows_that_have_not_left(model, rows, lanes):
    walker = CountingWalker(model)
    answers = Scheduler(walker, model.exit_policy, 256, lanes=lanes).run(rows)
    for layer in range(1, 5):
        assert sum(call[1] for call in walker.calls if call[0] == layer) == int((answers.exit_index >= layer - 1).sum())


def test_chunks_stay_full_and_hold_little_padding(model, rows, lanes):
    walker = CountingWalker(model)
    Scheduler(walker, model.exit_policy, 256, lanes=lanes).run(rows)
    assert max(call[2] for call in walker.calls) <= 256
    padded, real = (sum(call[part] for call in walker.calls) for part in (2, 3))
    assert real / padded > 0.93
    thin = sum(call[2] < 128 for call in walker.calls)
    assert thin <= 2 * len(model.exit_layers)  # those at the end, and no others


@pytest.mark.parametrize("seed", range(5))
def test_no_chunk_is_larger_than_asked_not_even_of_those_who_waited(tiny_model, rows, lanes, seed):
    dice = torch.Generator().manual_seed(seed)

    class Dice(ee.ConfidencePolicy):
        def leaves(self, score, exit_index):
            share = 1.0 if exit_index == len(self.thresholds) else 0.12  # few leave at any exit, whatever they say
            return torch.bernoulli(torch.full(score.shape, share), generator=dice).bool()

    walker, short = CountingWalker(tiny_model(num_hidden_layers=8)), [row for row in rows if len(row["input_ids"]) <= 12]
    Scheduler(walker, Dice(thresholds=[0.5] * 7), 64, lanes=lanes).run(short)
    assert max(call[2] for call in walker.calls) <= 64


@pytest.fixture
def story(model, rows, monkeypatch):
    """`story(lanes)`: the order in which layers begin and decisions are waited for."""

    class Telling(ModelWalker):
        def run(self, layers, *given):
            told.append(("layers", layers.stop - 1))
            return super().run(layers, *given)

    def telling(mask):
        number, wait = len([one for one in told if one[0] == "layers"]), engine_sent(mask)
        return lambda: (told.append(("wait", number)), wait())[1]

    told, engine_sent = [], engine.sent
    monkeypatch.setattr(engine, "sent", telling)

    def tell(lanes):
        told.clear()
        Scheduler(Telling(model), model.exit_policy, 64, lanes=lanes).run(rows[:60])
        return list(told)

    return tell


def test_a_decision_travels_while_the_other_lanes_compute(story, lanes):
    told = story(lanes)
    under_way = 0
    most = 0
    for what, _ in told:
        under_way += 1 if what == "layers" else -1
        most = max(most, under_way)
        assert 0 <= under_way <= lanes
    assert [what for what, _ in told[: lanes + 1]] == ["layers"] * lanes + ["wait"]
    assert (most, under_way) == (lanes, 0)
    assert [number for what, number in told if what == "wait"] == sorted(number for what, number in told if what == "wait")


def test_one_lane_waits_for_each_decision_at_once(story):
    assert [what for what, _ in story(1)] == ["layers", "wait"] * (len(story(1)) // 2)
    assert story(1) != story(2)


def test_the_launching_half_looks_at_no_value(tiny_model, open_policy, rows):
    for name in NAMES:
        model = tiny_model()
        policy = open_policy(model, name)
        bare = model.to("meta")  # whose tensors have no values: a look at one is an error
        for given in (policy, None):
            scheduler = Scheduler(ModelWalker(bare, pack=False), given, 512, ends_at=1e18)
            state = None if given is None else given.init_state(5, 3, "meta")
            tokens = torch.ones(5, 7, dtype=torch.bool, device="meta")
            context = Context({"attention_mask": None}, tokens=tokens, lengths=(7,) * 5)
            hidden = torch.empty(5, 7, 32, device="meta")
            flight = scheduler.launch(Chunk(0, [0, 1, 2, 3, 4], Standing(hidden, context, state), None), [].append)
            assert (flight.chunk.depth, flight.judged.answer.shape) == (1, (5, 3))
            with pytest.raises(NotImplementedError):
                flight.decided()


@pytest.mark.parametrize(("flying", "goes"), [([], True), ([3, 2], True), ([1, 2], False), ([0], False)])
def test_who_waits_goes_on_when_nobody_can_join_any_more(model, flying, goes):
    course = Course(Scheduler(ModelWalker(model), model.exit_policy, 128, lanes=3), lambda: None, [].append)
    few = Chunk(1, [0], Standing(torch.zeros(2, 32), Context(), None), None)
    course.flying.extend(Flight(few._replace(depth=depth), None, list) for depth in flying)
    course.waiting[1].append(few)
    assert (course._next() is few) is goes
    assert course.waiting == {1: [] if goes else [few], 2: [], 3: [], 4: []}


@pytest.mark.parametrize("wrong", [0, -1])
def test_lanes_out_of_range_are_refused(model, wrong):
    with pytest.raises(UsageError, match=f"lanes is {wrong}; expected a whole number from 1"):
        Scheduler(ModelWalker(model), None, 128, lanes=wrong)


class Quick(ModelWalker):
    """Has a quicker way for a row that is alone, which says that it left at some exit."""

    left_at = 1

    def alone(self, row, policy):
        return torch.tensor([[1.0, 2.0, 3.0]]), self.left_at, torch.tensor([0.5])


def test_a_quicker_way_is_for_a_row_that_is_alone_and_for_all_layers(model, rows):
    walker, told = Quick(model), []
    for Quick.left_at, reason in ((1, "policy"), (3, "last layer")):
        answers = Scheduler(walker, model.exit_policy, 128, on_done=told.append).run(rows[:1])
        assert (answers.logits.tolist(), answers.score.tolist()) == ([[1.0, 2.0, 3.0]], [0.5])
        assert (answers.exit_index.tolist(), answers.reason) == ([Quick.left_at], [reason])
    assert sum(told) == 2
    plain = Scheduler(ModelWalker(model), model.exit_policy, 128).run(rows[:2])
    assert torch.equal(Scheduler(walker, model.exit_policy, 128).run(rows[:2]).logits, plain.logits)
    for options in ({"layer_budget": 3}, {"ends_at": 1e18}):
        own = Scheduler(ModelWalker(model), model.exit_policy, 128, **options).run(rows[:1])
        assert torch.equal(Scheduler(walker, model.exit_policy, 128, **options).run(rows[:1]).logits, own.logits)


def test_all_leave_at_the_first_layer_and_none_leaves(tiny_model, rows, lanes):
    model = tiny_model()
    first = Scheduler(ModelWalker(model), ee.policies.StaticPolicy.at(0, 4), 128, lanes=lanes).run(rows[:50])
    none = Scheduler(ModelWalker(model), ee.ConfidencePolicy(thresholds=[None] * 3), 128, lanes=lanes).run(rows[:50])
    assert (set(first.exit_index.tolist()), set(first.reason)) == ({0}, {"policy"})
    assert (set(none.exit_index.tolist()), set(none.reason)) == ({3}, {"last layer"})


def test_exits_nobody_can_leave_at_are_not_computed(model, rows, lanes):
    walker = CountingWalker(model)
    Scheduler(walker, ee.ConfidencePolicy(thresholds=[None, None, 0.9]), 128, lanes=lanes).run(rows[:50])
    assert walker.asked == {2, 3}
    walker = CountingWalker(model)
    Scheduler(walker, None, 128, lanes=lanes).run(rows[:50])
    assert walker.asked == {3}


def test_zero_rows_and_one_row(in_forward, rows, lanes):
    model, expected = in_forward("confidence", 500)
    scheduler = Scheduler(ModelWalker(model), model.exit_policy, 128, lanes=lanes)
    assert scheduler.run([]).logits.shape == (0, 3)
    assert_same(scheduler.run(rows[:1]), expected, model.exit_policy, slice(1))


def test_chunks_that_join_keep_the_budget_of_tokens(tiny_model, tokenizer, random_texts):
    """Padding counts: few short rows that wait and a long one who comes would be many tokens together."""
    sizes, rows = [], encode_rows(random_texts(60, longest=30, seed=2), tokenizer)

    class Noting(ModelWalker):
        def run_layer(self, layer, hidden, context):
            sizes.append((hidden.shape[0], hidden.shape[0] * hidden.shape[1]))
            return super().run_layer(layer, hidden, context)

    model = tiny_model()
    with torch.inference_mode():
        each = [model(input_ids=torch.tensor([row["input_ids"]]), early_exit=False).exit_logits[0] for row in rows]
    sure = torch.stack(each).softmax(-1).amax(-1)
    policy = ee.ConfidencePolicy(thresholds=sure[:, :3].quantile(0.6, dim=0).tolist())
    Scheduler(Noting(model, pack=False), policy, 64).run(rows)
    assert all(tokens <= 64 for count, tokens in sizes if count > 1)
    assert max(count for count, _ in sizes) > 4


def test_a_layer_budget_is_kept_and_said(model, rows, lanes):
    free = Scheduler(ModelWalker(model), model.exit_policy, 128, lanes=lanes).run(rows)
    walker = CountingWalker(model)
    tight = Scheduler(walker, model.exit_policy, 128, layer_budget=2, lanes=lanes).run(rows)
    assert max(call[0] for call in walker.calls) == 2
    assert tight.exit_index.tolist() == free.exit_index.clamp(max=1).tolist()
    for reason, index in zip(tight.reason, free.exit_index.tolist(), strict=True):
        assert reason == ("policy" if index <= 1 else "layer budget")
    assert torch.allclose(tight.logits[free.exit_index <= 1], free.logits[free.exit_index <= 1], atol=NEAR)


def test_a_layer_budget_before_the_first_exit_is_refused(tiny_model):
    with pytest.raises(UsageError, match="first exit in use is after layer 2: expected at least 2"):
        Scheduler(ModelWalker(tiny_model(exit_layers=[2, 4])), None, 128, layer_budget=1)


def test_at_the_deadline_rows_leave_at_the_last_exit_they_passed(model, rows, monkeypatch, lanes):
    closed, full = ee.ConfidencePolicy(thresholds=[None] * 3), CountingWalker(model)
    free = Scheduler(full, closed, 512, lanes=lanes).run(rows)
    walker, half = CountingWalker(model), len(full.calls) // 2
    clock_of(walker, monkeypatch)
    part = Scheduler(walker, closed, 512, ends_at=half, lanes=lanes).run(rows)
    assert set(part.reason) >= {"deadline", "last layer"}
    assert len(walker.calls) < len(full.calls)
    assert len(walker.calls) == half
    reached = part.exit_index == 3
    assert torch.allclose(part.logits[reached], free.logits[reached], atol=NEAR)
    unanswered = part.exit_index == -1
    assert torch.equal(part.logits.isnan().all(1), unanswered)
    assert bool(unanswered.any())


def test_answers_at_a_deadline_are_those_of_the_exit(model, rows, every_exit, monkeypatch, lanes):
    walker = CountingWalker(model)
    clock_of(walker, monkeypatch)
    got = Scheduler(walker, ee.ConfidencePolicy(thresholds=[None] * 3), 100_000, ends_at=2, lanes=lanes).run(rows[:30])
    assert set(got.exit_index.tolist()) == {1}
    assert set(got.reason) == {"deadline"}
    assert torch.allclose(got.logits, every_exit[:30, 1], atol=NEAR)


def test_no_layer_begins_after_a_deadline(model, rows, lanes):
    begun = []

    class Clocked(ModelWalker):
        def run_layer(self, layer, hidden, context):
            begun.append(time.monotonic())
            return super().run_layer(layer, hidden, context)

    generator = random.Random(0)
    for _ in range(1000):
        begun.clear()
        ends_at = time.monotonic() + generator.uniform(0, 0.004)
        Scheduler(Clocked(model), model.exit_policy, 128, ends_at=ends_at, lanes=lanes).run(rows[:20])
        late = [moment for moment in begun if moment >= ends_at]
        assert len(late) <= 1  # the clock may strike between the look at it and the layer's begin


@pytest.mark.slow
def test_eight_threads_share_a_model_and_engines(model, rows):
    """Engines of one and of two lanes take turns; threads change places a hundred thousand times a second if they can."""
    parts = [rows[start : start + 5] for start in range(0, 100, 5)]
    turns = cycle([Scheduler(ModelWalker(model), model.exit_policy, 64, lanes=lanes) for lanes in (1, 2)])
    expected = [next(turns).run(part) for part in parts]
    before = dict(vars(model)), {name: dict(vars(module)) for name, module in model.named_modules()}

    def call(number):
        got, same = next(turns).run(parts[number % 20]), expected[number % 20]
        return torch.equal(got.logits, same.logits) and torch.equal(got.exit_index, same.exit_index)

    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(call, range(1200)))
    finally:
        sys.setswitchinterval(usual)
    assert before == (dict(vars(model)), {name: dict(vars(module)) for name, module in model.named_modules()})


def test_rows_with_masked_tokens_inside_and_in_front_are_answered_as_in_forward(model, lanes):
    generator = torch.Generator().manual_seed(3)
    masked = [
        {"input_ids": torch.randint(5, 99, (width,), generator=generator).tolist(), "attention_mask": mask}
        for width, mask in [(4, [0, 0, 1, 1]), (5, [1, 1, 0, 1, 1]), (3, [1, 1, 1]), (6, [0] * 6), (4, [1] * 4)]
    ]
    got = Scheduler(ModelWalker(model), model.exit_policy, 1000, lanes=lanes).run(masked)
    with torch.inference_mode():
        for place, row in enumerate(masked):
            output = model(**{name: torch.tensor([values]) for name, values in row.items()})
            assert int(output.exit_layer) == model.exit_layers[got.exit_index[place]]
            assert torch.allclose(output.logits[0], got.logits[place], atol=NEAR)


def test_at_a_deadline_rows_keep_their_own_answers_after_others_left(model, rows, every_exit, monkeypatch, lanes):
    """Rows leave at every exit before the clock strikes; whoever stays remembers what its last exit said of it alone."""
    walker, sure = CountingWalker(model), every_exit.softmax(-1).amax(-1)
    policy = ee.ConfidencePolicy(thresholds=sure[:, :3].quantile(0.6, dim=0).tolist())
    clock_of(walker, monkeypatch)
    got = Scheduler(walker, policy, 256, ends_at=100, lanes=lanes).run(rows)
    answered = (got.exit_index >= 0).nonzero().flatten()
    late = [place for place in answered.tolist() if got.reason[place] == "deadline"]
    assert len({int(got.exit_index[place]) for place in late}) > 1
    assert len(late) > 5
    assert got.reason.count("policy") > 50
    assert torch.allclose(got.logits[answered], every_exit[answered, got.exit_index[answered]], atol=NEAR)
    assert torch.allclose(got.score[answered], sure[answered, got.exit_index[answered]], atol=NEAR)


def test_reasons_tell_who_left_by_the_policy_at_the_last_exit_within_a_budget(model, rows, lanes):
    first = ee.ConfidencePolicy(thresholds=[0.0, None, None])
    got = Scheduler(ModelWalker(model), first, 128, layer_budget=1, lanes=lanes).run(rows[:20])
    assert set(got.reason) == {"policy"}
    got = Scheduler(ModelWalker(model), ee.ConfidencePolicy(thresholds=[1.0, None, None]), 128, layer_budget=1).run(
        rows[:20]
    )
    assert set(got.reason) == {"layer budget"}
