"""The laws of the exit loop, on real hidden states. Executed layers are counted with hooks, never taken on trust."""

from dataclasses import dataclass

import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.policies import POLICIES, ExitSignal
from hf_earlyexit.problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from hf_earlyexit.walking.loop import run_early

NEAR = 1e-5  # float32 noise between batches of another shape, on numbers around 1; a decision this close may flip
SMALLEST = 0.01  # of a threshold whose noise is still in proportion to it
RULES = [POLICIES.get(name) for name in POLICIES.names()]
SERVABLE = sorted(
    (name, problem)
    for name, rule in zip(POLICIES.names(), RULES, strict=True)
    for problem in rule.problem_types
    if "gate" not in rule.asks
)
SINGLE = [name for name, problem in SERVABLE if problem == SINGLE_LABEL]
FIELDS = {SINGLE_LABEL: {}, MULTI_LABEL: {"problem_type": MULTI_LABEL}, REGRESSION: {"num_labels": 1}}
CLOSED = ee.ConfidencePolicy(thresholds=[None] * 3)


@dataclass(frozen=True, kw_only=True)
class BatchWidePolicy(ee.ConfidencePolicy):
    """The mutant: rows leave when the whole batch agrees, as in the papers' released codes."""

    def leaves(self, score, exit_index):
        leave = super().leaves(score, exit_index)
        return leave.all().expand_as(leave)


def walk(model, batch, policy):
    """The loop itself, with a policy that needs no name."""
    with torch.inference_mode():
        hidden, context = model.family.begin(model.base_model, batch, {})
        return run_early(model, hidden, context, policy, model.num_labels)


def signals(model, batch, policy):
    """Every exit's signals of a full pass, as a trace."""
    with torch.inference_mode():
        output = model(**batch, early_exit=False, exit_signals=model.signals)
    logits, scalars = output.exit_logits, output.exit_scalars or {}
    single = policy.problem_type == SINGLE_LABEL
    labels = torch.zeros(len(logits), dtype=torch.long) if single else torch.zeros(logits[:, 0].shape)
    exits = {"exit_layers": model.exit_layers, "problem_type": policy.problem_type}
    return ee.ExitTrace(logits=logits, labels=labels, scalars=scalars, **exits)


def pick(batch, rows):
    return {name: value[rows] for name, value in batch.items()}


def gaps(policy, trace):
    """How near each row comes to another decision, `[N]`: by score against threshold, and by what the exits say.

    A threshold below 1 is a unit of its own: scores of a hundredth are told apart a hundred times as finely as scores of 1.
    """
    scores = policy.scan(trace).scores
    near = torch.full((trace.num_rows,), float("inf"))
    for index, threshold in enumerate(policy.thresholds):
        if threshold is not None and not policy.counts:
            near = near.minimum((scores[:, index] - threshold).abs() / min(max(abs(threshold), SMALLEST), 1.0))
    if policy.problem_type == SINGLE_LABEL:
        top = trace.logits.topk(2, -1).values
        return near.minimum((top[..., 0] - top[..., 1]).amin(1))
    if policy.problem_type == REGRESSION:
        steps = (trace.logits[:, 1:] - trace.logits[:, :-1]).abs().amax(-1)
        return near.minimum((steps - getattr(policy, "tolerance", 0.0)).abs().amin(1))
    return near.minimum(trace.logits.abs().amin((1, 2)))


def flips_among_mates(model, policy, batch, pairs, seed=0):
    """Serve rows in random company and compare with each row alone.

    Returns (pairs that differ, near ties among those, exits seen).
    """
    rows = len(batch["input_ids"])
    alone = [walk(model, pick(batch, slice(row, row + 1)), policy) for row in range(rows)]
    exits = torch.cat([one.exit_index for one in alone])
    logits = torch.cat([one.logits for one in alone])
    close = gaps(policy, signals(model, batch, policy)) <= NEAR
    generator = torch.Generator().manual_seed(seed)
    differing = ties = done = 0
    while done < pairs:
        company = torch.randperm(rows, generator=generator)[: int(torch.randint(2, 17, (), generator=generator))]
        got = walk(model, pick(batch, company), policy)
        wrong = (got.exit_index != exits[company]) | ((got.logits - logits[company]).abs().amax(-1) > NEAR)
        differing += int(wrong.sum())
        ties += int((wrong & close[company]).sum())
        done += len(company)
    return differing, ties, set(exits.tolist())


@pytest.fixture
def made(tiny_model, open_policy):
    """`made(name, problem)`: a model and an open policy for it."""

    def make(name, problem=SINGLE_LABEL, **fields):
        model = tiny_model(**FIELDS[problem], **fields)
        share = 0.38 if name == "saturation" else 0.4  # cosines stand close together; here no threshold has near ties
        return model, open_policy(model, name, share)

    return make


