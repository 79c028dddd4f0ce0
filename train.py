#!/usr/bin/env python3
"""Train a slimmable network and find the widths at which it is best for every compute budget.

    python train.py                                      # synthetic images, resnet8, CPU, a minute
    python train.py --data cifar100 --data-dir DIR       # resnet56 on one GPU
    torchrun --nproc_per_node=8 train.py --arch mbv2 --data imagenet --data-dir DIR
    torchrun --nnodes=2 --node_rank=R --master_addr=HOST --nproc_per_node=8 train.py ...  # on each of two nodes
    python train.py --out RUN --export 0.5               # the finished run's best network within half of the cost, as a file

Written under --out: checkpoint.pt, log.jsonl, front.csv, front.pt (`models.load` reads it) and, where matplotlib is
installed, front.png.

This file in order: recipes; `train`, the loop; `find_front` and `test_front`; `main`; then what
those need: arguments, processes, data, files, the run's state.
"""

import argparse
import csv
import hashlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import shlex
import signal
import struct
import sys
import tempfile
import textwrap
import threading
import time
import zipfile
from collections import Counter, deque
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageCms, ImageOps  # torchvision's own
from torch.utils._pytree import tree_map_only
from torchvision.transforms import v2 as transforms

import models
from joslim import Joslim, RandomWidths, UniformWidths
from joslim import calibrate_bn, evaluate, pareto_front, sandwich_step, shortlist

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ------------------------------------------------------------------------------ recipes

# Each entry is a default that the flag of its name overrules (`candidates` has none). The first
# network of a data set is its default; any other that is not listed takes the first one's recipe.
# `lr` is for batches of 256.

COMMON = dict(
    subnets=2,             # M: sub-networks a step, besides the full and the smallest
    fresh_widths=False,    # M proposals for each step of a round, not M for all of them
    num_prior=20,          # n0: widths, each one for all layers, before the GP's first proposal
    beta=0.1,              # the acquisition's optimism
    lower=0.42,            # w0: the smallest width
    warmup_epochs=5.0,
    label_smoothing=0.0,
    distillation=True,
    eval_images=512,       # on which a round re-evaluates the history
    calibrate_images=2048, # for BatchNorm's statistics before a test
    candidates=60,         # configurations judged on the whole held-out split at the end
    front_size=20,         # configurations tested, at most
    augment="none",        # of training images
    flip=False,
    divisor=1,             # of channel counts
)  # fmt: skip
# The paper visits 1000 configurations: 200 epochs of 351 steps, two every 140.
CIFAR = COMMON | dict(
    epochs=200, batch_size=128, lr=0.1, weight_decay=5e-4, tau=140, held_out=5000, eval_images=80, image_size=32,
    augment="shift", flip=True,
)  # fmt: skip
# Multiples of 8 suit tensor cores, and make so few convolution shapes that cuDNN's plans for them stay in its cache.
IMAGENET = COMMON | dict(
    epochs=250, batch_size=1024, lr=0.125, weight_decay=4e-5, tau=625, held_out=10000, label_smoothing=0.1, image_size=224,
    augment="imagenet", flip=True, divisor=8,
)  # fmt: skip
# For two CPU cores. One sub-network a step: so short a training learns less with two.
SYNTHETIC = COMMON | dict(
    epochs=8, batch_size=64, lr=0.5, weight_decay=5e-4, tau=48, held_out=1000, image_size=16, subnets=1, fresh_widths=True,
    num_prior=8, lower=0.125, warmup_epochs=0.5, eval_images=64, calibrate_images=512, candidates=32, front_size=12,
    augment="shift",
)  # fmt: skip
SMALL = COMMON | dict(
    epochs=4, batch_size=32, lr=0.5, weight_decay=5e-4, tau=150, held_out=2500, image_size=28, subnets=1,
    warmup_epochs=0.2, eval_images=125, calibrate_images=1024, candidates=24, front_size=16,
)  # fmt: skip
RECIPES = {
    ("synthetic", "resnet8"): SYNTHETIC,
    # Its last maps are 1 x 1, where BatchNorm averages over images alone: 256 leave 32 to each of 8 processes.
    ("synthetic", "mbv2"): SYNTHETIC | dict(epochs=5, batch_size=256, lr=0.05, tau=32, eval_images=128, lower=0.25,
                                            image_size=32, fresh_widths=False),
    ("fashion-mnist", "resnet8"): SMALL,
    ("fashion-mnist", "mbv2"): SMALL | dict(lr=0.05),
    ("kmnist", "resnet8"): SMALL,
    ("emnist", "resnet8"): SMALL,
    ("cifar10", "resnet56"): CIFAR,
    ("cifar100", "resnet56"): CIFAR,
    ("imagenet", "mbv2"): IMAGENET,
    ("imagenet", "resnet18"): IMAGENET | dict(epochs=100, tau=250),
}

# ------------------------------------------------------------------------------ the loop


