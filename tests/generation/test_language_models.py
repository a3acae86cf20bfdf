"""Language models with exits: the stock model where exits are closed, tokens that leave where they are open."""

import pickle

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, BertTokenizer, pipeline
from transformers.cache_utils import StaticCache

import hf_earlyexit as ee
from hf_earlyexit.errors import DataError, EarlyExitConfigError, UsageError
from hf_earlyexit.families.decoders import TokenContext, cache_name
from tests.captions.toy import VOCABULARY
from tests.generation.conftest import LAYERS, PAD, WORDS, WRITERS, confidence, door, prompts, stock_class

MODES = {"greedy": {}, "beams": {"num_beams": 3}, "sampling": {"do_sample": True, "top_k": 20}}
every = pytest.mark.parametrize("name", WRITERS)


def cached(output):
    return output[cache_name(type(output))]


def generated(model, ids, mask, **options):
    torch.manual_seed(7)
    return model.generate(ids, attention_mask=mask, max_new_tokens=14, pad_token_id=PAD, **options)


@pytest.mark.parametrize("mode", MODES)
@every
def test_closed_exits_give_the_stock_ids(stock_folder, writer, name, mode):
    stock = stock_class(name).from_pretrained(stock_folder(name)).eval()
    ids, mask = prompts(4, 6, padding=(3, 1))
    expected = generated(stock, ids, mask, **MODES[mode])
    assert len(set(map(tuple, expected[:, 6:].tolist()))) == 4
    model = writer(name)
    assert torch.equal(generated(model, ids, mask, **MODES[mode]), expected)
    policy = confidence(model, 0.5)
    model.set_exit_policy(policy.with_thresholds((None,) * (LAYERS - 1)))
    assert torch.equal(generated(model, ids, mask, **MODES[mode]), expected)
    model.set_exit_policy(policy)
    assert not torch.equal(generated(model, ids, mask, **MODES[mode]), expected), "open exits must change something here"
    assert torch.equal(generated(model, ids, mask, early_exit=False, **MODES[mode]), expected)


@every
def test_doors_load_plain_checkpoints_and_stock_classes_read_their_folders(stock_folder, writer, name, tmp_path):
    model = ee.from_pretrained(stock_folder(name), task="text-generation", exit_layers=[2, 4])
    assert type(model) is door(name) is type(ee.from_pretrained(stock_folder(name)))
    assert type(ee.from_pretrained(stock_folder(name), task="text-classification")) is not door(name)
    stock, ids = stock_class(name).from_pretrained(stock_folder(name)).eval(), prompts(2, 5)[0]
    model.eval().set_exit_policy(confidence(model, 0.5))
    model.save_pretrained(tmp_path)
    assert torch.equal(stock_class(name).from_pretrained(tmp_path).eval()(ids).logits, stock(ids).logits)
    for auto in (AutoModel, AutoModelForCausalLM):
        again = auto.from_pretrained(tmp_path)
        assert type(again) is door(name)
        assert again.exit_layers == (2, 4)
        assert again.exit_policy == model.exit_policy
    assert pickle.loads(pickle.dumps(door(name))) is door(name)
    with pytest.raises(UsageError, match="'text-generation'"):
        ee.from_pretrained(tmp_path, task="text-classification")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every
def test_rows_leave_alone(writer, name, attention):
    model = writer(name, share=0.5, attn_implementation=attention)
    ids, mask = prompts(5, 6, padding=(4, 2))
    together = generated(model, ids, mask, return_exit_layers=True)
    layers = together.exit_layers
    assert not layers[:, :6].any()
    assert set(layers[:, 6].tolist()) == {LAYERS}, "the first token comes from the prompt"
    assert max(len(set(column.tolist()) - {0}) for column in layers.T) > 2
    for row, padding in enumerate((4, 2, 0, 0, 0)):
        alone = generated(model, ids[row : row + 1, padding:], mask[row : row + 1, padding:], return_exit_layers=True)
        length = padding + alone.sequences.shape[1]
        assert torch.equal(alone.sequences[0], together.sequences[row, padding:length])
        assert torch.equal(alone.exit_layers[0], layers[row, padding:length])


@every
def test_layers_run_for_the_tokens_that_are_reported(writer, name):
    model, ran = writer(name, share=0.5), [0] * LAYERS
    for index, layer in enumerate(model.backbone.layers(model)):
        layer.register_forward_hook(lambda _, args, __, index=index: ran.__setitem__(index, ran[index] + len(args[0])))
    left = generated(model, *prompts(3, 5), return_exit_layers=True, eos_token_id=None).exit_layers
    assert ran == [int((left >= layer).sum()) for layer in range(1, LAYERS + 1)]
    assert ran[-1] < ran[0]