# --- calibrated = served ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "problem"), SERVABLE)
@pytest.mark.parametrize("head", ["linear-mean", "linear"])
def test_the_engine_leaves_where_the_scan_of_its_own_signals_says(made, random_batch, name, problem, head):
    model, policy = made(name, problem, exit_head=head)
    model.set_exit_policy(policy)
    batch = random_batch(200, seed=9)
    trace = signals(model, batch, policy)
    scan = policy.scan(trace)
    expected = policy.decide(scan.scores)
    with torch.inference_mode():
        output = model(**batch)
    rows = torch.arange(200)
    sure = gaps(policy, trace) > NEAR
    assert sure.sum() >= 198
    layers = torch.tensor(model.exit_layers)[expected]
    assert torch.equal(output.exit_layer[sure], layers[sure])
    assert (output.logits - scan.answers[rows, expected])[sure].abs().max() <= NEAR
    assert torch.allclose(output.exit_score[sure], scan.scores[rows, expected][sure], atol=1e-4, rtol=1e-5)
    assert len(set(layers.tolist())) >= (1 if name == "static" else 2)


def test_answers_come_from_the_policy_and_not_from_the_exit(made, random_batch):
    model, policy = made("confidence")

    @dataclass(frozen=True, kw_only=True)
    class Doubled(ee.ConfidencePolicy):
        def update(self, state, signal, exit_index):
            state, score, answer = super().update(state, signal, exit_index)
            return state, score, answer * 2

    batch = random_batch(20)
    plain, doubled = walk(model, batch, policy), walk(model, batch, Doubled(thresholds=policy.thresholds))
    assert torch.equal(doubled.logits, plain.logits * 2)


# --- cost: what was run -------------------------------------------------------------------------------------------------


def count_rows(model):
    """Hooks on every layer that add up the rows it was run on."""
    counts = [0] * len(model.bert.encoder.layer)
    handles = []
    for index, layer in enumerate(model.bert.encoder.layer):

        def add(module, args, output, index=index):
            counts[index] += args[0].shape[0]

        handles.append(layer.register_forward_hook(add))
    return counts, handles


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("layers", [[1, 2, 3, 4], [2, 4], [3, 4], [4]])
def test_every_layer_runs_exactly_the_rows_that_have_not_left(made, tiny_model, open_policy, random_batch, name, layers):
    model = tiny_model(exit_layers=layers)
    policy = ee.ConfidencePolicy(thresholds=()) if len(layers) == 1 else None
    if policy is None:
        policy = ee.policies.StaticPolicy.at(0, len(layers)) if name == "static" else open_policy(model, name)
    model.set_exit_policy(policy)
    counts, _ = count_rows(model)
    with torch.inference_mode():
        output = model(**random_batch(64, seed=2))
    assert counts == [int((output.exit_layer >= layer).sum()) for layer in (1, 2, 3, 4)]
    assert sum(counts) == int(output.exit_layer.sum())


def test_heads_run_only_where_the_policy_wants_them(made, random_batch):
    model, _ = made("confidence")
    asked = []
    for layer, head in model.exit_heads.items():
        head.register_forward_hook(lambda *_, layer=layer: asked.append(int(layer)))
    walk(model, random_batch(8), ee.ConfidencePolicy(thresholds=[None, 0.5, None]))
    assert asked == [2]
    asked.clear()
    walk(model, random_batch(8), ee.policies.PatiencePolicy(thresholds=[None, None, 3], muted=[0]))
    assert asked == [2, 3]


def test_columns_that_are_padding_for_all_who_stay_are_not_run(made, random_batch):
    model, _ = made("confidence")
    widths = []
    for layer in model.bert.encoder.layer:
        layer.register_forward_hook(lambda module, args, output: widths.append(args[0].shape[1]))
    batch = random_batch(2, width=20)
    batch["attention_mask"] = torch.tensor([[1] * 20, [1] * 5 + [0] * 15])
    first, second = CLOSED.scan(signals(model, batch, CLOSED)).scores[:, 0].tolist()
    widths.clear()
    early = walk(model, batch, ee.ConfidencePolicy(thresholds=[(first + second) / 2, None, None]))
    expected = [20, 5, 5, 5] if first > second else [20, 20, 20, 20]
    assert early.exit_index.tolist() == ([0, 3] if first > second else [3, 0])
    assert widths == expected


# --- rows are alone -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SINGLE)
def test_a_row_does_not_notice_its_mates(made, random_batch, name):
    model, policy = made(name)
    differing, ties, seen = flips_among_mates(model, policy, random_batch(64, seed=5), pairs=1000)
    assert differing - ties == 0
    assert ties <= 1
    assert len(seen) >= (1 if name == "static" else 3)


@pytest.mark.parametrize("problem", [MULTI_LABEL, REGRESSION])
def test_a_row_does_not_notice_its_mates_whatever_the_problem(made, random_batch, problem):
    model, policy = made("patience", problem)
    differing, ties, seen = flips_among_mates(model, policy, random_batch(48, seed=5), pairs=500)
    assert (differing - ties, ties <= 1) == (0, True)
    assert len(seen) >= 2


