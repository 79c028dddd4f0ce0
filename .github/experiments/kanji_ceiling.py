#!/usr/bin/env python3
"""Is there anything to find: are networks of some widths, trained alone, better than uniform ones of equal cost?

    python .github/experiments/kanji_ceiling.py DIR         # the folder that kanji.py made

resnet8 on kanji, with the settings and as many epochs as kanji_resnet8.py has. At 15, 25 and 50 % of the FLOPs and of the memory:
the uniform network with three seeds, ten whose widths are drawn at random and then widened or narrowed alike to that cost, and
two by hand, the late layers wide or the early ones. Each is a minute or two of one thread. Figures go to results/kanji-alone/. A
queue that was stopped is continued by the same command.

    python .github/experiments/kanji_ceiling.py DIR --found 0 1

trains instead what `joslim` offers within 10, 25 and 50 %, by its runs of these seeds in results/kanji/.
"""

import argparse
import csv
import itertools
import sys
from pathlib import Path

import torch

import kanji_resnet8
import runs

sys.path.insert(0, str(runs.PROJECT))
import models  # noqa: E402
from joslim import Joslim, RandomWidths  # noqa: E402

ROOT, KEPT = Path("runs", "kanji-alone"), runs.RESULTS / "kanji-alone"
COSTS, SHARES, RANDOM, SEEDS = ("flops", "memory"), (0.25, 0.5, 0.15), 10, 3
FOUND = (0.25, 0.5, 0.1)  # within which found networks are taken
LOWER = float(kanji_resnet8.SETTINGS[kanji_resnet8.SETTINGS.index("--lower") + 1])


def flags_of(widths, data_dir, seed):
    text = widths if isinstance(widths, str) else " ".join(f"{w:.6g}" for w in widths.tolist())
    return ["--widths", text, *kanji_resnet8.SETTINGS, "--data-dir", data_dir, "--seed", seed]


def list_drawn(data_dir, classes=200):
    """(name, flags) of uniform and random networks."""
    net = models.build("resnet8", classes, 24)
    jobs = []
    for share, cost in itertools.product(SHARES, COSTS):
        full = getattr(net, cost)(1.0)
        sampler = Joslim(net.num_widths, lambda a, relaxed=False: getattr(net, cost)(a, relaxed) / full, LOWER)  # noqa: B023
        target = torch.full((RANDOM,), share, dtype=torch.float64)
        uniform = sampler.project_to_cost(torch.full((1, net.num_widths), 0.5, dtype=torch.float64), target[:1])
        others = sampler.project_to_cost(RandomWidths(net.num_widths, LOWER).sample(RANDOM), target)
        # By hand: half of the layers at the least width, which no shift lifts from there, and the other half all alike.
        thin, wide = ([value] * (net.num_widths // 2) for value in (LOWER - 1, LOWER))
        halves = sampler.project_to_cost(torch.tensor([thin + wide, wide + thin], dtype=torch.float64), target[:2])
        named = [(f"uniform-{seed}", uniform[0], seed) for seed in range(SEEDS)]
        named += [(f"random-{i}", a, 0) for i, a in enumerate(others)]
        named += [(f"{which}-wide", a, 0) for which, a in zip(("late", "early"), halves)]
        jobs += [(f"{cost}-{share:.0%}-{name}", flags_of(a, data_dir, seed)) for name, a, seed in named]
    return jobs


def list_found(data_dir, seeds, costs=COSTS):
    """(name, flags) of the widths that joslim offers within each of FOUND, and their top-1 in its network by name."""
    jobs, shared = [], {}
    for seed, share, cost in itertools.product(seeds, FOUND, costs):
        with open(runs.RESULTS / "kanji" / f"joslim-{cost}-{seed}" / "front.csv", newline="") as f:
            rows = list(csv.DictReader(f))
        within = [row for row in rows if float(row[cost]) <= share * float(rows[-1][cost])]
        if within:
            name = f"{cost}-{share:.0%}-joslim-{seed}"
            jobs.append((name, flags_of(within[-1]["widths"], data_dir, seed)))
            shared[name] = float(within[-1]["top1"])
    return jobs, shared


def read(name):
    with open(KEPT / name / "front.csv", newline="") as f:
        (row,) = csv.DictReader(f)
    return float(row["top1"]), float(row["loss"])


def show(names):
    """A line for each cost and score: the uniform network's seeds and the random ones, sorted; the hand-made ones."""
    for group in dict.fromkeys(name.rsplit("-", 2)[0] for name in names):
        for k, what in enumerate(("top-1", "loss")):
            print(f"{group} {what}:", end="")
            for kind in ("uniform-", "random-", "late-wide", "early-wide"):
                values = sorted(read(n)[k] for n in names if n.startswith(f"{group}-{kind}"))
                print(f" {kind.rstrip('-')}", *(f"{v:.{2 + 2 * k}f}" for v in values), end=";")
            print()


def show_found(shared):
    """Top-1 in the slimmable network and alone."""
    for name, top1 in shared.items():
        print(f"{name}: {top1:.2f} in the slimmable network, {read(name)[0]:.2f} alone")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data_dir", type=Path, metavar="DIR")
    p.add_argument("--found", type=int, nargs="+", metavar="SEED")
    args = p.parse_args()
    folder = args.data_dir.resolve()
    jobs, shared = list_found(folder, args.found) if args.found else (list_drawn(folder), {})
    runs.train_alone(jobs, ROOT, KEPT.name)
    show_found(shared) if args.found else show([name for name, _ in jobs])
