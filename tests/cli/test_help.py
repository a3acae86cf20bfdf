"""Help texts list what is registered, so a new name appears in them by itself."""

import subprocess
import sys
import textwrap
from dataclasses import fields

import pytest

from hf_earlyexit.calibration import TARGETS, parse_target
from hf_earlyexit.calibration.targets import MaxDrop
from hf_earlyexit.cli.calibrate import TARGET_WORDS, CalibrateArguments
from hf_earlyexit.cli.consistentee import GateArguments
from hf_earlyexit.cli.main import COMMANDS
from hf_earlyexit.cli.train import TrainArguments
from hf_earlyexit.losses import ESTIMATORS, OBJECTIVES
from hf_earlyexit.modeling.gates import GATES
from hf_earlyexit.modeling.heads import HEADS
from hf_earlyexit.policies import POLICIES
from hf_earlyexit.registry import Registry
from hf_earlyexit.training import ConsistentTrainingArguments, EarlyExitTrainingArguments
from hf_earlyexit.training.hardness import HARDNESS
from hf_earlyexit.training.metrics import EXIT_METRICS


@pytest.mark.parametrize(
    ("command", "flag", "registry"),
    [(CalibrateArguments, "policy", POLICIES), (CalibrateArguments, "target", TARGETS),
     (TrainArguments, "exit_head", HEADS), (EarlyExitTrainingArguments, "objective", OBJECTIVES),
     (EarlyExitTrainingArguments, "exit_metric", EXIT_METRICS), (GateArguments, "exit_gate", GATES),
     (ConsistentTrainingArguments, "estimator", ESTIMATORS), (ConsistentTrainingArguments, "hardness", HARDNESS)],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "kind", ""),
)  # fmt: skip
def test_a_flag_lists_every_registered_name(command, flag, registry):
    text = next(field.metadata["help"] for field in fields(command) if field.name == flag)
    missing = [name for name in registry.names() if name not in text]
    assert not missing, f"--{flag} says {text!r}, without {missing}"


def test_names_are_listed_in_words():
    fruit: Registry[str] = Registry("fruit")
    for names, listed in (("kiwi",), "kiwi"), (("apple", "kiwi"), "apple or kiwi"), (("plum",), "apple, kiwi or plum"):
        for name in names:
            fruit.register(name)(name)
        assert fruit.listed() == listed


def test_targets_are_shown_as_they_are_written():
    """Each with its number in words, and one with more fields."""
    shown, _, more = TARGET_WORDS.partition("; with more fields, ")
    words = shown.replace(" or ", ", ").split(", ")
    numbers = {"DROP": "0.5", "CONFIDENCE": "0.9", "LAYERS": "2", "RATIO": "2"}
    for target in words:
        name, _, number = target.partition(":")
        for word, value in numbers.items():
            number = number.replace(word, value)
        assert type(parse_target(f"{name}:{number}" if number else name)) is TARGETS.get(name)
    assert parse_target(more) == MaxDrop(0.01, sigmas=1)


def modules_of_help(*commands):
    """Names of the modules that a new interpreter has loaded after showing the help of these commands."""
    code = """
        import sys
        from hf_earlyexit.cli.main import main
        for command in sys.argv[1:]:
            try:
                main([command, "--help"])
            except SystemExit as end:
                assert not end.code
        print(" ".join(sys.modules), file=sys.stderr)
    """
    words = [sys.executable, "-c", textwrap.dedent(code), *commands]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-1500:]
    assert done.stdout.count("usage: hf-earlyexit") == len(commands)
    return set(done.stderr.split())


def test_help_of_every_command_loads_nothing_heavy():
    loaded = modules_of_help(*COMMANDS.names())
    heavy = {"torch", "transformers", "numpy", "datasets", "huggingface_hub", "accelerate", "PIL", "matplotlib", "sklearn"}
    assert not loaded & heavy, loaded & heavy
    assert len(loaded) < 300, "modules that a second would not suffice for"
