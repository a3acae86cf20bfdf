"""Write the tables of docs/results-captioning.md from the committed figures.

python benchmarks/captioning_page.py whole frozen
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results-captioning.md"
HEAD = (
    "| decoder | mean layers | layer speed-up | BLEU-1 | BLEU-4 | ROUGE-L | CIDEr | against full | against its own depth | "
    "decode time, batch 1 | batch 8 |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


OWN = "all layers: 12 of 12 layers"


def table(report: dict) -> str:
    """One row per setting; decoding time against the model's own full depth, with the middle half of the rounds."""
    lines = [HEAD]
    for name, row in report["rows"].items():
        apart = " | ".join(_difference(row.get(other)) for other in ("against_full", "against_own_depth"))
        clock = []
        for batch in ("batch 1", "batch 8"):
            timings = report["decode_time"][batch]
            reference = timings[OWN]["speed_up"] if OWN in timings else 1.0
            middle, low, high = (timings[name][key] / reference for key in ("speed_up", "low", "high"))
            clock.append(f"{middle:.2f}x ({low:.2f} to {high:.2f})")
        scores = " | ".join(f"{row[score]:.3f}" for score in ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr"))
        depth = f"{row['mean_layers']:.2f} | {row['layer_speed_up']:.2f}x"
        lines.append(f"| {name} | {depth} | {scores} | {apart} | {' | '.join(clock)} |")
    return "\n".join(lines)


def _difference(values: dict | None) -> str:
    return "" if values is None else f"{values['difference']:+.3f} ({values['standard_error']:.3f})"


def figures(report: dict) -> str:
    return (
        f"{table(report)}\n\n"
        f"Thresholds from {report['dev_photos']} photos of dev, figures on {report['test_photos']} of test, seed "
        f"{report['seed']}; in brackets a standard error over photos, or the middle half of {report['repeats']} rounds. A "
        f"vocabulary of {report['vocabulary']:,} words; one thread. Looking at a photo takes "
        f"{report['encoder_over_decode']:.2f} of the time the full decoder takes for its caption, at batch 1.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["whole", "frozen"])
    args = parser.parse_args()
    for name in args.names:
        report = json.loads((ROOT / "benchmarks" / "results" / f"captioning-{name}.json").read_text())
        start, end = f"<!-- figures of {name}: benchmarks/captioning_page.py -->", f"<!-- end of figures of {name} -->"
        before, rest = PAGE.read_text().split(start)
        PAGE.write_text(f"{before}{start}\n\n{figures(report)}\n{end}{rest.split(end)[1]}")


if __name__ == "__main__":
    main()
