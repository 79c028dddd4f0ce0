"""Slimmable ResNet and MobileNetV2: one set of weights, every layer-wise width.

    net = build("mbv2", num_classes=1000, image_size=224)
    net.set_widths(0.5)                       # every group at half its channels
    net.set_widths(torch.rand(net.num_widths).clamp(min=0.42))
    net(x).sum().backward()                   # runs and trains at those widths
    net.flops(a), net.params(a), net.memory(a)   # a (..., num_widths) -> (...,)
    plain = net.extract()                     # an ordinary nn.Sequential, weights cut and copied

    net = load("front.pt")                    # what a run of train.py wrote
    net.use(flops=0.5)                        # its best configuration within half the FLOPs, ready to run

The whole idea is the `WidthGroup`: tensors that are added share one, a layer is told which group
it reads and which it writes, and choosing widths is setting each group's `active` once. Forward
passes read like the ordinary networks'; costs are found by watching one forward pass.

To make another network slimmable, write it with `Conv2d`, `BatchNorm2d` and `Linear` of this file
and wrap it: `Slimmable(OrderedDict(net=MyNet()), image=(3, 32, 32))`.

In order: layers; `Slimmable`; ResNet and MobileNetV2; the deployable file; pretrained weights; latency; cost tables.
This file needs torch alone.
"""

import copy
import functools
import io
import math
import time
import zipfile
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# ------------------------------------------------------------------------------ slimmable layers


class WidthGroup:
    """Channels that must agree. `max` exist, the first `active` of them are in use.

    A `fixed` group (image channels, MobileNetV2's last 1280) is never slimmed and takes no place in
    the width vector. Raises ValueError for max below 1.
    """

    def __init__(self, max: int, fixed: bool = False):
        if max < 1:
            raise ValueError(f"max must be at least 1, got {max}")
        self.max = self.active = max
        self.fixed = fixed


class Concatenation:
    """What a layer reads where tensors of several groups are concatenated, in this order, along the channels."""

    fixed = True  # its width is its parts'

    def __init__(self, *parts: "WidthGroup | Concatenation"):
        self.parts = tuple(g for part in parts for g in getattr(part, "parts", [part]))  # of a Concatenation, its own

    max = property(lambda self: sum(g.max for g in self.parts))
    active = property(lambda self: sum(g.active for g in self.parts))


def input_channels(weight: Tensor, reads: WidthGroup | Concatenation) -> Tensor:
    """(out, sum of max, ...) -> (out, sum of active, ...): in the weight every part of a concatenation has room for its full
    width; what it does not use is left out, since in the input the parts lie side by side."""
    if isinstance(reads, WidthGroup) or weight.shape[1] == reads.active:
        return weight
    parts = zip(weight.split([g.max for g in reads.parts], 1), reads.parts)
    return torch.cat([part[:, : g.active] for part, g in parts], 1)


