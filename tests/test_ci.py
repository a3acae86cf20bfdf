"""What CI fetches beside Python may be had or not; only the checks and tests decide whether a submission passes."""

import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / ".ci" / "run"
BASH = shutil.which("bash")
MIRROR = "mirror.example"
DOWN = f"echo {MIRROR}; echo {MIRROR} >&2; exit 100"


@pytest.fixture
def run(tmp_path):
    """`run(programs)`: status, words and calls of CI's script in a fresh tree, where only these programs are installed."""

    def with_programs(programs):
        tree, bin = tmp_path / "tree", tmp_path / "bin"
        (tree / ".ci").mkdir(parents=True)
        bin.mkdir()
        shutil.copy(RUN, tree / ".ci" / "run")
        for name in {"bash", "dirname", "timeout", "mkdir", "mv"} - set(programs):
            (bin / name).symlink_to(shutil.which(name))
        for name, script in {"make": "", **programs}.items():
            (bin / name).write_text(f'#!{BASH}\necho "{name} $*" >> "{tmp_path}/called"\n{script}\n')
            (bin / name).chmod(0o755)
        done = subprocess.run([tree / ".ci" / "run"], env={"PATH": str(bin)}, capture_output=True, text=True, timeout=60)
        assert MIRROR not in done.stdout + done.stderr
        return done.returncode, done.stdout.splitlines(), (tmp_path / "called").read_text().splitlines()

    return with_programs


MADE = ["make check", "make docs", "make test"]
SKIPPED = [f"{name} could not be fetched; the tests that need it skip." for name in ("chromium", "onnxruntime-node")]


@pytest.mark.parametrize(("programs", "asked"), [({}, []), ({"apt-get": DOWN, "npm": DOWN}, ["apt-get update", "npm"])])
def test_what_cannot_be_fetched_turns_nothing_red(run, programs, asked):
    status, words, called = run(programs)
    assert (status, words, called[-3:]) == (0, SKIPPED, MADE)
    assert [call.startswith(begin) for call, begin in zip(called[:-3], asked, strict=True)] == [True] * len(asked)


def test_nothing_is_waited_for_without_end(run):
    status, words, called = run({"timeout": "exit 124"})  # as where a mirror hangs
    assert (status, words, called[-3:]) == (0, SKIPPED, MADE)
    assert [call[:17] for call in called if call.startswith("timeout")] == ["timeout 600 bash "] * 2


def test_what_is_cut_off_is_not_there_at_all(run, tmp_path):
    status, words, called = run({"apt-get": "", "npm": "mkdir -p build/node.part/node_modules; kill $PPID"})
    assert (status, words, called[-3:]) == (0, SKIPPED[1:], MADE)
    assert called[:2] == ["apt-get update", "apt-get install -y --no-install-recommends chromium"]
    assert not (tmp_path / "tree" / "build" / "node").exists()


def test_what_is_there_is_not_fetched(run, tmp_path):
    status, words, called = run({"chromium": "", "npm": "mkdir -p build/node.part/node_modules"})
    assert (status, words, called[-3:], len(called)) == (0, [], MADE, 4)
    assert (tmp_path / "tree" / "build" / "node" / "node_modules").is_dir()


def test_a_test_that_fails_is_red(run):
    status, _, called = run({"make": "[ $1 != test ]"})
    assert (status, called[-1]) == (1, "make test")
