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

The whole idea is the `WidthGroup`: tensors that are added share one, a layer is told which group it reads and which it
writes, and choosing widths is setting each group's `active` once. Forward passes read like the ordinary networks'; costs are
found by watching one forward pass. So are, by `slimmable`, the groups of an ordinary network. To give them yourself, write
the network with this file's `Conv2d`, `BatchNorm2d` and `Linear`, as ResNet and MobileNetV2 are written below, and wrap it:
`Slimmable(MyNet(), image=(3, 32, 32))`.

In order: layers; `Slimmable`; how groups are found; ResNet and MobileNetV2; the deployable file; pretrained weights;
latency; cost tables. This file needs torch alone.
"""

import copy
import functools
import io
import itertools
import math
import time
import zipfile
from collections import Counter, OrderedDict, defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # BatchNorm, and InstanceNorm, which may have statistics, too
from torch.nn.modules.utils import _pair
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

# ------------------------------------------------------------------------------ slimmable layers


class WidthGroup:
    """Channels that must agree. `max` exist, the first `active` of them are in use, a multiple of `step`.

    A `fixed` group (image channels, MobileNetV2's last 1280; `slimmable` has the reason as a string) is never slimmed and takes no
    place in the width vector. Raises ValueError for max below 1.
    """

    parts, each = property(lambda self: (self,)), 1  # as a Concatenation has them

    def __init__(self, max: int, fixed: bool | str = False, step: int = 1):
        if max < 1:
            raise ValueError(f"max must be at least 1, got {max}")
        self.max = self.active = max
        self.fixed, self.step = fixed, step


class Concatenation:
    """What a layer reads where tensors of several groups are concatenated, in this order, along the channels.

    each: how many inputs a channel becomes where maps were flattened: height * width; else 1.
    Raises ValueError for a concatenation among the parts that was flattened to another number.
    """

    fixed = True  # its width is its parts'
    max = property(lambda self: self.each * sum(g.max for g in self.parts))
    active = property(lambda self: self.each * sum(g.active for g in self.parts))

    def __init__(self, *parts: "WidthGroup | Concatenation", each: int = 1):
        if any(part.each not in (1, each) for part in parts):
            raise ValueError(f"parts: one was flattened, but not to {each} inputs a channel")
        self.parts, self.each = tuple(g for part in parts for g in part.parts), each


def views(t: Tensor, channels: WidthGroup | Concatenation, dim: int = 0) -> list[tuple[WidthGroup, Tensor]]:
    """Each part with its slice of dimension `dim`, in which every part has its full width."""
    return list(zip(channels.parts, t.split([channels.each * g.max for g in channels.parts], dim)))


def cut(t: Tensor, channels: WidthGroup | Concatenation, dim: int = 0) -> list[Tensor]:
    """Views of what is in use of each part."""
    return [part.narrow(dim, 0, channels.each * g.active) for g, part in views(t, channels, dim)]


def in_steps(channels: WidthGroup | Concatenation, step: int) -> bool:
    """Lets the channels of every part come and go `step` at a time; False where they cannot."""
    if step > 1 and (channels.each > 1 or any(g.max % step for g in channels.parts)):
        return False
    for g in channels.parts:
        g.step = math.lcm(g.step, step)
    return True


def used(t: Tensor | None, writes: WidthGroup | Concatenation, reads: WidthGroup | Concatenation | None = None):
    """What is in use of a layer's vector or weight, (writes.max, ...); (writes.max, reads.max, ...) where `reads` is given.

    Of a concatenation what is not used is cut out of each part, as it is missing from the input.
    """
    if t is None:
        return None
    both = [writes, reads] if reads else [writes]
    for dim, channels in enumerate(both):
        if isinstance(channels, Concatenation) and t.shape[dim] != channels.active:
            t = torch.cat(cut(t, channels, dim), dim)
    return first_channels(t, *(channels.active for channels in both))


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


def _in_use(channels):
    """A layer's size, as a forward pass may ask for it: of what is in use, as in what is extracted."""
    return property(lambda self: getattr(self, channels).active, lambda self, full: None)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` from the group it reads to the one it writes. A grouped convolution (depthwise: of one channel a part)
    writes the group it reads, whose channels then come and go by whole parts.

    Padded by dilation * (kernel_size // 2), and without a bias, unless asked: BatchNorm, which mostly follows, has one.
    """

    def __init__(self, reads, writes, kernel_size, stride=1, *, depthwise=False, bias=False, padding=None, dilation=1,
                 groups=1, padding_mode="zeros"):  # fmt: skip
        groups = writes.max if depthwise else groups
        if padding is None:
            padding = tuple(d * (k // 2) for k, d in zip(_pair(kernel_size), _pair(dilation)))
        if groups > 1 and not (reads is writes and writes.max % groups == 0 and in_steps(writes, writes.max // groups)):
            raise ValueError("depthwise, groups: such a convolution writes the group that it reads, by whole parts")
        super().__init__(reads.max, writes.max, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        self.reads, self.writes = reads, writes

    in_channels, out_channels = _in_use("reads"), _in_use("writes")
    depthwise = property(lambda self: self.groups > 1)  # or of some channels a part: writes the group that it reads
    mixes = property(lambda self: self.groups == 1)  # each output is a sum over all channels that it reads
    groups_in_use = property(lambda self: self.groups if self.mixes else self.groups * self.writes.active // self.writes.max)

    def forward(self, input):
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, self.padding_mode), 0
        weight, bias = used(self.weight, self.writes, self.reads if self.mixes else None), used(self.bias, self.writes)
        return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups_in_use)

    def plain(self):
        sizes = {"in_channels": self.reads.active, "out_channels": self.writes.active, "groups": self.groups_in_use}
        return nn.Conv2d, sizes


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` of a group, with momentum 0: training leaves running statistics alone.

    They mean nothing while widths change, and at first they are 0 and 1: a network that was only trained gives nonsense
    in eval(). Calibration sets them for one configuration at a time, before eval() or extract(): in train(), under no_grad,
    the k-th batch (from 1) runs with momentum 1 / k; then it is 0 again (`joslim.calibrate_bn`).
    """

    mixes, num_features = False, _in_use("writes")

    def __init__(self, group):
        super().__init__(group.max)
        self.theirs, self.momentum = self.momentum, 0.0  # of what is extracted; here none, unless calibrating
        self.reads = self.writes = group

    def forward(self, input):
        mean = var = None
        if self.momentum or not self.training:
            mean, var = used(self.running_mean, self.writes), used(self.running_var, self.writes)
        training = self.training or mean is None
        weight, bias = used(self.weight, self.writes), used(self.bias, self.writes)
        out = F.batch_norm(input, mean, var, weight, bias, training, self.momentum, self.eps)
        if self.training and mean is not None and isinstance(self.writes, Concatenation):  # of which mean and var are copies
            for stat, new in ((self.running_mean, mean), (self.running_var, var)):
                parts = cut(stat, self.writes)
                torch._foreach_copy_(parts, new.split([len(part) for part in parts]))
        return out

    def plain(self):
        return nn.BatchNorm2d, {"num_features": self.writes.active}


class Linear(nn.Linear):
    """`nn.Linear` from a group to another, or to a number of outputs, which are never slimmed."""

    mixes, in_features, out_features = True, _in_use("reads"), _in_use("writes")

    def __init__(self, reads, writes, bias=True):
        writes = WidthGroup(writes, fixed=True) if isinstance(writes, int) else writes
        super().__init__(reads.max, writes.max, bias)
        self.reads, self.writes = reads, writes

    def forward(self, input):
        return F.linear(input, used(self.weight, self.writes, self.reads), used(self.bias, self.writes))

    def plain(self):
        return nn.Linear, {"in_features": self.reads.active, "out_features": self.writes.active}


class PlainShortcut(nn.Module):
    """Every stride-th pixel, and `more` channels of zeros after the last; where it is negative, so many fewer channels."""

    def forward(self, x):
        return F.pad(x[:, :, :: self.stride, :: self.stride], [0, 0, 0, 0, 0, self.more])


class Shortcut(PlainShortcut):
    """ResNet's parameter-free shortcut between stages (He et al. 2016, option A): channel i goes to channel i.

    As far as both groups have channels: layer-wise widths can leave the later stage the narrower one.
    """

    mixes = False
    more = property(lambda self: self.writes.active - self.reads.active)

    def __init__(self, reads, writes, stride):
        super().__init__()
        self.reads, self.writes, self.stride = reads, writes, stride

    def plain(self):
        return PlainShortcut, {"more": self.more}


LAYERS = Conv2d, BatchNorm2d, Linear, Shortcut
COSTS = "flops", "params", "memory", "latency"

# ------------------------------------------------------------------------------ the slimmable network


class Slimmable(nn.Module):
    """A network whose layers read and write width groups.

    Args:
        layers: one module, whose children and parameters become this network's own, by the same names, and whose forward
            pass it runs; or named children, run one after another.
        image: (channels, height, width) of one input, for the costs.
        divisor: channel counts are multiples of it, except the full network's; multiples of 8 are faster on most processors.

    Attributes:
        groups: the width groups that are slimmed, in the order of `named_modules()`; a[i] sets `groups[i]`.
        names: for each group, the first layer that writes it.
        num_widths: d, the length of a configuration.
        kept: of a network that `slimmable` made: by name, the layers that keep their width, and why.
        whole: the module, in which no name stands for anything else.
        front: of a network that `load` returned, {"flops": (k,), ..., "top1": (k,), "widths": (k, d)}, by rising cost.
        statistics: of one, too: BatchNorm's for each row of the front (k, s), as `get_statistics` has them.
        data: of one, too: {"classes": names, "mean": ..., "std": ...} of the images.
        latency_table: what `fit_latency` found (d + 1, d + 1): see `_weight_tables`.
    Raises ValueError, with the layer's name, where costs cannot be told from the layers: see `_require_wiring`.
    """

    front = statistics = data = latency_table = kept = _max = _step = _flops = _params = _terms = _live = None

    def __init__(self, layers: "OrderedDict[str, nn.Module] | nn.Module", image: tuple[int, int, int], divisor: int = 1):
        super().__init__()
        whole = layers if isinstance(layers, nn.Module) else nn.Sequential(layers)
        if taken := [name for name in (*whole._parameters, *whole._buffers) if hasattr(Slimmable, name)]:
            raise ValueError(f"{taken[0]}: a slimmable network has something else of this name; rename it")
        held = "training", "_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"
        vars(self).update({k: vars(whole)[k] for k in held}, whole=whole)  # the same children hang on both
        self.image, self.divisor = image, divisor
        names = {}
        for name, m in whole.named_modules():
            if isinstance(m, LAYERS) and not m.writes.fixed:
                names.setdefault(m.writes, name)
        self.groups, self.names = list(names), list(names.values())
        self.num_widths = len(self.groups)
        self._max = torch.tensor([g.max for g in self.groups], dtype=torch.float64)
        self._step = torch.tensor([math.lcm(g.step, divisor) for g in self.groups], dtype=torch.float64)
        trace = _Watch(whole, image)
        trace.run()
        self._flops, self._params, self._terms = _weight_tables(self, trace)
        _require_wiring(self, trace)
        self._live = _activation_table(self, trace)

    def forward(self, x):
        self.whole.training = self.training
        return self.whole(x)

    def train(self, mode: bool = True) -> "Slimmable":
        """As the module that was given has it, which may keep a BatchNorm in eval mode."""
        self.whole.train(mode)
        self.training = self.whole.training
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
        """Multiply-accumulates of convolutions and matrix products for one image: a (..., d) -> (...,), float64.

        `relaxed` skips the rounding of channel counts, which makes it differentiable in a.
        """
        return self._quadratic(self._flops, a, relaxed)

    def params(self, a: Tensor | float, relaxed: bool = False) -> Tensor:
        """Number of parameters: a (..., d) -> (...,). `relaxed` as in `flops`."""
        return self._quadratic(self._params, a, relaxed)

    def memory(self, a: Tensor | float, relaxed: bool = False) -> Tensor:
        """Peak bytes of float32 inference at batch size 1: a (..., d) -> (...,). `relaxed` as in `flops`.

        All weights, plus the largest set of activations alive at one time: what an operation reads and writes, and what a
        later one still needs (the residual). In this file's networks ReLUs and additions work in place (yours are counted as
        you wrote them); BatchNorm is not folded into the convolution before it.
        """
        c = _with_one(self.channels(a, relaxed))
        live = (c @ self._live.to(c.device).T).amax(-1)
        return 4 * (self._quadratic(self._params, a, relaxed) + live)

    def latency(self, a: Tensor | float, relaxed: bool = False) -> Tensor:
        """Milliseconds as `fit_latency` found them, or else ValueError: a (..., d) -> (...,). `relaxed` as in `flops`."""
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
        # A weight's size is a constant times its input group's count times its output group's, so that all sizes together
        # are a quadratic form: one matrix serves thousands of configurations at once.
        c = _with_one(self.channels(a, relaxed))
        return ((c @ form.to(c.device)) * c).sum(-1)

    def extract(self, a: Tensor | float | None = None) -> nn.Module:
        """A plain network (nn.Conv2d, nn.BatchNorm2d, nn.Linear) with copies of the weights used at `a`: nn.Sequential, or
        of the class of the module that was given; the names of its weights are the same.

        None means the widths now set, which this call leaves as they were. The memory format is kept.
        Running statistics come along; they fit only the configuration that BatchNorm was last calibrated for.
        """
        before, mode = [g.active for g in self.groups], self.training
        try:
            if a is not None:
                self.set_widths(a)
            shares = {id(t): _cut(m, t) for m in self.modules() if isinstance(m, LAYERS) for t in _weights(m)}
            net = _copy(self.whole, shares)  # a module of your own may hold a group, and has it with the width of now
        finally:
            for g, n in zip(self.groups, before):
                g.active = n
        net.training = mode
        for m in net.modules():
            if isinstance(m, LAYERS):
                m.__class__, sizes = m.plain()
                del m.reads, m.writes
                vars(m).update(sizes)
            if isinstance(m, _NormBase):
                m.momentum = vars(m).pop("theirs", m.momentum)
        return net

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


def _copy(net, memo=()):
    """A deep copy. What torch refuses to copy, tensors that a forward pass left in attributes, is detached in it."""
    left = [t for m in net.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    return copy.deepcopy(net, {id(t): t.detach().clone() for t in left} | dict(memo))


def _weights(m):
    return [t for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]


def _cut(layer, t):
    """A copy of what is in use of one of the layer's weights."""
    last = t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last)
    kept = used(t.detach(), layer.writes, layer.reads if t.ndim > 1 and layer.mixes else None) if t.ndim else t
    kept = kept.clone(memory_format=torch.channels_last if last else torch.contiguous_format)
    return nn.Parameter(kept, t.requires_grad) if isinstance(t, nn.Parameter) else kept


