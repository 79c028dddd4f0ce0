#!/usr/bin/env python3
"""Does a network of torchvision's, taken as it is, train, find its widths and lead as the hand-wired ones do?

    python .github/experiments/any_network_trained.py

mobilenet_v3_small (squeeze and excitation, hardswish; 27 width groups) on the default run's images at 32 x 32, 16 epochs, settings
not tuned: joslim and slim, seed 0, side by side in one thread each. It shows that it works, not which of them is better. Runs go to runs/any-network/, their
figures to results/any-network/. A queue that was stopped is continued by the same command.
"""

import argparse
from pathlib import Path

import compare
import runs

ROOT = Path("runs", "any-network")
RECIPE = """--arch mobilenet_v3_small --image-size 32 --epochs 16 --batch-size 128 --lr 0.1 --tau 64 --eval-images 128 --lower 0.25
            --no-fresh-widths""".split()
JOBS = [(f"{method}-{seed}", [*RECIPE, "--method", method, "--seed", seed]) for seed in (0,) for method in ("joslim", "slim")]

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    runs.queue(JOBS, ROOT)
    compare.compare(runs.keep(ROOT, [name for name, *_ in JOBS], "any-network"), ROOT / "picture.png")