def train(run: "Run") -> None:
    """Joslim, the paper's algorithm 2: every tau steps a round proposes widths, every step trains some of them."""
    args, world, data, net, sampler = run.args, run.world, run.data, run.net, run.sampler
    # The same loop is `slim` (one width for all layers) and `twostage` (one for each), drawn at random before every step:
    # rounds of one step.
    tau = args.tau if args.method == "joslim" else 1
    # M proposals a round, which all its steps train; with --fresh-widths M for each step, of which the first M join the history.
    per_round = args.subnets * (tau if args.fresh_widths else 1)

    @Replay  # a CUDA graph of each step whose widths come again: faster, the same numbers; nothing on a CPU
    def add_gradients(x, y, widths):
        """The full network learns from the labels; M proposals and the smallest network from the full one's softmax. (With
        --no-distillation all learn from the labels.) Their gradients add up in `net` -> losses (M + 2,), in that order."""
        run.optimizer.zero_grad()
        parts = zip(x.chunk(args.accumulate), y.chunk(args.accumulate))
        losses = [
            sandwich_step(net, *part, widths, args.lower, label_smoothing=args.label_smoothing, amp=args.amp,
                          scale=1 / args.accumulate, distill=args.distillation) for part in parts
        ]  # fmt: skip
        return torch.stack(losses).mean(0)

    for epoch in range(run.step // data.steps, args.epochs):
        for x, y in run.loading(data.train(epoch, run.step % data.steps)):  # this process's share of each batch

            # A round: which widths to train until the next one
            if run.step % tau == 0:
                with run.searching():  # whose time is counted
                    if sampler.ready:  # once the first n0 are drawn; never for random samplers, which use no losses
                        # 1. Re-evaluate all of the history under today's weights, on images held out from training: each
                        # round takes the next --eval-images of them, round and round. Processes share the configurations.
                        images, labels = data.held_out(run.step // tau)
                        run.observe(world.map(lambda some: evaluate(net, some, images, labels, args.amp), sampler.widths))
                    # 2. Fit a GP to these losses, 3. propose (until ready, draw at random), 4. append the first M proposals to
                    # the history (more would be too many to re-evaluate): joslim.py's `Joslim.sample`, on process 0 for all.
                    run.proposals = world.propose(sampler, per_round, keep=args.subnets)

            # A step. `average_gradients` is the one message between processes: gradients, whose mean all take, and whether a
            # signal asked any of them to stop.
            turns = run.proposals.split(args.subnets)  # one, unless --fresh-widths
            widths = turns[run.step % len(turns)]
            losses = add_gradients(x, y, widths)
            world.average_gradients(net)
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate(run.step, data.steps, args)
            run.optimizer.step()
            run.step += 1

            # Now and then a progress line, a checkpoint; the end, of all processes alike, where one was asked to stop.
            run.after_step(epoch, widths, losses)


def learning_rate(step: int, steps_per_epoch: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then linear decay to zero; the peak scales with the batch."""
    total, warm = args.epochs * steps_per_epoch, args.warmup_epochs * steps_per_epoch
    warm = min(warm, total / 2)
    peak = args.lr * args.batch_size / 256
    return peak * min((step + 1) / max(warm, 1), (total - step) / (total - warm))


def make_optimizer(net: torch.nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """SGD with momentum. Vectors, which are BatchNorm's parameters and biases, do not decay."""
    matrices, vectors = ([p for p in net.parameters() if (p.ndim > 1) == several] for several in (True, False))
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=args.lr, momentum=0.9)


# ------------------------------------------------------------------------------ the front


def find_front(run: "Run") -> torch.Tensor:
    """The configurations to test (k, d), by rising cost: non-dominated on the whole held-out split."""
    args, world, net = run.args, run.world, run.net
    count = max(args.candidates, args.front_size)
    uniform = torch.linspace(args.lower, 1, count, dtype=torch.float64)[:, None].expand(-1, net.num_widths)
    if args.method == "slim":
        candidates = uniform
    else:
        sampler = search(run) if args.method == "twostage" else run.sampler
        # Those nearest the front by the last round's losses; the ones that no round has judged yet come along.
        near = shortlist(sampler.losses, run.cost(sampler.widths), count)
        candidates = torch.cat([uniform[[0, -1]], sampler.widths[near]])  # the two trained at every step, in any case

    def held_out_losses(some):
        batches = run.data.batches("held-out")
        return sum(evaluate(net, some, x, y, args.amp) * len(x) for x, y in batches) / args.held_out

    cost, loss = run.cost(candidates), world.map(held_out_losses, candidates)
    ranked = loss.clone()
    ranked[cost.argmax()] = -torch.inf  # the full network ends the front, whatever the noise says
    front = thin(pareto_front(ranked, cost), cost, args.front_size)
    if args.cost == "latency":  # so far by the fit; measured, it must rise as well
        times = models.time_networks(net, candidates[front], **timing(args)).amin(1) if world.rank == 0 else None
        times = world.from_first(times)
        rising = pareto_front(ranked[front], times)
        front, run.milliseconds = front[rising], times[rising]
    run.log("front", cost=cost[front].tolist(), held_out_loss=loss[front].tolist(), candidates=len(loss))
    return candidates[front]


def search(run: "Run") -> Joslim:
    """The two-stage method's second: the same rounds with the weights frozen, as many as Joslim has."""
    sampler, (x, y) = run.joslim_sampler(), run.data.held_out(0)
    for _ in range(run.rounds):
        new = sampler.losses.isnan().nonzero()[:, 0]  # not judged yet; the others' losses cannot have changed
        losses = run.world.map(lambda some: evaluate(run.net, some, x, y, run.args.amp), sampler.widths[new])
        sampler.observe(losses, new)
        run.world.propose(sampler, run.args.subnets)
    return sampler


def thin(front: torch.Tensor, cost: torch.Tensor, size: int) -> torch.Tensor:
    """At most `size` of the front's indices, the nearest to evenly spaced logarithms of the cost, ends included."""
    if len(front) <= size:
        return front
    rise = cost[front].log()  # half the cost is as much of a step to a small device as to a large one
    grid = torch.linspace(rise[0], rise[-1], size, dtype=rise.dtype)
    return front[(rise - grid[:, None]).abs().argmin(1).unique()]


@torch.no_grad()
def test_front(run: "Run", front: torch.Tensor) -> dict[str, torch.Tensor]:
    """The columns of front.csv for the configurations (k, d), among them test loss, top-1 and top-5 (%); and BatchNorm's
    statistics for each (k, s).

    BatchNorm is calibrated for each on training images; then each is a plain network.
    """
    args, net, data = run.args, run.net, run.data

    def scores(some):
        images, plain, statistics = [x for x, _ in data.batches("calibrate")], [], []
        for a in some:
            net.set_widths(a)
            calibrate_bn(net, images)
            statistics.append(models.get_statistics(net))
            plain.append(net.extract().eval())
        total, count = torch.zeros(len(some), 3, dtype=torch.float64, device=run.world.device), 0
        for x, y in data.batches("test"):  # once for all: loading may cost more than the networks
            count += len(y)
            for one, row in zip(plain, total):
                logits = one(x)
                hits = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
                row += torch.stack([F.cross_entropy(logits, y, reduction="sum"), 100 * hits[:, 0].sum(), 100 * hits.sum()])
        return torch.cat([total / count, torch.stack(statistics)], 1)

    run.say(f"testing {len(front)} configurations of the front")
    size = len(models.get_statistics(net))
    loss, top1, top5, statistics = run.world.map(scores, front, 3 + size).split([1, 1, 1, size], 1)
    columns = {cost: getattr(net, cost)(front) for cost in COSTS}
    if args.cost == "latency":
        columns["latency"] = run.milliseconds
    error = (top1 * (100 - top1).clamp_min(0) / len(data.test_set)).sqrt()  # of a share of so many images
    columns |= {"loss": loss[:, 0], "top1": top1[:, 0], "top1_stderr": error[:, 0], "top5": top5[:, 0]}
    return columns | {"widths": front, "statistics": statistics.float()}


# ------------------------------------------------------------------------------ from start to end


def main(argv: list[str] | None = None) -> int:
    """A whole run -> its exit code. What the user can mend is one line on stderr, from one process."""
    argv = sys.argv[1:] if argv is None else argv
    world, run, others, code = World(), None, multiprocessing.active_children(), 1
    with handling_signals(world.ask):
        try:
            args = parse_args(argv)
            world.meet(args.device)
            if args.export is not None or args.benchmark:
                (export if args.export is not None else benchmark)(args, world)
            else:
                with run_folder(args, world) as log_file:
                    run = Run(args, world, log_file, argv)
                    with world.finishing_steps():
                        train(run)
                    with run.searching():
                        front = find_front(run)
                    run.report(test_front(run, front))
            code = 0
        except (Exception, KeyboardInterrupt) as e:
            world.finishing = True  # another signal changes nothing
            first, (line, code) = world.first_to_fail(), one_line(e, run)
            if first and not line:
                raise
            if first:
                tell("train.py: " + line.replace("\n", "\\n"), sys.stderr)
        finally:
            world.finishing = True
            end_workers(others)
            world.leave(code)
    return code


class UserError(Exception):
    """What the user can mend: printed as one line."""

    code = 2


class Failed(UserError):
    """A run that was well asked for cannot go on: training blew up, or another process has gone."""

    code = 1


class Stopped(KeyboardInterrupt):
    """A signal, its number the argument, asked for it."""


def one_line(e, run):
    """What to say of an exception, or None where it is a bug; the exit code."""
    if isinstance(e, KeyboardInterrupt):
        line = "stopped before the first step"
        if run:
            start = "torchrun ..." if run.world.size > 1 else "python"
            command = shlex.join([os.path.relpath(__file__), *(a for a in run.argv if a != "--resume"), "--resume"])
            line = f"stopped at step {run.step}, all saved; continue with: {start} {command}"
        return line, 128 + (e.args[0] if isinstance(e, Stopped) else signal.SIGINT)
    if isinstance(e, RuntimeError) and "DataLoader worker" in str(e):  # torch raises it wherever training is at the time
        return (f"{first_line(e)}; fewer --workers need less memory, 0 none; in a container, allow more shared memory "
                "(docker run --shm-size)"), 2  # fmt: skip
    if out_of_memory(e):
        return f"{first_line(e) or 'out of memory'}; a smaller --batch-size or --image-size needs less, and --accumulate", 2
    return (str(e), e.code) if isinstance(e, UserError) else (None, 1)


def out_of_memory(e):
    """Whether an exception says so: Python's and numpy's, and torch's of a GPU and of a CPU."""
    says = "out of memory" in str(e) or "can't allocate memory" in str(e)
    return isinstance(e, MemoryError) or isinstance(e, RuntimeError) and says


def tell(text, stream=None):
    """Prints a line, what the stream cannot encode escaped. A terminal or pipe that is gone ends no run."""
    stream = stream or sys.stdout
    if stream is None:
        return
    try:
        encoding = stream.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# ------------------------------------------------------------------------------ signals

# A closing terminal's, Ctrl-C, and what clusters send before they take a machine away.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
           if hasattr(signal, name)]  # fmt: skip


@contextmanager
def handling_signals(handler):
    """Within the block, signals call `handler`, but for those that are ignored, as nohup has it."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # Python lets no other set handlers
        before = {n: signal.signal(n, handler) for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former or signal.SIG_DFL)


@contextmanager
def deaf_children():
    """Processes started within the block do not get our signals: one to the whole group is the training process's
    to act on, which saves and then ends them (`end_workers`)."""
    mask = hasattr(signal, "pthread_sigmask") and signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        if mask is not False:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def end_workers(others):
    """Kills loading processes that are still there: deaf ones outlive the polite request that Python makes at exit."""
    workers = [child for child in multiprocessing.active_children() if child not in others]
    if workers and hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises where a worker is killed
    for worker in workers:
        worker.kill()


# ------------------------------------------------------------------------------ arguments

COSTS = "flops", "params", "memory"  # and latency, which is measured
# Flags that may change between a run and its continuation: they decide where and how fast, not what.
FREE = {"out", "resume", "search", "device", "data_dir", "workers", "save_minutes", "log_seconds", "download", "export",
        "benchmark"}  # fmt: skip


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse prints the usage as well, dozens of lines
        raise UserError(message.removeprefix("argument "))

    def _print_message(self, message, file=None):
        tell(message, file)


def typed(kind, fits, wanted):
    """A type for argparse: the values kind(text) of which `fits` is true."""

    def read(text):
        try:
            if fits(value := kind(text)):
                return value
        except (ValueError, RuntimeError):
            pass
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")

    return read


def whole(low):
    return typed(int, lambda v: low <= v < 2**63, f"a whole number, at least {low} and below 2^63")


amount = typed(float, lambda v: 0 <= v < math.inf, "a number, at least 0")
portion = typed(float, lambda v: 0 <= v < 1, "a number in [0, 1)")
multiplier = typed(float, lambda v: 0 < v <= 1, "a number in (0, 1]")
folder = typed(lambda text: text and Path(text).expanduser(), bool, "a folder")  # a shell leaves the ~ of --out=~/x
device = typed(torch.device, lambda v: v.type in ("cpu", "cuda"), "cpu, cuda or cuda:N")


def describe_recipes():
    """The numbers of RECIPES, for --help: those that all share, then each one's own."""
    named = {"every recipe": COMMON}
    named |= {" ".join(key): dict(recipe.items() - COMMON.items()) for key, recipe in RECIPES.items()}
    lines = (f"{name}: " + " ".join(f"{k}={v}" for k, v in sorted(recipe.items())) for name, recipe in named.items())
    wrapped = (textwrap.fill(line, 110, initial_indent="  ", subsequent_indent="      ") for line in lines)
    return "recipes, which give the flags without a default their values:\n" + "\n".join(wrapped)


def parse_args(argv=None):
    p = Parser(prog="train.py", description=__doc__, epilog=describe_recipes(),
               formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip

    g = p.add_argument_group("what to train")
    g.add_argument("--data", default="synthetic", choices=dict.fromkeys(data for data, _ in RECIPES),
                   help="data set; imagenet is any folder of images (default: %(default)s)")
    g.add_argument("--data-dir", type=folder, metavar="DIR", help="where its files lie (imagenet: holds train/ and val/)")
    g.add_argument("--download", action="store_true", help="let torchvision fetch a missing data set")
    g.add_argument("--image-size", type=whole(2), metavar="PIXELS", help="resize images to this")
    g.add_argument("--augment", choices=["none", "shift", "imagenet"],
                   help="training images: as they are, shifted by up to an eighth, or random crops in jittered colours (folders)")
    g.add_argument("--flip", action=argparse.BooleanOptionalAction,
                   help="mirror half of them: not for letters, signs, left and right hands")
    g.add_argument("--arch", choices=models.ARCHS, help="network (default: the first recipe's of the data set)")
    g.add_argument("--method", choices=["joslim", "slim", "twostage"],
                   help="widths from Bayesian optimisation, uniform, or random and searched afterwards (default: joslim)")
    g.add_argument("--cost", default="flops", choices=[*COSTS, "latency"],
                   help="what a budget limits; latency is measured here and now (default: %(default)s)")
    g.add_argument("--search", type=folder, metavar="RUN",
                   help="do not train: search that run's finished weights, by its settings, as twostage does its own")
    g.add_argument("--init", type=folder, metavar="FILE",
                   help="start from torchvision's weights, or a front.pt's; each group's channels sorted by importance")
    g.add_argument("--seed", type=whole(0), default=0,
                   help="of weights, split, data order, widths (default: %(default)s)")

    g = p.add_argument_group("weights")
    g.add_argument("--epochs", type=whole(1))
    g.add_argument("--batch-size", type=whole(1), help="images a step, all processes together")
    g.add_argument("--accumulate", type=whole(1), default=1, metavar="K",
                   help="split each process's batch into K parts, one after another: less memory (default: %(default)s)")
    g.add_argument("--lr", type=amount, help="peak learning rate at batch 256; scaled by batch / 256")
    g.add_argument("--warmup-epochs", type=amount, help="linear warm-up")
    g.add_argument("--weight-decay", type=amount, help="not on BatchNorm and biases")
    g.add_argument("--label-smoothing", type=portion, help="for those that learn from the labels")
    g.add_argument("--distillation", action=argparse.BooleanOptionalAction,
                   help="sub-networks learn from the full network's outputs; without, from the labels, as it does")

    g = p.add_argument_group("widths")
    g.add_argument("--lower", type=multiplier, metavar="W0", help="smallest width")
    g.add_argument("--divisor", type=whole(1), metavar="N", help="channel counts are multiples of N; 8 suits most processors")
    g.add_argument("--subnets", type=whole(1), metavar="M", help="sub-networks a step, and configurations a round")
    g.add_argument("--tau", type=whole(1), help="steps between rounds")
    g.add_argument("--fresh-widths", action=argparse.BooleanOptionalAction,
                   help="propose M configurations for each step of a round, of which M in all join the history; "
                        "without, M for the round, as in the paper")
    g.add_argument("--num-prior", type=whole(1), metavar="N0", help="uniform proposals before the GP's")
    g.add_argument("--beta", type=amount, help="the variance's weight in the acquisition")
    g.add_argument("--random-lambda", action=argparse.BooleanOptionalAction, default=False,
                   help="draw lambda, not a target cost, for each proposal")
    g.add_argument("--held-out", type=whole(1), metavar="IMAGES", help="training images kept for judging configurations")
    g.add_argument("--eval-images", type=whole(2), metavar="IMAGES", help="of these, how many a round judges the history on")
    g.add_argument("--calibrate-images", type=whole(2), metavar="IMAGES", help="training images for BatchNorm's statistics")
    g.add_argument("--front-size", type=whole(2), metavar="K", help="configurations tested at the end, at most")

    g = p.add_argument_group("the run")
    g.add_argument("--out", type=folder, metavar="RUN", help="its folder (default: runs/<data>-<arch>-<method>-<seed>)")
    g.add_argument("--resume", action="store_true", help="continue the run in --out; start it if there is none")
    g.add_argument("--device", type=device, help="cpu, cuda or cuda:N (default: cuda where there is one)")
    g.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 autocast (default: on GPUs that have it)")
    g.add_argument("--workers", type=whole(0), metavar="N",
                   help="loading processes per training process, image folders only (default: the cores it may use, shared)")
    g.add_argument("--save-minutes", type=amount, default=10.0, metavar="T",
                   help="checkpoint at least this often, besides each epoch's end (default: %(default)s)")
    g.add_argument("--log-seconds", type=amount, default=10.0, metavar="T",
                   help="between progress lines (default: %(default)s)")

    g = p.add_argument_group("a finished run, put to use")
    g.add_argument("--export", type=amount, metavar="BUDGET",
                   help="write the best network in --out within BUDGET (of its cost: a ratio up to 1, or the cost) as .pt2, and "
                        "as .onnx where onnxscript and onnxruntime are installed")
    g.add_argument("--benchmark", action="store_true", help="print the latency of the front in --out on this machine")
    g.add_argument("--threads", type=whole(1), metavar="N", help="of a CPU, for latencies (default: torch's)")
    g.add_argument("--latency-batch", type=whole(1), default=1, metavar="IMAGES", help="for latencies (default: %(default)s)")

    args = p.parse_args(argv)
    if args.search and args.method not in (None, "twostage"):
        p.error(f"--search: searches as --method twostage does, not {args.method}")
    if (args.benchmark or args.export is not None) and not args.out:
        p.error("--export, --benchmark: name the finished run's folder with --out")
    if (args.benchmark or args.export is not None) and os.environ.get("WORLD_SIZE", "1") != "1":
        p.error("--export, --benchmark: one process is enough; start it without torchrun")
    finished = args.search or (args.out if args.benchmark or args.export is not None else None)
    if finished:  # its settings are the defaults
        state = read_finished(finished)
        known = {k: v for k, v in state["settings"].items() if not (args.search and k in ("cost", "method", "trained_as"))}
        p.set_defaults(data_dir=state["data_dir"] and Path(state["data_dir"]), **known)
        args = p.parse_args(argv)
    first = next(key for key in RECIPES if key[0] == args.data)
    args.arch = args.arch or first[1]
    for name, value in RECIPES.get((args.data, args.arch), RECIPES[first]).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.method = args.method or ("twostage" if args.search else "joslim")
    if args.data != "synthetic" and args.data_dir is None:
        p.error(f"--data-dir: --data {args.data} needs it, the folder that holds its files")
    if args.eval_images > args.held_out:
        p.error(f"--eval-images {args.eval_images} is more than --held-out {args.held_out}")
    if args.augment == "imagenet" and args.data != "imagenet":
        p.error(f"--augment imagenet: for folders of images; --data {args.data} takes none or shift")
    if args.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        args.workers = max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))  # each holds two batches
    args.out = args.out or Path("runs", f"{args.data}-{args.arch}-{args.method}-{args.seed}")
    args.resume |= int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # torchrun --max-restarts
    return args