@every
def test_entries_of_skipped_layers_are_what_the_layer_makes_of_the_state(writer, name):
    """Keys and values at a layer that nobody ran, against those that the layer itself makes of the same state."""
    model = writer(name)
    model.set_exit_policy(ee.policies.StaticPolicy.at(0, LAYERS))
    ids, _ = prompts(2, 5)
    cache = cached(model(ids, use_cache=True))
    states = []
    model.backbone.layers(model)[0].register_forward_hook(lambda _, args, output: states.append(output))
    model(ids[:, :1], cache=cache, early_exit=True)
    positions, catcher = torch.full((1, 1), 5), _Catcher()
    context = TokenContext(catcher, None, positions, rotary=model.backbone.rotary(model, states[0], positions))
    model.backbone.step(model.backbone.layers(model)[2], states[0], context)
    keys, values = catcher.made
    assert torch.allclose(cache.layers[2].keys[:, :, -1:], keys, atol=1e-6)
    assert torch.allclose(cache.layers[2].values[:, :, -1:], values, atol=1e-6)


class _Catcher:
    """Stands for a cache that holds nothing and keeps what a layer gives it."""

    def update(self, keys, values, *_, **__):
        self.made = keys, values
        return keys, values


def test_every_exit_answers_where_it_is_asked(writer):
    model = writer("qwen3", exit_gate="linear", exit_head="low-rank", exit_rank=8)
    ids, _ = prompts(3, 7)
    some = ids > 40
    whole, part = model(ids, early_exit=False), model(ids, early_exit=False, exit_tokens=some)
    assert whole.exit_logits.shape == (3, 7, LAYERS, WORDS)
    assert torch.equal(whole.exit_logits[:, :, -1], whole.logits)
    assert torch.equal(part.exit_logits, whole.exit_logits[some])
    assert torch.equal(part.exit_scalars["gate"], whole.exit_scalars["gate"][some])
    with pytest.raises(UsageError, match="logits_to_keep"):
        model(ids, early_exit=False, logits_to_keep=1)
    model.train()
    labels = ids.masked_fill(~some, -100)
    loss = model(ids, labels=labels).loss
    wanted = labels[:, 1:].flatten()
    depths = torch.arange(1.0, LAYERS + 1)
    each = torch.stack([
        torch.nn.functional.cross_entropy(whole.exit_logits[:, :-1, exit].flatten(0, 1), wanted) for exit in range(LAYERS)
    ])  # fmt: skip
    assert loss.item() == pytest.approx(((each * depths).sum() / depths.sum()).item(), rel=1e-5)


@pytest.mark.parametrize("early_exit", [None, False])
def test_words_after_the_end_of_a_text_have_no_layer(writer, early_exit):
    model = writer("gpt2", share=0.5)
    ids, mask = prompts(4, 6)
    free = generated(model, ids, mask, early_exit=early_exit)[:, 6:]
    end = int(free[0, 3])  # where the first text is to end
    done = generated(model, ids, mask, early_exit=early_exit, eos_token_id=end, return_exit_layers=True)
    written, layers = done.sequences[:, 6:], done.exit_layers[:, 6:]
    lengths = [row.tolist().index(end) + 1 if end in row else len(row) for row in written]
    assert lengths[0] <= 4 < max(lengths)
    for row, length in zip(layers, lengths, strict=True):
        assert (row[:length] > 0).all()
        assert not row[length:].any()


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.empty(1, 0, dtype=torch.long), r"shape \[1, 0\]"),
        (torch.empty(0, 3, dtype=torch.long), r"shape \[0, 3\]"),
        (torch.tensor([4, 5, 6]), r"shape \[3\]"),
        (torch.ones(1, 3), "float32"),
        (torch.ones(1, 3, dtype=torch.bool), "bool"),
        (torch.tensor([[4, 5], [6, WORDS]]), f"Row 1 .* to {WORDS}; expected 0 to {WORDS - 1}"),
        (torch.tensor([[4, -100]]), "Row 0 .* from -100"),
        ("a text", "'a text'"),
    ],
)
def test_what_is_no_prompt_is_refused(writer, ids, words):
    model = writer("gpt2", share=0.5)
    for options in ({"inputs": ids}, {"input_ids": ids}, {"inputs": ids, "lossless": True}):
        with pytest.raises(DataError, match=words):
            model.generate(**options, max_new_tokens=2, pad_token_id=PAD)


