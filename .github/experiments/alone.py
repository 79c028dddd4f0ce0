#!/usr/bin/env python3
"""How good is a network of given widths if trained by itself: what does a slimmable one give up?

    python .github/experiments/alone.py --widths 0.5 --out runs/alone-0.5 [FLAGS]               # uniform
    python .github/experiments/alone.py --widths "0.2 0.5 0.9 1 0.7 0.4" --out FOLDER [FLAGS]   # as front.csv has them

FLAGS are train.py's; those about widths and sub-networks have no effect. Data, their order, the
learning rate and the test are those of train.py with the same flags. Written: front.csv, of one row,
and settings.json, for compare.py to show beside slimmable networks. One process.
"""

import argparse
import csv
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import models  # noqa: E402
import train  # noqa: E402

# The settings of train.py that decide how a network alone is trained.
ITS_OWN = ("data", "arch", "image_size", "seed", "cost", "epochs", "batch_size", "lr", "warmup_epochs", "weight_decay",
           "label_smoothing", "augment", "flip", "held_out", "calibrate_images", "amp")  # fmt: skip


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)  # fmt: skip
    p.add_argument("--widths", required=True, help="one number, or one for each width group")
    p.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    own, rest = p.parse_known_args()
    start, args = time.perf_counter(), train.parse_args(rest)
    world = train.World().meet(args.device)
    args.amp = world.device.type == "cuda" if args.amp is None else args.amp
    data = train.Data(args, world)

    torch.manual_seed(args.seed)
    full = models.build(args.arch, len(data.about["classes"]), args.image_size, data.channels)
    widths = torch.tensor([float(w) for w in own.widths.split()], dtype=torch.float64)
    widths = widths.expand(full.num_widths) if len(widths) == 1 else widths
    # Cut from the weights with which the slimmable network of this seed starts.
    net = full.extract(widths).to(world.device, memory_format=torch.channels_last)
    scores = train.score([train.train_plain(net, data, args)], data.batches("test"))[0].tolist()

    own.out.mkdir(parents=True, exist_ok=True)
    text = " ".join(f"{w:.6g}" for w in widths.tolist())
    with open(own.out / "front.csv", "w", newline="") as f:
        table = csv.writer(f, lineterminator="\n")
        table.writerow([*train.COSTS, "loss", "top1", "top5", "widths"])
        table.writerow([*(int(getattr(full, cost)(widths)) for cost in train.COSTS), *scores, text])
    settings = {k: v for k, v in train.settings(args).items() if k in ITS_OWN}
    settings |= {"method": "alone", "widths": text, "seconds": time.perf_counter() - start}
    (own.out / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
    share = (full.flops(widths) / full.flops(1.0)).item()
    print(f"{share:.1%} of the FLOPs: test loss {scores[0]:.4f}, top-1 {scores[1]:.2f}; see {own.out}/")


if __name__ == "__main__":
    try:
        main()
    except (train.UserError, ValueError) as e:
        print(f"alone.py: {e}", file=sys.stderr)
        sys.exit(2)
