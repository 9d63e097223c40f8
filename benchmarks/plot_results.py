"""Print the table of a study and draw its curves, from the logs that benchmarks/protocol.sh keeps.

    python benchmarks/plot_results.py results/FOLDER

FOLDER holds one log.txt per run as VARIANT-seed<number>.txt. Mean and sample standard deviation over the seeds, in
percent, at the last epoch; the figure, FOLDER/accuracy.png, has the overall test accuracy against
the share of the run's epochs, whose number differs between variants.
"""
import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from util.figures import new_figure  # noqa: E402

GROUPS = {"many": "test_many", "medium": "test_medium", "few": "test_few", "overall": "test_acc1"}


def read_runs(folder):
    """Runs of each variant: dict from its name to a list of lists of the epochs that were evaluated (dicts)."""
    runs = defaultdict(list)
    for path in sorted(folder.glob("*-seed*.txt")):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        tested = [record for record in records if "test_acc1" in record]
        if tested:  # stage 1 tests nothing
            runs[re.sub(r"-seed\d+$", "", path.stem)].append(tested)
    return runs


def percent(record, key):
    return record[key] if key == "test_acc1" else 100 * record[key]


def main(args):
    runs = read_runs(args.folder)
    if not runs:
        sys.exit(f"plot_results.py: found no VARIANT-seed<number>.txt in {args.folder}, expected the logs of a study")
    print(f"| {'variant':26} | runs | epochs | {' | '.join(f'{name:11}' for name in GROUPS)} |")
    print("|---|---|---|" + "---|" * len(GROUPS))
    order = sorted(runs, key=lambda name: -np.mean([run[-1]["test_acc1"] for run in runs[name]]))
    epochs = {name: runs[name][0][-1]["epoch"] + 1 for name in order}
    for name in order:
        cells = []
        for key in GROUPS.values():
            values = [percent(run[-1], key) for run in runs[name]]
            cells.append(f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""))
        print(f"| {name:26} | {len(runs[name])} | {epochs[name]} | "
              + " | ".join(f"{cell:11}" for cell in cells) + " |")

    figure, axes = new_figure(8, 4.5)
    for name in order:
        progress = [(record["epoch"] + 1) / epochs[name] for record in runs[name][0]]
        accuracy = np.array([[record["test_acc1"] for record in run] for run in runs[name]])
        line, = axes.plot(progress, accuracy.mean(0), ".-", label=f"{name}, {epochs[name]} epochs")
        axes.fill_between(progress, accuracy.min(0), accuracy.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="share of the run's epochs", ylabel="overall test accuracy, %", title=args.folder.name)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(args.folder / "accuracy.png", dpi=110)
    print(f"\nwrote {args.folder / 'accuracy.png'} (bands: smallest to largest of the seeds)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    main(parser.parse_args())
