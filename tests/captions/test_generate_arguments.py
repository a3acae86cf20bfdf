"""Every argument that transformers' `generate` documents works as in the stock class, or is refused by name."""

import inspect

import pytest
import torch
from transformers import (
    BertTokenizer,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteriaList,
    VisionEncoderDecoderModel,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer

from hf_earlyexit.errors import DataError, UsageError
from hf_earlyexit.families.decoders import CACHE_NAMES, cache_name
from tests.captions.conftest import LAYERS, PAD, START, WORDS

NEW, NEVER = 8, 49


class Written(BaseStreamer):
    def __init__(self):
        self.ids = []

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self): ...


def halved(ids, scores):
    return scores / 2


def stop_rows(length):
    """Each row by itself: the even ones are done at this length."""

    def criterion(ids, scores, **kwargs):
        return torch.tensor([row % 2 == 0 and ids.shape[1] >= length for row in range(len(ids))])

    return criterion


# What works, with a value that is not the default, and what else it needs.
WORKS = {
    "generation_config": lambda: {"generation_config": GenerationConfig(max_new_tokens=5)},
    "logits_processor": lambda: {"logits_processor": LogitsProcessorList([halved])},
    "stopping_criteria": lambda: {"stopping_criteria": StoppingCriteriaList([stop_rows(4)])},
    "prefix_allowed_tokens_fn": lambda: {"prefix_allowed_tokens_fn": lambda row, ids: [5, 6, 7 + row]},
    "synced_gpus": lambda: {"synced_gpus": False},
    "streamer": lambda: {"streamer": Written()},
    "max_length": lambda: {"max_length": 6},
    "max_new_tokens": lambda: {"max_new_tokens": 3},
    "min_length": lambda: {"min_length": 6},
    "min_new_tokens": lambda: {"min_new_tokens": 6},
    "early_stopping": lambda: {"early_stopping": True, "num_beams": 3},
    "max_time": lambda: {"max_time": 60.0},
    "do_sample": lambda: {"do_sample": True},
    "num_beams": lambda: {"num_beams": 3},
    "use_cache": lambda: {"use_cache": True},
    "cache_implementation": lambda: {"cache_implementation": "dynamic"},
    "temperature": lambda: {"temperature": 0.3, "do_sample": True},
    "top_k": lambda: {"top_k": 3, "do_sample": True},
    "top_p": lambda: {"top_p": 0.5, "do_sample": True},
    "min_p": lambda: {"min_p": 0.1, "do_sample": True},
    "typical_p": lambda: {"typical_p": 0.5, "do_sample": True},
    "epsilon_cutoff": lambda: {"epsilon_cutoff": 0.01, "do_sample": True},
    "eta_cutoff": lambda: {"eta_cutoff": 0.01, "do_sample": True},
    "repetition_penalty": lambda: {"repetition_penalty": 3.0},
    "length_penalty": lambda: {"length_penalty": 3.0, "num_beams": 3},
    "no_repeat_ngram_size": lambda: {"no_repeat_ngram_size": 1},
    "bad_words_ids": lambda: {"bad_words_ids": [[number] for number in range(10, 40)]},
    "renormalize_logits": lambda: {"renormalize_logits": True, "num_beams": 2},
    "forced_bos_token_id": lambda: {"forced_bos_token_id": 7},
    "forced_eos_token_id": lambda: {"forced_eos_token_id": 9},
    "remove_invalid_values": lambda: {"remove_invalid_values": True},
    "exponential_decay_length_penalty": lambda: {"exponential_decay_length_penalty": (2, 5.0)},
    "suppress_tokens": lambda: {"suppress_tokens": list(range(10, 40))},
    "begin_suppress_tokens": lambda: {"begin_suppress_tokens": list(range(10, 40))},
    "sequence_bias": lambda: {"sequence_bias": {(7,): 50.0}},
    "watermarking_config": lambda: {"watermarking_config": WatermarkingConfig(bias=20.0)},
    "num_return_sequences": lambda: {"num_return_sequences": 2, "num_beams": 3},
    "output_scores": lambda: {"output_scores": True, "return_dict_in_generate": True},
    "output_logits": lambda: {"output_logits": True, "return_dict_in_generate": True},
    "return_dict_in_generate": lambda: {"return_dict_in_generate": True},
    "pad_token_id": lambda: {"pad_token_id": 8},
    "bos_token_id": lambda: {"bos_token_id": 8},
    "eos_token_id": lambda: {"eos_token_id": list(range(20, 30))},
    "decoder_start_token_id": lambda: {"decoder_start_token_id": 8},
    "disable_compile": lambda: {"disable_compile": True},
    "top_h": lambda: {"top_h": 0.5, "do_sample": True},
}
# What captioners with early exit refuse, what else it needs, and a word of the error; all of them name the argument.
REFUSED = {
    "assistant_model": lambda: {"assistant_model": object()},
    "custom_generate": lambda: {"custom_generate": lambda model, *args, **kwargs: None},
    "negative_prompt_ids": lambda: {"negative_prompt_ids": torch.ones(2, 1, dtype=torch.long)},
    "negative_prompt_attention_mask": lambda: {"negative_prompt_attention_mask": torch.ones(2, 1, dtype=torch.long)},
    "guidance_scale": lambda: {"guidance_scale": 1.5},
    "use_mtp": lambda: {"use_mtp": True},
    "use_cache": lambda: {"use_cache": False},
    "cache_implementation": lambda: {"cache_implementation": "static"},
    "output_attentions": lambda: {"output_attentions": True},
    "output_hidden_states": lambda: {"output_hidden_states": True},
    "prompt_lookup_num_tokens": lambda: {"prompt_lookup_num_tokens": 2},
    "assistant_early_exit": lambda: {"assistant_early_exit": 2},
    "penalty_alpha": lambda: {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": lambda: {"dola_layers": "high"},
    "num_beam_groups": lambda: {"num_beam_groups": 2, "num_beams": 4, "diversity_penalty": 0.5},
    "constraints": lambda: {"constraints": [object()], "num_beams": 2},
    "force_words_ids": lambda: {"force_words_ids": [[5]], "num_beams": 2},
    "prefill_chunk_size": lambda: {"prefill_chunk_size": 1},
}
# What says nothing by itself: how an assistant or a static cache works where there is one, and what transformers ignores.
SILENT = {
    "inputs",  # the images
    "kwargs",
    "stop_strings",  # tested below, with the tokenizer that it needs
    "token_healing",  # needs a text prompt and a tokenizer
    "cache_config",
    "max_cache_len",
    "encoder_repetition_penalty",  # of the encoder's input ids, which images have none of
    "encoder_no_repeat_ngram_size",
    "is_assistant",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "max_matching_ngram_size",
    "assistant_lookbehind",
    "target_lookbehind",
    "assistant_ensemble_weight",
    "speculation_type",
    "compile_config",
    "continuous_batching_config",
    "low_memory",
    "diversity_penalty",  # of beam groups
    "transformers_version",
}
FIELDS = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
DOCUMENTED = FIELDS | set(inspect.signature(GenerationMixin.generate).parameters) - {"self"}


@pytest.fixture(scope="module")
def stock(stock_folder):
    return VisionEncoderDecoderModel.from_pretrained(stock_folder("gpt2")).eval()


def test_no_argument_is_forgotten():
    assert DOCUMENTED - set(WORKS) - set(REFUSED) - SILENT == set()


def ids(output):
    return output if isinstance(output, torch.Tensor) else output.sequences


@pytest.mark.parametrize("name", [name for name in WORKS if name in DOCUMENTED])
def test_what_works_is_the_stock_answer_and_lets_tokens_leave(captioner, stock, images, mixed, name):
    model = captioner()
    plain = {"max_new_tokens": NEW} if not {"max_length", "max_new_tokens", "generation_config"} & set(WORKS[name]()) else {}
    options = {**plain, **WORKS[name]()}

    def written(model, **more):
        torch.manual_seed(0)
        return model.generate(images(3), **{**options, **more})

    expected = written(stock)
    assert torch.equal(ids(written(model)), ids(expected))
    model.set_exit_policy(mixed(model, "confidence").with_thresholds((None,) * 3))
    assert torch.equal(ids(written(model)), ids(expected))
    if isinstance(options.get("streamer"), Written):
        assert options["streamer"].ids, "the streamer got nothing"
        options["num_beams"], options["streamer"] = 1, None
    model.set_exit_policy(mixed(model, "confidence"))
    early = written(model, return_exit_layers=True)
    used = early.exit_layers[early.exit_layers > 0]
    assert used.min() < LAYERS or early.sequences.shape[1] <= 2, "no token left early"


@pytest.mark.parametrize("name", [name for name in REFUSED if name in DOCUMENTED])
def test_what_is_refused_is_named(captioner, images, mixed, name):
    model = captioner()
    model.set_exit_policy(mixed(model, "confidence"))
    with pytest.raises(UsageError, match=name):
        model.generate(images(2), max_new_tokens=NEW, **REFUSED[name]())


@pytest.mark.parametrize("name", ["prompt_lookup_num_tokens", "penalty_alpha", "assistant_early_exit"])
def test_layers_of_other_ways_of_decoding_are_not_to_be_had(captioner, images, name):
    with pytest.raises(UsageError, match=name):
        captioner().generate(images(2), max_new_tokens=NEW, return_exit_layers=True, **REFUSED[name]())


@pytest.mark.parametrize("name", ["use_cache", "cache_implementation", "output_hidden_states", "prompt_lookup_num_tokens"])
@pytest.mark.parametrize("way", ["early_exit", "operating_point", "closed"])
def test_in_full_all_of_it_works(captioner, stock, images, mixed, name, way):
    model = captioner()
    policy = mixed(model, "confidence")
    model.set_exit_policy(policy.with_thresholds((None,) * 3) if way == "closed" else policy)
    more = {"early_exit": {"early_exit": False}, "operating_point": {"operating_point": "exact"}, "closed": {}}[way]
    rows = images(1) if name == "prompt_lookup_num_tokens" else images(3)  # transformers assists one row at a time
    options = {"max_new_tokens": NEW, "return_dict_in_generate": True, **REFUSED[name]()}
    expected, output = stock.generate(rows, **options), model.generate(rows, **options, **more)
    assert torch.equal(output.sequences, expected.sequences)
    if name == "output_hidden_states":
        for mine, theirs in zip(output.decoder_hidden_states, expected.decoder_hidden_states, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def test_a_generation_config_of_ones_own_takes_the_rest_from_the_model(captioner, stock, images):
    model = captioner()
    given = GenerationConfig(max_new_tokens=5)
    assert torch.equal(model.generate(images(2), given), stock.generate(images(2), given))
    with pytest.raises(UsageError, match="generation_config is dict"):
        model.generate(images(2), {"max_new_tokens": 5})
    model.generation_config.pad_token_id = None
    with pytest.raises(DataError, match="No padding token"):
        model.generate(images(2), given)


@pytest.mark.parametrize("flag", ["output_hidden_states", "output_attentions"])
def test_states_asked_for_in_a_generation_config_are_refused_as_by_keyword(captioner, images, mixed, flag):
    model = captioner(attention="eager")
    settings = GenerationConfig(max_new_tokens=4, return_dict_in_generate=True, **{flag: True})
    in_full = model.generate(images(2), settings)
    assert in_full[flag.replace("output", "decoder")] is not None
    model.set_exit_policy(mixed(model, "confidence"))
    with pytest.raises(UsageError, match=flag):
        model.generate(images(2), settings)
    model.generation_config.update(**{flag: True})
    with pytest.raises(UsageError, match=flag):
        model.generate(images(2))


@pytest.mark.parametrize("policy", [True, False])
@pytest.mark.parametrize("beams", [1, 3])
def test_padding_after_a_criterion_of_a_row_has_no_layer(captioner, images, mixed, policy, beams):
    model = captioner()
    if policy:
        model.set_exit_policy(mixed(model, "confidence"))

    def written(**options):
        return model.generate(images(4), max_new_tokens=NEW, num_beams=beams, return_exit_layers=True, **options)

    criteria = StoppingCriteriaList([stop_rows(4)])
    whole, stopped = written(eos_token_id=NEVER), written(eos_token_id=NEVER, stopping_criteria=criteria)
    assert not (whole.sequences == NEVER).any()
    assert stopped.exit_layers.shape == stopped.sequences.shape
    if beams == 1:
        assert (stopped.sequences[::2, 4:] == PAD).all()
        assert not stopped.exit_layers[::2, 4:].any()
        assert torch.equal(stopped.exit_layers[::2, :4], whole.exit_layers[::2, :4])
        assert torch.equal(stopped.exit_layers[1::2], whole.exit_layers[1::2])
        assert torch.equal(stopped.sequences[1::2], whole.sequences[1::2])
    written_words = (stopped.sequences != PAD).long().flip(1).cumsum(1).flip(1) > 0  # up to the last word
    assert not stopped.exit_layers[~written_words].any()


def test_without_an_end_token_a_row_writes_on_after_its_criterion(captioner, images, mixed):
    """As in the stock loop, which pads only where there is a token that ends captions."""
    model = captioner()
    model.set_exit_policy(mixed(model, "confidence"))
    options = {"max_new_tokens": NEW, "eos_token_id": None, "return_exit_layers": True}
    whole = model.generate(images(4), **options)
    stopped = model.generate(images(4), **options, stopping_criteria=StoppingCriteriaList([stop_rows(4)]))
    assert torch.equal(stopped.sequences, whole.sequences)
    assert torch.equal(stopped.exit_layers, whole.exit_layers)


def test_stop_strings_end_rows_too(captioner, images, mixed):
    model = captioner()
    model.set_exit_policy(mixed(model, "confidence"))
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
    tokenizer = BertTokenizer(vocab={**words, **{f"w{number}": number for number in range(5, WORDS)}, "abcdef": WORDS})
    options = {"max_new_tokens": NEW, "eos_token_id": NEVER, "return_exit_layers": True}
    free = model.generate(images(4), **options)
    word = int(free.sequences[0, 3])
    ended = model.generate(images(4), **options, stop_strings=[f"w{word}"], tokenizer=tokenizer)
    width = ended.sequences.shape[1]
    for row in range(4):
        places = (free.sequences[row, 1:width] == word).nonzero().flatten()
        length = int(places[0]) + 2 if len(places) else width
        assert torch.equal(ended.exit_layers[row, :length], free.exit_layers[row, :length])
        assert not ended.exit_layers[row, length:].any()
    assert width > 4
    assert not ended.exit_layers[0, 4:].any()


# --- a policy is set, and no token could leave -------------------------------------------------------------------------


def begun(model, images):
    """Images as the decoder takes them, and a cache that holds the prompt."""
    encoded = model.encoder(images)
    cache = EncoderDecoderCache(DynamicCache(config=model.config.decoder), DynamicCache(config=model.config.decoder))
    model(encoder_outputs=encoded, decoder_input_ids=torch.full((len(images), 1), START), cache=cache, use_cache=True)
    return encoded, cache


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_token_over_a_cache_leaves_by_either_name(captioner, images, mixed, kind, name):
    model = captioner(kind)
    model.set_exit_policy(mixed(model, "static"))
    encoded, cache = begun(model, images(2))
    output = model(
        encoder_outputs=encoded, decoder_input_ids=torch.full((2, 1), 7), use_cache=True, early_exit=True, **{name: cache}
    )
    assert output.exit_layer.flatten().tolist() == [2, 2]
    assert output[cache_name(type(output))] is cache


def test_passes_from_which_nothing_could_leave_are_refused(captioner, images, mixed):
    model, word = captioner(), torch.full((2, 1), 7)
    model.set_exit_policy(mixed(model, "static"))
    pixels = images(2)
    encoded, cache = begun(model, pixels)
    over_cache = {"encoder_outputs": encoded, "use_cache": True}
    plain = DynamicCache(config=model.config.decoder)
    for layer in range(LAYERS):
        plain.update(torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 1, 16), layer)
    refused = [
        ({"pixel_values": pixels, "labels": word}, "labels are compared"),
        ({"pixel_values": pixels, "decoder_input_ids": word, "use_cache": False}, "use_cache is False"),
        ({**over_cache, "decoder_input_ids": word.expand(2, 2), "cache": cache}, "several tokens at once"),
        ({**over_cache, "decoder_input_ids": word, "cache": plain}, "The cache is DynamicCache"),
    ]
    closed = mixed(model, "static").with_thresholds((None,) * 3)
    for inputs, words in refused:
        model.set_exit_policy(mixed(model, "static"))
        with pytest.raises(UsageError, match=words):
            model(**inputs)
        if "cache" not in inputs:
            assert (model(**inputs, early_exit=False).exit_layer == LAYERS).all()
            model.set_exit_policy(closed)
            assert (model(**inputs).exit_layer == LAYERS).all()


def test_a_static_cache_handed_over_is_refused_and_runs_in_full_when_asked(captioner, images, mixed):
    model = captioner()
    expected = model.generate(images(2), max_new_tokens=4)
    model.set_exit_policy(mixed(model, "static"))

    def static():
        made = [StaticCache(config=model.config.decoder, max_cache_len=length) for length in (8, 5)]
        return {cache_name(VisionEncoderDecoderModel.forward): EncoderDecoderCache(*made)}

    with pytest.raises(UsageError, match="StaticLayer"):
        model.generate(images(2), max_new_tokens=4, **static())
    assert torch.equal(model.generate(images(2), max_new_tokens=4, early_exit=False, **static()), expected)
    model.set_exit_policy(mixed(model, "static").with_thresholds((None,) * 3))
    assert torch.equal(model.generate(images(2), max_new_tokens=4, **static()), expected)


def test_a_cache_that_never_arrives_is_an_error(captioner, images, mixed, monkeypatch):
    """As when a release of transformers calls it by a name that nobody knows."""
    model = captioner()
    model.set_exit_policy(mixed(model, "confidence"))

    def given_cache(cache, options):
        options.pop("past_key_values", None)  # as 5.23 calls it

    monkeypatch.setattr("hf_earlyexit.captions.model.given_cache", given_cache)
    with pytest.raises(UsageError, match="there is no cache that holds a prompt"):
        model.generate(images(2), max_new_tokens=4, eos_token_id=None)
