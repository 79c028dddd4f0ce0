#!/usr/bin/env python3
"""Train a slimmable network and find the widths at which it is best for every compute budget.

    python train.py                                      # synthetic images, resnet8, CPU, 2 minutes
    python train.py --data cifar100 --data-dir DIR       # resnet56 on one GPU
    torchrun --nproc_per_node=8 train.py --arch mbv2 --data imagenet --data-dir DIR
    torchrun --nnodes=2 --node_rank=R --master_addr=HOST --nproc_per_node=8 train.py ...  # on each of two nodes
    python train.py --compare RUN RUN ...                # table and picture of finished runs

Written under --out: checkpoint.pt, log.jsonl, front.csv and, where matplotlib is installed, front.png.
"""

import argparse
import csv
import fcntl
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import shlex
import signal
import sys
import time
import zipfile
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torchvision.transforms import v2 as transforms

import models
from joslim import Joslim, RandomWidths, UniformWidths
from joslim import calibrate_bn, evaluate, pareto_front, sandwich_step, shortlist

# Defaults per data set, and per data set and arch; the command line overrules both.
# lr is for a batch of 256 and scales with --batch-size.
COMMON = dict(
    num_samples=2, num_prior=20, beta=0.1, lower=0.42, warmup_epochs=5.0, label_smoothing=0.0, distillation=True,
    smoothing=0.7, eval_images=512, calibrate_images=2048, candidates=60, front_size=20,
)  # fmt: skip
CIFAR = dict(
    arch="resnet56", epochs=200, batch_size=128, lr=0.1, weight_decay=5e-4, tau=235, held_out=5000,
    eval_images=80, image_size=32,
)  # fmt: skip
IMAGENET = dict(
    arch="mbv2", epochs=250, batch_size=1024, lr=0.125, weight_decay=4e-5, tau=625, held_out=10000,
    label_smoothing=0.1, image_size=224,
)  # fmt: skip
RECIPES = {
    # One sub-network a step: with two it learns less, most likely since three students feed the full network's mistakes back.
    "synthetic": dict(
        arch="resnet8", epochs=2, batch_size=64, lr=0.25, weight_decay=5e-4, tau=16, held_out=512, image_size=32,
        num_samples=1, num_prior=8, warmup_epochs=0.5, eval_images=64, calibrate_images=512, candidates=10, front_size=12,
    ),
    # mbv2's last maps are 1 x 1: BatchNorm averages over images alone. With 16 in each of 8 processes it hardly learned.
    "synthetic mbv2": dict(epochs=10, batch_size=256, lr=0.025, eval_images=128, candidates=14),
    "fashion-mnist": dict(
        arch="resnet8", epochs=4, batch_size=32, lr=0.5, weight_decay=5e-4, tau=150, held_out=2500, image_size=28,
        num_samples=1, warmup_epochs=0.2, eval_images=125, calibrate_images=1024, candidates=24, front_size=16,
    ),
    "fashion-mnist mbv2": dict(lr=0.05),
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "imagenet": IMAGENET,
    "imagenet resnet18": dict(epochs=100, tau=250),
}  # fmt: skip
# Flags that may change between a run and its continuation: they decide where and how fast, not what.
FREE = {"out", "resume", "weights", "device", "data_dir", "workers", "save_minutes", "log_seconds", "download", "compare"}

COSTS = "flops", "params", "memory"

FORMAT = 5  # of checkpoints
PREVIOUS = "checkpoint.previous.pt"


class UserError(Exception):
    """What the user can mend: printed as one line."""

    code = 2


class Diverged(UserError):
    """Training blew up; nothing of it was saved."""

    code = 1


