"""Slimmable networks: one set of weights, every layer-wise width. ResNet and MobileNetV2, or an ordinary network as it is.

    net = build("mbv2", num_classes=1000, image_size=224)
    net.set_widths(0.5)                       # every group at half its channels
    net.set_widths(torch.rand(net.num_widths).clamp(min=0.42))
    net(x).sum().backward()                   # runs and trains at those widths
    net.flops(a), net.params(a), net.memory(a)   # a (..., num_widths) -> (...,)
    plain = net.extract()                     # an ordinary network, weights cut and copied

    net = slimmable(torchvision.models.efficientnet_b0(), (3, 224, 224))   # a copy; net.kept: what stays as wide, and why

    net = load("front.pt")                    # what a run of train.py wrote
    net.use(flops=0.5)                        # its best configuration within half the FLOPs, ready to run

The whole idea is the `WidthGroup`: tensors that are added share one, a layer is told which group
it reads and which it writes, and choosing widths is setting each group's `active` once. Forward
passes read like the ordinary networks'; costs are found by watching one forward pass.

`slimmable` finds out which group each layer of an ordinary network reads and writes, and puts this file's layers into
their places. To say it yourself, write the network with `Conv2d`, `BatchNorm2d` and `Linear` of this file and wrap it:
`Slimmable(MyNet(), image=(3, 32, 32))`. ResNet and MobileNetV2 below are written so.

In order: layers; `Slimmable`; how groups are found; ResNet and MobileNetV2; the deployable file; pretrained weights;
latency; cost tables. This file needs torch alone.
"""

import copy
import functools
import itertools
import math
import time
from collections import Counter, OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.utils import _pair
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

# ------------------------------------------------------------------------------ slimmable layers


class WidthGroup:
    """Channels that must agree. `max` exist, the first `active` of them are in use, a multiple of `step`.

    A `fixed` group (image channels, MobileNetV2's last 1280) is never slimmed and takes no place in
    the width vector. Raises ValueError for max below 1.
    """

    def __init__(self, max: int, fixed: bool | str = False, step: int = 1):
        if max < 1:
            raise ValueError(f"max must be at least 1, got {max}")
        self.max = self.active = max
        self.fixed, self.step = fixed, step  # `slimmable` gives the reason; a grouped convolution's parts are the step


class Concatenation:
    """What a layer reads where tensors of several groups are concatenated, in this order, along the channels.

    each: entries of a channel, where maps of so many pixels were flattened before a `Linear`.
    """

    fixed = True  # its width is its parts'

    def __init__(self, *parts: "WidthGroup | Concatenation", each: int = 1):
        self.parts = tuple(g for part in parts for g in parts_of(part))  # of a Concatenation, its own
        self.each = each

    max = property(lambda self: self.each * sum(g.max for g in self.parts))
    active = property(lambda self: self.each * sum(g.active for g in self.parts))


def parts_of(channels: WidthGroup | Concatenation) -> "tuple[WidthGroup, ...]":
    return getattr(channels, "parts", (channels,))


def used_parts(t: Tensor, channels: WidthGroup | Concatenation, dim: int) -> list[Tensor]:
    """Views of what is in use of each part, in the dimension of `t` where every part has room for its full width."""
    each, parts = getattr(channels, "each", 1), parts_of(channels)
    return [one.narrow(dim, 0, each * g.active) for one, g in zip(t.split([each * g.max for g in parts], dim), parts)]


