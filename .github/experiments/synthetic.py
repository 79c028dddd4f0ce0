#!/usr/bin/env python3
"""Does joslim beat slim and twostage with the settings that `python train.py` has by default?

    python .github/experiments/synthetic.py

resnet8 on images made in code, seeds 0 to 2: nine runs of about a minute, two at a time. Runs go to
runs/synthetic/, their figures to results/synthetic/, the picture to .github/synthetic.png. A queue
that was stopped is continued by the same command.
"""

import argparse
from pathlib import Path

import compare
import runs

ROOT = Path("runs", "synthetic")
# Finished weights are judged once, on all held-out images; a history that is judged every round on few of them.
JOBS = [(f"{method}-{seed}", ["--method", method, "--seed", seed, *(["--eval-images", 1000] if method == "twostage" else [])])
        for method in ("joslim", "slim", "twostage") for seed in (0, 1, 2)]  # fmt: skip

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    runs.queue(JOBS, ROOT)
    compare.compare(runs.keep(ROOT, [name for name, *_ in JOBS], "synthetic"), Path(".github", "synthetic.png"))
