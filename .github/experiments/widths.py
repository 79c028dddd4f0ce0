#!/usr/bin/env python3
"""Which layers do the found networks have wide, at which budgets?

    python .github/experiments/widths.py RUN RUN ... --out PICTURE.png

A RUN is as compare.py takes it. A panel for each cost: a line per layer, its width in the network that is chosen within each
budget, the mean over the cost's runs. Needs numpy and matplotlib.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np

import compare

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import models  # noqa: E402


def read_widths(folder):
    with open(folder / "front.csv", newline="") as f:
        return np.array([[float(w) for w in row["widths"].split()] for row in csv.DictReader(f)])


def draw(folders, picture):
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    found = {}  # cost -> [(cost of each network, their widths), ...]
    for folder in folders:
        settings, front = compare.read_run(folder)
        found.setdefault(settings["cost"], []).append((front[settings["cost"]] / front[settings["cost"]].max(), read_widths(folder)))
    names = models.build(settings["arch"], 10, settings["image_size"]).names
    figure = Figure(figsize=(5 * len(found), 4), layout="constrained")
    for axes, (cost, runs) in zip(figure.subplots(1, len(found), squeeze=False, sharey=True)[0], found.items()):
        budgets = np.geomspace(max(share[0] for share, _ in runs) * (1 + 1e-9), 1, 300)
        mean = np.mean([widths[np.searchsorted(share, budgets, side="right") - 1] for share, widths in runs], 0)
        for k, name in enumerate(names):
            axes.plot(100 * budgets, mean[:, k], color=colormaps["viridis"](k / len(names)), label=name)
        ticks = [t for t in (2, 3, 5, 7, 10, 20, 30, 50, 70, 100) if t >= 100 * budgets[0]]
        axes.set(xscale="log", xlabel=f"{compare.WRITTEN.get(cost, cost)} (% of the full network)", ylabel="width",
                 title=f"mean of {len(runs)} runs")  # fmt: skip
        axes.set_xticks(ticks, map(str, ticks))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small", title="layers, early to late")
    figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    p.add_argument("--out", type=Path, default=Path("runs", "widths.png"), metavar="PICTURE", help="(default: %(default)s)")
    args = p.parse_args()
    draw(args.runs, args.out)