# ------------------------------------------------------------------------------ processes


PATIENCE = timedelta(minutes=30)  # with processes that do not answer


class World:
    """This process among all that torchrun started; alone without it."""

    def __init__(self):
        self.rank, self.local_rank, self.size, self.faults = 0, 0, 1, None
        self.asked, self.stopping, self.finishing, self.requests = 0, False, False, deque()  # see `ask`

    def meet(self, device: torch.device | str | None = None) -> "World":
        """Takes its device, and finds the other processes, where there are any."""
        store = self.find_others() if os.environ.get("WORLD_SIZE", "1") != "1" else None
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cuda":
            index = self.local_rank if self.device.index is None else self.device.index
            if index >= torch.cuda.device_count():
                raise UserError(f"--device {device}: GPU {index} asked for, this machine has {torch.cuda.device_count()}")
            self.device = torch.device("cuda", index)
            torch.cuda.set_device(self.device)
        if self.size > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=PATIENCE, rank=self.rank, world_size=self.size, store=store)
        return self

    def find_others(self):
        """The store by which the processes find each other, at the address that torchrun puts into the environment."""
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        slow = threading.Timer(10, tell, [f"waiting for process 0 at {where}, for {PATIENCE.seconds // 60} minutes at most"])
        try:
            self.local_rank, rank, size = (int(os.environ.get(name, 0)) for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"))
            if not 0 <= rank < size:
                raise ValueError(f"there is no process {rank} of {size}")
            if self.local_rank == 0:
                slow.start()
            with handling_signals(signal.SIG_DFL):  # torch waits where Python's handlers do not run
                store, self.rank, self.size = next(dist.rendezvous("env://", timeout=PATIENCE))
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self.faults = dist.PrefixStore(f"faults {restart}", dist.TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=PATIENCE))  # fmt: skip
        except (ValueError, RuntimeError) as e:
            raise UserError(f"WORLD_SIZE {os.environ['WORLD_SIZE']}, process 0 at {where}: the processes do not meet "
                            f"({first_line(e)}); start them with torchrun")  # fmt: skip
        finally:
            slow.cancel()
        if int(os.environ.get("LOCAL_WORLD_SIZE", 0)) == self.size:
            # torchrun's store outlives its workers: a restart must not find the dead ones' addresses in it
            # (pytorch issue 135712). Nodes count restarts differently, so this serves a single one.
            store = dist.PrefixStore(restart, store)
        return store

    def first_to_fail(self):
        """Whether no other process failed before. The first speaks; the others, who lose it, leave without a word."""
        if not self.faults:  # all fail alike, over the command's flags
            return not os.environ.get("LOCAL_RANK", "0").strip("0").isdigit()
        mine = f"process {self.rank}"
        with suppress(RuntimeError):  # where process 0 has gone, and the store with it
            return self.faults.compare_set("first", "", mine).decode() == mine
        return False

    @staticmethod
    def leave(code=0):
        """Ends the process group, where there is one. With an exit code of a failure and NCCL, ends the process."""
        if dist.is_initialized():
            if code and dist.get_backend() == "nccl":
                # NCCL's own end may wait for the other processes, and these, in a collective, for this one.
                if sys.exc_info()[0]:  # a bug's traceback, on its way
                    sys.excepthook(*sys.exc_info())
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            # Until torch 2.8 this joins gloo's threads without letting go of Python's lock, which one that still
            # drops the last call's tensor waits for (pytorch pull request 154976): leave it time to.
            time.sleep(0.1)
            dist.destroy_process_group()

    def ask(self, number, frame):
        """The handler of signals. One to any process ends all after the same step, or at once before and after training."""
        self.asked = number
        if not self.finishing:
            raise Stopped(number)

    @contextmanager
    def finishing_steps(self):
        self.finishing = True
        yield
        asked = self.mean(torch.tensor([float(self.asked)], device=self.device)).item()  # since the last step told
        self.finishing = False
        if asked or self.asked:
            raise Stopped(self.asked or signal.SIGTERM)

    def together(self, fn, *args, **how):
        """A collective operation; that another process has gone is one line."""
        try:
            return fn(*args, **how)
        except RuntimeError as e:
            if "DataLoader worker" in str(e) or out_of_memory(e):  # the first may come at any time
                raise
            why = f"process {self.rank}: another process has gone ({first_line(e)}); the last checkpoint stands"
            raise Failed(why) from e

    def mean(self, t):
        """The tensor's mean over processes, in place: one all-reduce."""
        if self.size > 1:
            self.together(dist.all_reduce, t)
            t /= self.size
        return t

    def average_gradients(self, net):
        """Every gradient's mean over processes, by one all-reduce of them all, and whether any is asked to stop."""
        if self.size == 1:
            self.stopping = self.asked > 0
            return
        grads = [p.grad for p in net.parameters()]
        asked = grads[0].new_full((1,), self.asked)
        joined = self.mean(torch.cat([*(g.flatten() for g in grads), asked]))
        *parts, asked = joined.split([*(g.numel() for g in grads), 1])
        for g, part in zip(grads, parts):
            g.copy_(part.view_as(g))
        copied = None
        if self.device.type == "cuda":  # reading it there would wait for all that is queued
            asked, copied = asked.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        self.requests.append((asked, copied))
        if len(self.requests) > (0 if self.device.type == "cpu" else 2):  # an old copy has long arrived
            asked, copied = self.requests.popleft()
            if copied:
                copied.synchronize()
            self.stopping = asked.item() > 0

    def from_first(self, value):
        """Process 0's value, of tensors and plain values, on every process."""
        if self.size == 1:
            return value
        raw = io.BytesIO()
        if self.rank == 0:
            torch.save(value, raw)
        box = [raw.getvalue()]
        self.together(dist.broadcast_object_list, box, device=self.device)
        return torch.load(io.BytesIO(box[0]), weights_only=True)

    def require_same(self, **values):
        """Raises UserError, which names a flag, unless all processes hold the same values for these."""
        if self.size > 1:
            theirs = [None] * self.size
            self.together(dist.all_gather_object, theirs, values)
            for (k, other), name in itertools.product(enumerate(theirs), values):
                if other.get(name) != theirs[0].get(name):
                    raise UserError(f"--{name.replace('_', '-')}: processes 0 and {k} have different ones; start all alike")

    def propose(self, sampler, m, keep=None):
        """sampler.sample(m, keep), and the sampler's state, alike on every process.

        Random widths are so by their seed; GPs may round differently on another machine, so that
        process 0 alone has one.
        """
        if not sampler.ready or self.size == 1:
            return sampler.sample(m, keep)
        new = sampler.sample(m, keep) if self.rank == 0 else None
        state, new = self.from_first((sampler.state_dict(), new))
        sampler.load_state_dict(state)
        return new

    def map(self, fn, items, *shape):
        """fn(items) -> (len(items), *shape) float64, each process doing its share of the items; the same on all."""
        rows, mine = torch.zeros(len(items), *shape, dtype=torch.float64, device=self.device), items[self.rank :: self.size]
        if len(mine):
            rows[self.rank :: self.size] = fn(mine).to(rows)
        if self.size > 1:
            self.together(dist.all_reduce, rows)  # a sum: in each row all but one process have zeros
        return rows.cpu()

    def wait(self):
        if self.size > 1:
            self.together(dist.barrier, device_ids=None if self.device.type == "cpu" else [self.device.index])