def first_channels(t: Tensor, *sizes: int) -> Tensor:
    """The first `sizes` of `t`'s first dimensions; `t` itself where nothing is cut: a cut costs a copy in backward."""
    if t.shape[: len(sizes)] == sizes:
        return t
    if t.ndim == 1:
        return t[: sizes[0]]  # a view: running statistics are written through it
    # Negative padding cuts both dimensions at once. Two slices would be two copies in the backward
    # pass, and save none in the forward one: convolutions copy what is not contiguous.
    pad = [0] * (2 * t.ndim)
    for dim, n in enumerate(sizes):
        pad[-1 - 2 * dim] = n - t.shape[dim]
    return F.pad(t, pad)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`, padded by kernel_size // 2, from the group it reads to the one it writes (depthwise: the same one).

    Without a bias unless asked: BatchNorm, which mostly follows, has one.
    """

    def __init__(self, reads, writes, kernel_size, stride=1, *, depthwise=False, bias=False):
        if depthwise and (reads is not writes or isinstance(reads, Concatenation)):
            raise ValueError("depthwise: such a convolution writes the group that it reads, which is no Concatenation")
        groups = writes.max if depthwise else 1
        super().__init__(reads.max, writes.max, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias)
        self.reads, self.writes, self.depthwise = reads, writes, depthwise

    def forward(self, x):
        i, o = self.reads.active, self.writes.active
        groups = o if self.depthwise else 1
        bias = None if self.bias is None else first_channels(self.bias, o)
        weight = first_channels(input_channels(self.weight, self.reads), o, i // groups)
        return F.conv2d(x, weight, bias, self.stride, self.padding, 1, groups)

    def plain(self):
        i, o = self.reads.active, self.writes.active
        groups = o if self.depthwise else 1
        return nn.Conv2d(i, o, self.kernel_size, self.stride, self.padding, groups=groups, bias=self.bias is not None)


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` of a group, with momentum 0: training leaves running statistics alone.

    They mean nothing while widths change, and at first they are 0 and 1: a network that was only trained gives nonsense
    in eval(). Calibration sets them for one configuration at a time, before
    eval() or extract(): in train(), under no_grad, the k-th batch (from 1) runs with momentum 1 / k; then
    it is 0 again (`joslim.calibrate_bn`).
    """

    def __init__(self, group):
        if isinstance(group, Concatenation):
            raise ValueError("BatchNorm2d: normalises a group; normalise the parts before they are concatenated")
        super().__init__(group.max, momentum=0.0)
        self.reads = self.writes = group

    def forward(self, x):
        n = self.writes.active
        mean = var = None
        if self.momentum or not self.training:
            mean, var = first_channels(self.running_mean, n), first_channels(self.running_var, n)
        weight, bias = first_channels(self.weight, n), first_channels(self.bias, n)
        return F.batch_norm(x, mean, var, weight, bias, self.training, self.momentum, self.eps)

    def plain(self):
        return nn.BatchNorm2d(self.writes.active, self.eps)


class Linear(nn.Linear):
    """`nn.Linear` from a group to `out_features` outputs, which are never slimmed."""

    def __init__(self, reads, out_features):
        super().__init__(reads.max, out_features)
        self.reads, self.writes = reads, WidthGroup(out_features, fixed=True)

    def forward(self, x):
        weight = input_channels(self.weight, self.reads)
        return F.linear(x, first_channels(weight, self.out_features, self.reads.active), self.bias)

    def plain(self):
        return nn.Linear(self.reads.active, self.out_features)


def subsample(x: Tensor, stride: int, more: int) -> Tensor:
    """Every stride-th pixel, and `more` channels of zeros after the last; where it is negative, so many fewer channels."""
    return F.pad(x[:, :, ::stride, ::stride], [0, 0, 0, 0, 0, more])


class PlainShortcut(nn.Module):
    """`subsample` as a module."""

    def __init__(self, stride, more):
        super().__init__()
        self.stride, self.more = stride, more

    def forward(self, x):
        return subsample(x, self.stride, self.more)


class Shortcut(nn.Module):
    """ResNet's parameter-free shortcut between stages (He et al. 2016, option A): channel i goes to channel i.

    As far as both groups have channels: layer-wise widths can leave the later stage the narrower one.
    """

    def __init__(self, reads, writes, stride):
        super().__init__()
        self.reads, self.writes, self.stride = reads, writes, stride

    def forward(self, x):
        return subsample(x, self.stride, self.writes.active - self.reads.active)

    def plain(self):
        return PlainShortcut(self.stride, self.writes.active - self.reads.active)


LAYERS = Conv2d, BatchNorm2d, Linear, Shortcut
COSTS = "flops", "params", "memory", "latency"

# ------------------------------------------------------------------------------ the slimmable network


class Slimmable(nn.Sequential):
    """A network whose layers read and write width groups.

    Args:
        layers: named children, run one after another.
        image: (channels, height, width) of one input, for the costs.
        divisor: channel counts are multiples of it, but for the full network's; of 8, they run faster on most processors.

    Attributes:
        groups: the width groups that are slimmed, in the order of `named_modules()`; a[i] sets `groups[i]`.
        names: for each group, the first layer that writes it.
        num_widths: d, the length of a configuration.
        front: of a network that `load` returned, {"flops": (k,), ..., "top1": (k,), "widths": (k, d)}, by rising cost.
        statistics: of one, too: BatchNorm's for each row of the front (k, s), as `get_statistics` has them.
        data: of one, too: {"classes": names, "mean": ..., "std": ...} of the images.
        latency_table: what `fit_latency` found (d + 1, d + 1): see `_weight_tables`.
    Raises ValueError, with the layer's name, where costs cannot be told from the layers: see `_require_wiring`.
    """

    front = statistics = data = latency_table = None

    def __init__(self, layers: "OrderedDict[str, nn.Module]", image: tuple[int, int, int], divisor: int = 1):
        super().__init__(layers)
        self.image, self.divisor = image, divisor
        names = {}
        for name, m in self.named_modules():
            if isinstance(m, LAYERS) and not m.writes.fixed:
                names.setdefault(m.writes, name)
        self.groups, self.names = list(names), list(names.values())
        self.num_widths = len(self.groups)
        self._max = torch.tensor([g.max for g in self.groups], dtype=torch.float64)
        trace = _Trace(self, image)
        _require_wiring(self, image, trace)
        self._flops, self._params, self._terms = _weight_tables(self, trace)
        self._live = _activation_table(self, trace)

    def set_widths(self, a: Tensor | float) -> None:
        """Run at configuration `a` (d,) in (0, 1]^d from now on; a float sets every group alike.

        Group i keeps its first divisor * round(a_i * max_i / divisor) channels, at least `divisor`; all of them at a_i = 1.
        Raises ValueError for a wrong length or a value outside (0, 1].
        """
        channels = self.channels(a)
        if channels.ndim != 1:
            raise ValueError(f"set_widths: a must have shape ({self.num_widths},), got {tuple(channels.shape)}")
        for group, n in zip(self.groups, channels.tolist()):
            group.active = int(n)

    def channels(self, a: Tensor | float, relaxed: bool = False) -> Tensor:
        """Channel counts (..., d), float64, that `set_widths` gives; a * max, unrounded, where relaxed."""
        a = torch.as_tensor(a, dtype=torch.float64)
        if a.ndim == 0:
            a = a.expand(self.num_widths)
        if a.shape[-1] != self.num_widths:
            raise ValueError(f"a: this network has {self.num_widths} widths, got {a.shape[-1]}")
        bad = a[~((a > 0) & (a <= 1))]  # nan, too
        if len(bad):
            raise ValueError(f"a: widths must lie in (0, 1], got {bad[0].item():g}")
        c = a * self._max.to(a.device)
        if relaxed:
            return c
        most, n = self._max.to(a.device), self.divisor
        return torch.where(a == 1, most, (c / n).round().clamp(min=1).mul(n).minimum(most))

    def flops(self, a: Tensor | float, relaxed: bool = False) -> Tensor:
        """Multiply-accumulates of convolutions and linear layers for one image: a (..., d) -> (...,).

        float64. `relaxed` skips the rounding of channel counts, which makes it differentiable in a.
        """
        return self._quadratic(self._flops, a, relaxed)

    def params(self, a: Tensor | float, relaxed: bool = False) -> Tensor:
        """Number of parameters: a (..., d) -> (...,). `relaxed` as in `flops`."""
        return self._quadratic(self._params, a, relaxed)

    def memory(self, a: Tensor | float, relaxed: bool = False) -> Tensor:
        """Peak bytes of float32 inference at batch size 1: a (..., d) -> (...,). `relaxed` as in `flops`.

        All weights, plus the largest set of activations alive at one time: what an operation reads
        and writes, and what a later one still needs (the residual). In this file's networks ReLUs and
        additions work in place (yours are counted as you wrote them); BatchNorm is not folded into
        the convolution before it.
        """
        c = _with_one(self.channels(a, relaxed))
        live = (c @ self._live.to(c.device).T).amax(-1)
        return 4 * (self._quadratic(self._params, a, relaxed) + live)

    def latency(self, a: Tensor | float, relaxed: bool = False) -> Tensor:
        """Milliseconds of a forward pass as `fit_latency` found them: a (..., d) -> (...,). `relaxed` as in `flops`.

        Raises ValueError before that.
        """
        if self.latency_table is None:
            raise ValueError("latency: measure some configurations, and fit_latency() first")
        return self._quadratic(self.latency_table, a, relaxed)

    def fit_latency(self, widths: Tensor, milliseconds: Tensor) -> Tensor:
        """Fits `latency` to the times (n,) measured at widths (n, d) -> the relative errors (n,) that are left.

        A sum of the terms of `_weight_tables`, none with a negative weight: so it grows with every width. The
        weights minimise the squared relative error (non-negative least squares by the multiplicative updates of
        Lee & Seung 2001, which keep the sign).
        """
        c = _with_one(self.channels(widths))
        terms = torch.einsum("ni,fij,nj->nf", c, self._terms, c)
        relative = terms / terms.mean(0) / milliseconds.double()[:, None]  # (n, f): weighted, they are to add up to 1
        weights = torch.full_like(terms[0], 1 / relative.sum(1).mean().item())
        gram, target = relative.T @ relative, relative.sum(0)
        for _ in range(20000):
            weights *= target / (gram @ weights).clamp_min(1e-300)
        self.latency_table = torch.einsum("f,fij->ij", weights / terms.mean(0), self._terms)
        return relative @ weights - 1

    def _quadratic(self, form, a, relaxed):
        # A weight's size is a constant times its input group's count times its output group's, so that all
        # sizes together are a quadratic form: one matrix serves thousands of configurations at once.
        c = _with_one(self.channels(a, relaxed))
        return ((c @ form.to(c.device)) * c).sum(-1)

    def extract(self, a: Tensor | float | None = None) -> nn.Sequential:
        """A plain network (nn.Conv2d, nn.BatchNorm2d, nn.Linear) with copies of the weights used at `a`.

        None means the widths now set, which this call leaves as they were. The memory format is kept.
        Running statistics come along; they fit only the configuration that BatchNorm was last calibrated for.
        """
        before = [g.active for g in self.groups]
        try:
            if a is not None:
                self.set_widths(a)
            plain = {id(m): _plain(m) for m in self.modules() if isinstance(m, LAYERS)}
            # deepcopy takes a module that its memo knows from there: every layer becomes its plain twin. (Here, since
            # a module of your own may hold a group, and is copied with the width it has now.)
            children = [(name, copy.deepcopy(m, plain)) for name, m in self.named_children()]
        finally:
            for g, n in zip(self.groups, before):
                g.active = n
        return nn.Sequential(OrderedDict(children)).train(self.training)

    def use(self, **budget: float) -> dict[str, float]:
        """Runs from now on at the front's best configuration within a budget, in eval mode: use(flops=0.5).

        Of flops, params, memory (bytes) and, where it was measured, latency (ms), one or several, which all hold: a ratio
        to the full network's, or, above 1, the cost itself (so a latency below 1 ms can be given as a ratio only).
        BatchNorm's statistics come along: no images are needed. Returns that configuration's row of front.csv, but for
        its widths. Raises ValueError without a front, and for a budget that none fits into; then nothing has changed.

        Widths and statistics are this object's: threads and processes take a network each, or one that `extract` gives.
        """
        if not budget:
            raise ValueError("use: name a budget, as in use(flops=0.5)")
        fits = True
        for name, limit in budget.items():
            if name not in COSTS or name not in (self.front or {}):
                raise ValueError(f"use: no front with a {name} to choose from; models.load() what a run has written")
            cost = self.front[name]
            within = cost <= (limit if limit > 1 else limit * cost.max()) * (1 + 1e-9)
            if not within.any():
                raise ValueError(f"{name}: nothing fits into {limit:g}; the smallest needs {cost.min():.15g}, "
                                 f"{round_up(cost.min()[None] / cost.max(), 4)[0]} of the full network")  # fmt: skip
            fits = within & fits
        if not fits.any():
            raise ValueError(f"use: nothing fits into all of {', '.join(f'{k}={v:g}' for k, v in budget.items())}")
        best = int(fits.nonzero()[-1])  # of rising cost, and so of falling loss on held-out images
        self.channels(self.front["widths"][best])  # raises before anything is changed
        set_statistics(self, self.statistics[best])
        self.set_widths(self.front["widths"][best])
        self.eval()
        return {k: v[best].item() for k, v in self.front.items() if k != "widths"}


def round_up(costs: Tensor, digits: int) -> list[str]:
    """Decimals no less than the costs (k,): given back as a budget, one finds its row. More digits where rows need them."""
    shown = [f"{math.ceil(v * 10**digits * (1 - 1e-10)) / 10**digits:.{digits}f}" for v in costs.tolist()]
    return shown if len({*shown}) == len({*costs.tolist()}) or digits > 12 else round_up(costs, digits + 1)


def _plain(layer):
    plain, state = layer.plain(), layer.state_dict()
    if layer.reads is not layer.writes and "weight" in state:
        state["weight"] = input_channels(state["weight"], layer.reads)
    cut = {k: state[k][tuple(map(slice, v.shape))] for k, v in plain.state_dict().items()}
    for p in layer.parameters():
        plain.to(p.device, p.dtype).requires_grad_(p.requires_grad)
    plain.load_state_dict(cut)
    if any(p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last) for p in layer.parameters()):
        plain.to(memory_format=torch.channels_last)
    return plain


# ------------------------------------------------------------------------------ the architectures


class BasicBlock(nn.Module):
    """ResNet's two 3x3 convolutions. Parameter names are torchvision's."""

    expansion = 1

    def __init__(self, reads, writes, planes, stride, downsample):
        super().__init__()
        inner = WidthGroup(planes)
        self.conv1, self.bn1 = Conv2d(reads, inner, 3, stride), BatchNorm2d(inner)
        self.conv2, self.bn2 = Conv2d(inner, writes, 3), BatchNorm2d(writes)
        self.relu, self.downsample = nn.ReLU(inplace=True), downsample

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """ResNet's 1x1, 3x3, 1x1 block, stride on the 3x3 as in torchvision, whose parameter names these are."""

    expansion = 4

    def __init__(self, reads, writes, planes, stride, downsample):
        super().__init__()
        one, two = WidthGroup(planes), WidthGroup(planes)
        self.conv1, self.bn1 = Conv2d(reads, one, 1), BatchNorm2d(one)
        self.conv2, self.bn2 = Conv2d(one, two, 3, stride), BatchNorm2d(two)
        self.conv3, self.bn3 = Conv2d(two, writes, 1), BatchNorm2d(writes)
        self.relu, self.downsample = nn.ReLU(inplace=True), downsample

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def resnet(block, depths, num_classes, image, divisor=1, cifar=False):
    """ResNet (He et al. 2016): CIFAR form (3x3 stem, parameter-free shortcuts) or torchvision's ImageNet form."""
    planes = (16, 32, 64) if cifar else (64, 128, 256, 512)
    pixels, reads = WidthGroup(image[0], fixed=True), WidthGroup(planes[0])
    stem = Conv2d(pixels, reads, 3) if cifar else Conv2d(pixels, reads, 7, 2)
    layers = OrderedDict(conv1=stem, bn1=BatchNorm2d(reads), relu=nn.ReLU(inplace=True))
    if not cifar:
        layers["maxpool"] = nn.MaxPool2d(3, 2, 1)
    for s, (n, depth) in enumerate(zip(planes, depths)):
        blocks = []
        for b in range(depth):
            stride = 2 if s > 0 and b == 0 else 1
            writes, downsample = reads, None  # an input that is added as it is shares the output's group
            if stride > 1 or reads.max != n * block.expansion:
                writes = WidthGroup(n * block.expansion)
                if cifar:
                    downsample = Shortcut(reads, writes, stride)
                else:
                    downsample = nn.Sequential(Conv2d(reads, writes, 1, stride), BatchNorm2d(writes))
            blocks.append(block(reads, writes, n, stride, downsample))
            reads = writes
        layers[f"layer{s + 1}"] = nn.Sequential(*blocks)
    layers.update(avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=Linear(reads, num_classes))
    return Slimmable(_initialised(layers), image, divisor)


