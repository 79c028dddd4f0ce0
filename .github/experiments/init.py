#!/usr/bin/env python3
"""Does a pretrained start help, and does sorting its channels?

    python .github/experiments/init.py DATA_DIR --seeds 0 1 2     # DATA_DIR holds FashionMNIST/raw/

MobileNetV2 is trained plainly on half of Fashion-MNIST for an epoch (its sub-networks are itself, and what they would learn
they know). Then `slim` trains for an epoch on the same half from the plain weights, and from the plain ones with each group's
channels sorted (`--init`): equal steps, the same draws; and from fresh ones, an epoch less. One thread each, some minutes a run; runs go to
runs/init/, their figures to results/init/. A queue that was stopped is continued by the same command.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import runs
from compare import read_run

ROOT = Path("runs", "init").resolve()
SETTINGS = """--data fashion-mnist --arch mbv2 --batch-size 64 --epochs 1 --lr 0.05 --warmup-epochs 0.3 --held-out 30000
              --eval-images 64 --method slim --front-size 8""".split()
UNSORTED = "import sys, train; train.models.sort_channels = lambda net: None; sys.exit(train.main())"


def run(name, data_dir, *flags, code=None):
    out = ROOT / name
    if not (out / "front.csv").exists():
        program = ["-c", code] if code else ["train.py"]
        command = [sys.executable, *program, *SETTINGS, "--data-dir", data_dir, *flags, "--out", out, "--resume"]
        with open(f"{out}.log", "a") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(list(map(str, command)), cwd=runs.PROJECT, env=environment, stdout=log, stderr=log, check=True)
    return name


def mean_top1(front):
    budgets = np.linspace(front["flops"][0], front["flops"][-1], 100)
    return front["top1"][np.searchsorted(front["flops"], budgets + 1, side="right") - 1].mean()


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data_dir", type=Path, metavar="DATA_DIR")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--at-once", type=int, default=2)
    args = p.parse_args()
    ROOT.mkdir(parents=True, exist_ok=True)
    data, small = args.data_dir.resolve(), ["--lower", 0.25]
    for seed in args.seeds:  # the seed decides which half
        run(f"plain-{seed}", data, "--lower", 1, "--seed", seed)
    with ThreadPoolExecutor(args.at_once) as pool:
        jobs = []
        for seed in args.seeds:
            init = [*small, "--init", ROOT / f"plain-{seed}" / "front.pt"]
            jobs.append(pool.submit(run, f"fresh-{seed}", data, *small, "--seed", seed))
            jobs.append(pool.submit(run, f"sorted-{seed}", data, *init, "--seed", seed))
            jobs.append(pool.submit(run, f"unsorted-{seed}", data, *init, "--seed", seed, code=UNSORTED))
        names = [job.result() for job in jobs]
    kept = dict(zip(names, runs.keep(ROOT, names, "init")))
    print("mean top-1 (%) over 100 budgets from the smallest network's FLOPs to the full one's")
    print(f"{'':10}" + "".join(f"{'seed ' + str(seed):>9}" for seed in args.seeds))
    for kind in ("fresh", "unsorted", "sorted"):
        fronts = [read_run(kept[f"{kind}-{seed}"])[1] for seed in args.seeds]
        print(f"{kind:10}" + "".join(f"{mean_top1(front):9.2f}" for front in fronts))
