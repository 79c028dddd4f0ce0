#!/usr/bin/env python3
"""Does joslim beat the other methods with MobileNetV2, for FLOPs and for memory?

    python .github/experiments/fashion_mbv2.py DATA_DIR --seeds 0 1     # DATA_DIR holds FashionMNIST/raw/

Fashion-MNIST at 28 x 28, two epochs, seven runs a seed, one thread each: half an hour to an hour of
two cores. Runs go to runs/fashion-mbv2/, their figures to results/fashion-mbv2/, the
picture to .github/fashion-mbv2.png. A queue that was stopped is continued by the same command.

All share data, steps, learning rate, smallest width, one sub-network a step, a fresh one every step,
and the search of the finished weights.
"""

import argparse
from pathlib import Path

import compare
import runs

ROOT = Path("runs", "fashion-mbv2")
SETTINGS = """--data fashion-mnist --arch mbv2 --batch-size 64 --epochs 2 --lr 0.05 --warmup-epochs 0.5 --lower 0.2
              --tau 15 --fresh-widths --num-prior 10 --held-out 5000 --eval-images 64 --front-size 12 --no-distillation""".split()


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data_dir", type=Path, metavar="DATA_DIR")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = p.parse_args()
    jobs = runs.list_methods(ROOT, [*SETTINGS, "--data-dir", args.data_dir.resolve()], args.seeds)
    runs.queue(jobs, ROOT)
    kept = runs.keep(ROOT, [name for name, *_ in jobs], "fashion-mbv2")
    compare.compare(kept, Path(".github", "fashion-mbv2.png"))
