#!/usr/bin/env python3
"""What does the joint training gain, and does it gain more where it is longer? The default run's images, all weights searched alike.

    python .github/experiments/synthetic.py [--keep]

resnet8 on images made in code, seeds 20 to 24, on which nothing was chosen: `joslim`, `twostage` and `slim` with the settings that
`python train.py` has, and with three times its epochs; `slim`'s finished weights are searched as the others' are. Forty runs, two at a
time, some two hours. Runs and tables go to runs/synthetic/, with --keep figures to results/synthetic/ and the picture to
.github/synthetic.png too. A queue that was stopped is continued by the same command.
"""

import argparse
from pathlib import Path

import compare
import runs

ROOT, SEEDS, EPOCHS = Path("runs", "synthetic"), range(20, 25), (8, 24)

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--keep", action="store_true", help="write into the project's tracked results")
    keep = p.parse_args().keep
    jobs = {epochs: runs.list_methods(ROOT / f"{epochs}", ["--epochs", epochs], SEEDS, ["flops"]) for epochs in EPOCHS}
    for epochs, listed in jobs.items():
        runs.queue(listed, ROOT / f"{epochs}")
    for epochs, listed in jobs.items():
        names, folder = [name for name, *_ in listed], ROOT / f"{epochs}"
        kept = runs.keep(folder, names, f"synthetic/{epochs}") if keep else [folder / name for name in names]
        print(f"\n{epochs} epochs")
        compare.compare(kept, Path(".github", f"synthetic-{epochs}.png") if keep else ROOT / f"{epochs}.png", markdown=keep)
