"""Tiny language models whose tokens leave at different layers. No network."""

import pytest
import torch
import transformers

import hf_earlyexit as ee
from hf_earlyexit.doors import WRITING, door_of
from hf_earlyexit.families import FAMILIES
from tests.families.tiny import fields

WRITERS = [name for name, family in FAMILIES.items() if family.writer]
WORDS, PAD, END, LAYERS = 90, 1, 2, 4
DEEPER = {"gpt2": {"n_layer": LAYERS}}


def stock_class(name):
    return getattr(transformers, f"{FAMILIES[name].name}{FAMILIES[name].writer}")


def door(name):
    return getattr(ee, door_of(name, WRITING).model)


def scores_seen(monkeypatch, policy):
    """A list that fills with the scores of all exits but the last as decoding asks every one of them."""
    seen, update = [], type(policy).update

    def spy(self, state, signal, exit_index):
        found = update(self, state, signal, exit_index)
        if exit_index < self.num_exits - 1:
            seen.append(found[1])
        return found

    monkeypatch.setattr(type(policy), "update", spy)
    monkeypatch.setattr(type(policy), "wants", lambda *_: True)
    return seen


def shape(name):
    """Fields of a tiny stock config of 4 layers, of which Qwen's see a window but for the first."""
    common = {key: value for key, value in fields(name).items() if key != "num_labels"}
    depth = DEEPER.get(name, {"num_hidden_layers": LAYERS})
    return {**common, **depth, "initializer_range": 0.3, "bos_token_id": 3, "eos_token_id": END}


@pytest.fixture(scope="session")
def stock_folder(tmp_path_factory):
    """`stock_folder(name)`: a folder with an ordinary language model of a family."""
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            made[name] = tmp_path_factory.mktemp("stock") / name
            stock_class(name)(stock_class(name).config_class(**shape(name))).save_pretrained(made[name])
        return made[name]

    return make


@pytest.fixture(scope="session")
def writer(stock_folder):
    """`writer(name, share=None, dtype=torch.float32, **fields)`: the same with exits, heads and gates random.

    With `share`, a confidence policy lets about that share of some random tokens go at each exit.
    """

    def make(name="llama", share=None, dtype=torch.float32, **fields):
        folder = stock_folder(name)  # before the seed: it draws numbers the first time alone
        torch.manual_seed(0)
        model = door(name).from_pretrained(folder, dtype=dtype, **fields).eval()
        with torch.no_grad():
            for parameter, weight in model.named_parameters():
                if parameter.startswith(("exit_heads.", "exit_gates.")) and "norm" not in parameter:
                    weight.normal_(0, 0.1 if weight.ndim == 1 else 0.5)
        if share is not None:
            model.set_exit_policy(confidence(model, share))
        return model

    return make


def confidence(model, share):
    with torch.no_grad():
        logits = model(prompts(20, 12, seed=3)[0], early_exit=False).exit_logits
    sure = logits.float().softmax(-1).amax(-1).flatten(0, 1)[:, :-1]
    return ee.ConfidencePolicy(thresholds=sure.quantile(1 - share, dim=0).tolist())


def prompts(rows, width, seed=1, padding=()):
    """Random ids `[rows, width]` and their mask, with so many padding tokens on the left of the first rows."""
    ids = torch.randint(4, WORDS, (rows, width), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        ids[row, :count], mask[row, :count] = PAD, 0
    return ids, mask
