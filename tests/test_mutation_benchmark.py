"""The list of mutants fits the tree: each text is there once, each test exists, and what was found is told as it was."""

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def mutation(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("mutation")


def test_every_mutant_can_be_tried(mutation):
    assert [fault for mutant in mutation.load() if (fault := mutant.fault()) is not None] == []


def test_there_are_enough_mutants_of_every_part_and_no_two_alike(mutation):
    mutants = mutation.load()
    assert len(mutants) >= 150
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in mutants}) == len(mutants)
    parts = {mutant.file.split("/")[1] for mutant in mutants}
    assert parts >= {"policies", "calibration", "serving", "losses", "training", "modeling", "walking", "generation"}


def test_a_mutant_that_no_longer_fits_is_told(mutation, tmp_path):
    (tmp_path / "code.py").write_text("a = 1\nb = 1\n")
    (tmp_path / "test_code.py").write_text("def test_b(): pass\n")

    def fault(old="b = 1", new="b = 2", means="b is two", tests=("test_code.py::test_b",), file="code.py"):
        return mutation.Mutant("part", file, tests, old, new, means).fault(tmp_path)

    assert fault() is None
    assert "holds 'c = 1' 0 times" in fault(old="c = 1")
    assert "holds '1' 2 times" in fault(old="1")
    assert "0 times" in fault(file="gone.py")
    assert "changes nothing" in fault(new="b = 1")
    assert "says nothing" in fault(means="")
    assert "test_code.py::test_c is not there" in fault(tests=("test_code.py::test_c",))
    assert "names no test" in fault(tests=())


def test_a_result_holds_for_the_code_around_a_mutant_and_no_longer(mutation):
    """Not for its comments, docstrings and types, nor for the functions beside it."""
    plain = "limit = 3\n\n\n@cache\ndef least(rows):\n    return min(rows)\n\n\ndef most(rows):\n    return max(rows)\n"

    def around(part, source=plain):
        return mutation.code_around(source, part)

    typed = plain.replace("(rows):\n", '(rows: list[int]) -> int:\n    """A number."""  # of them\n', 1)
    assert around("min(rows)", typed) == around("min(rows)")
    assert around("min(rows)", plain.replace("max", "sum").replace("3", "4")) == around("min(rows)")
    assert around("3") != around("3", plain.replace("3", "3 + 1"))
    for old, new in [("min(rows)", "min(rows or [0])"), ("@cache", "@lru_cache"), ("(rows)", "(rows, limit=2)")]:
        assert around("min(", plain.replace(old, new, 1)) != around("min(")
    two = around("return min(rows)\n\n\ndef most")
    assert two == around("min") + "\n" + around("max")


def test_a_mutant_is_tried_in_a_copy_and_the_tree_stays_as_it_is(mutation, tmp_path, monkeypatch):
    """One that falls, one that survives, one that cannot be imported, one that never ends; and the tree as it is."""
    for name in mutation.COPIED:
        if "." not in name:
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).touch()
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['slow: takes long']\n")
    (tmp_path / "hf_earlyexit" / "__init__.py").touch()
    code, test = tmp_path / "hf_earlyexit" / "code.py", tmp_path / "tests" / "test_code.py"
    code.write_text("def number():\n    unused = 1\n    return 2\n")
    test.write_text("from hf_earlyexit.code import number\n\n\ndef test_number():\n    assert number() == 2\n")
    monkeypatch.setattr(mutation, "ROOT", tmp_path)
    monkeypatch.setattr(mutation, "TIMEOUT", 15)
    monkeypatch.setattr(mutation, "UNSTEADY", ())
    tests = ("tests/test_code.py",)
    changes = [("return 2", "return 3"), ("unused = 1", "unused = 2"), ("return 2", "return"), ("def number", "def other")]
    mutants = [mutation.Mutant("part", "hf_earlyexit/code.py", tests, old, new, "changed") for old, new in changes]
    before = code.read_text()
    found = {number: (outcome, test) for number, outcome, test, _ in mutation.tried([(m, tests) for m in mutants], 2)}
    fell = (mutation.FELL, "tests/test_code.py::test_number")
    assert [found[0], found[1], found[2]] == [fell, (mutation.SURVIVED, ""), fell]
    assert found[3][0] == mutation.ERROR
    assert "exit status" in found[3][1]
    assert [outcome for _, outcome, _, _ in mutation.tried([(None, tests)], 1)] == [mutation.SURVIVED]
    assert code.read_text() == before
    assert mutation.verdict(None, "")[0] == mutation.FELL


def test_the_page_says_what_was_found(mutation):
    results = list(json.loads(mutation.RESULTS.read_text(encoding="utf-8")).values())
    assert mutation.PAGE.read_text(encoding="utf-8") == mutation.page(results)
    outcomes = [result["outcome"] for result in results if result["outcome"] != mutation.UNTRIED]
    assert len(outcomes) >= 150
    assert outcomes.count(mutation.FELL) >= 0.95 * len(outcomes)
    assert all(result["reason"] for result in results if result["outcome"] == mutation.SURVIVED)
    assert mutation.ERROR not in outcomes
