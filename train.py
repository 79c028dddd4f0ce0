#!/usr/bin/env python3
"""Train a slimmable network and find the widths at which it is best for every compute budget.

    python train.py                                      # synthetic images, resnet8, CPU, two minutes
    torchrun --nproc_per_node=8 train.py --arch mbv2 --data imagenet --data-dir DIR
    python train.py --out RUN --export 0.5               # the finished run's best network within half of the cost, as a file

This file in order: recipes; `train`, the loop; `find_front` and `test_front`; `main`; then what
those need: arguments, processes, data, files, the run's state.
"""

import argparse
import csv
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import shlex
import signal
import stat
import struct
import sys
import tempfile
import threading
import time
import types
import warnings
import weakref
from collections import Counter
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps  # comes with torchvision
from torch.utils._pytree import tree_map_only
from torchvision.transforms import v2 as transforms

import models
from joslim import Joslim, RandomWidths, Replay, UniformWidths
from joslim import calibrate_bn, evaluate, pareto_front, sandwich_step, thin

fcntl = __import__("fcntl") if os.name == "posix" else None

# ------------------------------------------------------------------------------ recipes

# Each entry is a default of the flag of its name; what a recipe leaves out has the default that --help gives. The first network of
# a data set is its default; any other that is not listed takes the first one's recipe. `lr` is for batches of 256.

# The paper visits 1000 configurations: 200 epochs of 351 steps, two (--subnets) every 140 (tau).
CIFAR = dict(
    epochs=200, batch_size=128, lr=0.1, weight_decay=5e-4, tau=140, held_out=5000, eval_images=80, image_size=32,
    augment="shift", flip=True,
)  # fmt: skip
# Multiples of 8 suit tensor cores, and make so few convolution shapes that cuDNN's plans for them stay in its cache.
IMAGENET = dict(
    epochs=250, batch_size=1024, lr=0.125, weight_decay=4e-5, tau=625, held_out=10000, label_smoothing=0.1, image_size=224,
    augment="imagenet", flip=True, divisor=8,
)  # fmt: skip
# For two CPU cores. One sub-network a step: so short a training learns less with two.
SYNTHETIC = dict(
    epochs=8, batch_size=64, lr=0.5, weight_decay=5e-4, tau=48, held_out=1000, image_size=16, subnets=1, fresh_widths=True,
    num_prior=8, lower=0.125, warmup_epochs=0.5, eval_images=64, calibrate_images=512, front_size=12,
    augment="shift",
)  # fmt: skip
SMALL = dict(
    epochs=4, batch_size=32, lr=0.5, weight_decay=5e-4, tau=150, held_out=2500, image_size=28, subnets=1,
    warmup_epochs=0.2, eval_images=125, calibrate_images=1024, front_size=16,
)  # fmt: skip
RECIPES = {
    ("synthetic", "resnet8"): SYNTHETIC,
    # Its last maps are 1 x 1, where BatchNorm averages over images alone: 256 leave 32 to each of 8 processes.
    ("synthetic", "mbv2"): SYNTHETIC | dict(epochs=5, batch_size=256, lr=0.05, tau=32, eval_images=128, lower=0.25,
                                            image_size=32, fresh_widths=False),
    ("fashion-mnist", "resnet8"): SMALL,
    ("fashion-mnist", "mbv2"): SMALL | dict(lr=0.05),
    ("kmnist", "resnet8"): SMALL, ("emnist", "resnet8"): SMALL,
    ("cifar10", "resnet56"): CIFAR, ("cifar100", "resnet56"): CIFAR,
    ("folder", "resnet18"): lambda n: folder_recipe(n),  # by the number of images
    ("imagenet", "mbv2"): IMAGENET,
    ("imagenet", "resnet18"): IMAGENET | dict(epochs=100, tau=250),
}

# ------------------------------------------------------------------------------ the loop


