#!/usr/bin/env python3
"""Draws the idea: one network's layers, and the channels in use at two budgets, by the widths of a real front.

    python .github/experiments/idea.py [RUN] [--out PICTURE.png]

RUN is as compare.py takes it, of resnet8 (default: kanji's, seed 0).
"""

import argparse
import sys
from pathlib import Path

import numpy as np

import compare
import runs
import widths

sys.path.insert(0, str(runs.PROJECT))
import models  # noqa: E402

BUDGETS = 0.15, 0.5, 1.0

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", nargs="?", type=Path, default=runs.RESULTS / "kanji" / "joslim-flops-0")
    p.add_argument("--out", type=Path, default=Path(".github", "idea.png"), metavar="PICTURE")
    args = p.parse_args()
    from matplotlib.figure import Figure

    settings, front = compare.read_run(args.run)
    net, share = models.build(settings["arch"], 200, settings["image_size"]), front["flops"] / front["flops"].max()
    full = np.array([group.max for group in net.groups])
    figure = Figure(figsize=(9, 2.2), layout="constrained")
    for axes, budget in zip(figure.subplots(1, len(BUDGETS), sharey=True), BUDGETS):
        row = np.searchsorted(share, budget, side="right") - 1
        used = np.round(full * widths.read_widths(args.run)[row])
        axes.bar(range(len(full)), full, color="#d8e2ec")
        axes.bar(range(len(full)), used, color="#2b6ca3")
        axes.set_title(f"{share[row]:.0%} of the FLOPs: {front['top1'][row]:.1f} % right", fontsize="medium")
        axes.set_xticks(range(len(full)), [""] * len(full))
        axes.set_xlabel("width groups, early to late")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("channels in use")
    figure.savefig(args.out, dpi=110)
