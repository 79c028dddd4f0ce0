#!/usr/bin/env python3
"""What share of a run on GPUs does the width search take, in every recipe, on one process and on eight?

    python .github/experiments/search_share.py          # no GPU; a minute of one core

Counted, by code: the launches of an evaluation of one configuration and of a training step (operations that torch dispatches
on the CPU, but for views and the widths' arithmetic; a convolution's backward pass is two); the evaluations of a whole run,
its history growing by the sampler's own rules.
Measured, on an H100, by gpu.py (results/gpu.txt): images/s of five cases. They give microseconds a launch by Python and in a
CUDA graph (resnet56's, where the GPU is idle most), and seconds a multiply-accumulate where kernels take longer than that.
Measured here, on a CPU: seconds of a proposal.
Extrapolated: all minutes and shares. A step or an evaluation takes its launches' time or its multiply-accumulates', whichever
is longer; a round's first four steps are launched by Python, the others replayed (none with fresh widths); loading, messages
between processes and convolution plans take nothing.

Sharing images: as it was, each process evaluates all configurations on its share of the images. Sharing configurations: as
it is. On one process both are the same. Two forms that are not built: a graph for each configuration; and all configurations
in one pass of the full network (one_pass.py), at the least, as if the pass took nothing but its multiply-accumulates.
"""

import argparse
import itertools
import math
import re
import sys
import time
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import models  # noqa: E402
from joslim import Joslim, UniformWidths, evaluate, sandwich_step  # noqa: E402
import train  # noqa: E402

# Each recipe with the defaults that it leaves as they are.
RECIPES = {key: vars(train.parse_args(["--data", key[0], "--arch", key[1], *(["--data-dir", "."] if key[0] != "synthetic" else [])]))
           for key, recipe in train.RECIPES.items() if not callable(recipe)}  # fmt: skip

# Training images, held-out ones among them; channels; classes. Of emnist the balanced part.
DATA = {"synthetic": (16384 + 1000, 3, 60), "fashion-mnist": (60000, 1, 10), "kmnist": (60000, 1, 10),
        "emnist": (112800, 1, 47), "cifar10": (50000, 3, 10), "cifar100": (50000, 3, 100),
        "imagenet": (1281167, 3, 1000)}  # fmt: skip
# gpu.py's cases in gpu.txt's order: network, image size, images, divisor.
CASES = (("resnet20", 32, 1024, 1), ("resnet56", 32, 128, 1), ("resnet18", 224, 256, 8), ("mbv2", 224, 256, 8),
         ("mbv2", 224, 128, 8))  # fmt: skip
BY_PYTHON, GRAPH = "bf16, channels_last", "bf16, channels_last, graph"
LAUNCHED = 4  # steps of a round before the graph is there: three, and the recording


class Launches(TorchDispatchMode):
    """Counts operations that would launch a kernel. Float64 is the widths' arithmetic, on the CPU."""

    none = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view", "lift_fresh"}
    several = {"convolution_backward": 2}  # one for the data's gradient, one for the weight's
    count = 0

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        out = fn(*args, **(kwargs or {}))
        name = fn._schema.name.removeprefix("aten::")
        if not (fn.is_view or name in self.none or isinstance(out, torch.Tensor) and out.dtype == torch.float64):
            self.count += self.several.get(name, 1)
        return out


def count_launches(net, subnets, lower):
    """-> launches of one configuration's evaluation, and of a step, in bf16."""
    net.to(memory_format=torch.channels_last).train()
    x = torch.randn(2, *net.image).to(memory_format=torch.channels_last)
    y = torch.zeros(2, dtype=torch.int64)
    widths = lower + (1 - lower) * torch.rand(subnets, net.num_widths, dtype=torch.float64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, foreach=True)  # the form it takes on a GPU
    counts = []
    for work in (
        lambda: evaluate(net, widths[:1], x, y, True),
        lambda: (optimizer.zero_grad(), sandwich_step(net, x, y, widths, lower, amp=True), optimizer.step()),
    ):
        work()  # a first step makes momentum's buffers
        with Launches() as launches:
            work()
        counts.append(launches.count)
    return counts


def step_flops(net, subnets, lower):
    """Multiply-accumulates of a step for one image: backward twice forward's. Widths as drawn evenly from [lower, 1]."""
    widths = lower + (1 - lower) * torch.rand(100, net.num_widths, dtype=torch.float64)
    return 3 * (net.flops(1.0) + net.flops(lower) + subnets * net.flops(widths).mean()).item()