class Replay:
    """fn(x, y, widths) -> a tensor; where a GPU does it again and again with the same widths, as one CUDA graph.

    Kernels of small networks, or of few images, end sooner than Python launches the next: a graph, recorded once, launches
    all. What else fn leaves, the gradients, stays where the recording put it: nothing else may replace them.
    """

    def __init__(self, fn):
        self.fn, self.widths, self.seen, self.graph = fn, None, 0, None

    def __call__(self, x, y, widths):
        if x.device.type != "cuda":
            return self.fn(x, y, widths)
        if self.widths is None or not torch.equal(widths, self.widths):
            self.widths, self.seen, self.graph = widths, 0, None
        self.seen += 1
        if self.seen < 4:  # fewer steps do not pay for a recording, and cuDNN must have made its plans
            return self.fn(x, y, widths)
        if not self.graph:
            self.inputs, graph = (x.clone(), y.clone()), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread may be pinning images
                self.losses = self.fn(*self.inputs, widths)
            self.graph = graph
        for kept, new in zip(self.inputs, (x, y)):
            kept.copy_(new)
        self.graph.replay()
        return self.losses.clone()


# ------------------------------------------------------------------------------ data


class Data:
    """The training, held-out and test images, in the batches that a run asks for.

    Order and augmentation depend on seed, epoch and image alone: not on where a run was stopped, the
    number of processes or of workers. `about` is what inference needs (names of the classes; mean and deviation, for
    values in [0, 1], by which images are normalised), and a digest by which a run knows its data again.
    """

    def __init__(self, args, world):
        self.args, self.world = args, world
        read = read_folders if args.data == "imagenet" else read_arrays
        (self.training_set, self.held_out_set, self.test_set), names, self.channels, digest = read(args, world)
        mean, std = (v.flatten().tolist() for v in (self.training_set.mean / 255, self.training_set.std / 255))
        self.about = {"classes": names, "mean": mean, "std": std, "digest": digest}
        self.steps = len(self.training_set) // args.batch_size

    def train(self, epoch, start):
        """This process's share of the epoch's batches (x, y), augmented, from batch number `start` on."""
        order = torch.randperm(len(self.training_set), generator=seeded(3, self.args.seed, epoch))
        shares = order[: self.steps * self.args.batch_size].view(self.steps, self.world.size, -1)
        return self.training_set.load(shares[start:, self.world.rank], epoch)

    def held_out(self, number):
        """Held-out batch (x, y) `number` (they go round), the same on each process."""
        n = self.args.eval_images
        i = torch.arange(n * number, n * (number + 1)) % len(self.held_out_set)
        return map(torch.cat, zip(*self.held_out_set.load(i.split(32))))  # in parts, for all workers to share

    def batches(self, which):
        """All (x, y) of "held-out", "test" or, unaugmented, "calibrate" images, the same on each process."""
        images = {"held-out": self.held_out_set, "test": self.test_set, "calibrate": self.training_set}[which]
        n = min(len(images), self.args.calibrate_images) if which == "calibrate" else len(images)
        return images.load(torch.arange(n).tensor_split(math.ceil(n / 256)))  # BatchNorm cannot do with a last batch of one


def seeded(*keys):
    """A CPU generator whose stream depends on all keys (whole numbers) alone."""
    seed = 0
    for k in keys:
        seed = (seed * 1_000_003 + k + 1) % 2**63
    return torch.Generator().manual_seed(seed)


def split(n, args):
    """Indices of the held-out and of the other training images."""
    if args.held_out + args.batch_size > n:
        raise UserError(f"--batch-size {args.batch_size} and --held-out {args.held_out}: there are {n} training images")
    order = torch.randperm(n, generator=seeded(2, args.seed))
    return order[: args.held_out], order[args.held_out :]