class Stopped(UserError):
    """SIGTERM or Ctrl-C, after the checkpoint."""

    def __init__(self, message, number):
        super().__init__(message)
        self.code = 128 + number


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipe = "(default: the recipe's)"
    p.add_argument("--data", default="synthetic", choices=[k for k in RECIPES if " " not in k], help="data set")
    p.add_argument("--data-dir", type=Path, help="where the data set's files lie (imagenet: holds train/ and val/)")
    p.add_argument("--arch", choices=models.ARCHS, help=f"network {recipe}")
    p.add_argument("--method", default="joslim", choices=["joslim", "slim", "twostage", "alone"],
                   help="widths from Bayesian optimisation, uniform, or random and searched afterwards; alone: no "
                        "slimming, the network of --widths by itself")
    p.add_argument("--cost", default="flops", choices=COSTS, help="what a budget limits")
    p.add_argument("--widths", help="for --method alone: the widths, as front.csv writes them")
    p.add_argument("--weights", type=Path, metavar="CHECKPOINT",
                   help="for --method twostage or slim: do not train, find and test the front of these weights")
    p.add_argument("--hold-widths", action="store_true",
                   help="for --method slim or twostage: keep the drawn widths for tau steps, as joslim does")
    p.add_argument("--epochs", type=int, help=recipe)
    p.add_argument("--batch-size", type=int, help=f"images per step, all processes together {recipe}")
    p.add_argument("--lr", type=float, help=f"peak learning rate at batch 256; scaled by batch / 256 {recipe}")
    p.add_argument("--weight-decay", type=float, help=f"not on BatchNorm and biases {recipe}")
    p.add_argument("--warmup-epochs", type=float, help=f"linear warm-up {recipe}")
    p.add_argument("--label-smoothing", type=float, help=f"for those that learn from the labels {recipe}")
    p.add_argument("--distillation", action=argparse.BooleanOptionalAction,
                   help=f"sub-networks learn from the full network's outputs; without, from the labels, as it does {recipe}")
    p.add_argument("--accumulate", type=int, default=1, metavar="K",
                   help="split each process's batch into K parts, one after another: less memory (default: %(default)s)")
    p.add_argument("--tau", type=int, help=f"steps between proposals {recipe}")
    p.add_argument("--num-samples", type=int, metavar="M", help=f"sub-networks per step {recipe}")
    p.add_argument("--proposals", type=int, metavar="P",
                   help="configurations proposed per round, at which the steps take turns, M at a time (default: M)")
    p.add_argument("--visits", type=int, metavar="V",
                   help="how many of a round's proposals join the history, to be re-evaluated ever after (default: P)")
    p.add_argument("--num-prior", type=int, metavar="N0", help=f"uniform proposals before the GP's {recipe}")
    p.add_argument("--beta", type=float, help=f"variance's weight in the acquisition {recipe}")
    p.add_argument("--smoothing", type=float,
                   help=f"former losses' share when a round re-evaluates: averages a small batch's noise {recipe}")
    p.add_argument("--lower", type=float, metavar="W0", help=f"smallest width multiplier {recipe}")
    p.add_argument("--random-lambda", action="store_true", help="draw lambda, not a target cost, per proposal")
    p.add_argument("--held-out", type=int, help=f"training images kept for judging configurations {recipe}")
    p.add_argument("--eval-images", type=int, help=f"held-out images on which a round re-evaluates all configurations {recipe}")
    p.add_argument("--calibrate-images", type=int, help=f"training images for BatchNorm's statistics {recipe}")
    p.add_argument("--candidates", type=int,
                   help=f"configurations judged on the whole held-out split at the end, those nearest the front {recipe}")
    p.add_argument("--front-size", type=int, help=f"configurations tested at the end, at most {recipe}")
    p.add_argument("--image-size", type=int, help="resize images to this (default: the data's own)")
    p.add_argument("--workers", type=int, help="loading processes per training process, image folders only (default: "
                   "the machine's cores, divided among its training processes)")  # fmt: skip
    p.add_argument("--download", action="store_true", help="let torchvision fetch a missing CIFAR or Fashion-MNIST")
    p.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    p.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 autocast (default: on CUDA only)")
    p.add_argument("--seed", type=int, default=0, help="of weights, split, data order, widths (default: %(default)s)")
    p.add_argument("--out", type=Path, help="run folder (default: runs/<data>-<arch>-<method>-<seed>)")
    p.add_argument("--resume", action="store_true", help="continue the run in --out; start it if there is none")
    p.add_argument("--save-minutes", type=float, default=10.0,
                   help="checkpoint at least this often, besides each epoch's end (default: %(default)s)")
    p.add_argument("--log-seconds", type=float, default=10.0, help="between progress lines (default: %(default)s)")
    p.add_argument("--compare", type=Path, nargs="+", metavar="RUN",
                   help="print a table of these finished runs' fronts and draw them (--out, default runs/compare.png)")
    args = p.parse_args(argv)
    if args.compare:
        return args
    args.resume |= int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # torchrun --max-restarts
    recipe = COMMON | RECIPES[args.data]
    args.arch = args.arch or recipe["arch"]
    recipe |= RECIPES.get(f"{args.data} {args.arch}", {})
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.workers is None:
        args.workers = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    args.proposals = args.num_samples if args.proposals is None else args.proposals
    args.visits = args.proposals if args.visits is None else args.visits
    args.out = args.out or Path("runs", f"{args.data}-{args.arch}-{args.method}-{args.seed}")
    for name in ("epochs", "batch_size", "tau", "num_samples", "num_prior", "held_out", "eval_images",
                 "calibrate_images", "front_size", "image_size", "accumulate", "proposals", "visits", "candidates"):  # fmt: skip
        least = 2 if name == "image_size" else 1  # torch cannot resize to a single pixel
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    for name in ("lr", "weight_decay", "warmup_epochs", "beta", "workers", "save_minutes", "log_seconds", "seed"):
        limit = 2**63 if name == "seed" else math.inf
        if not 0 <= getattr(args, name) < limit:
            raise UserError(f"--{name.replace('_', '-')} must lie in [0, {limit}), got {getattr(args, name)}")
    if args.visits > args.proposals:
        raise UserError(f"--visits {args.visits} is more than --proposals {args.proposals}")
    if not 0 < args.lower <= 1:
        raise UserError(f"--lower must lie in (0, 1], got {args.lower}")
    for name in ("label_smoothing", "smoothing"):
        if not 0 <= getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must lie in [0, 1), got {getattr(args, name)}")
    for name, methods in (("widths", ["alone"]), ("weights", ["twostage", "slim"]), ("hold_widths", ["twostage", "slim"])):
        if getattr(args, name) and args.method not in methods:
            raise UserError(f"--{name.replace('_', '-')} is for --method {' or '.join(methods)}, not {args.method}")
    if args.method == "alone" and not args.widths:
        raise UserError("--method alone needs --widths, as front.csv writes them")
    if args.data != "synthetic" and args.data_dir is None:
        raise UserError(f"--data {args.data} needs --data-dir, the folder that holds its files")
    return args


# ------------------------------------------------------------------------------ processes


class World:
    """This process among all that torchrun started; alone without it."""

    def __init__(self, device):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.device = torch.device(device)
        except RuntimeError:
            raise UserError(f"--device: {device!r} is no device; try cpu, cuda or cuda:0") from None
        if self.device.type not in ("cpu", "cuda"):
            raise UserError(f"--device: {device!r} is not supported; try cpu, cuda or cuda:0")
        if self.device.type == "cuda":
            index = local if self.size > 1 else self.device.index or 0
            if index >= torch.cuda.device_count():
                raise UserError(f"--device {device}: GPU {index} asked for, this machine has {torch.cuda.device_count()}")
            self.device = torch.device("cuda", index)
            torch.cuda.set_device(self.device)
        if self.size > 1:
            backend, patience = "nccl" if self.device.type == "cuda" else "gloo", timedelta(minutes=30)
            store, *_ = next(dist.rendezvous("env://", timeout=patience))
            if int(os.environ.get("LOCAL_WORLD_SIZE", 0)) == self.size:
                # torchrun's store outlives its workers: a restart must not find the dead ones' addresses in it
                # (pytorch issue 135712). Nodes count restarts differently, so this serves a single one.
                store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            dist.init_process_group(backend, timeout=patience, rank=self.rank, world_size=self.size, store=store)

    @staticmethod
    def leave():
        """Ends the process group, where there is one."""
        if dist.is_initialized():
            # Until torch 2.8 this joins gloo's threads without letting go of Python's lock, which one that still
            # drops the last call's tensor waits for (pytorch pull request 154976): leave it time to.
            time.sleep(0.1)
            dist.destroy_process_group()

    def mean(self, t):
        """The tensor's mean over processes, in place: one all-reduce."""
        if self.size > 1:
            dist.all_reduce(t)
            t /= self.size
        return t

    def from_first(self, value):
        """Process 0's value, of tensors and plain values, on every process."""
        if self.size == 1:
            return value
        raw = io.BytesIO()
        if self.rank == 0:
            torch.save(value, raw)  # one copy of what tensors share; pickle makes one for each view: GBs of MBs
        box = [raw.getvalue()]
        dist.broadcast_object_list(box, device=self.device)
        return torch.load(io.BytesIO(box[0]), weights_only=True)

    def spread(self, items, columns, fn):
        """fn(items) -> (len(items), columns), each process doing its share of the items; the whole on all."""
        rows = torch.zeros(len(items), columns, dtype=torch.float64, device=self.device)
        rows[self.rank :: self.size] = fn(items[self.rank :: self.size]).to(rows)
        return self.mean(rows).cpu() * self.size


# ------------------------------------------------------------------------------ data


def seeded(*keys):
    """A CPU generator whose stream depends on all keys (whole numbers) alone."""
    seed = 0
    for k in keys:
        seed = (seed * 1_000_003 + k + 1) % 2**63
    return torch.Generator().manual_seed(seed)