def conv_bn_relu6(reads, writes, kernel_size, stride=1, depthwise=False):
    conv = Conv2d(reads, writes, kernel_size, stride, depthwise=depthwise)
    return nn.Sequential(conv, BatchNorm2d(writes), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """MobileNetV2's expand, depthwise, project. Parameter names are torchvision's."""

    def __init__(self, reads, writes, stride, expansion):
        super().__init__()
        hidden = reads if expansion == 1 else WidthGroup(reads.max * expansion)
        expand = [] if expansion == 1 else [conv_bn_relu6(reads, hidden, 1)]
        depthwise = conv_bn_relu6(hidden, hidden, 3, stride, depthwise=True)
        self.conv = nn.Sequential(*expand, depthwise, Conv2d(hidden, writes, 1), BatchNorm2d(writes))
        self.residual = reads is writes

    def forward(self, x):
        out = self.conv(x)
        return out.add_(x) if self.residual else out


def mobilenet_v2(num_classes, image, divisor=1):
    """MobileNetV2 (Sandler et al. 2018) in torchvision's form, without dropout; its last 1280 channels stay."""
    pixels, last = WidthGroup(image[0], fixed=True), WidthGroup(1280, fixed=True)
    reads = WidthGroup(32)
    features = [conv_bn_relu6(pixels, reads, 3, 2)]
    for expansion, n, repeats, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)
    ):  # fmt: skip
        writes = WidthGroup(n)
        for b in range(repeats):
            features.append(InvertedResidual(reads, writes, stride if b == 0 else 1, expansion))
            reads = writes
    features.append(conv_bn_relu6(reads, last, 1))
    layers = OrderedDict(
        features=nn.Sequential(*features),
        avgpool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        classifier=nn.Sequential(nn.Identity(), Linear(last, num_classes)),  # Identity: torchvision's dropout
    )
    return Slimmable(_initialised(layers), image, divisor)


