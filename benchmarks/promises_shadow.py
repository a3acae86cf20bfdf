"""What a monitor costs: `predict` with one and without, in turns, in CPU time; called by benchmarks/promises.py."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from tasks import BACKBONE, DATA

import hf_earlyexit as ee
from hf_earlyexit.serving.monitor import Monitor

ROWS, ROUNDS, SHADOW = 800, 3, 0.01
COUNTED = 6  # draws of the shadow whose layers are counted
SPEED_UPS = (1.5, 2.5)


def _tokens_through_layers(model: Any, rows: list[Any], monitor: Monitor | None) -> int:
    """Tokens that go through a layer, layer by layer, while the rows are answered."""
    seen = []
    hooks = [
        layer.intermediate.dense.register_forward_hook(lambda part, given, output: seen.append(output[..., 0].numel()))
        for layer in model.base_model.encoder.layer
    ]
    ee.predict(model, rows, monitor=monitor)
    for hook in hooks:
        hook.remove()
    return sum(seen)


def _nearest(curve: Any, layers: float) -> Any:
    """Thresholds of the point whose mean cost is nearest."""
    return min(curve, key=lambda point: abs(point[0] - layers))[2]


def cost() -> list[dict[str, Any]]:
    """Share of CPU time that a shadow of 1 % takes, at several layer speed-ups, with the real small encoder.

    Exits are not trained: rows leave where thresholds of that cost let them, which is all that time depends on.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ee.EarlyExitBertForSequenceClassification.from_pretrained(
        DATA / BACKBONE, num_labels=2, dtype=torch.float32
    ).eval()
    draw, tables = np.random.default_rng(0), []
    rows = [{"input_ids": [101, *draw.integers(1000, 20000, 8 + place % 25).tolist(), 102]} for place in range(ROWS)]
    trace = ee.collect_trace(model, rows, labelled=False, progress=False)
    chosen = ee.calibrate(trace, "confidence", keep_weak_exits=True, folds=0)
    for speed_up in SPEED_UPS:
        model.set_exit_policy(chosen.policy.with_thresholds(_nearest(chosen.curve, trace.exit_layers[-1] / speed_up)))
        monitor = Monitor(model, limit=0.9, shadow=SHADOW)
        ways = {"bare": None, "watched": monitor}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(ROUNDS):
            for name in sorted(ways, reverse=bool(turn % 2)):
                start = time.process_time()
                answers = ee.predict(model, rows, monitor=ways[name])
                seconds[name].append(time.process_time() - start)
        ratios = np.array(seconds["watched"]) / np.array(seconds["bare"])
        layers = float(answers.exit_layer.double().mean())
        counted = [Monitor(model, limit=0.9, shadow=SHADOW, seed=seed) for seed in range(COUNTED)]
        bare = _tokens_through_layers(model, rows, None)
        watched = sum(_tokens_through_layers(model, rows, one) for one in counted)
        tables.append(
            {
                "shadow": SHADOW,
                "rows": ROWS * ROUNDS,
                "layer_speed_up": model.exit_layers[-1] / layers,
                "counted_rows": ROWS * COUNTED,
                "shadowed": sum(one.state.num_shadowed for one in counted) / (ROWS * COUNTED),
                "more_layers": watched / (bare * COUNTED) - 1,
                "cost": float(np.median(ratios) - 1),
                "middle_half": np.quantile(ratios - 1, [0.25, 0.75]).tolist(),
            }
        )
    return tables