def test_a_policy_that_cannot_work_is_refused(writer):
    model = writer("llama", share=0.5)
    ids, mask = prompts(2, 5)
    for options, field in (
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"cache_implementation": "offloaded"}, "cache_implementation"),
        ({"use_cache": False}, "use_cache"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"assistant_early_exit": 2}, "assistant_early_exit"),
        ({"prefill_chunk_size": 2}, "prefill_chunk_size"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
    ):
        with pytest.raises(UsageError, match=field):
            generated(model, ids, mask, **options)
    cache = StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        model(ids, cache=cache, early_exit=False)
        with pytest.raises(UsageError, match="cannot decode over this cache"):
            model(ids[:, :1], cache=cache)
        with pytest.raises(UsageError, match="No token can leave early"):
            model(ids, labels=ids)
        with pytest.raises(UsageError, match="use_cache is False"):
            model(ids, use_cache=False)
    with pytest.raises(EarlyExitConfigError, match="add_cross_attention"):
        ee.EarlyExitGPT2LMConfig(add_cross_attention=True)


@every
def test_a_cache_that_never_arrives_is_an_error(writer, monkeypatch, name):
    """As when a release of transformers calls it by a name that nobody knows: no silent run through all layers."""
    model = writer(name, share=0.5)

    def given_cache(cache, options):
        options.pop("past_key_values", None)  # as 5.23 calls it

    monkeypatch.setattr("hf_earlyexit.generation.language_model.given_cache", given_cache)
    with pytest.raises(UsageError, match="there is no cache that holds a prompt"):
        generated(model, *prompts(2, 5), eos_token_id=None)


def test_a_chat_goes_on_over_its_cache(writer):
    model = writer("llama", share=0.5)
    ids, mask = prompts(1, 5)
    first = generated(model, ids, mask, return_dict_in_generate=True, early_exit=False)
    longer = torch.cat([first.sequences, prompts(1, 3, seed=5)[0]], 1)
    expected = model.generate(longer, max_new_tokens=9, pad_token_id=PAD, early_exit=False)
    assert torch.equal(
        model.generate(longer, cache=cached(first), max_new_tokens=9, pad_token_id=PAD, early_exit=False), expected
    )
    output = model.generate(longer, max_new_tokens=9, pad_token_id=PAD, return_exit_layers=True)
    assert (output.exit_layers[0, longer.shape[1] + 1 :] < LAYERS).any()


def test_pipelines_exit_early(writer, tmp_path):
    model = writer("gpt2", share=0.5, exit_layers=[1, 2, 4])
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(VOCABULARY)}, model_max_length=40)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ran = []
    stock, ours = pipeline("text-generation", model=str(tmp_path)), ee.pipeline("text-generation", model=str(tmp_path))
    stock.model.backbone.layers(stock.model)[-1].register_forward_hook(lambda *_: ran.append(1))
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    for text in ("w5 w9 w17", [{"role": "user", "content": "w8 w30"}]):
        ran.clear()
        answer = ours(text, **options)[0]
        assert stock(text, **options)[0]["generated_text"] == answer["generated_text"]
        assert len(answer["exit_layers"]) == 9
        assert sum(layer == LAYERS for layer in answer["exit_layers"]) == len(ran) < 9
        assert answer["mean_exit_layer"] == pytest.approx(sum(answer["exit_layers"]) / 9)
    with pytest.raises(UsageError, match="for another task"):
        ee.pipeline("text-classification", model=model, tokenizer=tokenizer)


def test_new_words_reach_the_exits(writer):
    model = writer("llama", exit_head="linear")
    model.resize_token_embeddings(WORDS + 3)
    assert model(prompts(1, 3)[0], early_exit=False).exit_logits.shape[-1] == WORDS + 3


@pytest.mark.parametrize("lossless", [False, True])
def test_an_answer_that_is_not_finite_is_an_error_of_its_row(writer, lossless):
    model = writer("llama", share=0.5, exit_layers=[2, 4])
    ids, mask = prompts(3, 5)
    with torch.no_grad():
        model.model.embed_tokens.weight[89] = float("inf")
    ids[1, 2] = 89
    with pytest.raises(DataError, match="Row 1 "):
        generated(model, ids, mask, lossless=lossless)
