"""Break the library in small ways, one at a time, and see whether its tests fall.

The mutants are data: `mutants/*.toml` beside this file names for each a source file, the text that is there exactly once,
the text put in its place, what that means, and the tests that must fall. Each is put into a copy of the tree.

    python benchmarks/mutation.py                 # all that are not known yet, then the table and the page
    python benchmarks/mutation.py losses reward   # those of an area, or whose file or meaning holds one of these words

A result is kept with a sum of the mutant and the function or class that it changes, so a run goes on where it was stopped
and repeats what has changed since, and what survived. A mutant that survives must say why; the exit status is 1 if one does
not, is in error or was not tried.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
import tomllib
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS, PAGE = HERE / "results" / "mutation.json", ROOT / "docs" / "mutation.md"
TIMEOUT = 240  # seconds; tests that no longer end have fallen
FELL, SURVIVED, ERROR, UNTRIED = "fell", "survived", "error", "not tried"
COPIED = ("hf_earlyexit", "tests", "benchmarks", "docs", "examples", "pyproject.toml", "README.md", "mkdocs.yml")
UNSTEADY = ("tests/calibration/test_search.py::test_two_thousand_thresholds_cost_far_less_than_a_loop_over_them",)


@dataclass(frozen=True)
class Mutant:
    """One change: in `file`, `old` becomes `new`; `tests` fall. `reason` is why they do not, where they cannot."""

    area: str
    file: str
    tests: tuple[str, ...]
    old: str
    new: str
    means: str
    reason: str = ""

    @cached_property
    def key(self) -> str:
        """What a result belongs to; not the text of the tests, as those that are added take no fall back."""
        around = code_around((ROOT / self.file).read_text(encoding="utf-8"), self.old)
        parts = [self.file, self.old, self.new, *self.tests, around]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @property
    def shown(self) -> dict[str, str]:
        """What the page says of it."""
        return {"area": self.area, "file": self.file, "means": self.means, "reason": self.reason}

    def fault(self, root: Path = ROOT) -> str | None:
        """Why it cannot be tried, if so."""
        path = root / self.file
        count = path.read_text(encoding="utf-8").count(self.old) if path.is_file() else 0
        if count != 1:
            return f"{self.file} holds {self.old!r} {count} times; expected once ({self.means})"
        if self.old == self.new or not self.means:
            return f"{self.file}: {self.old!r} changes nothing or says nothing"
        for test in self.tests:
            file, _, name = test.partition("::")
            if not (root / file).is_file() or (name and f"def {name}(" not in (root / file).read_text(encoding="utf-8")):
                return f"{test} is not there ({self.file}: {self.means})"
        return None if self.tests else f"{self.file}: {self.means} names no test"


class _Bare(ast.NodeTransformer):
    """Without what computes nothing: docstrings, and the types of arguments and answers."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.ClassDef) -> ast.AST:
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        return self.generic_visit(node)

    visit_ClassDef = visit_FunctionDef  # noqa: N815


def code_around(source: str, part: str) -> str:
    """The statements of a module that hold a part of its text, as they compute: no comments, docstrings or types."""
    begin = source.index(part)
    first, last = (source.count("\n", 0, place) + 1 for place in (begin, begin + len(part.rstrip("\n"))))
    held = []
    for node in ast.parse(source).body:
        start = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
        if start <= last and first <= (node.end_lineno or start):
            held.append(ast.dump(_Bare().visit(node)))
    return "\n".join(held)


def load(folder: Path = HERE / "mutants") -> list[Mutant]:
    """All mutants, area by area."""
    mutants = []
    for file in sorted(folder.glob("*.toml")):
        for group in tomllib.loads(file.read_text(encoding="utf-8"))["of"]:
            mutants += [Mutant(file.stem, group["file"], tuple(group["tests"]), *change) for change in group["mutants"]]
    return mutants


# --- running ------------------------------------------------------------------------------------------------------------


