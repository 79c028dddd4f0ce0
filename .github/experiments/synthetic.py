#!/usr/bin/env python3
"""What does the joint training gain, and does it gain more where it is longer? The default run's images, all weights searched alike.

    python .github/experiments/synthetic.py [--keep]

resnet8 on images made in code, seeds from 20 on, on which nothing was chosen: `joslim`, `twostage` and `slim` with the settings that
`python train.py` has (five seeds), and with three times its epochs (two); the finished weights of `slim` and `joslim` are searched from
nothing, too, as `twostage`'s are. Two runs at a time, some hour and a half. Runs and tables go to runs/synthetic/, with --keep figures to
results/synthetic/ and pictures to .github/ too. A queue that was stopped is continued by the same command.
"""

import argparse
from pathlib import Path

import compare
import runs

ROOT, SEEDS = Path("runs", "synthetic"), {8: range(20, 25), 24: range(20, 22)}  # by epochs

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--keep", action="store_true", help="write into the project's tracked results")
    keep = p.parse_args().keep
    jobs = {epochs: runs.list_methods(ROOT / f"{epochs}", ["--epochs", epochs], seeds, ["flops"]) for epochs, seeds in SEEDS.items()}
    for epochs, listed in jobs.items():
        runs.queue(listed, ROOT / f"{epochs}")
    for epochs, listed in jobs.items():
        names, folder = [name for name, *_ in listed], ROOT / f"{epochs}"
        kept = runs.keep(folder, names, f"synthetic/{epochs}") if keep else [folder / name for name in names]
        print(f"\n{epochs} epochs")
        compare.compare(kept, Path(".github", f"synthetic-{epochs}.png") if keep else ROOT / f"{epochs}.png", markdown=keep)
