#!/usr/bin/env python3
"""Is there something to find for memory where late layers are far too wide for their maps, and does joslim find it?

    python .github/experiments/kanji_resnet18.py DIR --seeds 0 1 2 3 4     # the folder that kanji.py made

resnet18 on kanji: of 24 x 24 pixels, 1 x 1 are left to its last stage, which holds most of the memory. Networks alone, eight epochs: at
13 and 25 % of the memory uniform ones and ones whose early half is at full width, three seeds, and the full one. And for memory joslim,
slim and twostage, eight epochs, all weights searched alike; other settings are kanji_resnet8.py's but for one sub-network a step and the
learning rate. Some two hours of one thread a seed and as much for the networks alone. Runs go to runs/kanji-resnet18/, figures to
results/kanji-resnet18/, the picture to .github/kanji-resnet18.png. A queue that was stopped is continued by the same command.
"""

import argparse
import sys
from pathlib import Path

import torch

import kanji_resnet8
import runs

sys.path.insert(0, str(runs.PROJECT))
import models  # noqa: E402
from joslim import Joslim  # noqa: E402

ROOT, LOWER = Path("runs", "kanji-resnet18"), 0.25


def settings(**changed):
    """kanji_resnet8.py's, as flags, with these changed."""
    flags = list(kanji_resnet8.SETTINGS)
    for name, value in changed.items():
        flags[flags.index(f"--{name}") + 1] = value
    return flags


def list_alone(data_dir):
    net = models.build("resnet18", 200, 24)
    full, half = net.memory(1.0), net.num_widths // 2
    sampler = Joslim(net.num_widths, lambda a, relaxed=False: net.memory(a, relaxed) / full, LOWER)

    def at(widths, share):
        return sampler.project_to_cost(torch.tensor([widths], dtype=torch.float64), torch.tensor([share]).double())[0]

    thinnest = torch.tensor([1.0] * half + [LOWER] * half).double()  # the late half's, at the least width
    share = (net.memory(thinnest) / full).item()
    drawn = {"13%-early": thinnest, "13%-uniform": at([0.35] * 2 * half, share),
             "25%-early": at([2.0] * half + [0.4] * half, 0.25), "25%-uniform": at([0.5] * 2 * half, 0.25),
             "100%": torch.ones(2 * half)}  # fmt: skip
    return [(f"{name}-{seed}", ["--widths", " ".join(f"{w:.6g}" for w in a.tolist()), *settings(arch="resnet18", lr=0.4),
                                "--data-dir", data_dir, "--seed", seed])
            for seed in range(3) for name, a in drawn.items() if seed == 0 or name != "100%"]  # fmt: skip


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data_dir", type=Path, metavar="DIR")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = p.parse_args()
    folder = args.data_dir.resolve()
    shared = [*settings(arch="resnet18", lr=0.4, subnets=1), "--data-dir", folder]
    jobs = runs.list_methods(ROOT, shared, args.seeds, ["memory"])
    runs.queue(jobs, ROOT)
    alone = runs.train_alone(list_alone(folder), ROOT, "kanji-resnet18")
    kept = runs.keep(ROOT, [name for name, *_ in jobs], "kanji-resnet18")
    runs.compare_methods([*kept, *alone], Path(".github", "kanji-resnet18.png"))
