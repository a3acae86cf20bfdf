"""The documentation is true: its code runs, its commands exist, and nothing public is left out."""

from __future__ import annotations

import copy
import doctest
import json
import re
import shlex
import sys
import tomllib
from functools import partial
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import hf_earlyexit as ee
from hf_earlyexit.calibration import TARGETS
from hf_earlyexit.cli.main import COMMANDS, flags_of
from hf_earlyexit.cli.parsing import parse_arguments
from hf_earlyexit.losses import OBJECTIVES
from hf_earlyexit.modeling.heads import HEADS
from hf_earlyexit.policies import POLICIES
from hf_earlyexit.signals import SIGNALS
from hf_earlyexit.training.metrics import EXIT_METRICS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
README = ROOT / "README.md"
FENCE = re.compile(r"^```([a-z]*)([^\n]*)\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
POLICY_NAMES = ("Exit", "Entropy", "Margin", "Patience", "Gate", "Saturation", "Static")
OTHERS = ["policies.register_policy", "signals.ExitSignal", "signals.register_signal", "evaluation.EarlyExitMetric",
          "calibration.CalibrationResult", *(f"policies.{name}Policy" for name in POLICY_NAMES)]  # fmt: skip
LAZY = ("captions", "generation", "hub", "reports", "training")
ROOM_NAMES = [
    f"{room}.{name}" for room in LAZY for name in import_module(f"hf_earlyexit.{room}").__all__ if name.upper() != name
]
PUBLIC = [name for name in ee.__all__ if name != "__version__"] + ROOM_NAMES + OTHERS


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str):
    """Line number, rest of the opening fence, and text of every block of a language."""
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        if found[1] == language:
            yield text.count("\n", 0, found.start(3)), found[2].strip(), found[3]


def commands():
    for page in [README, *PAGES]:
        for line, _, text in blocks(page, "bash"):
            for offset, command in enumerate(text.splitlines()):
                if "hf-earlyexit " in command:
                    yield pytest.param(page, command, id=f"{name_of(page)}:{line + offset + 1}")


@pytest.fixture
def clean_registries(monkeypatch):
    """What a page registers is forgotten afterwards."""
    for registry in (POLICIES, SIGNALS):
        registry.names()
        monkeypatch.setattr(registry, "_items", dict(registry._items))


@pytest.fixture(scope="module")
def trained_once():
    """`trained_once(train)`: a copy of the model that the first call trained; it is the same for every page."""
    models = []

    def make(train):
        if not models:
            models.append(train())
        return copy.deepcopy(models[0])

    return make


@pytest.fixture
def page_module(monkeypatch, tmp_path, trained_once):
    """An empty module to run a page in, beside docs/toy.py, in a folder of its own."""
    module = ModuleType("page_of_the_docs")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "toy", raising=False)
    monkeypatch.syspath_prepend(str(DOCS))
    monkeypatch.chdir(tmp_path)
    toy = import_module("toy")
    monkeypatch.setattr(toy, "trained_model", partial(trained_once, toy.trained_model))
    yield module
    sys.modules.pop("toy", None)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # torch's advice to every Trainer that finds no GPU
@pytest.mark.parametrize("page", [p for p in [README, *PAGES] if list(blocks(p, "python"))], ids=name_of)
def test_python_blocks_run(page, page_module, clean_registries):
    for line, _, text in blocks(page, "python"):
        code = compile("\n" * line + text, str(page), "exec")  # so that a traceback names the page and its line
        exec(code, vars(page_module))


def test_pages_that_teach_show_code():
    guides = [page for page in (DOCS / "how-to").glob("*.md") if page.name != "command-line.md"]
    assert not [page for page in [README, DOCS / "index.md", *guides] if not list(blocks(page, "python"))]