class Rates:
    """Seconds, by what results/gpu.txt has of an H100."""

    def __init__(self):
        text = (Path(__file__).parent / "results" / "gpu.txt").read_text().split("--- second")[1]
        rows = re.findall(r"^(resnet\d+|mbv2) +(\S.*?)  +(\d+) .*?([\d.]+)%", text, re.M)
        self.cases, turn = [], {}
        for arch, form, speed, idle in rows:
            turn[arch, form] = turn.get((arch, form), 0) + 1
            case = [c for c in CASES if c[0] == arch][turn[arch, form] - 1]
            if form in (BY_PYTHON, GRAPH):
                net = models.build(arch, 1000, case[1], divisor=case[3])
                launches = count_launches(net, 2, 0.42)[1]
                flops = case[2] * step_flops(net, 2, 0.42)
                self.cases.append((case, form, case[2] / float(speed), float(idle), launches, flops))
        seconds = {(case[0], case[2], form): (s, launches, flops) for case, form, s, _, launches, flops in self.cases}
        s, launches, _ = seconds["resnet56", 128, BY_PYTHON]
        self.by_python = s / launches
        s, launches, _ = seconds["resnet56", 128, GRAPH]
        self.in_graph = s / launches
        graphs = {key: value for key, value in seconds.items() if key[1] >= 256 and key[2] == GRAPH}  # whose GPU is busy
        self.flop = {arch: s / flops for (arch, _, _), (s, _, flops) in graphs.items()}

    def seconds(self, arch, launches, flops, graph=False):
        per_flop = self.flop.get(arch, self.flop["resnet20"])
        return max(launches * (self.in_graph if graph else self.by_python), flops * per_flop)


class Rules(Joslim):
    """A history that grows by Joslim's rules, without a GP: its proposals' costs are those of uniform networks."""

    def propose(self, m):
        return UniformWidths.sample(self, m)


def histories(sampler, steps, tau, per_round, keep):
    """How many configurations each round evaluates; the history at the end."""
    counts = []
    for _ in range(0, steps, tau):
        counts.append(len(sampler.widths) if sampler.ready else 0)
        sampler.sample(per_round, keep)
    return counts