def start(folder: Path, tests: Sequence[str], log: Path) -> int:
    """The number of a process that runs tests in a copy of the tree; what is imported here is imported there already."""
    pid = os.fork()
    if pid:
        return pid
    code = 98
    try:
        os.setsid()
        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(folder)
        sys.path[:] = [str(folder), *(path for path in sys.path if path not in (str(HERE), str(ROOT)))]
        for name in [name for name in sys.modules if name.partition(".")[0] in ("hf_earlyexit", "tests")]:
            del sys.modules[name]
        sys.stdout = sys.stderr = log.open("w", buffering=1)
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        code = run_tests(folder, tests)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def run_tests(folder: Path, tests: Sequence[str]) -> int:
    """The exit status of tests in the folder where they stand; 99 if they tried another package."""
    import pytest

    seen = "ignore::pytest.PytestAssertRewriteWarning"  # what is imported already is not rewritten any more
    options = ["-x", "-q", "--no-header", "--tb=line", "-rfE", "-W", seen, "-m", "not slow", "--rootdir=."]
    options += ["-p", "no:cacheprovider", "-p", "no:xdist"]
    code = pytest.main([*options, *(f"--deselect={name}" for name in UNSTEADY), *tests])
    package = sys.modules.get("hf_earlyexit")
    return int(code) if package is not None and str(package.__file__).startswith(str(folder)) else 99


def verdict(code: int | None, log: str) -> tuple[str, str]:
    """What became of a mutant, and the test that fell; `code` is `None` where the time was over."""
    if code is None:
        return FELL, f"not done after {TIMEOUT} s"
    match = re.search(r"^(FAILED|ERROR) (\S+)", log, re.MULTILINE)
    test = match[2] if match else ""
    if code == 0:
        return SURVIVED, ""
    if code == 1 and "::" in test:
        return FELL, test
    return ERROR, f"exit status {code}: {log.strip()[-600:]}"


