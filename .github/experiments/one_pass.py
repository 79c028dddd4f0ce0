#!/usr/bin/env python3
"""Could `evaluate` judge many configurations in one pass of the full network, and would that pay on a GPU?

    python .github/experiments/one_pass.py          # no GPU; a minute of one core

`together` is that pass: each configuration's maps are the full network's, with zeros in the channels that it has not;
torch.func.vmap makes the images of all one batch, but for BatchNorm, whose statistics stay each configuration's. Printed
beside `evaluate`: how far apart the losses are (relatively, the worst), and for one configuration launches,
multiply-accumulates, and bytes that launches read and write. It has run on a CPU alone.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import models  # noqa: E402
from joslim import _batch_statistics, evaluate  # noqa: E402
from search_share import Launches  # noqa: E402

LOWER = 0.42
CASES = (("resnet8", 16, 64), ("resnet56", 32, 80), ("resnet18", 64, 16), ("mbv2", 64, 16))  # network, image size, images


@torch.no_grad()
def together(net, widths, x, y):
    """`evaluate(net, widths, x, y)` in one pass. Not for bf16: autocast leaves alone what is within vmap."""
    net.set_widths(1.0)
    masks = [torch.arange(g.max) < n[:, None] for g, n in zip(net.groups, net.channels(widths).unbind(1))]
    norms = [m for m in net.modules() if isinstance(m, (models.BatchNorm2d, models.Shortcut)) and not m.writes.fixed]

    def loss(*masks):
        of = dict(zip(net.groups, masks))
        hooks = [m.register_forward_hook(lambda m, _, out: out * of[m.writes].to(out)[:, None, None]) for m in norms]
        losses = F.cross_entropy(net(x), y)
        for hook in hooks:
            hook.remove()
        return losses

    with _batch_statistics(net):
        return torch.func.vmap(loss)(*masks)


class Traffic(Launches):
    """Counts bytes as well."""

    bytes = 0

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        before, out = self.count, super().__torch_dispatch__(fn, types, args, kwargs)
        if self.count > before:
            tensors = (t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor))
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


def measured(fn):
    """-> losses, launches, bytes, seconds; not of the first time, which makes plans."""
    fn()
    with Traffic() as traffic:
        fn()
    start = time.perf_counter()
    losses = fn()
    return losses, traffic.count, traffic.bytes, time.perf_counter() - start


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--configurations", type=int, default=16, help="in one pass (default: %(default)s)")
    k = p.parse_args().configurations
    print(
        f"CPU, torch {torch.__version__}, one thread, float32, {k} configurations in one pass. Of one configuration:\n"
        "                        losses     launches          M multiply-acc.   MB read, written  ms\n"
        "network   size images    apart     evaluate together evaluate together evaluate together evaluate together"
    )
    torch.set_num_threads(1)
    for arch, size, images in CASES:
        torch.manual_seed(0)
        net = models.build(arch, 100, size).to(memory_format=torch.channels_last).train()
        x = torch.randn(images, 3, size, size).to(memory_format=torch.channels_last)
        y = torch.randint(100, (images,))
        widths = LOWER + (1 - LOWER) * torch.rand(k, net.num_widths, dtype=torch.float64)
        widths[: k // 2] = widths[: k // 2, :1]  # half of them uniform
        one, all_ = (measured(lambda: fn(net, widths, x, y)) for fn in (evaluate, together))
        flops = images * net.flops(widths).mean() / 1e6, images * net.flops(1.0) / 1e6
        (losses, *one), (again, *all_) = ((found[0], *(v / k for v in found[1:])) for found in (one, all_))
        pairs = (one[0], all_[0]), flops, (one[1] / 1e6, all_[1] / 1e6), (1e3 * one[2], 1e3 * all_[2])
        cells = (f"{a:9.0f} {b:8.0f}" for a, b in pairs)
        print(f"{arch:9} {size:4} {images:6} {(again / losses - 1).abs().max():8.0e} {''.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
