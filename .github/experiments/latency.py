#!/usr/bin/env python3
"""How fast is a front on this machine, and how much memory does it take?

    python .github/experiments/latency.py RUN [--device cuda] [--batch 1] [--threads 1]

The networks of RUN/front.pt, extracted, take turns (`models.time_networks`); beside each its peak memory: measured on a GPU,
on a CPU `memory`'s formula, of one image.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import models  # noqa: E402


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--threads", type=int)
    args = p.parse_args()
    net = models.load(str(args.run / "front.pt"), args.device)
    widths = net.front["widths"]
    times = models.time_networks(net, widths, args.batch, args.threads)
    on_gpu = torch.device(args.device).type == "cuda"
    print(f"{args.device}, {args.threads or torch.get_num_threads()} threads, batch {args.batch}\n"
          f"  of FLOPs  top-1   least ms  of full   median  (quartiles) {'     peak MB' if on_gpu else 'MB by formula'}")  # fmt: skip
    quartiles, least = times.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), 1), times.amin(1)
    for i, (a, low, middle, high) in enumerate(zip(widths, *quartiles)):
        peak = net.memory(a).item()
        if on_gpu:
            others = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            models.time_forward(net.extract(a).eval(), torch.randn(args.batch, *net.image, device=args.device), 1)
            peak = torch.cuda.max_memory_allocated() - others
        print(f"  {net.front['flops'][i] / net.front['flops'].max():8.1%} {net.front['top1'][i]:6.2f} {least[i]:10.2f} "
              f"{least[i] / least[-1]:8.1%} {middle:8.2f}  ({low:.2f} to {high:.2f}) {peak / 1e6:9.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
