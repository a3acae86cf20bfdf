"""Imports point one way, files stay short, and the pure parts load without transformers."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_earlyexit"
MODULES = sorted(PACKAGE.rglob("*.py"))

# What a part (a folder, or a file beside them) may import from the others. A new part needs a line here.
BASE = {"lazy", "errors", "registry", "problem_types", "labels", "files", "citations", "values", "timing", "transfer"}
PURE = BASE | {"folder_swap", "signals", "policies", "trace", "losses", "metrics", "calibration"}
WALK = PURE | {"families", "walking"}
SERVE = WALK | {"images", "modeling", "serving"}
ALLOWED = {
    "errors": set(),
    "lazy": set(),
    "versions": set(),
    "after_import": set(),
    "citations": set(),
    "timing": set(),
    "transfer": set(),
    "registry": {"errors", "values"},
    "folder_swap": set(),
    "values": {"errors"},
    "files": {"errors", "folder_swap", "values"},
    "problem_types": {"errors"},
    "labels": {"errors", "problem_types"},
    "images": {"errors"},
    "data": BASE | {"images"},
    "losses": BASE,
    "signals": BASE,
    "policies": BASE | {"losses", "signals"},
    "trace": BASE | {"signals"},
    "metrics": BASE | {"trace"},
    "calibration": BASE | {"policies", "trace", "metrics"},
    "families": BASE,
    "walking": BASE | {"signals", "policies", "families"},
    "modeling": WALK,
    "serving": WALK | {"images", "modeling"},
    "measuring": SERVE | {"onnx", "forms", "versions"},
    "forms": SERVE | {"onnx"},
    "generation": SERVE,
    "training": SERVE | {"data", "generation"},
    "plots": PURE,
    "reports": PURE | {"plots", "images"},
    "captions": SERVE | {"generation", "training", "reports", "images"},
    "onnx": SERVE,
    "server": SERVE,
    "scale": SERVE | {"onnx", "doors"},
    "evaluation": BASE | {"serving"},
    "doors": SERVE | {"generation", "captions"},
    "hub": SERVE | {"training", "plots", "measuring", "captions", "doors"},
    "pipelines": SERVE | {"generation", "captions", "images", "doors", "forms"},
    "cli": SERVE
    | {"data", "training", "plots", "hub", "images", "reports", "pipelines", "onnx", "measuring", "captions", "doors"}
    | {"server", "scale", "forms", "generation", "versions", "__init__"},
}
OUTSIDE = {"torch", "numpy", "scipy", "safetensors"}  # all that the pure parts may need, beside the standard library


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def own_imports(path: Path):
    """Modules of this package that a file imports, as dotted names below the package; "" is the package itself."""
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*here[: len(here) + 1 - node.level], *(node.module.split(".") if node.module else ()))
            names = [base] if base else [(alias.name,) for alias in node.names]
            yield from (".".join(name) for name in names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hf_earlyexit":
            yield node.module.partition(".")[2]
        elif isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "hf_earlyexit")


def outside_imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").split(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)


def test_every_part_has_its_line_in_the_table():
    parts = {part_of(path) for path in MODULES} - {"__init__", "__main__"}
    assert parts <= set(ALLOWED), f"say in ALLOWED what {sorted(parts - set(ALLOWED))} may import"
    assert {"errors", "policies", "trace", "calibration", "losses", "modeling", "serving"} <= parts


def test_the_table_has_no_circle():
    order: list[str] = []
    while len(order) < len(ALLOWED):
        ready = [part for part in ALLOWED if part not in order and ALLOWED[part] - {"__init__"} <= set(order)]
        assert ready, f"in a circle: {sorted(set(ALLOWED) - set(order))}"
        order += ready


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(path):
    part, name = part_of(path), path.relative_to(PACKAGE).as_posix()
    if part in ("__init__", "__main__"):
        return
    for module in own_imports(path):
        target = module.split(".")[0] or "__init__"
        if target != part:
            assert target in ALLOWED[part], f"{name} imports {module}; {part} may import {sorted(ALLOWED[part])}"


@pytest.mark.parametrize(
    "path", [p for p in MODULES if part_of(p) in PURE], ids=lambda path: path.relative_to(PACKAGE).as_posix()
)
def test_pure_parts_need_torch_numpy_and_safetensors_only(path):
    foreign = set(outside_imports(path)) - sys.stdlib_module_names - OUTSIDE
    assert not foreign


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_file_comes_near_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


def test_the_pure_parts_load_without_transformers():
    parts = sorted(PURE & {part_of(path) for path in MODULES})
    code = f"""
