#!/usr/bin/env python3
"""What would two simpler forms cost: the GP's gradient by autograd, a target cost met by bisection alone?

    python .github/experiments/simpler.py

gp.py writes its objective's gradient by hand, and joslim.py ends eight bisections with a Newton step that
carries value and gradient. Both could be shorter. This times the shorter forms in a round of two proposals for
mbv2's 24 widths, as a run makes them (a fit starts from the last round's), and shows that results agree.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import gp  # noqa: E402
import joslim  # noqa: E402
import models  # noqa: E402

ROUNDS = 9
net = models.build("mbv2", num_classes=1000, image_size=224)
full = net.flops(1.0)


class AutogradGP(gp.GP):
    def _objective(self, hyper, x, z):
        """The same value as three lines, differentiated by torch."""
        with torch.enable_grad():
            h = hyper.detach().requires_grad_()
            u, n, one = x / h[:-1].exp(), len(z), torch.ones_like(z)
            k = gp.matern52(gp.distance(u, u)).fill_diagonal_(0) + torch.eye(n).double() * (1 + h[-1].exp() + 1e-8)
            chol = torch.linalg.cholesky(k)
            solved = torch.cholesky_solve(torch.stack([one, z], 1), chol)
            mean = solved[:, 1].sum() / solved[:, 0].sum()
            variance = ((z - mean) @ (solved[:, 1] - mean * solved[:, 0]) + 2) / (n + 2)
            gap = (h - self.prior_mean) / self.prior_std
            value = (n + 2) / 2 * variance.log() + chol.diagonal().log().sum() + gap.square().sum() / 2 + h[:-1].sum()
            (grad,) = torch.autograd.grad(value, h)
        return value.detach(), grad


class Bisecting(joslim.Joslim):
    def project_to_cost(self, a, target):
        with torch.no_grad():
            low, high = (torch.full_like(a[..., :1], s * (1 - self.lower)) for s in (-1, 1))
            for _ in range(20):
                shift = (low + high) / 2
                below = self.cost(self.box(a + shift), relaxed=True)[..., None] < target[..., None]
                low, high = torch.where(below, shift, low), torch.where(below, high, shift)
        if a.requires_grad:  # a term that is 0, with the implicit function theorem's gradient
            with torch.enable_grad():
                cost = self.cost(self.box(a + shift), relaxed=True)[..., None]
                (grad,) = torch.autograd.grad(cost.sum(), a, retain_graph=True)
                shift = shift - (cost - cost.detach()) / grad.sum(-1, keepdim=True).clamp_min(1e-9)
        return self.box(a + shift)


def seconds_of_a_round(kind, surrogate, n):
    """-> the median of a round's seconds, and the first round's proposals."""
    g = torch.Generator().manual_seed(0)
    widths = 0.42 + 0.58 * torch.rand(n, net.num_widths, generator=g, dtype=torch.float64)
    losses = widths.pow(-1).mean(1)
    sampler = kind(net.num_widths, lambda a, relaxed=False: net.flops(a, relaxed) / full)
    joslim.GP, seconds, first = surrogate, [], None
    for _ in range(ROUNDS + 1):
        sampler.widths, sampler.losses = widths, losses + 0.01 * torch.randn(n, generator=g, dtype=torch.float64)
        start = time.perf_counter()
        new = sampler.sample(2)
        seconds.append(time.perf_counter() - start)
        first = new if first is None else first
    return statistics.median(seconds[1:]), first  # the first fit starts from nothing


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"mbv2, 24 widths, torch {torch.__version__}, {torch.get_num_threads()} threads; rounds of two, median of {ROUNDS}")
    for n in (50, 200, 500):
        base, proposals = seconds_of_a_round(joslim.Joslim, gp.GP, n)
        for name, kind, surrogate in (("autograd", joslim.Joslim, AutogradGP), ("bisection alone", Bisecting, gp.GP)):
            seconds, other = seconds_of_a_round(kind, surrogate, n)
            print(f"{n:4} past: {base:.3f} s as it is, {seconds:.3f} s with {name}, ratio {seconds / base:.2f}; "
                  f"proposals differ by {(other - proposals).abs().max():.1e} at most")  # fmt: skip


if __name__ == "__main__":
    main()
