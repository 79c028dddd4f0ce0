#!/usr/bin/env python3
"""What did the steps spend themselves on: which costs, and how much worse than the front are the networks that they trained?

    python .github/experiments/proposals.py RUN RUN ...     # finished runs of `joslim` and `twostage`, each judged by its own weights

`joslim`'s history has the first proposals of each round, in order: with fresh widths, one in a hundred of what its steps trained. Beside
it, of any run, 104 widths drawn at random, as `twostage` trains them. Each is judged on all held-out images by the finished weights; its
excess is by how much its loss is above that of the run's front at the same cost (geometric interpolation). Last, how well the losses that
the sampler went by at the end agree with those: the correlation, over configurations, of the two excesses. One thread; two minutes a run.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torch

import runs

sys.path.insert(0, str(runs.PROJECT))
import train  # noqa: E402
from joslim import RandomWidths, evaluate  # noqa: E402

COUNT = 104
BANDS = (0.07, 0.15, 0.3, 0.6, 1.01)


def measure(folder):
    state, args = train.read_finished(folder), train.parse_args(["--search", str(folder), "--device", "cpu"])
    data = train.Data(args, train.World().meet("cpu"))
    net = train.make_network(state["network"], args.lower)
    net.load_state_dict(state["model"])
    net.train()
    batches, cost = list(data.batches("held-out")), state["settings"]["cost"]
    full = getattr(net, cost)(1.0)

    def judge(widths):
        return sum(evaluate(net, widths, x, y).double() * len(x) for x, y in batches) / args.held_out

    with open(folder / "front.csv", newline="") as f:
        front = torch.tensor([[float(w) for w in row["widths"].split()] for row in csv.DictReader(f)], dtype=torch.float64)
    best = np.log((getattr(net, cost)(front) / full).numpy()), judge(front).log().numpy()

    def excess(share, loss):
        return loss.log().numpy() - np.interp(np.log(share), *best)

    def show(name, widths):
        share = (getattr(net, cost)(widths) / full).numpy()
        worse = excess(share, judge(widths))
        counts = " ".join(f"{n:3.0f}" for n in 100 * np.histogram(share, BANDS)[0] / len(share))
        inside = [(share >= a) & (share < b) for a, b in zip(BANDS, BANDS[1:])]
        by_band = " ".join(f"{100 * np.expm1(np.median(worse[i])):5.1f}" if i.any() else "    -" for i in inside)
        print(f"  {name:14} {counts}   loss above the front's (%), median: {by_band}", flush=True)
        return share, worse

    print(f"{folder}\n  of 100, costs of 7 to 15, to 30, to 60, to 100 %")
    if state["settings"]["method"] == "joslim":
        begin = args.num_prior + 1  # uniform widths and the full network
        history, tracked = state["sampler"]["widths"][begin:], state["sampler"]["losses"][begin:]
        parts = [show(f"quarter {k + 1}", part) for k, part in enumerate(history.chunk(4))] + [show("all", history)]
        agree = []
        for (share, worse), by in zip(parts, (*tracked.chunk(4), tracked)):
            known = by.isfinite().numpy()  # the last round's were not judged in the run
            agree.append(np.corrcoef(excess(share, by)[known], worse[known])[0, 1])
        print("  the sampler's losses and these: correlation of the excesses, by quarter:", *(f"{r:.2f}" for r in agree[:4]), end="")
        print(f"; of all {agree[4]:.2f}")
    show("random widths", RandomWidths(net.num_widths, args.lower, seed=1).sample(COUNT))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    torch.set_num_threads(1)
    for folder in p.parse_args().runs:
        measure(folder)
