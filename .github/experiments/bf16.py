#!/usr/bin/env python3
"""Is bfloat16 autocast faster on this CPU, and does it cost accuracy?

    python .github/experiments/bf16.py

The default run, and resnet20 by its recipe in half as many epochs; with --amp and without, seeds 0 to 2, one thread each, two at
a time: twelve runs of one to two minutes. Printed: mean top-1 over budgets evenly spaced in the logarithm of the FLOPs, and the
run's seconds. Runs go to runs/bf16/, their figures to results/bf16/. A queue that was stopped is continued by the same command.
"""

import argparse
from pathlib import Path

import compare
import runs

ROOT, SEEDS = Path("runs", "bf16"), (0, 1, 2)
NETWORKS = {"resnet8": [], "resnet20": ["--arch", "resnet20", "--epochs", "4"]}
LOW = 0.03  # of the FLOPs: above both smallest networks' cost


def scores(name):
    settings, front = compare.read_run(ROOT / name)
    front["flops"] = front["flops"] / front["flops"].max()
    return compare.score(front, "flops", LOW)[compare.COLUMNS.index("top-1")], settings["seconds"]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    jobs = [(f"{arch}-{precision}-{seed}", [*flags, f"--{precision}", "--seed", seed])
            for arch, flags in NETWORKS.items() for seed in SEEDS for precision in ("amp", "no-amp")]  # fmt: skip
    runs.queue(jobs, ROOT)
    runs.keep(ROOT, [name for name, _ in jobs], "bf16")
    for arch in NETWORKS:
        for precision in ("no-amp", "amp"):
            top1, seconds = zip(*(scores(f"{arch}-{precision}-{seed}") for seed in SEEDS))
            print(f"{arch:9} --{precision:7} top-1 {' '.join(f'{t:.2f}' for t in top1)}, seconds {' '.join(f'{s:.0f}' for s in seconds)}")
