"""How much of their bound the families reach at base shape, for the table of docs/families.md.

    OMP_NUM_THREADS=1 python -m benchmarks.families_speed          # about a minute a family
    OMP_NUM_THREADS=1 python -m benchmarks.families_speed gpt2     # some of them

Each family has 12 layers of width 768 with random weights, an exit after every layer, and thresholds that let rows go after
6 layers in the mean. The stock class in arrival order (batches of 32, padded), every layer in our batches, and early exit
take turns. Writes benchmarks/results/families.json; then run benchmarks.families_page.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import hf_earlyexit as ee
from hf_earlyexit.doors import door_of
from hf_earlyexit.families import FAMILIES
from hf_earlyexit.families.base import LAST, TEXT
from hf_earlyexit.measuring.bench import exits_of
from hf_earlyexit.measuring.ways import EARLY, FULL, STOCK, torch_ways
from hf_earlyexit.timing import seconds_in_turns, timing_of

from .families_page import SAME_CODE, SPEED

sys.path.insert(0, str(Path(__file__).parent))
from speed import mixed_rows, spread_out

ROWS, PICTURES, TURNS = 64, 16, 3
SHAPE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
WORDS = {"vocab_size": 30_000, "pad_token_id": 0, "num_labels": 2}
PATCHES = {"image_size": 224, "num_labels": 2}
MORE = {
    "albert": {"embedding_size": 128},
    "electra": {"embedding_size": 768},
    "distilbert": {"dim": 768, "n_layers": 12, "n_heads": 12, "hidden_dim": 3072},
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "modernbert": {"intermediate_size": 1152},
    "deberta-v2": {"relative_attention": True, "position_buckets": 256, "pos_att_type": "p2c|c2p", "share_att_key": True,
                   "norm_rel_ebd": "layer_norm", "position_biased_input": False},
    **{name: {"num_key_value_heads": 12, "head_dim": 64} for name in ("eurobert", "llama", "qwen2", "qwen3")},
}  # fmt: skip
RENAMED = ("distilbert", "gpt2")  # their configs have names of their own for the shape


def measured(name: str) -> dict[str, Any]:
    """Speed-up over the stock class, and share of the token-layer bound, of one family."""
    torch.manual_seed(0)
    shape, reads_words = {} if name in RENAMED else SHAPE, FAMILIES[name].task == TEXT
    kind = getattr(ee, door_of(name).model)
    model = kind(kind.config_class(**{**shape, **(WORDS if reads_words else PATCHES), **MORE.get(name, {})})).eval()
    if FAMILIES[name].token == LAST:
        model.config.pad_token_id = 0
    rows = mixed_rows(ROWS) if reads_words else [{"pixel_values": one} for one in torch.randn(PICTURES, 3, 224, 224)]
    model.set_exit_policy(spread_out(ee.collect_trace(model, rows, labelled=False, progress=False)))
    ways = torch_ways(model, 32, 6).many
    runs = {way: [partial(ways[way], rows)] for way in (STOCK, FULL, EARLY)}
    seconds = seconds_in_turns(runs, TURNS, clock=time.thread_time)
    exits = exits_of(model, rows, ee.predict(model, rows))
    over_stock, over_full = timing_of(seconds[EARLY], seconds[STOCK]), timing_of(seconds[EARLY], seconds[FULL])
    return {
        "mean_layer": exits["mean_layer"],
        "bound": exits["token_layer_bound"],
        "share": [ratio / exits["token_layer_bound"] for ratio in (over_full.low, over_full.speed_up, over_full.high)],
        "over_stock": [over_stock.low, over_stock.speed_up, over_stock.high],
    }


def main() -> None:
    torch.set_num_threads(1)
    names = sys.argv[1:] or [name for name in FAMILIES if name not in SAME_CODE]
    found = json.loads(SPEED.read_text()) if SPEED.exists() else {"families": {}}
    for name in names:
        found["families"][name] = measured(name)
        found["families"] = {one: found["families"][one] for one in FAMILIES if one in found["families"]}
        versions = {one: version(one) for one in ("torch", "transformers")}
        found |= {"rows": ROWS, "pictures": PICTURES, "turns": TURNS, "versions": versions}
        SPEED.write_text(json.dumps(found, indent=1) + "\n")
        print(name, found["families"][name], flush=True)


if __name__ == "__main__":
    main()