def train(run: "Run") -> None:
    """Joslim, algorithm 2: every tau steps a round proposes configurations; a step trains M (--subnets), full and smallest."""
    args, world, data, net, sampler = run.args, run.world, run.data, run.net, run.sampler
    # The same loop is `slim` (one width for all layers) and `twostage` (one for each), drawn at random for each step.
    tau = args.tau if args.method == "joslim" else 1
    # A round proposes M, which all its steps train; with --fresh-widths, M for each step. Its first M join the history.
    per_round = args.subnets * (tau if args.fresh_widths else 1)

    @Replay  # on a GPU, as a CUDA graph where a round's widths come again: faster, the same numbers
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
                    if sampler.ready:  # once --num-prior are drawn; never for random samplers, which use no losses
                        # 1. Re-evaluate the history, all that rounds kept so far (see 4.), under today's weights, on images held
                        # out from training: each round takes the next --eval-images, over and over. Each process judges a
                        # part of the history, by these images' BatchNorm statistics, and has all losses then.
                        images, labels = data.held_out(run.step // tau)
                        run.observe(world.map(lambda some: evaluate(net, some, images, labels, args.amp), sampler.widths))
                    # 2. Fit a GP to these losses, 3. propose (until ready, draw at random), 4. append the first M proposals to
                    # the history (more would be too many to re-evaluate): joslim.py's `Joslim.sample`, on process 0 for all.
                    run.proposals = world.propose(sampler, per_round, keep=args.subnets)

            # A step. Processes average gradients alone: BatchNorm's statistics are those of each one's own share of the batch.
            turns = run.proposals.split(args.subnets)  # one, unless --fresh-widths
            widths = turns[run.step % len(turns)]
            torch.manual_seed(seeded(5, args.seed, run.step, world.rank).initial_seed())  # dropout, where there is any
            losses = add_gradients(x, y, widths)
            world.average_gradients(net)
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate(run.step, data.steps, args)
            run.optimizer.step()
            run.step += 1

            # Now and then a progress line, a checkpoint; the end, of all processes alike, where a signal asked one to stop.
            run.after_step(epoch, widths, losses)


def learning_rate(step: int, steps_per_epoch: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then linear decay to zero; the peak scales with the batch."""
    total = args.epochs * steps_per_epoch
    warm = min(args.warmup_epochs * steps_per_epoch, total / 2)
    peak = args.lr * args.batch_size / 256
    return peak * min((step + 1) / max(warm, 1), (total - step) / (total - warm))


def make_network(how: dict, lower: float) -> models.Slimmable:
    """A freshly initialised network. Raises UserError for one that cannot be trained as it is."""
    arch, image = how["arch"], (how["in_channels"], how["image_size"], how["image_size"])
    try:
        net = models.slimmable(from_file(how), image, how["divisor"]) if ":" in arch else models.build(**how)
        for training in (False, True) if arch not in models.ARCHS else ():
            with torch.no_grad():
                out = net.train(training)(torch.zeros(2, *image))
            if not isinstance(out, torch.Tensor) or out.shape != (2, how["num_classes"]):
                raise ValueError(f"does not give one logit a class for each image in train({training})")
    except (ValueError if arch in models.ARCHS else Exception) as e:
        raise e if isinstance(e, UserError) else UserError(f"--arch {arch}: {name_of(e)}") from None
    if torch.equal(net.channels(lower), net.channels(1.0)):
        why = ", ".join(sorted({*(net.kept or {}).values()})[:3]) or "--lower and --divisor leave no smaller one"
        raise UserError(f"--arch {arch}: keeps every width ({why})")
    return net


def from_file(how: dict) -> torch.nn.Module:
    """What FUNCTION of FILE.py returns for so many classes."""
    path, function = how["arch"].rsplit(":", 1)
    try:
        module = sys.modules["the_file_of_arch"] = types.ModuleType("the_file_of_arch")
        module.__file__ = path
        sys.path.append(os.path.dirname(path))  # what it imports may lie beside it
        exec(compile(Path(path).read_bytes(), path, "exec"), vars(module))
        return getattr(module, function)(how["num_classes"])
    except (Exception, SystemExit) as e:  # theirs, of any kind
        raise UserError(f"--arch {how['arch']}: {name_of(e)}") from None


def make_optimizer(net: torch.nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """SGD with momentum. Vectors, which are BatchNorm's parameters and biases, do not decay."""
    matrices, vectors = ([p for p in net.parameters() if (p.ndim > 1) == several] for several in (True, False))
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=args.lr, momentum=0.9)


# ------------------------------------------------------------------------------ the front


def find_front(run: "Run") -> torch.Tensor:
    """The configurations to test (k, d), by rising cost: non-dominated on the whole held-out split, at most --front-size."""
    args, net = run.args, run.net
    count = 2 if args.method != "slim" else 3 * args.front_size  # smallest and full; `slim`'s line
    uniform = torch.linspace(args.lower, 1, count, dtype=torch.float64)[:, None].expand(-1, net.num_widths)
    widths, loss = uniform, judge(run, uniform)
    if args.method != "slim":
        sampler = search(run)
        widths, loss = torch.cat([widths, sampler.widths]), torch.cat([loss, sampler.losses])
    cost, ranked = run.cost(widths), loss.clone()
    ranked[cost.argmax()] = -torch.inf  # the full network ends the front, whatever the noise says: budgets are shares of its cost
    front = thin(pareto_front(ranked, cost), cost, args.front_size)
    if args.cost == "latency":  # so far predicted; of those measured, what is no better for more time goes
        times = models.time_networks(net, widths[front], **run.timing).amin(1) if run.world.rank == 0 else None
        times = run.world.from_first(times)
        rising = pareto_front(ranked[front], times)
        front, run.milliseconds = front[rising], times[rising]
    run.log("front", cost=cost[front].tolist(), held_out_loss=loss[front].tolist(), candidates=len(loss))
    return widths[front]


FINAL = 128  # configurations that `search` adds, at most, to those of a run's rounds


def search(run: "Run") -> Joslim:
    """The width search on finished weights, each configuration judged once: the two-stage method's second stage. `joslim` goes
    on from its history, which was proposed for earlier weights. Both methods stop at P + min(P, FINAL) configurations, P
    those that a `joslim` run's rounds add to its history: M every --tau steps."""
    sampler, proposed = run.joslim_sampler(), run.rounds * run.args.subnets
    visits = proposed + min(proposed, FINAL)
    run.say(f"searching the finished weights: {visits} configurations")
    if run.args.method == "joslim":
        sampler.load_state_dict(run.sampler.state_dict())
        sampler.losses = torch.full_like(sampler.losses, math.nan)
    while True:
        new = sampler.losses.isnan().nonzero()[:, 0]  # not judged yet; the others' losses cannot have changed
        sampler.observe(judge(run, sampler.widths[new]), new)
        if len(sampler.widths) >= visits:
            return sampler
        run.world.propose(sampler, run.args.subnets)


def judge(run: "Run", widths: torch.Tensor) -> torch.Tensor:
    """Losses (n,) on the whole held-out split, by each batch's BatchNorm statistics; each process judges some of the widths."""

    def losses(some):
        batches = run.data.batches("held-out")
        return sum(evaluate(run.net, some, x, y, run.args.amp) * len(x) for x, y in batches) / run.args.held_out

    return run.world.map(losses, widths)


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
        return torch.cat([score(plain, data.batches("test")), torch.stack(statistics)], 1)

    run.say(f"testing {len(front)} configurations of the front")
    size = len(models.get_statistics(net))
    loss, top1, top5, statistics = run.world.map(scores, front, 3 + size).split([1, 1, 1, size], 1)
    columns = {cost: getattr(net, cost)(front) for cost in COSTS}
    if args.cost == "latency":
        columns["latency"] = run.milliseconds
    error = (top1 * (100 - top1).clamp_min(0) / len(data.test_set)).sqrt()  # of a share of so many images
    columns |= {"loss": loss[:, 0], "top1": top1[:, 0], "top1_stderr": error[:, 0], "top5": top5[:, 0]}
    return columns | {"widths": front, "statistics": statistics.float()}


@torch.no_grad()
def score(nets: list[torch.nn.Module], batches) -> torch.Tensor:
    """Loss, top-1 and top-5 (%) of each network, (k, 3) float64, in one pass over the batches (x, y)."""
    total, count = torch.zeros(len(nets), 3, dtype=torch.float64), 0
    for x, y in batches:  # once for all: loading may cost more than the networks
        total, count = total.to(y.device), count + len(y)
        for one, row in zip(nets, total):
            logits = one(x)
            hits = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
            row += torch.stack([F.cross_entropy(logits, y, reduction="sum"), 100 * hits[:, 0].sum(), 100 * hits.sum()])
    return total / count


# ------------------------------------------------------------------------------ from start to end


def main(argv: list[str] | None = None) -> int:
    """A whole run -> its exit code. What the user can mend is one line on stderr, from one process."""
    argv = sys.argv[1:] if argv is None else argv
    world, run, code = World(), None, 1
    with handling_signals(world.ask):
        try:
            args = parse_args(argv)
            world.meet(args.device)
            if args.export is not None:
                export(args, world)
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
            end_loaders()
            world.leave(code)
    return code


class UserError(Exception):
    """What the user can mend: printed as one line."""

    code = 2


class Failed(UserError):
    code = 1  # a run that was well asked for cannot go on: training blew up, or another process has gone


class Stopped(KeyboardInterrupt):
    """A signal, its number the argument, asked for it."""


def one_line(e, run):
    """What to say of an exception, or None where it is a bug; the exit code."""
    if isinstance(e, KeyboardInterrupt):
        none = "stopped before training began; nothing has changed, the same command starts it again"
        line = f"stopped at step {run.step}, all saved; {run.continuation}" if run else none
        return line, 128 + (e.args[0] if isinstance(e, Stopped) else signal.SIGINT)
    if isinstance(e, UserError):
        return str(e), e.code
    if isinstance(e, RuntimeError) and "DataLoader worker" in str(e):  # torch raises it wherever training is at the time
        return f"{name_of(e)}; fewer --workers need less memory, and docker run --shm-size allows more", 2
    if out_of_memory(e):
        return f"{name_of(e)}; a smaller --batch-size or --eval-images needs less, and --accumulate", 2
    if of_the_machine(e):
        where = f"{e.filename}: {e.strerror}" if getattr(e, "filename", None) else name_of(e)
        return f"{where}{'; the last checkpoint stands' if run and run.step else ''}", 2
    return None, 1


def out_of_memory(e):
    """Whether an exception says so: Python's and numpy's, and torch's of a GPU and of a CPU."""
    says = "out of memory" in str(e) or "can't allocate memory" in str(e)
    return isinstance(e, MemoryError) or isinstance(e, RuntimeError) and says


def of_the_machine(e):
    """Whether an exception is the operating system's; torch and Python pass some on as a RuntimeError in its words."""
    words = [os.strerror(number) for number in errno.errorcode] + ["can't start new thread"]
    return isinstance(e, OSError) or isinstance(e, RuntimeError) and any(word in str(e) for word in words)


def tell(text, stream=None):
    """Prints a line, what the stream cannot encode escaped. A terminal or pipe that is gone ends no run."""
    stream = stream or sys.stdout  # which may be None, and print silent
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except Exception as e:  # of a stream of one's own, nearly anything
        if isinstance(e, OSError):
            with suppress(Exception):
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


LOADERS = weakref.WeakSet()  # the loading processes, which no signal reaches


def end_loaders():
    """Kills loading processes that are still there: deaf ones outlive the polite request that Python makes at exit."""
    loaders = [loader for loader in LOADERS if loader.is_alive()]
    if loaders and hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises where a worker is killed
    for loader in loaders:
        loader.kill()


# ------------------------------------------------------------------------------ arguments

COSTS = "flops", "params", "memory"  # and latency, which is measured
FOLDERS = "folder", "imagenet"
# Flags that may change between a run and its continuation: they decide where and how fast, not what.
FREE = {"out", "resume", "search", "device", "data_dir", "workers", "save_minutes", "log_seconds", "download", "export",
        "finetune"}  # fmt: skip
# Those that --search uses; all else is as the run had it that trained the weights.
SEARCHED = {"cost", "method", "tau", "subnets", "num_prior", "beta", "lower", "front_size", "calibrate_images", "amp", "threads",
            "latency_batch"}  # fmt: skip


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse prints the usage as well, dozens of lines
        raise UserError(message.removeprefix("argument "))


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


def whole(low, bits=63):
    return typed(int, lambda v: low <= v < 2**bits, f"a whole number, at least {low} and below 2^{bits}")


count = whole(1)
amount = typed(float, lambda v: 0 <= v < math.inf, "a number, at least 0")
portion = typed(float, lambda v: 0 <= v < 1, "a number in [0, 1)")
multiplier = typed(float, lambda v: 0 < v <= 1, "a number in (0, 1]")
folder = typed(lambda text: text and Path(text).expanduser(), bool, "a folder")  # a shell leaves the ~ of --out=~/x
device = typed(torch.device, lambda v: v.type in ("cpu", "cuda"), "cpu, cuda or cuda:N")


def folder_recipe(n: int) -> dict:
    """For n training images of one's own; at 64 pixels, which two CPU cores can do. tau: see `tau_of_share`."""
    held_out, epochs = max(min(n // 10, 5000), 2), min(max(round(1000 / n**0.5), 5), 50)
    return dict(
        epochs=epochs, batch_size=2 ** min(max(round(math.log2(n) / 2), 4), 8), lr=0.2, weight_decay=5e-4, tau=None,
        held_out=held_out, image_size=64, augment="shift", flip=True, subnets=1, fresh_widths=True, num_prior=8, lower=0.25,
        warmup_epochs=epochs / 10, eval_images=min(held_out, 256), divisor=8,
    )  # fmt: skip


def tau_of_share(args: argparse.Namespace, n: int, share: float = 0.1) -> int:
    """Steps between rounds with which the search takes this share of a run on n training images, by counting images that pass
    forward: three for each forward and backward of a step's M + 2 networks; R rounds of M proposals judge M R^2 / 2
    configurations in training, and 2 M R on all held-out images at the end."""
    steps = args.epochs * ((n - args.held_out) // args.batch_size)
    most = share * 3 * (args.subnets + 2) * steps * args.batch_size
    a, b = args.subnets * args.eval_images / 2, 2 * args.subnets * args.held_out
    rounds = ((b * b + 4 * a * most) ** 0.5 - b) / (2 * a)  # where a R^2 + b R = most
    return max(round(steps / max(rounds, 1)), 1)


def parse_args(argv=None):
    shown = {" ".join(key): r for key, r in RECIPES.items() if not callable(r)}
    few = {n: argparse.Namespace(**folder_recipe(n)) for n in (300, 6000, 300000)}
    shown |= {f"folder resnet18, {n} images": vars(r) | {"tau": tau_of_share(r, n)} for n, r in few.items()}
    recipes = "".join(f"  {key}: {' '.join(f'{k}={v}' for k, v in r.items())}\n" for key, r in shown.items())
    p = Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
               epilog=f"recipes, other defaults for some data and networks:\n{recipes}")  # fmt: skip
    switch = argparse.BooleanOptionalAction

    g = p.add_argument_group("what to train")
    g.add_argument("--data", default="synthetic", choices=dict.fromkeys(data for data, _ in RECIPES),
                   help="data set; folder: images of your own; imagenet: too, by the paper's recipe (default: %(default)s)")
    g.add_argument("--data-dir", type=folder, metavar="DIR",
                   help="where its files lie; folder, imagenet: train/ and val/ with a folder for each class (folder: or only these)")
    g.add_argument("--download", action="store_true", help="let torchvision fetch a missing data set")
    g.add_argument("--image-size", type=whole(2), metavar="PIXELS", help="resize images to this")
    g.add_argument("--augment", choices=["none", "shift", "imagenet"], default="none",
                   help="training images: as they are, shifted by up to an eighth, random crops in jittered colours (folders)")
    g.add_argument("--flip", action=switch, default=False, help="mirror half: not for letters, signs, left and right hands")
    g.add_argument("--arch", help=f"{', '.join(models.ARCHS)}; torchvision's classification networks; FILE.py:FUNCTION, which "
                   "gives one of your own for so many classes (default: the first recipe's)")  # fmt: skip
    g.add_argument("--method", choices=["joslim", "slim", "twostage"], help="by a GP (default); uniform; random, then searched")
    g.add_argument("--cost", default="flops", choices=[*COSTS, "latency"], help="what a budget limits (default: flops)")
    g.add_argument("--search", type=folder, metavar="RUN", help="do not train: search its weights, as twostage does its own")
    g.add_argument("--init", type=folder, metavar="FILE", help="start from torchvision's weights, or a front.pt's")
    g.add_argument("--seed", type=whole(0, 32), default=0, help="of weights, split, data order, widths (default: %(default)s)")

    g = p.add_argument_group("weights")
    g.add_argument("--epochs", type=count)
    g.add_argument("--batch-size", type=count, help="images a step, all processes together")
    g.add_argument("--accumulate", type=count, default=1, metavar="K", help="take a process's batch in K parts: less memory")
    g.add_argument("--lr", type=amount, help="peak learning rate at batch 256; scaled by batch / 256")
    g.add_argument("--warmup-epochs", type=amount, default=5.0, help="linear warm-up (default: %(default)s)")
    g.add_argument("--weight-decay", type=amount, help="not on BatchNorm and biases")
    g.add_argument("--label-smoothing", type=portion, default=0.0, help="for those that learn from the labels")
    g.add_argument("--distillation", action=switch, default=True, help="sub-networks learn from the full one, not the labels")

    g = p.add_argument_group("widths")
    g.add_argument("--lower", type=multiplier, default=0.42, metavar="W0", help="smallest width (default: %(default)s)")
    g.add_argument("--divisor", type=count, default=1, metavar="N", help="channel counts are multiples; 8 suits processors")
    g.add_argument("--subnets", type=count, default=2, metavar="M", help="proposals a round, for all its steps (default: 2)")
    g.add_argument("--tau", type=count, help="steps between rounds (--data folder: so many that the search takes a tenth)")
    g.add_argument("--fresh-widths", action=switch, default=False, help="M proposals for each step of a round, not for all")
    g.add_argument("--num-prior", type=count, default=20, metavar="N0", help="uniform widths before the GP's (default: 20)")
    g.add_argument("--beta", type=amount, default=0.1, help="the variance's weight in the acquisition (default: %(default)s)")
    g.add_argument("--held-out", type=count, metavar="IMAGES", help="training images kept for judging configurations")
    g.add_argument("--eval-images", type=whole(2), default=512, metavar="N", help="of these, in a round (default: 512)")
    g.add_argument("--calibrate-images", type=whole(2), default=2048, metavar="N", help="before tests (default: 2048)")
    g.add_argument("--front-size", type=whole(2), default=20, metavar="K", help="networks tested, at most (default: 20)")

    g = p.add_argument_group("the run")
    g.add_argument("--out", type=folder, metavar="RUN", help="its folder (default: runs/<data>-<arch>-<method>-<seed>)")
    g.add_argument("--resume", action="store_true", help="continue the run in --out; start it if there is none")
    g.add_argument("--device", type=device, help="cpu, cuda or cuda:N (default: cuda where there is one)")
    g.add_argument("--amp", action=switch, help="bfloat16 autocast (default: on GPUs that have it)")
    g.add_argument("--workers", type=whole(0), metavar="N", help="loading processes of each, for folders (default: its cores)")
    g.add_argument("--save-minutes", type=amount, default=10.0, metavar="T", help="between checkpoints, at most (default: 10)")
    g.add_argument("--log-seconds", type=amount, default=10.0, metavar="T", help="between progress lines (default: 10)")

    g = p.add_argument_group("a finished run, put to use")
    g.add_argument("--export", type=amount, metavar="BUDGET",
                   help="write the best network in --out within BUDGET (to 1 a share of the cost, else the cost) as a .pt2 file")
    g.add_argument("--finetune", type=whole(0), default=0, metavar="EPOCHS", help="with --export: train it alone first, so long")
    g.add_argument("--threads", type=count, metavar="N", help="of a CPU, for latencies (default: torch's)")
    g.add_argument("--latency-batch", type=count, default=1, metavar="IMAGES", help="for latencies (default: %(default)s)")

    args = p.parse_args(argv)
    if args.search and args.method not in (None, "twostage"):
        p.error(f"--search: searches as --method twostage does, not {args.method}")
    alone = args.out and not args.search and from_torchrun("WORLD_SIZE", 1) == 1
    if args.export is None and args.finetune or args.export is not None and not alone:
        p.error("--export BUDGET, with --finetune too, needs --out, the finished run's folder; no --search, one process")
    finished = args.search or (args.out if args.export is not None else None)
    if finished:  # its settings are the defaults
        state = read_finished(finished)
        known = {k: v for k, v in state["settings"].items() if not (args.search and k in ("cost", "method", "trained_as"))}
        p.set_defaults(data_dir=state["data_dir"] and Path(state["data_dir"]), **known)
    else:
        if (args.data_dir is None) != (args.data == "synthetic"):
            p.error(f"--data-dir: --data {args.data} {'reads no files' if args.data_dir else 'needs it, the folder of its files'}")
        first = next(key for key in RECIPES if key[0] == args.data)
        recipe = RECIPES.get((args.data, args.arch), RECIPES[first])
        if callable(recipe):
            images = len(list_images(args)[0][0])
            recipe = recipe(images)
        p.set_defaults(arch=first[1], **recipe)
    args = p.parse_args(argv)
    args.tau = args.tau or tau_of_share(args, images)
    for name, value in settings(args).items() if finished else ():
        if str(known.get(name, value)) != str(value) and not (args.search and name in SEARCHED):
            p.error(f"{'--search' if args.search else '--export'}: that run has --{name.replace('_', '-')} {known[name]}")
    args.method = args.method or ("twostage" if args.search else "joslim")
    if args.eval_images > args.held_out:
        p.error(f"--eval-images {args.eval_images} is more than --held-out {args.held_out}")
    if args.augment == "imagenet" and args.data not in FOLDERS:
        p.error(f"--augment imagenet: for folders of images; --data {args.data} takes none or shift")
    if args.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        args.workers = max(1, min(16, cores // max(from_torchrun("LOCAL_WORLD_SIZE", 1), 1)))  # each holds two batches
    args.workers *= not multiprocessing.current_process().daemon  # such a one may have no children
    args.init = args.init and Path(os.path.abspath(args.init))  # the same, however it is called
    args.arch = os.path.abspath(os.path.expanduser(args.arch)) if ":" in args.arch else args.arch
    args.arch_file = hashlib.sha256(Path(args.arch.rsplit(":", 1)[0]).read_bytes()).hexdigest()[:12] if ":" in args.arch else None
    args.out = args.out or Path("runs", f"{args.data}-{Path(args.arch).name.replace(':', '-')}-{args.method}-{args.seed}")
    return args


def from_torchrun(name, otherwise):
    """A whole number that torchrun puts into the environment."""
    try:
        return int(os.environ.get(name) or otherwise)
    except ValueError:
        raise UserError(f"{name} is {os.environ[name]!r} in the environment, not a number; leave that to torchrun") from None


# ------------------------------------------------------------------------------ processes

PATIENCE = timedelta(minutes=30)  # with processes that do not answer


class World:
    """This process among all that torchrun started; alone without it."""

    def __init__(self):
        self.rank, self.local_rank, self.size, self.faults, self.job = 0, 0, 1, None, None
        self.asked, self.finishing = 0, False  # see `ask`

    def meet(self, device: torch.device | str | None = None) -> "World":
        """Finds the other processes, where there are any, and takes its device."""
        launched = os.environ.get("WORLD_SIZE", "1") != "1" or "TORCHELASTIC_RUN_ID" in os.environ
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        slow = threading.Timer(10, tell, [f"waiting for process 0 at {where}, for {PATIENCE.seconds // 60} minutes at most"])
        try:
            self.store = self.find_others(slow) if launched else None
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            if self.device.type == "cuda":
                index = self.local_rank if self.device.index is None else self.device.index
                if index >= torch.cuda.device_count():
                    raise UserError(f"--device {device}: GPU {index} asked for, this machine has {torch.cuda.device_count()}")
                self.device = torch.device("cuda", index)
                torch.cuda.set_device(self.device)
            if self.size > 1:
                backend = "nccl" if self.device.type == "cuda" else "gloo"
                dist.init_process_group(backend, timeout=PATIENCE, rank=self.rank, world_size=self.size, store=self.store)
        except (ValueError, RuntimeError) as e:
            raise UserError(f"process 0 at {where}: the processes do not meet ({name_of(e)}); use torchrun") from None
        finally:
            slow.cancel()
        return self

    def find_others(self, slow):
        """The store by which the processes find each other, at the address that torchrun puts into the environment."""
        self.local_rank, rank, size = (int(os.environ.get(name, 0)) for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"))
        if not 0 <= rank < size:
            raise ValueError(f"there is no process {rank} of {size}")
        if self.local_rank == 0:
            slow.start()
        with handling_signals(signal.SIG_DFL):  # torch waits where Python's handlers do not run
            store, self.rank, self.size = next(dist.rendezvous("env://", timeout=PATIENCE))
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.job = dist.TCPStore(*address, is_master=False, timeout=PATIENCE)
        self.faults = dist.PrefixStore(f"faults {restart}", self.job)
        if from_torchrun("LOCAL_WORLD_SIZE", 0) == self.size:
            # torchrun's store outlives its workers: a restart must not find the dead ones' addresses in it
            # (pytorch issue 135712). Nodes count restarts differently, so this serves a single one.
            store = dist.PrefixStore(restart, store)
        return store

    def first_to_fail(self):
        """Whether no other process failed before. The first speaks; the others, who lose it, leave without a word."""
        if not self.faults:  # all fail alike, over the command's flags
            return os.environ.get("WORLD_SIZE", "1") == "1" or not os.environ.get("LOCAL_RANK", "0").strip("0").isdigit()
        with suppress(RuntimeError):  # where process 0 has gone, and the store with it
            return self.faults.add("failed", 1) == 1
        return False

    def leave(self, code=0):
        """Ends the process group, where there is one. With an exit code of a failure and NCCL, ends the process."""
        if dist.is_initialized():
            if code and dist.get_backend() == "nccl":
                # NCCL's own end may wait for the other processes, and these, in a collective, for this one.
                if sys.exc_info()[0]:  # a bug's traceback, on its way
                    sys.excepthook(*sys.exc_info())
                sys.stdout.flush()  # the other has a line's end behind it
                os._exit(code)
            # Until torch 2.8 this joins gloo's threads without letting go of Python's lock, which one that still
            # drops the last call's tensor waits for (pytorch pull request 154976): leave it time to.
            time.sleep(0.1)
            dist.destroy_process_group()
            with suppress(RuntimeError):  # the store may go with process 0, and torch is long about it in those who ask then
                for _ in range(20):
                    if code and self.rank == 0 and self.faults.add("failed", 0) < self.size:
                        time.sleep(0.1)

    def ask(self, number, frame):
        """The handler of signals. One to any process ends all after the same step, or at once before and after training."""
        self.asked = number
        if not self.finishing:
            raise Stopped(number)

    def agree_to_stop(self):
        """Whether any process was asked to, the same on all."""
        asked = torch.tensor([float(self.asked)], device=self.device)
        return self.sum(asked).item() > 0 if self.size > 1 else self.asked > 0

    @contextmanager
    def finishing_steps(self):
        self.finishing = True
        yield
        stopping = self.agree_to_stop()  # since they last did
        self.finishing = False
        if stopping or self.asked:
            raise Stopped(self.asked or signal.SIGTERM)

    def together(self, fn, *args, **how):
        """A collective operation; that another process has gone is one line."""
        try:
            return fn(*args, **how)
        except RuntimeError as e:
            if "DataLoader worker" in str(e) or out_of_memory(e):  # the first may come at any time
                raise
            raise Failed(f"process {self.rank}: another process has gone ({name_of(e)}); the last checkpoint stands") from e

    def sum(self, t):
        """The tensor's sum over processes, in place: one all-reduce."""
        if self.size > 1:
            self.together(dist.all_reduce, t)
        return t

    def average_gradients(self, net):
        """Every gradient's mean over processes, by one all-reduce of them all."""
        if self.size > 1:
            grads = [p.grad for p in net.parameters() if p.grad is not None]
            joined = self.sum(torch.cat([g.flatten() for g in grads])).div_(self.size)
            for g, part in zip(grads, joined.split([g.numel() for g in grads])):
                g.copy_(part.view_as(g))

    def from_first(self, value):
        """Process 0's value, of tensors and plain values, on every process."""
        box = [value]
        if self.size > 1:
            self.together(dist.broadcast_object_list, box, device=self.device)
        return box[0]

    def gather(self, value):
        """The plain values of all processes, in a list."""
        values = [value] * self.size
        if self.size > 1:
            self.together(dist.all_gather_object, values, value)
        return values

    def require_same(self, **values):
        """Raises UserError, which names a flag, unless all processes hold the same values for these."""
        first, *others = self.gather(values)
        for (k, other), name in itertools.product(enumerate(others, 1), values):
            if other.get(name) != first.get(name):
                raise UserError(f"--{name.replace('_', '-')}: processes 0 and {k} have different ones; start all alike")

    def propose(self, sampler, m, keep=None):
        """sampler.sample(m, keep), and the sampler's state, alike on every process: GPs may round differently on another machine."""
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
        return self.sum(rows).cpu()  # in each row all but one process have zeros


# ------------------------------------------------------------------------------ data


class Data:
    """The training, held-out and test images, in the batches that a run asks for.

    Order and augmentation depend on seed, epoch and image alone: not on where a run was stopped, the
    number of processes or of workers. `about` is what inference needs (names of the classes; mean and deviation, for
    values in [0, 1], by which images are normalised), and a digest by which a run knows its data again.
    """

    def __init__(self, args, world):
        self.args, self.world = args, world
        read = read_folders if args.data in FOLDERS else read_arrays
        (self.training_set, self.held_out_set, self.test_set), self.channels, about = read(args, world)
        mean, std = (v.flatten().tolist() for v in (self.training_set.mean / 255, self.training_set.std / 255))
        self.about = about | dict(mean=mean, std=std, split=dict(seed=args.seed, held_out=args.held_out))
        self.steps = len(self.training_set) // args.batch_size

    @functools.cached_property
    def chance(self):
        """What a network gets that does not look at images: its training loss, its top-1 in the test (%)."""
        seen, tested = (part.y.bincount().double() / len(part) for part in (self.training_set, self.test_set))
        return -torch.special.xlogy(seen, seen).sum().item(), 100 * tested.max().item()

    def train(self, epoch, start=0):
        """This process's share of the epoch's batches (x, y), augmented, from batch number `start` on."""
        order = torch.randperm(len(self.training_set), generator=seeded(3, self.args.seed, epoch))
        shares = order[: self.steps * self.args.batch_size].view(self.steps, self.world.size, -1)
        return self.normalised(self.training_set.load(shares[start:, self.world.rank], epoch))

    def held_out(self, number):
        """Held-out batch (x, y) `number` (they go round), the same on each process."""
        n = self.args.eval_images
        i = torch.arange(n * number, n * (number + 1)) % len(self.held_out_set)
        parts = self.held_out_set.load(i.split(32))  # for all workers to share
        return map(torch.cat, zip(*self.normalised(parts)))

    def batches(self, which):
        """All (x, y) of "held-out", "test" or, unaugmented, "calibrate" images, the same on each process."""
        images = {"held-out": self.held_out_set, "test": self.test_set, "calibrate": self.training_set}[which]
        n = min(len(images), self.args.calibrate_images) if which == "calibrate" else len(images)
        batches = torch.arange(n).tensor_split(math.ceil(n / 256))  # BatchNorm cannot do with a last batch of one
        return self.normalised(images.load(batches))

    def normalised(self, batches):
        mean, std = (v.to(self.world.device) for v in (self.training_set.mean, self.training_set.std))
        for x, y in batches:
            yield (x.float() - mean) / std, y


def seeded(*keys):
    """A CPU generator whose stream depends on all keys (whole numbers) alone."""
    seed = 0
    for k in keys:
        seed = (seed * 1_000_003 + k + 1) % 2**63
    return torch.Generator().manual_seed(seed)


def split(labels, args, world):
    """Indices of the held-out and of the other training images, among which every class keeps one if it has any."""
    n = len(labels)
    if args.held_out + args.batch_size > n:
        raise UserError(f"--batch-size {args.batch_size} and --held-out {args.held_out}: there are {n} training images")
    order = torch.randperm(n, generator=seeded(2, args.seed))
    held_out, rest = order[: args.held_out], order[args.held_out :]
    for c in sorted({*labels.tolist()} - {*labels[rest].tolist()}):  # a rare one changes places with one of many
        many = (labels[rest].bincount()[labels[rest]] > 1).nonzero()[:1, 0]
        here = (labels[held_out] == c).nonzero()[: len(many), 0]
        held_out[here], rest[many] = rest[many], held_out[here]
    none = sorted({*labels.tolist()} - {*labels[rest].tolist()})
    if none and world.rank == 0:
        tell(f"{len(none)} classes have no training image, since all are held out (a smaller --held-out helps): {none[:20]}")
    return held_out, rest


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
        """The listed batches of indices as (x, y), x uint8, in order; augmented as it is the epoch's turn, or not at all."""
        device = self.x.device
        if epoch is not None:
            g = seeded(3, self.seed, epoch)
            torch.randperm(len(self), generator=g)  # the epoch's order
            crop = torch.randint(2 * self.pad + 1, (2, len(self)), generator=g).to(device)
            flip = (torch.rand(len(self), generator=g) < 0.5).to(device)
            batches = batches.to(device)  # at once: the loop itself copies nothing there and so never waits
        along, inside = torch.arange(self.size, device=device), slice(self.pad, self.pad + self.size)
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
            yield x, self.y[i]


def array_sets(args, world, x, y, test_x, test_y):
    """Training, held-out and test images of two uint8 tensors."""
    held_out, rest = split(y, args, world)
    how = dict(size=args.image_size, seed=args.seed, device=world.device)
    train = ArrayImages(x, y, rest, **how, shift=args.augment == "shift", flip=args.flip)
    others = (x, y, held_out), (test_x, test_y, torch.arange(len(test_x)))
    return train, *(ArrayImages(*part, **how, like=train) for part in others)


def read_arrays(args, world):
    """-> (training, held-out and test images), channels; names of the classes, and a digest."""
    *parts, names = load_arrays(args, world)
    digest = hashlib.sha256()
    for images, labels in parts:
        if len(images) != len(labels) or len(labels) == 0 or labels.min() < 0 or labels.max() >= len(names):
            raise UserError(f"--data-dir: {len(images)} images, {len(labels)} labels, not all of {args.data}'s {len(names)} classes")
        if args.data == "synthetic":  # whose images differ in single bits from processor to processor
            images = labels = torch.tensor([len(images)])
        digest.update(images.contiguous().numpy())
        digest.update(labels.contiguous().numpy())
    return array_sets(args, world, *parts[0], *parts[1]), parts[0][0].shape[1], dict(classes=names, digest=digest.hexdigest())


# Data sets that torchvision reads: its class, the names of the parts in IDX files (CIFAR's are pickles), what else it takes.
ARRAYS = {
    "fashion-mnist": (torchvision.datasets.FashionMNIST, ("train", "t10k"), {}),
    "kmnist": (torchvision.datasets.KMNIST, ("train", "t10k"), {}),
    "emnist": (torchvision.datasets.EMNIST, ("emnist-balanced-train", "emnist-balanced-test"), {"split": "balanced"}),
    "cifar10": (torchvision.datasets.CIFAR10, (), {}),
    "cifar100": (torchvision.datasets.CIFAR100, (), {}),
}


def load_arrays(args, world):
    """-> (train x, train y), (test x, test y), names of the classes; x uint8 (n, c, h, w). torchvision reads the files."""
    if args.data == "synthetic":
        return synthetic(16384 + args.held_out, 0), synthetic(4096, 1), [str(c) for c in range(60)]
    if not args.data_dir.is_dir() and not args.download:
        raise UserError(f"--data-dir: {args.data_dir} is not a folder")
    reader, idx, more = ARRAYS[args.data]
    folder = args.data_dir / (Path(reader.__name__, "raw") if idx else reader.base_folder)
    files = [(f"{part}-{kind}-ubyte", None) for part in idx for kind in ("images-idx3", "labels-idx1")]
    for name, _ in files:
        prepare(world, f"{folder / name}.gz: could not be unpacked", unpack, folder / name)
    parts, how = [], dict(root=args.data_dir, **more)
    for part in ("train", "test"):
        if args.download:
            prepare(world, f"--download: {args.data} could not be fetched", reader, train=part == "train", download=True, **how)
        try:
            images = reader(train=part == "train", **how)  # CIFAR's verify their checksums before they open a pickle
        except Exception as e:  # a damaged file makes its readers raise nearly anything
            files = files or [*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])]
            bad = [folder / name for name, md5 in files if not torchvision.datasets.utils.check_integrity(folder / name, md5)]
            if bad:
                raise UserError(f"{bad[0]}: missing or damaged; put the data set's files there, or try --download") from None
            raise UserError(f"{folder}: {part} images or labels are not of the kind expected ({name_of(e)})") from None
        x = torch.as_tensor(images.data)
        x = x.mT if args.data == "emnist" else x  # on their sides in the files
        parts.append((x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2), torch.as_tensor(images.targets)))
    return *parts, list(images.classes)


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
        raise UserError(f"{failed} ({name_of(e)})") from None
    world.gather(None)


def name_of(e):
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"


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
    CMYK, palettes and LAB are converted; embedded colour profiles are ignored. Raises ValueError for what has no known
    range (32-bit integers, floats), and whatever Pillow does for what it cannot read.
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
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    longest = 4 * min(image.size)  # the middle of a very long one: whole, it would be huge once its short side is --image-size
    if max(image.size) > longest:
        image = transforms.functional.center_crop(image, [min(side, longest) for side in image.size[::-1]])
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
        centre = [transforms.Resize(short), transforms.CenterCrop(size)]
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

    y = property(lambda self: self.labels[self.index])

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
            raise UserError(f"{path}: not a readable image ({name_of(e)})") from None

    def load(self, batches, epoch=None):
        """As `ArrayImages.load`."""
        keys = [[(epoch, i) for i in batch.tolist()] for batch in batches]
        fork = "fork" if self.workers and "fork" in multiprocessing.get_all_start_methods() else None
        loader = torch.utils.data.DataLoader(self, batch_sampler=keys, num_workers=self.workers,
                                             pin_memory=self.device.type == "cuda",
                                             multiprocessing_context=fork)  # fmt: skip
        # A signal to the whole group is the training process's to act on, which saves and then ends its loaders.
        deaf = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS) if fork else None
        try:
            loaded = iter(loader)
        finally:
            if fork:
                signal.pthread_sigmask(signal.SIG_SETMASK, deaf)
        LOADERS.update(getattr(loaded, "_workers", ()))
        try:
            for batch in loaded:
                yield [t.to(self.device, non_blocking=True) for t in batch]
        except UserError as e:  # of a loading process, with its traceback before it
            raise UserError(str(e).rsplit("UserError: ", 1)[-1].rstrip()) from None


def read_folders(args, world):
    """As `read_arrays`, of `list_images`; where those of the tests are drawn, their names, too."""
    train, val, classes, drawn = list_images(args, world)
    held_out, rest = split(train[1], args, world)
    paths = [os.fsdecode(path) for path in (*train[0], *val[0])]
    bytes_each = 3 * args.image_size**2
    small = args.augment != "imagenet" and bytes_each * len(paths) <= IN_MEMORY

    def check(i):
        try:  # the header; of val/, which is used after all training, the whole
            with open(paths[i], "rb") as f:
                size, content = os.fstat(f.fileno()).st_size, f.read(2**16)
                f.seek(max(size - 2**12, 0))
                content += f.read()
                f.seek(0)
                Image.open(f).close()
            if i >= len(train[0]) and not small:
                decode(paths[i])
            return hashlib.sha256(content + str(size).encode()).digest()
        except Exception as e:
            raise UserError(f"{paths[i]}: not a readable image ({name_of(e)})") from None

    with ThreadPool(max(args.workers, 1)) as threads:  # each process takes its share
        checked = threads.map(check, range(world.rank, len(paths), world.size), 256)
    contents = [b""] * len(paths)
    for rank, share in enumerate(world.gather(b"".join(checked))):
        contents[rank :: world.size] = [share[k : k + 32] for k in range(0, len(share), 32)]
    again = {*contents[: len(train[0])]} & {*contents[len(train[0]) :]}
    if again and world.rank == 0:
        copies = sum(c in again for c in contents[len(train[0]) :])
        tell(f"{args.data_dir}: {copies} of {len(val[0])} test images are also trained on, and learnt by heart")
    names = (os.path.relpath(path, args.data_dir).replace(os.sep, "/").encode(errors="surrogateescape") for path in paths)
    known = zip(names, contents) if not drawn else sorted(zip(names, contents))  # the same, whichever are drawn
    about = dict(classes=classes, digest=hashlib.sha256(b"".join(itertools.chain(*known))).hexdigest())
    about |= {"test_images": [os.path.relpath(path, args.data_dir) for path in paths[len(train[0]) :]]} if drawn else {}
    if small:
        return array_sets(args, world, *in_memory(*train, args), *in_memory(*val, args)), 3, about
    parts = (*train, rest), (*train, held_out), (*val, torch.arange(len(val[0])))
    sets = [FolderImages(*part, args, world.device) for part in parts]
    x, y = in_memory(train[0][held_out.numpy()], train[1][held_out], args)  # each round needs some of them
    sets[1] = ArrayImages(x, y, torch.arange(len(y)), args.image_size, args.seed, world.device, like=FolderImages)
    return sets, 3, about


def list_images(args, world=None):
    """(paths, classes) of the training and of the test images, the classes' names; whether the tests are drawn: --data folder
    may be one folder of class folders, and a tenth of each class is then kept for them, at least one of two."""
    if args.data == "imagenet" or any((args.data_dir / part).is_dir() for part in ("train", "val")):
        (*train, classes), (*val, others) = (read_folder(args.data_dir / part, world) for part in ("train", "val"))
        if classes != others:  # those that look alike, by an accent or a blank, in letters that do not
            odd = (f"{name!r}" if name.isascii() else f"{name!r} = {name!a}" for name in sorted({*classes} ^ {*others}))
            raise UserError(f"--data-dir: train/ and val/ differ in classes: {', '.join(itertools.islice(odd, 4))}")
        return train, val, classes, False
    paths, labels, classes = read_folder(args.data_dir, world)
    order = torch.randperm(len(labels), generator=seeded(6, args.seed))
    each = [order[labels[order] == c] for c in range(len(classes))]
    tested = torch.zeros(len(labels), dtype=torch.bool)
    tested[torch.cat([i[: max(len(i) // 10, min(len(i) - 1, 1))] for i in each])] = True
    return *((paths[part.numpy()], labels[part]) for part in (~tested, tested)), classes, True


# What file servers and systems leave behind: thumbnails, waste, snapshots.
LITTER = {"@eaDir", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot", "~snapshot", "lost+found", "__MACOSX",
          "$RECYCLE.BIN", "System Volume Information"}  # fmt: skip


def read_folder(root, world=None):
    """-> paths (n,) in an array of bytes, classes (n,), their names. Each file and folder counts once, whatever links lead
    to it. What is hidden, and what by its name is no image, is left out and counted."""
    if not root.is_dir():
        raise UserError(f"--data-dir: {root} is missing; it should hold a folder for each class")
    left_out, folders, links, found, seen = Counter(), [], [], [], set()

    def take(path, label):
        """Adds what lies there to the folders or to what is found, or counts why not. Links come after all else."""
        info, suffix = os.stat(path), os.path.splitext(path)[1].lower()
        place, folder = (info.st_dev, info.st_ino), stat.S_ISDIR(info.st_mode)
        odd = ("linked once more" if place in seen else None if folder else "special files" if not stat.S_ISREG(info.st_mode)
               else None if suffix in SUFFIXES else suffix or "without suffix")  # fmt: skip
        if odd:
            left_out[odd] += 1
        else:
            seen.add(place)
            (folders if folder else found).append((path, label))

    def inside(path):
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            odd = "hidden" if entry.name.startswith(".") else "file servers'" if entry.name in LITTER else None
            left_out.update([odd] if odd else [])
            if not odd:
                yield entry

    top = [*inside(root)]
    classes = [entry.name for entry in top if entry.is_dir()]
    left_out["outside of class folders"] = len(top) - len(classes)
    take(root, None)  # a link may lead back to it
    folders.clear()
    for label, name in sorted(enumerate(classes), key=lambda item: (root / item[1]).is_symlink()):
        take(str(root / name), label)
    while folders:
        for path, label in folders:  # which grows by those inside
            for entry in inside(path):
                links.append((entry.path, label)) if entry.is_symlink() else take(entry.path, label)
        folders.clear()
        for path, label in links:
            take(path, label)
        links.clear()
    rest = "; left out: " + ", ".join(f"{n} {what}" for what, n in left_out.most_common() if n) if left_out.total() else ""
    empty = sorted(set(range(len(classes))) - {label for _, label in found})
    if empty or not classes:
        which = f"{root / classes[empty[0]]}" if empty else f"{root}: no class folders and"
        raise UserError(f"{which}: no images in it{rest}")
    if world and world.rank == 0:
        tell(f"{root}: {len(classes)} classes, {len(found)} images{rest}")
    found.sort(key=lambda item: (item[1], *os.path.split(item[0].replace(os.sep, "/"))))
    paths, labels = zip(*found)
    return np.array([os.fsencode(path) for path in paths]), torch.tensor(labels), classes


def in_memory(paths, labels, args):
    """All images, decoded once: x uint8 (n, 3, size, size), labels (n,)."""
    n = len(paths)
    x, where = torch.empty(n, 3, args.image_size, args.image_size, dtype=torch.uint8), torch.arange(n).split(256)
    images = FolderImages(paths, labels, torch.arange(n), args, torch.device("cpu"))
    for i, (part, _) in zip(where, images.load(where)):
        x[i] = part
    return x, labels


# ------------------------------------------------------------------------------ files

FORMAT = 9  # of checkpoints
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
    args.out.mkdir(parents=True, exist_ok=True)
    took = f"took {args.out.absolute()}"
    args.resume |= bool(world.job and world.job.check([took]))  # torchrun --max-restarts goes on with what its job began
    holds = [name for name in ("checkpoint.pt", PREVIOUS, "front.csv", "front.pt", "front.png") if (args.out / name).exists()]
    if holds and not args.resume:
        raise UserError(f"--out: {args.out} already holds a run; continue it with --resume or name another")
    if holds and holds[0].startswith("front"):
        raise UserError(f"--out: {args.out} holds {holds[0]}, but no checkpoint to continue; move it away or name another")
    with open(args.out / "log.jsonl", "ab+", buffering=0) as log:
        try:
            locked = fcntl and not fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not held by its children
        except (BlockingIOError, PermissionError):
            raise UserError(f"--out: {args.out} is in use by another process; torchrun, not srun, starts several") from None
        except OSError:
            locked = False
        if not locked:
            tell(f"{args.out}: no locks on this file system; see that no other run uses it")
        log.seek(0)
        if log.read(9) not in (b"", b'{"event":'):
            raise UserError(f"--out: {args.out} holds a log.jsonl that is not a run's; name another folder")
        if world.job:
            world.job.set(took, "")
        yield log


def settings(args):
    """The settings that decide a run's numbers, as plain values."""
    free = FREE if args.cost == "latency" else FREE | {"threads", "latency_batch", "machine"}
    return {k: str(v) if isinstance(v, Path) else v for k, v in sorted(vars(args).items()) if k not in free}


def read_checkpoint(path):
    """A checkpoint's content. Raises ValueError where it is damaged, or something else."""
    state = models.read_tensors(path)
    if not isinstance(state, dict) or not {"format", "settings", "sampler"} <= state.keys():
        raise ValueError(f"{path}: not a checkpoint")
    if state["format"] != FORMAT:
        raise UserError(f"{path}: written by another version of this code (format {state['format']}, here {FORMAT}); "
                        "finish it with that one, or use another --out")  # fmt: skip
    return state


def load_checkpoint(args):
    """The run's newest undamaged checkpoint, or None where there is none. A damaged one makes way, under another name."""
    paths, damage = [path for path in (args.out / "checkpoint.pt", args.out / PREVIOUS) if path.exists()], []
    for path in paths:
        try:
            state = read_checkpoint(path)
        except ValueError as e:
            damage.append(str(e))
            continue
        mine, theirs = settings(args), state["settings"]
        for name in sorted((mine.keys() | theirs.keys()) - {"trained_as"}):
            if mine.get(name) != theirs.get(name):
                flag, had, has = "--" + name.replace("_", "-"), theirs.get(name), mine.get(name)
                raise UserError(f"{path}: that run has {flag} {had}, this one {has}; do as it has, or use another --out")
        if damage:
            tell(f"{damage[0]}; kept as checkpoint.damaged.pt, continuing from {path.name}")
            os.replace(paths[0], args.out / "checkpoint.damaged.pt")
            os.replace(path, paths[0])
        return state
    if damage:
        raise UserError("; ".join(damage) + "; move it away to start anew")


def read_finished(folder):
    """The checkpoint of a run that has finished."""
    try:
        state = read_checkpoint(folder / "checkpoint.pt")
    except ValueError as e:
        raise UserError(str(e)) from None
    if state["step"] < state["steps"]:  # finished weights are what a two-stage method searches
        raise UserError(f"{folder}: its run is at step {state['step']} of {state['steps']}; finish that first (--resume)")
    return state


def read_init(path):
    """The weights in a file, torchvision's or a run's; and of a run's, what it knew of its data."""
    try:
        state = models.read_tensors(path)
        weights = {name: t for name, t in state.get("model", state).items() if isinstance(t, torch.Tensor)}
        return weights, state if "network" in state else None
    except (ValueError, AttributeError, FileNotFoundError) as e:
        raise UserError(f"--init: {path}: not readable weights ({name_of(e)})") from None


def load_init(net, state, path, say, known=None, classes=None):
    """Loads `read_init`'s weights. Other classes get a new classifier. Channels are sorted by importance, but
    those of a run: they are in the order of their use."""
    mine = net.state_dict()
    state = {name: t for name, t in state.items() if name in mine or not name.lower().startswith("aux")}  # heads for training
    odd = [name for name in mine.keys() ^ state.keys() if not name.endswith("num_batches_tracked")]
    wrong = [name for name in mine.keys() & state.keys() if mine[name].shape != state[name].shape]
    heads = {name for name, why in (net.kept or {}).items() if why == "is an output of the network"}
    last = [name for name in mine if name.rpartition(".")[0] in heads] or list(mine)[-2:]  # the classifier's weight and bias
    wrong += last if known and known["data"]["classes"] != classes else []
    if odd or not set(wrong) <= set(last):
        raise UserError(f"--init: {path}: not weights of this network ({sorted([*odd, *wrong])[0]} differs)")
    net.load_state_dict({k: v for k, v in state.items() if k not in wrong}, strict=False)
    if not known:
        models.sort_channels(net)
    if wrong:
        say(f"{path}: of other classes: the classifier starts anew")


# ------------------------------------------------------------------------------ the run's state


class Run:
    """What a run holds (network, sampler, optimiser, step, clock) and its bookkeeping."""

    def __init__(self, args, world, log_file, argv):
        self.args, self.world, self.log_file = args, world, log_file
        self.timing = dict(batch=args.latency_batch, threads=args.threads)
        command = [os.path.relpath(__file__), *(a for a in argv if a != "--resume"), "--resume"]
        self.continuation = f"continue with: {'torchrun ...' if world.size > 1 else 'python'} {shlex.join(command)}"
        if args.amp is None:
            args.amp = world.device.type == "cuda" and torch.cuda.get_device_capability(world.device) >= (8, 0)
        if args.batch_size % (world.size * args.accumulate):
            several = f"{world.size} processes and --accumulate {args.accumulate}"
            raise UserError(f"--batch-size {args.batch_size} does not divide among {several}")
        if args.batch_size < 2 * world.size * args.accumulate:
            raise UserError(f"--batch-size {args.batch_size}: BatchNorm needs two images in each of {world.size} processes")
        args.machine = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"  # for latencies
        finished = world.from_first(read_finished(args.search) if args.search and world.rank == 0 else None)
        state = world.from_first(load_checkpoint(args) if args.resume and world.rank == 0 else None)
        source = finished or state
        args.trained_as = source and (source["settings"]["trained_as"] or finished and finished["settings"]["method"])
        if state and finished and any(not torch.equal(v, state["model"][k]) for k, v in finished["model"].items()):
            raise UserError(f"--search {args.search}: {args.out} holds other weights than those; use another --out")
        init, known = read_init(args.init) if args.init and not (state or finished) else (None, None)
        world.require_same(**settings(args))
        self.network = dict(arch=args.arch, num_classes=10, image_size=args.image_size,
                            in_channels=1 if args.data.endswith("mnist") else 3, divisor=args.divisor)  # fmt: skip
        if args.arch not in models.ARCHS:  # whether it serves at all, before the data are read
            make_network(self.network, args.lower)
        self.data = Data(args, world)
        world.require_same(data_dir=self.data.about["digest"])
        self.network |= dict(num_classes=len(self.data.about["classes"]), in_channels=self.data.channels)
        self.step, self.steps = 0, self.data.steps * args.epochs
        torch.manual_seed(args.seed)
        self.net = make_network(self.network, args.lower)
        mine, theirs = self.data.about, known["data"] if known else {}
        for flag, other in ((f, o) for f, o in (("out", state), ("search", finished)) if o):
            if other["data"]["digest"] != mine["digest"]:
                raise UserError(f"--{flag} {getattr(args, flag)}: that run had other images than are there now; give it those")
            if [(k, v.shape) for k, v in other["model"].items()] != [(k, v.shape) for k, v in self.net.state_dict().items()]:
                raise UserError(f"--arch {args.arch}: gives another network now than when that run began")
        if known and theirs.get("digest") != mine["digest"]:
            self.say(f"--init {args.init}: trained on other images; what is here as well, even for the tests, it has learnt")
        elif known and theirs.get("split") != mine["split"]:  # it was trained on some of those held out here
            split = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in theirs.get("split", {}).items())
            raise UserError(f"--init {args.init}: that run held out other images, those of {split or 'earlier code'}; add that")
        if log_file:  # of steps that come again it has nothing
            log_file.truncate(min(state["log"], log_file.seek(0, os.SEEK_END)) if state else 0)
        if init is not None:
            load_init(self.net, init, args.init, self.say, known, mine["classes"])
        self.net.to(world.device, memory_format=torch.channels_last).train()  # the faster layout on GPU and CPU alike
        if args.cost == "latency":
            if not state and world.rank == 0:
                widths, times, off = models.measure_latency(self.net, args.lower, seed=args.seed, **self.timing)
                self.say(f"latency: {times.min():.2f} to {times.max():.2f} ms; for others the formula is off by {off.median():.1%}")
                self.log("latency", widths=widths.tolist(), milliseconds=times.tolist(), unseen_errors=off.tolist())
            self.net.latency_table = state["latency"] if state else world.from_first(self.net.latency_table)
        self.optimizer = make_optimizer(self.net, args)
        self.full = getattr(self.net, args.cost)(1.0).item()
        kind = {"slim": UniformWidths, "twostage": RandomWidths}.get(args.method)
        self.sampler = kind(self.net.num_widths, args.lower, args.seed) if kind else self.joslim_sampler()
        self.proposals = torch.empty(0, self.net.num_widths, dtype=torch.float64)
        self.rounds = math.ceil(self.steps / args.tau)
        self.seconds = {"total": 0.0, "search": 0.0, "loading": 0.0}
        self.level = self.least = math.inf  # the full network's loss: now, at its least
        self.sound = True  # what the last checkpoint holds: see `fallen`
        if state:
            for part in ("optimizer", "sampler"):
                getattr(self, part).load_state_dict(state[part])
            self.net.load_state_dict(state["model"])
            vars(self).update({name: state[name] for name in ("step", "proposals", "seconds", "least", "sound")})
        elif finished:
            self.net.load_state_dict(finished["model"])
            self.step = self.steps
        self.fell = not self.sound  # what was told
        self.recent, self.progress_step = [], self.step  # since the last progress line: (step, widths, losses)
        self.began = self.saved = self.shown = time.perf_counter()
        if args.resume:
            self.say(f"continuing {args.out} at step {self.step}" if state else f"no checkpoint in {args.out}: starting")
        self.say("settings  " + "  ".join(f"{k}={v}" for k, v in settings(args).items() if v is not None))
        self.log("settings", **settings(args), processes=world.size, torch=torch.__version__, digest=self.data.about["digest"])
        if args.method != "slim" and (self.rounds - 1) * args.subnets < args.num_prior:
            self.say(f"{self.rounds} rounds end before the GP's first proposal, as slim's do; lower --num-prior or --tau")
        size = f"{self.net.flops(1.0).item() / 1e6:.1f} MFLOPs, {self.net.params(1.0).item() / 1e6:.3f} M parameters"
        self.say(f"{args.arch}: {self.net.num_widths} widths, {size}; {self.steps} steps on {world.size} x {world.device.type}")
        if finished and not state:
            self.save()

    def cost(self, a, relaxed=False):
        """Cost as a ratio to the full network's: a (..., d) -> (...,)."""
        return getattr(self.net, self.args.cost)(a, relaxed=relaxed) / self.full

    def joslim_sampler(self):
        # A round judges on few images: 0.7 of the former loss averages their noise out while the weights move slowly.
        settings = {name: getattr(self.args, name) for name in ("lower", "num_prior", "beta", "seed")}
        return Joslim(self.net.num_widths, self.cost, **settings, ema=0.7)

    # -------------------------------------------------------------- checkpoints

    def save(self):
        """Checkpoint: tensors and plain values only. Every process's state is the same."""
        self.clock()
        sound = not self.fallen()
        if self.world.rank == 0:
            state = {
                "format": FORMAT, "settings": settings(self.args), "network": self.network, "data": self.data.about,
                "step": self.step, "steps": self.steps, "seconds": self.seconds, "least": self.least, "sound": sound,
                "model": self.net.state_dict(), "optimizer": self.optimizer.state_dict(),
                "sampler": self.sampler.state_dict(), "proposals": self.proposals,
                "latency": self.net.latency_table, "data_dir": self.args.data_dir and str(self.args.data_dir.absolute()),
                "log": self.log_file.seek(0, os.SEEK_END),
            }  # fmt: skip
            with self.its_folder() as out:
                save_tensors(out / "checkpoint.pt", state, keep=out / PREVIOUS if self.sound else None)
        self.saved, self.sound = time.perf_counter(), sound

    @contextmanager
    def its_folder(self):
        """The folder that this run took. If its name has become another's, or the log has gone and the lock with it, another
        run may have begun: the block then writes into a new one beside it, and the run ends."""
        out, log = self.args.out, self.args.out / "log.jsonl"
        stays = log.exists() and os.path.samestat(log.stat(), os.fstat(self.log_file.fileno()))
        out = out if stays else Path(tempfile.mkdtemp(prefix=f"{out.name}.", dir=out.parent))
        yield out
        if not stays:
            raise Failed(f"{self.args.out} or its log.jsonl is not what this run took any more; stopped at step {self.step}, "
                         f"all saved in {out}: see that no other run is there; --out {out} --resume goes on")  # fmt: skip

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
            self.log_file.write(json.dumps({"event": event, "step": self.step, **values}).encode() + b"\n")

    def say(self, text):
        if self.world.rank == 0:
            tell(text)

    # -------------------------------------------------------------- after a step

    def after_step(self, epoch, widths, losses):
        """A progress line, a checkpoint, an end, where it is time for one."""
        self.recent.append((self.step, widths, losses))
        now, ends_epoch = time.perf_counter(), self.step % self.data.steps == 0
        # Several processes ask each other every few steps: on a GPU, reading the answer waits for all that is queued.
        stopping = (self.world.size == 1 or self.step % 8 == 0) and self.world.agree_to_stop()
        saving = stopping or ends_epoch or now - self.saved > 60 * self.args.save_minutes
        if saving or now - self.shown > self.args.log_seconds:
            self.progress(epoch)  # the log has all steps of a checkpoint
        if ends_epoch:
            self.require_agreement()
        if saving:
            self.save()
        if stopping:
            self.world.gather(None)  # process 0 has then saved
            raise Stopped(self.world.asked or signal.SIGTERM)

    def progress(self, epoch):
        losses, total, lr = self.require_finite(), self.clock(), self.optimizer.param_groups[0]["lr"]
        now = time.perf_counter()  # all that was queued on the device is done
        speed = (self.step - self.progress_step) * self.args.batch_size / (now - self.shown)
        left = timedelta(seconds=round(total / self.step * (self.steps - self.step)))
        search, loading = (self.seconds[part] / total for part in ("search", "loading"))
        self.say(f"epoch {epoch + 1}/{self.args.epochs}  step {self.step}/{self.steps}  loss full {losses[0]:.3f} "
                 f"smallest {losses[-1]:.3f}  {speed:.0f} images/s  search {search:.1%}  loading {loading:.1%}"
                 f"{' (try more --workers)' if loading > 0.2 else ''}  {left} left")  # fmt: skip
        self.log("train", epoch=epoch + 1, lr=lr, losses=losses, images_per_s=speed, seconds=total,
                 search_share=search, loading_share=loading)  # fmt: skip
        self.recent, self.shown, self.progress_step = [], now, self.step
        self.least = min(self.least, losses[0])
        before, self.fell = self.fell, self.fallen()
        if self.fell and not before:
            self.say(f"step {self.step}: the full network's loss is back at chance, from {self.least:.3f}; {PREVIOUS} "
                     "will keep the last checkpoint from before. Try a smaller --lr")  # fmt: skip

    def fallen(self):
        """Whether the loss is what chance gives, though it was well below; then the last sound checkpoint stays."""
        return self.least < 0.8 * self.data.chance[0] < 0.8 / 0.98 * self.level

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
        self.level = losses[-4:, 0].mean().item()
        return losses.mean(0).tolist()

    def observe(self, losses):
        """Tells the sampler the history's losses; those that are not finite are left out, with a line."""
        self.sampler.observe(losses)
        bad = ~self.sampler.losses.isfinite()
        if bad.any():
            self.say(f"step {self.step}: the held-out loss of {bad.sum()} configurations is not finite; the GP does without")
            self.log("not finite", widths=self.sampler.widths[bad].tolist())
        if bad.all():
            raise Failed(f"step {self.step}: no configuration's held-out loss is finite. Try a smaller --lr")

    # -------------------------------------------------------------- the end

    def require_agreement(self):
        """All processes must hold the same weights and history, or what is saved is worth nothing."""
        if self.world.size > 1:
            for buffer in self.net.buffers():  # a network of one's own may learn some from the images of its process
                self.world.together(dist.broadcast, buffer, 0)
            tensors = [*self.net.parameters(), *self.sampler.state_dict().values()]
            digest = hashlib.sha256(b"".join(t.detach().cpu().numpy().tobytes() for t in tensors)).hexdigest()
            if len(set(self.world.gather(digest))) > 1:
                raise Failed(f"step {self.step}: the processes have different weights or histories; the checkpoint stands")
            if self.step == self.steps:
                self.say(f"{self.world.size} processes agree: weights and history have sha256 {digest[:16]}...")

    def report(self, columns):
        """Writes front.csv, front.pt and front.png; prints the table."""
        args, share, statistics = self.args, self.seconds["search"] / self.clock(), columns.pop("statistics")
        self.log("done", seconds=self.seconds["total"], search_share=share)
        if self.world.rank:
            return
        deployed = {"format": 1, "network": self.network, "model": self.net.state_dict(), "front": columns,
                    "statistics": statistics, "cost": args.cost, "latency": self.net.latency_table,
                    "data": self.data.about}  # fmt: skip
        with self.its_folder() as out:
            with atomic_write(out / "front.csv", "w") as f:
                table = csv.writer(f, lineterminator="\n")
                table.writerow(columns)
                for *values, a in zip(*(column.tolist() for column in columns.values())):
                    exact = [int(v) if name in COSTS else v for name, v in zip(columns, values)]
                    table.writerow([*exact, " ".join(map(repr, a))])
            save_tensors(out / "front.pt", deployed)
            try:
                draw_front(args, columns, out / "front.png")
            except (Exception, SystemExit) as e:  # matplotlib may be missing, or broken
                tell(f"no front.png: {name_of(e)}")
        costs, round_up = {name: columns[name] for name in columns if name in UNITS}, models.round_up
        tell("\n" + "".join(f"{UNITS[name][0]:>11}        %" for name in costs) + "    loss   top-1  ±err.   top-5")
        shown = [part for k, v in costs.items() for part in (round_up(v / UNITS[k][1], 3), round_up(100 * v / v.max(), 1))]
        for cells, *row in zip(zip(*shown), *(columns[name] for name in ("loss", "top1", "top1_stderr", "top5"))):
            line = "".join(f"{value:>11} {percent:>7}%" for value, percent in zip(cells[::2], cells[1::2]))
            tell(line + " {:7.4f} {:7.2f} ± {:4.2f} {:7.2f}".format(*row))
        top1, error, chance = columns["top1"], columns["top1_stderr"], self.data.chance[1]
        best, enough = int(top1.argmax()), int((top1 >= top1[-1] - error[-1]).nonzero()[0])
        if top1[best] < chance + 2 * error[best]:
            tell(f"no network is better than chance: to say the commonest class is right for {chance:.2f} %")
        else:
            shares = ", ".join(f"{v[enough] / v.max():.0%} of its {name}" for name, v in costs.items())
            tell(f"as good as the full network, within its error: {top1[enough]:.2f} % with {shares}")
        total = timedelta(seconds=round(self.seconds["total"]))
        files = ", ".join(sorted(path.name for path in out.glob("front.*")))
        tell(f"{total} in all, {share:.1%} of it for the width search; see {out}/ for {files}, checkpoint.pt and log.jsonl")


UNITS = {"flops": ("MFLOPs", 1e6), "params": ("params M", 1e6), "memory": ("memory MB", 1e6), "latency": ("latency ms", 1)}


def draw_front(args, columns, path):
    """front.png: top-1, with its standard error, against cost."""
    from matplotlib.figure import Figure

    cost = columns[args.cost]
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel=f"{args.cost} (% of the full network)", ylabel="test top-1 (%)")
    axes.errorbar(100 * cost / cost.max(), columns["top1"], columns["top1_stderr"], fmt="o-", capsize=2)
    axes.set_title(f"{args.arch} on {args.data_dir.name if args.data in FOLDERS else args.data}, {args.method}")
    axes.grid(alpha=0.3)
    with atomic_write(path) as f:
        figure.savefig(f, dpi=150, format="png")


def train_plain(net, data, args):
    """Trains a network by itself, by the labels, for args.epochs; for --finetune, and to compare with (alone.py)."""
    optimizer, device, step = make_optimizer(net.train(), args), data.world.device.type, 0
    torch.manual_seed(args.seed)
    for epoch in range(args.epochs):
        for x, y in data.train(epoch):
            with torch.autocast(device, torch.bfloat16, enabled=args.amp):
                loss = F.cross_entropy(net(x), y, label_smoothing=args.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, data.steps, args)
            optimizer.step()
            step += 1
        tell(f"epoch {epoch + 1}/{args.epochs}: loss of the last batch {loss.item():.3f}")
    calibrate_bn(net, data.batches("calibrate"))
    return net.eval()


def export(args, world):
    """--export: the best network within a budget, as a file that runs without this project; loaded again and compared."""
    try:
        path = args.out / "front.pt"
        net = models.load(path, net=from_file(models.read_tensors(path)["network"]) if ":" in args.arch else None)
        row = net.use(**{args.cost: args.export})
    except ValueError as e:
        raise UserError(f"--export: {e}") from None
    plain, data = net.extract().eval(), Data(args, world)
    if data.about["digest"] != net.data["digest"]:
        raise UserError(f"--data-dir: {args.data_dir} has other images than the run had")
    stem = f"{args.cost}-" + (f"{args.export:.2f}" if round(args.export, 2) == args.export else repr(args.export))
    if args.finetune:  # at half the peak of the run's learning rate (chosen on held-out images, see finetune.py)
        how = vars(args) | dict(epochs=args.finetune, lr=args.lr / 2, warmup_epochs=0)
        tuned = train_plain(net.extract().to(world.device), data, argparse.Namespace(**how))
        before, after = score([plain.to(world.device), tuned], data.batches("held-out"))[:, 0].tolist()
        tell(f"held-out loss {before:.4f}, fine-tuned {after:.4f}{'' if after < before else ': no better, and not written'}")
        plain, stem = (tuned, f"{stem}-tuned-{args.finetune}") if after < before else (plain, stem)
    warnings.filterwarnings("ignore", module="torch.export")  # about its own
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(plain.cpu(), (torch.randn(2, *net.image),), dynamic_shapes=({0: batch},))
    torch.export.save(program, raw := io.BytesIO())
    again, path = torch.export.load(raw).module(), args.out / f"{stem}.pt2"
    x = next(iter(data.batches("test")))[0].cpu()
    apart = (again(x) - plain(x)).abs().max().item()
    if not apart < 1e-3:
        raise Failed(f"{path}: would not give what the network gives, by {apart:.1g}")
    with atomic_write(path) as f:
        f.write(raw.getvalue())
    least, tests = models.time_forward(again, x[:1]).min(), ((x.cpu(), y.cpu()) for x, y in data.batches("test"))
    tell(f"{path}: {len(raw.getvalue()) / 1e6:.2f} MB, {least:.2f} ms an image, test top-1 {score([again], tests)[0, 1]:.2f} % "
         f"(front.csv {row['top1']:.2f}); its outputs differ from the network's by up to {apart:.1g}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