def synthetic(n, seed, classes=20, parts=14, size=32, patch=11):
    """n images (n, 3, 32, 32) uint8 and labels: each class is a triple of coloured patches.

    The patches lie anywhere, over clouds and noise, and classes share them. A network must keep
    apart all 14 patches, which takes channels.
    """
    g = seeded(0)
    shapes = F.avg_pool2d(F.pad(torch.randn(parts, 3, patch, patch, generator=g), (1, 1, 1, 1), "replicate"), 3, 1)
    r = torch.linspace(-1, 1, patch)
    shapes = shapes * (1 - r[:, None] ** 2 - r**2).clamp_min(0).sqrt()
    shapes /= shapes.std((1, 2, 3), keepdim=True)
    triples = torch.combinations(torch.arange(parts), 3)
    members = triples[torch.randperm(len(triples), generator=g)[:classes]]

    g = seeded(1, seed)
    y = torch.randint(classes, (n,), generator=g)
    x = 0.5 * F.interpolate(torch.randn(n, 3, 5, 5, generator=g), size, mode="bilinear", align_corners=True)
    x += 0.3 * torch.randn(n, 3, size, size, generator=g)
    image, along = torch.arange(n)[:, None, None], torch.arange(patch)
    for part in members[y].T:
        top, left = torch.randint(size - patch + 1, (2, n, 1), generator=g)
        where = image, slice(None), (top + along)[:, :, None], (left + along)[:, None, :]
        gain = 0.8 + 0.8 * torch.rand(n, 1, 1, 1, generator=g)
        x[where] += (gain * shapes[part]).permute(0, 2, 3, 1)
    return (32 * x + 128).clamp(0, 255).byte(), y