def test_the_checker_catches_a_rule_over_the_whole_batch(made, random_batch):
    model, policy = made("confidence")
    differing, ties, _ = flips_among_mates(
        model, BatchWidePolicy(thresholds=policy.thresholds), random_batch(64, seed=5), pairs=1000
    )
    assert differing - ties > 20


@pytest.mark.parametrize("name", SINGLE)
def test_order_and_width_of_the_batch_change_nothing(made, random_batch, name):
    model, policy = made(name)
    batch = random_batch(40, seed=6)
    plain = walk(model, batch, policy)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = walk(model, pick(batch, order), policy)
    wider = walk(model, {key: torch.nn.functional.pad(value, (0, 9)) for key, value in batch.items()}, policy)
    sure = gaps(policy, signals(model, batch, policy)) > NEAR
    for other, back in ((shuffled, order), (wider, torch.arange(40))):
        same = other.exit_index == plain.exit_index[back]
        assert same[sure[back]].all()
        assert (other.logits - plain.logits[back])[same].abs().max() <= NEAR


def test_dropping_rows_and_trimming_columns_change_no_hidden_state(made, random_batch):
    model, _ = made("confidence")
    batch = random_batch(12, seed=8)
    keep = torch.tensor([7, 2, 9])
    with torch.inference_mode():
        hidden, context = model.family.begin(model.base_model, batch, {})
        all_rows = hidden
        for layer in (1, 2, 3, 4):
            all_rows = model.run_layer(layer, all_rows, context)
        some = model.run_layer(1, hidden, context)
        some, context = context.take(some, keep.tolist(), keep)
        for layer in (2, 3, 4):
            some = model.run_layer(layer, some, context)
    width = int(batch["attention_mask"][keep].sum(1).max())
    assert some.shape == (3, width, 32)
    assert width < 16
    real = batch["attention_mask"][keep][:, :width].bool()
    assert torch.equal(context.tokens, real)
    assert (some - all_rows[keep][:, :width])[real].abs().max() <= NEAR


# --- edges --------------------------------------------------------------------------------------------------------------


def test_all_rows_leave_at_the_first_layer(made, random_batch):
    model, _ = made("confidence")
    batch, policy = random_batch(16), ee.ConfidencePolicy(thresholds=[0.0, 0.5, 0.5])
    counts, _ = count_rows(model)
    early = walk(model, batch, policy)
    assert early.exit_index.tolist() == [0] * 16
    assert counts == [16, 0, 0, 0]
    assert torch.equal(early.logits, signals(model, batch, policy).logits[:, 0])


def test_no_row_leaves_early(made, random_batch):
    model, _ = made("confidence")
    batch = random_batch(16)
    early = walk(model, batch, CLOSED)
    assert early.exit_index.tolist() == [3] * 16
    assert torch.equal(early.logits, signals(model, batch, CLOSED).logits[:, 3])


def test_a_single_row_stays_and_every_answer_is_in_its_place(made, random_batch):
    model, _ = made("confidence")
    batch = random_batch(16)
    trace = signals(model, batch, CLOSED)
    scores = CLOSED.scan(trace).scores[:, 0]
    least, second = scores.sort().values[:2].tolist()
    early = walk(model, batch, ee.ConfidencePolicy(thresholds=[(least + second) / 2, None, None]))
    stays = int(scores.argmin())
    expected = torch.zeros(16, dtype=torch.long)
    expected[stays] = 3
    assert torch.equal(early.exit_index, expected)
    assert (early.logits - trace.logits[torch.arange(16), expected]).abs().max() <= NEAR
    assert (early.score[torch.arange(16) != stays] - scores[torch.arange(16) != stays]).abs().max() <= NEAR


def test_a_score_at_the_threshold_leaves(made, random_batch):
    model, _ = made("confidence")
    batch = random_batch(1)
    score = walk(model, batch, ee.ConfidencePolicy(thresholds=[0.0, None, None])).score.item()
    above = torch.nextafter(torch.tensor(score), torch.tensor(2.0)).item()
    assert walk(model, batch, CLOSED.with_thresholds((score, None, None))).exit_index.item() == 0
    assert walk(model, batch, CLOSED.with_thresholds((above, None, None))).exit_index.item() == 3


def test_an_empty_batch_and_a_single_row_work(made, random_batch):
    model, policy = made("beem-a")
    empty = walk(model, random_batch(0), policy)
    assert (empty.logits.shape, empty.exit_index.shape, empty.score.shape) == ((0, 3), (0,), (0,))
    assert walk(model, random_batch(1), policy).logits.shape == (1, 3)


def test_the_signals_of_the_last_exit_come_from_the_stock_head(made, random_batch):
    model, _ = made("confidence")
    batch = random_batch(4)
    with torch.inference_mode():
        hidden, context = model.family.begin(model.base_model, batch, {})
        for layer in (1, 2, 3, 4):
            hidden = model.run_layer(layer, hidden, context)
        signal = model.exit_signal(3, hidden, context)
        stock = model.classifier(model.bert.pooler(model.bert(**batch).last_hidden_state))
    assert isinstance(signal, ExitSignal)
    assert torch.equal(signal.logits, stock)
