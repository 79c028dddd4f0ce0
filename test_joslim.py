"""pytest -q             every fast test, under 4 minutes on 2 cores
pytest -m slow -s     25 kills, dead workers, a full disk; shows what was seen

Each test compares with something that is not this project's: torchvision's networks, plain networks,
closed forms, dense algebra, finite differences, brute force.
"""

import copy
import csv
import fcntl
import gzip
import itertools
import json
import os
import pickle
import random
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import gp
import joslim
import models
import train

ROOT = Path(__file__).parent
LOWER = 0.42
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def size_of(arch):
    return 16 if len(models.RESNETS.get(arch, ((), ()))[1]) == 3 else 64


def widths_for(net, seed, lower=0.1):
    g = torch.Generator().manual_seed(seed)
    return lower + (1 - lower) * torch.rand(net.num_widths, generator=g, dtype=torch.float64)


# ------------------------------------------------------------------------------ networks


@pytest.mark.parametrize("arch, twin", [("resnet18", "resnet18"), ("resnet50", "resnet50"), ("mbv2", "mobilenet_v2")])
def test_full_width_is_torchvisions(arch, twin):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, twin)(num_classes=10)
    for m in theirs.modules():  # statistics and affine parameters that hide nothing
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight.data, m.running_var):
                t.uniform_(0.5, 1.5)
            for t in (m.bias.data, m.running_mean):
                t.normal_(0, 0.2)
    ours = models.build(arch, 10, 96)
    ours.load_state_dict(theirs.state_dict())  # strict: every name and shape is torchvision's
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        a, b = ours.eval()(x), theirs.eval()(x)
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("arch", models.ARCHS)
def test_narrow_is_the_plain_network(arch):
    size = size_of(arch)
    torch.manual_seed(1)
    net = models.build(arch, 7, size).double()
    for p in net.parameters():
        if p.ndim == 1:
            p.data.uniform_(0.5, 1.5)
    for name, b in net.named_buffers():
        if b.is_floating_point():
            b.uniform_(0.5, 1.5)
    for seed in range(2):
        a = widths_for(net, seed)
        net.set_widths(a)
        plain = net.extract()
        kinds = {type(m) for m in plain.modules()}
        assert not kinds & {models.Slimmable, *models.LAYERS}
        x, y = torch.randn(4, 3, size, size).double(), torch.arange(4)
        for mode in (False, True):
            net.train(mode), plain.train(mode)
            net.zero_grad(), plain.zero_grad()
            ours, theirs = net(x), plain(x)
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
            F.cross_entropy(ours, y).backward(), F.cross_entropy(theirs, y).backward()
            pairs = dict(plain.named_parameters())
            for name, p in net.named_parameters():
                cut = p.grad[tuple(map(slice, pairs[name].shape))]
                torch.testing.assert_close(cut, pairs[name].grad, rtol=1e-5, atol=1e-5 * cut.abs().max().item() + 1e-9)
                rest = p.grad.clone()
                rest[tuple(map(slice, cut.shape))] = 0
                assert rest.abs().max() == 0  # what is cut off is not trained


def test_extreme_and_bad_widths():
    net = models.build("resnet8", 5, 16)
    net.set_widths(1e-6)  # one channel everywhere
    assert [g.active for g in net.groups] == [1] * net.num_widths
    net(torch.randn(2, 3, 16, 16)).sum().backward()
    for bad, word in ((torch.ones(3), "6 widths, got 3"), (0.0, "got 0"), (1.5, "1.5"), (float("nan"), "nan"),
                      (torch.ones(2, 6), "shape")):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            net.set_widths(bad)
    assert [g.active for g in net.groups] == [1] * net.num_widths
    with pytest.raises(ValueError, match="resnet9"):
        models.build("resnet9", 5, 16)


def test_half_of_the_channels_are_rounded_as_promised():
    net = models.build("resnet8", 5, 16)
    net.set_widths(torch.tensor([0.42, 0.5, 0.53, 1.0, 0.1, 0.99]))
    expected = [max(1, round(a * g.max)) for a, g in zip((0.42, 0.5, 0.53, 1.0, 0.1, 0.99), net.groups)]
    assert [g.active for g in net.groups] == expected


def macs_by_hooks(plain, x):
    total = 0

    def count(m, inputs, out):
        nonlocal total
        if isinstance(m, nn.Conv2d):
            total += m.in_channels // m.groups * m.kernel_size[0] * m.kernel_size[1] * out[0].numel()
        else:
            total += m.in_features * m.out_features

    for m in plain.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.register_forward_hook(count)
    plain.eval()(x)
    return total


class LiveTensors(TorchDispatchMode):
    """The real thing's memory: which storages each op of a plain network touches, and how large they are."""

    def __init__(self, weights):
        super().__init__()
        self.weights = {w.untyped_storage().data_ptr() for w in weights}
        self.size, self.steps, self.keep = {}, [], []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        used = [t for t in tree_flatten((args, out))[0] if isinstance(t, torch.Tensor)]
        used = [t for t in used if t.untyped_storage().data_ptr() not in self.weights and t.dtype == torch.float32]
        used = [t for t in used if t.ndim > 1]
        self.keep += used
        for t in used:
            self.size.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
        self.steps.append({t.untyped_storage().data_ptr() for t in used})
        return out

    def peak(self):
        first, last = {}, {}
        for i, step in enumerate(self.steps):
            for s in step:
                first.setdefault(s, i)
                last[s] = i
        return max(sum(self.size[s] for s in first if first[s] <= i <= last[s]) for i in range(len(self.steps)))


@pytest.mark.parametrize("arch", models.ARCHS)
def test_costs_are_the_plain_networks(arch):
    size = size_of(arch)
    net = models.build(arch, 7, size)
    for a in (torch.ones(net.num_widths), widths_for(net, 3), widths_for(net, 4, 0.4)):
        plain = net.extract(a).eval()
        x = torch.randn(1, 3, size, size)
        weights = 4 * sum(p.numel() for p in plain.parameters())
        with torch.no_grad(), LiveTensors([*plain.parameters(), *plain.buffers()]) as live:
            plain(x)
        assert net.flops(a).item() == macs_by_hooks(plain, x)
        assert 4 * net.params(a).item() == weights
        assert net.memory(a).item() == weights + live.peak()


@pytest.mark.parametrize("arch, gflops, mparams", [("resnet18", 1.814, 11.690), ("resnet50", 4.089, 25.557), ("mbv2", 0.301, 3.505)])  # fmt: skip
def test_costs_are_the_published(arch, gflops, mparams):
    net = models.build(arch, 1000, 224)
    assert round(net.flops(1.0).item() / 1e9, 3) == gflops
    assert round(net.params(1.0).item() / 1e6, 3) == mparams


def test_the_published_figures_quoted_are_torchvisions():
    for arch, (params, gflops) in models.TORCHVISION.items():
        (weights,) = list(torchvision.models.get_model_weights("mobilenet_v2" if arch == "mbv2" else arch))[:1]
        assert (params, gflops) == (weights.meta["num_params"], weights.meta["_ops"])


@pytest.mark.parametrize("arch", ["resnet20", "resnet50", "mbv2"])
@pytest.mark.parametrize("cost", ["flops", "params", "memory"])
def test_relaxed_costs(arch, cost):
    net = models.build(arch, 10, 64)
    f = getattr(net, cost)
    a = torch.stack([widths_for(net, s, LOWER) for s in range(5)]).requires_grad_()
    value = f(a, relaxed=True)
    (grad,) = torch.autograd.grad(value.sum(), a)
    eps = 1e-6
    for i in range(net.num_widths):
        e = torch.zeros(net.num_widths, dtype=torch.float64)
        e[i] = eps
        with torch.no_grad():
            slope = (f(a + e, relaxed=True) - f(a - e, relaxed=True)) / (2 * eps)
        torch.testing.assert_close(grad[:, i], slope, rtol=1e-4, atol=1e-4 * value.max().item())
    whole = net.channels(a.detach()) / torch.tensor([g.max for g in net.groups])
    torch.testing.assert_close(f(whole, relaxed=True), f(a.detach()))  # at whole channel counts the two agree
    assert f(torch.rand(2, 3, net.num_widths) * 0.5 + 0.5).shape == (2, 3)


def test_mbv2_activations_and_biases():
    net = models.build("mbv2", 10, 64)
    for block in (net.features[0], net.features[18]):
        assert [type(m) for m in block] == [models.Conv2d, models.BatchNorm2d, nn.ReLU6]
    block = net.features[0].eval()
    block[1].bias.data.fill_(100.0)
    assert block(torch.randn(1, 3, 64, 64)).max() == 6
    biased = models.Conv2d(models.WidthGroup(3), models.WidthGroup(4), 3, bias=True)
    for layer, x in ((biased, torch.randn(2, 3, 5, 5)), (models.Linear(models.WidthGroup(3), 4), torch.randn(2, 3))):
        before = layer(x)
        layer.bias.data += 1
        torch.testing.assert_close(layer(x), before + 1)


def test_another_network_made_slimmable():
    from collections import OrderedDict

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            image, a, b = models.WidthGroup(1, fixed=True), models.WidthGroup(8), models.WidthGroup(12)
            self.one, self.two = models.Conv2d(image, a, 3, bias=True), models.Conv2d(a, b, 3, 2)
            self.norm, self.out = models.BatchNorm2d(b), models.Linear(b, 3)

        def forward(self, x):
            return self.out(F.relu(self.norm(self.two(F.relu(self.one(x))))).mean((2, 3)))

    net = models.Slimmable(OrderedDict(net=Net()), image=(1, 12, 12))
    a = torch.tensor([0.5, 0.75])
    plain = net.extract(a)
    net.set_widths(a)
    x = torch.randn(3, 1, 12, 12)
    torch.testing.assert_close(net(x), plain(x))
    assert net.flops(a).item() == macs_by_hooks(plain, x[:1]) == 9 * 4 * 144 + 9 * 4 * 9 * 36 + 9 * 3
    assert net.params(a).item() == sum(p.numel() for p in plain.parameters())


# ------------------------------------------------------------------------------ GP