import importlib, sys, types
package = types.ModuleType("hf_earlyexit")  # the parts alone, without what the package registers on import
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["hf_earlyexit"] = package
for part in {parts!r}:
    importlib.import_module("hf_earlyexit." + part)
    loaded = {{"transformers", "datasets", "sklearn"}} & set(sys.modules)
    assert not loaded, "importing hf_earlyexit." + part + " loads " + ", ".join(sorted(loaded))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]


PUBLIC = {
    "from_pretrained", "EarlyExitTrainer", "EarlyExitTrainingArguments", "ConsistentTrainer", "ConsistentTrainingArguments",
    "EarlyExitError", "EarlyExitVisionEncoderDecoder", "EarlyExitVisionEncoderDecoderConfig", "EarlyExitCaptionProcessor",
    "ExitTrace", "collect_trace", "calibrate", "replay", "Certified", "FinalLayerError", "LayerBudget", "MaxDrop", "SpeedUp",
    "BeemPolicy", "ConfidencePolicy", "check_exit_policy", "predict", "stream", "explain", "pipeline", "Engine", "Monitor",
    "quantize_int8", "convert", "keep_thresholds", "export_onnx", "OnnxClassifier", "save", "push_to_hub",
}  # fmt: skip
DOOR = re.compile(r"EarlyExit\w+(Config|ForSequenceClassification|ForImageClassification|ForCausalLM|LMHeadModel)")


def listed(path, name):
    """A tuple, list or the keys of a mapping that a file gives a name."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            value = node.value
            return set(ast.literal_eval(ast.Tuple(value.keys, ast.Load()) if isinstance(value, ast.Dict) else value))
    return set()


def test_the_public_names_are_few_and_these():
    """What everyday use needs; a name for fewer people goes into the room that it belongs to."""
    assert listed(PACKAGE / "__init__.py", "_HOMES") == PUBLIC
    assert len(PUBLIC) <= 34


def test_every_name_that_is_used_of_the_package_is_a_public_one():
    rooms = listed(PACKAGE / "__init__.py", "ROOMS")
    names = {room: listed(PACKAGE / room / "__init__.py", "__all__") for room in rooms if (PACKAGE / room).is_dir()}
    modules = {path.relative_to(PACKAGE).with_suffix("").parts[-1] for path in MODULES} | {part_of(path) for path in MODULES}
    texts = [path for top in ("tests", "docs", "examples", "benchmarks", "hf_earlyexit") for path in (ROOT / top).rglob("*")]
    unknown = []
    for path in [ROOT / "README.md", *texts]:
        if path.suffix not in (".py", ".md"):
            continue
        text = path.read_text(encoding="utf-8")
        for name, inner in re.findall(r"\bee\.([A-Za-z]\w*)(?:\.(\w+))?", text):
            known = name in PUBLIC or name in rooms or DOOR.fullmatch(name) or name in modules
            if not known or (inner and name in names and inner not in names[name] | modules):
                unknown.append(f"{path.relative_to(ROOT)}: ee.{name}{inner and '.' + inner}")
        for line in re.findall(r"^\s*from hf_earlyexit import (.+)$", text, re.MULTILINE):
            for name in re.findall(r"(\w+)(?: as \w+)?", line):
                if not (name in PUBLIC or name in rooms or DOOR.fullmatch(name) or name in modules):
                    unknown.append(f"{path.relative_to(ROOT)}: from hf_earlyexit import {name}")
    assert not unknown
