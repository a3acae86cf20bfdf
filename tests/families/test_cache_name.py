"""Releases of transformers that call the cache by another name."""

import pytest
from transformers import VisionEncoderDecoderModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import Seq2SeqLMOutput

from hf_earlyexit.errors import UsageError
from hf_earlyexit.families.decoders import CACHE_NAMES, cache_name, given_cache


def newer(hidden, cache=None, **kwargs): ...


def older(hidden, past_key_values=None, **kwargs): ...


def renamed_again(hidden, memory=None, **kwargs): ...


def test_the_name_that_is_there_is_taken():
    assert (cache_name(newer), cache_name(older)) == CACHE_NAMES


@pytest.mark.parametrize("function", [VisionEncoderDecoderModel.forward, create_causal_mask, Seq2SeqLMOutput])
def test_what_is_installed_has_one_of_the_names(function):
    assert cache_name(function) in CACHE_NAMES


def test_an_unknown_name_is_an_error_and_no_slow_success():
    with pytest.raises(UsageError, match=r"renamed_again of transformers .* takes no cache or past_key_values"):
        cache_name(renamed_again)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_call_may_use_either_name(name):
    options = {name: "entries", "use_cache": True}
    assert given_cache(None, options) == "entries"
    assert options == {"use_cache": True}


def test_a_cache_under_two_names_is_refused():
    with pytest.raises(UsageError, match="two names"):
        given_cache("one", {"past_key_values": "another"})
