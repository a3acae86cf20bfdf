"""Text from outside stays text and tells nothing about the machine."""

import html
import re
import socket
from pathlib import Path

import pytest
from markupsafe import Markup

from hf_earlyexit.hub.markdown import LEFT_OUT, escape, hub_id, without_private


@pytest.mark.parametrize(
    "text",
    [
        "a | b",
        "*bold* _it_ ~~no~~ `code`",
        "<img src=x onerror=alert(1)>",
        "[link](javascript:alert(1))",
        "![x](http://evil.example/p)",
        "$x$ #1 @user {{ 7 * 7 }}",
        "\\\\| back",
    ],
)
def test_no_sign_with_a_meaning_is_left(text):
    escaped = re.sub(r"&(?:#\d+|amp|lt|gt);", "", escape(text))
    assert not re.search(r"[|*`<>\[\]~$#@{}\\]|://|(?<!\w)_|_(?!\w)", escaped)


@pytest.mark.parametrize("text", ["---", "===", "- item", "+ item", "1. item", "2) item", "-"])
def test_no_block_begins(text):
    assert not re.match(r"([-+]|[-=]+$|\d+[.)])(\s|$)|[-=]+$", escape(text))
    assert html.unescape(escape(text)) == text


@pytest.mark.parametrize("text", ["a\n---\nb", "a\r\n\r\n# b", "a\u2028b", "a\x00b\x1bc", "a\tb"])
def test_one_line_of_visible_signs(text):
    assert escape(text).isprintable()
    assert len(escape(text).splitlines()) == 1


@pytest.mark.parametrize("text", ["card_arrival", "beem-a", "0.01", "-0.25", "naïve Überweisung, 50%", "MaxDrop(drop=0.01)"])
def test_harmless_text_is_left_readable(text):
    assert escape(text) == text


def test_finished_markdown_and_numbers_pass():
    assert escape(Markup("**a**")) == "**a**"
    assert escape(3) == 3


def test_private_things_are_left_out():
    secrets = ["hf_" + "a" * 34, "/home/alice/data.csv", str(Path.home() / "x" / "y"), "C:\\Users\\bob\\x", "file:///a/b"]
    for secret in secrets:
        told = without_private(f"rows of {secret} here")
        assert secret not in told
        assert told == f"rows of {LEFT_OUT} here"
    assert socket.gethostname() not in without_private(f"ran on {socket.gethostname()}") or len(socket.gethostname()) < 4
    assert without_private("train/validation 3/4") == "train/validation 3/4"


@pytest.mark.parametrize("name", ["bert-base-uncased", "google-bert/bert-base-uncased"])
def test_hub_ids_are_kept(name):
    assert hub_id(name) == name


@pytest.mark.parametrize("name", [None, "/home/alice/model", "../model", "a/b/c", "hf_" + "a" * 34, "a b", "", "x" * 5000])
def test_anything_else_is_not(name):
    assert hub_id(name) is None


def test_a_folder_that_looks_like_an_id_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "out" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("out/model") is None