def read_idx(folder, name):
    """A tensor from an IDX file (MNIST's format), gzipped or not."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            try:
                raw = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
                shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
                return torch.frombuffer(bytearray(raw[4 + 4 * raw[3] :]), dtype=torch.uint8).reshape(shape)
            except (OSError, EOFError, IndexError, RuntimeError, ValueError) as e:
                raise UserError(f"{path}: not a readable IDX file ({e})") from None
    raise UserError(f"--data-dir: {folder / name}[.gz] is missing; put the four files there, or try --download")


class ArraysOnly(pickle.Unpickler):
    """Reads what CIFAR's pickles hold, arrays and lists, and runs nothing else."""

    def find_class(self, module, name):
        if (module.split(".")[0], name) in {("numpy", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"),
                                            ("_codecs", "encode")}:  # fmt: skip
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_cifar(folder, pattern, key):
    """Images and labels from the CIFAR files ("python version") that match the pattern."""
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise UserError(f"--data-dir: {folder / pattern} is missing; put CIFAR's python version there, or try --download")
    x, y = [], []
    for path in paths:
        try:
            with open(path, "rb") as f:
                entry = ArraysOnly(f, encoding="bytes").load()
            x.append(torch.as_tensor(entry[b"data"]).reshape(-1, 3, 32, 32))
            y.append(torch.as_tensor(entry[key]))
        except Exception as e:  # unpickling garbage raises nearly anything
            raise UserError(f"{path}: not a readable CIFAR file ({e})") from None
    return torch.cat(x), torch.cat(y)


def load_arrays(args):
    """-> (train x, train y), (test x, test y), number of classes; x uint8 (n, c, h, w)."""
    if args.data == "synthetic":
        return synthetic(8192 + args.held_out, 0), synthetic(4096, 1), 20
    if not args.data_dir.is_dir():
        raise UserError(f"--data-dir: {args.data_dir} is not a folder")
    if args.download:
        fetch = {"fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}[args.data]
        getattr(torchvision.datasets, fetch)(args.data_dir, download=True)
    if args.data == "fashion-mnist":
        raw = args.data_dir / "FashionMNIST" / "raw"
        sets = [(read_idx(raw, f"{s}-images-idx3-ubyte")[:, None], read_idx(raw, f"{s}-labels-idx1-ubyte").long())
                for s in ("train", "t10k")]  # fmt: skip
        return *sets, 10
    if args.data == "cifar10":
        folder, key = args.data_dir / "cifar-10-batches-py", b"labels"
        return read_cifar(folder, "data_batch_[1-5]", key), read_cifar(folder, "test_batch", key), 10
    folder, key = args.data_dir / "cifar-100-python", b"fine_labels"
    return read_cifar(folder, "train", key), read_cifar(folder, "test", key), 100


class ArrayData:
    """A small data set: one uint8 tensor on the device, augmented in whole batches there."""

    def __init__(self, args, world):
        (x, y), (test_x, test_y), self.classes = load_arrays(args)
        for images, labels in ((x, y), (test_x, test_y)):
            if len(images) != len(labels) or len(labels) == 0 or labels.min() < 0 or labels.max() >= self.classes:
                raise UserError(f"--data-dir: {len(images)} images have {len(labels)} labels; expected as many, each "
                                f"from 0 to {self.classes - 1}. Are these the files of {args.data}?")  # fmt: skip
        if args.image_size != x.shape[-1]:
            x, test_x = (transforms.functional.resize(t, [args.image_size] * 2, antialias=True) for t in (x, test_x))
        self.args, self.world, self.channels, device = args, world, x.shape[1], world.device
        # Fashion-MNIST's images all lie and face alike.
        self.flip, self.pad = args.data.startswith("cifar"), 0 if args.data == "fashion-mnist" else 4
        held, kept = split(len(x), args)
        self.mean = x[kept].float().mean((0, 2, 3)).view(-1, 1, 1).to(device)
        self.std = x[kept].float().std((0, 2, 3)).clamp_min(1).view(-1, 1, 1).to(device)
        self.x, self.y = F.pad(x[kept], [self.pad] * 4).to(device), y[kept].to(device)
        self.held_x, self.held_y = x[held].to(device), y[held].to(device)
        self.test_x, self.test_y = test_x.to(device), test_y.to(device)
        self.steps = len(kept) // args.batch_size

    def normal(self, x):
        return (x.float() - self.mean) / self.std

    def train(self, epoch, start):
        """This process's share of the epoch's batches, from batch number `start` on."""
        # On the device at once: the loop itself copies nothing there and so never waits.
        drawn = augmentation(self.args.seed, epoch, len(self.x), self.pad)
        order, crop, flip = (t.to(self.x.device) for t in drawn)
        size, share = self.args.image_size, self.args.batch_size // self.world.size
        along = torch.arange(size, device=self.x.device)
        for step in range(start, self.steps):
            i = order[step * self.args.batch_size + self.world.rank * share :][:share]
            columns = along.expand(share, size)
            if self.flip:
                columns = torch.where(flip[i, None], size - 1 - columns, columns)
            rows, columns = crop[0, i, None] + along, crop[1, i, None] + columns
            x = self.x[i[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
            yield self.normal(x), self.y[i]

    def held_out(self, number):
        """This process's share of held-out batch `number` (they go round)."""
        n = self.args.eval_images
        i = torch.arange(n * number, n * (number + 1))[self.world.rank :: self.world.size] % len(self.held_x)
        i = i.to(self.held_x.device)
        return self.normal(self.held_x[i]), self.held_y[i]

    def batches(self, which):
        """All (x, y) of "held-out", "test" or, unaugmented, "calibrate" images, the same on each process."""
        if which == "calibrate":
            n = self.args.calibrate_images
            inside = slice(self.pad, self.pad + self.args.image_size)
            x, y = self.x[:n, :, inside, inside], self.y[:n]
        else:
            x, y = (self.held_x, self.held_y) if which == "held-out" else (self.test_x, self.test_y)
        parts = math.ceil(len(x) / 256)  # of one size: BatchNorm cannot do with a last batch of one image
        for x, y in zip(x.tensor_split(parts), y.tensor_split(parts)):
            yield self.normal(x), y


def split(n, args):
    """Indices of the held-out and of the other training images."""
    if args.held_out + args.batch_size > n:
        raise UserError(f"--batch-size {args.batch_size} and --held-out {args.held_out}: there are {n} training images")
    order = torch.randperm(n, generator=seeded(2, args.seed))
    return order[: args.held_out], order[args.held_out :]


def augmentation(seed, epoch, n, pad):
    """The epoch's image order, and each image's crop offsets (2, n) and flip (n,)."""
    g = seeded(3, seed, epoch)
    order = torch.randperm(n, generator=g)
    return order, torch.randint(2 * pad + 1, (2, n), generator=g), torch.rand(n, generator=g) < 0.5


class FolderImages(torch.utils.data.Dataset):
    """Images of a folder of class folders; the index (epoch, i) decides image and augmentation alone."""

    def __init__(self, folder, args):
        if not folder.is_dir():
            raise UserError(f"--data-dir: {folder} is missing; expected {args.data_dir} to hold train/ and val/")
        try:
            images = torchvision.datasets.ImageFolder(folder)
        except FileNotFoundError as e:
            raise UserError(f"--data-dir: {str(e).splitlines()[0]}") from None
        self.samples, self.names, self.seed, size = images.samples, images.classes, args.seed, args.image_size
        finish = [transforms.ToImage(), transforms.ToDtype(torch.float32, scale=True),
                  transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]  # fmt: skip
        self.augmented = transforms.Compose([
            transforms.RandomResizedCrop(size, scale=(0.25, 1)), transforms.ColorJitter(0.4, 0.4, 0.4),
            transforms.RandomHorizontalFlip(), *finish])  # fmt: skip
        self.centred = transforms.Compose([
            transforms.Resize(math.ceil(size * 256 / 224)), transforms.CenterCrop(size), *finish])  # fmt: skip

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        epoch, i = key
        path, label = self.samples[i]
        try:
            image = torchvision.datasets.folder.pil_loader(path)
        except OSError as e:
            raise UserError(f"{path}: not a readable image ({e})") from None
        if epoch < 0:
            return self.centred(image), label
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(seeded(4, self.seed, epoch, i).initial_seed())
            return self.augmented(image), label


class FolderData:
    """train/ and val/ with one folder per class, through torchvision's transforms and DataLoader workers."""

    channels = 3

    def __init__(self, args, world):
        self.args, self.world = args, world
        self.images, self.tests = (FolderImages(args.data_dir / s, args) for s in ("train", "val"))
        if self.images.names != self.tests.names:
            odd = sorted(set(self.images.names) ^ set(self.tests.names))
            raise UserError(f"--data-dir: train/ and val/ differ in classes: {', '.join(odd[:3])}")
        self.classes = len(self.images.names)
        self.held, self.kept = (t.tolist() for t in split(len(self.images), args))
        self.steps = len(self.kept) // args.batch_size

    def load(self, images, batches):
        """The listed batches of keys (epoch, i), in order."""
        loader = torch.utils.data.DataLoader(
            images, batch_sampler=batches, num_workers=self.args.workers, pin_memory=self.world.device.type == "cuda"
        )
        try:
            for x, y in loader:
                yield x.to(self.world.device, non_blocking=True), y.to(self.world.device, non_blocking=True)
        except UserError as e:  # a worker's comes with its traceback around it
            raise UserError(str(e).splitlines()[-1].split("UserError: ")[-1]) from None

    def train(self, epoch, start):
        order = torch.randperm(len(self.kept), generator=seeded(3, self.args.seed, epoch)).tolist()
        share = self.args.batch_size // self.world.size
        firsts = (step * self.args.batch_size + self.world.rank * share for step in range(start, self.steps))
        return self.load(self.images, [[(epoch, self.kept[i]) for i in order[f : f + share]] for f in firsts])

    def held_out(self, number):
        n = self.args.eval_images
        i = range(n * number + self.world.rank, n * (number + 1), self.world.size)
        keys = [(-1, self.held[k % len(self.held)]) for k in i]
        parts = [keys[k : k + 32] for k in range(0, len(keys), 32)]  # for all workers to share
        return map(torch.cat, zip(*self.load(self.images, parts)))

    def batches(self, which):
        if which == "test":
            images, keys = self.tests, range(len(self.tests))
        else:
            images, keys = self.images, self.held if which == "held-out" else self.kept[: self.args.calibrate_images]
        parts = torch.tensor(keys).tensor_split(math.ceil(len(keys) / 256))
        return self.load(images, [[(-1, i) for i in part.tolist()] for part in parts])


# ------------------------------------------------------------------------------ weights


def flatten(net):
    """Moves parameters and gradients into flat tensors -> (with weight decay, without), all gradients.

    One all-reduce and an optimiser of two tensors serve any number of layers. Each parameter keeps
    its strides (channels_last). Vectors, which are BatchNorm's parameters and biases, do not decay.
    """
    groups = [[p for p in net.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)]
    sizes = [sum(p.numel() for p in g) for g in groups]
    like = groups[0][0]
    values, grads = (torch.zeros(sum(sizes), device=like.device, dtype=like.dtype) for _ in range(2))
    offset = 0
    for p in (*groups[0], *groups[1]):
        value, grad = (t.as_strided(p.shape, p.stride(), offset) for t in (values, grads))
        value.copy_(p.data)
        p.data, p.grad = value, grad
        offset += p.numel()
    flat = []
    for v, g in zip(values.split(sizes), grads.split(sizes)):
        flat.append(torch.nn.Parameter(v))
        flat[-1].grad = g
    return flat, grads


def learning_rate(step, steps_per_epoch, args):
    """Linear warm-up, then linear decay to zero; the peak scales with the batch."""
    total, warm = args.epochs * steps_per_epoch, args.warmup_epochs * steps_per_epoch
    warm = min(warm, total / 2)
    peak = args.lr * args.batch_size / 256
    return peak * min((step + 1) / max(warm, 1), (total - step) / (total - warm))


# ------------------------------------------------------------------------------ files


@contextmanager
def whole(path, mode="wb", keep=None):
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


@contextmanager
def claimed(args, world):
    """Makes the run's folder its own: yields the open log, locked as long as this process lives."""
    if world.rank:
        yield None
        return
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        holds = any((args.out / name).exists() for name in ("checkpoint.pt", PREVIOUS, "front.csv"))
        if holds and not args.resume:
            raise UserError(f"--out: {args.out} already holds a run; continue it with --resume or name another")
        log_file = open(args.out / "log.jsonl", "ab+", buffering=0)
        fcntl.flock(log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--out: {args.out} is in use by another process") from None
    except OSError as e:
        raise UserError(f"--out: {args.out} cannot be written ({e.strerror})") from None
    with log_file:
        if not args.resume:
            log_file.truncate(0)
        elif log_file.seek(0, os.SEEK_END):  # a killed run's last line may be half a line
            log_file.seek(-1, os.SEEK_END)
            if log_file.read(1) != b"\n":
                write(log_file, b"\n")
        yield log_file


def write(log_file, line):
    try:
        log_file.write(line)
    except OSError as e:
        raise UserError(f"{log_file.name}: could not be written ({e.strerror}); the last checkpoint stands") from None


def settings(args):
    """The settings that decide a run's numbers, as plain values."""
    return {k: v for k, v in sorted(vars(args).items()) if k not in FREE}


def read_checkpoint(path):
    """A checkpoint's content. Raises whatever a damaged file makes its readers raise; runs nothing in it."""
    bad = zipfile.ZipFile(path).testzip()  # torch.load does not look at the checksums
    if bad:
        raise ValueError(f"{bad} is corrupt")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["format"] != FORMAT:
        raise ValueError(f"its format is {state['format']}, this code's {FORMAT}")
    missing = {"settings", "network", "model", "optimizer", "sampler", "step", "steps", "widths", "seconds"} - state.keys()
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    return state


def load_weights(args):
    """The checkpoint that --weights names; its training must have left out the same held-out images."""
    try:
        state = read_checkpoint(args.weights)
    except Exception as e:
        raise UserError(f"--weights {args.weights}: {explain(e)}") from None
    for name in ("data", "seed", "held_out", "arch", "image_size"):
        mine, theirs = getattr(args, name), state["settings"].get(name)
        if mine != theirs:
            raise UserError(f"--weights {args.weights}: trained with --{name.replace('_', '-')} {theirs}, not {mine}")
    if state["step"] < state["steps"]:  # finished weights are what a two-stage method searches
        raise UserError(f"--weights {args.weights}: its run is at step {state['step']} of {state['steps']}; "
                        "finish that first (--resume)")  # fmt: skip
    return state


def explain(e):
    return f"not a readable checkpoint ({type(e).__name__}: {(str(e).splitlines() or [''])[0]})"


def load_checkpoint(args):
    """The run's newest readable checkpoint, or None where there is none."""
    damage = []
    for path in (args.out / "checkpoint.pt", args.out / PREVIOUS):
        if not path.exists():
            continue
        try:
            state = read_checkpoint(path)
        except Exception as e:  # a damaged file can raise nearly anything
            damage.append(f"{path}: {explain(e)}")
            continue
        mine, theirs = settings(args), state["settings"]
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{path}: that run has {flag} {theirs.get(name)}, this one {mine.get(name)}; use another --out")
        if damage:
            print(f"{damage[0]}; continuing from {path.name}", flush=True)
            os.replace(path, args.out / "checkpoint.pt")  # so that the next save keeps it, not the damaged one
        return state
    if damage:
        raise UserError("; ".join(damage) + "; move it away to start anew")
    return None


# ------------------------------------------------------------------------------ the run


class Run:
    """A run's state, and what is done with it; `main` reads as the algorithm."""

    def __init__(self, args, world, log_file):
        self.args, self.world, self.log_file = args, world, log_file
        if args.amp is None:
            args.amp = world.device.type == "cuda"
        if args.batch_size % (world.size * args.accumulate):
            raise UserError(f"--batch-size {args.batch_size} does not divide among {world.size} processes and "
                            f"--accumulate {args.accumulate} parts")  # fmt: skip
        if min(args.batch_size // args.accumulate, args.eval_images) < 2 * world.size:
            raise UserError(f"--batch-size {args.batch_size}, --eval-images {args.eval_images}: BatchNorm needs two images "
                            f"in each of {world.size} processes")  # fmt: skip
        if args.eval_images > args.held_out:
            raise UserError(f"--eval-images {args.eval_images} is more than --held-out {args.held_out}")
        source = world.from_first(load_weights(args) if args.weights and world.rank == 0 else None)
        args.trained_as = source and source["settings"]["method"] + " held" * source["settings"]["hold_widths"]
        state = world.from_first(load_checkpoint(args) if args.resume and world.rank == 0 else None)
        self.data = (FolderData if args.data == "imagenet" else ArrayData)(args, world)
        torch.manual_seed(args.seed)
        self.network = dict(arch=args.arch, num_classes=self.data.classes, image_size=args.image_size,
                            in_channels=self.data.channels)  # fmt: skip
        for path, other in ((args.out / "checkpoint.pt", state), (args.weights, source)):
            if other and other["network"] != self.network:
                raise UserError(f"{path}: its network has {other['network']}, these data need {self.network}")
        self.net = models.build(**self.network)
        # The faster layout on GPU and CPU alike; and the flat momentum's order must not depend on the device.
        self.net.to(world.device, memory_format=torch.channels_last).train()
        self.flat, self.grads = flatten(self.net)
        groups = [{"params": [self.flat[0]], "weight_decay": args.weight_decay},
                  {"params": [self.flat[1]], "weight_decay": 0.0}]  # fmt: skip
        self.optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9)
        self.full = getattr(self.net, args.cost)(1.0).item()
        dim, steps = self.net.num_widths, self.data.steps * args.epochs
        self.rounds = math.ceil(steps / args.tau)
        kind = {"joslim": self.joslim, "twostage": RandomWidths}.get(args.method, UniformWidths)
        self.sampler = kind(dim, lower=args.lower, seed=args.seed)
        self.step, self.steps = 0, steps
        self.widths = torch.empty(0, dim, dtype=torch.float64)
        self.alone = parse_widths(args.widths, self.net) if args.method == "alone" else None
        self.seconds, self.signal = {"total": 0.0, "search": 0.0, "loading": 0.0}, 0
        if state:
            self.restore(state)
        elif source:
            self.net.load_state_dict(source["model"])
            self.step = steps
        if args.resume:
            self.say(f"continuing {args.out} at step {self.step}" if state else f"no checkpoint in {args.out}: starting")
        self.began = self.saved = time.perf_counter()

    def cost(self, a, relaxed=False):
        """Cost as a ratio to the full network's: a (..., d) -> (...,)."""
        return getattr(self.net, self.args.cost)(a, relaxed=relaxed) / self.full

    def joslim(self, dim, lower, seed):
        args = self.args
        return Joslim(dim, self.cost, lower, args.num_prior, args.beta, seed, not args.random_lambda, args.smoothing)

    # -------------------------------------------------------------- files

    def log(self, event, **values):
        if self.log_file:
            write(self.log_file, json.dumps({"event": event, "step": self.step, **values}).encode() + b"\n")

    def say(self, text):
        if self.world.rank == 0:
            print(text, flush=True)

    def save(self):
        """Checkpoint: tensors and plain values only. Every process's state is the same."""
        self.clock()
        if self.world.rank == 0:
            state = {
                "format": FORMAT, "settings": settings(self.args), "network": self.network,
                "step": self.step, "steps": self.steps, "seconds": self.seconds,
                "model": self.net.state_dict(), "optimizer": self.optimizer.state_dict(),
                "sampler": self.sampler.state_dict(), "widths": self.widths,
            }  # fmt: skip
            raw = io.BytesIO()  # torch.save reports a full disk in many ways, a plain write in one
            torch.save(state, raw)
            with whole(self.args.out / "checkpoint.pt", keep=self.args.out / PREVIOUS) as f:
                f.write(raw.getbuffer())
        self.saved = time.perf_counter()

    def restore(self, state):
        self.net.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
        self.step, self.widths, self.seconds = state["step"], state["widths"], state["seconds"]

    def clock(self):
        """Adds the time since the last call to the run's total."""
        now = time.perf_counter()
        self.seconds["total"] += now - self.began
        self.began = now
        return self.seconds["total"]

    def loading(self, batches):
        """The batches, the time spent waiting for them counted."""
        batches = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.seconds["loading"] += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    @contextmanager
    def searching(self):
        """Counts the time of the block as the width search's."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()  # training steps still under way are not the search's
        start = time.perf_counter()
        yield
        self.seconds["search"] += time.perf_counter() - start

    # -------------------------------------------------------------- the algorithm

    def main(self):
        args = self.args
        self.say("settings  " + "  ".join(f"{k}={v}" for k, v in settings(args).items()))
        self.log("settings", **settings(args), processes=self.world.size, torch=torch.__version__)
        self.say(f"{args.arch}: {self.net.num_widths} widths, {self.net.flops(1.0).item() / 1e6:.1f} MFLOPs, "
                 f"{self.net.params(1.0).item() / 1e6:.3f} M parameters; {self.steps} steps on {self.world.size} x "
                 f"{self.world.device.type}")  # fmt: skip

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.asked_to_stop)
        self.train()
        if args.weights and not args.resume:
            self.save()
        with self.searching():
            candidates = self.candidates()
        rows = self.test_front(candidates)
        self.check_agreement()
        self.report(rows)

    def train(self):
        args = self.args
        recent, shown, shown_step = [], time.perf_counter(), self.step
        for epoch in range(self.step // self.data.steps, args.epochs):
            for x, y in self.loading(self.data.train(epoch, self.step - epoch * self.data.steps)):
                if args.method == "joslim":
                    if self.step % args.tau == 0:
                        self.check(recent)
                        with self.searching():
                            self.round()
                elif args.hold_widths:
                    if self.step % args.tau == 0:
                        self.widths = self.sampler.sample(args.proposals)
                elif args.method != "alone":
                    self.widths = self.sampler.sample(args.num_samples)
                widths = self.turn()
                losses = self.update(x, y, widths)
                recent.append((self.step, widths, losses))
                now = time.perf_counter()
                if now - shown > args.log_seconds or self.step == self.steps:
                    losses = self.check(recent)
                    self.progress(epoch, losses, (self.step - shown_step) * args.batch_size / (now - shown))
                    recent, shown, shown_step = [], time.perf_counter(), self.step
                if self.signal or now - self.saved > 60 * args.save_minutes:
                    self.check(recent)
                    self.save()
                    self.stop_if_asked()
            self.check(recent)
            self.save()

    def turn(self):
        """The M of the round's proposals that are trained at this step."""
        first = self.step * self.args.num_samples
        return [self.widths[(first + i) % len(self.widths)] for i in range(self.args.num_samples) if len(self.widths)]

    def update(self, x, y, widths):
        """One step of the optimiser -> this process's losses (full, widths, smallest), on the device."""
        args = self.args
        passes = (widths, args.lower) if args.method != "alone" else ([], None)
        how = dict(label_smoothing=args.label_smoothing, amp=args.amp, scale=1 / args.accumulate,
                   distill=args.distillation, teacher=1.0 if args.method != "alone" else self.alone)  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.data.steps, args)
        self.grads.zero_()
        parts = zip(x.chunk(args.accumulate), y.chunk(args.accumulate))
        losses = [sandwich_step(self.net, *part, *passes, **how) for part in parts]
        self.world.mean(self.grads)
        self.optimizer.step()
        self.step += 1
        return torch.stack(losses).mean(0)

    def check(self, recent):
        """The mean of recent steps' losses, once these and the weights are known to be finite.

        Called before every checkpoint and round: the loop's only wait for the device.
        """
        if not recent:
            return []

        def diverged(step, what):
            lr = learning_rate(step - 1, self.data.steps, self.args)
            return Diverged(f"step {step}: {what} at learning rate {lr:.3g}; the last checkpoint stands. Try a smaller --lr")

        losses = torch.stack([loss for _, _, loss in recent]).cpu()
        for (step, widths, _), row in zip(recent, losses):
            names = ["the full network", *(f"widths {w.tolist()}" for w in widths), "the smallest network"]
            if not row.isfinite().all():
                k = int((~row.isfinite()).nonzero()[0])
                raise diverged(step, f"loss {row[k].item()} of {names[k]}")
        if not all(f.isfinite().all() for f in self.flat):  # by the last step, or a loss would have shown it
            raise diverged(step, f"a gradient of {', '.join(names)} is not finite, though their losses are,")
        return losses.mean(0).tolist()

    def stop_if_asked(self):
        if self.signal:
            start = "torchrun ..." if self.world.size > 1 else "python"
            command = shlex.join([*(a for a in sys.argv if a != "--resume"), "--resume"])
            line = f"stopped at step {self.step}, all saved; continue with: {start} {command}"
            raise Stopped("" if self.world.rank else line, self.signal)  # one line, whatever the number of processes

    def asked_to_stop(self, number, frame):
        """SIGTERM or Ctrl-C: process 0 saves after the step under way; the others wait for it in vain and go."""
        self.signal = number
        if self.world.rank:
            signal.alarm(8)
        elif self.step == self.steps:  # all training is saved, and what follows is done again
            self.stop_if_asked()

    def progress(self, epoch, losses, speed):
        total, lr = self.clock(), self.optimizer.param_groups[0]["lr"]
        left = timedelta(seconds=round(total / self.step * (self.steps - self.step)))
        search, loading = (self.seconds[part] / total for part in ("search", "loading"))
        slow = " (it is what limits: try more --workers)" if loading > 0.2 else ""
        self.say(f"epoch {epoch + 1}/{self.args.epochs}  step {self.step}/{self.steps}  loss full {losses[0]:.3f} "
                 f"smallest {losses[-1]:.3f}  {speed:.0f} images/s  search {search:.1%}  loading {loading:.1%}{slow}  "
                 f"{left} left")  # fmt: skip
        self.log("train", epoch=epoch + 1, lr=lr, losses=losses, images_per_s=speed, seconds=total,
                 search_share=search, loading_share=loading)  # fmt: skip

    def round(self):
        """Re-evaluates the history, then proposes: on process 0, for all."""
        if self.sampler.ready:
            x, y = self.data.held_out(self.step // self.args.tau)
            losses = self.world.mean(evaluate(self.net, self.sampler.widths, x, y, self.args.amp))
            self.sampler.observe(losses)
            bad = ~self.sampler.losses.isfinite()
            if bad.any():
                self.say(f"step {self.step}: the held-out loss of {bad.sum()} configurations is not finite; "
                         "the GP goes without them")  # fmt: skip
                self.log("not finite", widths=self.sampler.widths[bad].tolist())
            if bad.all():
                raise Diverged(f"step {self.step}: no configuration's held-out loss is finite; the last checkpoint "
                               "stands. Try a smaller --lr")  # fmt: skip
        if self.world.rank == 0:
            self.widths = self.sampler.sample(self.args.proposals, self.args.visits)
        state, self.widths = self.world.from_first((self.sampler.state_dict(), self.widths))
        self.sampler.load_state_dict(state)
        self.log("round", configurations=len(self.sampler.widths), cost=self.cost(self.widths).tolist(),
                 widths=self.widths.tolist())  # fmt: skip

    def candidates(self):
        """The configurations among which the front is chosen: (n, d)."""
        args, dim = self.args, self.net.num_widths
        line = torch.linspace(args.lower, 1, args.front_size, dtype=torch.float64)[:, None].expand(-1, dim)
        if args.method == "slim":
            return line
        if args.method == "alone":
            return self.alone[None]
        sampler = self.search() if args.method == "twostage" else self.sampler
        near = shortlist(sampler.losses, self.cost(sampler.widths), args.candidates)
        return torch.cat([line[[0, -1]], sampler.widths[near]])  # the two trained at every step, in any case

    def search(self):
        """The two-stage method's second: the same sampler, the weights frozen."""
        args, world = self.args, self.world
        sampler = self.joslim(self.net.num_widths, args.lower, args.seed)
        x, y = self.data.held_out(0)
        while len(sampler.widths) < args.visits * self.rounds:
            new = sampler.losses.isnan().nonzero()[:, 0]  # the others' losses cannot have changed
            sampler.observe(world.mean(evaluate(self.net, sampler.widths[new], x, y, args.amp)), new)
            if world.rank == 0:
                sampler.sample(args.visits)
            sampler.load_state_dict(world.from_first(sampler.state_dict()))
        return sampler

    def test_front(self, candidates):
        """Picks the front on the held-out split, calibrates and tests each of it -> rows of front.csv."""
        args, net = self.args, self.net

        def held_out_loss(mine):
            batches = self.data.batches("held-out")
            return sum(evaluate(net, mine, x, y, args.amp) * len(x) for x, y in batches)[:, None] / args.held_out

        cost = self.cost(candidates)
        with self.searching():
            loss = self.world.spread(candidates, 1, held_out_loss)[:, 0]
        ranked = loss.clone()
        ranked[cost.argmax()] = -torch.inf  # the full network ends the front, whatever the noise says
        chosen = thin(pareto_front(ranked, cost), cost, args.front_size)
        self.log("front", cost=cost[chosen].tolist(), held_out_loss=loss[chosen].tolist(), candidates=len(loss))
        front = candidates[chosen]
        self.say(f"testing {len(front)} configurations of the front")
        tested = self.world.spread(front, 3, self.test)
        columns = [f(front).tolist() for f in (net.flops, net.params, net.memory)]
        return [(*map(int, costs), *result, a) for *costs, result, a in zip(*columns, tested.tolist(), front.tolist())]

    @torch.no_grad()
    def test(self, widths):
        """Test loss, top-1 and top-5 (%) of each configuration (n, d), BatchNorm calibrated for it: (n, 3)."""
        calibration, plain = [x for x, _ in self.data.batches("calibrate")], []
        for a in widths:
            self.net.set_widths(a)
            calibrate_bn(self.net, calibration)
            plain.append(self.net.extract().eval())
        total, count = torch.zeros(len(widths), 3, dtype=torch.float64, device=self.world.device), 0
        for x, y in self.data.batches("test"):  # once for all: loading may cost more than the networks
            count += len(y)
            for net, row in zip(plain, total):
                logits = net(x)
                hits = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
                row += torch.stack([F.cross_entropy(logits, y, reduction="sum"), 100 * hits[:, 0].sum(), 100 * hits.sum()])
        return total / max(count, 1)

    def check_agreement(self):
        """All processes must hold the same weights and history, or the run is worth nothing."""
        if self.world.size > 1:
            tensors = [*self.flat, *self.sampler.state_dict().values()]
            digest = hashlib.sha256(b"".join(t.detach().cpu().numpy().tobytes() for t in tensors)).hexdigest()
            digests = [None] * self.world.size
            dist.all_gather_object(digests, digest)
            if len(set(digests)) > 1:
                raise RuntimeError(f"process {self.world.rank} has other weights or another history than the rest")
            self.say(f"{self.world.size} processes agree: weights and history have sha256 {digest[:16]}...")

    def report(self, rows):
        args = self.args
        share = self.seconds["search"] / self.clock()
        self.log("done", seconds=self.seconds["total"], search_share=share)
        if self.world.rank:
            return
        with whole(args.out / "front.csv", "w") as f:
            table = csv.writer(f, lineterminator="\n")
            table.writerow([*COSTS, "loss", "top1", "top5", "widths"])
            for *values, a in rows:
                table.writerow([*values, " ".join(f"{w:.6g}" for w in a)])
        full = [getattr(self.net, c)(1.0).item() for c in COSTS]
        print("\n   MFLOPs        %   params M        %  memory MB        %    loss   top-1   top-5")
        for flops, params, memory, loss, top1, top5, _ in rows:
            cells = zip((flops, params, memory), full, (1e6, 1e6, 1e6), (9, 11, 11))
            print("".join(f"{v / unit:{w}.3f} {v / whole_net:8.1%}" for v, whole_net, unit, w in cells)
                  + f" {loss:7.4f} {top1:7.2f} {top5:7.2f}")  # fmt: skip
        picture = plot(args, rows, full[COSTS.index(args.cost)])
        total = timedelta(seconds=round(self.seconds["total"]))
        print(f"{total} in all, {share:.1%} of it for the width search; see {args.out}/ for checkpoint.pt, log.jsonl, "
              f"front.csv{' and front.png' if picture else ''}")  # fmt: skip


def parse_widths(text, net):
    """The widths that --widths gives -> (d,), float64."""
    try:
        widths = torch.tensor([float(w) for w in text.split()], dtype=torch.float64)
        net.set_widths(widths)
    except ValueError as e:
        raise UserError(f"--widths: {e}") from None
    return widths


def thin(front, cost, size):
    """At most `size` of the front's indices, the nearest to evenly spaced costs, ends included."""
    if len(front) <= size:
        return front
    grid = torch.linspace(cost[front[0]], cost[front[-1]], size, dtype=cost.dtype)
    return front[(cost[front] - grid[:, None]).abs().argmin(1).unique()]


def plot(args, rows, full):
    """front.png: top-1 against cost. False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    column = COSTS.index(args.cost)
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel=f"{args.cost} (% of the full network)", ylabel="test top-1 (%)")
    axes.plot([100 * r[column] / full for r in rows], [r[4] for r in rows], "o-")
    axes.set_title(f"{args.arch} on {args.data}, {args.method}")
    axes.grid(alpha=0.3)
    with whole(args.out / "front.png") as f:
        figure.savefig(f, dpi=150, format="png")
    return True


# ------------------------------------------------------------------------------ several runs


def read_run(folder):
    """A finished run's settings and front: (k, 5) columns flops, params, memory, test loss, top-1."""
    try:
        with open(folder / "log.jsonl") as f:
            found = [json.loads(line) for line in f if line.startswith('{"event": "settings"')][-1]
        with open(folder / "front.csv", newline="") as f:
            rows = [[float(row[c]) for c in (*COSTS, "loss", "top1")] for row in csv.DictReader(f)]
        return found, torch.tensor(rows, dtype=torch.float64)
    except (OSError, ValueError, KeyError, IndexError) as e:
        raise UserError(f"--compare: {folder} holds no finished run ({type(e).__name__}: {e})") from None


def compare(folders, picture):
    """Prints the mean over budgets of each kind of run, and the first kind's lead over each; draws the fronts.

    Each budget takes the costliest front point within it: the one of least held-out loss, so that
    nothing is chosen by test accuracy. Runs that differ in seed only are one kind.
    """
    runs = [read_run(Path(f)) for f in folders]
    settings = [s for s, _ in runs]
    for name in ("data", "arch", "image_size"):
        if len({s[name] for s in settings}) > 1:
            raise UserError(f"--compare: the runs differ in --{name.replace('_', '-')}")
    fronts = [front for s, front in runs if s["method"] != "alone"]
    if not fronts:
        raise UserError("--compare: at least one run must not be of --method alone")
    full = torch.stack([front[-1] for front in fronts]).amax(0)
    known = {"event", "step", "seed", "cost", "method", "trained_as", "hold_widths", "widths", "torch"}

    def differ(some):  # the other settings in which they do
        return sorted(k for k in set().union(*some) - known if len({str(s.get(k)) for s in some}) > 1)

    def method(s):
        source = [] if s["trained_as"] in (None, s["method"]) else [f"of {s['trained_as']}'s weights"]
        return " ".join([s["method"], *["held"] * s["hold_widths"], *source])

    def kind(s):
        own = differ([other for other in settings if method(other) == method(s)])
        return " ".join([method(s), *(f"{k}={s.get(k)}" for k in own)])

    for k in differ(settings):
        print(f"{k} differs: " + ", ".join(sorted({f"{method(s)} {s.get(k)}" for s in settings})))
    panels = []
    searched = {s["cost"] for s in settings if s["method"] in ("joslim", "twostage")}  # the others' fronts do not depend on it
    for column, cost in enumerate(COSTS):
        if cost not in (searched or {s["cost"] for s in settings}):
            continue
        kinds, alone = {}, []
        for s, front in runs:
            front = front.clone()
            front[:, column] /= full[column]
            if s["method"] == "alone":
                alone.append((s["seed"], front[0, column], front[0, 4]))
            elif s["method"] == "slim" or s["cost"] == cost:  # the uniform line is the same whatever the cost
                if s["seed"] in kinds.setdefault(kind(s), {}):
                    raise UserError(f"--compare: two runs are of {kind(s)}, seed {s['seed']}")
                kinds[kind(s)][s["seed"]] = front
        panels.append((cost, *tabulate(cost, column, kinds, alone)))
    if draw(panels, picture):
        print(f"\n{picture}: lines are means over seeds, bands their range; crosses are networks trained alone")


def tabulate(cost, column, kinds, alone):
    """The table of one cost. kinds: name -> seed -> front, `column` being its share of the full network's cost."""

    def within(front, budgets):  # test loss and top-1 at each budget
        at = torch.searchsorted(front[:, column].contiguous(), budgets + 1e-9) - 1
        return front[at.clamp_min(0), 3:]

    def line(name, scores, sign=""):
        scores = torch.stack(scores)
        cells = [f"{m:{sign}.{n}f}" for m, n in zip(scores.mean(0).tolist(), (4, 2, 2, 2, 2, 2))]
        if len(scores) > 1:
            cells = [f"{c} ± {d:.{n}f}" for c, d, n in zip(cells, scores.std(0).tolist(), (4, 2, 2, 2, 2, 2))]
        return f"{name:{wide}}" + "".join(f"{c:>17}" for c in cells)

    first, *others = kinds
    wide = max(map(len, [first, *(f"{first} - {name}" for name in others)]))
    low = max(front[0, column] for by_seed in kinds.values() for front in by_seed.values())
    budgets = torch.linspace(low, 1, 200, dtype=torch.float64)
    marks = torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    scores = {name: {seed: torch.cat([within(front, budgets).mean(0), within(front, marks)[:, 1]])
                     for seed, front in by_seed.items()} for name, by_seed in kinds.items()}  # fmt: skip
    print(f"\n{cost}: means over budgets from {low:.1%} to 100 %, and at four of them; mean ± standard deviation over seeds")
    heads = ("test loss", "top-1", "at 25 %", "at 50 %", "at 75 %", "at 100 %")
    print(" " * wide + "".join(f"{h:>17}" for h in heads))
    for name, by_seed in scores.items():
        print(line(name, list(by_seed.values())), f"  seeds {' '.join(map(str, sorted(by_seed)))}")
    for name in others:
        both = sorted(scores[name].keys() & scores[first].keys())
        if both:
            leads = [scores[first][seed] - scores[name][seed] for seed in both]
            each = " ".join(f"{lead[1]:+.2f}" for lead in leads)
            print(line(f"{first} - {name}", leads, "+"), f"  top-1 by seed {each}")
    for seed, share, top1 in alone:
        beside = [f"{name} {within(by_seed[seed], share)[1]:.2f}" for name, by_seed in kinds.items() if seed in by_seed]
        print(f"alone at {share:.1%}, seed {seed}: top-1 {top1:.2f}; within that budget {', '.join(beside)}")
    curves = {name: torch.stack([within(f, budgets)[:, 1] for f in by_seed.values()]) for name, by_seed in kinds.items()}
    return budgets, curves, alone


def draw(panels, path):
    """The fronts of `compare`, a panel per cost. False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(5 * len(panels), 4.5), layout="constrained")
    for number, (cost, budgets, kinds, alone) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1, xlabel=f"{cost} budget (% of the full network)",
                                  ylabel="test top-1 (%)")  # fmt: skip
        for k, top1 in kinds.items():
            axes.plot(100 * budgets, top1.mean(0), label=k)
            axes.fill_between(100 * budgets, top1.amin(0), top1.amax(0), alpha=0.15)
        axes.plot([100 * share for _, share, _ in alone], [top1 for *_, top1 in alone], "kx")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize="small")  # off the curves
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as f:
        figure.savefig(f, dpi=150, format="png")
    return True


def main(argv=None):
    try:
        args = parse_args(argv)
        if args.compare:
            compare(args.compare, args.out or Path("runs", "compare.png"))
            return 0
        world = World(args.device)
        with claimed(args, world) as log_file:
            Run(args, world, log_file).main()
    except UserError as e:
        if str(e):
            print(f"train.py: {e}", file=sys.stderr, flush=True)
        return e.code
    finally:
        World.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
