#!/usr/bin/env python3
"""A budget that is known beforehand: what does fine-tuning the network for it gain, and what is left to the same widths alone?

    python .github/experiments/finetune.py DIR              # the folder that kanji.py made

resnet8 on kanji, `joslim`'s runs of kanji_resnet8.py, seeds 0 to 2 (made if they are not there): the networks within 10, 25 and 50 % of
the FLOPs as they are in the slimmable network, tuned by `train.py --export BUDGET --finetune EPOCHS` for 1, 2 and 4 epochs, and the same
widths trained alone for eight, as long as the slimmable network was (kanji_ceiling.py's). One thread each, two at a time; some 70 minutes.
Table and minutes are printed and written to results/finetune.csv. A queue that was stopped is continued by the same command.

Tuned by the labels, at half of the run's learning rate: on seed 10 of kanji and of the default run, by held-out losses, a half was better
than the whole or double of it (kanji), and the full network as teacher no better than labels.
"""

import argparse
import csv
import itertools
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import compare
import kanji_ceiling
import kanji_resnet8
import runs

SEEDS, BUDGETS, EPOCHS = (0, 1, 2), (0.1, 0.25, 0.5), (1, 2, 4)
KEPT = runs.RESULTS / "finetune.csv"
COLUMNS = "seed", "budget", "how", "top1", "minutes"


def measure(seed, budget, how, data_dir):
    """Top-1 on the test images, and minutes, of one network: `how` is a number of epochs, or "shared"."""
    run, start = kanji_resnet8.ROOT / f"joslim-flops-{seed}", time.perf_counter()
    if how == "shared":
        _, front = compare.read_run(run)
        row = np.searchsorted(front["flops"] / front["flops"].max(), budget, side="right") - 1
        return front["top1"][row], 0.0
    command = ["train.py", "--out", run, "--data-dir", data_dir, "--export", budget, "--finetune", how, "--workers", 1]
    done = subprocess.run([sys.executable, *map(str, command)], cwd=runs.PROJECT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)  # fmt: skip
    found = re.search(r"top-1 ([\d.]+)", done.stdout)
    if done.returncode or not found:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr}")
    return float(found[1]), (time.perf_counter() - start) / 60


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data_dir", type=Path, metavar="DIR")
    folder = p.parse_args().data_dir.resolve()
    listed = runs.list_methods(kanji_resnet8.ROOT, [*kanji_resnet8.SETTINGS, "--data-dir", folder], SEEDS, ["flops"])
    runs.queue([job for job in listed if job[0].startswith("joslim-")], kanji_resnet8.ROOT)

    KEPT.touch()
    with open(KEPT, newline="") as f:
        rows = list(csv.reader(f))
    wanted = [(s, b, how) for how in ("shared", *EPOCHS) for s in SEEDS for b in BUDGETS]
    missing = [key for key in wanted if list(map(str, key)) not in [row[:3] for row in rows]]
    with ThreadPoolExecutor(2) as pool, open(KEPT, "a", newline="") as f:
        table = csv.writer(f, lineterminator="\n")
        if not rows:
            table.writerow(COLUMNS)
        for key, result in zip(missing, pool.map(lambda key: measure(*key, folder), missing)):
            table.writerow([*key, *(f"{v:.2f}" for v in result)])
            f.flush()
            print(*key, *(f"{v:.2f}" for v in result), flush=True)

    with open(KEPT, newline="") as f:
        cells = {}  # (how, budget) -> [(top-1, minutes)] over seeds
        for row in csv.DictReader(f):
            cells.setdefault((row["how"], float(row["budget"])), []).append((float(row["top1"]), float(row["minutes"])))
    jobs, _ = kanji_ceiling.list_found(folder, SEEDS, ["flops"])
    runs.train_alone(jobs, kanji_ceiling.ROOT, kanji_ceiling.KEPT.name)
    for b, seed in itertools.product(BUDGETS, SEEDS):
        settings, front = compare.read_run(kanji_ceiling.KEPT / f"flops-{b:.0%}-joslim-{seed}")
        cells.setdefault(("alone", b), []).append((front["top1"][0], settings["seconds"] / 60))
    print("| top-1, mean of three seeds (least to most); minutes |", *(f" {b:.0%} of the FLOPs |" for b in BUDGETS))
    for how in map(str, ("shared", *EPOCHS, "alone")):
        values = [np.array(cells[how, b]) for b in BUDGETS]
        print(f"| {how} |", *(f" {v[:, 0].mean():.2f} ({v[:, 0].min():.2f} to {v[:, 0].max():.2f}); {v[:, 1].mean():.1f} |" for v in values))


if __name__ == "__main__":
    main()