# ------------------------------------------------------------------------------ how groups are found


def slimmable(net: nn.Module, image: tuple[int, int, int], divisor: int = 1, fixed: tuple[str, ...] = ()) -> Slimmable:
    """A slimmable copy of an ordinary network: at full width it computes what `net` does, and its weights have their names.

    Its convolutions, BatchNorms and Linears become this file's, which read and write the groups that `_Watch` finds. What
    cannot be slimmed keeps its width; `kept` has, for each such layer, the reason.

    Args:
        image: (channels, height, width) of one input.
        fixed: names of modules whose outputs are to keep their channels.
    Raises ValueError, with a layer's name, for a network that cannot be watched (its forward pass looks at values, say, or
    runs weights that are not its own), that calls a BatchNorm twice, or does not run, or the same, at other widths (it
    decides by numbers of channels, or has one written into its forward pass: then name the layer before it in `fixed`).
    """
    net = _copy(net)
    layers, kept = _Watch(net, image).find({*fixed})
    for m, (reads, writes) in layers.items():
        if isinstance(m, nn.BatchNorm2d) or not all(g.fixed for g in reads.parts + writes.parts):
            m.__class__ = TWINS[type(m)]  # weights and settings stay
            m.reads, m.writes = reads, writes
    for m in net.modules():
        if isinstance(m, _NormBase):
            m.theirs, m.momentum = m.momentum, 0.0
    slim = Slimmable(net, image, divisor)
    slim.kept = kept
    return slim


