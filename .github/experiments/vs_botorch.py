#!/usr/bin/env python3
"""Joslim's proposals beside the published procedure in BoTorch: how long does one take, whose front is better?

    pip install botorch
    python .github/experiments/vs_botorch.py                     # both questions; BoTorch takes minutes
    python .github/experiments/vs_botorch.py --past 50 --proposals 0
    python .github/experiments/vs_botorch.py --past --seeds 3    # fronts only

Widths and FLOPs are those of mbv2 at 224 x 224 (24 widths); the loss is a known function to which
some widths matter much more than others, observed with noise of standard deviation 0.01. Both see
the same past, start from the same configurations, and draw their targets alike.

The published procedure (the authors' code), for one target cost: a GP on the losses and an additive
one on the costs; bisect lambda, up to ten times, each time minimising the scalarization of both GPs'
upper confidence bounds anew, until the minimiser's cost is within 0.02 of the target.
"""

import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")  # of which BoTorch and what it imports have many

import botorch
import torch
from botorch.acquisition import AcquisitionFunction, UpperConfidenceBound
from botorch.models import SingleTaskGP
from botorch.utils import standardize
from gpytorch.kernels import AdditiveStructureKernel, MaternKernel, ScaleKernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import GammaPrior

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import models  # noqa: E402
from joslim import Joslim, front_area  # noqa: E402

LOWER, PRIOR = 0.42, 20
net = models.build("mbv2", num_classes=1000, image_size=224)
d = net.num_widths
generator = torch.Generator().manual_seed(0)


def rand(*shape):
    return torch.rand(shape, generator=generator, dtype=torch.float64)


importance, power = rand(d) ** 3, 0.5 + 1.5 * rand(d)
importance /= importance.sum()


def loss(a):
    return 1 + (importance * (a**-power - 1)).sum(-1)


def observed(a):
    return loss(a) + 0.01 * torch.randn(len(a), generator=generator, dtype=torch.float64)


def cost(a, relaxed=False):
    return net.flops(a, relaxed) / net.flops(1.0)


class Scalarized(AcquisitionFunction):
    """Minus the augmented Chebyshev scalarization, for BoTorch maximises. Bounds are of standardised values: + 3."""

    weight = 0.5

    def __init__(self, loss, cost):
        super().__init__(loss.model)
        self.loss, self.cost = loss, cost

    def forward(self, x):
        parts = torch.stack([(1 - self.weight) * (self.loss(x) + 3), self.weight * (self.cost(x) + 3)])
        return -(parts.amax(0) + 1e-6 * parts.sum(0))


def published(a, y, target):
    """The next configuration (d,) by the published procedure, from the past a (n, d) with losses y (n,)."""

    def bound(values, wrap=lambda kernel: kernel):
        matern = MaternKernel(nu=2.5, lengthscale_prior=GammaPrior(3.0, 6.0))
        kernel = wrap(ScaleKernel(matern, outputscale_prior=GammaPrior(2.0, 0.15)))
        gp = SingleTaskGP(a, standardize(values[:, None]), covar_module=kernel, outcome_transform=None)
        botorch.fit.fit_gpytorch_mll(ExactMarginalLogLikelihood(gp.likelihood, gp))
        return UpperConfidenceBound(gp, beta=0.1)

    acquisition = Scalarized(bound(y), bound(cost(a), lambda kernel: AdditiveStructureKernel(kernel, num_dims=d)))
    box = torch.tensor([[LOWER] * d, [1.0] * d], dtype=torch.float64)
    low, high = 0.0, 1.0
    for _ in range(10):
        acquisition.weight = (low + high) / 2
        x, _ = botorch.optim.optimize_acqf(acquisition, bounds=box, q=1, num_restarts=5, raw_samples=1000)
        excess = cost(x[0]).item() - target
        if abs(excess) <= 0.02:
            break
        low, high = (acquisition.weight, high) if excess > 0 else (low, acquisition.weight)
    return x[0]


def compare_times(past):
    torch.manual_seed(0)  # of BoTorch's starts
    print(" past     this   BoTorch   seconds per proposal: median of 3 rounds of 2; mean of 2")
    for n in past:
        a = LOWER + (1 - LOWER) * rand(n, d)
        a[: n // 3] = a[: n // 3, :1]  # a third of them uniform, as early in a run
        y, ours, theirs = observed(a), [], []
        for seed in range(3):
            sampler = Joslim(d, cost, LOWER, PRIOR, seed=seed)
            sampler.widths, sampler.losses = a, y
            start = time.perf_counter()
            sampler.sample(2)
            ours.append((time.perf_counter() - start) / 2)
        for target in (0.4, 0.7):
            start = time.perf_counter()
            published(a, y, target)
            theirs.append(time.perf_counter() - start)
        ours, theirs = statistics.median(ours), statistics.mean(theirs)
        print(f"{n:5} {ours:8.3f} {theirs:9.2f}   {theirs / ours:.0f} times", flush=True)


def compare_fronts(proposals, seeds):
    ends = torch.tensor([[LOWER], [1.0]], dtype=torch.float64).expand(-1, d)
    smallest = cost(ends[0]).item()

    def tell(name, seed, a):
        a = torch.cat([ends, a])  # every front has them
        print(f"seed {seed}: {name:8} {front_area(loss(a), cost(a)) / (1 - smallest):.4f}", flush=True)

    print(f"mean over budgets of the best true loss within each; {PRIOR} uniform widths, {proposals} proposals")
    tell("uniform", "any", torch.linspace(LOWER, 1, PRIOR + proposals, dtype=torch.float64)[:, None].expand(-1, d))
    for seed in range(seeds):
        generator.manual_seed(seed)  # of the noise
        torch.manual_seed(seed)  # of BoTorch's starts
        sampler = Joslim(d, cost, LOWER, PRIOR, seed=seed)
        a = sampler.sample(PRIOR)
        while len(sampler.widths) <= PRIOR + proposals:  # the full network has joined
            sampler.observe(observed(sampler.widths))
            sampler.sample(2)
        tell("this", seed, sampler.widths)
        tell("random", seed, LOWER + (1 - LOWER) * rand(PRIOR + proposals, d))
        a = torch.cat([a, ends[1:]])
        for _ in range(proposals):
            a = torch.cat([a, published(a, observed(a), smallest + (1 - smallest) * rand().item())[None]])
        tell("BoTorch", seed, a)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--past", type=int, nargs="*", default=[50, 200, 500], metavar="N", help="(default: %(default)s)")
    p.add_argument("--proposals", type=int, default=60, help="for the fronts; 0 for none (default: %(default)s)")
    p.add_argument("--seeds", type=int, default=3, help="for the fronts (default: %(default)s)")
    args = p.parse_args()
    versions = f"torch {torch.__version__}, BoTorch {botorch.__version__}"
    print(f"mbv2, {d} widths; {versions}, {torch.get_num_threads()} threads")
    if args.past:
        compare_times(args.past)
    if args.proposals:
        compare_fronts(args.proposals, args.seeds)
