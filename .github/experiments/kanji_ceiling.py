#!/usr/bin/env python3
"""Is there anything to find: are networks of some widths, trained alone, better than uniform ones of equal cost?

    python .github/experiments/kanji_ceiling.py DIR         # the folder that kanji.py made

resnet8 on kanji, with the settings and as many epochs as kanji_resnet8.py has. At 15, 25 and 50 % of the FLOPs and of the memory:
the uniform network with three seeds, and ten whose widths are drawn at random and then widened or narrowed alike to that cost;
each a minute or two of one thread. Figures go to results/kanji-alone/. A queue that was stopped is continued by the same
command.
"""

import argparse
import csv
import shutil
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
LOWER = float(kanji_resnet8.SETTINGS[kanji_resnet8.SETTINGS.index("--lower") + 1])


def list_jobs(data_dir, classes=200):
    """(name, flags) of all networks."""
    net = models.build("resnet8", classes, 24)
    jobs = []
    for share in SHARES:
        for cost in COSTS:
            full = getattr(net, cost)(1.0)
            sampler = Joslim(net.num_widths, lambda a, relaxed=False: getattr(net, cost)(a, relaxed) / full, LOWER)  # noqa: B023
            target = torch.full((RANDOM,), share, dtype=torch.float64)
            uniform = sampler.project_to_cost(torch.full((1, net.num_widths), 0.5, dtype=torch.float64), target[:1])
            others = sampler.project_to_cost(RandomWidths(net.num_widths, LOWER).sample(RANDOM), target)
            named = [(f"uniform-{seed}", uniform[0], seed) for seed in range(SEEDS)]
            named += [(f"random-{i}", a, 0) for i, a in enumerate(others)]
            for name, a, seed in named:
                widths = " ".join(f"{w:.6g}" for w in a.tolist())
                flags = ["--widths", widths, *kanji_resnet8.SETTINGS, "--data-dir", data_dir, "--eval-images", 128, "--seed", seed]
                jobs.append((f"{cost}-{share:.0%}-{name}", flags))
    return jobs


def read(name):
    with open(KEPT / name / "front.csv", newline="") as f:
        (row,) = csv.DictReader(f)
    return float(row["top1"]), float(row["loss"])


def show(names):
    """One line for each cost: the uniform network's seeds, and the others sorted."""
    for group in dict.fromkeys(name.rsplit("-", 2)[0] for name in names):
        uniform, others = ([read(n) for n in names if n.startswith(f"{group}-{kind}-")] for kind in ("uniform", "random"))
        for k, what in enumerate(("top-1", "loss")):
            texts = [" ".join(f"{v[k]:.{2 + 2 * k}f}" for v in some) for some in (uniform, sorted(others, reverse=True))]
            print(f"{group} {what}: uniform {texts[0]}; others {texts[1]}")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data_dir", type=Path, metavar="DIR")
    jobs = list_jobs(p.parse_args().data_dir.resolve())
    runs.queue(jobs, ROOT, script=".github/experiments/alone.py")
    for name, _ in jobs:
        (KEPT / name).mkdir(parents=True, exist_ok=True)
        for file in ("front.csv", "settings.json"):
            shutil.copyfile(ROOT / name / file, KEPT / name / file)
    show([name for name, _ in jobs])
