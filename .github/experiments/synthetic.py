#!/usr/bin/env python3
"""What does the joint training gain, and does it gain more where it is longer? The default run's images, all weights searched alike.

    python .github/experiments/synthetic.py [--keep]

resnet8 on images made in code, seeds 20 to 24, on which nothing was chosen: `joslim`, `twostage` and `slim` with the settings that
`python train.py` has, and with three times its epochs; the finished weights of `slim` and `joslim` are searched from nothing, too, as
`twostage`'s are. Then all weights, from nothing, with up to four times the visits. Two runs at a time, some three hours. Runs and tables go to runs/synthetic/, with --keep figures to results/synthetic/ and pictures to .github/ too. A queue that was
stopped is continued by the same command.
"""

import argparse
from pathlib import Path

import compare
import runs

ROOT, SEEDS, EPOCHS = Path("runs", "synthetic"), range(20, 25), (8, 24)
LONGER = 12  # steps a round, for as many visits as a run of that many has: the default is 48

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--keep", action="store_true", help="write into the project's tracked results")
    keep = p.parse_args().keep
    jobs = {f"{epochs}": runs.list_methods(ROOT / f"{epochs}", ["--epochs", epochs], SEEDS, ["flops"]) for epochs in EPOCHS}
    weights = [f"{method}-{seed}" for seed in SEEDS for method in ("joslim-flops", "twostage-flops", "slim")]
    jobs |= {f"{epochs}-longer": [(name, ["--search", ROOT / f"{epochs}" / name, "--tau", LONGER]) for name in weights]
             for epochs in EPOCHS}  # fmt: skip
    for folder, listed in jobs.items():
        runs.queue(listed, ROOT / folder)
    for folder, listed in jobs.items():
        names = [name for name, *_ in listed]
        kept = runs.keep(ROOT / folder, names, f"synthetic/{folder}") if keep else [ROOT / folder / name for name in names]
        print(f"\n{folder} epochs")
        if folder.endswith("longer"):
            compare.compare(kept, None, markdown=keep)
        else:
            runs.compare_methods(kept, Path(".github", f"synthetic-{folder}.png") if keep else ROOT / f"{folder}.png", markdown=keep)
