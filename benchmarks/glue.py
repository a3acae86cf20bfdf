"""Train once per task, then compare every policy on the very same models.

    python benchmarks/glue.py sst2 rte mrpc cola mcid stackoverflow trec --out build/glue

is train_exits.py for every task that has no finished run yet, then beem_forms.py on SST-2 and report.py over all runs.
Takes the flags of train_exits.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    words = sys.argv[1:]
    out = words[words.index("--out") + 1] if "--out" in words[:-1] else "build/glue"
    steps = [["train_exits.py", *words], ["report.py", out]]
    if (Path(out) / "sst2-0").exists() or "sst2" in words:
        steps.insert(1, ["beem_forms.py", f"{out}/sst2-0"])
    for script, *arguments in steps:
        subprocess.run([sys.executable, str(HERE / script), *arguments], check=True)


if __name__ == "__main__":
    main()
