"""Many files answered by many processes: a file at a time, and a run that was stopped goes on with those that are left."""

from __future__ import annotations

import glob
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import DataError, EarlyExitError, UsageError
from ..files import read_json, write_json
from .arguments import AUTO, STDOUT
from .command_result import CommandResult
from .predict import PredictArguments, run_of

RUN = "run.json"  # in the folder of answers: by what they were made


class FileAnswerer:
    """What one process does: it loads the model when it starts, and answers one file after the other.

    Args:
        args: flags of the command.
    """

    def __init__(self, args: PredictArguments) -> None:
        import torch

        from .loading import in_form, load_exported_or_model, reading_parts

        torch.set_num_threads(1)
        self.args, self.model = args, in_form(load_exported_or_model(args.model, args.device), args)
        self.parts = reading_parts(args.model, self.model)

    def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        """The job with how many rows were answered, or with what was wrong."""
        from .predict import answer_input

        args = replace(self.args, input=job["input"], output=job["output"], resume=False)
        try:
            values = answer_input(args, self.model, self.parts).values
        except EarlyExitError as error:
            return {**job, "rows": 0, "failed": 0, "layers": 0.0, "problem": str(error)}
        layers = (values["mean_layers"] or 0.0) * (values["rows"] - values.get("failed", 0))
        return {**job, "rows": values["rows"], "failed": values.get("failed", 0), "layers": layers, "problem": ""}


def answer_files(args: PredictArguments) -> CommandResult:
    """Answer every file of a pattern into a folder, where each file of answers is there whole or not at all.

    Args:
        args: flags; `input` is a pattern such as 'reviews/*.parquet', `output` a folder.

    Raises:
        UsageError: for a pattern without files, an output that is no folder, or one that holds another run's answers.
        DataError: once all others are answered, for files that cannot be, naming the first.
    """
    import ray
    from ray.data import ActorPoolStrategy

    from ..scale.ray import cores_of_a_worker

    if args.form == AUTO:
        raise UsageError("form auto is one machine's choice, and answers of all are to be alike; name one.", field="form")
    jobs, done = _jobs(args)
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
        ray.init(include_dashboard=False, log_to_driver=False)
    results: list[dict[str, Any]] = []
    if jobs:
        cores = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
        workers = min(args.workers or cores, len(jobs))
        answered = ray.data.from_items(jobs, override_num_blocks=len(jobs)).map(
            FileAnswerer,  # type: ignore[arg-type]  # a class whose objects are called
            fn_constructor_args=(args,),
            compute=ActorPoolStrategy(size=workers),
            num_cpus=cores_of_a_worker(workers),
            num_gpus=1 if args.device.startswith("cuda") else None,
        )
        results = list(answered.iter_rows())
    wrong = sorted((one["input"], one["problem"]) for one in results if one["problem"])
    if wrong:
        raise DataError(
            f"{len(wrong)} of {len(results)} files could not be answered. The first: {wrong[0][0]}: {wrong[0][1]} The "
            "others are answered; --resume true goes on with these.",
            path=wrong[0][0],
        )
    rows, failed = (sum(one[name] for one in results) for name in ("rows", "failed"))
    layers = sum(one["layers"] for one in results)
    values: dict[str, Any] = {"output": args.output, "files": len(results), "rows": rows, "files_before": done}
    values["mean_layers"] = layers / (rows - failed) if rows > failed else None
    text = f"saved {args.output}: {rows} rows of {len(results)} files"
    if done:
        text += f", beside {done} files of the run that was stopped"
    if args.errors == "slot":
        values["failed"] = failed
        text += f"; {failed} could not be answered, see their 'error'" if failed else ""
    return CommandResult(values, text)


def _jobs(args: PredictArguments) -> tuple[list[dict[str, str]], int]:
    """Files that are left, each with where its answers go; and how many were answered by a run that was stopped."""
    paths = sorted(path for path in glob.glob(args.input, recursive=True) if os.path.isfile(path))
    if not paths:
        raise UsageError(f"No file is called {args.input!r}; expected a pattern such as 'reviews/*.parquet'.", field="input")
    folder = Path(args.output)
    if args.output == STDOUT or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"output is {args.output!r}; expected a folder for a file of answers each.", field="output")
    above = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    places = {path: folder / os.path.relpath(os.path.abspath(path), above) for path in paths}
    run = _run(args, paths)
    finished = [path for path in paths if places[path].is_file()]
    if args.resume is not False and (folder / RUN).is_file():
        before = read_json(folder / RUN)
        if args.resume is None:
            raise UsageError(
                f"{folder} holds answers to {len(finished)} of {len(paths)} files of a run before; go on with --resume "
                "true, or begin anew with --resume false.",
                field="resume",
                path=folder,
            )
        if differs := [name for name in run if before.get(name) != run[name] and name != "inputs"]:
            raise UsageError(f"{folder} was written by another run ({', '.join(differs)} differs).", field="resume")
        seen = before.get("inputs", {})
        if changed := [path for path in finished if seen.get(path) != run["inputs"][path]]:
            raise UsageError(
                f"{changed[0]} has changed since it was answered; begin anew with --resume false.", field="resume"
            )
    elif finished:
        if args.resume is not False:
            raise UsageError(f"{places[finished[0]]} is there already; name another --output.", field="output", path=folder)
        for path in finished:
            places[path].unlink()
        finished = []
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RUN, run)
    left = [path for path in paths if path not in finished]
    for path in left:
        places[path].parent.mkdir(parents=True, exist_ok=True)
    return [{"input": os.path.abspath(path), "output": str(places[path].resolve())} for path in left], len(finished)


def _run(args: PredictArguments, paths: list[str]) -> dict[str, Any]:
    """By what answers are made: settings, model and input files."""
    from .loading import in_form, load_exported_or_model

    settings = run_of(args, in_form(load_exported_or_model(args.model, args.device), args))
    del settings["input as it is"]
    inputs = {path: [os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in paths}
    return {**settings, "inputs": inputs}
