"""Where lossless texts begin and end: prompts of one token, ends and lengths that fall among drafts, rows in company."""

import pytest
import torch
from transformers import StoppingCriteriaList

from hf_earlyexit.errors import UsageError
from tests.generation.conftest import LAYERS, PAD, WORDS, WRITERS, prompts
from tests.generation.test_lossless import both, cache_of, drafter  # noqa: F401

ENDS = list(range(2, WORDS, 9))  # so many that rows end at different places
every = pytest.mark.parametrize("name", WRITERS)


def ends_of(output):
    """Of each row, the place of its last token, and the layer it was drafted at."""
    places = (output.exit_layers > 0).int() * torch.arange(output.exit_layers.shape[1])
    last = places.amax(1)
    return last.tolist(), output.exit_layers.gather(1, last[:, None])[:, 0].tolist()


@every
def test_prompts_of_one_token(drafter, name):  # noqa: F811
    """Alone, and beside longer ones, padded on the left."""
    model = drafter(name)
    ids, mask = prompts(4, 1)
    full, drafted = both(model, ids, mask, eos_token_id=None)
    assert torch.equal(drafted.sequences, full.sequences)
    assert 0 < sum(drafted.draft_counts.accepted) < sum(drafted.draft_counts.drafted)
    for row in range(4):
        assert torch.equal(both(model, ids[row : row + 1], mask[:1], eos_token_id=None)[1].sequences[0], full.sequences[row])
    longer, seen = prompts(4, 5, seed=2, padding=(4, 0, 2, 4))
    longer[0, 4] = ids[0, 0]
    beside = both(model, longer, seen, eos_token_id=None)
    assert torch.equal(beside[1].sequences, beside[0].sequences)
    assert torch.equal(beside[1].sequences[0, 4:], full.sequences[0])


@every
def test_end_tokens_among_drafts_end_each_row_for_itself(drafter, name):  # noqa: F811
    """An end token that is drafted is checked at once; rows that go on are not touched, and nothing stands behind an end."""
    model = drafter(name)
    ids, mask = prompts(6, 5, padding=(3, 0, 1))
    free = both(model, ids, mask, eos_token_id=None)[1]
    drafted_words = free.sequences[(free.exit_layers > 0) & (free.exit_layers < LAYERS)]
    words, counts = drafted_words.unique(return_counts=True)
    ends = words[counts.argsort(descending=True)[:3]].tolist()  # words that were drafts, and right
    full, drafted = both(model, ids, mask, eos_token_id=ends)
    assert torch.equal(drafted.sequences, full.sequences)
    places, layers = ends_of(drafted)
    assert any(layer < LAYERS for layer in layers), "an end must be a draft"
    assert len(set(places)) > 1, "rows must end at different places"
    for row, place in enumerate(places):
        assert (drafted.sequences[row, place + 1 :] == PAD).all()
        assert not drafted.exit_layers[row, place + 1 :].any()
        for layer in cache_of(drafted).layers:
            behind = place + layer.keys.shape[2] - layer.get_seq_length()
            assert not layer.keys[row, :, behind:].any()
    assert drafted.draft_counts.tokens == sum(place - 4 for place in places)


@pytest.mark.parametrize("most", [2, 7])
@every
def test_a_length_reached_among_drafts_is_kept_to(drafter, name, most):  # noqa: F811
    """Whatever the limit: as many tokens as were asked for, none computed beyond, and the last is never a draft."""
    model = drafter(name, share=0.95)
    ids, mask = prompts(3, 5, padding=(2,))
    whole = both(model, ids, mask, eos_token_id=None)[0].sequences
    waited = 0
    for limit in range(1, 10):
        drafted = both(model, ids, mask, eos_token_id=None, max_new_tokens=limit, max_drafts=most)[1]
        assert torch.equal(drafted.sequences, whole[:, : 5 + limit])
        assert (drafted.exit_layers[:, -1] == LAYERS).all()
        counts = drafted.draft_counts
        assert counts.tokens == 3 * limit
        assert counts.checks + sum(counts.accepted) == 3 * (limit - 1)
        assert cache_of(drafted).get_seq_length() == 4 + limit
        waited += limit > 1 and bool((drafted.exit_layers[:, -2] < LAYERS).any())
    assert waited > 3, "drafts must stand right before the limit"
    by_length = model.generate(ids, attention_mask=mask, max_length=9, lossless=True, eos_token_id=None, pad_token_id=PAD)
    assert torch.equal(by_length, whole[:, :9])


@every
def test_eight_rows_are_eight_batches_of_one(drafter, name):  # noqa: F811
    """Ids, layers, and the calls of layers that each row's drafts need: nothing of a row depends on the others."""
    model = drafter(name)
    padding = (4, 3, 2, 1, 0, 0, 0, 0)
    ids, mask = prompts(8, 5, padding=padding)
    together = both(model, ids, mask, eos_token_id=ENDS)[1]
    drafted = accepted = checks = 0
    for row, left in enumerate(padding):
        alone = both(model, ids[row : row + 1, left:], mask[row : row + 1, left:], eos_token_id=ENDS)[1]
        length = left + alone.sequences.shape[1]
        assert torch.equal(alone.sequences[0], together.sequences[row, left:length])
        assert torch.equal(alone.exit_layers[0], together.exit_layers[row, left:length])
        assert not together.exit_layers[row, length:].any()
        drafted += sum(alone.draft_counts.drafted)
        accepted += sum(alone.draft_counts.accepted)
        checks += alone.draft_counts.checks
    counts = together.draft_counts
    assert (sum(counts.drafted), sum(counts.accepted), counts.checks) == (drafted, accepted, checks)
    assert len({int((row > 0).sum()) for row in together.exit_layers}) > 1, "rows must end at different places"


def test_a_criterion_among_drafts_ends_the_rows_that_it_names(drafter):  # noqa: F811
    model = drafter("qwen3")
    ids, mask = prompts(4, 5)
    free = both(model, ids, mask, eos_token_id=None)[1]
    word = int(free.sequences[(free.exit_layers > 0) & (free.exit_layers < LAYERS)].mode().values)

    def criterion(ids, scores, **_):
        return ids[:, -1] == word

    options = {"eos_token_id": WORDS - 1, "stopping_criteria": StoppingCriteriaList([criterion])}
    full, drafted = both(model, ids, mask, **options)
    assert torch.equal(drafted.sequences, full.sequences)
    assert min(ends_of(drafted)[1]) < LAYERS, "a row must end with a draft"


@pytest.mark.parametrize("kind", ["static", "offloaded", "offloaded_static"])
def test_caches_that_cannot_be_cropped_are_refused_with_the_reason(drafter, kind):  # noqa: F811
    with pytest.raises(UsageError, match="rows leave at different layers") as caught:
        drafter("llama").generate(
            prompts(1, 3)[0], lossless=True, max_new_tokens=3, pad_token_id=PAD, cache_implementation=kind
        )
    assert caught.value.field == "cache_implementation"