class ArrayImages:
    """A small data set: one uint8 tensor (n, c, h, w) on the device, augmented in whole batches there.

    x[index], resized to `size`; in training, crops of it padded by an eighth, mirrored, where `shift`, flips where `flip`.
    mean, std: (c, 1, 1), of values up to 255; of these very images where they are None.
    """

    def __init__(self, x, y, index, size, seed, device, like=None, shift=False, flip=False):
        self.y, self.size, self.seed, self.flip = y[index].to(device), size, seed, flip
        self.pad = size // 8 if shift else 0
        self.x = torch.empty(len(index), x.shape[1], *[size + 2 * self.pad] * 2, dtype=torch.uint8, device=device)
        counts = torch.zeros(x.shape[1], 256, dtype=torch.int64)  # of each value: exact, and no copy in floats
        for i, to in zip(index.split(256), self.x.split(256)):  # in pieces: memory is that of the result
            part = x[i]
            if part.shape[-2:] != (size, size):
                part = transforms.functional.resize(part, [size, size], antialias=True)
            # Mirrored, for what is there anyway: BatchNorm's statistics are those of whole images, without black edges.
            to.copy_(transforms.functional.pad(part, self.pad, padding_mode="reflect"))
            if like is None:
                counts += torch.stack([channel.flatten().bincount(minlength=256) for channel in part.unbind(1)])
        if like is None:
            value, n = torch.arange(256.0, dtype=torch.float64), counts.sum(1)
            mean = (counts * value).sum(1) / n
            std = ((counts * (value - mean[:, None]) ** 2).sum(1) / (n - 1)).sqrt().clamp_min(1)
            self.mean, self.std = (v.float().view(-1, 1, 1) for v in (mean, std))
        else:
            self.mean, self.std = like.mean, like.std

    def __len__(self):
        return len(self.y)

    def load(self, batches, epoch=None):
        """The listed batches of indices as (x, y), in order; augmented as it is the epoch's turn, or not at all."""
        device = self.x.device
        if epoch is not None:
            crop, flip = (t.to(device) for t in augmentation(self.seed, epoch, len(self), self.pad))
            batches = batches.to(device)  # at once: the loop itself copies nothing there and so never waits
        along, inside = torch.arange(self.size, device=device), slice(self.pad, self.pad + self.size)
        mean, std = self.mean.to(device), self.std.to(device)
        for i in batches:
            if epoch is None:
                i = i.to(device)
                x = self.x[i][:, :, inside, inside]
            else:
                columns = along.expand(len(i), -1)
                if self.flip:
                    columns = torch.where(flip[i, None], self.size - 1 - columns, columns)
                rows, columns = crop[0, i, None] + along, crop[1, i, None] + columns
                x = self.x[i[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
            yield (x.float() - mean) / std, self.y[i]


def augmentation(seed, epoch, n, pad):
    """Each image's crop offsets (2, n) and flip (n,) in this epoch."""
    g = seeded(3, seed, epoch)
    torch.randperm(n, generator=g)  # the epoch's order
    return torch.randint(2 * pad + 1, (2, n), generator=g), torch.rand(n, generator=g) < 0.5


def array_sets(args, world, x, y, test_x, test_y):
    """Training, held-out and test images of two uint8 tensors."""
    held_out, rest = split(len(x), args)
    how = dict(size=args.image_size, seed=args.seed, device=world.device)
    train = ArrayImages(x, y, rest, **how, shift=args.augment == "shift", flip=args.flip)
    others = (x, y, held_out), (test_x, test_y, torch.arange(len(test_x)))
    return train, *(ArrayImages(*part, **how, like=train) for part in others)


def read_arrays(args, world):
    """-> (training, held-out and test images), names of the classes, channels, digest."""
    *parts, names = load_arrays(args, world)
    digest = hashlib.sha256()
    for images, labels in parts:
        if len(images) != len(labels) or len(labels) == 0 or labels.min() < 0 or labels.max() >= len(names):
            raise UserError(f"--data-dir: {len(images)} images have {len(labels)} labels; expected as many, each "
                            f"from 0 to {len(names) - 1}. Are these the files of {args.data}?")  # fmt: skip
        digest.update(images.contiguous().numpy())
        digest.update(labels.contiguous().numpy())
    return array_sets(args, world, *parts[0], *parts[1]), names, parts[0][0].shape[1], digest.hexdigest()


CIFARS = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
# torchvision's class, what else it takes, the names of its training and test files, and of the classes.
IDX = {
    "fashion-mnist": (torchvision.datasets.FashionMNIST, {}, ("train", "t10k"), torchvision.datasets.FashionMNIST.classes),
    "kmnist": (torchvision.datasets.KMNIST, {}, ("train", "t10k"), torchvision.datasets.KMNIST.classes),
    "emnist": (torchvision.datasets.EMNIST, {"split": "balanced"}, ("emnist-balanced-train", "emnist-balanced-test"),
               torchvision.datasets.EMNIST.classes_split_dict["balanced"]),
}  # fmt: skip


def load_arrays(args, world):
    """-> (train x, train y), (test x, test y), names of the classes; x uint8 (n, c, h, w). torchvision reads the files."""
    if args.data == "synthetic":
        return synthetic(16384 + args.held_out, 0), synthetic(4096, 1), [str(c) for c in range(60)]
    if not args.data_dir.is_dir():
        raise UserError(f"--data-dir: {args.data_dir} is not a folder")
    return (load_cifar if args.data in CIFARS else load_idx)(args, world)


def load_cifar(args, world):
    reader = CIFARS[args.data]
    if args.download:
        prepare(world, f"--download: {args.data} could not be fetched", reader, args.data_dir, download=True)
    names = (reader.meta["filename"], reader.meta["md5"]), *reader.train_list, *reader.test_list
    for name, md5 in names:  # known to be the real ones before they are unpickled
        path = args.data_dir / reader.base_folder / name
        if not torchvision.datasets.utils.check_integrity(path, md5):
            raise UserError(f"{path}: missing or damaged; put CIFAR's python version there, or try --download")
    sets = [reader(args.data_dir, train=train) for train in (True, False)]
    return *((torch.as_tensor(s.data).permute(0, 3, 1, 2), torch.as_tensor(s.targets)) for s in sets), sets[0].classes


def load_idx(args, world):
    reader, more, parts, names = IDX[args.data]
    folder, idx = args.data_dir / reader.__name__ / "raw", torchvision.datasets.mnist
    files = [(folder / f"{part}-{kind}-ubyte", how) for part in parts
             for kind, how in (("images-idx3", idx.read_image_file), ("labels-idx1", idx.read_label_file))]  # fmt: skip
    for path, _ in files:
        prepare(world, f"{path}.gz: could not be unpacked", unpack, path)
    if args.download:
        prepare(world, f"--download: {args.data} could not be fetched", reader, args.data_dir, download=True, **more)
    tensors = []
    for path, how in files:
        try:
            tensors.append(how(path))
        except FileNotFoundError:
            raise UserError(f"{path}[.gz]: missing; put the four files there, or try --download") from None
        except Exception as e:  # a damaged file makes its readers raise nearly anything
            raise UserError(f"{path}: not a readable IDX file ({type(e).__name__}: {first_line(e)})") from None
    x, y, test_x, test_y = tensors
    return (x[:, None], y), (test_x[:, None], test_y), list(names)


def unpack(path):
    """Unpacks path.gz where `path` is missing: whole or not at all."""
    if not path.exists() and Path(f"{path}.gz").exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as part:
            torchvision.datasets.utils.extract_archive(f"{path}.gz", part)
            os.replace(Path(part, path.name), path)


def prepare(world, failed, fn, *args, **how):
    """fn(...) in one process of each machine, while the others wait. What it raises is one line that opens with `failed`."""
    try:
        if world.local_rank == 0:
            fn(*args, **how)
    except Exception as e:
        raise UserError(f"{failed} ({type(e).__name__}: {first_line(e)})") from None
    world.wait()


def first_line(e):
    return (str(e).splitlines() or [""])[0]


def synthetic(n, seed, classes=60, size=16):
    """n images (n, 3, 16, 16) uint8 and labels: each class is a smooth pattern of colours, shifted, under clouds and noise.

    Made so that widths matter: the last layers of a narrow network cannot tell so many classes apart.
    """
    g = seeded(0)
    patterns = F.interpolate(torch.randn(classes, 3, 7, 7, generator=g), size * 3 // 2, mode="bicubic", align_corners=True)

    g = seeded(1, seed)
    y = torch.randint(classes, (n,), generator=g)
    x = 0.7 * F.interpolate(torch.randn(n, 3, 5, 5, generator=g), size, mode="bilinear", align_corners=True)
    x += 0.5 * torch.randn(n, 3, size, size, generator=g)
    top, left = torch.randint(size // 2 + 1, (2, n, 1), generator=g)
    rows, columns = top + torch.arange(size), left + torch.arange(size)
    gain = 0.7 + 0.6 * torch.rand(n, 1, 1, 1, generator=g)
    x += gain * patterns[y[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return (32 * x + 128).clamp(0, 255).byte(), y


# What Pillow reads and calls an image; it knows .pdf and .mpg as well.
SUFFIXES = tuple(suffix for suffix, form in Image.registered_extensions().items()
                 if form in Image.OPEN and Image.MIME.get(form, "").startswith("image/"))  # fmt: skip
IN_MEMORY = 2**31  # bytes of images, at --image-size, up to which a folder is decoded once


def decode(path):
    """The image as a person sees it, in RGB of 8 bits, whatever its file holds.

    Upright (EXIF), the first where there are several, on white where it is transparent; 10 to 16 bits are scaled to 8,
    CMYK, palettes and LAB are converted. Raises ValueError for what has no known range (32-bit integers, floats), and
    whatever Pillow does for what it cannot read.
    """
    with Image.open(path) as file:
        tags = getattr(file, "tag_v2", {})  # a TIFF's: 258 has the bits of a pixel, 262 is 0 where 0 means white
        try:
            image = ImageOps.exif_transpose(file)
        except (SyntaxError, ValueError, KeyError, TypeError, struct.error):  # what EXIF says is not EXIF
            image = file.copy()
    if image.mode.startswith("I;16") or image.mode == "I" and file.format in ("PNG", "PPM"):
        most = 2 ** tags.get(258, (16,))[0] - 1
        pixels = torch.frombuffer(bytearray(image.convert("I").tobytes()), dtype=torch.int32).clamp(0, most)
        pixels = most - pixels if tags.get(262) == 0 else pixels
        image = Image.frombytes("L", image.size, (pixels / most * 255).round().byte().numpy().tobytes())
    if image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits have no known range; save it with 8 or 16")
    if image.mode == "LAB":
        return ImageCms.profileToProfile(image, *map(ImageCms.createProfile, ("LAB", "sRGB")), outputMode="RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class FolderImages(torch.utils.data.Dataset):
    """Images of class folders, decoded and augmented by DataLoader workers with torchvision's transforms."""

    mean, std = (255 * torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # ImageNet's

    def __init__(self, paths, labels, index, args, device):
        # Arrays, of bytes and numbers: lists of a million objects would be copied into each loading process by and by.
        self.paths, self.labels, self.index, self.device = paths, labels, index, device
        self.seed, self.workers = args.seed, args.workers
        size = args.image_size
        short = math.ceil(size * 256 / 224) if args.augment == "imagenet" else size
        centre = [transforms.Lambda(squarish), transforms.Resize(short), transforms.CenterCrop(size)]
        augment = {
            "none": centre,
            "shift": [*centre, transforms.RandomCrop(size, padding=size // 8, padding_mode="reflect")],
            "imagenet": [transforms.PILToTensor(),  # a tenth faster than on Pillow's images: loading.py
                         transforms.RandomResizedCrop(size, scale=(0.25, 1)), transforms.ColorJitter(0.4, 0.4, 0.4)],
        }[args.augment]
        flip = [transforms.RandomHorizontalFlip()] if args.flip else []
        self.centred = transforms.Compose([*centre, transforms.PILToTensor()])
        self.augmented = transforms.Compose([*augment, *flip, transforms.PILToTensor()])

    def __len__(self):
        return len(self.index)

    def __getitem__(self, key):
        epoch, i = key[0], int(self.index[key[1]])
        path, label = os.fsdecode(self.paths[i]), int(self.labels[i])
        try:
            if epoch is None:
                return self.centred(decode(path)), label
            with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
                torch.default_generator.set_state(seeded(4, self.seed, epoch, i).get_state())
                return self.augmented(decode(path)), label
        except Exception as e:  # a damaged file makes its readers raise nearly anything
            return unreadable(path, e)  # not raised: a worker's exception would come with its traceback around it

    def raw(self, batches, epoch=None):
        """The listed batches of indices as (x, y), x uint8, in order."""
        keys = [[(epoch, i) for i in batch.tolist()] for batch in batches]
        fork = "fork" if self.workers and "fork" in multiprocessing.get_all_start_methods() else None
        loader = torch.utils.data.DataLoader(self, batch_sampler=keys, num_workers=self.workers, collate_fn=collate,
                                             pin_memory=self.device.type == "cuda",
                                             multiprocessing_context=fork)  # fmt: skip
        with deaf_children():
            loaded = iter(loader)
        for batch in loaded:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def load(self, batches, epoch=None):
        """As `ArrayImages.load`."""
        mean, std = self.mean.to(self.device), self.std.to(self.device)
        for x, y in self.raw(batches, epoch):
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            yield (x.float() - mean) / std, y


def squarish(image):
    """The middle of a very long image: whole, it would be huge once its short side is as long as asked for."""
    longest = 4 * min(image.size)
    if max(image.size) <= longest:
        return image
    return transforms.functional.center_crop(image, [min(side, longest) for side in image.size[::-1]])


def unreadable(path, e):
    return UserError(f"{path}: not a readable image ({type(e).__name__}: {first_line(e)})")


def collate(items):
    errors = [item for item in items if isinstance(item, UserError)]
    return errors[0] if errors else torch.utils.data.default_collate(items)


def read_folders(args, world):
    """As `read_arrays`, of train/ and val/ with a folder for each class."""
    (*train, classes), (*val, others) = (read_folder(args.data_dir / part, world) for part in ("train", "val"))
    if classes != others:
        odd = sorted(set(classes) ^ set(others))
        raise UserError(f"--data-dir: train/ and val/ differ in classes: {', '.join(odd[:3])}")
    held_out, rest = split(len(train[0]), args)
    paths = [os.fsdecode(path) for path in (*train[0], *val[0])]
    bytes_each = 3 * args.image_size**2
    small = args.augment != "imagenet" and bytes_each * len(paths) <= IN_MEMORY

    def check(i):
        try:
            if i % world.size == world.rank:  # headers; of val/, which is used after all training, the whole
                decode(paths[i]) if i >= len(train[0]) and not small else Image.open(paths[i]).close()
            return f"{os.path.relpath(paths[i], args.data_dir)} {os.path.getsize(paths[i])}"
        except Exception as e:
            return unreadable(paths[i], e)

    with ThreadPool(max(args.workers, 1)) as threads:
        checked = threads.map(check, range(len(paths)), 256)
    for error in (c for c in checked if isinstance(c, UserError)):
        raise error
    digest = hashlib.sha256("\n".join(checked).encode(errors="surrogateescape")).hexdigest()
    if small:
        return array_sets(args, world, *in_memory(*train, args, world), *in_memory(*val, args, world)), classes, 3, digest
    parts = (*train, rest), (*train, held_out), (*val, torch.arange(len(val[0])))
    sets = [FolderImages(*part, args, world.device) for part in parts]
    if bytes_each * len(held_out) <= IN_MEMORY:  # each round needs some of them
        x, y = in_memory(train[0][held_out.numpy()], train[1][held_out], args, world)
        sets[1] = ArrayImages(x, y, torch.arange(len(y)), args.image_size, args.seed, world.device, like=FolderImages)
    return sets, classes, 3, digest


def read_folder(root, world):
    """-> paths (n,) in an array of bytes, classes (n,), their names. What is hidden, and what by its name is no image, is
    left out."""
    if not root.is_dir():
        raise UserError(f"--data-dir: {root} is missing; expected {root.parent} to hold train/ and val/")
    left_out = Counter()

    def taken(path):
        hidden, suffix = f"{os.sep}." in path[len(str(root)) :], os.path.splitext(path)[1].lower()
        if hidden or suffix not in SUFFIXES:
            left_out["hidden" if hidden else suffix or "without suffix"] += 1
        return not hidden and suffix in SUFFIXES

    names = sorted(os.listdir(root))
    classes = [name for name in names if (root / name).is_dir() and not name.startswith(".")]
    others = (name for name in names if name not in classes)
    left_out.update("hidden" if name.startswith(".") else "outside of class folders" for name in others)
    index, known = {name: i for i, name in enumerate(classes)}, torchvision.datasets.folder
    samples = known.make_dataset(str(root), index, is_valid_file=taken, allow_empty=True) if classes else []
    rest = "; left out: " + ", ".join(f"{n} {what}" for what, n in left_out.most_common()) if left_out else ""
    empty = sorted(set(index.values()) - {label for _, label in samples})
    if empty or not classes:
        which = f"{root / classes[empty[0]]}" if empty else f"{root}: no class folders and"
        raise UserError(f"{which}: no images in it{rest}")
    if world.rank == 0:
        tell(f"{root}: {len(classes)} classes, {len(samples)} images{rest}")
    paths, labels = zip(*samples)
    return np.array([os.fsencode(path) for path in paths]), torch.tensor(labels), classes


def in_memory(paths, labels, args, world):
    """All images, decoded once: x uint8 (n, 3, size, size), labels (n,)."""
    n, shown = len(paths), time.perf_counter()
    x, where = torch.empty(n, 3, args.image_size, args.image_size, dtype=torch.uint8), torch.arange(n).split(256)
    images = FolderImages(paths, labels, torch.arange(n), args, torch.device("cpu"))
    for i, (part, _) in zip(where, images.raw(where)):
        x[i] = part
        if world.rank == 0 and time.perf_counter() - shown > args.log_seconds:
            tell(f"decoded {int(i[-1]) + 1} of {n} images")
            shown = time.perf_counter()
    return x, labels


# ------------------------------------------------------------------------------ files

FORMAT = 7  # of checkpoints
PREVIOUS = "checkpoint.previous.pt"


@contextmanager
def atomic_write(path, mode="wb", keep=None):
    """A file written whole or not at all: what stood at `path` stays until the new one is on disk.

    It is then kept as `keep`, if named.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, mode, newline="" if mode == "w" else None) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
    except OSError as e:
        raise UserError(f"{path}: could not be written ({e.strerror or e}); what was there before is untouched") from None
    finally:
        part.unlink(missing_ok=True)


def save_tensors(path, values, keep=None):
    """torch.save as an atomic write, of tensors of the CPU: a machine without a GPU reads them, too."""
    raw = io.BytesIO()  # torch.save reports a full disk in many ways, a plain write in one
    torch.save(tree_map_only(torch.Tensor, torch.Tensor.cpu, values), raw)
    with atomic_write(path, keep=keep) as f:
        f.write(raw.getbuffer())


@contextmanager
def run_folder(args, world):
    """Makes the run's folder this run's alone: yields its open log, locked as long as this process lives."""
    if world.rank:
        yield None
        return
    locked = fcntl is not None
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        holds = any((args.out / name).exists() for name in ("checkpoint.pt", PREVIOUS, "front.csv", "front.pt"))
        if holds and not args.resume:
            raise UserError(f"--out: {args.out} already holds a run; continue it with --resume or name another")
        log_file = open(args.out / "log.jsonl", "ab+", buffering=0)
        try:
            if locked:
                fcntl.lockf(log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process: its children do not hold it
        except (BlockingIOError, PermissionError):
            raise UserError(f"--out: {args.out} is in use by another process") from None
        except OSError:
            locked = False
        if not locked:
            tell(f"{args.out}: no locks on this file system; see that no other run uses it")
    except OSError as e:
        raise UserError(f"--out: {args.out} cannot be written ({e.strerror})") from None
    with log_file:
        if not args.resume:
            log_file.truncate(0)
        elif log_file.seek(0, os.SEEK_END):  # a killed run's last line may be half a line
            log_file.seek(-1, os.SEEK_END)
            if log_file.read(1) != b"\n":
                append(log_file, b"\n")
        yield log_file


def append(log_file, line):
    try:
        log_file.write(line)
    except OSError as e:
        raise UserError(f"{log_file.name}: could not be written ({e.strerror}); the last checkpoint stands") from None


def as_flag(name, value):
    flag = name.replace("_", "-")
    if value is None:
        return f"no --{flag}"
    return f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}"


def settings(args):
    """The settings that decide a run's numbers, as plain values."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in sorted(vars(args).items()) if k not in FREE}


def read_checkpoint(path):
    """A checkpoint's content, with damage in a ValueError of one line. Runs nothing that is in the file."""
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch.load does not look at the checksums
        if damaged:
            raise ValueError(f"{damaged} is corrupt")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != FORMAT:
            raise UserError(f"{path}: written by another version of this code (format {state['format']}, here {FORMAT}); "
                            "finish it with that one, or use another --out")  # fmt: skip
        parts = {"settings", "network", "data", "model", "optimizer", "sampler", "step", "steps", "proposals", "seconds"}
        missing = parts - state.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        return state
    except UserError:
        raise
    except Exception as e:  # a damaged file makes its readers raise nearly anything
        raise ValueError(f"{path}: not a readable checkpoint ({type(e).__name__}: {first_line(e)})") from None


def load_checkpoint(args):
    """The run's newest readable checkpoint, or None where there is none."""
    damage = []
    for path in (args.out / "checkpoint.pt", args.out / PREVIOUS):
        if not path.exists():
            continue
        try:
            state = read_checkpoint(path)
        except ValueError as e:
            damage.append(str(e))
            continue
        mine, theirs = settings(args), state["settings"]
        for name in sorted((mine.keys() | theirs.keys()) - {"trained_as"}):
            if mine.get(name) != theirs.get(name):
                wanted, given = as_flag(name, theirs.get(name)), as_flag(name, mine.get(name))
                advice = f"add {wanted}" if theirs.get(name) is not None else f"leave {given} out"
                raise UserError(f"{path}: that run has {wanted}, this one {given}; {advice}, or use another --out")
        if damage:
            tell(f"{damage[0]}; continuing from {path.name}")
            os.replace(path, args.out / "checkpoint.pt")  # so that the next save keeps it, not the damaged one
        return state
    if damage:
        raise UserError("; ".join(damage) + "; move it away to start anew")
    return None


def read_finished(folder):
    """The checkpoint of a run that has finished."""
    try:
        state = read_checkpoint(folder / "checkpoint.pt")
    except ValueError as e:
        raise UserError(str(e)) from None
    if state["step"] < state["steps"]:  # finished weights are what a two-stage method searches
        raise UserError(f"{folder}: its run is at step {state['step']} of {state['steps']}; finish that first (--resume)")
    return state


def load_finished(args):
    """The checkpoint of the run that --search names; its training must have left out the same held-out images."""
    state = read_finished(args.search)
    for name in ("data", "seed", "held_out", "arch", "image_size", "divisor"):
        mine, theirs = getattr(args, name), state["settings"].get(name)
        if mine != theirs:
            raise UserError(f"--search {args.search}: trained with --{name.replace('_', '-')} {theirs}, not {mine}")
    return state


def read_init(path):
    """The weights in a file of torchvision's or in a front.pt."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: t for name, t in state.get("model", state).items() if isinstance(t, torch.Tensor)}
    except Exception as e:  # a damaged file makes its readers raise nearly anything
        raise UserError(f"--init: {path}: not readable weights ({type(e).__name__}: {first_line(e)})") from None


def load_init(net, state, path, say):
    """Loads `read_init`'s weights, and sorts channels. Another number of classes gets a new classifier."""
    mine = net.state_dict()
    odd = [name for name in mine.keys() ^ state.keys() if not name.endswith("num_batches_tracked")]
    wrong = [name for name in mine.keys() & state.keys() if mine[name].shape != state[name].shape]
    last = list(mine)[-2:]  # the classifier's weight and bias
    if odd or not set(wrong) <= set(last):
        raise UserError(f"--init: {path}: not weights of this network ({sorted([*odd, *wrong])[0]} differs)")
    net.load_state_dict({k: v for k, v in state.items() if k not in wrong}, strict=False)
    models.sort_channels(net)
    if wrong:
        say(f"{path}: of {state[last[1]].numel()} classes, not {mine[last[1]].numel()}: the classifier starts anew")


# ------------------------------------------------------------------------------ the run's state


class Run:
    """What a run holds (network, sampler, optimiser, step, clock) and its bookkeeping."""

    def __init__(self, args, world, log_file, argv):
        self.args, self.world, self.log_file, self.argv = args, world, log_file, argv
        if args.amp is None:
            args.amp = world.device.type == "cuda" and torch.cuda.get_device_capability(world.device) >= (8, 0)
        if args.batch_size % (world.size * args.accumulate):
            raise UserError(f"--batch-size {args.batch_size} does not divide among {world.size} processes and "
                            f"--accumulate {args.accumulate} parts")  # fmt: skip
        if args.batch_size < 2 * world.size * args.accumulate:
            raise UserError(f"--batch-size {args.batch_size}: BatchNorm needs two images in each of {world.size} processes")
        finished = world.from_first(load_finished(args) if args.search and world.rank == 0 else None)
        args.trained_as = finished and (finished["settings"].get("trained_as") or finished["settings"]["method"])
        state = world.from_first(load_checkpoint(args) if args.resume and world.rank == 0 else None)
        init = read_init(args.init) if args.init and not (state or finished) else None
        world.require_same(**settings(args))
        self.data = Data(args, world)
        world.require_same(data_dir=self.data.about["digest"])  # of other images, others would be held out

        self.step, self.steps = 0, self.data.steps * args.epochs
        torch.manual_seed(args.seed)
        self.network = dict(arch=args.arch, num_classes=len(self.data.about["classes"]), image_size=args.image_size,
                            in_channels=self.data.channels, divisor=args.divisor)  # fmt: skip
        for folder, other in ((args.out, state), (args.search, finished)):
            if other and other["network"] != self.network:
                raise UserError(f"{folder / 'checkpoint.pt'}: its network has {other['network']}, these data need "
                                f"{self.network}")  # fmt: skip
            if other and other["data"]["digest"] != self.data.about["digest"]:  # other images would be held out
                raise UserError(f"{folder / 'checkpoint.pt'}: that run had other images than {args.data_dir} has now; "
                                "give it those, or start anew")  # fmt: skip
        self.net = models.build(**self.network)
        if init is not None:
            load_init(self.net, init, args.init, self.say)
        self.net.to(world.device, memory_format=torch.channels_last).train()  # the faster layout on GPU and CPU alike
        if args.cost == "latency":
            if not state and world.rank == 0:
                self.measure_latency()
            self.net.latency_table = state["latency"] if state else world.from_first(self.net.latency_table)
        self.optimizer = make_optimizer(self.net, args)
        self.full = getattr(self.net, args.cost)(1.0).item()
        kind = {"slim": UniformWidths, "twostage": RandomWidths}.get(args.method)
        self.sampler = kind(self.net.num_widths, args.lower, args.seed) if kind else self.joslim_sampler()
        self.proposals = torch.empty(0, self.net.num_widths, dtype=torch.float64)
        self.rounds = math.ceil(self.steps / args.tau)
        self.seconds = {"total": 0.0, "search": 0.0, "loading": 0.0}
        if state:
            self.load_state(state)
        elif finished:
            self.net.load_state_dict(finished["model"])
            self.step = self.steps

        self.recent, self.progress_step = [], self.step  # since the last progress line: (step, widths, losses)
        self.began = self.saved = self.shown = time.perf_counter()
        if args.resume:
            self.say(f"continuing {args.out} at step {self.step}" if state else f"no checkpoint in {args.out}: starting")
        self.say("settings  " + "  ".join(f"{k}={v}" for k, v in settings(args).items()))
        self.log("settings", **settings(args), processes=world.size, torch=torch.__version__)
        self.say(f"{args.arch}: {self.net.num_widths} widths, {self.net.flops(1.0).item() / 1e6:.1f} MFLOPs, "
                 f"{self.net.params(1.0).item() / 1e6:.3f} M parameters; {self.steps} steps on {world.size} x "
                 f"{world.device.type}")  # fmt: skip
        if finished and not state:
            self.save()

    def cost(self, a, relaxed=False):
        """Cost as a ratio to the full network's: a (..., d) -> (...,)."""
        return getattr(self.net, self.args.cost)(a, relaxed=relaxed) / self.full

    def measure_latency(self):
        """Times some networks on this machine, for the formula that the search takes as the cost."""
        self.say("latency: timing 80 networks")
        widths, times, off = models.measure_latency(self.net, self.args.lower, seed=self.args.seed, **timing(self.args))
        self.say(f"latency: {times.min():.2f} to {times.max():.2f} ms; the formula is off by {off.median():.1%} (median), "
                 f"{off.max():.1%} (worst) for networks that it was not fitted to")  # fmt: skip
        self.log("latency", widths=widths.tolist(), milliseconds=times.tolist(), unseen_errors=off.tolist())

    def joslim_sampler(self):
        args = self.args
        # A round judges on few images: 0.7 of the former loss averages their noise out while the weights move slowly.
        return Joslim(self.net.num_widths, self.cost, args.lower, args.num_prior, args.beta, args.seed,
                      targeted=not args.random_lambda, ema=0.7)  # fmt: skip

    # -------------------------------------------------------------- checkpoints

    def save(self):
        """Checkpoint: tensors and plain values only. Every process's state is the same."""
        self.clock()
        if self.world.rank == 0:
            state = {
                "format": FORMAT, "settings": settings(self.args), "network": self.network, "data": self.data.about,
                "step": self.step, "steps": self.steps, "seconds": self.seconds,
                "model": self.net.state_dict(), "optimizer": self.optimizer.state_dict(),
                "sampler": self.sampler.state_dict(), "proposals": self.proposals,
                "latency": self.net.latency_table, "data_dir": self.args.data_dir and str(self.args.data_dir.absolute()),
            }  # fmt: skip
            save_tensors(self.args.out / "checkpoint.pt", state, keep=self.args.out / PREVIOUS)
        self.saved = time.perf_counter()

    def load_state(self, state):
        self.net.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
        self.step, self.proposals, self.seconds = state["step"], state["proposals"], state["seconds"]

    # -------------------------------------------------------------- clock and log

    def clock(self):
        """Adds the time since the last call to the run's total."""
        now = time.perf_counter()
        self.seconds["total"] += now - self.began
        self.began = now
        return self.seconds["total"]

    @contextmanager
    def timed(self, part):
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    def loading(self, batches):
        """The batches, the time spent waiting for them counted."""
        batches = iter(batches)
        while True:
            with self.timed("loading"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def searching(self):
        """Counts the time of a `with` block as the search's. Before a GP proposes, weights and losses must be finite."""
        if self.sampler.ready:
            self.require_finite()  # which waits for training steps still under way: they are not the search's
        return self.timed("search")

    def log(self, event, **values):
        if self.log_file:
            append(self.log_file, json.dumps({"event": event, "step": self.step, **values}).encode() + b"\n")

    def say(self, text):
        if self.world.rank == 0:
            tell(text)

    # -------------------------------------------------------------- after a step

    def after_step(self, epoch, widths, losses):
        """A progress line, a checkpoint, an end, where it is time for one."""
        self.recent.append((self.step, widths, losses))
        now = time.perf_counter()
        if now - self.shown > self.args.log_seconds or self.step == self.steps:
            self.progress(epoch, now)
        late = now - self.saved > 60 * self.args.save_minutes
        ends_epoch = self.step % self.data.steps == 0
        if late or self.world.stopping or ends_epoch:
            self.require_finite()
            if ends_epoch:
                self.require_agreement()
            self.save()
        if self.world.stopping:
            self.world.wait()  # for process 0, which saves
            raise Stopped(self.world.asked or signal.SIGTERM)

    def progress(self, epoch, now):
        losses, total, lr = self.require_finite(), self.clock(), self.optimizer.param_groups[0]["lr"]
        speed = (self.step - self.progress_step) * self.args.batch_size / (now - self.shown)
        left = timedelta(seconds=round(total / self.step * (self.steps - self.step)))
        search, loading = (self.seconds[part] / total for part in ("search", "loading"))
        slow = " (it is what limits: try more --workers)" if loading > 0.2 else ""
        self.say(f"epoch {epoch + 1}/{self.args.epochs}  step {self.step}/{self.steps}  loss full {losses[0]:.3f} "
                 f"smallest {losses[-1]:.3f}  {speed:.0f} images/s  search {search:.1%}  loading {loading:.1%}{slow}  "
                 f"{left} left")  # fmt: skip
        self.log("train", epoch=epoch + 1, lr=lr, losses=losses, images_per_s=speed, seconds=total,
                 search_share=search, loading_share=loading)  # fmt: skip
        self.recent, self.shown, self.progress_step = [], time.perf_counter(), self.step

    def require_finite(self):
        """Recent steps' mean losses, once these and the weights are found finite: the loop's only wait for the device."""
        if not self.recent:
            return []

        def diverged(step, what):
            lr = learning_rate(step - 1, self.data.steps, self.args)
            few = self.args.batch_size // (self.world.size * self.args.accumulate)
            advice = "a smaller --lr" if few > 8 else f"a larger --batch-size: BatchNorm averages over {few} images"
            return Failed(f"step {step}: {what} at learning rate {lr:.3g}; the last checkpoint stands. Try {advice}")

        losses = torch.stack([loss for _, _, loss in self.recent]).cpu()
        for (step, widths, _), row in zip(self.recent, losses):
            names = ["the full network", *(f"widths {w.tolist()}" for w in widths), "the smallest network"]
            if not row.isfinite().all():
                k = int((~row.isfinite()).nonzero()[0])
                raise diverged(step, f"loss {row[k].item()} of {names[k]}")
        if not torch.stack([p.isfinite().all() for p in self.net.parameters()]).all():  # by the last step, or a loss told
            raise diverged(step, f"a gradient of {', '.join(names)} is not finite, though their losses are,")
        return losses.mean(0).tolist()

    def observe(self, losses):
        """Tells the sampler the history's losses; those that are not finite are left out, with a line."""
        self.sampler.observe(losses)
        bad = ~self.sampler.losses.isfinite()
        if bad.any():
            self.say(f"step {self.step}: the held-out loss of {bad.sum()} configurations is not finite; "
                     "the GP goes without them")  # fmt: skip
            self.log("not finite", widths=self.sampler.widths[bad].tolist())
        if bad.all():
            raise Failed(f"step {self.step}: no configuration's held-out loss is finite; the last checkpoint "
                           "stands. Try a smaller --lr")  # fmt: skip

    # -------------------------------------------------------------- the end

    def require_agreement(self):
        """All processes must hold the same weights and history, or what is saved is worth nothing."""
        if self.world.size > 1:
            tensors = [*self.net.parameters(), *self.sampler.state_dict().values()]
            digest = hashlib.sha256(b"".join(t.detach().cpu().numpy().tobytes() for t in tensors)).hexdigest()
            digests = [None] * self.world.size
            self.world.together(dist.all_gather_object, digests, digest)
            if len(set(digests)) > 1:
                raise Failed(f"step {self.step}: the processes have different weights or histories; the last checkpoint stands")
            if self.step == self.steps:
                self.say(f"{self.world.size} processes agree: weights and history have sha256 {digest[:16]}...")

    def report(self, columns):
        """Writes front.csv, front.pt and front.png; prints the table."""
        args, share, statistics = self.args, self.seconds["search"] / self.clock(), columns.pop("statistics")
        self.log("done", seconds=self.seconds["total"], search_share=share)
        if self.world.rank:
            return
        with atomic_write(args.out / "front.csv", "w") as f:
            table = csv.writer(f, lineterminator="\n")
            table.writerow(columns)
            for *values, a in zip(*(column.tolist() for column in columns.values())):
                exact = [int(v) if name in COSTS else v for name, v in zip(columns, values)]
                table.writerow([*exact, " ".join(map(repr, a))])
        deployed = {"format": 1, "network": self.network, "model": self.net.state_dict(), "front": columns,
                    "statistics": statistics, "cost": args.cost, "latency": self.net.latency_table,
                    "data": self.data.about}  # fmt: skip
        save_tensors(args.out / "front.pt", deployed)
        shown = {name: columns[name] for name in columns if name in UNITS}
        tell("\n" + "".join(f"{UNITS[name][0]:>11}        %" for name in shown) + "    loss   top-1          top-5")
        for i in range(len(columns["top1"])):
            cells = (f"{v[i] / UNITS[name][1]:11.3f} {v[i] / v.max():8.1%}" for name, v in shown.items())
            loss, top1, error, top5 = (columns[name][i] for name in ("loss", "top1", "top1_stderr", "top5"))
            tell("".join(cells) + f" {loss:7.4f} {top1:7.2f} ± {error:4.2f} {top5:7.2f}")
        picture = draw_front(args, columns)
        total = timedelta(seconds=round(self.seconds["total"]))
        tell(f"{total} in all, {share:.1%} of it for the width search; see {args.out}/ for checkpoint.pt, log.jsonl, "
             f"front.csv, front.pt{' and front.png' if picture else ''}")  # fmt: skip


def timing(args):
    return dict(batch=args.latency_batch, threads=args.threads)


UNITS = {"flops": ("MFLOPs", 1e6), "params": ("params M", 1e6), "memory": ("memory MB", 1e6), "latency": ("latency ms", 1)}


def draw_front(args, columns):
    """front.png: top-1, with its standard error, against cost. False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    cost = columns[args.cost]
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel=f"{args.cost} (% of the full network)", ylabel="test top-1 (%)")
    axes.errorbar(100 * cost / cost.max(), columns["top1"], columns["top1_stderr"], fmt="o-", capsize=2)
    axes.set_title(f"{args.arch} on {args.data}, {args.method}")
    axes.grid(alpha=0.3)
    with atomic_write(args.out / "front.png") as f:
        figure.savefig(f, dpi=150, format="png")
    return True


# ------------------------------------------------------------------------------ a finished run's front, put to use


def load_front(args, world):
    try:
        return models.load(args.out / "front.pt", world.device)
    except FileNotFoundError:
        raise UserError(f"{args.out / 'front.pt'}: missing; a run writes it when it has finished") from None
    except Exception as e:  # a damaged file makes its readers raise nearly anything
        raise UserError(f"{args.out / 'front.pt'}: not a readable front ({type(e).__name__}: {first_line(e)})") from None


def benchmark(args, world):
    """--benchmark: latency, and peak memory, of RUN's front as extracted networks on this device. Memory is measured on a
    GPU; on a CPU it is the formula's, of one image."""
    net = load_front(args, world)
    if args.cost not in net.front:
        raise UserError(f"--cost {args.cost}: {args.out} has no such column in its front")
    widths = net.front["widths"]
    times = models.time_networks(net, widths, **timing(args))
    memory = "     peak MB" if world.device.type == "cuda" else "MB by formula"
    tell(f"{world.device}, {args.threads or torch.get_num_threads()} threads, batch {args.latency_batch}\n"
         f"  {args.cost:>8}  top-1   least ms  of full   median  (quartiles) {memory}")  # fmt: skip
    quartiles, least = times.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), 1), times.amin(1)
    for i, (a, low, middle, high) in enumerate(zip(widths, *quartiles)):
        peak = net.memory(a).item()
        if world.device.type == "cuda":
            others = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            models.time_forward(net.extract(a).eval(), torch.randn(args.latency_batch, *net.image, device=world.device), 1)
            peak = torch.cuda.max_memory_allocated() - others
        tell(f"  {net.front[args.cost][i] / net.front[args.cost].max():8.1%} {net.front['top1'][i]:6.2f} {least[i]:10.2f} "
             f"{least[i] / least[-1]:8.1%} {middle:8.2f}  ({low:.2f} to {high:.2f}) {peak / 1e6:9.2f}")  # fmt: skip


def export(args, world):
    """--export: the best network within a budget, as a file that runs without this project; loaded again and compared."""
    net = load_front(args, world).cpu()
    try:
        row = net.use(**{args.cost: args.export})
    except ValueError as e:
        raise UserError(f"--export: {e}") from None
    plain, data = net.extract().eval(), Data(args, world)
    if data.about["digest"] != net.data["digest"]:
        raise UserError(f"--data-dir: {args.data_dir} has other images than the run had")
    budget = f"{args.export:.2f}"
    stem = f"{args.cost}-{budget if float(budget) == args.export else repr(args.export)}"
    example = (torch.randn(2, *net.image),)
    program = torch.export.export(plain, example, dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.export.save(program, raw := io.BytesIO())
    written = {args.out / f"{stem}.pt2": (raw.getvalue(), lambda path: torch.export.load(path).module())}
    if importlib.util.find_spec("onnxscript") and importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        def load_onnx(path):
            session = onnxruntime.InferenceSession(path)
            return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])

        try:
            onnx = torch.onnx.export(program, dynamo=True, verbose=False).model_proto
            written[args.out / f"{stem}.onnx"] = onnx.SerializeToString(), load_onnx
        except Exception as e:  # its exporter is young: from torch 2.5 on, and not for all
            tell(f"no .onnx: {type(e).__name__}: {first_line(e)}")
    x, _ = next(iter(data.batches("test")))
    x = x.cpu()
    for path, (content, load) in written.items():
        with atomic_write(path) as f:
            f.write(content)
        again = load(path)
        with torch.no_grad():
            apart = (again(x) - plain(x)).abs().max().item()
            right = sum((again(x.cpu()).argmax(1) == y.cpu()).sum().item() for x, y in data.batches("test"))
        tell(f"{path}: {len(content) / 1e6:.2f} MB, {models.time_forward(again, x[:1]).min():.2f} ms an image, test top-1 "
             f"{100 * right / len(data.test_set):.2f} % (front.csv {row['top1']:.2f}); its outputs differ from the "
             f"network's by up to {apart:.1g}")  # fmt: skip
        if not apart < 1e-3:
            raise Failed(f"{path}: does not give what the network gives")


if __name__ == "__main__":
    sys.exit(main())
