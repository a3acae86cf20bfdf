"""What the environments of the make targets are made from, and the word about releases that nobody tested."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from hf_earlyexit import versions

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def pins(name):
    """Exact releases of a constraints file, by normalised name; of several for different Pythons, all."""
    found = {}
    for line in (ROOT / "constraints" / name).read_text(encoding="utf-8").splitlines():
        if line and not line.lstrip().startswith("#"):
            requirement = Requirement(line)
            (pin,) = requirement.specifier
            assert pin.operator == "==", line
            found.setdefault(normal(requirement.name), []).append(pin.version)
    return found


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def required(*extras):
    """What pyproject.toml asks for, extras of extras included."""
    lines = list(PROJECT["project"]["dependencies"]) if not extras else []
    for extra in extras:
        lines += PROJECT["project"]["optional-dependencies"][extra]
    found = []
    for line in map(Requirement, lines):
        found += required(*line.extras) if normal(line.name) == "hf-earlyexit" else [line]
    return found


@pytest.mark.parametrize("file", ["locked.txt", "oldest.txt"])
def test_constraints_hold_all_that_is_asked_for(file):
    held = pins(file)
    for requirement in [*required(), *required("dev"), *map(Requirement, PROJECT["build-system"]["requires"])]:
        for pin in held[normal(requirement.name)]:
            assert requirement.specifier.contains(pin), f"{requirement} against {pin}"


def test_the_oldest_are_the_floors_that_are_declared():
    held, floors = pins("oldest.txt"), {}
    for requirement in [*required(), *required("dev")]:
        for part in requirement.specifier:
            if part.operator in (">=", "=="):
                floors.setdefault(normal(requirement.name), []).append(Version(part.version))
    assert len(floors) > 15
    for name, declared in floors.items():  # an extra may ask for more than the package itself
        assert [Version(pin) for pin in held[name]] == [max(declared)], name


def test_constraints_name_no_place_to_fetch_from():
    for file in (ROOT / "constraints").iterdir():
        assert not re.search(r"https?:|file:|--hash|index|find-links", file.read_text(encoding="utf-8"))


def test_the_makefile_builds_with_what_the_constraints_hold():
    assert re.search(r"^TORCH \?= torch==(\S+)$", MAKEFILE, re.M)[1] in pins("locked.txt")["torch"]
    for requirement in PROJECT["build-system"]["requires"]:
        assert f'"{requirement}"' in re.search(r"^BUILD := (.*)$", MAKEFILE, re.M)[1]


def test_the_newest_tested_transformers_is_the_locked_one():
    (locked,) = pins("locked.txt")["transformers"]
    assert tuple(map(int, locked.split(".")[:2])) == versions.NEWEST_TRANSFORMERS


@pytest.mark.parametrize("installed", ["5.25.0", "5.25.0.dev0", "5.100.1", "6.0.0rc1"])
def test_a_newer_transformers_is_warned_of(monkeypatch, installed):
    monkeypatch.setattr(versions, "version", lambda name: installed)
    with pytest.warns(UserWarning, match=rf'transformers {installed} is newer than 5.24, .* "transformers<5.25"'):
        versions.warn_if_untested()


@pytest.mark.parametrize("installed", ["5.23.0", "5.24.0", "5.24.9", "5.24.1.dev0", None])
def test_tested_ones_are_not(monkeypatch, installed):
    def version(name):
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(versions, "version", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_if_untested()


def test_the_import_warns_once_and_loads_nothing_for_it():
    code = """
import importlib.metadata, sys, warnings
real = importlib.metadata.version
importlib.metadata.version = lambda name: "5.99.0" if name == "transformers" else real(name)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import hf_earlyexit, hf_earlyexit.errors
assert [str(one.message)[:19] for one in caught] == ["transformers 5.99.0"], caught
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
