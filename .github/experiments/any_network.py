#!/usr/bin/env python3
"""Which of torchvision's networks can be slimmed as they are, and how far?

    python .github/experiments/any_network.py > .github/experiments/results/any_network.txt

For each `models.slimmable(net, image)` finds the groups. Channels: of all outputs of convolutions and Linears, but for the
last layer's, the share that is in a group that is slimmed. FLOPs at .25: what is left of them at a quarter of every width.
Checked: the full network's outputs are the original's, bit for bit; at random widths FLOPs are those of torch's
FlopCounterMode for the extracted network, parameters its own, and outputs are its (the largest difference, relative to
the largest output). Last the reasons why layers keep their width, with how many they are.
"""

import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import models  # noqa: E402

SIZE = {"inception_v3": 299}
ARCHS = """resnet18 resnet50 wide_resnet50_2 resnext50_32x4d regnet_x_400mf regnet_y_400mf mobilenet_v2 mobilenet_v3_small
           mnasnet1_0 efficientnet_b0 efficientnet_v2_s densenet121 googlenet inception_v3 squeezenet1_0 vgg11_bn alexnet
           shufflenet_v2_x1_0 convnext_tiny vit_b_16 swin_t fcn_resnet50 deeplabv3_resnet50 lraspp_mobilenet_v3_large"""


def network(arch):
    torch.manual_seed(0)
    of_arch = {"aux_logits": False, "init_weights": False} if arch in ("googlenet", "inception_v3") else {}
    if arch.startswith(("fcn", "deeplab", "lraspp")):
        of_arch = {"weights_backbone": None}
    net = torchvision.models.get_model(arch, weights=None, **of_arch).eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):  # statistics that hide nothing
            m.running_mean.normal_(0, 0.2), m.running_var.uniform_(0.5, 1.5)
    return net


def logits(out):
    return out["out"] if isinstance(out, dict) else out


def row(arch):
    net, size = network(arch), SIZE.get(arch, 224)
    start = time.perf_counter()
    slim = models.slimmable(net, (3, size, size))
    seconds = time.perf_counter() - start
    layers = [m for m in slim.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][:-1]
    slimmed = sum(len(m.weight) for m in layers if isinstance(m, models.LAYERS) and not m.writes.fixed)
    share = slimmed / sum(len(m.weight) for m in layers)
    left = (slim.flops(0.25) / slim.flops(1.0)).item() if slim.groups else 1.0
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        assert torch.equal(logits(slim.eval()(x)), logits(net(x)))
    a = 0.25 + 0.75 * torch.rand(slim.num_widths)
    plain = slim.extract(a)
    slim.set_widths(a)
    with torch.no_grad():
        theirs = logits(plain(x))
        apart = ((logits(slim(x)) - theirs).abs().max() / theirs.abs().max().clamp_min(1e-9)).item()  # vit: 0 before training
    assert slim.params(a).item() == sum(p.numel() for p in plain.parameters()), arch
    with FlopCounterMode(display=False) as counter:  # on the meta device: on a CPU it overlooks fused attention
        plain.to("meta")(x.to("meta"))
    assert slim.flops(a).item() == counter.get_total_flops() / 2, arch
    print(f"{arch:26} {slim.num_widths:6} {share:9.1%} {left:13.1%} {seconds:8.2f} {apart:10.1e}", flush=True)
    return arch, Counter(reason.split(" after ")[0].rstrip(",") for reason in slim.kept.values()), len(slim.kept)


def main():
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"{'network':26} groups  channels  FLOPs at .25  seconds  net - plain")
    found = [row(arch) for arch in ARCHS.split()]
    print(f"\ntorch {torch.__version__}, torchvision {torchvision.__version__}, 1 thread\n\nLayers that keep their width")
    for arch, reasons, count in found:
        print(f"{arch:26} {count:3}: " + "; ".join(f"{n} {reason}" for reason, n in reasons.most_common(3)))


if __name__ == "__main__":
    main()