def tried(jobs: Sequence[tuple[Mutant | None, tuple[str, ...]]], workers: int) -> Iterator[tuple[int, str, str, float]]:
    """Number, verdict, test that fell and seconds of each job, as they come; one without mutant runs the tree as it is."""
    with TemporaryDirectory(prefix="mutants-") as place:
        whole, *free = (Path(place, f"tree-{number}") for number in range(workers + 1))  # the tree may change meanwhile
        whole.mkdir()
        for name in COPIED:
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, whole / name)
        for folder in free:
            shutil.copytree(whole, folder)
        waiting, running = list(enumerate(jobs)), {}
        while waiting or running:
            while waiting and free:
                number, (mutant, tests) = waiting.pop(0)
                folder = free.pop()
                if mutant is not None:
                    text = (whole / mutant.file).read_text(encoding="utf-8")
                    (folder / mutant.file).write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
                running[start(folder, tests, folder / "log")] = (number, mutant, folder, time.monotonic())
            time.sleep(0.05)
            for pid, (number, mutant, folder, begun) in list(running.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                seconds = time.monotonic() - begun
                if not done and seconds < TIMEOUT * (1 if mutant else 20):
                    continue
                if not done:
                    os.killpg(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                code = os.waitstatus_to_exitcode(status) if done else None
                yield number, *verdict(code, (folder / "log").read_text(errors="replace")), seconds
                if mutant is not None:
                    shutil.copy(whole / mutant.file, folder / mutant.file)
                    for cache in (folder / mutant.file).parent.glob("__pycache__"):
                        shutil.rmtree(cache)
                del running[pid]
                free.append(folder)


def see_that_tests_pass(mutants: Sequence[Mutant], workers: int) -> None:
    """Run the tests of some mutants on the tree as it is.

    Raises:
        SystemExit: if one of them falls.
    """
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    whole = [test for test in tests if "::" not in test or test.partition("::")[0] not in tests]
    for _, outcome, fallen, seconds in tried([(None, tuple(part)) for part in (whole[::2], whole[1::2]) if part], workers):
        print(f"the tree as it is: {outcome} in {seconds:.0f} s  [{fallen}]", flush=True)
        if outcome != SURVIVED:
            raise SystemExit("The tests do not pass without any mutant; mend that first.")


def run(mutants: Sequence[Mutant], known: dict[str, dict], workers: int) -> None:
    """Try mutants and keep what became of them."""
    for number, outcome, fallen, seconds in tried([(mutant, mutant.tests) for mutant in mutants], workers):
        mutant = mutants[number]
        print(f"{outcome:9}{seconds:5.0f} s  {mutant.file}: {mutant.means}  [{fallen}]", flush=True)
        known[mutant.key] = {**mutant.shown, "outcome": outcome, "test": fallen, "seconds": round(seconds, 1)}
        RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def is_settled(mutant: Mutant, outcome: str | None) -> bool:
    """Whether a mutant need not be tried again."""
    return outcome == FELL or (outcome == SURVIVED and bool(mutant.reason))


def preload() -> None:
    """Import what tests import, once for all processes that are started from here."""
    import datasets  # noqa: F401
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch
    from transformers import BertForSequenceClassification, BertTokenizer, Trainer  # noqa: F401

    torch.set_num_threads(1)


# --- telling ------------------------------------------------------------------------------------------------------------


def page(results: Sequence[dict[str, str]]) -> str:
    """The page of the documentation: the score of each area, and every survivor with its reason."""
    lines = [
        "# Mutants",
        "",
        "Generated by `python benchmarks/mutation.py` from `benchmarks/results/mutation.json`; nothing is typed by hand.",
        "",
        "Each mutant is one small change of meaning in the library's source; it falls if a test named for it fails. "
        "Before mutants are tried, the tests named for them run on the tree as it is, and a failure ends the run; only "
        "`--trust` leaves that out.",
        "",
        "| part | mutants | not tried yet | fall | survive | share of the tried that falls |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for area in [*sorted({result["area"] for result in results}), "all"]:
        here = [result["outcome"] for result in results if area in (result["area"], "all")]
        fell, untried = here.count(FELL), here.count(UNTRIED)
        share = f"{fell / (len(here) - untried):.1%}" if untried < len(here) else "-"
        lines.append(f"| {area} | {len(here)} | {untried} | {fell} | {here.count(SURVIVED)} | {share} |")
    lines += ["", "## Survivors", "", "| file | change | why no test falls |", "|---|---|---|"]
    for result in results:
        if result["outcome"] == SURVIVED:
            file = result["file"].removeprefix("hf_earlyexit/")
            cells = (f"`{file}`", result["means"], result["reason"] or "not explained")
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    lines += [
        "",
        "A mutant is a line of data in `benchmarks/mutants/`: the text that is replaced must be in the tree exactly once; "
        "a test looks after, so that a change of the source brings its mutants along.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="an area, or a part of a file's name or of a meaning")
    parser.add_argument("--anew", action="store_true", help="also run what is known already")
    parser.add_argument("--trust", action="store_true", help="do not see first that the tests pass on the tree as it is")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    mutants = load()
    if faults := [fault for mutant in mutants if (fault := mutant.fault()) is not None]:
        print("\n".join(faults))
        return 1
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    known = {mutant.key: known[mutant.key] for mutant in mutants if mutant.key in known}
    named = [m for m in mutants if any(word == m.area or word in f"{m.file} {m.means}" for word in options.words)]
    chosen = named if options.words else mutants
    todo = [m for m in chosen if options.anew or not is_settled(m, known.get(m.key, {}).get("outcome"))]
    if todo:
        preload()
        if not options.trust:
            see_that_tests_pass(todo, options.workers)
        run(todo, known, options.workers)
    untried = {"outcome": UNTRIED, "test": "", "seconds": 0.0}
    results = {m.key: {**known.get(m.key, untried), **m.shown} for m in mutants}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(list(results.values())), encoding="utf-8")
    print(page(list(results.values())))
    left = [mutant for mutant in mutants if not is_settled(mutant, results[mutant.key]["outcome"])]
    print("\n".join(f"{results[m.key]['outcome']}: {m.file}: {m.means}" for m in left))
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
