"""Write the results page of captioning from the committed figures.

python benchmarks/captioning_page.py benchmarks/results/captioning.json --page docs/results-captioning.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

START, END = "<!-- figures: benchmarks/captioning_page.py -->", "<!-- end of figures -->"
HEAD = (
    "| decoder | mean layers | layer speed-up | BLEU-1 | BLEU-4 | ROUGE-L | CIDEr | against full | "
    "decode time, batch 1 | batch 8 |\n|---|---|---|---|---|---|---|---|---|---|"
)


def table(report: dict) -> str:
    """One row per setting; speed-ups of decoding with the middle half of the rounds."""
    lines = [HEAD]
    for name, row in report["rows"].items():
        apart = "" if "CIDEr_difference" not in row else f"{row['CIDEr_difference']:+.3f} ({row['standard_error']:.3f})"
        clock = []
        for batch in ("batch 1", "batch 8"):
            timing = report["decode_time"][batch][name]
            clock.append(f"{timing['speed_up']:.2f}x ({timing['low']:.2f} to {timing['high']:.2f})")
        scores = " | ".join(f"{row[score]:.3f}" for score in ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr"))
        depth = f"{row['mean_layers']:.2f} | {row['layer_speed_up']:.2f}x"
        lines.append(f"| {name} | {depth} | {scores} | {apart} | {' | '.join(clock)} |")
    return "\n".join(lines)


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
    parser.add_argument("report", type=Path)
    parser.add_argument("--page", type=Path, default=Path("docs/results-captioning.md"))
    args = parser.parse_args()
    before, rest = args.page.read_text().split(START)
    after = rest.split(END)[1]
    args.page.write_text(f"{before}{START}\n\n{figures(json.loads(args.report.read_text()))}\n{END}{after}")


if __name__ == "__main__":
    main()
