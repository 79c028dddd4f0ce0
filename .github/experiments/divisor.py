#!/usr/bin/env python3
"""What do channel counts in multiples of 8 gain in latency?

    python .github/experiments/divisor.py                  # two to ten minutes; nothing else may run meanwhile

40 random configurations of resnet20 (32 x 32) and mbv2 (224 x 224), batch 1, one thread, extracted with and without the divisor,
taking turns.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import models  # noqa: E402


def latency(arch, size):
    torch.manual_seed(0)
    nets = [models.build(arch, 10, size, divisor=d).to(memory_format=torch.channels_last) for d in (1, 8)]
    a = 0.42 + 0.58 * torch.rand(40, nets[0].num_widths, dtype=torch.float64)
    times = torch.stack([torch.stack([models.time_networks(net, w[None], threads=1).min() for net in nets]) for w in a])
    faster = 1 - times[:, 1] / times[:, 0]
    flops = nets[1].flops(a) / nets[0].flops(a) - 1
    print(f"{arch}: {times[:, 0].mean():.2f} ms, in multiples of 8 {times[:, 1].mean():.2f} ms: {faster.mean():.1%} less "
          f"({faster.min():.1%} to {faster.max():.1%}), at {flops.mean():+.1%} of the FLOPs")  # fmt: skip


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    latency("resnet20", 32)
    latency("mbv2", 224)