TWINS = {nn.Conv2d: Conv2d, nn.BatchNorm2d: BatchNorm2d, nn.Linear: Linear}
# What is done to each value (as what torch tags so), and what makes maps of other sizes of each map alone.
POINTWISE = {*"""hardswish hardswish_ mish_ _prelu_kernel expand copy_ detach alias _to_copy native_dropout bernoulli_ fill_
                 zero_ empty_like zeros_like ones_like full_like rand_like randn_like masked_fill masked_fill_
                 where""".split()}  # fmt: skip
SPATIAL = {*"""max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d reflection_pad2d replication_pad2d
               upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d new_empty""".split()}
ALONG = {"slice", "select", "squeeze", "unsqueeze"}  # the dimensions that are their second argument
REDUCE = {"mean", "sum", "amax", "amin", "max", "min"}
VIEW = {"view", "_unsafe_view", "_reshape_alias"}


class _Watch(TorchDispatchMode):
    """A forward pass at the widths now set, on the meta device, where no arithmetic is done: which groups do the layers read
    and write, which of them are one, and what does it all cost?

    A convolution writes a new group, or the one that it was told. Tensors carry it on: through BatchNorm, activation
    functions, pooling. Where two tensors are added or multiplied, each channel of one meets the same channel of the other:
    one of their groups becomes the other. What reads concatenated tensors reads a `Concatenation`.

        x = conv1(image)                         conv1 writes a
        y = conv3(relu(bn(conv2(x))))            conv2 reads a and writes b, as does bn; conv3 reads b and writes c
        z = x + y                                c becomes a: that is what conv3 writes
        conv4(torch.cat([z, conv2(z)], 1))       conv4 reads (a, b)

    Any other operation fixes what it reads, and so does the end of the network. `follow` has the rules for tensors,
    `layer` for layers; `find` draws the conclusions.

    layers: of each layer of an ordinary network what it reads and what it writes, when it is first called.
    same: pairs of groups that are one. reasons: for each group that is fixed. odd: for each module that is no such layer.

    times: how often each module was called.
    calls: (layer, its output's pixels, its input's) of this file's layers, in order; a shared one comes twice.
    macs: multiply-accumulates of all operations. done: the names of those that are not a layer's.
    lives: of each activation [channels it carries, values, first operation, last operation, layer before].

    A ResNet block, whose ReLUs and addition work in place. A column is an operation: its stars are in memory at once.

                    conv1  bn1  relu  conv2  bn2  add  relu
        x             *     *     *     *     *    *           the shortcut waits for the addition
        conv1(x)      *     *
        bn1(...)            *     *     *
        conv2(...)                      *     *
        bn2(...)                              *    *    *  ->  the next block's x

    Raises ValueError, with a layer's name, where the network does not run, or a layer gets something else than it reads.
    """

    def __init__(self, net, image):
        super().__init__()
        self.net, self.image, self.name, self.inside, self.modules = net, image, "the image", None, dict(net.named_modules())
        self.layers, self.same, self.reasons, self.odd, self.to_fix = {}, [], {}, dict.fromkeys(net.modules()), ()
        self.times, self.calls, self.macs, self.lives, self.operations = Counter(), [], 0, {}, 0
        self.carried, self.alive, self.done = {}, [], []  # by id: kept alive, so that none comes twice

    def run(self, count=1, training=False):
        """The forward pass of so many images, by a copy of the network whose weights are shapes alone: returns its output."""
        shapes, self.training = {}, training
        for t in (t for m in self.modules.values() for t in _weights(m)):
            shape = t.detach().to("meta")
            shapes[id(t)] = nn.Parameter(shape, t.requires_grad) if isinstance(t, nn.Parameter) else shape
        copied = _copy(self.net, shapes)
        self.weights = {_storage(t): m for m, twin in zip(self.modules.values(), copied.modules()) for t in _weights(twin)}
        for (name, m), twin in zip(self.modules.items(), copied.modules()):
            twin.training = training
            twin.register_forward_pre_hook(functools.partial(self.enter, name, m), with_kwargs=True)
            twin.register_forward_hook(functools.partial(self.leave, name, m), with_kwargs=True, always_call=True)
        dtype = next((p.dtype for p in self.net.parameters() if p.is_floating_point()), None)
        x = torch.empty(count, *self.image, device="meta", dtype=dtype)
        self.meet(x)
        try:
            with torch.no_grad(), self:
                out = copied(x)
            if [*copied.state_dict()] != [*self.net.state_dict()]:
                raise ValueError("makes weights as it runs; run it once before")
            return out
        except Exception as e:  # whatever a network of one's own may raise
            raise ValueError(f"after {self.name}: {e}") from e

    def find(self, fixed):
        """Of each layer what it reads and what it writes; of each that keeps its width, by name, the reason."""
        if fixed - self.modules.keys():
            raise ValueError(f"fixed: the network has no module {min(fixed - self.modules.keys())!r}")
        uses, self.to_fix = Counter(t for m in self.odd for t in _weights(m)), fixed
        shared = {m: "shares its weights" for m in self.odd if any(uses[t] > 1 for t in _weights(m))}
        self.odd = shared | {m: why for m in self.odd if (why := _oddity(m))}
        for training in (False, True):
            try:  # two images: BatchNorm needs them in training, and the batch is not taken for a dimension of one
                out = self.run(2, training)
            except ValueError:
                if not training:
                    raise
                break  # in training it takes labels, say: what was seen in eval() must do
            for t in tree_leaves(out):
                if isinstance(t, Tensor):
                    self.fix("is an output of the network", t)
                elif not isinstance(t, (int, float, str, type(None))):
                    self.fix(f"may be in the network's output, a {type(t).__name__}", *self.alive)
        became, once, layers, kept = {}, {}, {}, {}

        def now(g):
            while g in became:
                g = became[g]
            return g

        for g, why in self.reasons.items():
            g.fixed = g.fixed or why
        for one, other in self.same:  # two groups become one
            one, other = now(one), now(other)
            if one is not other:
                became[other] = one
                one.fixed, one.step = one.fixed or other.fixed, math.lcm(one.step, other.step)
        for m, pair in self.layers.items():
            pair = [Concatenation(*map(now, c.parts), each=c.each) for c in pair]
            for g in pair[0].parts + pair[1].parts:
                g.fixed = g.fixed or g.step == g.max and "has no channels that could be left out"
            # What has the same parts is to be the same; of one part, that.
            pair = [once.setdefault((c.parts, c.each), c) for c in pair]
            layers[m] = [c.parts[0] if len(c.parts) == c.each == 1 else c for c in pair]
        for name, m in self.modules.items():
            if m in layers:  # where BatchNorm goes by what it reads
                reasons = [g.fixed for g in layers[m][1].parts if not isinstance(m, nn.BatchNorm2d)]
            else:
                several = not m._modules and any(p.numel() > 1 for p in m.parameters()) or isinstance(m, nn.Conv2d)
                reasons = [self.odd.get(m, "is not called")] if several else []
            if reasons and all(reasons):
                kept[name] = reasons[0]
        return layers, kept

    def unite(self, one, other, why):
        """Each channel of one meets the same one of the other: their groups are one. Where they do not pair: fixed."""
        if [g.max for g in one.parts] != [g.max for g in other.parts] or one.each != other.each:
            return self.fix(f"{why}, beside other groups", one, other)
        self.same += zip(one.parts, other.parts)

    def fix(self, why, *those):
        """Tensors, or channels."""
        for c in [self.carried.get(id(c)) if isinstance(c, Tensor) else c for c in those]:
            self.reasons = dict.fromkeys(c.parts if c else (), why) | self.reasons

    def carry(self, t, channels):
        self.carried[id(t)] = channels
        if _storage(t) in self.lives:
            self.lives[_storage(t)][0] = channels

    def channels(self, t):
        """What the tensor carries. A fixed group where that is nothing, or its shape was changed in place since."""
        c = self.carried.get(id(t))
        if c and t.shape[1:2] == (c.active,):
            return c
        return WidthGroup(t.shape[1], f"meets what no layer wrote, after {self.name}")

    def meet(self, t):
        values = t.untyped_storage().nbytes() // t.element_size()
        self.lives.setdefault(_storage(t), [None, values, self.operations, 0, self.name])[3] = self.operations

    def enter(self, name, m, twin, args, kwargs):
        self.times[m] += 1
        if isinstance(m, LAYERS):
            x = (*args, *kwargs.values())[0]
            shape = x.shape[-1:] if isinstance(m, Linear) else x.shape[1:2] * (x.ndim == 4)
            if shape != (m.reads.active,):
                raise ValueError(f"{name}: reads a group of which {m.reads.active} channels are in use, "
                                 f"got an input of shape {tuple(x.shape)}")  # fmt: skip
            carries = self.carried.get(id(x), m.reads)
            if len(carries.parts) > 1 and _places(carries) != _places(m.reads):
                raise ValueError(f"{name}: reads something else than the Concatenation of groups that it gets")
        self.name = name or self.name
        if isinstance(m, LAYERS) or m not in self.odd:
            self.inside = m  # a layer's own operations are none of the network's

    def leave(self, name, m, twin, args, kwargs, out):
        if self.inside is m:
            self.inside = None
            if out is not None:  # as it is after an error
                self.layer(name, m, (*args, *kwargs.values())[0], out)
        if name in self.to_fix:
            self.fix("is named in `fixed`", *tree_leaves(out))

    def layer(self, name, m, x, out):
        if isinstance(m, LAYERS):
            self.calls.append((m, out.numel() // m.writes.active, x.numel() // m.reads.active))
            return self.carry(out, m.writes)
        known, groups = self.layers.get(m), getattr(m, "groups", 1)
        if self.training and not known:
            self.odd[m] = "is called in training alone"
        elif out.ndim != (2 if isinstance(m, nn.Linear) else 4):
            self.odd[m] = f"is called with {out.ndim} dimensions"
        elif groups > 1 and (m.in_channels != m.out_channels or not in_steps(self.channels(x), m.in_channels // groups)):
            self.odd[m] = "is a grouped convolution from and to different channels"
        else:
            reads = writes = self.channels(x)
            if groups == 1 and not isinstance(m, nn.BatchNorm2d):
                writes = known[1] if known else WidthGroup(out.shape[1])
            if known:
                self.unite(known[0], reads, f"goes into {name} again")
            self.layers[m] = known or (reads, writes)
            return self.carry(out, writes)
        self.fix(f"goes into {name}, which {self.odd[m]}", x, *known or ())

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(isinstance(t, nn.Parameter) and not t.is_meta for t in tree_leaves((args, kwargs))):
            raise ValueError("a weight that is no copy: made as it runs, another network's, or held by a function (a lambda, a hook)")
        if any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves((args, kwargs))):
            args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
        read, name = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)], op._schema.name.removeprefix("aten::")
        # An activation function in place has nothing to do on the meta device, and takes long.
        idle = name.endswith("_") and len(read) == 1 and torch.Tag.pointwise in op.tags
        out = args[0] if idle else op(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if op._overloadpacket in flop_registry:
            self.macs += flop_registry[op._overloadpacket](*args, **kwargs, out_val=out) // 2
        elif name in ("mv", "addmv", "dot"):  # which the registry lacks
            self.macs += max(t.numel() for t in read)
        self.done += [] if self.inside else [name]
        owners = [self.weights.get(_storage(t)) for t in read]
        for m in owners:
            if type(m) in TWINS and not self.inside and m not in self.odd:
                self.odd[m] = f"has weights that go into {name}, too"
                self.fix(self.odd[m], *self.layers.get(m, ()))
        if self.inside and read and all(owners):
            self.weights |= {_storage(t): self.inside for t in made}  # a cut weight is one
        for t in read + made:  # statistics are vectors and pooling's indices integers: neither is an activation
            if t.ndim > 1 and t.is_floating_point() and _storage(t) not in self.weights:
                self.meet(t)
        carried = [t for t in read if id(t) in self.carried]
        if carried:
            why = f"goes into {name} after {self.name}"
            c = self.follow(op, name, args, read, carried, made, why)
            if c is None:
                if not self.inside:
                    self.fix(why, *carried)
                # Fixed, they may go on. In a network of this file's layers it is a guess, and `_require_wiring` sees to it.
                c = next((self.carried[id(t)] for t in carried if made and t.numel() == made[0].numel()), ())
            for t in made if c else ():
                self.carry(t, c)
        self.alive += read + made
        self.operations += 1
        return out

    def follow(self, op, name, args, read, carried, made, why):
        """What all that an operation made carries: channels, or () for nothing. None: of this nothing is known."""
        if not made or any(t.shape[1:2] != (self.carried[id(t)].active,) for t in carried):
            return None
        x, y, given = carried[0], made[0], args[1] if len(args) > 1 else None
        c = self.channels(x)
        if name == "cat" and given in (1, 1 - y.ndim):
            parts = [self.channels(t) for t in read if t.numel()]
            return Concatenation(*parts, each=c.each) if {part.each for part in parts} == {c.each} else None
        if torch.Tag.pointwise in op.tags or name in POINTWISE or name == "cat":
            meet = [t for t in read if t.ndim >= y.ndim - 1 and t.shape[t.ndim - y.ndim + 1] == y.shape[1]]  # not broadcast
            if any(t.ndim != y.ndim for t in carried) or not meet:
                return None
            meet.sort(key=lambda t: id(t) not in self.carried)
            c, *others = [self.channels(t if t.ndim == y.ndim else t[None]) for t in meet]
            for other in others:
                self.unite(c, other, why)
            return c
        if name in VIEW:  # a channel's values lie side by side: so many more or fewer of them become channels
            entries = c.each * y.shape[1] if y.ndim > 1 and len(y) == len(x) else 1
            return Concatenation(*c.parts, each=entries // x.shape[1]) if entries % x.shape[1] == 0 else None
        known = name in SPATIAL and x.ndim == 4 or name == "slice" and y.shape == x.shape
        if name == "constant_pad_nd":
            known = not any(given[2 * (x.ndim - 2) :])
        elif name in ALONG | REDUCE:
            dims = [given] if isinstance(given, int) else given or (range(x.ndim) if name in REDUCE else [0])
            dims = {d % (x.ndim + (name == "unsqueeze")) for d in dims}
            if name in REDUCE and 1 in dims:  # of all channels something: of no group's width
                for t in made[1:]:
                    self.carry(t, Concatenation(*c.parts, each=0))  # which channel it is: whatever follows, they are fixed
                return ()
            known = known or min(dims) > 1
        return c if known and y.shape[:2] == x.shape[:2] else None


def _oddity(m):
    """Why the layer is none of torch's own, as it comes from there."""
    if type(m) not in TWINS:
        return f"is a {type(m).__name__}"
    hung = any(v for k, v in vars(m).items() if k.endswith("_hooks") or k == "_modules" or callable(v))
    more = {*m._parameters, *m._buffers} - {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    return (hung or more) and "has something of its own hung on it"


def _storage(t):
    return t.untyped_storage()._cdata


def _places(channels):
    """Where among the channels those of slimmed groups begin."""
    starts = itertools.accumulate((channels.each * g.max for g in channels.parts), initial=0)
    return [(start, g) for start, g in zip(starts, channels.parts) if not g.fixed]


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
    for m in nn.Sequential(layers).modules():
        if isinstance(m, Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out")
    return layers


RESNETS = {f"resnet{6 * n + 2}": (BasicBlock, (n, n, n)) for n in (1, 3, 5, 7, 9)} | {
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
        arch: one of ARCHS. resnet8 to resnet56 in steps of 12 are the CIFAR form (three stages), the other ResNets and mbv2
            the ImageNet form with torchvision's parameter names. Or the name of any classification network of
            torchvision, which `slimmable` takes as it is.
        image_size: height and width of the square inputs, for the costs.
        divisor: channel counts are multiples of it.
    Raises ValueError for an unknown arch, a count below 1, or images too small for the network.
    """
    counts = {"num_classes": num_classes, "image_size": image_size, "in_channels": in_channels, "divisor": divisor}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    image = in_channels, image_size, image_size
    if arch == "mbv2":
        return mobilenet_v2(num_classes, image, divisor)
    if arch not in RESNETS:
        return slimmable(_torchvisions(arch, num_classes, image), image, divisor)
    block, depths = RESNETS[arch]
    return resnet(block, depths, num_classes, image, divisor, cifar=len(depths) == 3)


def _torchvisions(arch, num_classes, image):
    """A network of torchvision's, without auxiliary heads, for images of so many channels."""
    import torchvision  # here, since all else does without it

    if arch not in torchvision.models.list_models(torchvision.models):
        raise ValueError(f"arch: unknown {arch!r}, choose from {', '.join(ARCHS)} or torchvision's classification networks")
    of_size = {"image_size": image[1]} if arch.startswith("vit_") else {"input_size": image[1:]} if "maxvit" in arch else {}
    whole = {"aux_logits": False, "init_weights": True} if arch in ("googlenet", "inception_v3") else {}
    net = torchvision.models.get_model(arch, weights=None, num_classes=num_classes, **of_size, **whole)
    first = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
    if first.in_channels != image[0]:
        first.in_channels, weight = image[0], first.weight.detach()[:, torch.arange(image[0]) % first.in_channels]
        first.weight = nn.Parameter(weight)
    return net


# ------------------------------------------------------------------------------ the deployable file


def _norms(net):
    return [m for m in net.modules() if isinstance(m, _NormBase) and m.running_mean is not None]


def get_statistics(net: Slimmable) -> Tensor:
    """All running means and variances as one vector (s,), s twice the sum of all BatchNorms' channels."""
    vectors = [t for m in _norms(net) for t in (m.running_mean, m.running_var)]
    return torch.cat(vectors or [next(net.parameters()).new_zeros(0)])


def set_statistics(net: Slimmable, vector: Tensor) -> None:
    """Sets what `get_statistics` gave: new buffers, as others (a copy, a process, a thread) may hold the old ones."""
    norms = _norms(net)
    if not norms:
        return
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
def load(path: str, device: torch.device | str = "cpu", net: nn.Module | None = None) -> Slimmable:
    """The network of a front.pt, with its front: see `Slimmable.use`. In eval mode, at full width.

    net: where it is of your own code, one such network, whose weights do not matter.
    `net.data` holds the names of the classes, and mean and deviation of the images: they are to be
    (image / 255 - mean) / std. Raises as `read_tensors`, and ValueError for another file of torch's or a `net` that is not as
    the run's was: of another divisor or image, its layers in another order.
    """
    state = read_tensors(path)
    parts = {"network", "model", "front", "statistics", "data", "cost", "latency"}
    if not isinstance(state, dict) or state.get("format") != 1 or not parts <= state.keys():
        raise ValueError(f"{path}: not a front.pt (of this version), which train.py writes when a run is done")
    how = state["network"]
    try:
        if net is None and ":" in how["arch"]:
            raise ValueError(f"weights of {how['arch']}, a network of your own: load(..., net=...) needs one such")
        if net is None:
            net = build(**how)
        image = how["in_channels"], how["image_size"], how["image_size"]
        net = net if isinstance(net, Slimmable) else slimmable(net, image, how["divisor"])
        if (tuple(net.image), net.divisor) != (image, how["divisor"]) or [*net.state_dict()] != [*state["model"]]:
            raise ValueError(f"needs a network for images {image}, of divisor {how['divisor']}, its layers in the same order")
        net.load_state_dict(state["model"])
        net.front, net.statistics, net.data = state["front"], state["statistics"], state["data"]
        net.latency_table = state["latency"]
        net.use(**{state["cost"]: 1.0})
    except (ValueError, RuntimeError, TypeError, LookupError, AttributeError) as e:  # another network, or odd content
        raise ValueError(f"{path}: {(str(e).splitlines() or [''])[0]}") from None
    net.statistics = net.statistics.to(device)
    return net.to(device, memory_format=torch.channels_last)  # the faster layout on GPU and CPU alike


# ------------------------------------------------------------------------------ pretrained weights


def sort_channels(net: Slimmable) -> None:
    """Permutes each group's channels by falling importance: the first are those worth keeping. Call it before training.

    The full network's outputs stay the same: readers' input channels, and writers' output channels with BatchNorm's vectors,
    get the same permutation. A channel's importance is the sum of the absolute weights that read it; where channels come
    and go by a grouped convolution's parts, so do they here. Groups that a parameter-free shortcut joins stay as they are:
    their channels must go on meeting.
    """
    layers = [m for m in net.modules() if isinstance(m, LAYERS)]
    joined = {g for m in layers if isinstance(m, Shortcut) for g in (m.reads, m.writes)}
    for group in net.groups:
        readers = [m for m in layers if m.mixes and group in m.reads.parts]
        if group in joined or not readers:
            continue
        read = [(m.reads, m.weight.detach().abs().transpose(0, 1).flatten(1).sum(1)) for m in readers]
        weight = sum(part.view(group.max, -1).sum(1) for c, t in read for g, part in views(t, c) if g is group)
        order = weight.view(-1, group.step).sum(1).argsort(descending=True)
        order = torch.arange(group.max, device=order.device).view(-1, group.step)[order].flatten()
        with torch.no_grad():
            for m in readers:
                m.weight.copy_(m.weight[:, _sorted(m.reads, group, order)])
            for m in layers:
                for t in m.state_dict().values() if group in m.writes.parts else ():
                    if t.ndim:
                        t.copy_(t[_sorted(m.writes, group, order)])


def _sorted(channels, group, order):
    """The index (channels.max,) that puts the group's channels into the order, and leaves the others where they are."""
    index = torch.arange(channels.max, device=order.device)
    for g, part in views(index, channels):
        if g is group:
            part.view(g.max, -1).copy_(part.view(g.max, -1)[order])
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


def _count(net, channels):
    """The channels as a vector v: v' (c, 1). Fixed ones are a multiple of the 1, a concatenation its parts' sum."""
    v = torch.zeros(net.num_widths + 1, dtype=torch.float64)
    for g in channels.parts if channels else ():
        place, factor = (net.groups.index(g), 1) if g in net.groups else (net.num_widths, g.max)
        v[place] += factor * channels.each
    return v


def _weight_tables(net, trace):
    """FLOPs and parameters as matrices Q, and a latency's terms as a stack of such: with c the channel counts followed by
    a 1, each is c' Q c.

    Q[i, j] sums over the layers that read group i and write group j: a kernel's pixels, for FLOPs times the output's. A
    3 x 3 convolution on 32 x 32 pixels gives 9 and 9216. The last row is for what reads no slimmed group: vectors,
    depthwise kernels, the image.

    The terms of a latency: for the layers of each kind (class, kernel, stride, pixels) together their FLOPs, what they read
    and what they write; and a constant.
    """
    one = _count(net, WidthGroup(1, fixed=True))
    flops, params = (torch.zeros(2 * [net.num_widths + 1], dtype=torch.float64) for _ in range(2))
    known, terms = set(), defaultdict(int, {"constant": torch.outer(one, one)})
    for layer, pixels, pixels_read in trace.calls:
        read, written = _count(net, layer.reads), _count(net, layer.writes)
        kind = type(layer), getattr(layer, "kernel_size", 1), getattr(layer, "stride", 1), layer.mixes, pixels
        for p in layer.parameters(recurse=False):
            mixes = p.ndim > 1 and layer.mixes  # a vector's size, like a grouped convolution's kernels', goes with one group
            size = torch.outer(read if mixes else one, written) * (p[0, 0] if mixes else p[0]).numel()
            if layer not in known:
                params += size
            if p.ndim > 1:
                flops += size * pixels
                terms["flops", kind] += size * pixels
                terms["reads", kind] += torch.outer(one, read) * pixels_read
                terms["writes", kind] += torch.outer(one, written) * pixels
        known.add(layer)
    full = _with_one(net._max)
    others = {p for m in net.modules() if not isinstance(m, LAYERS) for p in m.parameters(recurse=False)}
    params[-1, -1] += sum(p.numel() for p in others)  # of no group: constants, as are
    flops[-1, -1] += trace.macs - full @ flops @ full  # the products that no layer of ours makes
    return flops, params, torch.stack(list(terms.values()))


def _activation_table(net, trace):
    """Rows, of which the largest product with (c, 1) is the number of activation values alive at one time."""
    rows = torch.zeros(trace.operations, net.num_widths + 1, dtype=torch.float64)
    for channels, values, first, last, _ in trace.lives.values():
        rows[first : last + 1] += _count(net, channels) * (values / channels.max)
    rows = rows.unique(dim=0)
    below = (rows[:, None] <= rows[None]).all(-1).sum(1) > 1  # never the largest: another row is above it
    return rows[~below]


def _require_wiring(net, full):
    """Raises ValueError, naming the layer, unless the costs, found at full width, hold at other widths.

    Configurations are tried in which groups differ: what only fits at full width (two tensors concatenated and read as
    one group, two groups added) fits at none of them.
    """
    for name, m in full.modules.items():
        n = full.times[m]
        if isinstance(m, LAYERS) and not n or isinstance(m, _NormBase) and n > 1 and m.running_mean is not None:
            raise ValueError(f"{name}: called {n} times; a BatchNorm's statistics belong to one place, "
                             "and the costs of what is not called are unknown")  # fmt: skip
    lives, one = list(full.lives.values()), WidthGroup(1, fixed=True)
    # For each activation, what its size may go with: what it carries, no group's (a mean over channels), or another's.
    fits = [dict.fromkeys([carries or one, one, *net.groups]) for carries, *_ in lives]
    try:
        for counts in _configurations(net):
            for group, n in zip(net.groups, counts.tolist()):
                group.active = n
            trace = _Watch(net.whole, net.image)
            trace.run()
            if trace.done != full.done or len(trace.lives) != len(lives):
                raise ValueError("other operations at other widths, perhaps since it asks for numbers of channels: "
                                 "it must do the same at all widths")  # fmt: skip
            for i, ((_, most, *_, name), (_, values, *_)) in enumerate(zip(lives, trace.lives.values())):
                fits[i] = [c for c in fits[i] if values * c.max == most * c.active]
                if not fits[i]:
                    raise ValueError(f"after {name}: a tensor whose size goes with the width of no group")
            c = _with_one(counts.double())
            if trace.macs != c @ net._flops @ c:
                raise ValueError("FLOPs that go with the width of no group: a product that no layer of this file makes")
    finally:
        for group in net.groups:
            group.active = group.max
    for life, (first, *_) in zip(lives, fits):
        life[0] = first


def _configurations(net):
    """Random channel counts (d,), two or as many as it takes until every group has been narrower than at full width, and any
    two have differed in their share of channels: of several each, or both ways round, as one alone is broadcast, and fits.
    Before them one where as many groups as can have equally many: a forward pass may ask whether two have.
    """
    most, step = (torch.tensor([1] + [getattr(g, k) for g in net.groups]) for k in ("max", "step"))  # the 1 is at full width
    random, tried = torch.Generator().manual_seed(0), 0 if net.groups else 2
    if net.groups:
        yield (step * (most[1:].min() // step).clamp(min=1))[1:]
    told = torch.eye(len(most)).bool() | (most == step)[:, None]
    while tried < 2 or not told.all():
        counts = step * (1 + (torch.rand(len(most), generator=random) * (most // step)).long())
        share, several, tried = counts / most, counts > 1, tried + 1
        told |= (share[:, None] < share) | (share[:, None] != share) & several[:, None] & several
        yield counts[1:]
