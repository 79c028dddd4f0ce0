#!/usr/bin/env python3
"""How many convolution plans does cuDNN build in a run whose widths change all the time?

    python .github/experiments/plan_cache.py

torch keeps the plans that cuDNN builds for convolutions, one for each shape, in a cache of 10,000 (the least recently used goes
first; TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT). A build takes milliseconds of the CPU, in which the GPU may wait. A simulation: 500
rounds of ImageNet's recipe, as one process has them alone and as one of eight: it evaluates its share of the history in order and
then trains the full network, the smallest and two new configurations, forward and backward. Widths are random; all shapes are of
networks that ran (on tensors without values). Needs no GPU; some minutes.
"""

import argparse
import itertools
import sys
from collections import OrderedDict
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import models  # noqa: E402

ROUNDS, EACH, LOWER = 500, 2, 0.42


class Shapes(TorchDispatchMode):
    """Collects what decides a convolution's plan, but for the batch."""

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        if fn is torch.ops.aten.convolution.default:
            x, weight, _, stride, padding, *_, groups = args
            self.seen.append((*x.shape[1:], *weight.shape, *stride, *padding, groups))
        return fn(*args, **(kwargs or {}))


def shapes(net, a):
    net.set_widths(a)
    with torch.no_grad(), Shapes() as mode:
        mode.seen = []
        net(torch.empty(1, 3, 224, 224, device="meta"))
    return mode.seen


class Cache:
    """The least recently used plans go first, beyond `limit` of them."""

    def __init__(self, limit):
        self.limit, self.plans, self.builds = limit, OrderedDict(), 0

    def use(self, keys):
        for key in keys:
            if key in self.plans:
                self.plans.move_to_end(key)
            else:
                self.builds, self.plans[key] = self.builds + 1, None
                if len(self.plans) > self.limit:
                    self.plans.popitem(last=False)


def simulate(arch, divisor, processes):
    net = models.build(arch, 1000, 224, divisor=divisor).to("meta")
    generator = torch.Generator().manual_seed(0)
    always = [shapes(net, 1.0), shapes(net, LOWER)]
    caches, history = {"10,000": Cache(10_000), "none": Cache(float("inf"))}, []
    for number in range(ROUNDS):
        new = LOWER + (1 - LOWER) * torch.rand(EACH, net.num_widths, generator=generator, dtype=torch.float64)
        proposals = [shapes(net, a) for a in new]
        before = {limit: cache.builds for limit, cache in caches.items()}
        for cache in caches.values():
            for known in history[::processes]:
                cache.use(("held out", "forward", *key) for key in known)
            for trained in (*always, *proposals):
                cache.use(("trained", way, *key) for key in trained for way in ("forward", "data", "weight"))
        history += proposals
        if number + 1 in (100, 200, ROUNDS):
            for limit, cache in caches.items():
                print(f"{arch:9} {divisor:7} {processes:9}  {limit:>9} {len(history):8} {cache.builds - before[limit]:14,} {cache.builds:14,} "
                      f"{len(cache.plans):10,}", flush=True)  # fmt: skip


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    print("network   divisor processes      limit  history  builds a round   builds so far    in cache")
    for arch in ("mbv2", "resnet18"):
        for divisor, processes in itertools.product((1, 8), (1, 8)):
            simulate(arch, divisor, processes)