def proposing(net, r, counts, per_round):
    """Seconds of all rounds' proposals on this CPU: timed at some histories, straight lines between them."""
    ratio = lambda a, relaxed=False: net.flops(a, relaxed) / net.flops(1.0)  # noqa: E731
    sizes, times = sorted({max(counts) // k or 1 for k in (1, 2, 5, 20)}), []
    for n in sizes:
        sampler = Joslim(net.num_widths, ratio, r["lower"], num_prior=1)
        sampler.widths = UniformWidths(net.num_widths, r["lower"]).sample(n)
        sampler.losses = 1 + (sampler.widths**-1.5 - 1).mean(1) + 0.01 * torch.rand(n, dtype=torch.float64)
        once = []
        for _ in range(3):
            start = time.perf_counter()
            sampler.sample(per_round, r["subnets"])
            once.append(time.perf_counter() - start)
        times.append(sorted(once)[1])

    def between(n):
        k = next((k for k, size in enumerate(sizes) if size >= n), len(sizes) - 1)
        low = max(k - 1, 0)
        rise = (times[k] - times[low]) / max(sizes[k] - sizes[low], 1)
        return times[low] + max(n - sizes[low], 0) * rise

    return sum(between(n) for n in counts if n)


def count(data, arch, r):
    """What a run does, whatever it runs on."""
    images, channels, classes = DATA[data]
    net = models.build(arch, classes, r["image_size"], in_channels=channels, divisor=r["divisor"])
    steps = r["epochs"] * ((images - r["held_out"]) // r["batch_size"])
    per_round = r["subnets"] * (r["tau"] if r["fresh_widths"] else 1)
    sampler = Rules(net.num_widths, lambda a, **_: net.flops(a) / net.flops(1.0), r["lower"], r["num_prior"])
    counts = histories(sampler, steps, r["tau"], per_round, r["subnets"])
    visited, m = len(sampler.widths), r["subnets"]
    sizes = range(visited, visited + min(visited, train.FINAL), m)  # of the history on finished weights, each of it judged once
    by_python = sum(min(LAUNCHED, steps - s, r["tau"]) for s in range(0, steps, r["tau"]))
    return dict(zip(("launches", "step_launches"), count_launches(net, r["subnets"], r["lower"])), arch=arch, steps=steps,
                by_python=steps if r["fresh_widths"] else by_python, counts=counts, history=len(sampler.widths),
                flops=net.flops(sampler.widths).mean().item(), full=net.flops(1.0).item(),
                step_flops=r["batch_size"] * step_flops(net, r["subnets"], r["lower"]),
                after=[m] * len(sizes),
                proposals=proposing(net, r, counts, per_round) + proposing(net, r, list(sizes), m))  # fmt: skip


def passes(run, processes):
    """Evaluations of one configuration that a process launches, where processes share images and where configurations."""
    return sum(run["counts"]), sum(math.ceil(n / processes) for n in run["counts"])


def minutes(run, r, processes, rates):
    """-> of steps, proposals, the search of the finished weights; of evaluations, by form."""
    arch, launches, n = run["arch"], run["launches"], r["eval_images"]
    shape = arch, run["step_launches"], run["step_flops"] / processes
    steps = run["by_python"] * rates.seconds(*shape) + (run["steps"] - run["by_python"]) * rates.seconds(*shape, graph=True)
    judged = math.ceil(run["history"] / processes) + sum(math.ceil(m / processes) for m in run["after"])
    end = judged * math.ceil(r["held_out"] / 256) * rates.seconds(arch, launches, 256 * run["flops"])
    all_, share = passes(run, processes)
    evaluations = {
        "images": all_ * rates.seconds(arch, launches, n / processes * run["flops"]),
        "configurations": share * rates.seconds(arch, launches, n * run["flops"]),
        "graphs": share * rates.seconds(arch, launches, n * run["flops"], graph=True),
        "one pass": share * rates.seconds(arch, 0, n * run["full"]),
    }
    return steps / 60, run["proposals"] / 60, end / 60, {form: s / 60 for form, s in evaluations.items()}


def print_rates(rates):
    print(
        "measured on an H100 (gpu.txt), its launches counted, and what the rates below make of it:\n"
        "network   images  form                          idle  launches  ms a step  by rates  us a launch"
    )
    for (arch, _, images, _), form, s, idle, launches, flops in rates.cases:
        model = rates.seconds(arch, launches, flops, form == GRAPH)
        print(f"{arch:9} {images:6}  {form:28} {idle:5.1f}% {launches:8} {1e3 * s:10.1f} {1e3 * model:9.1f} "
              f"{1e6 * s / launches:12.1f}")  # fmt: skip
    flops = ", ".join(f"{arch} {1e-12 / s:.1f}" for arch, s in rates.flop.items())
    print(f"rates: {1e6 * rates.by_python:.1f} us a launch by Python, {1e6 * rates.in_graph:.1f} in a graph; "
          f"multiply-accumulates a second, millions of millions: {flops}")  # fmt: skip
    # The one whole run that gpu.txt has: python train.py --arch resnet20 --epochs 2 --no-fresh-widths --amp
    recipe = RECIPES["synthetic", "resnet8"] | dict(epochs=2, fresh_widths=False)
    steps, proposals, end, evaluations = minutes(count("synthetic", "resnet20", recipe), recipe, 1, rates)
    search = proposals + end + evaluations["configurations"]
    print("a whole run of resnet20, measured: 10 s with its front's test, of which search 18.8% = 1.9 s; without it "
          f"by rates {60 * (steps + search):.1f} s, search {60 * search:.1f} s")  # fmt: skip


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rates = Rates()
    print_rates(rates)
    runs = {key: count(*key, recipe) for key, recipe in RECIPES.items()}

    print(
        "\ncounted\n"
        "                                          launches of  evaluations by a process  its launches, millions, by\n"
        "                        pro-         his-  an eva-  a    sharing:                  evaluations, sharing:\n"
        "data          network  cesses rounds tory luation step    images configurations  images configurations steps"
    )
    for ((data, arch), run), k in itertools.product(runs.items(), (1, 8)):
        before, after = passes(run, k)
        launches, step = run["launches"], run["step_launches"]
        print(
            f"{data:13} {arch:9} {k:5} {len(run['counts']):6} {run['history']:4} {launches:7} {step:5} {before:9,} "
            f"{after:14,} {before * launches / 1e6:8.2f} {after * launches / 1e6:14.2f} {run['steps'] * step / 1e6:6.1f}"
        )

    print(
        "\nextrapolated, by the rates above\n"
        "                        pro-  minutes:  propo-   the  evaluations, sharing:  search's share, sharing:   were it in\n"
        "data          network  cesses    steps   sals  front   images configurations  images configurations graphs one pass"
    )
    for ((data, arch), run), k in itertools.product(runs.items(), (1, 8)):
        steps, proposals, end, evaluations = minutes(run, RECIPES[data, arch], k, rates)
        shares = [(s + proposals + end) / (s + proposals + end + steps) for s in evaluations.values()]
        before, after, graphs, one = shares
        print(f"{data:13} {arch:9} {k:5} {steps:9.2f} {proposals:6.2f} {end:6.2f} {evaluations['images']:8.2f} "
              f"{evaluations['configurations']:14.2f} {before:7.1%} {after:14.1%} {graphs:6.1%} {one:8.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
