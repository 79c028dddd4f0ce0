#!/usr/bin/env python3
"""Does joslim beat the other methods where width is what limits: resnet8 on kanji, for FLOPs and for memory?

    python .github/experiments/kanji.py DIR                              # the data, made of Debian's fonts
    python .github/experiments/kanji_resnet8.py DIR --seeds 0 1 2 3 4

Eight epochs, nine runs a seed, one thread each: some 40 minutes of two cores a seed. Runs go to runs/kanji/, their figures to
results/kanji/, the picture to .github/kanji.png. A queue that was stopped is continued by the same command.

All share data, steps, learning rate, smallest width, two sub-networks a step, fresh ones every step, and the search of the finished
weights. Settings were chosen on seed 10.
"""

import argparse
from pathlib import Path

import runs

ROOT = Path("runs", "kanji")
SETTINGS = """--data imagenet --arch resnet8 --image-size 24 --augment shift --no-flip --batch-size 64 --epochs 8 --lr 1
              --warmup-epochs 0.5 --weight-decay 5e-4 --label-smoothing 0 --lower 0.25 --divisor 1 --subnets 2 --tau 100
              --fresh-widths --num-prior 10 --held-out 2500 --eval-images 128 --calibrate-images 2048 --front-size 20 --workers 1""".split()


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data_dir", type=Path, metavar="DIR")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = p.parse_args()
    jobs = runs.list_methods(ROOT, [*SETTINGS, "--data-dir", args.data_dir.resolve()], args.seeds)
    runs.queue(jobs, ROOT)
    kept = runs.keep(ROOT, [name for name, *_ in jobs], "kanji")
    runs.compare_methods(kept, Path(".github", "kanji.png"))