def used_channels(t: Tensor, channels: WidthGroup | Concatenation, dim: int) -> Tensor:
    """(..., sum of max, ...) -> (..., sum of active, ...): of a concatenation's parts what is not used is left out, since in
    the input they lie side by side. Of a group `t` itself, which `first_channels` cuts."""
    if isinstance(channels, WidthGroup) or t.shape[dim] == channels.active:
        return t
    return torch.cat(used_parts(t, channels, dim), dim)


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
    """`nn.Conv2d` from the group it reads to the one it writes. A grouped convolution (depthwise: of one channel a part)
    writes the group it reads, whose channels then come and go by whole parts.

    Padded by kernel_size // 2, and without a bias, unless asked: BatchNorm, which mostly follows, has one.
    """

    def __init__(self, reads, writes, kernel_size, stride=1, *, depthwise=False, bias=False, padding=None, dilation=1,
                 groups=1, padding_mode="zeros"):  # fmt: skip
        groups = writes.max if depthwise else groups
        if padding is None:
            padding = tuple(d * (k // 2) for k, d in zip(_pair(kernel_size), _pair(dilation)))
        super().__init__(reads.max, writes.max, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        if groups > 1 and not (reads is writes and in_steps(writes, writes.max // groups)):
            raise ValueError("depthwise, groups: such a convolution writes the group that it reads, by whole parts")
        self.reads, self.writes = reads, writes

    def forward(self, x):
        i, o = self.reads.active, self.writes.active
        weight, bias, padding, groups = self.weight, self.bias, self.padding, self.groups
        if groups > 1:
            groups = o * groups // self.out_channels
            weight, bias = (t if t is None else used_channels(t, self.writes, 0) for t in (weight, bias))
        else:
            weight = used_channels(weight, self.reads, 1)
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, self.padding_mode), 0
        bias = None if bias is None else first_channels(bias, o)
        return F.conv2d(x, first_channels(weight, o, i // groups), bias, self.stride, padding, self.dilation, groups)

    def plain(self):
        i, o, how = self.reads.active, self.writes.active, (self.kernel_size, self.stride, self.padding, self.dilation)
        groups = o * self.groups // self.out_channels if self.groups > 1 else 1
        return nn.Conv2d(i, o, *how, groups, self.bias is not None, self.padding_mode)


def in_steps(channels: WidthGroup | Concatenation, step: int) -> bool:
    """Lets the channels of every part come and go `step` at a time; False where they cannot."""
    if step > 1 and (getattr(channels, "each", 1) > 1 or any(g.max % step for g in parts_of(channels))):
        return False
    for g in parts_of(channels):
        g.step = math.lcm(g.step, step)
    return True


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` of a group, with momentum 0: training leaves running statistics alone.

    They mean nothing while widths change, and at first they are 0 and 1: a network that was only trained gives nonsense
    in eval(). Calibration sets them for one configuration at a time, before
    eval() or extract(): in train(), under no_grad, the k-th batch (from 1) runs with momentum 1 / k; then
    it is 0 again (`joslim.calibrate_bn`).
    """

    theirs = 0.1  # the momentum of what is extracted

    def __init__(self, group):
        super().__init__(group.max, momentum=0.0)
        self.reads = self.writes = group

    def forward(self, x):
        mean = var = None
        if self.momentum or not self.training:
            mean, var = self.used(self.running_mean), self.used(self.running_var)
        training = self.training or mean is None
        x = F.batch_norm(x, mean, var, self.used(self.weight), self.used(self.bias), training, self.momentum, self.eps)
        if self.training and mean is not None and isinstance(self.writes, Concatenation):  # they may be copies
            for stat, new in ((self.running_mean, mean), (self.running_var, var)):
                for part, value in zip(parts := used_parts(stat, self.writes, 0), new.split([len(p) for p in parts])):
                    part.copy_(value)
        return x

    def used(self, t):
        return None if t is None else first_channels(used_channels(t, self.writes, 0), self.writes.active)

    def plain(self):
        return nn.BatchNorm2d(self.writes.active, self.eps, self.theirs, self.affine, self.track_running_stats)


class Linear(nn.Linear):
    """`nn.Linear` from a group to another, or to a number of outputs, which are never slimmed."""

    def __init__(self, reads, writes, bias=True):
        writes = WidthGroup(writes, fixed=True) if isinstance(writes, int) else writes
        super().__init__(reads.max, writes.max, bias)
        self.reads, self.writes = reads, writes

    def forward(self, x):
        i, o = self.reads.active, self.writes.active
        weight = first_channels(used_channels(self.weight, self.reads, 1), o, i)
        return F.linear(x, weight, None if self.bias is None else first_channels(self.bias, o))

    def plain(self):
        return nn.Linear(self.reads.active, self.writes.active, self.bias is not None)


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
        layers: named children, run one after another; or one module, whose children and parameters become this
            network's own, by the same names, and whose forward pass it runs.
        image: (channels, height, width) of one input, for the costs.
        divisor: channel counts are multiples of it, but for the full network's; of 8, they run faster on most processors.

    Attributes:
        groups: the width groups that are slimmed, in the order of `named_modules()`; a[i] sets `groups[i]`.
        names: for each group, the first layer that writes it.
        num_widths: d, the length of a configuration.
        kept: of a network that `slimmable` made: the layers that keep their width, and why.
        front: of a network that `load` returned, {"flops": (k,), ..., "top1": (k,), "widths": (k, d)}, by rising cost.
        statistics: of one, too: BatchNorm's for each row of the front (k, s), as `get_statistics` has them.
        data: of one, too: {"classes": names, "mean": ..., "std": ...} of the images.
        latency_table: what `fit_latency` found (d + 1, d + 1): see `_weight_tables`.
    Raises ValueError, with the layer's name, where costs cannot be told from the layers: see `_require_wiring`.
    """

    front = statistics = data = latency_table = kept = whole = None

    def __init__(self, layers: "OrderedDict[str, nn.Module] | nn.Module", image: tuple[int, int, int], divisor: int = 1):
        super().__init__(OrderedDict() if isinstance(layers, nn.Module) else layers)
        self.image, self.divisor = image, divisor
        if isinstance(layers, nn.Module):
            shared = "_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"  # one set of them, two that hold it
            vars(self).update({name: vars(layers)[name] for name in shared}, whole=layers, training=layers.training)
        names = {}
        for name, m in self.named_modules():
            if isinstance(m, LAYERS) and not m.writes.fixed:
                names.setdefault(m.writes, name)
        self.groups, self.names = list(names), list(names.values())
        self.num_widths = len(self.groups)
        self._max = torch.tensor([g.max for g in self.groups], dtype=torch.float64)
        self._step = torch.tensor([math.lcm(g.step, divisor) for g in self.groups], dtype=torch.float64)
        trace = _Trace(self, image)
        self._flops, self._params, self._terms = _weight_tables(self, trace)
        _require_wiring(self, image, trace)
        self._live = _activation_table(self, trace)

    def forward(self, x):
        if self.whole is None:
            return super().forward(x)
        self.whole.training = self.training
        return self.whole(x)

    def train(self, mode: bool = True):
        if self.whole is None:
            return super().train(mode)
        self.training = mode
        self.whole.train(mode)  # which may know better: of BatchNorm that is never to train, say
        return self

    def set_widths(self, a: Tensor | float) -> None:
        """Run at configuration `a` (d,) in (0, 1]^d from now on; a float sets every group alike.

        Group i keeps its first divisor * round(a_i * max_i / divisor) channels, at least `divisor`; all of them at a_i = 1.
        (Where a grouped convolution needs a multiple of its parts' channels, of that and of `divisor`.)
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
        most, n = self._max.to(a.device), self._step.to(a.device)
        return torch.where(a == 1, most, (c / n).round().clamp(min=1).mul(n).minimum(most))

    def flops(self, a: Tensor | float, relaxed: bool = False) -> Tensor:
        """Multiply-accumulates of convolutions and matrix products for one image: a (..., d) -> (...,).

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

    def extract(self, a: Tensor | float | None = None) -> nn.Module:
        """A plain network (nn.Conv2d, nn.BatchNorm2d, nn.Linear) with copies of the weights used at `a`: nn.Sequential, or
        of the class that `slimmable` was given; the names of its weights are the same.

        None means the widths now set, which this call leaves as they were. The memory format is kept.
        Running statistics come along; they fit only the configuration that BatchNorm was last calibrated for.
        """
        before, mode = [g.active for g in self.groups], self.training
        try:
            if a is not None:
                self.set_widths(a)
            plain = {id(m): _plain(m) for m in self.modules() if isinstance(m, LAYERS)}
            # deepcopy takes a module that its memo knows from there: every layer becomes its plain twin. (Here, since
            # a module of your own may hold a group, and is copied with the width it has now.)
            if self.whole is None:
                return nn.Sequential(OrderedDict((k, copy.deepcopy(m, plain)) for k, m in self.named_children())).train(mode)
            net = copy.deepcopy(self.whole, plain)
            for m in net.modules():
                if isinstance(m, _BatchNorm):
                    m.momentum = vars(m).pop("theirs", m.momentum)
            return net
        finally:
            for g, n in zip(self.groups, before):
                g.active = n

    def use(self, **budget: float) -> dict[str, float]:
        """Runs from now on at the front's best configuration within a budget, in eval mode: use(flops=0.5).

        One of flops, params, memory (bytes) and, where it was measured, latency (ms): a ratio to the full network's,
        or, above 1, the cost itself (so a latency below 1 ms can be given as a ratio only). BatchNorm's statistics
        come along: no images are needed. Returns that configuration's row of front.csv, but for its widths. Raises
        ValueError without a front, and for a budget that none fits into.
        """
        if len(budget) != 1:
            raise ValueError("use: name one budget, as in use(flops=0.5)")
        ((name, limit),) = budget.items()
        if name not in COSTS or name not in (self.front or {}):
            raise ValueError(f"use: no front with a {name} to choose from; models.load() what a run has written")
        cost = self.front[name]
        fits = (cost <= (limit if limit > 1 else limit * cost.max()) * (1 + 1e-9)).nonzero()
        if not len(fits):
            raise ValueError(f"{name}: nothing fits into {limit:g}; the smallest needs {cost.min():g}, "
                             f"{cost.min() / cost.max():.4f} of the full network")  # fmt: skip
        best = int(fits[-1])  # of rising cost, and so of falling loss on held-out images
        self.set_widths(self.front["widths"][best])
        set_statistics(self, self.statistics[best])
        self.eval()
        return {k: v[best].item() for k, v in self.front.items() if k != "widths"}


def _mixes(layer):
    """Whether each of the layer's outputs is a sum over the channels it reads."""
    return isinstance(layer, (Conv2d, Linear)) and getattr(layer, "groups", 1) == 1


def _plain(layer):
    plain, state = layer.plain(), layer.state_dict()
    own = {k: v for k, v in vars(layer).items() if k not in vars(plain) and k not in ("reads", "writes", "theirs")}
    vars(plain).update(copy.deepcopy(own), training=layer.training)  # `own`: what a forward pass may look for
    for name, t in state.items():
        if t.ndim:
            t = used_channels(t, layer.writes, 0)
            state[name] = used_channels(t, layer.reads, 1) if t.ndim > 1 and _mixes(layer) else t
            plain.to(t.device, t.dtype if t.is_floating_point() else None)
    plain.load_state_dict({k: state[k][tuple(map(slice, v.shape))] for k, v in plain.state_dict().items()})
    for name, p in layer.named_parameters():
        plain.get_parameter(name).requires_grad_(p.requires_grad)
    if any(p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last) for p in layer.parameters()):
        plain.to(memory_format=torch.channels_last)
    return plain


# ------------------------------------------------------------------------------ how groups are found


def slimmable(net: nn.Module, image: tuple[int, int, int], divisor: int = 1, fixed: tuple[str, ...] = ()) -> Slimmable:
    """A slimmable copy of an ordinary network, which at full width computes what `net` does.

    The copy's convolutions, BatchNorms and Linears are replaced by this file's, which keep the weights and read and write
    the groups that `_Watch` found. What it cannot slim keeps its width: the result's `kept` says for each such layer why.

    Args:
        image: (channels, height, width) of one input.
        fixed: names of modules whose outputs are to keep their channels.
    Raises ValueError, with a layer's name, for a network that does not run on the meta device (since it looks at values,
    say), that calls a BatchNorm twice, or that does not run at other widths (since a number of channels is written into
    its forward pass): then name that layer in `fixed`.
    """
    net = copy.deepcopy(net)
    unknown = {*fixed} - {name for name, _ in net.named_modules()}
    if unknown:
        raise ValueError(f"fixed: the network has no module {sorted(unknown)[0]!r}")
    watch = _Watch(net, image, fixed)
    for m, (reads, writes) in watch.layers.items():
        if isinstance(m, nn.BatchNorm2d) or not all(g.fixed for c in (reads, writes) for g in parts_of(c)):
            m.__class__ = watch.TWINS[type(m)]  # its weights and all its settings stay
            m.reads, m.writes = reads, writes
    for m in net.modules():
        if isinstance(m, _BatchNorm):
            m.theirs, m.momentum = m.momentum, 0.0
    out = Slimmable(net, image, divisor)
    out.kept = watch.kept
    return out


class _Watch(TorchDispatchMode):
    """Which groups do an ordinary network's layers read and write? Seen in a forward pass on the meta device.

    A convolution writes a new group. Tensors carry it on: through BatchNorm, activation functions, pooling. Where two
    tensors are added or multiplied, each channel of one meets the same channel of the other: one of their groups becomes
    the other. What reads concatenated tensors reads a `Concatenation`.

        x = conv1(image)                          a new group, a
        y = conv3(relu(bn2(conv2(x))))            conv2 reads a and writes b; bn2 reads and writes b; conv3 b, c
        z = x + y                                 c becomes a: conv3 writes a
        conv4(torch.cat([z, conv2(z)], 1))        conv4 reads (a, b), and writes d

    Any other operation fixes what it reads, with the reason: a softmax, a shuffle, a scale of each channel's own. So do
    the network's outputs. A second pass sees what happens in training alone.

    layers: of each layer what it reads and writes.
    kept: of each layer that keeps its width, by its name, the reason.
    """

    TWINS = {nn.Conv2d: Conv2d, nn.BatchNorm2d: BatchNorm2d, nn.Linear: Linear}
    # From value to value, as are those that torch tags so; or of values that do not count.
    POINTWISE = {"hardswish", "hardswish_", "mish_", "_prelu_kernel", "expand", "copy_", "detach", "alias", "_to_copy",
                 "native_dropout", "bernoulli_", "fill_", "zero_", "empty_like", "zeros_like", "ones_like", "full_like",
                 "rand_like", "randn_like", "masked_fill", "masked_fill_", "where"}  # fmt: skip
    SPATIAL = {"max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "reflection_pad2d",
               "replication_pad2d", "upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d",
               "upsample_bicubic2d", "new_empty"}  # fmt: skip
    ALONG = {"slice", "select", "squeeze", "unsqueeze"}  # the dimensions that are their second argument
    REDUCE = {"mean", "sum", "amax", "amin", "max", "min"}
    VIEW = {"view", "_unsafe_view", "_reshape_alias"}

    def __init__(self, net, image, fixed):
        super().__init__()
        self.named, self.layers, self.became, self.carried, self.alive, self.bare = fixed, {}, {}, {}, [], {}
        owners = Counter(_storage(t) for m in net.modules() for t in _own(m))
        self.usual = {m for m in net.modules() if self.is_usual(m) and all(owners[_storage(t)] == 1 for t in _own(m))}
        self.called, self.modules = set(), dict(net.named_modules())
        for self.training in (False, True):
            self.inside, self.stack, self.name = None, [], "the image"
            try:  # two images: BatchNorm in training needs them, and no dimension is a batch's of one
                out = _run_on_meta(net, self, torch.empty(2, *image, device="meta"), self.training)
            except ValueError:
                if not self.training:
                    raise
                break  # it takes labels then, say: what was seen in eval() must do
            for t in tree_leaves(out):
                if isinstance(t, Tensor):
                    self.fix("is an output of the network", t)
                elif not isinstance(t, (int, float, str, type(None))):
                    self.fix(f"may be in the network's output, a {type(t).__name__}", *self.alive)
        for m, why in self.bare.items():
            self.fix(why, *self.layers.get(m, ()))
        for c in [c for pair in self.layers.values() for c in pair]:
            for g in self.now(c).parts:
                g.fixed = g.fixed or g.step == g.max and "has channels that come and go together only"
        once = {}  # what has the same parts is to be the same
        for m, pair in self.layers.items():
            pair = [once.setdefault((c.parts, c.each), c) for c in map(self.now, pair)]
            self.layers[m] = tuple(c.parts[0] if len(c.parts) == c.each == 1 else c for c in pair)
        self.kept = dict(self.keeping())

    def keeping(self):
        for name, m in self.modules.items():
            reasons = [g.fixed for g in parts_of(self.layers[m][1])] if m in self.layers else [self.bare.get(m)]
            if m in self.layers and (isinstance(m, nn.BatchNorm2d) or not all(reasons)):
                continue
            if isinstance(m, (_ConvNd, nn.Linear)) or any(p.numel() > 1 for p in m.parameters(recurse=False)):
                yield name, reasons[0] or (f"is a {type(m).__name__}, or has hooks, or shares its weights"
                                           if m in self.called else "is not called")  # fmt: skip

    def is_usual(self, m):
        """Whether the layer is torch's own and nothing hangs on it: no subclass, no hook, no forward pass of its own."""
        hung = [k for k, v in vars(m).items() if k.endswith("_hooks") and v or k == "forward"]
        return type(m) in self.TWINS and not hung and not m._modules and m._parameters.keys() <= {"weight", "bias"}

    def now(self, c):
        """The Concatenation with, for each part, the group that it has become."""
        parts = []
        for g in c.parts:
            while g in self.became:
                g = self.became[g]
            parts.append(g)
        return Concatenation(*parts, each=c.each)

    def carry(self, t, c):
        self.carried[id(t)] = c
        self.alive.append(t)  # so that no id comes twice

    def channels(self, t):
        """What the tensor carries, now; a fixed group, where no layer wrote it."""
        c = self.carried.get(id(t))
        if c and c.max == t.shape[1]:
            return self.now(c)
        self.fix("changes its shape", t)
        return Concatenation(WidthGroup(t.shape[1], "meets what no layer wrote"))

    def fix(self, why, *those):
        """Of tensors or of Concatenations, the groups."""
        for c in [c if isinstance(c, Concatenation) else self.carried.get(id(c)) for c in those]:
            for g in self.now(c).parts if c else ():
                g.fixed = g.fixed or why

    def unite(self, a, b, why):
        """Each channel of a meets the same one of b: their groups become one, and fixed ones where they do not pair."""
        if [g.max for g in a.parts] != [g.max for g in b.parts] or a.each != b.each:
            return self.fix(f"{why}, beside other groups", a, b)
        for i in range(len(a.parts)):
            one, two = self.now(a).parts[i], self.now(b).parts[i]
            if one is not two:
                self.became[two] = one
                one.fixed, one.step = one.fixed or two.fixed, math.lcm(one.step, two.step)

    def enter(self, name, m, args, kwargs):
        self.name = name
        self.stack.append(name)
        self.called.add(m)
        if m in self.usual:
            self.inside = m  # its operations are not looked at

    def leave(self, name, m, args, kwargs, out):
        self.stack.pop()
        if self.inside is m:
            self.inside = None
            if out is not None:  # it is, after an error
                self.layer(name, m, (*args, *kwargs.values())[0], out)
        if name in self.named:
            self.fix("is named in `fixed`", *tree_leaves(out))

    def layer(self, name, m, x, out):
        """A layer has made `out` of x."""
        known, why = self.layers.get(m), None
        if self.training and not known:
            why = "is called in training alone"
        elif out.ndim != (2 if isinstance(m, nn.Linear) else 4):
            why = f"is called with {x.ndim} dimensions"
        else:
            reads = writes = self.channels(x)
            if getattr(m, "groups", 1) > 1:
                if m.in_channels != m.out_channels or not in_steps(reads, m.in_channels // m.groups):
                    why = "is a grouped convolution whose parts fall apart"
            elif not isinstance(m, nn.BatchNorm2d):
                writes = known[1] if known else Concatenation(WidthGroup(out.shape[1]))
        if why:
            self.bare[m] = why
            return self.fix(f"goes into {name}, which {why}", x)
        if known:
            self.unite(known[0], reads, f"goes into {name} again")
        self.layers[m] = reads, writes
        self.carry(out, writes)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        args, kwargs, read = _on_meta(args, kwargs or {})
        out = op(*args, **kwargs)
        if self.inside:
            return out
        name, made = op._schema.name.removeprefix("aten::"), [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        where = f"{name} in {self.stack[-1] or 'the network'}" if self.stack else name
        for t in read:
            owner = self.modules.get(self.weights.get(_storage(t)))
            if owner in self.usual:
                self.bare[owner] = f"has weights that go into {where}, too"
        carried = [t for t in read if id(t) in self.carried]
        if carried:
            c = self.follow(op, name, args, read, carried, made, where)
            if c is None:
                self.fix(f"goes into {where}", *carried)
            elif c:
                for t in made:
                    self.carry(t, c)
        return out

    def follow(self, op, name, args, read, carried, made, where):
        """What all tensors that an operation made carry: a Concatenation, or () for nothing. None: not known."""
        x, y = carried[0], (made or [None])[0]
        if y is None or x.ndim < 2 or any(not self.carried[id(t)].each for t in carried):
            return None
        c, dims = self.channels(x), args[1] if len(args) > 1 else []
        if name == "cat" and dims in (1, 1 - y.ndim):
            parts = [self.channels(t) for t in read if t.numel()]
            return Concatenation(*parts, each=c.each) if {part.each for part in parts} == {c.each} else None
        if torch.Tag.pointwise in op.tags or name in self.POINTWISE or name == "cat":
            meet = [t for t in read if t.ndim >= y.ndim - 1 and t.shape[t.ndim - y.ndim + 1] == y.shape[1]]  # not broadcast
            if any(t.ndim != y.ndim for t in carried) or not meet:
                return None
            c, *others = [self.channels(t.expand(y.shape) if t.ndim < y.ndim else t) for t in meet]
            for other in others:
                self.unite(c, other, f"goes into {where}")
            return c
        if name in self.VIEW:  # of a channel's values, which lie side by side, some more or fewer become entries
            entries = c.each * y.shape[1] if y.ndim > 1 and len(y) == len(x) else 1
            return Concatenation(*c.parts, each=entries // x.shape[1]) if entries % x.shape[1] == 0 else None
        if name == "constant_pad_nd":
            known = not any(dims[2 * (x.ndim - 2) :])
        else:
            ndim = x.ndim + (name == "unsqueeze")
            dims = [d % ndim for d in ([dims] if isinstance(dims, int) else dims or range(ndim) if name in self.REDUCE else [])]
            known = name in self.SPATIAL and x.ndim == 4 or name in {*self.ALONG, *self.REDUCE} and min(dims, default=0) > 1
            if name in self.REDUCE and 1 in dims:  # of all channels something: of no group's width
                for t in made[1:]:
                    self.carry(t, Concatenation(*c.parts, each=0))  # where, among the channels: nothing may follow
                return ()
        return c if (known or name == "slice" and y.shape == x.shape) and y.shape[:2] == x.shape[:2] else None


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
    """Sets what `get_statistics` gave."""
    buffers = [t for m in _norms(net) for t in (m.running_mean, m.running_var)]
    for t, part in zip(buffers, vector.to(buffers[0]).split([len(t) for t in buffers])):
        t.copy_(part)


def load(path: str, device: torch.device | str = "cpu") -> Slimmable:
    """The network of a front.pt, with its front: see `Slimmable.use`. In eval mode, at full width.

    `net.data` holds the names of the classes, and mean and deviation of the images: they are to be
    (image / 255 - mean) / std. Runs nothing that is in the file. Raises ValueError for another file of torch's.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not {"network", "model", "front"} <= state.keys():
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
    training. A channel's importance is the sum of the absolute weights that read it; where channels come and go by a
    grouped convolution's parts, so do they here. Groups that a parameter-free shortcut joins stay as they are: their
    channels must go on meeting.
    """
    layers = [m for m in net.modules() if isinstance(m, LAYERS)]
    joined = {g for m in layers if isinstance(m, Shortcut) for g in (m.reads, m.writes)}
    for group in net.groups:
        readers = [m for m in layers if _mixes(m) and group in parts_of(m.reads)]
        if group in joined or not readers:
            continue
        read = [(m.reads, m.weight.detach().abs().transpose(0, 1).flatten(1).sum(1)) for m in readers]
        weight = sum(part.sum(1) for channels, t in read for part in _entries(t, channels, group))
        order = weight.view(-1, group.step).sum(1).argsort(descending=True)
        order = torch.arange(group.max, device=order.device).view(-1, group.step)[order].flatten()
        with torch.no_grad():
            for m in readers:
                m.weight.copy_(m.weight[:, _sorted(m.reads, group, order)])
            for m in layers:
                for t in m.state_dict().values() if group in parts_of(m.writes) else ():
                    if t.ndim:
                        t.copy_(t[_sorted(m.writes, group, order)])


def _entries(t, channels, group):
    """Views (group.max, each) of those of t (channels.max,) that are the group's: none, or several in a concatenation."""
    each, parts = getattr(channels, "each", 1), parts_of(channels)
    return [one.view(-1, each) for one, g in zip(t.split([g.max * each for g in parts]), parts) if g is group]


def _sorted(channels, group, order):
    """The index (channels.max,) that puts the group's channels into the order, and leaves the others where they are."""
    index = torch.arange(channels.max, device=order.device)
    for entries in _entries(index, channels, group):
        entries.copy_(entries[order])
    return index


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


def _own(m):
    return [t for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]


def _storage(t):
    return t.untyped_storage()._cdata


def _on_meta(args, kwargs):
    """An operation's arguments, all on the meta device if one of them is; their tensors."""
    read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if len({t.is_meta for t in read}) > 1:
        args, kwargs = tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, (args, kwargs))
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    return args, kwargs, read


def _run_on_meta(net, mode, x, training=False):
    """The network's outputs on the meta device, where no arithmetic is done, seen by the mode, whose `enter` and `leave` see
    every module's call. `mode.weights`: of each weight's storage the module that it belongs to."""
    state = {k: v.to("meta") for k, v in (*net.named_parameters(), *net.named_buffers())}
    mode.weights = {_storage(t): k.rpartition(".")[0] for k, t in state.items()}
    modules, hooks = [(m, m.training) for m in net.modules()], []
    try:
        for name, m in net.named_modules():
            m.training = training
            hooks.append(m.register_forward_pre_hook(functools.partial(mode.enter, name), with_kwargs=True))
            hooks.append(m.register_forward_hook(functools.partial(mode.leave, name), with_kwargs=True, always_call=True))
        with torch.no_grad(), mode:
            return torch.func.functional_call(net, state, x)
    except Exception as e:  # a network of the reader's own may raise anything
        raise ValueError(f"after {mode.name}: {e}") from e
    finally:
        for hook in hooks:
            hook.remove()
        for m, was in modules:
            m.training = was


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
        self.calls, self.seen, self.lives, self.operations, self.name, self.macs = [], [], {}, 0, "the image", 0
        self.times, self.net = Counter(), net
        x = torch.empty(1, *image, device="meta")
        self.meet(x, WidthGroup(image[0], fixed=True))
        _run_on_meta(net, self, x)
        self.lives = list(self.lives.values())

    def enter(self, name, layer, args, kwargs):
        self.times[layer] += 1
        if not isinstance(layer, LAYERS):
            return
        x, reads = (*args, *kwargs.values())[0], layer.reads
        axis = x.ndim - 1 if isinstance(layer, Linear) else 1
        if not isinstance(layer, Linear) and x.ndim != 4 or x.shape[axis:axis + 1] != (reads.active,):
            raise ValueError(f"{name}: reads a group of which {reads.active} channels are in use, "
                             f"got an input of shape {tuple(x.shape)}")  # fmt: skip
        carried = self.lives[_storage(x)][0]
        if isinstance(carried, Concatenation) and carried.active == carried.max:  # at other widths it is a guess
            (n, places), (m, expected) = _places(carried), _places(reads)
            if n == m and places != expected:
                raise ValueError(f"{name}: reads something else than the Concatenation of groups that it gets")
        self.name = name

    def leave(self, name, layer, args, kwargs, out):
        if isinstance(layer, LAYERS) and out is not None:
            x = (*args, *kwargs.values())[0]
            self.calls.append((name, layer, out.numel() // layer.writes.active, x.numel() // layer.reads.active))
            self.lives[_storage(out)][0] = layer.writes

    def meet(self, t, group):
        life = self.lives.setdefault(_storage(t), [group, t.numel(), self.operations, self.operations, self.name])
        life[3] = self.operations

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        args, kwargs, read = _on_meta(args, kwargs or {})
        if op._schema.name.endswith("_") and len(read) == 1 and torch.Tag.pointwise in op.tags:
            out = args[0]  # an activation function in place: on the meta device there is nothing to do, but slowly
        else:
            out = op(*args, **kwargs)
        if op._overloadpacket in flop_registry:
            self.macs += flop_registry[op._overloadpacket](*args, **kwargs, out_val=out) // 2
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if read and all(_storage(t) in self.weights for t in read):
            self.weights |= {_storage(t): "" for t in made}  # a cut weight is one
        # Statistics are vectors and pooling's indices integers: neither is an activation.
        activations = [t for t in read + made if t.ndim > 1 and t.is_floating_point() and _storage(t) not in self.weights]
        carried = [(self.lives.get(_storage(t), [None])[0], t.shape[1]) for t in activations if t not in set(made)]
        if op is torch.ops.aten.cat.default and (args[1:] or (0,))[0] == 1:  # what carries no group's width has a constant one
            carries = Concatenation(*(g if g and g.active == n else WidthGroup(n, fixed=True) for g, n in carried))
        else:
            carries = carried[0][0] if carried else None
        for t in activations:  # an output has its input's channels (a pooling's, say), unless a layer knows better
            self.meet(t, carries)
        self.seen += read + made  # kept alive, so that no storage's address comes twice
        self.operations += 1
        return out


def _places(channels):
    """How many channels there are, without what each is made of; and where among them those of slimmed groups begin."""
    parts = parts_of(channels)
    starts = itertools.accumulate((g.max for g in parts), initial=0)
    return sum(g.max for g in parts), [(start, g) for start, g in zip(starts, parts) if not g.fixed]


def _count(net, group):
    """The group's channels as a vector v: v' (c, 1). Fixed ones are a multiple of the 1, a concatenation its parts' sum."""
    v = torch.zeros(net.num_widths + 1, dtype=torch.float64)
    for g in parts_of(group) if group else [None]:
        place, factor = (net.groups.index(g), 1) if g in net.groups else (net.num_widths, g.max if g else 1)
        v[place] += factor * getattr(group, "each", 1)
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
        read, written = _count(net, layer.reads), _count(net, layer.writes)
        kind = type(layer), getattr(layer, "kernel_size", 1), getattr(layer, "stride", 1), _mixes(layer), pixels
        for p in layer.parameters(recurse=False):
            matrix = p.ndim > 1  # a vector's size, like a grouped convolution's kernels', goes with one group only
            size = torch.outer(read if matrix and _mixes(layer) else one, written)
            if matrix:
                size *= p[0, 0].numel() if _mixes(layer) else p[0].numel()
            if layer not in known:
                params += size
            if matrix:
                flops += size * pixels
                for what, value in (("flops", size * pixels), ("reads", torch.outer(one, read) * pixels_read),
                                    ("writes", torch.outer(one, written) * pixels)):  # fmt: skip
                    terms[what, kind] = terms.get((what, kind), 0) + value
        known.add(layer)
    full = _with_one(net._max)
    others = {p for m in net.modules() if not isinstance(m, LAYERS) for p in m.parameters(recurse=False)}
    params[-1, -1] += sum(p.numel() for p in others)  # of no group: constants, as are
    flops[-1, -1] += trace.macs - full @ flops @ full  # the products that no layer of ours makes
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

    Configurations are tried in which groups differ: what only fits at full width (two tensors concatenated and read as
    one group, two groups added) fits at none of them.
    """
    for name, m in net.named_modules():
        n = full.times[m]
        if isinstance(m, LAYERS) and not n or isinstance(m, _BatchNorm) and n > 1 and m.running_mean is not None:
            raise ValueError(f"{name}: called {n} times; a BatchNorm's statistics belong to one place, "
                             "and the costs of what is not called are unknown")  # fmt: skip
    # For each activation, the groups with which its size goes; None: with no group's.
    fits = [{None, life[0], *net.groups} for life in full.lives]
    try:
        for counts in _configurations(net):
            for group, n in zip(net.groups, counts.tolist()):
                group.active = n
            trace = _Trace(net, image)
            lives, c = trace.lives, _with_one(counts.double())
            if len(lives) != len(full.lives):
                raise ValueError("another number of activations at other widths: the network must do the same at all")
            for carries, (_, most, *_, name), (_, numel, *_) in zip(fits, full.lives, lives):
                carries &= {g for g in carries if numel * (g.max if g else 1) == most * (g.active if g else 1)}
                if not carries:
                    raise ValueError(f"after {name}: a tensor whose size goes with the width of no group")
            if trace.macs != c @ net._flops @ c:
                raise ValueError("FLOPs that go with the width of no group: a product that no layer of this file makes")
    finally:
        for group in net.groups:
            group.active = group.max
    for life, carries in zip(full.lives, fits):
        if life[0] not in carries:  # a map that is the mean over channels, say
            life[0] = next(g for g in (None, *net.groups) if g in carries)


def _configurations(net):
    """Random channel counts (d,): as many as it takes until every two groups have differed in their share of channels.

    With more than one channel each, or both ways round: one alone would be broadcast, and seem to fit.
    """
    most, step = (torch.tensor([getattr(g, k) for g in net.groups], dtype=torch.int64) for k in ("max", "step"))
    steps, g, tried = most // step, torch.Generator().manual_seed(0), 0
    whole = steps == 1  # such a group has no other width
    larger = torch.zeros(len(most), len(most), dtype=torch.bool)
    told = whole[:, None] | whole | torch.eye(len(most), dtype=torch.bool)
    narrow = whole.clone()
    while len(most) and (tried < 2 or not (told.all() and narrow.all())):
        counts = step * (1 + (torch.rand(len(most), generator=g) * steps).long())
        ratio, several = counts / most, counts > 1
        larger |= ratio[:, None] > ratio
        told |= larger & larger.T | (ratio[:, None] != ratio) & several[:, None] & several
        narrow |= counts < most
        tried += 1
        yield counts