def _initialised(layers):
    for layer in layers.values():
        for m in layer.modules():
            if isinstance(m, Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")
    return layers


RESNETS = {
    "resnet8": (BasicBlock, (1, 1, 1)),
    "resnet20": (BasicBlock, (3, 3, 3)),
    "resnet32": (BasicBlock, (5, 5, 5)),
    "resnet44": (BasicBlock, (7, 7, 7)),
    "resnet56": (BasicBlock, (9, 9, 9)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}
ARCHS = (*RESNETS, "mbv2")


def build(arch: str, num_classes: int, image_size: int, in_channels: int = 3, divisor: int = 1) -> Slimmable:
    """A freshly initialised slimmable network (torch's global generator draws the weights).

    Args:
        arch: one of ARCHS. resnet8 to resnet56 in steps of 12 are the CIFAR form (three stages), the
            other ResNets and mbv2 the ImageNet form with torchvision's parameter names.
        image_size: height and width of the square inputs, for the costs.
        divisor: channel counts are multiples of it.
    Raises ValueError for an unknown arch or a count below 1.
    """
    counts = dict(num_classes=num_classes, image_size=image_size, in_channels=in_channels, divisor=divisor)
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    image = in_channels, image_size, image_size
    if arch == "mbv2":
        return mobilenet_v2(num_classes, image, divisor)
    if arch not in RESNETS:
        raise ValueError(f"arch: unknown {arch!r}, choose from {', '.join(ARCHS)}")
    block, depths = RESNETS[arch]
    return resnet(block, depths, num_classes, image, divisor, cifar=len(depths) == 3)


# ------------------------------------------------------------------------------ the deployable file


def _norms(net):
    return [m for m in net.modules() if isinstance(m, BatchNorm2d)]


def get_statistics(net: Slimmable) -> Tensor:
    """All running means and variances as one vector (s,), s twice the sum of all BatchNorms' channels."""
    return torch.cat([t for m in _norms(net) for t in (m.running_mean, m.running_var)])


def set_statistics(net: Slimmable, vector: Tensor) -> None:
    """Sets what `get_statistics` gave: new buffers, as others (a copy, a process, a thread) may hold the old ones."""
    norms = _norms(net)
    parts = vector.to(norms[0].running_mean, copy=True).split([len(m.running_mean) for m in norms for _ in range(2)])
    for m, mean, var in zip(norms, parts[::2], parts[1::2]):
        m.running_mean, m.running_var = mean, var


def read_tensors(path: str) -> dict:
    """What torch.save wrote, on the CPU; checksums, at which torch.load does not look, are verified first.

    Runs nothing that is in the file. Raises ValueError, of one line, for a damaged or cut file and for another kind of
    file; OSError or MemoryError where reading failed, which says nothing about the file.
    """
    with open(path, "rb") as f:
        file = io.BytesIO(f.read())  # what is verified is what is loaded
    try:
        if file.getbuffer()[:2] == b"PK":  # a zip archive, as all are but torch's oldest
            damaged = zipfile.ZipFile(file).testzip()
            if damaged:
                raise ValueError(f"{damaged} is corrupt")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged file makes its readers raise nearly anything
        if isinstance(e, MemoryError) or "memory" in str(e):
            raise
        reason = (str(e).splitlines() or [""])[0]
        raise ValueError(f"{path}: not a readable file of torch's, or a damaged one ({type(e).__name__}: {reason})") from None


@torch.inference_mode(False)  # what is loaded within one serves outside as well
def load(path: str, device: torch.device | str = "cpu") -> Slimmable:
    """The network of a front.pt, with its front: see `Slimmable.use`. In eval mode, at full width.

    `net.data` holds the names of the classes, and mean and deviation of the images: they are to be
    (image / 255 - mean) / std. Raises as `read_tensors`, and ValueError for another file of torch's.
    """
    state = read_tensors(path)
    if not isinstance(state, dict) or not {"network", "model", "front", "statistics", "data", "cost"} <= state.keys():
        raise ValueError(f"{path}: not a front.pt, which train.py writes when a run is done")
    net = build(**state["network"])
    net.load_state_dict(state["model"])
    net.front, net.statistics, net.data = state["front"], state["statistics"].to(device), state["data"]
    net.latency_table = state["latency"]
    net.to(device, memory_format=torch.channels_last)  # the faster layout on GPU and CPU alike
    net.use(**{state["cost"]: 1.0})
    return net


# ------------------------------------------------------------------------------ pretrained weights


def sort_channels(net: Slimmable) -> None:
    """Permutes each group's channels by falling importance: the first are those worth keeping.

    The full network's outputs stay the same.

    Readers' input channels, and writers' output channels with BatchNorm's vectors, get the same permutation. Call it before
    training. A channel's importance is the sum of the absolute weights that read it. Groups that a parameter-free shortcut
    joins stay as they are: their channels must go on meeting.
    """
    layers = [m for m in net.modules() if isinstance(m, LAYERS)]
    joined = {g for m in layers if isinstance(m, Shortcut) for g in (m.reads, m.writes)}
    for group in net.groups:
        readers = [(m, start) for m in layers for start in _starts(m, group)]
        if group in joined or not readers:
            continue
        parts = [m.weight.detach()[:, start : start + group.max] for m, start in readers]  # (out, group's channels, ...)
        order = sum(part.abs().transpose(0, 1).flatten(1).sum(1) for part in parts).argsort(descending=True)
        with torch.no_grad():
            for m, start in readers:
                m.weight[:, start : start + group.max] = m.weight[:, start : start + group.max][:, order]
            for m in layers:
                for t in m.state_dict().values() if m.writes is group else ():
                    if t.ndim:
                        t.copy_(t[order])


def _starts(layer, group):
    """Where in the layer's input channels those of the group begin; not for what writes the group that it reads."""
    if isinstance(layer, (BatchNorm2d, Shortcut)) or getattr(layer, "depthwise", False):
        return []
    parts = layer.reads.parts if isinstance(layer.reads, Concatenation) else [layer.reads]
    return [sum(g.max for g in parts[:k]) for k, part in enumerate(parts) if part is group]


# ------------------------------------------------------------------------------ latency


@torch.inference_mode()
def time_forward(net: nn.Module, x: Tensor, runs: int = 5) -> Tensor:
    """Milliseconds of `runs` forward passes of batch x, one by one, after two that are not counted."""
    times = []
    for _ in range(runs + 2):
        began = time.perf_counter()
        net(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        times.append(1000 * (time.perf_counter() - began))
    return torch.tensor(times[2:], dtype=torch.float64)


def time_networks(net: Slimmable, widths: Tensor, batch: int = 1, threads: int | None = None) -> Tensor:
    """Milliseconds (k, 30) of forward passes of the networks extracted at widths (k, d), on net's device: six turns of five.

    They take turns, so that whatever else the machine does meets all alike. `threads` of a CPU: None means torch's.
    The least of a network's times is what it takes where nothing else runs, and repeats best.
    """
    like, before = next(net.parameters()), torch.get_num_threads()
    x = torch.randn(batch, *net.image, device=like.device, dtype=like.dtype)
    try:
        torch.set_num_threads(threads or before)
        turns = ([time_forward(net.extract(a).eval(), x) for a in widths] for _ in range(6))
        return torch.cat([torch.stack(turn) for turn in turns], 1)
    finally:
        torch.set_num_threads(before)


def measure_latency(net: Slimmable, lower: float, count: int = 80, seed: int = 0, **how) -> tuple[Tensor, Tensor, Tensor]:
    """Times `count` configurations with widths from `lower` up, some of them uniform, and fits `net.latency` to them.

    how: as for `time_networks`. Returns their widths (count, d), milliseconds (count,), and the relative errors of a fit
    to three quarters of them for the others, which it has not seen.
    """
    g = torch.Generator().manual_seed(seed)
    middle, apart = (torch.rand(count, d, generator=g, dtype=torch.float64) for d in (1, net.num_widths))
    apart[::8] = 0.5
    widths = (lower + (1 - lower) * (middle + apart - 0.5)).clamp(lower, 1)
    widths[0], widths[1] = lower, 1
    times, unseen = time_networks(net, widths, **how).amin(1), torch.arange(count) % 4 == 3
    net.fit_latency(widths[~unseen], times[~unseen])
    errors = (net.latency(widths[unseen]) / times[unseen] - 1).abs()
    net.fit_latency(widths, times)
    return widths, times, errors


# ------------------------------------------------------------------------------ cost tables


def _with_one(c):
    return F.pad(c, (0, 1), value=1.0)


class _Trace(TorchDispatchMode):
    """One image's way through the network at the widths now set, on the meta device, where no arithmetic is done.

    calls: (name, layer, its output's pixels, its input's) of the slimmable layers, in order; a shared one comes twice.
    lives: of each activation [group whose channels it carries, values, first operation, last operation, layer before].

    A ResNet block, whose ReLUs and addition work in place. A column is an operation: its stars are in memory at once.

                    conv1  bn1  relu  conv2  bn2  add  relu
        x             *     *     *     *     *    *           the shortcut waits for the addition
        conv1(x)      *     *
        bn1(...)            *     *     *
        conv2(...)                      *     *
        bn2(...)                              *    *    *  ->  the next block's x

    Raises ValueError, with a layer's name, where the network does not run.
    """

    def __init__(self, net, image):
        super().__init__()
        state = {k: v.to("meta") for k, v in (*net.named_parameters(), *net.named_buffers())}
        self.weights = {self.storage(w) for w in state.values()}
        self.calls, self.seen, self.lives, self.operations, self.name = [], [], {}, 0, "the image"
        x, training, hooks = torch.empty(1, *image, device="meta"), net.training, []
        self.meet(x, WidthGroup(image[0], fixed=True))
        for name, layer in net.named_modules():
            if isinstance(layer, LAYERS):
                hooks.append(layer.register_forward_pre_hook(functools.partial(self.enter, name)))
                hooks.append(layer.register_forward_hook(functools.partial(self.leave, name)))
        try:
            with torch.no_grad(), self:
                torch.func.functional_call(net.eval(), state, x)
        except (RuntimeError, TypeError) as e:
            raise ValueError(f"after {self.name}: {e}") from e
        finally:
            net.train(training)
            for hook in hooks:
                hook.remove()
        self.lives = list(self.lives.values())

    def enter(self, name, layer, inputs):
        shape, linear = inputs[0].shape, isinstance(layer, Linear)
        if len(shape) != (2 if linear else 4) or shape[1] != layer.reads.active:
            raise ValueError(f"{name}: reads a group of which {layer.reads.active} channels are in use, "
                             f"got an input of shape {tuple(shape)}")  # fmt: skip
        carried = self.lives[self.storage(inputs[0])][0]
        if isinstance(carried, Concatenation) and carried.parts != getattr(layer.reads, "parts", ()):
            raise ValueError(f"{name}: reads something else than the Concatenation of groups that it gets")
        self.name = name

    def leave(self, name, layer, inputs, out):
        self.calls.append((name, layer, out[0, 0].numel(), inputs[0][0, 0].numel()))
        self.lives[self.storage(out)][0] = layer.writes

    def storage(self, t):
        return t.untyped_storage()._cdata

    def meet(self, t, group):
        life = self.lives.setdefault(self.storage(t), [group, t.numel(), self.operations, self.operations, self.name])
        life[3] = self.operations

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op._schema.name.endswith("_") and not any(isinstance(t, Tensor) for t in args[1:]):
            out = args[0]  # an activation function in place: on the meta device there is nothing to do, but slowly
        else:
            out = op(*args, **(kwargs or {}))
        read, made = ([t for t in tree_flatten(part)[0] if isinstance(t, Tensor)] for part in ((args, kwargs), out))
        if read and all(self.storage(t) in self.weights for t in read):
            self.weights |= {self.storage(t) for t in made}  # a cut weight is one
        # Statistics are vectors and pooling's indices integers: neither is an activation.
        activations = [
            t for t in read + made if t.ndim > 1 and t.is_floating_point() and self.storage(t) not in self.weights
        ]
        carried = [self.lives.get(self.storage(t), [None])[0] for t in activations if t not in set(made)]
        joins = op is torch.ops.aten.cat.default and None not in carried and (args[1:] or (0,))[0] == 1
        for t in activations:  # an output has its input's channels (a pooling's, say), unless a layer knows better
            self.meet(t, Concatenation(*carried) if joins else carried[0] if carried else None)
        self.seen += read + made  # kept alive, so that no storage's address comes twice
        self.operations += 1
        return out


def _count(net, group):
    """The group's channels as a vector v: v' (c, 1). Fixed ones are a multiple of the 1, a concatenation its parts' sum."""
    v = torch.zeros(net.num_widths + 1, dtype=torch.float64)
    for g in group.parts if isinstance(group, Concatenation) else [group]:
        place, factor = (net.groups.index(g), 1) if g in net.groups else (net.num_widths, g.max if g else 1)
        v[place] += factor
    return v


def _weight_tables(net, trace):
    """FLOPs and parameters as matrices Q, and a latency's terms as a stack of such: with c the channel counts followed by
    a 1, each is c' Q c.

    Q[i, j] sums over the layers that read group i and write group j: a kernel's pixels, for FLOPs times
    the output's. A 3 x 3 convolution on 32 x 32 pixels gives 9 and 9216. The last row is for what reads
    no slimmed group: vectors, depthwise kernels, the image.

    The terms of a latency: for the layers of each kind (class, kernel, stride, pixels) together their FLOPs, what
    they read and what they write; and a constant.
    """
    one = _count(net, None)
    flops, params = (torch.zeros(2 * [net.num_widths + 1], dtype=torch.float64) for _ in range(2))
    known, terms = set(), {"constant": torch.outer(one, one)}
    for _, layer, pixels, pixels_read in trace.calls:
        depthwise = getattr(layer, "depthwise", False)
        read, written = _count(net, layer.reads), _count(net, layer.writes)
        kind = type(layer), getattr(layer, "kernel_size", 1), getattr(layer, "stride", 1), depthwise, pixels
        for p in layer.parameters(recurse=False):
            matrix = p.ndim > 1  # a vector's size, like a depthwise kernel's, goes with one group only
            size = torch.outer(read if matrix and not depthwise else one, written) * (p[0, 0].numel() if matrix else 1)
            if layer not in known:
                params += size
            if matrix:
                flops += size * pixels
                for what, value in (("flops", size * pixels), ("reads", torch.outer(one, read) * pixels_read),
                                    ("writes", torch.outer(one, written) * pixels)):  # fmt: skip
                    terms[what, kind] = terms.get((what, kind), 0) + value
        known.add(layer)
    return flops, params, torch.stack(list(terms.values()))


def _activation_table(net, trace):
    """Rows, of which the largest product with (c, 1) is the number of activation values alive at one time."""
    rows = torch.zeros(trace.operations, net.num_widths + 1, dtype=torch.float64)
    for group, numel, first, last, _ in trace.lives:
        rows[first : last + 1] += _count(net, group) * (numel / (group.max if group else 1))
    rows = rows.unique(dim=0)
    below = (rows[:, None] <= rows[None]).all(-1).sum(1) > 1  # never the largest: another row is above it
    return rows[~below]


def _require_wiring(net, image, full):
    """Raises ValueError, naming the layer, unless the costs, found at full width, hold at other widths.

    Two configurations are tried in which groups differ: what only fits at full width (two tensors concatenated and
    read as one group, two groups added) fits at neither.
    """
    called = [layer for _, layer, *_ in full.calls]
    for name, m in net.named_modules():
        if not isinstance(m, LAYERS):
            p = next((p for p, _ in m.named_parameters(recurse=False)), None)
            if p:
                raise ValueError(f"{name}.{p}: a parameter of {type(m).__name__}, which neither widths nor costs know of; "
                                 f"use {', '.join(layer.__name__ for layer in LAYERS[:3])} of this file")  # fmt: skip
        elif called.count(m) != 1 and (m not in called or isinstance(m, BatchNorm2d)):
            raise ValueError(f"{name}: called {called.count(m)} times; a BatchNorm2d's statistics belong to one place, "
                             "and the costs of what is not called are unknown")  # fmt: skip
    along = torch.linspace(0, 1, net.num_widths)
    mixed = (0.99 - 0.618 * torch.arange(net.num_widths)) % 1  # the golden ratio: neighbours are far from each other
    # For each activation, the groups with which its size goes; None: with no group's.
    fits = [{None, life[0], *net.groups} for life in full.lives]
    try:
        for share in (along, mixed):
            for group, s in zip(net.groups, share.tolist()):
                group.active = 1 + round(s * (group.max - 1))
            lives = _Trace(net, image).lives
            if len(lives) != len(full.lives):
                raise ValueError("another number of activations at other widths: the network must do the same at all")
            for carries, (_, most, *_, name), (_, numel, *_) in zip(fits, full.lives, lives):
                carries &= {g for g in carries if numel * (g.max if g else 1) == most * (g.active if g else 1)}
                if not carries:
                    raise ValueError(f"after {name}: a tensor whose size goes with the width of no group")
    finally:
        for group in net.groups:
            group.active = group.max
    for life, carries in zip(full.lives, fits):
        if life[0] not in carries:  # a map that is the mean over channels, say
            life[0] = next(g for g in (None, *net.groups) if g in carries)