@pytest.mark.parametrize(("page", "command"), list(commands()))
def test_commands_use_flags_that_exist(page, command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for _, info, text in blocks(page, "yaml"):
        for title in re.findall(r'title="([^"]+)"', info):
            Path(title).write_text(text, encoding="utf-8")
    words = shlex.split(command[command.index("hf-earlyexit ") :], comments=True)
    assert words[1] in COMMANDS.names()
    module = import_module(f"hf_earlyexit.cli.{words[1]}")
    assert parse_arguments(flags_of(module), words[2:], words[1], None, getattr(module, "REST", None))[0]


def test_commands_are_shown():
    shown = {command.split("hf-earlyexit ")[1].split()[0] for _, command in (case.values for case in commands())}
    assert set(COMMANDS.names()) <= shown


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented(name):
    thing = attrgetter(name)(ee)
    assert (thing.__doc__ or "").strip(), f"{name} has no docstring"
    paths = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    found = [path for path in paths if path.rpartition(".")[2] == name.rpartition(".")[2]]
    assert found, f"{name} is not in docs/api.md"
    home, _, attribute = found[0].rpartition(".")
    assert getattr(import_module(home), attribute) is thing


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_of_docstrings_run(name, clean_registries):
    thing = attrgetter(name)(ee)
    home = sys.modules[thing.__module__]
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder().find(thing, name, module=home):
        assert runner.run(test).failed == 0, f"the example of {test.name} is wrong"


def test_every_page_is_in_the_navigation():
    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(pages(nav)) == [page.relative_to(DOCS).as_posix() for page in sorted(PAGES)]


@pytest.mark.parametrize(
    ("registry", "page"),
    [(POLICIES, "papers.md"), (POLICIES, "how-to/calibrate.md"), (OBJECTIVES, "how-to/train.md"),
     (HEADS, "how-to/train.md"), (TARGETS, "how-to/calibrate.md"), (EXIT_METRICS, "how-to/train.md")],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)  # fmt: skip
def test_every_registered_name_is_explained(registry, page):
    text = (DOCS / page).read_text(encoding="utf-8")
    own = [name for name in registry.names() if registry.get(name).__module__.startswith("hf_earlyexit.")]
    missing = [name for name in own if not re.search(rf"`{re.escape(name)}[`:]", text)]
    assert not missing, f"docs/{page} does not say what {missing} are"


def test_the_readme_names_every_policy_and_its_problem_types():
    words = {"single_label_classification": "one label", "multi_label_classification": "many labels"}
    rows = dict(re.findall(r"^\| `([\w-]+)` \|.*\| ([^|]+) \|$", README.read_text(encoding="utf-8"), re.MULTILINE))
    for name in POLICIES.names():
        types = POLICIES.get(name).problem_types
        expected = "all" if len(types) == 3 else ", ".join(word for kind, word in words.items() if kind in types)
        assert rows[name].strip() == expected


def test_pages_name_no_place_of_one_machine():
    for page in [README, *PAGES, ROOT / "mkdocs.yml"]:
        found = re.findall(r"/(?:work|home|root|tmp|mnt|Users)/|localhost|127\.0\.0\.1", page.read_text(encoding="utf-8"))
        assert not found, f"{name_of(page)} mentions {found}"


def test_the_page_of_families_is_what_its_command_writes():
    from benchmarks.families_page import PAGE, page
    from hf_earlyexit.doors import door_names

    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run python -m benchmarks.families_page"
    listed = text + (DOCS / "api.md").read_text(encoding="utf-8")
    assert not [name for name in door_names() if name not in listed and not name.endswith("Config")]


def test_the_measured_pages_are_those_of_the_committed_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    choices = import_module("choices")
    for path, text in choices.pages(*choices.committed()).items():
        if path.suffix == ".md":  # what matplotlib draws differs in bytes from version to version
            assert path.read_text(encoding="utf-8") == text, (
                f"run `python benchmarks/choices.py --page`: {path.name} differs"
            )
        else:
            assert path.read_text(encoding="utf-8").startswith("<svg")


def test_the_page_of_pictures_is_that_of_the_committed_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    pictures = import_module("pictures")
    results = json.loads(pictures.RESULTS.read_text(encoding="utf-8"))
    assert pictures.PAGE.read_text(encoding="utf-8") == pictures.page(results), "run python benchmarks/pictures.py --page"


def test_the_page_of_writing_is_that_of_the_committed_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page = import_module("lossless_page")
    assert page.PAGE.read_text(encoding="utf-8") == page.committed(), "run python benchmarks/lossless_page.py"


def test_lossless_captions_are_told_from_the_committed_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page = import_module("captioning_page")
    text = page.PAGE.read_text(encoding="utf-8")
    assert text == page.written(text, "lossless"), "run python benchmarks/captioning_page.py lossless"


def test_the_table_of_extras_and_versions_is_that_of_the_project():
    page = (DOCS / "install.md").read_text(encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    rows = dict(re.findall(r"^\| `([\w-]+)` \|[^|]*\| ([^|]+) \|$", page, re.MULTILINE))
    assert set(rows) == set(extras)
    for name in ("train", "report", "caption", "onnx"):
        assert rows[name].split(", ") == [re.split(r"[\[>=<]", package)[0] for package in extras[name]]
    versions = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ([\d.]+) \| [\d.]+ \|$", page, re.MULTILINE)
    assert len(versions) >= 4
    for package, locked, oldest in versions:
        for version, file in ((locked, "locked"), (oldest, "oldest")):
            assert f"\n{package}=={version}" in (ROOT / "constraints" / f"{file}.txt").read_text(encoding="utf-8")


def test_examples_of_docstrings_are_in_the_form_that_is_rendered():
    files = (ROOT / "hf_earlyexit").rglob("*.py")
    wrong = [path.name for path in files if re.search(r"^\s+Example:$", path.read_text(encoding="utf-8"), re.MULTILINE)]
    assert not wrong, f"write `Examples:` in {wrong}; mkdocstrings does not render `Example:`"