def dense_posterior(x, y, new, hyper):
    """Rasmussen & Williams 2.25-2.26 with an explicit inverse, and the GP's own scale and mean formulas spelt out."""
    ls, noise = hyper[:-1].exp(), hyper[-1].exp() + 1e-8

    def kernel(u, v):
        r = 5**0.5 * ((u[:, None] - v[None]) / ls).pow(2).sum(-1).sqrt()
        return (1 + r + r**2 / 3) * torch.exp(-r)

    inverse = torch.linalg.inv(kernel(x, x) + noise * torch.eye(len(x), dtype=x.dtype))
    z = (y - y.mean()) / y.std(correction=0)
    one = torch.ones_like(z)
    m = one @ inverse @ z / (one @ inverse @ one)
    s2 = ((z - m) @ inverse @ (z - m) + 2) / (len(z) + 2)
    k = kernel(new, x)
    mean = m + k @ inverse @ (z - m)
    variance = s2 * (1 - (k @ inverse * k).sum(1))
    return mean * y.std(correction=0) + y.mean(), variance * y.var(correction=0)


def test_gp_posterior_is_the_textbooks():
    g = torch.Generator().manual_seed(0)
    x, new = torch.rand(30, 3, generator=g).double(), torch.rand(11, 3, generator=g).double()
    y = 5 + (3 * x).sin().sum(1) + 0.1 * torch.randn(30, generator=g).double()
    for hyper in (None, torch.tensor([0.2, -0.5, 1.0, -3.0], dtype=torch.float64)):
        model = gp.GP(x, y, hyper)
        if hyper is None:
            model.fit()
        mean, variance = model.posterior(new)
        expected = dense_posterior(x, y, new, model.hyper)
        torch.testing.assert_close(mean, expected[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(variance, expected[1], rtol=1e-5, atol=1e-8)
    assert model.posterior(new.reshape(11, 1, 3))[0].shape == (11, 1)


def test_gp_posterior_gradient():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(20, 2, generator=g).double()
    model = gp.GP(x, x.sin().sum(1)).fit()
    new = torch.cat([torch.rand(4, 2, generator=g).double(), x[:1]]).requires_grad_()  # one on top of a datum
    assert torch.autograd.gradcheck(lambda t: model.posterior(t)[0], new[:4])
    (grad,) = torch.autograd.grad(sum(p.sum() for p in model.posterior(new)), new)
    assert grad.isfinite().all()


def test_gp_objective_gradient():
    """The hand-written gradient against finite differences, and the value against torch's own normal density."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(25, 3, generator=g).double(), torch.randn(25, generator=g).double()
    model = gp.GP(x, y)
    hyper = torch.tensor([0.3, -0.4, 0.8, -2.0], dtype=torch.float64)
    _, grad = model._objective(hyper, model.x, model.z)
    for i in range(4):
        e = torch.zeros(4, dtype=torch.float64)
        e[i] = 1e-5
        up, down = (model._objective(hyper + s * e, model.x, model.z)[0] for s in (1, -1))
        torch.testing.assert_close(grad[i], (up - down) / 2e-5, rtol=1e-5, atol=1e-6)

    def reference(h):
        r = 5**0.5 * ((x[:, None] - x[None]) / h[:-1].exp()).pow(2).sum(-1).sqrt()
        k = (1 + r + r**2 / 3) * torch.exp(-r) + (h[-1].exp() + 1e-8) * torch.eye(25, dtype=torch.float64)
        inverse, one = torch.linalg.inv(k), torch.ones(25, dtype=torch.float64)
        m = one @ inverse @ model.z / (one @ inverse @ one)
        s2 = ((model.z - m) @ inverse @ (model.z - m) + 2) / 27
        normal = torch.distributions.MultivariateNormal(m * one, s2 * k)
        # The scale's inverse-gamma prior (a = 0, b = 1, times constants) and the priors on the rest.
        value = -normal.log_prob(model.z) + s2.log() + 1 / s2
        lengths = torch.distributions.LogNormal(2**0.5 + torch.tensor(3.0).double().log() / 2, 3**0.5)
        noise = torch.distributions.Normal(-6.0, 3.0)
        return value - lengths.log_prob(h[:-1].exp()).sum() - noise.log_prob(h[-1])

    other = hyper + torch.tensor([0.5, 0.2, -0.3, 1.0], dtype=torch.float64)
    ours = model._objective(hyper, model.x, model.z)[0] - model._objective(other, model.x, model.z)[0]
    torch.testing.assert_close(ours, reference(hyper) - reference(other), rtol=1e-6, atol=1e-6)


def test_gp_fit_recovers_length_scales():
    """Samples of a GP of known length scales and noise: the fits' geometric mean is close to the truth."""
    truth, fits = torch.tensor([0.2, 0.5]).double(), []
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        x = torch.rand(200, 2, generator=g).double()
        r = 5**0.5 * torch.cdist(x / truth, x / truth, compute_mode="donot_use_mm_for_euclid_dist")
        k = (1 + r + r**2 / 3) * torch.exp(-r) + 0.05**2 * torch.eye(200).double()
        fits.append(gp.GP(x, torch.linalg.cholesky(k) @ torch.randn(200, generator=g).double()).fit().hyper)
    found = torch.stack(fits).mean(0).exp()
    torch.testing.assert_close(found[:2], truth, rtol=0.2, atol=0)
    assert 0.0015 < found[2] < 0.004  # 0.05^2 = 0.0025


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_gp_hard_data(scale):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(12, 4, generator=g).double()
    new = torch.rand(5, 4, generator=g).double()
    for xs, ys in (
        (x, x.sum(1)),
        (x.repeat(3, 1), torch.randn(36, generator=g).double()),  # duplicates that disagree
        (x[:1], torch.ones(1).double()),
        (x, torch.ones(12).double()),  # constant
        (x[:1].repeat(9, 1), torch.ones(9).double()),
    ):
        mean, variance = gp.GP(xs, scale * ys).fit().posterior(new)
        assert mean.isfinite().all() and variance.isfinite().all() and (variance > 0).all()
    torch.testing.assert_close(gp.GP(x, scale * x.sum(1)).fit().posterior(x)[0] / scale, x.sum(1), rtol=0.02, atol=0)


def test_gp_bad_input():
    x, y = torch.rand(5, 2), torch.rand(5)
    for args, name in (((x[0], y), "x:"), ((x[:0], y[:0]), "x:"), ((x, y[:4]), "y:"), ((x, y * torch.nan), "y:"),
                       ((x / 0, y), "x:"), ((x, y, torch.zeros(2)), "hyper:")):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            gp.GP(*args)
    with pytest.raises(ValueError, match="x:"):
        gp.GP(x, y).posterior(torch.rand(3, 4))
    with pytest.raises(ValueError, match="beta"):
        gp.ucb(y, y, -1)


def test_ucb_is_optimistic():
    """Among equal means the less known configuration is preferred: its value is lower."""
    value = gp.ucb(torch.ones(2), torch.tensor([0.0, 4.0]), beta=0.25)
    assert value.tolist() == [1.0, 0.0]
    v = torch.tensor([0.0, 1.0], requires_grad=True)
    (grad,) = torch.autograd.grad(gp.ucb(3 * v, v, beta=0).sum(), v)
    assert grad.tolist() == [3.0, 3.0]  # the mean's alone


def test_chebyshev_by_hand_and_brute_force():
    f, w, z = torch.tensor([3.0, 1.0]), torch.tensor([0.25, 0.75]), torch.tensor([1.0, -1.0])
    assert gp.chebyshev(f, w, z, rho=0.1).item() == pytest.approx(max(0.5, 1.5) + 0.1 * (0.5 + 1.5))
    # Every point of a non-convex front is the minimiser for some lambda; no dominated one is.
    g = torch.Generator().manual_seed(0)
    points = torch.rand(40, 2, generator=g)
    lam = torch.linspace(0.0005, 0.9995, 2000)
    value = gp.chebyshev(points[:, None], torch.stack([lam, 1 - lam], -1), rho=1e-9)
    found = set(value.argmin(0).tolist())
    front = {i for i in range(40) if not any((points[j] <= points[i]).all() and j != i for j in range(40))}
    assert found == front


def test_optimizer_finds_minima_in_a_box():
    centre = torch.tensor([[0.3, 0.9, 2.0], [-1.0, 0.5, 0.6]], dtype=torch.float64)  # outside in places
    x, value = gp.optimize_acquisition(lambda x: (x - centre).square().sum(-1), 0.0, 1.0, 3, 2, steps=60,
                                       generator=torch.Generator().manual_seed(0))  # fmt: skip
    torch.testing.assert_close(x, centre.clamp(0, 1), atol=0.02, rtol=0)
    torch.testing.assert_close(value, (x - centre).square().sum(-1))
    start = torch.full((1, 3), 0.123).double()
    spike = lambda x: 1 - (x - start).norm(dim=-1).lt(1e-9).double() + 0 * x.sum(-1)  # noqa: E731
    assert gp.optimize_acquisition(spike, 0.0, 1.0, 3, starts=start)[1].item() == 0  # a start is never lost


# ------------------------------------------------------------------------------ samplers


def history(net, n, seed):
    """A sampler with n configurations of a known loss, a third of them uniform."""
    full = net.flops(1.0).item()
    sampler = joslim.Joslim(net.num_widths, lambda a, relaxed=False: net.flops(a, relaxed) / full, seed=seed)
    g = torch.Generator().manual_seed(seed)
    a = LOWER + (1 - LOWER) * torch.rand(n, net.num_widths, generator=g, dtype=torch.float64)
    a[: n // 3] = a[: n // 3, :1]
    sampler.widths = a
    sampler.losses = 1 + (a**-1.5 - 1).mean(1) + 0.01 * torch.randn(n, generator=g, dtype=torch.float64)
    return sampler


@pytest.mark.parametrize("arch", ["resnet8", "resnet20", "mbv2"])
def test_targets_are_met(arch):
    """One target from each m-th part of the cost range: so each proposal's cost must lie in its part."""
    net = models.build(arch, 10, 32)
    off = []
    for seed in range(5):
        sampler = history(net, 40, seed)
        low = sampler.cost(torch.full((net.num_widths,), LOWER)).item()
        drawn = []
        at_cost = sampler.at_cost
        sampler.at_cost = lambda a, t: (drawn.append(t), at_cost(a, t))[1]  # noqa: B023
        cost = sampler.cost(sampler.sample(20))
        off.append(cost - drawn[-1])
        part = ((drawn[-1] - low) / (1 - low) * 20).floor()
        assert sorted(part.tolist()) == list(range(20))
    assert (torch.cat(off).abs() <= 0.02).double().mean() >= 0.95
    ends = sampler.at_cost(torch.rand(2, net.num_widths).double().clamp(LOWER), torch.tensor([low, 1.0]).double())
    torch.testing.assert_close(sampler.cost(ends), torch.tensor([low, 1.0]).double(), atol=0.01, rtol=0)


def test_at_cost_gradient():
    sampler = history(models.build("resnet20", 10, 32), 5, 0)
    a = sampler.widths[:, None] * 0.9 + 0.05
    target = torch.tensor([0.5], dtype=torch.float64)
    weight = torch.rand(12, generator=torch.Generator().manual_seed(0)).double()
    f = lambda a: (sampler.at_cost(a, target) * weight).sum()  # noqa: E731
    (grad,) = torch.autograd.grad(f(a.requires_grad_()), a)
    for i in range(0, 12, 3):
        e = torch.zeros(12).double()
        e[i] = 1e-4
        with torch.no_grad():
            torch.testing.assert_close(grad[..., i].sum(), (f(a + e) - f(a - e)) / 2e-4, atol=2e-2, rtol=2e-2)

    # Where the cost is the mean width, both have closed forms: a - mean(a) + target, weight - mean(weight).
    linear = joslim.Joslim(12, lambda a, relaxed=False: a.mean(-1), lower=0.1)
    a = (0.4 + 0.2 * torch.rand(3, 1, 12, generator=torch.Generator().manual_seed(1)).double()).requires_grad_()
    out = linear.at_cost(a, target)
    torch.testing.assert_close(out, a - a.mean(-1, keepdim=True) + 0.5)
    (grad,) = torch.autograd.grad((out * weight).sum(), a)
    torch.testing.assert_close(grad, (weight - weight.mean()).expand(3, 1, 12))


@pytest.mark.parametrize("targeted", [True, False])
def test_proposals_beat_random(targeted):
    """On a known loss, the front found has a smaller area than that of random and of uniform widths."""
    net = models.build("resnet20", 10, 32)
    full = net.flops(1.0).item()
    cost = lambda a, relaxed=False: net.flops(a, relaxed) / full  # noqa: E731
    importance = torch.linspace(0, 1, net.num_widths).double() ** 3
    loss = lambda a: (importance * a**-1.5).sum(-1)  # noqa: E731
    sampler = joslim.Joslim(net.num_widths, cost, seed=1, targeted=targeted)
    while len(sampler.widths) < 60:
        sampler.observe(loss(sampler.widths))
        sampler.sample(2)
    n, low = len(sampler.widths), 0.2
    others = [s(net.num_widths, seed=2).sample(n) for s in (joslim.RandomWidths, joslim.UniformWidths)]
    ends = torch.stack([torch.full((net.num_widths,), v).double() for v in (LOWER, 1.0)])
    area = [joslim.front_area(loss(a), cost(a), low) for a in (torch.cat([w, ends]) for w in (sampler.widths, *others))]
    assert area[0] < min(area[1:])
    assert (sampler.widths >= LOWER).all() and (sampler.widths <= 1).all()
    assert len(sampler.widths.unique(dim=0)) == n or not targeted


def test_history_starts_uniform_then_full():
    sampler = joslim.Joslim(4, lambda a, relaxed=False: a.mean(-1), num_prior=6, seed=0)
    assert not sampler.ready
    for _ in range(3):
        new = sampler.sample(2)
        assert (new == new[:, :1]).all()
    assert sampler.ready and len(sampler.widths) == 7 and (sampler.widths[-1] == 1).all()
    with pytest.raises(ValueError, match="finite"):
        sampler.sample(2)
    sampler.observe(torch.tensor([1.0, 2, 3, torch.nan, torch.inf, 4, 0]))  # two cannot be used
    assert sampler.sample(2).shape == (2, 4) and sampler.losses[-2:].isnan().all()
    with pytest.raises(ValueError, match="losses"):
        sampler.observe(torch.zeros(3))


def test_only_what_is_kept_joins_the_history():
    sampler = history(models.build("resnet8", 10, 32), 30, 0)
    before = sampler.widths
    new = sampler.sample(9, keep=2)
    assert new.shape == (9, 6) and torch.equal(sampler.widths, torch.cat([before, new[:2]]))
    costs = sampler.cost(new, relaxed=True).sort().values
    smallest = sampler.cost(torch.full((6,), sampler.lower, dtype=torch.float64), relaxed=True)
    edges = smallest + (1 - smallest) * torch.arange(10) / 9
    assert (costs > edges[:-1] * 0.98).all() and (costs < edges[1:] * 1.02).all()  # one in each ninth of the range
    start = joslim.Joslim(3, lambda a, relaxed=False: a.mean(-1), num_prior=4)
    sizes = [(len(start.sample(5, keep=2)), len(start.widths)) for _ in range(2)]
    assert sizes == [(5, 2), (5, 5)] and (start.widths[-1] == 1).all()


def test_partly_renewed_losses():
    sampler = joslim.Joslim(2, lambda a, relaxed=False: a.mean(-1), num_prior=1)
    sampler.widths = torch.rand(4, 2).double()
    sampler.losses = torch.tensor([4.0, 5.0, 2.0, torch.nan]).double()
    sampler.observe(torch.tensor([3.0, 1.5, 1.0]), torch.tensor([0, 3, 2]))
    assert sampler.losses.tolist() == [3.0, 5.0, 1.0, 1.5]


def test_smoothing_averages_noise_and_follows_a_shift():
    """Batches' noise shrinks to the share that theory gives; what all losses do together passes at once."""
    g, n, keep = torch.Generator().manual_seed(0), 400, 0.7
    sampler = joslim.Joslim(2, lambda a, relaxed=False: a.mean(-1), num_prior=1, smoothing=keep)
    sampler.widths = torch.rand(n, 2, generator=g, dtype=torch.float64)
    sampler.losses = torch.full((n,), torch.nan, dtype=torch.float64)
    true = torch.rand(n, generator=g)
    for t in range(30):
        sampler.observe(true - t + torch.randn(n, generator=g))
    error = sampler.losses - (true - t)
    assert error.std().item() == pytest.approx(((1 - keep) / (1 + keep)) ** 0.5, rel=0.1)  # an AR(1)'s variance
    assert abs(error.mean()) < 0.2
    sampler.losses[:3] = torch.tensor([torch.nan, torch.inf, 5.0])
    fresh = torch.arange(3.0)
    sampler.observe(fresh, torch.arange(3))  # nothing to average with, and the only one: as they are
    assert torch.equal(sampler.losses[:3], fresh.double())
    sampler.observe(torch.tensor([torch.nan, 4.0]), torch.tensor([0, 1]))
    assert sampler.losses[0].isnan() and sampler.losses[1] == 4.0


def test_same_state_same_proposals():
    net = models.build("resnet20", 10, 32)
    one, two = history(net, 30, 0), history(net, 30, 5)
    one.sample(2)
    one.observe(torch.arange(32.0))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.sample(2), two.sample(2))
    for kind in (joslim.UniformWidths, joslim.RandomWidths):
        a, b = kind(5, seed=1), kind(5, seed=2)
        a.sample(3)
        b.load_state_dict(a.state_dict())
        assert torch.equal(a.sample(2), b.sample(2))


@pytest.mark.parametrize("other", ["losses", "order of sums", pytest.param("device", marks=on_a_gpu)])
@pytest.mark.parametrize("n", [60, 300])
def test_rounding_moves_proposals_by_rounding(n, other):
    """Neither the fit nor the descent makes much of it, so that processors that round differently agree."""
    net = models.build("mbv2", 10, 32)
    for seed in range(3):
        one, two = history(net, n, seed), history(net, n, seed)
        if other == "device":
            two.widths, two.losses = two.widths.cuda(), two.losses.cuda()
        elif other == "losses":
            two.losses = two.losses * (1 + 1e-14 * torch.randn(n, generator=torch.Generator().manual_seed(seed)))
        else:
            two.widths, two.losses = two.widths.flip(0), two.losses.flip(0)
        torch.testing.assert_close(one.sample(2), two.sample(2).cpu(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("d, losses", [
    (3, torch.ones(1000)), (3, torch.cat([torch.rand(50), torch.tensor([1e9])])), (3, torch.logspace(-8, 8, 60)),
    (1, torch.rand(10)), (200, torch.rand(25)),
])  # fmt: skip
def test_hard_histories(d, losses):
    sampler = joslim.Joslim(d, lambda a, relaxed=False: a.square().mean(-1), num_prior=1)
    g = torch.Generator().manual_seed(0)
    n = len(losses)
    near = 0.7 + 1e-9 * torch.rand(n, d, generator=g).double()
    for widths in (near, LOWER + (1 - LOWER) * torch.rand(n, d, generator=g).double()):
        sampler.widths, sampler.losses = widths, losses.double()
        new = sampler.sample(2)
        assert new.shape == (2, d) and ((new >= LOWER) & (new <= 1)).all()


@pytest.mark.parametrize("seed", range(12))
def test_any_history_gives_usable_proposals(seed):
    """Random dimension, box, history and scale of losses, some of them not finite."""
    g = torch.Generator().manual_seed(seed)
    d, n, m = (int(torch.randint(low, high, (), generator=g)) for low, high in ((1, 30), (1, 80), (1, 6)))
    lower = 0.05 + 0.9 * torch.rand((), generator=g).item()
    weight = torch.rand(d, generator=g).double() + 0.01
    cost = lambda a, relaxed=False: (a**2 @ weight) / weight.sum()  # noqa: E731
    sampler = joslim.Joslim(d, cost, lower, num_prior=1, seed=seed, targeted=bool(seed % 3))
    sampler.widths = lower + (1 - lower) * torch.rand(n, d, generator=g).double()
    sampler.losses = torch.randn(n, generator=g).double() * 10 ** (12 * torch.rand((), generator=g).double() - 6)
    sampler.losses[torch.rand(n, generator=g) < 0.2] = torch.nan
    sampler.losses[0] = 1.0
    new = sampler.sample(m)
    assert new.shape == (m, d) and (new >= lower).all() and (new <= 1).all() and len(sampler.losses) == n + m
    sampler.observe(torch.rand(n + m, generator=g))
    assert sampler.sample(1).isfinite().all()


@pytest.mark.parametrize("arch", ["resnet8", "resnet50", "mbv2"])
def test_costs_grow_with_every_width(arch):
    net = models.build(arch, 10, 64)
    a = torch.stack([widths_for(net, s) for s in range(20)])
    b = a + (1 - a) * torch.stack([widths_for(net, 100 + s, 0.0) for s in range(20)])
    for cost in (net.flops, net.params, net.memory):
        for relaxed in (False, True):
            assert (cost(a, relaxed) <= cost(b, relaxed)).all() and (cost(b, relaxed) <= cost(1.0)).all()


def test_wrong_arguments_are_named():
    net = models.build("resnet8", 5, 16)
    x, y, one = torch.randn(4, 3, 16, 16), torch.zeros(4, dtype=torch.long), torch.ones(3)
    mean = lambda a, relaxed=False: a.mean(-1)  # noqa: E731
    sampler = joslim.Joslim(2, mean, num_prior=1)
    sampler.sample(2)
    sampler.observe(torch.ones(3))
    broken = joslim.Joslim(2, mean, num_prior=1)
    broken.widths = torch.ones(4, 3)
    short = joslim.Joslim(2, mean, num_prior=1)
    short.widths, short.losses = torch.ones(4, 2), torch.ones(3)
    model, far = gp.GP(torch.rand(5, 2), torch.rand(5)), torch.empty(3, device="meta")  # meta: a device every machine has
    for call, name in (
        (lambda: joslim.RandomWidths(0), "dim"), (lambda: joslim.UniformWidths(3, lower=float("nan")), "lower"),
        (lambda: joslim.Joslim(3, mean, num_prior=0), "num_prior"), (lambda: joslim.Joslim(3, mean, beta=-1), "beta"),
        (lambda: joslim.Joslim(3, mean, smoothing=1.0), "smoothing"),
        (lambda: joslim.UniformWidths(3).sample(0), "m must"), (lambda: sampler.sample(0), "m must"),
        (lambda: sampler.sample(2, 3), "keep must"), (lambda: sampler.sample(2, 0), "keep must"),
        (lambda: sampler.observe(torch.ones(2)), "losses: expected"), (lambda: broken.sample(2), "widths: expected"),
        (lambda: sampler.observe(torch.ones(1), torch.ones(1)), "losses, where: expected"), (lambda: short.sample(1), "losses: expected"),
        (lambda: sampler.observe(torch.ones(1), torch.tensor([9])), "where: expected"),
        (lambda: joslim.sandwich_step(net, x, y[:3], []), "y: expected"),
        (lambda: joslim.sandwich_step(net, x, y.float(), []), "y: expected"),
        (lambda: joslim.sandwich_step(net, x.byte(), y, []), "x: expected"),
        (lambda: joslim.sandwich_step(net, x, y, [torch.ones(3)]), "a: this network has 6 widths"),
        (lambda: joslim.sandwich_step(net, x, y, [], lower=0.0), "a: widths must lie"),
        (lambda: joslim.evaluate(net, [], x, y[:2]), "y: expected"),
        (lambda: joslim.evaluate(net, [], far, y), "x: expected on cpu"),
        (lambda: joslim.sandwich_step(net, x, y, [], label_smoothing=1.5), "label_smoothing"),
        (lambda: joslim.sandwich_step(net, x, y, [], scale=float("nan")), "scale"),
        (lambda: joslim.pareto_front(one, one * torch.nan), "cost: every"),
        (lambda: joslim.pareto_front(one, far), "cost: expected a tensor on cpu"),
        (lambda: joslim.pareto_front(one * 1j, one), "loss: expected"), (lambda: joslim.shortlist(one, one, 0), "k must"),
        (lambda: joslim.shortlist(one, torch.ones(4), 2), "cost: expected"),
        (lambda: joslim.front_area(one * torch.nan, one), "loss: none"),
        (lambda: joslim.front_area(one, one, high=0.5), "low, high"),
        (lambda: gp.chebyshev(one, torch.ones(2)), "weights"), (lambda: gp.ucb(one, one, float("nan")), "beta"),
        (lambda: gp.chebyshev(one, -one), "weights: must"), (lambda: gp.chebyshev(one, one, rho=-1), "rho"),
        (lambda: gp.chebyshev(one, far), "weights: expected a tensor on cpu"), (lambda: gp.ucb(one, -one, 1), "variance: must"),
        (lambda: gp.ucb(one, far, 1), "variance: expected a tensor on cpu"), (lambda: gp.ucb(one / 0, one, 1), "mean: every"),
        (lambda: gp.GP(one[:, None], far), "y: expected a tensor on cpu"), (lambda: gp.GP(one[:, None], 1j * one), "y: every"),
        (lambda: model.posterior(torch.empty(4, 2, device="meta")), "x: expected a tensor on cpu"),
        (lambda: model.posterior(torch.full((4, 2), torch.nan)), "x: every"), (lambda: model.fit(0), "max_points"),
        (lambda: gp.GP(one[:, None], one, one[:2] * torch.inf), "hyper: every"),
        (lambda: gp.optimize_acquisition(lambda x: x.sum(-1), 0.0, 1.0, 3, starts=one[None] * torch.nan), "starts: every"),
        (lambda: gp.optimize_acquisition(lambda x: x.sum(-1), 1.0, 0.0, 2), "lower, upper"),
        (lambda: gp.optimize_acquisition(lambda x: x.sum(-1), 0.0, float("inf"), 2), "lower, upper"),
        (lambda: gp.optimize_acquisition(lambda x: x.sum(-1), 0.0, 1.0, 2, starts=one[None]), "starts"),
        (lambda: gp.optimize_acquisition(lambda x: x.sum(-1), 0.0, 1.0, 2, steps=0), "steps"),
        (lambda: gp.optimize_acquisition(lambda x: x.sum(), 0.0, 1.0, 2), "fn: expected"),
        (lambda: models.WidthGroup(0), "max"), (lambda: models.build("mbv2", 0, 32), "num_classes"),
        (lambda: net.flops(torch.ones(2, 5)), "a: this network"), (lambda: net.extract(2.0), "a: widths must lie"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            call()
    assert len(sampler.widths) == 3  # a refused call leaves no trace


# ------------------------------------------------------------------------------ weights


def test_one_configuration_alone_is_an_ordinary_step():
    torch.manual_seed(0)
    net = models.build("resnet8", 6, 16).double()
    x, y = torch.randn(8, 3, 16, 16).double(), torch.randint(6, (8,))
    a = widths_for(net, 1, LOWER)
    losses = joslim.sandwich_step(net, x, y, [], None, label_smoothing=0.1, teacher=a)
    plain = net.extract(a)
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)(plain(x), y)
    loss.backward()
    torch.testing.assert_close(losses, loss.detach()[None])
    for (name, p), q in zip(net.named_parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad[tuple(map(slice, q.shape))], q.grad)


def test_parts_of_a_batch_make_its_gradient():
    net, x, y, widths = joined_batch()
    _, whole = train.flatten(net)
    losses = joslim.sandwich_step(net, x, y, widths)
    expected = whole.clone()
    whole.zero_()
    parts = [joslim.sandwich_step(net, *part, widths, scale=0.25) for part in zip(x.chunk(4), y.chunk(4))]
    torch.testing.assert_close(whole, expected, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(sum(parts) / 4, losses)


@pytest.mark.parametrize("distill", [True, False])
def test_sandwich_gradient_is_the_sum(distill):
    torch.manual_seed(0)
    net = models.build("resnet8", 6, 16).double()
    x, y = torch.randn(8, 3, 16, 16).double(), torch.randint(6, (8,))
    widths = torch.stack([widths_for(net, s, LOWER) for s in range(2)])
    losses = joslim.sandwich_step(net, x, y, widths, LOWER, label_smoothing=0.1, distill=distill)
    total = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    teacher, expected = None, []
    for a in (torch.ones(net.num_widths), *widths, torch.full((net.num_widths,), LOWER)):
        plain = net.extract(a)  # each pass by itself, in a plain network
        logits = plain(x)
        if teacher is None or not distill:
            loss = nn.CrossEntropyLoss(label_smoothing=0.1)(logits, y)
            teacher = logits.detach().softmax(1)
        else:
            loss = -(teacher * logits.log_softmax(1)).sum(1).mean()
        loss.backward()
        expected.append(loss.item())
        for name, p in plain.named_parameters():
            total[name][tuple(map(slice, p.shape))] += p.grad
    torch.testing.assert_close(losses.tolist(), expected)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, total[name], rtol=1e-6, atol=1e-8)


@on_a_gpu
def test_a_step_on_the_gpu_is_the_cpus():
    net, x, y, widths = joined_batch()
    there = copy.deepcopy(net.train()).to("cuda", memory_format=torch.channels_last)
    losses = joslim.sandwich_step(net, x, y, widths)
    torch.testing.assert_close(joslim.sandwich_step(there, x.cuda(), y.cuda(), widths).cpu(), losses, rtol=1e-5, atol=1e-6)
    for (name, p), q in zip(net.named_parameters(), there.parameters()):
        torch.testing.assert_close(q.grad.cpu(), p.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(joslim.evaluate(there, widths, x.cuda(), y.cuda()).cpu(), joslim.evaluate(net, widths, x, y))


def peak_bytes(fn):
    """The most memory that fn() holds at one time, as torch's profiler sees it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fn()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize("arch, size", [("resnet20", 32), ("mbv2", 64)])
def test_a_joint_step_needs_the_memory_of_the_full_networks(arch, size):
    """Each pass is freed before the next: at most 1.15 times the plain full network's own training step."""
    net = models.build(arch, 10, size)
    x, y = torch.randn(16, 3, size, size), torch.randint(10, (16,))
    plain = net.extract(1.0)
    train.flatten(net), train.flatten(plain)
    ours = peak_bytes(lambda: joslim.sandwich_step(net, x, y, [widths_for(net, s, LOWER) for s in range(2)]))
    theirs = peak_bytes(lambda: F.cross_entropy(plain(x), y).backward())
    assert 10 * x.numel() * 4 < theirs and ours <= 1.15 * theirs


def test_training_leaves_running_statistics_and_evaluation_everything():
    torch.manual_seed(0)
    net = models.build("mbv2", 6, 32)
    x, y = torch.randn(8, 3, 32, 32), torch.randint(6, (8,))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    widths = torch.stack([widths_for(net, s, LOWER) for s in range(3)])
    losses = joslim.evaluate(net, widths, x, y)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    for a, loss in zip(widths, losses):
        plain = net.extract(a).train()
        torch.testing.assert_close(F.cross_entropy(plain(x), y), loss, rtol=1e-4, atol=1e-5)
    joslim.sandwich_step(net, x, y, widths)
    assert all(torch.equal(v, before[k]) for k, v in net.named_buffers())


def test_calibration_is_the_statistics_by_hand():
    torch.manual_seed(0)
    net = models.build("resnet8", 6, 16)
    a = widths_for(net, 0, LOWER)
    net.set_widths(a)
    batches = [torch.randn(5, 3, 16, 16) * s + s for s in (1, 2, 3)]
    joslim.calibrate_bn(net, batches)
    plain = net.extract()
    inputs = {}
    for name, m in plain.named_modules():
        if isinstance(m, nn.BatchNorm2d):
            m.register_forward_hook(lambda m, i, o, name=name: inputs.setdefault(name, []).append(i[0]))
    with torch.no_grad():
        for x in batches:
            plain.train()(x)
    for name, seen in inputs.items():
        m = net.get_submodule(name)
        n = m.writes.active
        torch.testing.assert_close(m.running_mean[:n], torch.stack([i.mean((0, 2, 3)) for i in seen]).mean(0), rtol=1e-4, atol=1e-5)  # fmt: skip
        torch.testing.assert_close(m.running_var[:n], torch.stack([i.var((0, 2, 3)) for i in seen]).mean(0), rtol=1e-4, atol=1e-5)  # fmt: skip
        assert m.momentum == 0
    with pytest.raises(ValueError, match="batches"):
        joslim.calibrate_bn(net, [])
    with pytest.raises(RuntimeError):  # images of the wrong kind, in the middle: training goes on as if nothing had been
        joslim.calibrate_bn(net.eval(), [batches[0], torch.randn(5, 2, 16, 16)])
    assert not net.training and all(m.momentum == 0 for m in net.modules() if isinstance(m, nn.BatchNorm2d))


def test_weight_decay_skips_norms_and_biases():
    for arch in ("resnet8", "mbv2", "resnet50"):
        net = models.build(arch, 6, 32)
        spare = {id(p) for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
        spare |= {id(m.bias) for m in net.modules() if getattr(m, "bias", None) is not None}
        expected = [sum(p.numel() for p in net.parameters() if (id(p) in spare) == s) for s in (False, True)]
        values = torch.cat([p.detach().flatten() for p in net.parameters()]).sort().values
        flat, grads = train.flatten(net)
        assert [f.numel() for f in flat] == expected
        torch.testing.assert_close(torch.cat(flat).detach().sort().values, values)
        # Parameters and gradients are views: what the optimiser does to the flat ones, the network sees.
        net(torch.randn(2, 3, 32, 32)).sum().backward()
        assert grads.abs().sum() > 0 and all(f.grad.data_ptr() != 0 for f in flat)
        before = [p.detach().clone() for p in net.parameters()]
        torch.optim.SGD(flat, lr=0.1).step()
        for p, b in zip(net.parameters(), before):
            torch.testing.assert_close(p.detach(), b - 0.1 * p.grad)


def test_learning_rate():
    args = train.parse_args(["--epochs", "10", "--warmup-epochs", "2", "--lr", "0.4", "--batch-size", "128"])
    rates = [train.learning_rate(s, 5, args) for s in range(50)]
    assert rates[0] == pytest.approx(0.02) and max(rates) == pytest.approx(0.2)
    assert rates.index(max(rates)) in (9, 10) and rates[-1] == pytest.approx(0.2 / 40)


# ------------------------------------------------------------------------------ the front


def test_pareto_front_and_area_by_brute_force():
    g = torch.Generator().manual_seed(0)
    for n in (1, 2, 30, 200):
        loss, cost = torch.rand(n, generator=g), (torch.rand(n, generator=g) * 10).round() / 10  # ties in cost
        front = joslim.pareto_front(loss, cost).tolist()
        expected = [i for i in range(n) if not any(loss[j] <= loss[i] and cost[j] <= cost[i] and j != i for j in range(n))]
        assert sorted(front) == expected and cost[front].tolist() == sorted(cost[front].tolist())
        low = cost.min().item()
        grid = low + (1 - low) * (torch.arange(20000).double() + 0.5) / 20000
        best = torch.where(cost[None].double() <= grid[:, None] + 1e-9, loss[None].double(), torch.inf).amin(1)
        assert joslim.front_area(loss, cost) == pytest.approx(best.mean().item() * (1 - low), abs=2e-4)
    tie = torch.ones(4)
    assert joslim.pareto_front(tie, tie).tolist() == [0]
    assert joslim.pareto_front(torch.tensor([torch.nan, 2.0, torch.inf]), torch.tensor([1.0, 2.0, 3.0])).tolist() == [1]
    with pytest.raises(ValueError, match="low"):
        joslim.front_area(tie, tie, low=0.5)
    with pytest.raises(ValueError, match="shape"):
        joslim.pareto_front(torch.ones(3), torch.ones(4))


def test_shortlist_takes_whole_fronts():
    g = torch.Generator().manual_seed(0)
    loss, cost = torch.rand(50, generator=g), torch.rand(50, generator=g)
    chosen = joslim.shortlist(loss, cost, 20).tolist()
    assert 20 <= len(set(chosen)) == len(chosen)
    for i in set(range(50)) - set(chosen):  # whatever is left is dominated by something chosen
        assert any(loss[j] <= loss[i] and cost[j] <= cost[i] for j in chosen)
    assert sorted(joslim.shortlist(loss, cost, 99).tolist()) == list(range(50))
    loss[7] = torch.nan
    assert 7 in joslim.shortlist(loss, cost, 1).tolist()


# ------------------------------------------------------------------------------ several processes


def two_processes(rank, port, out):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    world = train.World("cpu")
    calls, all_reduce = [], torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda t, *a, **k: (calls.append(t.numel()), all_reduce(t, *a, **k))[1]
    net, x, y, widths = joined_batch()
    _, grads = train.flatten(net)
    joslim.sandwich_step(net, x[rank::2], y[rank::2], widths)
    world.mean(grads)
    torch.save({"grads": grads, "calls": calls}, f"{out}/{rank}.pt")
    spread = world.spread(torch.arange(5.0)[:, None], 2, lambda a: torch.cat([a, a**2], 1))
    assert spread.tolist() == [[i, i**2] for i in range(5)]
    state = world.from_first(net.state_dict() if rank == 0 else None)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    stored = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in state.values()}
    assert sum(stored.values()) == sum(v.nbytes for v in state.values())  # views of one vector arrive as such
    world.leave()
    assert not torch.distributed.is_initialized()


def joined_batch():
    torch.manual_seed(0)
    net = models.build("resnet8", 6, 16).double().eval()  # eval: BatchNorm's batch statistics aside
    x, y = torch.randn(8, 3, 16, 16).double(), torch.randint(6, (8,))
    return net, x, y, torch.stack([widths_for(net, s, LOWER) for s in range(2)])


def test_two_processes_make_one_gradient(tmp_path):
    port = str(20000 + os.getpid() % 20000)
    torch.multiprocessing.spawn(two_processes, (port, str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    net, x, y, widths = joined_batch()
    _, grads = train.flatten(net)
    joslim.sandwich_step(net, x, y, widths)
    torch.testing.assert_close(one["grads"], grads, rtol=1e-6, atol=1e-10)
    assert torch.equal(one["grads"], two["grads"])
    assert one["calls"] == two["calls"] == [grads.numel()]  # one, of one gradient's size


# ------------------------------------------------------------------------------ data


def write_idx(path, t):
    with gzip.open(path, "wb") as f:
        f.write(struct.pack(">HBB", 0, 8, t.ndim) + struct.pack(f">{t.ndim}I", *t.shape) + t.numpy().tobytes())


def write_data(kind, root, n=96):
    """A small data set in the real one's file format."""
    g = torch.Generator().manual_seed(0)
    images = lambda n, *shape: torch.randint(256, (n, *shape), generator=g, dtype=torch.uint8)  # noqa: E731
    if kind == "fashion-mnist":
        raw = root / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for s, m in (("train", n), ("t10k", 20)):
            write_idx(raw / f"{s}-images-idx3-ubyte.gz", images(m, 28, 28))
            write_idx(raw / f"{s}-labels-idx1-ubyte.gz", (torch.arange(m) % 10).byte())
    elif kind.startswith("cifar"):
        ten = kind == "cifar10"
        folder = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
        folder.mkdir(parents=True)
        files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if ten else ["train", "test"]
        for name in files:
            m = n // 5 + 1 if ten else n
            labels = [i % 10 for i in range(m)]
            entry = {b"data": images(m, 3072).numpy(), b"labels" if ten else b"fine_labels": labels}
            (folder / name).write_bytes(pickle.dumps(entry))
    else:
        from PIL import Image

        for s, m in (("train", n), ("val", 20)):
            for c in ("cat", "dog"):
                (root / s / c).mkdir(parents=True)
                for i in range(m // 2):
                    Image.fromarray(images(1, 40, 50, 3)[0].numpy()).save(root / s / c / f"{i}.jpeg")
    return root


SMALL = ["--device", "cpu", "--epochs", "2", "--batch-size", "32", "--held-out", "16", "--eval-images", "8", "--tau", "1",
         "--num-prior", "3", "--calibrate-images", "16", "--front-size", "4", "--warmup-epochs", "0.5"]  # fmt: skip


def read_front(out):
    with open(Path(out) / "front.csv", newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize("data, arch", [
    ("fashion-mnist", "resnet8"), ("cifar10", "resnet8"), ("cifar100", "resnet20"), ("imagenet", "mbv2"),
    ("fashion-mnist", "mbv2"),
])  # fmt: skip
def test_real_formats_train(data, arch, tmp_path):
    root = write_data(data, tmp_path / "data")
    size = ["--image-size", "32"] if arch == "mbv2" else []
    flags = [*SMALL, "--data", data, "--data-dir", str(root), "--arch", arch, "--workers", "1", *size]
    assert train.main([*flags, "--out", str(tmp_path / "out")]) == 0
    rows = read_front(tmp_path / "out")
    assert list(rows[0]) == ["flops", "params", "memory", "loss", "top1", "top5", "widths"]
    channels, classes = (1, 10) if data == "fashion-mnist" else (3, {"imagenet": 2, "cifar10": 10, "cifar100": 100}[data])
    net = models.build(arch, classes, 28 if data == "fashion-mnist" and not size else 32, channels)
    for row in rows:
        a = torch.tensor([float(w) for w in row["widths"].split()]).double()
        assert abs(net.flops(a).item() - int(row["flops"])) <= 1 and abs(net.memory(a).item() - int(row["memory"])) <= 1
    assert int(rows[-1]["flops"]) == net.flops(1.0).item()
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names - {"front.png"} == {"checkpoint.pt", "checkpoint.previous.pt", "log.jsonl", "front.csv"}


def test_arrays_are_read_as_written(tmp_path):
    root = write_data("fashion-mnist", tmp_path / "f")
    args = train.parse_args(["--data", "fashion-mnist", "--data-dir", str(root)])
    (x, y), (tx, ty), classes = train.load_arrays(args)
    assert x.shape == (96, 1, 28, 28) and x.dtype == torch.uint8 and tx.shape == (20, 1, 28, 28) and classes == 10
    g = torch.Generator().manual_seed(0)
    assert torch.equal(x[:, 0], torch.randint(256, (96, 28, 28), generator=g, dtype=torch.uint8))
    assert y.tolist() == [i % 10 for i in range(96)]
    root = write_data("cifar10", tmp_path / "c")
    args = train.parse_args(["--data", "cifar10", "--data-dir", str(root)])
    theirs = pickle.loads((root / "cifar-10-batches-py" / "data_batch_2").read_bytes())
    (x, y), _, _ = train.load_arrays(args)
    assert torch.equal(x[20:40].flatten(1), torch.as_tensor(theirs[b"data"])) and y[20:40].tolist() == theirs[b"labels"]


def small_data(tmp_path, *flags, size=1):
    args = train.parse_args([*SMALL, *flags])
    world = train.World("cpu")
    world.size = size
    return args, (train.FolderData if args.data == "imagenet" else train.ArrayData)(args, world)


def test_batches_depend_on_seed_epoch_and_image_alone(tmp_path):
    root = write_data("imagenet", tmp_path / "i")
    for flags in (["--data", "imagenet", "--data-dir", str(root), "--image-size", "16"], ["--image-size", "16"]):
        whole = list(small_data(tmp_path, *flags, "--workers", "0")[1].train(1, 0))[:2]
        later = next(iter(small_data(tmp_path, *flags, "--workers", "2")[1].train(1, 1)))  # resumed; other workers
        assert torch.equal(later[0], whole[1][0]) and torch.equal(later[1], whole[1][1])
        _, halves = small_data(tmp_path, *flags, "--workers", "0", size=2)
        parts = []
        for rank in (0, 1):
            halves.world.rank = rank
            parts.append(next(iter(halves.train(1, 0)))[0])
        assert torch.equal(torch.cat(parts), whole[0][0])  # nor on the number of processes
        other = next(iter(small_data(tmp_path, *flags, "--workers", "0")[1].train(0, 0)))
        assert not torch.equal(other[0], whole[0][0])


def test_crops_and_flips_by_a_loop(tmp_path):
    root = write_data("cifar10", tmp_path / "c")
    args, data = small_data(tmp_path, "--data", "cifar10", "--data-dir", str(root))
    x, y = next(iter(data.train(0, 0)))
    order, crop, flip = train.augmentation(args.seed, 0, len(data.x), 4)
    assert flip[order[:32]].any() and not flip[order[:32]].all()
    for k, i in enumerate(order[:32].tolist()):
        top, left = crop[:, i].tolist()
        image = data.x[i, :, top : top + 32, left : left + 32].float()
        image = image.flip(-1) if flip[i] else image
        torch.testing.assert_close(x[k], (image - data.mean) / data.std)
        assert y[k] == data.y[i]


def test_held_out_images_are_training_images_not_trained_on(tmp_path):
    root = write_data("cifar10", tmp_path / "c")
    _, data = small_data(tmp_path, "--data", "cifar10", "--data-dir", str(root))
    kept = {bytes(i[:, 4:-4, 4:-4].contiguous().numpy()) for i in data.x}
    held = {bytes(i.contiguous().numpy()) for i in data.held_x}
    test = {bytes(i.contiguous().numpy()) for i in data.test_x}
    assert len(held) == 16 and not held & kept and not held & test and len(kept | held) == 100


def test_synthetic_is_deterministic():
    one, two = train.synthetic(50, 0), train.synthetic(50, 0)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert not torch.equal(one[0], train.synthetic(50, 1)[0])


# ------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Flags of a run of 8 steps, 6 rounds with a GP among them, on a small file of CIFAR's format."""
    root = write_data("cifar10", tmp_path_factory.mktemp("cifar"))
    return [*SMALL, "--data", "cifar10", "--data-dir", str(root), "--arch", "resnet8", "--image-size", "8",
            "--epochs", "4", "--log-seconds", "0"]  # fmt: skip


@pytest.mark.parametrize("flags", [
    ["--method", "slim"], ["--method", "twostage"], ["--cost", "memory"], ["--cost", "params"], ["--random-lambda"],
    ["--amp"], ["--method", "slim", "--hold-widths", "--tau", "2"], ["--accumulate", "4"],
    ["--proposals", "6", "--visits", "2", "--tau", "2"], ["--no-distillation"],
])  # fmt: skip
def test_methods_and_costs(flags, tiny, tmp_path):
    assert train.main([*tiny, *flags, "--out", str(tmp_path)]) == 0
    rows = read_front(tmp_path)
    column = flags[1] if flags[0] == "--cost" else "flops"
    costs = [int(r[column]) for r in rows]
    assert costs == sorted(costs) and len(rows) >= 2
    uniform = [len(set(r["widths"].split())) == 1 for r in rows]
    assert all(uniform) if "slim" in flags else uniform[-1]
    events = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert events[0]["event"] == "settings" and events[-1]["event"] == "done" and 0 <= events[-1]["search_share"] < 1
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 8


def test_weights_searched_afterwards_and_networks_alone(tiny, tmp_path, capsys):
    """The references of a comparison, and the comparison of them all."""
    out = lambda name: str(tmp_path / name)  # noqa: E731
    for seed in "01":
        assert train.main([*tiny, "--method", "slim", "--cost", "memory", "--seed", seed, "--out", out("slim" + seed)]) == 0
        assert train.main([*tiny, "--seed", seed, "--out", out("joslim" + seed)]) == 0
    slim = ["--weights", out("slim0/checkpoint.pt")]
    assert train.main([*tiny, "--method", "twostage", *slim, "--out", out("searched")]) == 0
    a, b = (torch.load(out(f"{n}/checkpoint.pt"), weights_only=True) for n in ("slim0", "searched"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"]) and b["step"] == 8
    assert train.main([*tiny, "--method", "twostage", "--seed", "1", *slim, "--out", out("x")]) == 2
    assert "--seed 0, not 1" in capsys.readouterr().err  # its held-out images were trained on

    row = read_front(out("joslim0"))[1]
    assert train.main([*tiny, "--method", "alone", "--widths", row["widths"], "--out", out("alone")]) == 0
    (alone,) = read_front(out("alone"))
    assert alone["widths"] == row["widths"] and alone["flops"] == row["flops"]
    net = models.build("resnet8", 10, 8)
    net.set_widths(torch.tensor([float(w) for w in row["widths"].split()]))
    torch.manual_seed(0)
    start = models.build("resnet8", 10, 8).state_dict()
    trained = torch.load(out("alone/checkpoint.pt"), weights_only=True)["model"]
    kept = net.extract().state_dict()["layer3.0.conv2.weight"].shape
    ratio = trained["layer3.0.conv2.weight"] / start["layer3.0.conv2.weight"]
    inside = torch.zeros_like(ratio, dtype=torch.bool)
    inside[tuple(map(slice, kept))] = True
    assert ratio[inside].std() > 1e-3 and ratio[~inside].std() < 1e-6  # what is cut off only decays

    capsys.readouterr()
    names = ["joslim0", "joslim1", "slim0", "slim1", "searched", "alone"]
    assert train.main(["--compare", *map(out, names), "--out", out("picture.png")]) == 0
    text = capsys.readouterr().out
    assert "\nflops:" in text and "\nmemory:" not in text  # slim's line is the same for any cost
    # By a loop over budgets, from the files alone.
    means = {}
    for name in names[:4]:
        rows = [(int(r["flops"]), float(r["top1"])) for r in read_front(out(name))]
        low, full = rows[0][0], rows[-1][0]
        budgets = [low + (full - low) * i / 199 for i in range(200)]
        means[name] = sum([t for f, t in rows if f <= b + 1][-1] for b in budgets) / 200
    for kind in ("joslim", "slim"):
        mean = (means[kind + "0"] + means[kind + "1"]) / 2
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [kind] and "seeds 0 1" in line]
        assert float(line.split()[4]) == pytest.approx(mean, abs=0.011)
    assert "twostage of slim's weights" in text and f"top-1 {float(alone['top1']):.2f}" in text
    assert train.main(["--compare", out("joslim0"), out("nowhere")]) == 2 and "nowhere" in capsys.readouterr().err


def test_a_step_asks_for_no_value(tiny, tmp_path, monkeypatch):
    """Tensors without values raise if one is asked for; on a GPU, that would be to wait for it."""
    run = train.Run(train.parse_args([*tiny, "--out", str(tmp_path)]), train.World("cpu"), None)
    widths, set_widths = list(run.sampler.sample(2)), run.net.set_widths

    def with_values(a):  # widths are on the CPU whatever the device
        with unset_fake_temporarily():
            set_widths(a)

    monkeypatch.setattr(run.net, "set_widths", with_values)
    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
    with FakeTensorMode() as mode:
        run.net._apply(mode.from_tensor)
        run.flat, run.grads = train.flatten(run.net)
        run.optimizer = torch.optim.SGD(run.flat, lr=0.1, momentum=0.9)
        for name in ("x", "y", "mean", "std"):
            setattr(run.data, name, mode.from_tensor(getattr(run.data, name)))
        for x, y in run.data.train(0, 0):
            losses = run.update(x, y, widths)
        assert run.step == run.data.steps and losses.shape == (4,)
        with pytest.raises(DataDependentOutputException):
            losses.sum().item()


def same_run(one, two):
    a, b = (torch.load(Path(p) / "checkpoint.pt", weights_only=True) for p in (one, two))
    for part in ("model", "sampler"):
        assert a[part].keys() == b[part].keys()
        for k in a[part]:
            torch.testing.assert_close(a[part][k], b[part][k], rtol=0, atol=0, equal_nan=True)
    return (Path(one) / "front.csv").read_bytes() == (Path(two) / "front.csv").read_bytes()


def run_until(step, flags, monkeypatch):
    """Stops a run where it saves at this step."""
    save = train.Run.save

    def save_and_stop(run):
        save(run)
        if run.step == step:
            raise train.Stopped("", 15)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "save", save_and_stop)
        assert train.main(flags) == 143


@pytest.mark.parametrize("method", ["joslim", "slim"])
def test_resumed_run_is_the_unbroken_run(method, tiny, tmp_path, monkeypatch):
    flags = [*tiny, "--method", method]
    assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0

    flags += ["--out", str(tmp_path / "parts"), "--resume"]
    for step in (3, 6):  # in the middle of an epoch and of a round's widths; after an epoch
        run_until(step, [*flags, "--save-minutes", "0"], monkeypatch)
    assert train.main(flags) == 0
    assert same_run(tmp_path / "whole", tmp_path / "parts")


@on_a_gpu
def test_a_cpu_run_continues_on_the_gpu(tiny, tmp_path, monkeypatch):
    """Weights, and momentum with them, go on where they were: as on the CPU, but for the GPU's precision."""
    flags, folders = [*tiny, "--method", "slim", "--no-amp"], [tmp_path / d for d in ("cpu", "cuda")]
    run_until(2, [*flags, "--out", str(folders[0])], monkeypatch)  # after the first of four epochs
    shutil.copytree(*folders)

    def weights(folder):
        model = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
        return torch.cat([v.flatten().double() for v in model.values()])

    before = weights(folders[0])
    for device, folder in zip(("cpu", "cuda"), folders):
        assert train.main([*flags, "--out", str(folder), "--resume", "--device", device]) == 0
    there, here = (weights(f) for f in folders)
    assert (there - here).norm() < 0.2 * (here - before).norm()


@pytest.mark.parametrize("flags, word", [
    (["--epochs", "0"], "--epochs"), (["--tau", "0"], "--tau"), (["--num-samples", "0"], "--num-samples"),
    (["--lower", "0"], "--lower"), (["--lower", "1.5"], "--lower"), (["--lr", "-1"], "--lr"), (["--lr", "nan"], "--lr"),
    (["--image-size", "1"], "at least 2"), (["--seed", "9" * 20], str(2**63)), (["--lr", "inf"], "--lr"),
    (["--batch-size", "9000"], "9000"), (["--device", "abacus"], "abacus"), (["--data", "cifar10"], "--data-dir"),
    (["--data", "imagenet", "--data-dir", "/nowhere"], "/nowhere/train"), (["--eval-images", "99999"], "--eval-images"),
    (["--data", "cifar100", "--data-dir", "/nowhere"], "/nowhere"), (["--out", "/proc/no"], "/proc/no"),
    (["--data", "cifar10", "--data-dir", "."], "cifar-10-batches-py"), (["--accumulate", "3"], "--accumulate 3"),
    (["--method", "alone"], "--widths"), (["--method", "alone", "--widths", "1 2"], "--widths"),
    (["--method", "alone", "--widths", "1 2 x 1 1 1"], "--widths"), (["--widths", "1"], "--method alone"),
    (["--method", "slim", "--weights", "/nowhere"], "/nowhere"), (["--weights", "/nowhere"], "--weights is for"),
    (["--hold-widths"], "--hold-widths is for"), (["--smoothing", "1"], "--smoothing"),
    (["--visits", "3"], "--visits 3 is more than --proposals 1"), (["--compare", "/nowhere"], "/nowhere"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_2(flags, word, tmp_path, capsys):
    out = [] if "--out" in flags else ["--out", str(tmp_path / "out")]
    assert train.main([*flags, *out]) == 2
    err = capsys.readouterr().err
    assert word in err and err.count("\n") == 1
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("kind, harm, word", [
    ("imagenet", lambda root: shutil.rmtree(root / "val"), "val is missing"),
    ("imagenet", lambda root: shutil.rmtree(root / "train"), "train is missing"),
    ("imagenet", lambda root: [shutil.rmtree(p) for p in (root / "train").iterdir()], "train"),
    ("imagenet", lambda root: (root / "val" / "dog").rename(root / "val" / "cow"), "cow, dog"),
    ("imagenet", lambda root: [p.unlink() for p in (root / "train" / "dog").iterdir()], "dog"),
    ("fashion-mnist", lambda root: (root / "FashionMNIST/raw/t10k-labels-idx1-ubyte.gz").unlink(), "t10k-labels"),
    ("fashion-mnist", lambda root: (root / "FashionMNIST/raw/train-images-idx3-ubyte.gz").write_bytes(b"x"), "train-images"),
    ("fashion-mnist", lambda root: write_idx(root / "FashionMNIST/raw/train-labels-idx1-ubyte.gz", torch.arange(96).byte()),
     "from 0 to 9"),
    ("fashion-mnist", lambda root: write_idx(root / "FashionMNIST/raw/train-labels-idx1-ubyte.gz", torch.zeros(95).byte()),
     "95 labels"),
    ("cifar10", lambda root: (root / "cifar-10-batches-py/test_batch").write_bytes(b""), "test_batch"),
    ("cifar10", lambda root: shutil.rmtree(root / "cifar-10-batches-py"), "cifar-10-batches-py"),
])  # fmt: skip
def test_bad_data_is_one_line_and_exit_2(kind, harm, word, tmp_path, capsys):
    root = write_data(kind, tmp_path / "data")
    harm(root)
    assert train.main([*SMALL, "--data", kind, "--data-dir", str(root), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert word in err and err.count("\n") == 1
    assert not list((tmp_path / "out").rglob("*.pt"))


def test_more_processes_than_gpus(monkeypatch):
    with pytest.raises(train.UserError, match="GPU 99"):
        train.World("cuda:99")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(train.UserError, match="GPU 1 asked for, this machine has 1"):
        train.World("cuda")


def test_a_folder_in_use(tiny, tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text("not a whole line")
    with open(tmp_path / "log.jsonl") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert train.main([*tiny, "--out", str(tmp_path), "--resume"]) == 2
        assert "in use" in capsys.readouterr().err
    assert (tmp_path / "log.jsonl").read_text() == "not a whole line"
    assert train.main([*tiny, "--method", "slim", "--out", str(tmp_path), "--resume"]) == 0
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[1])["event"] == "settings"


@pytest.mark.parametrize("flags", [["--arch", "vgg"], ["--data", "mnist"], ["--epochs", "many"]])
def test_argparse_errors_exit_2(flags):
    with pytest.raises(SystemExit) as stop:
        train.parse_args(flags)
    assert stop.value.code == 2


def test_existing_runs_are_not_overwritten(tiny, tmp_path, capsys):
    flags = [*tiny, "--epochs", "1", "--out", str(tmp_path)]
    assert train.main(flags) == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert train.main(flags) == 2 and "--resume" in capsys.readouterr().err
    assert train.main([*flags, "--resume", "--tau", "3"]) == 2 and "--tau 1" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_pickles_that_run_code_do_not(tiny, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    root = write_data("cifar10", tmp_path / "c")
    (root / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps({b"data": Evil()}))
    assert train.main(["--data", "cifar10", "--data-dir", str(root), "--out", str(tmp_path / "out")]) == 2
    assert "data_batch_3" in capsys.readouterr().err
    (tmp_path / "out2").mkdir()
    torch.save({"settings": Evil()}, tmp_path / "out2" / "checkpoint.pt")
    assert train.main([*tiny, "--out", str(tmp_path / "out2"), "--resume"]) == 2
    assert "checkpoint.pt" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def damage(path, how):
    raw = bytearray(path.read_bytes())
    if how == "flipped":
        for i in range(500, len(raw) - 500, 97):
            raw[i] ^= 16
    path.write_bytes({"truncated": raw[:-200], "empty": b"", "garbage": os.urandom(5000)}.get(how, raw))


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty", "garbage"])
def test_damaged_checkpoints(how, tiny, tmp_path, capsys):
    flags = [*tiny, "--method", "slim"]
    assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    assert train.main([*flags, "--out", str(tmp_path / "hurt")]) == 0
    damage(tmp_path / "hurt" / "checkpoint.pt", how)
    capsys.readouterr()
    assert train.main([*flags, "--out", str(tmp_path / "hurt"), "--resume"]) == 0  # from the one before
    assert "checkpoint.pt: not a readable" in capsys.readouterr().out
    assert same_run(tmp_path / "whole", tmp_path / "hurt")
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (tmp_path / "hurt" / name).write_bytes((tmp_path / "whole" / "checkpoint.pt").read_bytes())
        damage(tmp_path / "hurt" / name, how)
    before = (tmp_path / "hurt" / "checkpoint.pt").read_bytes()
    assert train.main([*flags, "--out", str(tmp_path / "hurt"), "--resume"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "hurt" / "checkpoint.pt").read_bytes() == before


def test_checkpoints_of_something_else(tmp_path, capsys):
    """Of an older format, of another network, of other data: one line, and nothing is touched."""
    root = write_data("imagenet", tmp_path / "i")
    flags = [*SMALL, "--data", "imagenet", "--data-dir", str(root), "--arch", "resnet8", "--image-size", "16",
             "--workers", "0", "--epochs", "1", "--out", str(tmp_path / "run"), "--resume"]  # fmt: skip
    assert train.main(flags) == 0
    path = tmp_path / "run" / "checkpoint.pt"
    good = torch.load(path, weights_only=True)

    def refused(word, *more):
        before = path.read_bytes()
        capsys.readouterr()
        assert train.main([*flags, *more]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and word in err and path.read_bytes() == before, err

    refused("--arch resnet8, this one mbv2", "--arch", "mbv2")
    for s in ("train", "val"):
        shutil.copytree(root / s / "cat", root / s / "cow")
    refused("'num_classes': 3")
    torch.save(good | {"format": 0}, path)
    refused("its format is 0")
    torch.save({"model": good["model"]}, path)
    refused("not a readable checkpoint (KeyError")
    torch.save({k: v for k, v in good.items() if k != "settings"}, path)
    refused("it lacks settings")
    refused("it lacks settings", "--method", "slim", "--weights", str(path))
    torch.save(good | {"step": good["steps"] - 1}, path)
    refused(f"at step {good['steps'] - 1} of {good['steps']}", "--method", "slim", "--weights", str(path))


def test_divergence_stops_before_the_checkpoint(tiny, tmp_path, capsys):
    assert train.main([*tiny, "--lr", "1e30", "--out", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "learning rate" in err and "step" in err
    for path in tmp_path.glob("*.pt"):
        state = torch.load(path, weights_only=True)
        assert all(v.isfinite().all() for v in state["model"].values())


def test_a_gradient_that_is_not_finite_reaches_no_checkpoint(tiny, tmp_path, capsys, monkeypatch):
    step, steps = train.sandwich_step, []

    def overflow(net, *rest, **how):
        losses = step(net, *rest, **how)
        steps.append(losses)
        if len(steps) == 4:  # the second epoch's last: no later loss betrays it before the weights are saved
            next(net.parameters()).grad[0] = torch.inf
        return losses

    monkeypatch.setattr(train, "sandwich_step", overflow)
    assert train.main([*tiny, "--method", "slim", "--out", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "step 4: a gradient of the full network, widths [" in err and "learning rate" in err
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2 and all(v.isfinite().all() for v in state["model"].values())


def test_a_configuration_that_is_not_finite_is_left_out(tiny, tmp_path, capsys, monkeypatch):
    evaluate = train.evaluate

    def one_bad(net, widths, *rest):
        losses = evaluate(net, widths, *rest)
        losses[:1] = torch.nan
        return losses

    monkeypatch.setattr(train, "evaluate", one_bad)
    assert train.main([*tiny, "--out", str(tmp_path)]) == 0
    assert "of 1 configurations is not finite" in capsys.readouterr().out
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["sampler"]["losses"][0].isnan() and state["sampler"]["widths"].isfinite().all()
    (bad,) = {str(e["widths"]) for e in map(json.loads, open(tmp_path / "log.jsonl")) if e["event"] == "not finite"}
    assert bad == str(state["sampler"]["widths"][:1].tolist())
    monkeypatch.setattr(train, "evaluate", lambda *a: evaluate(*a) * torch.nan)  # but if all are bad
    assert train.main([*tiny, "--out", str(tmp_path / "all")]) == 1
    assert "no configuration's held-out loss is finite" in capsys.readouterr().err


def test_corrupt_image_is_named(tmp_path, capsys):
    root = write_data("imagenet", tmp_path / "i")
    for path in (root / "train").rglob("*.jpeg"):
        path.write_bytes(b"no image")
    for workers in "01":
        flags = [*SMALL, "--data", "imagenet", "--data-dir", str(root), "--arch", "resnet8", "--image-size", "16"]
        assert train.main([*flags, "--workers", workers, "--out", str(tmp_path / workers)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and ".jpeg: not a readable image" in err


def test_torchrun_processes_agree(tiny, tmp_path):
    """Two processes: the run finishes, which includes its own check that weights and history agree."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    flags = [*tiny, "--out", str(tmp_path / "two")]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert len(read_front(tmp_path / "two")) >= 2


# ------------------------------------------------------------------------------ faults, at length


def launch(processes, *options):
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *options]
    return [sys.executable, *(many if processes > 1 else []), "train.py"]


def family(pid):
    """The process and all its descendants."""
    children = (Path("/proc", str(pid), "task", str(pid), "children")).read_text().split()
    return [pid, *(p for c in children for p in family(int(c)))]


def start(command):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(command):
    out, err = (run := start(command)).communicate(timeout=600)
    assert run.returncode == 0, err
    return out


def await_line(run, *starts):
    for line in run.stdout:
        if line.startswith(starts):
            return line
    raise AssertionError(run.stderr.read())


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_saves_and_says_how_to_continue(processes, tiny, tmp_path):
    run = start([*launch(processes), *tiny, "--epochs", "4000", "--out", str(tmp_path / "a b")])
    await_line(run, "epoch")
    asked = time.perf_counter()
    run.terminate()
    _, err = run.communicate(timeout=30)
    assert time.perf_counter() - asked < 10 and run.returncode != 0
    (line,) = [line for line in err.splitlines() if line.startswith("train.py: ")]
    if processes == 1:  # torchrun adds a traceback of its own
        assert run.returncode == 143 and err.count("\n") == 1
    command = shlex.split(line.split("continue with: ")[1])
    assert command[-2:] == [str(tmp_path / "a b"), "--resume"] and "train.py" in command
    assert torch.load(tmp_path / "a b" / "checkpoint.pt", weights_only=True)["step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_25_times(processes, tiny, tmp_path):
    flags = [*tiny, "--epochs", "150", "--tau", "4"]
    finish([*launch(processes), *flags, "--out", str(tmp_path / "whole")])
    # Saving after every step, so that many a kill finds a checkpoint half written.
    command = [*launch(processes), *flags, "--out", str(tmp_path / "killed"), "--resume", "--save-minutes", "0"]
    pauses, found = random.Random(0), []
    for _ in range(25):
        run = start(command)
        found.append(await_line(run, "continuing", "no checkpoint").split()[-1])
        time.sleep(pauses.uniform(0, 0.8))
        assert run.poll() is None, "finished before it could be killed: a longer run is needed"
        for pid in family(run.pid):
            os.kill(pid, signal.SIGKILL)
        run.communicate()
    print(f"{processes} processes: continued from steps {' '.join(found)}")
    finish(command)
    assert same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_a_dead_worker_is_replaced(tiny, tmp_path):
    flags = [*tiny, "--epochs", "400", "--tau", "40", "--save-minutes", "0.01", "--log-seconds", "1"]
    finish([*launch(2), *flags, "--out", str(tmp_path / "whole")])
    run = start([*launch(2, "--max-restarts=4"), *flags, "--out", str(tmp_path / "killed")])
    for rank in "1010":  # one restart each: none to spare
        await_line(run, "epoch")
        _, *workers = family(run.pid)
        rank_of = {p: dict(v.split("=", 1) for v in Path(f"/proc/{p}/environ").read_text().split("\0") if "=" in v)
                   .get("RANK") for p in workers}  # fmt: skip
        (worker,) = [p for p in workers if rank_of[p] == rank]
        os.kill(worker, signal.SIGKILL)
        print(await_line(run, "continuing").strip())
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    assert same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_a_full_disk(tiny, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    if subprocess.run([*mount, "size=1600k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        finish([*launch(1), *tiny, "--out", str(tmp_path / "whole")])
        command = [*launch(1), *tiny, "--out", str(disk / "run"), "--resume"]
        out, err = (run := start(command)).communicate(timeout=100)  # the third checkpoint does not fit
        print(err.strip())
        assert run.returncode == 2 and err.count("\n") == 1 and "checkpoint.pt: could not be written (No space" in err
        step = torch.load(disk / "run" / "checkpoint.pt", weights_only=True)["step"]
        assert 0 < step < 8 and not list(disk.rglob("*.part"))
        for path, piece in ((disk / "rest", bytes(1024)), (disk / "run" / "log.jsonl", b"\n")):  # the log's last page, too
            with open(path, "ab", buffering=0) as f, pytest.raises(OSError):
                while True:
                    f.write(piece)
        _, err = (run := start(command)).communicate(timeout=100)  # now not even the log's next line
        print(err.strip())
        assert run.returncode == 2 and err.count("\n") == 1 and "log.jsonl: could not be written" in err
        assert torch.load(disk / "run" / "checkpoint.pt", weights_only=True)["step"] == step
        (disk / "rest").unlink()
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        finish(command)
        assert same_run(tmp_path / "whole", disk / "run")
    finally:
        subprocess.run(["umount", str(disk)])


def test_readmes_map_points_at_the_lines_it_names():
    import re

    rows = re.findall(r"`(\w+\.py):(\d+)` `([^`]+)`", (ROOT / "README.md").read_text())
    assert len(rows) >= 10
    for file, number, text in rows:
        assert text in (ROOT / file).read_text().splitlines()[int(number) - 1], (file, number, text)
