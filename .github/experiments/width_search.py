#!/usr/bin/env python3
"""Does the search of gp.py find better trade-offs than random points, and how long does a proposal take?

    python .github/experiments/width_search.py

A noisy loss and a known cost of 12 inputs are minimised at once, two proposals a round, each with a
weight of its own between the two. gp.py alone is used: no network, no training.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from gp import GP, chebyshev, optimize_acquisition, ucb  # noqa: E402

DIM, ROUND = 12, 2
generator = torch.Generator().manual_seed(0)


def rand(*shape):
    return torch.rand(shape, generator=generator, dtype=torch.float64)


importance = rand(DIM) ** 3  # the same for all seeds
importance /= importance.sum()


def loss(x):
    """Falls with every input, with some much more than with others."""
    return (importance / (x + 0.3)).sum(-1)


def observed(x):
    return loss(x) + 0.01 * torch.randn(len(x), generator=generator, dtype=torch.float64)


def cost(x):
    return x.square().mean(-1)


def area(x):
    """Mean over budgets from 0 to 1 of the true loss of the best point within each; the cheapest point is given."""
    x = torch.cat([x, torch.zeros(1, DIM, dtype=x.dtype)])
    budgets = torch.linspace(0, 1, 200, dtype=x.dtype)[:, None]
    return torch.where(cost(x) <= budgets, loss(x), torch.inf).amin(1).mean().item()


def propose(x, y, hyper=None):
    """The next round (ROUND, DIM) from a GP on the points x and their losses y, and the GP's hyperparameters."""
    model = GP(x, y, hyper).fit()
    weight = rand(ROUND, 1)

    def scalarized(x):
        low, high = y.aminmax()
        objectives = torch.stack([ucb(*model.posterior(x), beta=0.1) - low, (high - low) * cost(x)], -1)
        return chebyshev(objectives, torch.cat([weight, 1 - weight], -1))

    best, _ = optimize_acquisition(scalarized, 0.0, 1.0, DIM, ROUND, starts=x, generator=generator)
    return best, model.hyper


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {DIM} inputs")
    equal = torch.linspace(0, 1, 100, dtype=torch.float64)[:, None].expand(-1, DIM)
    print(f"area under the front after 100 points: all inputs equal {area(equal):.4f}")
    for seed in range(3):
        generator.manual_seed(seed)
        x, hyper = rand(20, DIM), None
        while len(x) < 100:
            new, hyper = propose(x, observed(x), hyper)
            x = torch.cat([x, new])
        print(f"seed {seed}: this {area(x):.4f}, random search {area(rand(100, DIM)):.4f}")

    for n in (50, 200, 1000):
        x, seconds = rand(n, DIM), []
        _, hyper = propose(x, observed(x))  # in a run, too, a fit starts from the one before
        for _ in range(3):
            start = time.perf_counter()
            propose(x, observed(x), hyper)
            seconds.append((time.perf_counter() - start) / ROUND)
        low, middle, high = sorted(seconds)
        print(f"{n:5} past points: {middle:.3f} s per proposal (median of 3 rounds, {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
