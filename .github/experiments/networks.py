#!/usr/bin/env python3
"""Are the networks those that torchvision has, and what does being slimmable cost a training step?

    python .github/experiments/networks.py
    python .github/experiments/networks.py --device cuda --bf16 --batch 256

First the networks' costs beside those that torchvision publishes with its weights (parameters, and
multiply-accumulates at 224 x 224). Then forward and backward of the slimmable network at a
configuration and of the plain network of the same shape, one after the other so that both meet the
same weather: medians, and median and quartiles of the ratio of 9 such pairs.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import models  # noqa: E402

PAIRS = 9


def print_costs():
    print(f"{'network':10} pixels {'parameters':>11} {'published':>11} {'GFLOPs':>7} {'publ.':>7} {'MB':>7} widths")
    for arch in models.ARCHS:
        try:
            name = "mobilenet_v2" if arch == "mbv2" else arch
            published = torchvision.models.get_model_weights(name).DEFAULT.meta
            size, classes, theirs = 224, 1000, (published["num_params"], published["_ops"])
        except ValueError:  # torchvision has no ResNets for CIFAR
            size, classes, theirs = 32, 10, ("", "")
        net = models.build(arch, classes, size)
        params, flops, memory = (cost(1.0).item() for cost in (net.params, net.flops, net.memory))
        print(f"{arch:10} {size:6} {params:11.0f} {theirs[0]:>11} {flops / 1e9:7.3f} {theirs[1]:>7} "
              f"{memory / 1e6:7.1f} {net.num_widths:6}")  # fmt: skip


def print_times(arch, size, device, batch, bf16):
    torch.manual_seed(0)
    layout = torch.channels_last  # as in train.py
    net = models.build(arch, 10, size).to(device, memory_format=layout)
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=layout)
    y = torch.randint(10, (batch,), device=device)

    def seconds(some):
        some.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(some(x), y)
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    layer_wise = 0.42 + 0.58 * torch.rand(net.num_widths)
    for name, a in (("1", 1.0), ("0.75", 0.75), ("0.42", 0.42), ("layer-wise", layer_wise)):
        net.set_widths(a)
        plain = net.extract().to(memory_format=layout)
        pairs = [(seconds(net), seconds(plain)) for _ in range(PAIRS + 2)][2:]  # the first two warm up
        ours, theirs = (1e3 * statistics.median(times) for times in zip(*pairs))
        low, middle, high = statistics.quantiles([s / p for s, p in pairs], n=4)
        print(f"{arch:8} widths {name:10} slimmable {ours:7.1f} ms, plain {theirs:7.1f} ms, "
              f"ratio {middle:.3f} ({low:.3f} to {high:.3f})", flush=True)  # fmt: skip


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", type=torch.device, default="cpu", help="cpu or cuda (default: %(default)s)")
    p.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    p.add_argument("--batch", type=int, default=64, help="images (default: %(default)s)")
    args = p.parse_args()
    print_costs()
    cpu = args.device.type == "cpu"
    where = f"{torch.get_num_threads()} threads" if cpu else torch.cuda.get_device_name(args.device)
    print(f"\nforward and backward of {args.batch} images, {'bfloat16' if args.bf16 else 'float32'}, {where}, "
          f"torch {torch.__version__}; {PAIRS} pairs")  # fmt: skip
    for arch, size in (("resnet20", 32), ("mbv2", 64)):
        print_times(arch, size, args.device, args.batch, args.bf16)


if __name__ == "__main__":
    main()
