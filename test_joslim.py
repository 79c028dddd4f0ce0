"""pytest -q -n 2                     every test, about two minutes on two cores (without pytest-xdist, no -n: four)
pytest -q -s .ci/test_faults.py    25 kills, dead workers, a full disk; shows what was seen

Helpers that several sections need come first. Then the order is that of README's map from the paper to the code, and after
it that of its Use: data, networks, the front put to use, runs that are stopped or go wrong. Each section says what it compares
with: nothing of this project's, but torchvision's networks, plain networks, dense algebra, finite differences, brute force.
"""

import copy
import csv
import errno
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import types
import zipfile
import zlib
from collections import Counter, OrderedDict
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.models.feature_extraction
from PIL import Image, ImageCms
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

import gp
import joslim
import models
import train

ROOT = Path(__file__).parent
LOWER = 0.42
CIFAR_FORM = "resnet8", "resnet20", "resnet32", "resnet44", "resnet56"
EACH_KIND = "resnet8", "resnet56", "resnet18", "resnet50", "mbv2"
IMAGENET_FORM = [arch for arch in models.ARCHS if arch not in CIFAR_FORM]
# Counted without a word to the driver, whom processes forked from the server could not speak to otherwise.
on_a_gpu = pytest.mark.skipif(not torch.cuda.device_count(), reason="there is no GPU here")
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["test_joslim"])  # in which torch is imported: a process of its own starts at once
torch.set_num_threads(1)  # networks this small gain nothing from two, and lose much where something else runs


@pytest.fixture(autouse=True)
def same_start():
    """Every test has the same random numbers, and leaves signals as they were."""
    torch.manual_seed(0)
    before = [signal.getsignal(number) for number in train.SIGNALS]
    yield
    assert [signal.getsignal(number) for number in train.SIGNALS] == before


def torchvisions(arch):
    return "mobilenet_v2" if arch == "mbv2" else arch


def widths_for(net, seed, lower=0.1):
    g = torch.Generator().manual_seed(seed)
    return lower + (1 - lower) * torch.rand(net.num_widths, generator=g, dtype=torch.float64)


def refuses(what, fn, *args, **kwargs):
    """The call raises ValueError, which says what is wrong."""
    with pytest.raises(ValueError, match=what):
        fn(*args, **kwargs)


def slopes(f, a, step):
    """Central differences of f at `a`, along each of its last coordinates."""
    moves = step * torch.eye(a.shape[-1], dtype=torch.float64)
    return torch.stack([(f(a + e) - f(a - e)) / (2 * step) for e in moves], -1)


def joined_batch():
    torch.manual_seed(0)
    net = models.build("resnet8", 6, 16).double().eval()  # eval: BatchNorm's batch statistics aside
    x, y = torch.randn(8, 3, 16, 16).double(), torch.randint(6, (8,))
    return net, x, y, torch.stack([widths_for(net, s, LOWER) for s in range(2)])


def gradient(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


# ------------------------------------------------------------------------------ helpers: small data sets, short runs


# Data set: its folder, the names of its training and test files, the number of classes.
IDX_FILES = {
    "fashion-mnist": ("FashionMNIST/raw", ("train", "t10k"), 10),
    "kmnist": ("KMNIST/raw", ("train", "t10k"), 10),
    "emnist": ("EMNIST/raw", ("emnist-balanced-train", "emnist-balanced-test"), 47),
}
# Its folder, the names of its training files, test file, labels and file of class names.
CIFAR_FILES = {
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", "labels", "batches.meta"),
    "cifar100": ("cifar-100-python", ["train"], "test", "fine_labels", "meta"),
}


def noise(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


def write_idx(path, t):
    with gzip.open(path, "wb") as f:
        f.write(struct.pack(">HBB", 0, 8, t.ndim) + struct.pack(f">{t.ndim}I", *t.shape) + t.numpy().tobytes())


def write_data(kind, root, patch=None):
    """Some 100 images in a data set's own file format; CIFAR's checksums become those of these files."""
    torch.manual_seed(0)
    if kind in IDX_FILES:
        folder, parts, classes = IDX_FILES[kind]
        (root / folder).mkdir(parents=True)
        for part, n in zip(parts, (96, 20)):
            write_idx(root / folder / f"{part}-images-idx3-ubyte.gz", noise(n, 28, 28))
            write_idx(root / folder / f"{part}-labels-idx1-ubyte.gz", (torch.arange(n) % classes).byte())
    elif kind in CIFAR_FILES:
        folder, parts, test, labels, meta = CIFAR_FILES[kind]
        (root / folder).mkdir(parents=True)
        sizes, md5 = {**dict.fromkeys(parts, 100 // len(parts)), test: 20}, {}
        entries = {name: {"data": noise(n, 3072).numpy(), labels: [i % 10 for i in range(n)]} for name, n in sizes.items()}
        named = {"label_names": [f"a{i}" for i in range(10)], "fine_label_names": [f"b{i}" for i in range(100)]}
        for name, entry in (entries | {meta: named}).items():
            (root / folder / name).write_bytes(raw := pickle.dumps(entry))
            md5[name] = hashlib.md5(raw).hexdigest()
        reader = getattr(torchvision.datasets, kind.upper())
        patch.setattr(reader, "train_list", [[name, md5[name]] for name in parts])
        patch.setattr(reader, "test_list", [[test, md5[test]]])
        patch.setattr(reader, "meta", reader.meta | {"md5": md5[meta]})
    else:
        for part, c, i in itertools.product(("train", "val"), ("cat", "dog"), range(48)):
            if part == "train" or i < 10:
                (root / part / c).mkdir(parents=True, exist_ok=True)
                Image.fromarray(noise(40, 50, 3).numpy()).save(root / part / c / f"{i}.jpeg")
    return root


@pytest.fixture
def make_data(tmp_path, monkeypatch):
    """kind -> flags that have train.py read a small data set of that kind, which lies in tmp_path / kind."""

    def make(kind):
        small = ["--image-size", "16"] if kind == "imagenet" else []
        return ["--data", kind, "--data-dir", str(write_data(kind, tmp_path / kind, monkeypatch)), *small]

    return make


QUICK = ["--device", "cpu", "--epochs", "2", "--batch-size", "32", "--held-out", "16", "--eval-images", "8", "--tau", "1",
         "--num-prior", "3", "--calibrate-images", "16", "--front-size", "4", "--warmup-epochs", "0.5",
         "--workers", "0"]  # fmt: skip


@pytest.fixture
def photos(make_data):
    """Flags of a short run of resnet8 on a small image folder."""
    return [*QUICK, *make_data("imagenet"), "--arch", "resnet8"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Flags of a run of 8 steps, 6 rounds with a GP among them, on small files of Fashion-MNIST's format."""
    root = write_data("fashion-mnist", tmp_path_factory.mktemp("data"))
    return [*QUICK, "--data", "fashion-mnist", "--data-dir", str(root), "--arch", "resnet8", "--image-size", "8",
            "--subnets", "2", "--epochs", "4", "--front-size", "6", "--log-seconds", "0"]  # fmt: skip


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """The folder of `tiny`, finished: do not write into it."""
    out = tmp_path_factory.mktemp("finished")
    assert train.main([*tiny, "--out", str(out)]) == 0
    return out


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of that folder, to write into."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def small_data(*flags, rank=0, size=1):
    data = train.Data(train.parse_args([*QUICK, *flags]), train.World().meet("cpu"))
    data.world.rank, data.world.size = rank, size  # as if this were one of several
    return data


def read_front(out):
    with open(Path(out) / "front.csv", newline="") as f:
        return list(csv.DictReader(f))


def read_log(out, event):
    entries = map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines())
    return [e for e in entries if e["event"] == event]


def read_state(out):
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def widths_of(row):
    return torch.tensor([float(w) for w in row["widths"].split()], dtype=torch.float64)


def same_run(one, two):
    for part in ("model", "sampler"):
        torch.testing.assert_close(read_state(one)[part], read_state(two)[part], rtol=0, atol=0, equal_nan=True)
    return (one / "front.csv").read_bytes() == (two / "front.csv").read_bytes()


def run_until(step, flags, monkeypatch):
    """Stops a run where it saves at this step."""
    save = train.Run.save

    def save_and_stop(run):
        save(run)
        if run.step == step:
            raise train.Stopped(15)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "save", save_and_stop)
        assert train.main(flags) == 143


@pytest.fixture
def refused(capsys):
    """(word, *argv): train.py ends with one line on stderr, the word in it, and exit code 2 (or `code`) -> the line."""

    def check(word, *argv, code=2):
        capsys.readouterr()
        assert train.main([*map(str, argv)]) == code
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.startswith("train.py: ") and word in err, err
        return err

    return check


def python(*argv, cwd=ROOT, path=""):
    """What that command of Python's prints, in a folder."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, *argv], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def forked(argv, env, streams, patch):
    os.setsid()
    os.environ.update(env)
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    exec(patch, {"os": os, "signal": signal, "sys": sys, "train": train})
    sys.exit(train.main(argv))


class Forked:
    """`train.py` in a process and session of its own, its output in files; `patch` is code that it runs before."""

    def __init__(self, argv, env={}, patch=""):  # noqa: B006
        self.folder = Path(tempfile.mkdtemp())
        self.streams = [str(self.folder / name) for name in ("out", "err")]
        self.process = forkserver.Process(target=forked, args=(argv, env | {"OMP_NUM_THREADS": "1"}, self.streams, patch))
        self.process.start()
        self.pid = self.process.pid

    def await_line(self, start):
        for _ in range(600):
            if any(line.startswith(start) for line in self.read("out").splitlines()):
                return
            assert self.process.is_alive(), self.read("err")
            time.sleep(0.1)
        raise AssertionError(self.read("out") + self.read("err"))

    def read(self, name):
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def finish(self, timeout=60):
        """Its exit code (negative for a signal that killed it) and stderr."""
        self.process.join(timeout)
        code, err = self.process.exitcode, self.read("err")
        assert code is not None, self.read("out") + err
        shutil.rmtree(self.folder)
        return code, err


def two(argv, patches=("", "")):
    """Two processes of one run, or one for each patch, without torchrun, whose own words would be in between."""
    size = str(len(patches))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": size}
    return [Forked(argv, env | {"RANK": str(r), "LOCAL_RANK": str(r)}, patch) for r, patch in enumerate(patches)]


def ends(runs, timeout=60):
    """The exit codes of processes of one run, and what they say on stderr together."""
    codes, errs = zip(*(run.finish(timeout) for run in runs))
    return codes, "".join(errs)


# ------------------------------------------------------------------------------ width groups, running at a
# Compared with torchvision's networks of the same weights, and with plain networks of torch's own layers, weights
# cut; what those share with ours, the blocks' forward passes, with the papers' words.


def macs_by_hooks(plain, x):
    total = []

    def count(m, inputs, out):
        if isinstance(m, nn.Conv2d):
            total.append(m.in_channels // m.groups * m.kernel_size[0] * m.kernel_size[1] * out[0].numel())
        else:
            total.append(m.in_features * m.out_features)

    for m in plain.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.register_forward_hook(count)
    plain.eval()(x)
    return sum(total)


class LiveTensors(TorchDispatchMode):
    """The real thing's memory: from which to which operation of a plain network each storage is in use."""

    def __init__(self, weights):
        super().__init__()
        self.weights = {w.untyped_storage().data_ptr() for w in weights}
        self.lives, self.keep, self.now = {}, [], 0  # storage -> [bytes, first operation, last operation]

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        tensors = [t for t in tree_flatten((args, out))[0] if isinstance(t, torch.Tensor)]
        for t in tensors:
            storage = t.untyped_storage()
            if t.dtype == torch.float32 and t.ndim > 1 and storage.data_ptr() not in self.weights:
                self.lives.setdefault(storage.data_ptr(), [storage.nbytes(), self.now, None])[2] = self.now
        self.keep += tensors  # so that no address comes twice
        self.now += 1
        return out

    def peak(self):
        return max(sum(size for size, first, last in self.lives.values() if first <= i <= last) for i in range(self.now))


def costs_are(net, a, plain, x):
    """The network's costs at `a` are those of the plain network, seen as it runs on one image."""
    weights = 4 * sum(p.numel() for p in plain.parameters())
    with torch.no_grad(), LiveTensors([*plain.parameters(), *plain.buffers()]) as live:
        plain.eval()(x.clone())  # a storage of its own
    assert 4 * net.params(a).item() == weights and net.memory(a).item() == weights + live.peak()
    assert net.flops(a).item() == macs_by_hooks(plain, x)  # last: its hooks stay


def agrees(net, theirs, x, seeds=2):
    """`slimmable(theirs)` is that network at full width, and at others the plain network extracted; costs are that one's."""
    state, out = theirs.state_dict(), lambda m, x: tree_flatten(m(x))[0]
    assert list(net.state_dict()) == list(state) and all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    with torch.no_grad():
        full, expected = out(net.eval(), x), out(theirs.eval(), x)
    torch.testing.assert_close(full, expected, rtol=1e-9, atol=1e-9)
    assert net.kept is None or all(map(torch.equal, full, expected))  # of a network as it is: to the bit
    for seed in range(seeds):
        net.set_widths(a := widths_for(net, seed))
        plain, grads = net.eval().extract(), []
        named = ([(k, type(m), getattr(m, "momentum", 0)) for k, m in n.named_modules()] for n in (plain, theirs))
        assert next(named) == next(named)
        with FlopCounterMode(display=False) as counter:
            plain(x[:1])
        assert net.flops(a).item() == counter.get_total_flops() / 2
        assert net.params(a).item() == sum(p.numel() for p in plain.parameters())
        for mode, some in itertools.product((False, True), (net, plain)):
            torch.manual_seed(seed)  # of dropout
            pixels = x.clone().requires_grad_()
            sum(t.square().sum() for t in out(some.train(mode), pixels)).backward()
            trained = [p for p in some.parameters() if p.grad is not None]
            sums = [(p.grad.abs().sum(), (p.grad * p).sum()) for p in trained]  # what is cut off is not trained
            grads.append([pixels.grad, *(torch.stack(two).detach() for two in zip(*sums))])
            grads[-1] += out(some, x) if not mode else []
            some.zero_grad()
        for ours, others in (grads[:2], grads[2:]):
            for s, t in zip(ours, others, strict=True):
                torch.testing.assert_close(s, t, rtol=1e-6, atol=1e-6 * t.abs().max().item())
        after = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
        assert all(torch.equal(state[k], v) for k, v in after.items())  # training tracks no statistics
    net.set_widths(1.0)
    models.sort_channels(net.eval())
    with torch.no_grad():
        for s, t in zip(out(net, x), full):
            torch.testing.assert_close(s, t, rtol=1e-6, atol=1e-6 * t.abs().max().item())


def ready(net):
    """In double, with statistics and affine parameters that hide nothing."""
    for m in net.double().modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine:
            m.weight.data.uniform_(0.5, 1.5), m.bias.data.normal_(0, 0.2)
            m.running_mean.normal_(0, 0.2), m.running_var.uniform_(0.5, 1.5)
    return net.eval()


@pytest.mark.parametrize("arch", EACH_KIND)
def test_narrow_is_the_plain_network(arch):
    size = 16 if arch in CIFAR_FORM else 32
    net = ready(models.build(arch, 7, size))
    plain = net.extract(1.0)
    assert not {type(m) for m in plain.modules()} & {models.Slimmable, *models.LAYERS}
    agrees(net, plain, torch.randn(4, 3, size, size).double())


def test_widths_become_channels():
    net = models.build("resnet8", 5, 16)
    a = (0.42, 0.5, 0.53, 1.0, 0.1, 0.99)
    net.set_widths(torch.tensor(a))
    expected = [max(1, round(w * g.max)) for w, g in zip(a, net.groups)]
    assert [g.active for g in net.groups] == expected
    net.extract(1.0)
    assert [g.active for g in net.groups] == expected  # as they were
    net.set_widths(1e-6)  # one channel everywhere
    net(torch.randn(2, 3, 16, 16)).sum().backward()
    refuses("6 widths, got 3", net.set_widths, torch.ones(3))
    refuses("shape", net.set_widths, torch.ones(2, 6))
    for bad in (0.0, 1.5, math.nan):
        refuses(f"got {bad:g}", net.set_widths, bad)
        refuses(f"got {bad:g}", net.extract, bad)
    assert [g.active for g in net.groups] == [1] * net.num_widths


@pytest.mark.parametrize("channels, kept", [(16, 32), (16, 9), (5, 32)])
def test_shortcuts_without_parameters(channels, kept):
    """He et al.'s option A: every second pixel, the channels that both sides have, nothing in the rest."""
    block = models.build("resnet8", 5, 16).layer2[0].eval()
    block.conv1.reads.active, block.bn2.writes.active = channels, kept
    block.bn2.weight.data.zero_()  # the shortcut alone is left
    x = torch.randn(2, channels, 8, 8)
    expected = torch.zeros(2, kept, 4, 4)
    for c in range(min(channels, kept)):
        expected[:, c] = x[:, c, ::2, ::2].clamp(min=0)
    assert torch.equal(block(x), expected)


class Own(nn.Module):
    """Two convolutions of groups of 8 and 12 channels; `forward` is passed in, `more` are further layers."""

    def __init__(self, forward=None, **more):
        super().__init__()
        self.image, self.a, self.b = models.WidthGroup(1, fixed=True), models.WidthGroup(8), models.WidthGroup(12)
        self.one, self.two = models.Conv2d(self.image, self.a, 3, bias=True), models.Conv2d(self.a, self.b, 3, 2)
        self.norm, self.out = models.BatchNorm2d(self.b), models.Linear(self.b, 3)
        self.fix, self.both = functools.cache(lambda n: models.WidthGroup(n, fixed=True)), models.Concatenation(self.a, self.b)
        for name, make in more.items():
            setattr(self, name, make(self))
        self.run = forward or (lambda m, x: m.end(m.two(F.relu(m.one(x)))))

    def end(self, x):
        return self.out(F.relu(self.norm(x)).mean((2, 3)))

    def forward(self, x):
        return self.run(self, x)


def own(*args, **more):
    return models.Slimmable(OrderedDict(net=Own(*args, **more)), image=(1, 12, 12))


def conv(reads, writes, *how):
    return lambda m: models.Conv2d(getattr(m, reads), getattr(m, writes), *how)


@pytest.mark.parametrize("forward, more", [
    (None, {}),
    (lambda m, x: m.end(m.two(m.again(m.again(F.relu(m.one(x)))))), {"again": conv("a", "a", 3)}),  # one layer, two places
    (lambda m, x: m.end(m.gate(m.two(m.one(x)).mean((2, 3), keepdim=True)).sigmoid() * m.two(m.one(x))),
     {"gate": conv("b", "b", 1)}),  # squeeze and excitation; and the rest runs twice
    (lambda m, x: m.end(m.two(m.one(x) + torch.zeros(1, 1, 12, 12, device=x.device))), {}),  # a tensor made on the way
    (lambda m, x: m.end(F.group_norm(m.two(m.one(x)), 1)), {}),
    (lambda m, x: m.last(torch.cat([m.two(m.one(x)).mean((2, 3)), m.end(m.two(m.one(x)))], 1)),
     {"last": lambda m: models.Linear(models.Concatenation(m.b, m.out.writes), 2)}),  # of a fixed one, too
    (lambda m, x: m.end(m.join(torch.cat([torch.cat([m.two(m.one(x)), m.one(x)[:, :, ::2, ::2]], 1), m.two(m.one(x))], 1))),
     {"join": lambda m: models.Conv2d(models.Concatenation(models.Concatenation(m.b, m.a), m.b), m.b, 3)}),  # DenseNet's way
    (lambda m, x: m.end(m.two(m.one(x) * m.one(x).amax(1, keepdim=True).sigmoid())), {}),  # a map of no group's channels
    (lambda m, x: m.end(m.two(m.one(x)).flatten(2).transpose(1, 2).relu().transpose(1, 2).unflatten(2, (6, 6))), {}),
    (lambda m, x: m.end(m.two(m.one(x) + m.back(torch.cat([m.wide(m.one(x)), m.wide(m.one(x))], 1).chunk(2, 1)[1]))),
     {"wide": lambda m: models.Conv2d(m.a, m.fix(4), 3), "back": lambda m: models.Conv2d(m.fix(4), m.a, 3)}),
    (lambda m, x: m.end(m.join(F.relu(m.norms(m.deep(torch.cat([m.one(x)[:, :, ::2, ::2], m.two(m.one(x))], 1)))))),
     {"deep": lambda m: models.Conv2d(m.both, m.both, 3, groups=5), "norms": lambda m: models.BatchNorm2d(m.both),
      "join": lambda m: models.Conv2d(m.both, m.b, (3, 5), padding="same", dilation=2)}),
    (lambda m, x: m.out(m.hidden(m.slope(m.two(m.one(x))).flatten(1)).relu()),
     {"slope": lambda m: nn.PReLU(), "norm": lambda m: nn.Identity(), "unused": lambda m: nn.Linear(3, 3),
      "hidden": lambda m: models.Linear(models.Concatenation(m.b, each=36), m.b)}),
])  # fmt: skip
def test_another_network_made_slimmable(forward, more):
    net, x = own(forward, **more), torch.randn(3, 1, 12, 12)
    assert net.names == ["net.one", "net.two"]
    if forward is None:
        assert net.flops(torch.tensor([0.5, 0.75])).item() == 9 * 4 * 144 + 9 * 4 * 9 * 36 + 9 * 3
    for a in (torch.tensor([0.5, 0.75]), torch.tensor([1.0, 0.25])):
        costs_are(net, a, net.extract(a), x[:1])
    agrees(ready(net), net.extract(1.0), x.double())


def test_a_network_that_asks_its_groups_is_extracted_at_any_widths():
    padded = lambda m, x: F.pad(x[:, :, ::2, ::2], [0] * 5 + [m.b.active - 1])  # noqa: E731
    net, a = own(lambda m, x: m.end(m.two(m.one(x)) + padded(m, x))), torch.tensor([0.5, 0.5])
    plain, x = net.extract(a), torch.randn(3, 1, 12, 12)
    net.set_widths(a)
    torch.testing.assert_close(net(x), plain(x))


@pytest.mark.parametrize("count, channels", [(10, 4), (20, 2)])
def test_any_two_groups_added_are_refused(count, channels):
    """However narrow: each has its turn to be the wider one."""

    class Sums(nn.Module):
        def __init__(self, *pair):
            super().__init__()
            groups, image = [models.WidthGroup(channels) for _ in range(count)], models.WidthGroup(1, fixed=True)
            self.first = nn.ModuleList(models.Conv2d(image, g, 1) for g in groups)
            self.last, self.pair = nn.ModuleList(models.Linear(g, 2) for g in groups), pair

        def forward(self, x):
            maps = [m(x).mean((2, 3)) for m in self.first]
            sums = [sum(maps[k] for k in self.pair) if i == self.pair[0] else t for i, t in enumerate(maps)]
            return sum(m(t) for m, t in zip(self.last, sums))

    for pair in ((1, 3), (3, 1), (count - 2, count - 1), (count - 1, 0)):
        refuses("after first|last.*: reads", models.Slimmable, Sums(*pair), (1, 2, 2))
    assert models.Slimmable(Sums(1), (1, 2, 2)).num_widths == count


# Of each kind: widths found, and the share of FLOPs left at a quarter of them.
ZOO = {"regnet_y_400mf": (37, 0.12), "mobilenet_v3_small": (27, 0.16), "efficientnet_b0": (40, 0.12),
       "densenet": (17, 0.13), "googlenet": (57, 0.09), "vgg11": (10, 0.07), "squeezenet1_1": (25, 0.12),
       "shufflenet_v2_x0_5": (18, 0.35),
       "resnext50_32x4d": (21, 0.09), "convnext": (0, 1)}  # fmt: skip
Block = torchvision.models.convnext.CNBlockConfig
FEW_BLOCKS = {"densenet": lambda: torchvision.models.DenseNet(16, (2, 3, 2), 32, num_classes=5),
              "convnext": lambda: torchvision.models.ConvNeXt([Block(32, 64, 1), Block(64, None, 1)], num_classes=5)}  # fmt: skip


@pytest.mark.parametrize("arch", ZOO)
def test_torchvisions_networks_as_they_are(arch):
    more = {"aux_logits": False, "init_weights": False} if arch == "googlenet" else {}
    whole = functools.partial(torchvision.models.get_model, arch, weights=None, num_classes=5, **more)
    theirs = ready(FEW_BLOCKS.get(arch, whole)())
    if arch == "vgg11":  # the 4096 between its Linears take half a minute
        theirs.classifier[0], theirs.classifier[3], theirs.classifier[6] = (
            nn.Linear(*sizes).double() for sizes in ((25088, 64), (64, 48), (48, 5)))  # fmt: skip
    net, (widths, share) = models.slimmable(theirs, (3, 32, 32)), ZOO[arch]
    assert net.num_widths == widths and (not widths or net.flops(0.25) <= share * net.flops(1.0))
    last = [name for name, m in theirs.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    assert net.kept[last] == "is an output of the network" and (len(net.kept) == 1 or arch[:4] in ("shuf", "conv"))
    agrees(net, theirs, torch.randn(4, 3, 32, 32).double(), seeds=1)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "mbv2"])
def test_wired_by_hand_as_found(arch):
    """The networks written here are torchvision's, weight for weight; and have the groups that are found in those."""
    theirs, wired = ready(getattr(torchvision.models, torchvisions(arch))(num_classes=7)), models.build(arch, 7, 64).double()
    wired.load_state_dict(theirs.state_dict())  # strict: every name and shape is torchvision's
    x = 10 * torch.randn(2, 3, 64, 64).double()  # beyond ReLU6's bound
    with torch.no_grad():
        torch.testing.assert_close(wired.eval()(x), theirs(x), rtol=1e-9, atol=1e-9)
    found = models.slimmable(theirs, (3, 64, 64), fixed=("features.18",) if arch == "mbv2" else ())
    assert found.names == wired.names and [g.max for g in found.groups] == [g.max for g in wired.groups]
    place = lambda net, g: net.groups.index(g) if g in net.groups else g.max  # noqa: E731
    for name, m in wired.named_modules():
        if isinstance(m, models.LAYERS) and not m.reads.fixed | m.writes.fixed:
            other = found.get_submodule(name)
            assert [place(found, g) for g in (other.reads, other.writes)] == [place(wired, g) for g in (m.reads, m.writes)]
    assert torch.equal(found._flops, wired._flops) and torch.equal(found._params, wired._params)
    refuses("no module 'features.99'", models.slimmable, theirs, (3, 64, 64), fixed=("features.99",))


class Small(nn.Module):
    """3 x 3 convolution and BatchNorm, `middle`, convolution, Linear of the mean."""

    def __init__(self, middle, reads=8, **more):
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.two, self.out, self.middle = nn.Conv2d(reads, 6, 3, padding=1), nn.Linear(6, 4), middle
        for name, make in more.items():
            setattr(self, name, make())

    def forward(self, x):
        return self.out(F.relu(self.two(self.middle(self, F.relu(self.norm(self.one(x)))))).mean((2, 3)))


def to(*how, kind=nn.Conv2d, **more):
    return lambda: kind(*how, **more)


def parameter(*shape):
    return lambda: nn.Parameter(torch.rand(*shape))


def assigned(x, index, value):
    x = x.clone()
    x[index] = value
    return x


class Scaled(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * torch.arange(self.out_channels, device=x.device).view(-1, 1, 1)


def hooked():
    conv = nn.Conv2d(8, 8, 1)
    conv.register_forward_hook(lambda m, inputs, out: out.cumsum(1))
    return conv


SLIMMED = {  # all of it: how `middle` is made, further layers, and the layers that write a group
    "concatenated": (lambda m, x: torch.cat([m.a(x), x, m.b(x)], -3), 17, dict(a=to(8, 4, 1), b=to(8, 5, 1)), "a b"),
    "twice": (lambda m, x: torch.cat([x, m.a(x)], 1) + torch.cat([m.b(x)] * 2, 1), 16, dict(a=to(8, 8, 1), b=to(8, 8, 1)), ""),
    "norm of two": (lambda m, x: m.n(torch.cat([m.a(x), x], 1)), 12, dict(a=to(8, 4, 1), n=to(12, kind=nn.BatchNorm2d)), "a"),
    "called twice": (lambda m, x: m.a(m.b(F.relu(m.a(x)))), 8, dict(a=to(8, 8, 1), b=to(8, 8, 3, padding=1)), "a"),
    "by whole parts": (lambda m, x: m.b(m.a(x)), 8, dict(a=to(8, 8, 1, groups=4), b=to(8, 8, 1, groups=2)), ""),
    "CBAM": (lambda m, x: m.a(torch.cat([x.mean(1, True), x.max(1)[0][:, None]], 1)) * torch.cat([x, m.b(x)], 1), 13,
             dict(a=to(2, 1, 1), b=to(8, 5, 1)), "b"),
    "reflected": (lambda m, x: m.a(x), 8, dict(a=to(8, 8, 3, padding=1, padding_mode="reflect")), "a"),
    "slope of all": (lambda m, x: m.a(x) * m.b, 8, dict(a=to(kind=nn.PReLU), b=parameter(1, 1, 8, 8)), ""),
    "a view changed": (lambda m, x: (x := x * 1, x.flatten(2).mul_(2))[0], 8, {}, ""),
    "squeezed, gated": (lambda m, x: x * m.b(m.a(x.mean((-1, -2))))[..., None, None].expand_as(x), 8,
                        dict(a=to(8, 4, kind=nn.Linear), b=to(4, 8, kind=nn.Linear)), "a"),
    "flattened": (lambda m, x: m.a(torch.cat([x, m.b(x)], 1).flatten(1))[..., None, None], 6,
                  dict(a=to(13 * 64, 6, kind=nn.Linear), b=to(8, 5, 1)), "a b"),
    "asks for sizes": (lambda m, x: m.b(m.a(x)[:, :, 0, 0] / m.a.out_channels)[..., None, None] * m.b.in_features
                       / m.norm.num_features, 6, dict(a=to(8, 8, 1), b=to(8, 6, kind=nn.Linear)), "a b"),
}  # fmt: skip
KEPT = {  # the convolution before `middle`, and why
    "shuffle": (lambda m, x: F.channel_shuffle(x, 2), 8, {}, "channel_shuffle"),
    "NHWC": (lambda m, x: m.a(x.permute(0, 2, 3, 1).flatten(1))[..., None, None], 6,
             dict(a=to(512, 6, kind=nn.Linear)), "permute"),
    "slope of each": (lambda m, x: m.a(x), 8, dict(a=to(8, kind=nn.PReLU)), "no layer"),
    "scale of each": (lambda m, x: x * m.a, 8, dict(a=parameter(8, 1, 1)), "no layer"),
    "GroupNorm": (lambda m, x: m.a(x), 8, dict(a=to(2, 8, kind=nn.GroupNorm)), "group_norm"),
    "attention": (lambda m, x: (q := x.flatten(2), F.softmax(q @ q.mT, -1) @ q)[1].view_as(x), 8, {}, "transpose"),
    "ECA": (lambda m, x: x * m.a(x.mean((2, 3))[:, None]).mT[..., None], 8,
            dict(a=to(1, 1, 3, 1, 1, kind=nn.Conv1d)), "unsqueeze"),
    "weight norm": (lambda m, x: m.a(x), 8,
                    dict(a=lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))), "after a"),
    "transposed": (lambda m, x: m.a(x), 5, dict(a=to(8, 5, 2, 2, kind=nn.ConvTranspose2d)), "convolution after a"),
    "subclass": (lambda m, x: m.a(x), 8, dict(a=to(8, 8, 1, kind=Scaled)), "after a"),
    "hook": (lambda m, x: m.a(x), 8, dict(a=hooked), "after a"),
    "shared": (lambda m, x: F.conv2d(m.a(x), m.a.weight), 8, dict(a=to(8, 8, 1, bias=False)), "go into convolution"),
    "read": (lambda m, x: x * m.one.weight.norm(), 8, {}, "has weights that go into linalg_vector_norm"),
    "1d": (lambda m, x: m.a(x.flatten(2)).view_as(x), 8, dict(a=to(8, kind=nn.BatchNorm1d)), "batch_norm after a"),
    "other parts": (lambda m, x: m.a(x), 16, dict(a=to(8, 16, 1, groups=8)), "a, which is a grouped convolution"),
    "assigned": (lambda m, x: assigned(x, (slice(None), 0), 1.0), 8, {}, "select"),
    "into a buffer": (lambda m, x: assigned(torch.zeros(x.shape, dtype=x.dtype), ..., x), 8, {}, "no layer"),
    "shifted": (lambda m, x: F.pad(x, [0, 0, 0, 0, 1, -1]), 8, {}, "constant_pad_nd"),
    "pooled": (lambda m, x: F.max_pool2d(x.flatten(2), 3, 1, 1).view_as(x), 8, {}, "max_pool2d"),
    "where the maximum is": (lambda m, x: x * x.max(1, True)[1], 8, {}, "mul"),
    "in training": (lambda m, x: m.a(x) if m.training else x, 8, dict(a=to(8, 8, 1)), "called in training alone"),
    "other order": (lambda m, x: torch.cat([m.a(x), x], 1) + torch.cat([x, m.a(x)], 1), 12, dict(a=to(8, 4, 1)), "beside"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*SLIMMED, *KEPT])
def test_small_networks_as_they_are(case):
    middle, reads, more, what = (SLIMMED | KEPT)[case]
    theirs = ready(Small(middle, reads, **more))
    net = models.slimmable(theirs, (3, 8, 8))
    if case in SLIMMED:
        assert {*net.names} == {"one", "two", *what.split()} and net.kept.keys() <= {"out", "a"}
    else:
        assert "one" not in net.names and "two" in net.names and re.search(what, net.kept["one"])
    agrees(net, theirs, torch.randn(3, 3, 8, 8).double())


def test_outputs_keep_their_channels():
    class Heads(Small):
        def forward(self, x):
            x = self.one(x)
            return {"map": x, "two": [self.two(F.relu(x)).mul_(2), self.out(self.two(x).mean((2, 3)))]}

    theirs = ready(Heads(None))
    net = models.slimmable(theirs, (3, 8, 8))
    assert net.num_widths == 0 and net.kept.keys() == {"one", "norm", "two", "out"}
    agrees(net, theirs, torch.randn(3, 3, 8, 8).double())


FOREIGN = nn.Conv2d(8, 8, 1)


def late(m, device):
    m.late = nn.Conv2d(8, 8, 1, device=device)
    return m.late


@pytest.mark.parametrize("forward, more, what", [
    (lambda m, x: m.end(m.two(m.wide(torch.cat([m.one(x), m.other(x)], 1)))),
     {"other": lambda m: models.Conv2d(m.image, models.WidthGroup(8), 3),
      "wide": lambda m: models.Conv2d(models.WidthGroup(16), m.a, 3)}, "net.wide: reads"),  # a concatenation as one group
    (lambda m, x: m.end(torch.cat([m.two(m.one(x)), m.two(m.one(x))], 1)[:, :12]), {}, "net.norm: |after net.two"),
    (lambda m, x: m.end(m.two(m.one(x) + m.other(x))),
     {"other": lambda m: models.Conv2d(m.image, models.WidthGroup(8), 3)}, "after net.other|net.two: reads"),  # added
    (lambda m, x: m.out(m.two(m.one(x)).flatten(1)), {}, "net.out: reads"),  # pooling forgotten
    (lambda m, x: m.out(m.two(m.one(x)).mean((2, 3))), {}, "net.norm: called 0 times"),
    (lambda m, x: m.end(F.relu(m.norm(m.two(m.one(x))))), {}, "net.norm: called 2 times"),
    (lambda m, x: m.end(F.linear(m.two(m.one(x)).flatten(2), m.pixels).unflatten(2, (6, 6))),
     {"pixels": lambda m: nn.Parameter(torch.ones(36, 36))}, "FLOPs"),  # of as many products as there are channels
    (lambda m, x: m.end(F.group_norm(m.two(m.one(x)), 4)), {}, "after net.two"),  # of 12 channels, but not of 7
    (None, {"deep": lambda m: models.Conv2d(m.a, m.b, 3, depthwise=True)}, "depthwise"),
    (None, {"deep": lambda m: models.Conv2d(m.both, m.both, 3, groups=4)}, "by whole parts"),  # one has channels of both
    (lambda m, x: m.end(m.join(torch.cat([m.other(x), m.one(x)], 1)[:, :, ::2, ::2])),
     {"other": lambda m: models.Conv2d(m.image, m.fix(4), 3),
      "join": lambda m: models.Conv2d(models.Concatenation(m.a, m.fix(4)), m.b, 3)}, "net.join: reads something else"),
    (lambda m, x: m.end(m.join(torch.cat([m.two(m.one(x)), m.one(x)[:, :, ::2, ::2]], 1))),
     {"join": lambda m: models.Conv2d(models.Concatenation(m.a, m.b), m.b, 3)}, "net.join: reads something else"),
    # As they are: networks of `Small`.
    (lambda m, x: m.norm(x), None, "norm: called 2 times"),
    (lambda m, x: x.view(-1, 8, 4, 16), None, "after norm"),  # a number of channels, written into the network
    (lambda m, x: x if x.sum() > 0 else -x, None, "after norm"),
    (lambda m, x: x[:, :, :0], None, "after two"),
    (lambda m, x: x if m.one.out_channels != m.two.out_channels else -x, None, "other operations"),  # of 8 and 6, at full width
    (lambda m, x: x if m.two(x).shape != x.shape else x + m.two(x), None, "other operations"),
    (lambda m, x: FOREIGN(x), None, "a weight that is no copy"), (lambda m, x: late(m, "cpu")(x), None, "a weight that is no"),
    (lambda m, x: late(m, x.device)(x), None, "makes weights as it runs"),
])  # fmt: skip
def test_networks_that_cannot_be_slimmed_are_refused_by_name(forward, more, what):
    if more is None:
        refuses(what, models.slimmable, Small(forward), (3, 8, 8))
    else:
        refuses(what, own, forward, **more)


class Frozen(Small):
    def train(self, mode=True):
        super().train(mode).norm.eval()
        return self


def test_what_is_the_networks_own_stays():
    """A way of going into training; products with a vector, which FlopCounterMode leaves out; a buffer's name."""
    theirs, x = Frozen(lambda m, x: x), torch.randn(4, 3, 8, 8)
    net = models.slimmable(theirs, (3, 8, 8)).train()
    assert net.training and not net.norm.training and net.two.training
    assert torch.equal(net(x), theirs.train()(x)) and torch.equal(net(x), net.extract().train()(x))
    by = [models.slimmable(Small(lambda m, x: x * (x.flatten(2).mT @ m.q).view(-1, 1, 8, 8), q=parameter(*shape)), (3, 8, 8))
          for shape in ((8,), (8, 1))]  # fmt: skip
    assert by[0].flops(1.0) == by[1].flops(1.0)
    theirs.register_buffer("_step", torch.zeros(1))
    refuses("_step: ", models.slimmable, theirs, (3, 8, 8))


def test_an_instance_norms_statistics_are_calibrated_as_batchnorms_are():
    """By the definition: means, over images, of each image's own. Training leaves them alone."""
    layers = nn.Conv2d(3, 6, 1), nn.InstanceNorm2d(6, track_running_stats=True), nn.Conv2d(6, 4, 1)
    net, x = models.slimmable(nn.Sequential(*layers), (3, 8, 8)), torch.randn(5, 3, 8, 8)
    net.train()(x)
    assert models.get_statistics(net).tolist() == 6 * [0.0] + 6 * [1.0]
    joslim.calibrate_bn(net, [x])
    maps = layers[0](x).detach()
    expected = torch.cat([maps.mean((2, 3)).mean(0), maps.var((2, 3)).mean(0)])
    torch.testing.assert_close(models.get_statistics(net), expected)


def test_extracted_batchnorm_goes_on_by_its_own_momentum():
    """Running statistics after one batch, by the definition."""
    own = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=0.3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    net, x = models.slimmable(own, (3, 8, 8)), torch.randn(16, 3, 8, 8)
    net.set_widths(0.5)
    conv, norm, *_ = small = net.extract().train()
    small(x)
    assert norm.num_features == 4
    torch.testing.assert_close(norm.running_mean, 0.3 * conv(x).mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, 0.7 + 0.3 * conv(x).var((0, 2, 3)))
    wired = models.build("resnet8", 5, 16).extract()
    assert {m.momentum for m in wired.modules() if isinstance(m, nn.BatchNorm2d)} == {nn.BatchNorm2d(1).momentum}


@pytest.mark.parametrize("arch, size", [("resnet8", 16), ("resnet18", 32), ("mbv2", 32)])
def test_extracted_networks_trace_script_and_export(arch, size):
    net = models.build(arch, 5, size)
    plain, x = net.extract(widths_for(net, 0, LOWER)).eval(), torch.randn(3, 3, size, size)
    with torch.no_grad():
        expected, batch = plain(x), torch.export.Dim("batch", min=1)
        exported = torch.export.export(plain, (x,), dynamic_shapes=({0: batch},)).module()
        for other in (torch.fx.symbolic_trace(plain), torch.jit.script(plain), exported):
            torch.testing.assert_close(other(x), expected)
        torch.testing.assert_close(exported(x[:1]), expected[:1])


# ------------------------------------------------------------------------------ costs C(a), exact and relaxed
# Compared with hooks and live storages of the plain networks' own forward passes, with the published figures, and
# (the gradients) with finite differences.


@pytest.mark.parametrize("arch", EACH_KIND)
def test_costs_are_the_plain_networks(arch):
    size = 16 if arch in CIFAR_FORM else 64
    net = models.build(arch, 7, size)
    for a in (torch.ones(net.num_widths), widths_for(net, 3), widths_for(net, 4, 0.4)):
        costs_are(net, a, net.extract(a), torch.randn(1, 3, size, size))


@pytest.mark.parametrize("arch", IMAGENET_FORM)
def test_costs_are_those_that_torchvision_publishes(arch):
    weights, *_ = torchvision.models.get_model_weights(torchvisions(arch))
    net = models.build(arch, 1000, 224)
    assert net.params(1.0).item() == weights.meta["num_params"]
    assert round(net.flops(1.0).item() / 1e9, 3) == weights.meta["_ops"]


def test_cifar_forms_have_the_published_sizes():
    """He et al. 2016, table 6."""
    millions = {arch: round(models.build(arch, 10, 32).params(1.0).item() / 1e6, 2) for arch in CIFAR_FORM[1:]}
    assert millions == {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85}


@pytest.mark.parametrize("arch", ["resnet20", "resnet50", "mbv2"])
@pytest.mark.parametrize("cost", ["flops", "params", "memory", "latency"])
def test_relaxed_costs(arch, cost):
    net = models.build(arch, 10, 64)
    f = getattr(net, cost)
    a = torch.stack([widths_for(net, s, LOWER) for s in range(5)]).requires_grad_()
    if cost == "latency":
        net.fit_latency(a.detach(), 1 + torch.rand(5).double())
    value = f(a, relaxed=True)
    (grad,) = torch.autograd.grad(value.sum(), a)
    with torch.no_grad():
        expected = slopes(functools.partial(f, relaxed=True), a, 1e-6)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4 * value.max().item())
    whole = net.channels(a.detach()) / torch.tensor([g.max for g in net.groups])
    torch.testing.assert_close(f(whole, relaxed=True), f(a.detach()))  # at whole channel counts the two agree
    assert f(torch.rand(2, 3, net.num_widths) * 0.5 + 0.5).shape == (2, 3)


@pytest.mark.parametrize("arch", ["resnet8", "resnet50", "mbv2"])
def test_costs_grow_with_every_width(arch):
    net = models.build(arch, 10, 64)
    a = torch.stack([widths_for(net, s) for s in range(20)])
    b = a + (1 - a) * torch.stack([widths_for(net, 100 + s, 0.0) for s in range(20)])
    net.fit_latency(a, 1 + torch.rand(20).double())
    for cost, relaxed in itertools.product((net.flops, net.params, net.memory, net.latency), (False, True)):
        assert (cost(a, relaxed) <= cost(b, relaxed)).all() and (cost(b, relaxed) <= cost(1.0)).all()


# ------------------------------------------------------------------------------ history re-evaluated
# Compared with the plain network of each configuration, one by one.


def test_evaluation_is_the_plain_networks_and_leaves_no_trace():
    net = models.build("mbv2", 6, 32).eval()
    x, y = torch.randn(8, 3, 32, 32), torch.randint(6, (8,))
    before = copy.deepcopy(net.state_dict())
    widths = torch.stack([widths_for(net, s, LOWER) for s in range(3)])
    losses = joslim.evaluate(net, widths, x, y)
    torch.testing.assert_close(dict(net.state_dict()), dict(before), rtol=0, atol=0)
    assert not net.training
    expected = torch.stack([F.cross_entropy(net.extract(a).train()(x), y) for a in widths])
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-4, atol=1e-5)
    assert joslim.evaluate(net, widths[:0], x, y).shape == (0,)
    halves, x = net.bfloat16(), x.bfloat16()  # of which losses must be told apart by less than such numbers can
    losses = joslim.evaluate(halves, widths, x, y)  # at the last of which it stays
    torch.testing.assert_close(losses[-1].double(), F.cross_entropy(halves.train()(x).double(), y), rtol=1e-5, atol=1e-5)
    # Dropout, of a network of one's own, is noise to both: it stays off, and losses and statistics are those without it.
    dropping = own(lambda m, x: m.end(m.two(m.drop(F.relu(m.one(x))))), drop=lambda m: nn.Dropout2d(0.5))
    without, x, y = own(), torch.randn(8, 1, 12, 12), torch.randint(3, (8,))
    without.load_state_dict(dropping.state_dict())
    losses = [joslim.evaluate(n, torch.ones(1, 2), x, y) for n in (dropping, without)]
    for n in (dropping, without):
        joslim.calibrate_bn(n, [x])
    torch.testing.assert_close([losses[0], dict(dropping.state_dict())], [losses[1], dict(without.state_dict())])
    assert all(m.training for m in dropping.modules())


# ------------------------------------------------------------------------------ GP
# Compared with dense algebra (explicit inverses, torch's own densities), finite differences, and known truths.


def matern(u, v, hyper):
    r = 5**0.5 * ((u[:, None] - v[None]) / hyper[:-1].exp()).pow(2).sum(-1).sqrt()
    return (1 + r + r**2 / 3) * torch.exp(-r)


def dense_fit(x, z, hyper):
    """Correlations of the observations, their inverse, and the mean and the output scale that are best for them."""
    k = matern(x, x, hyper) + (hyper[-1].exp() + 1e-8) * torch.eye(len(x), dtype=x.dtype)
    inverse, one = torch.linalg.inv(k), torch.ones_like(z)
    m = one @ inverse @ z / (one @ inverse @ one)
    return k, inverse, m, ((z - m) @ inverse @ (z - m) + 2) / (len(z) + 2)


def test_gp_posterior_is_the_textbooks():
    """Rasmussen & Williams, 2.25 and 2.26."""
    x, new = torch.rand(30, 3).double(), torch.rand(11, 3).double()
    y = 5 + (3 * x).sin().sum(1) + 0.1 * torch.randn(30).double()
    z = (y - y.mean()) / y.std(correction=0)
    for model in (gp.GP(x, y).fit(), gp.GP(x, y, torch.tensor([0.2, -0.5, 1.0, -3.0], dtype=torch.float64))):
        _, inverse, m, s2 = dense_fit(x, z, model.hyper)
        k = matern(new, x, model.hyper)
        mean, variance = model.posterior(new)
        expected = (m + k @ inverse @ (z - m)) * y.std(correction=0) + y.mean()
        torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-6)
        expected = s2 * (1 - (k @ inverse * k).sum(1)) * y.var(correction=0)
        torch.testing.assert_close(variance, expected, rtol=1e-5, atol=1e-8)
    assert model.posterior(new.reshape(11, 1, 3))[0].shape == (11, 1)
    for scale in (1e-6, 1.0, 1e6):
        mean, _ = gp.GP(x, scale * x.sum(1)).fit().posterior(x)
        torch.testing.assert_close(mean / scale, x.sum(1), rtol=0.02, atol=0)


def test_gp_posterior_gradient():
    x = torch.rand(20, 2).double()
    model = gp.GP(x, x.sin().sum(1)).fit()
    new = torch.cat([torch.rand(4, 2).double(), x[:1]]).requires_grad_()  # one on top of a datum
    assert torch.autograd.gradcheck(lambda t: model.posterior(t)[0], new[:4])
    (grad,) = torch.autograd.grad(sum(p.sum() for p in model.posterior(new)), new)
    assert grad.isfinite().all()


def test_gp_objective_gradient():
    """The hand-written gradient against finite differences, and the value against torch's own densities."""
    x, y = torch.rand(25, 3).double(), torch.randn(25).double()
    model = gp.GP(x, y)
    value = lambda h: model._objective(h, model.x, model.z)[0]  # noqa: E731
    hyper = torch.tensor([0.3, -0.4, 0.8, -2.0], dtype=torch.float64)
    _, grad = model._objective(hyper, model.x, model.z)
    torch.testing.assert_close(grad, slopes(value, hyper, 1e-5), rtol=1e-5, atol=1e-6)

    def reference(h):
        k, _, m, s2 = dense_fit(x, model.z, h)
        normal = torch.distributions.MultivariateNormal(m.expand(25), s2 * k)
        # The scale's inverse-gamma prior (a = 0, b = 1, times constants) and the priors on the rest.
        lengths = torch.distributions.LogNormal(2**0.5 + torch.tensor(3.0).double().log() / 2, 3**0.5)
        noise = torch.distributions.Normal(-6.0, 3.0)
        priors = lengths.log_prob(h[:-1].exp()).sum() + noise.log_prob(h[-1])
        return -normal.log_prob(model.z) + s2.log() + 1 / s2 - priors

    other = hyper + torch.tensor([0.5, 0.2, -0.3, 1.0], dtype=torch.float64)
    torch.testing.assert_close(value(hyper) - value(other), reference(hyper) - reference(other), rtol=1e-6, atol=1e-6)


def test_gp_fit_recovers_length_scales():
    """Samples of a GP of known length scales and noise: the fits' geometric mean is close to the truth."""
    truth, fits = torch.tensor([0.2, 0.5, 0.05**2]).double(), []
    for _ in range(6):
        x = torch.rand(200, 2).double()
        k = matern(x, x, truth.log()) + truth[2] * torch.eye(200).double()
        fits.append(gp.GP(x, torch.linalg.cholesky(k) @ torch.randn(200).double()).fit().hyper)
    found = torch.stack(fits).mean(0).exp()
    torch.testing.assert_close(found[:2], truth[:2], rtol=0.2, atol=0)
    assert 0.0015 < found[2] < 0.004


# ------------------------------------------------------------------------------ UCB, Chebyshev
# Compared with values worked out by hand, and with a brute-force front.


def test_ucb_is_optimistic():
    """Among equal means the less known configuration is preferred: its value is lower."""
    assert gp.ucb(torch.ones(2), torch.tensor([0.0, 4.0]), beta=0.25).tolist() == [1.0, 0.0]
    v = torch.tensor([0.0, 1.0], requires_grad=True)
    (grad,) = torch.autograd.grad(gp.ucb(3 * v, v, beta=0).sum(), v)
    assert grad.tolist() == [3.0, 3.0]  # the mean's alone


def dominated(i, loss, cost, by):
    return any(loss[j] <= loss[i] and cost[j] <= cost[i] and j != i for j in by)


def test_chebyshev_by_hand_and_brute_force():
    f, w, z = torch.tensor([3.0, 1.0]), torch.tensor([0.25, 0.75]), torch.tensor([1.0, -1.0])
    assert gp.chebyshev(f, w, z, rho=0.1).item() == pytest.approx(max(0.5, 1.5) + 0.1 * (0.5 + 1.5))
    # Every point of a non-convex front is the minimiser for some lambda; no dominated one is.
    angle, lam = torch.rand(40) * math.pi / 2, torch.linspace(0.0005, 0.9995, 2000)
    points = (1 + 0.3 * torch.rand(40, 1)) * torch.stack([angle.sin(), angle.cos()], -1)
    value = gp.chebyshev(points[:, None], torch.stack([lam, 1 - lam], -1), rho=1e-9)
    front = {i for i in range(40) if not dominated(i, *points.T, range(40))}
    assert set(value.argmin(0).tolist()) == front and 5 < len(front) < 40


# ------------------------------------------------------------------------------ acquisition optimised over the box
# Compared with minima known beforehand.


def test_optimizer_finds_minima_in_a_box():
    centre = torch.tensor([[0.3, 0.9, 2.0], [-1.0, 0.5, 0.6]], dtype=torch.float64)  # outside in places
    x, value = gp.optimize_acquisition(lambda x: (x - centre).square().sum(-1), 0.0, 1.0, 3, 2, steps=60)
    torch.testing.assert_close(x, centre.clamp(0, 1), atol=0.02, rtol=0)
    torch.testing.assert_close(value, (x - centre).square().sum(-1))
    start = torch.full((1, 3), 0.5).double()
    spike = lambda x: x.sum(-1) - 10 * (x - start).norm(dim=-1).lt(1e-9).double()  # noqa: E731
    assert gp.optimize_acquisition(spike, 0.0, 1.0, 3, starts=start)[1].item() == -8.5  # the best seen, though it is left


# ------------------------------------------------------------------------------ target costs, proposals, history
# Compared with costs known in closed form, finite differences, uniform and random widths on a loss that is known,
# and (averaging) with what theory says of a noise.


def mean_width(a, relaxed=False):
    """A cost whose surfaces are planes."""
    return a.mean(-1)


def flops_ratio(net):
    full = net.flops(1.0).item()
    return lambda a, relaxed=False: net.flops(a, relaxed) / full


def history(net, n, seed):
    """A sampler with n configurations of a known loss, a third of them uniform."""
    sampler = joslim.Joslim(net.num_widths, flops_ratio(net), seed=seed)
    g = torch.Generator().manual_seed(seed)
    a = LOWER + (1 - LOWER) * torch.rand(n, net.num_widths, generator=g, dtype=torch.float64)
    a[: n // 3] = a[: n // 3, :1]
    sampler.widths = a
    sampler.losses = 1 + (a**-1.5 - 1).mean(1) + 0.01 * torch.randn(n, generator=g, dtype=torch.float64)
    return sampler


@pytest.mark.parametrize("arch", ["resnet8", "resnet20", "mbv2"])
def test_targets_are_met(arch):
    """Targets are costs of uniform networks, one from each m-th part of their widths, and proposals have them."""
    net = models.build(arch, 10, 32)
    off = []
    for seed in range(5):
        sampler, drawn = history(net, 40, seed), []
        project = sampler.project_to_cost
        sampler.project_to_cost = lambda a, t: (drawn.append(t), project(a, t))[1]  # noqa: B023
        off.append(sampler.cost(sampler.sample(20)) - drawn[-1])
        edges = sampler.cost(torch.linspace(LOWER, 1, 21).double()[:, None].expand(-1, net.num_widths))
        target = drawn[-1].sort().values
        assert (target >= edges[:-1]).all() and (target <= edges[1:]).all() and (target != drawn[-1]).any()
    assert (torch.cat(off).abs() <= 0.02).double().mean() >= 0.95
    ends = edges[[0, -1]]
    reached = sampler.project_to_cost(torch.rand(2, net.num_widths).double().clamp(LOWER), ends)
    torch.testing.assert_close(sampler.cost(reached), ends, atol=0.01, rtol=0)


@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("wrap", [
    lambda cost: lambda a, relaxed=False: cost(a).detach(),  # rounded, without a gradient
    lambda cost: lambda a, relaxed=False: cost(torch.from_numpy(a.numpy())).numpy(),  # numpy's
    lambda cost: lambda a, relaxed=False: (cost(a) * 50).ceil() / 50,  # a lookup table of steps, whose gradient is 0
])  # fmt: skip
def test_costs_without_a_gradient(wrap, targeted):
    """Proposals meet their targets as well as steps allow, and are better than random widths, whatever kind of cost it is."""
    net = models.build("resnet8", 10, 16)
    sampler, exact = history(net, 40, 0), flops_ratio(net)
    fresh = joslim.Joslim(net.num_widths, wrap(exact), targeted=targeted)
    fresh.widths, fresh.losses = sampler.widths, sampler.losses
    new = fresh.sample(10)
    loss = lambda a: (a**-1.5).mean(1)  # noqa: E731
    random = fresh.project_to_cost(joslim.RandomWidths(net.num_widths).sample(10), torch.as_tensor(exact(new)))
    assert loss(new).mean() < loss(random).mean() - 0.03 and len(new.unique(dim=0)) > 1
    if targeted:
        assert (exact(new).sort().values.diff() >= 0).all() and exact(new).max() - exact(new).min() > 0.5


def test_a_cost_with_steps_is_met_by_the_widest_of_a_step():
    """What costs no more is no worse: to widen it by anything costs the next step."""
    tiles = lambda a, relaxed=False: (4 * a.detach().mean(-1) - 1e-9).ceil() / 4  # noqa: E731
    sampler = joslim.Joslim(3, tiles, lower=0.1)
    for target in (0.25, 0.5, 0.75):
        new = sampler.project_to_cost(0.1 + 0.9 * torch.rand(50, 1, 3).double(), torch.tensor([target]).double())
        assert (tiles(new) == target).all() and (tiles((new + 1e-6).clamp(max=1)) > target).all()


def test_a_callers_graph_and_mode_leave_no_trace():
    with torch.no_grad():
        sampler = joslim.Joslim(3, mean_width, num_prior=2)
    assert sampler.smooth
    sampler.sample(2)
    sampler.observe(torch.ones(3, requires_grad=True) * 2)
    assert not sampler.losses.requires_grad


def test_projection_gradient():
    sampler = history(models.build("resnet20", 10, 32), 5, 0)
    a, target, weight = sampler.widths[:, None] * 0.9 + 0.05, torch.tensor([0.5]).double(), torch.rand(12).double()
    f = lambda a: (sampler.project_to_cost(a, target) * weight).sum()  # noqa: E731
    (grad,) = torch.autograd.grad(f(a.requires_grad_()), a)
    with torch.no_grad():
        torch.testing.assert_close(grad.sum((0, 1)), slopes(f, a, 1e-4), atol=2e-2, rtol=2e-2)

    # Where the cost is the mean width, both have closed forms: a - mean(a) + target, weight - mean(weight).
    linear = joslim.Joslim(12, mean_width, lower=0.1)
    a = (0.4 + 0.2 * torch.rand(3, 1, 12).double()).requires_grad_()
    out = linear.project_to_cost(a, target)
    torch.testing.assert_close(out, a - a.mean(-1, keepdim=True) + 0.5)
    (grad,) = torch.autograd.grad((out * weight).sum(), a)
    torch.testing.assert_close(grad, (weight - weight.mean()).expand(3, 1, 12))


@pytest.mark.parametrize("targeted", [True, False])
def test_proposals_beat_random(targeted):
    """On a known loss, the front found has a smaller area than that of random and of uniform widths."""
    net = models.build("resnet20", 10, 32)
    cost, importance = flops_ratio(net), torch.linspace(0, 1, net.num_widths).double() ** 3
    loss = lambda a: (importance * a**-1.5).sum(-1)  # noqa: E731
    sampler = joslim.Joslim(net.num_widths, cost, seed=1, targeted=targeted)
    while len(sampler.widths) < 60:
        sampler.observe(loss(sampler.widths))
        sampler.sample(2)
    n = len(sampler.widths)
    others = [s(net.num_widths, seed=2).sample(n) for s in (joslim.RandomWidths, joslim.UniformWidths)]
    ends = torch.tensor([[LOWER], [1.0]]).double().expand(2, net.num_widths)
    area = [joslim.front_area(loss(a), cost(a), 0.2) for a in (torch.cat([w, ends]) for w in (sampler.widths, *others))]
    assert area[0] < min(area[1:])
    assert (sampler.widths >= LOWER).all() and (sampler.widths <= 1).all()
    assert len(sampler.widths.unique(dim=0)) == n or not targeted


def test_losses_count_by_their_ratios():
    """A GP on logarithms sees the same in 3 l^2 as in l; one on the losses themselves would not."""
    net = models.build("resnet8", 10, 32)
    one, two, raw = (history(net, 30, 0) for _ in range(3))
    two.losses, raw.losses = 3 * one.losses**2, one.losses.exp()
    new = one.sample(4)
    torch.testing.assert_close(two.sample(4), new, atol=1e-3, rtol=0)
    assert (raw.sample(4) - new).abs().max() > 0.02  # the test can fail


def test_uniform_and_random_widths():
    """Both fill [lower, 1] evenly; uniform ones are one width for the whole network, random ones one each."""
    uniform, random = (kind(3, lower=0.2).sample(4000, keep=2) for kind in (joslim.UniformWidths, joslim.RandomWidths))
    for a in (uniform, random):
        even = torch.linspace(0.2, 1, 4000).double()[:, None]
        assert a.shape == (4000, 3) and (a.sort(0).values - even).abs().max() < 0.02
    assert (uniform == uniform[:, :1]).all() and torch.corrcoef(random.T).fill_diagonal_(0).abs().max() < 0.06


def test_history_starts_uniform_then_full():
    """And what is kept joins it, no more."""
    sampler = joslim.Joslim(4, mean_width, num_prior=6)
    for m, keep in ((2, 2), (5, 2), (2, 2)):
        assert not sampler.ready
        new = sampler.sample(m, keep)
        assert new.shape == (m, 4) and (new == new[:, :1]).all()
    assert sampler.ready and len(sampler.widths) == 7 and (sampler.widths[-1] == 1).all()
    refuses("finite", sampler.sample, 2)
    sampler.observe(torch.tensor([1.0, 2, 3, torch.nan, torch.inf, 4, 0]))  # two cannot be used
    before, new = sampler.widths, sampler.sample(9, keep=2)
    assert new.shape == (9, 4) and torch.equal(sampler.widths, torch.cat([before, new[:2]]))
    assert sampler.losses[-2:].isnan().all()


def test_averaging_shrinks_noise_and_follows_a_shift():
    """Batches' noise, a factor, shrinks to the share that theory gives; what all losses do together passes at once."""
    n, keep = 400, 0.7
    sampler = joslim.Joslim(2, mean_width, num_prior=1, ema=keep)
    sampler.widths, sampler.losses = torch.rand(n, 2).double(), torch.full((n,), torch.nan).double()
    true = torch.rand(n)
    for t in range(30):
        sampler.observe((true - t / 10 + torch.randn(n)).exp())
    error = sampler.losses.log() - (true - t / 10)
    assert error.std().item() == pytest.approx(((1 - keep) / (1 + keep)) ** 0.5, rel=0.1)  # an AR(1)'s variance
    assert abs(error.mean()) < 0.2
    sampler.losses[:3] = torch.tensor([torch.nan, torch.inf, 5.0])
    fresh = torch.arange(3.0)
    sampler.observe(fresh, torch.arange(3))  # nothing to average with, and the only one: as they are
    assert torch.equal(sampler.losses[:3], fresh.double())
    sampler.observe(torch.tensor([torch.nan, 4.0]), torch.tensor([0, 1]))
    assert sampler.losses[0].isnan() and sampler.losses[1] == 4.0
    sampler.ema, sampler.losses[:4] = 0.0, torch.tensor([4.0, 5.0, 2.0, torch.nan])
    sampler.observe(torch.tensor([3.0, 1.5, 1.0]), torch.tensor([0, 3, 2]))  # no averaging: those named, as they are
    assert sampler.losses[:4].tolist() == [3.0, 5.0, 1.0, 1.5]


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
            two.losses = two.losses * (1 + 1e-14 * torch.randn(n))
        else:
            two.widths, two.losses = two.widths.flip(0), two.losses.flip(0)
        torch.testing.assert_close(one.sample(2), two.sample(2).cpu(), rtol=0, atol=1e-8)


def rand(*shape):
    return torch.rand(*shape, dtype=torch.float64)


HARD = {  # configurations in the unit box, and losses
    "alike": lambda: (rand(1000, 3), torch.ones(1000)), "nearly alike": lambda: (rand(9, 3), 1 + 1e-15 * rand(9)),
    "single": lambda: (rand(1, 4), torch.ones(1)), "one place": lambda: (rand(1, 4).repeat(9, 1), torch.ones(9)),
    "twice": lambda: (rand(12, 4).repeat(3, 1), torch.randn(36)), "corners": lambda: (rand(40, 3).round(), torch.randn(40)),
    "crowded": lambda: (0.5 + 1e-12 * rand(300, 3), torch.randn(300)), "huge": lambda: (rand(9, 3), 1e99 * rand(9)),
    "tiny": lambda: (rand(9, 3), 1e-200 * rand(9)), "spread": lambda: (rand(60, 3), torch.logspace(-8, 8, 60)),
    "an outlier": lambda: (rand(50, 3), torch.linspace(0, 1, 50).square().index_fill(0, torch.tensor(7), 1e9)),
    "one width": lambda: (rand(10, 1), torch.arange(10.0).sin()), "200 widths": lambda: (rand(25, 200), torch.randn(25)),
    "gradients": lambda: (rand(9, 3).requires_grad_(), torch.randn(9).requires_grad_()),
}  # fmt: skip


@pytest.mark.parametrize("case", [*HARD, *range(12)])
def test_any_history_gives_a_usable_posterior_and_proposals(case):
    """Hard ones; and random ones, in dimension, box, length and scale. Some losses are not finite."""
    torch.manual_seed(0 if case in HARD else case)
    d, n, m = (int(torch.randint(low, high, ())) for low, high in ((1, 30), (1, 80), (1, 6)))
    lower, scale = 0.05 + 0.9 * torch.rand(()).item(), 10 ** (12 * torch.rand(()).double() - 6)
    x, y = HARD[case]() if case in HARD else (torch.rand(n, d), torch.randn(n).double() * scale)
    (n, d), new = x.shape, torch.rand(5, x.shape[1])
    for hyper in (None, torch.full((d + 1,), 1e3), torch.full((d + 1,), -1e3)):
        mean, variance = gp.GP(x, y, hyper).fit().posterior(new)
        assert mean.isfinite().all() and variance.isfinite().all() and (variance > 0).all() and not mean.requires_grad
    weight = torch.rand(d).double() + 0.01
    cost = lambda a, relaxed=False: (a**2 @ weight) / weight.sum()  # noqa: E731
    for targeted in (True, False):
        sampler = joslim.Joslim(d, cost, lower, num_prior=1, targeted=targeted)
        sampler.widths, sampler.losses = lower + (1 - lower) * x.detach().double(), y.detach().double().abs()
        sampler.losses[1:][torch.rand(n - 1) < 0.2] = torch.nan
        new = sampler.sample(m)
        assert new.shape == (m, d) and (new >= lower).all() and (new <= 1).all() and len(sampler.losses) == n + m
        sampler.observe(torch.rand(n + m))
        assert sampler.sample(1).isfinite().all()


# ------------------------------------------------------------------------------ a round every tau steps: the loop
# Compared with the loop as joslim.py opens with it, closed forms, an update worked out by hand, one process's gradient.


@pytest.mark.parametrize("flags", [
    "joslim --amp", "joslim --fresh-widths", "slim --accumulate 2 --label-smoothing 0.1 --cost params",
    "twostage --no-distillation --cost memory --warmup-epochs 3",
])  # fmt: skip
def test_training_is_the_loop_that_joslim_opens_with(flags, tiny, tmp_path):
    flags = [*tiny, "--tau", "2", "--warmup-epochs", "1", "--weight-decay", "0.02", "--method", *flags.split()]
    assert train.main([*flags, "--out", str(tmp_path)]) == 0
    args = train.parse_args(flags)
    data, k, amp = small_data(*flags), args.accumulate, bool(args.amp)
    torch.manual_seed(0)
    net = models.build("resnet8", 10, 8, 1).to(memory_format=torch.channels_last)
    sampler = {"joslim": joslim.Joslim(6, flops_ratio(net), num_prior=3, ema=0.7),
               "slim": joslim.UniformWidths(6), "twostage": joslim.RandomWidths(6)}[args.method]  # fmt: skip
    warm = min(2 * args.warmup_epochs, 4)  # steps: half of them at most
    groups = [{"params": [p], "weight_decay": 0.02 if p.ndim > 1 else 0} for p in net.parameters()]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    for step, (x, y) in enumerate(batch for epoch in range(4) for batch in data.train(epoch, 0)):
        if step % 2 == 0 or args.method != "joslim":
            if sampler.ready:
                sampler.observe(joslim.evaluate(net, sampler.widths, *data.held_out(step // 2), amp))
            widths = sampler.sample(4 if args.fresh_widths else 2, keep=2)
        optimizer.zero_grad()
        for part in zip(x.chunk(k), y.chunk(k)):
            joslim.sandwich_step(net, *part, widths[-2:] if step % 2 else widths[:2], scale=1 / k, amp=amp,
                                 label_smoothing=args.label_smoothing, distill=args.distillation)  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * 32 / 256 * min((step + 1) / warm, (8 - step) / (8 - warm))
        optimizer.step()
    state, theirs = read_state(tmp_path), sampler.state_dict()
    assert state["step"] == step + 1 == 8 and len(theirs.get("widths", range(9))) == 9  # two a round, and the full network
    torch.testing.assert_close(state["model"], dict(net.state_dict()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["sampler"], theirs, rtol=1e-4, atol=1e-4, equal_nan=True)

    # And what it leaves: the front by the cost asked for, its log.
    rows = read_front(tmp_path)
    costs, uniform = [int(row[args.cost]) for row in rows], [len(set(row["widths"].split())) == 1 for row in rows]
    assert costs == sorted(costs) and 2 <= len(rows) <= 6 and (all(uniform) if args.method == "slim" else uniform[-1])
    assert read_log(tmp_path, "front")[0]["candidates"] > 2 * len(rows)  # slim's, too, are more than are tested
    (settings,), (done,), steps = (read_log(tmp_path, event) for event in ("settings", "done", "train"))
    assert (settings["method"], settings["cost"]) == (args.method, args.cost) and 0 <= done["search_share"] < 1
    assert len(steps) == 8 and all(len(e["losses"]) == 4 for e in steps)


def two_processes(rank, port, out):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    world = train.World().meet("cpu")
    calls, all_reduce = [], torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda t, *a, **k: (calls.append(t.numel()), all_reduce(t, *a, **k))[1]
    net, x, y, widths = joined_batch()
    joslim.sandwich_step(net, x[rank::2], y[rank::2], widths)
    world.average_gradients(net)
    torch.save({"gradient": gradient(net), "calls": calls}, f"{out}/{rank}.pt")

    squares = world.map(lambda a: torch.cat([a, a**2], 1), torch.arange(5.0)[:, None], 2)
    assert squares.tolist() == [[i, i**2] for i in range(5)]
    state = world.from_first(net.state_dict() if rank == 0 else None)
    torch.testing.assert_close(state, net.state_dict(), rtol=0, atol=0)

    sampler, firsts = history(net, 30, rank), history(net, 30, 0)  # they differ; process 0's counts
    assert torch.equal(world.propose(sampler, 3, keep=1), firsts.sample(3, keep=1))
    torch.testing.assert_close(sampler.state_dict(), firsts.state_dict(), rtol=0, atol=0, equal_nan=True)
    world.leave()
    assert not torch.distributed.is_initialized()


def test_two_processes_make_one_gradient(tmp_path):
    port = str(20000 + os.getpid() % 20000)
    processes = [forkserver.Process(target=two_processes, args=(rank, port, str(tmp_path))) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    one, two = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    net, x, y, widths = joined_batch()
    joslim.sandwich_step(net, x, y, widths)
    torch.testing.assert_close(one["gradient"], gradient(net), rtol=1e-6, atol=1e-10)
    assert torch.equal(one["gradient"], two["gradient"])
    assert one["calls"] == two["calls"] == [gradient(net).numel()]  # one, of one gradient's size


def test_what_processes_share_out_is_not_rounded(monkeypatch):
    """As a mean over three of them, times three, would be: each sends its rows among zeros, and a sum leaves them."""
    monkeypatch.setattr(train.dist, "all_reduce", lambda t: None)
    values, world = torch.rand(100, dtype=torch.float64), train.World().meet("cpu")
    for world.size, world.rank in ((3, 0), (3, 1), (3, 2), (200, 150)):
        mine = torch.arange(100) % world.size == world.rank
        assert torch.equal(world.map(lambda some: some, values), values.where(mine, torch.zeros_like(values)))


class NoValues(TorchDispatchMode):
    """Work on `meta` tensors, which have no values: on a GPU, whatever asks for one would wait. Here it raises, and so does
    what mixes them with the CPU's tensors, but for copies to the device and numbers."""

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        there = {t.device.type for t in tree_flatten((args, kwargs or {}))[0] if isinstance(t, torch.Tensor) and t.ndim}
        if len(there) > 1 and fn is not torch.ops.aten.copy_.default:
            raise RuntimeError(f"{fn} of tensors on {', '.join(sorted(there))}")
        return fn(*args, **(kwargs or {}))


@pytest.mark.parametrize("arch", ["resnet8", "mbv2"])
def test_training_and_tests_ask_for_no_value(arch, tiny, tmp_path, monkeypatch):
    flags = [*tiny, "--arch", arch, "--epochs", "1", "--accumulate", "2", "--flip", "--subnets", "1", "--num-prior", "1"]
    args = train.parse_args([*flags, "--out", str(tmp_path)])
    world, losses, reduced = train.World(), [], []
    world.device = torch.device("meta")
    run = train.Run(args, world, None, [])
    world.size, run.data.steps = 2, 1  # of two processes: the all-reduce is part of a step
    run.sampler.sample(args.num_prior)
    run.sampler.losses = torch.arange(len(run.sampler.widths)).double()
    # Where a round waits for its losses, and processes for each other.
    monkeypatch.setattr(run, "observe", losses.append)
    monkeypatch.setattr(train.dist, "all_reduce", lambda t: reduced.append(t.numel()))
    monkeypatch.setattr(world, "propose", lambda sampler, m, keep: sampler.sample(m, keep))
    monkeypatch.setattr(world, "map", lambda fn, items, *shape: fn(items))
    monkeypatch.setattr(run, "require_finite", lambda: None)
    monkeypatch.setattr(run, "after_step", lambda epoch, widths, step_losses: losses.append(step_losses))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none for meta
    with NoValues():
        train.train(run)
        columns = train.test_front(run, torch.rand(2, run.net.num_widths, dtype=torch.float64) / 2 + 0.5)
    assert run.step == 1 and len(losses) == 2 and len(reduced) == 1 and all(t.is_meta for t in losses)
    assert columns["top1"].is_meta and columns["statistics"].shape == (2, len(models.get_statistics(run.net)))
    for wait in (lambda: losses[0].sum().item(), lambda: losses[0].cpu(), lambda: losses[0] + torch.ones(len(losses[0]))):
        with NoValues(), pytest.raises(RuntimeError):
            wait()


class Lone(int):
    """1, but to whom it asks whether there are others, more: every message is sent, to the sender."""

    def __eq__(self, other):
        return False

    def __gt__(self, other):
        return True


@on_a_gpu
@pytest.mark.parametrize("data, more", [
    ("tiny", ["--no-amp"]), ("tiny", ["--accumulate", "2", "--flip", "--augment", "shift"]), ("photos", ["--workers", "2"]),
])  # fmt: skip
def test_no_step_waits_for_the_gpu(data, more, request, tmp_path, monkeypatch):
    """Of a process in NCCL's group of one; torch raises where the CPU would wait. Then there is a front as of other runs."""
    rate = train.learning_rate

    def meet(world, device):
        world.device, world.size = torch.device("cuda", 0), Lone(1)
        train.dist.init_process_group("nccl", store=train.dist.HashStore(), rank=0, world_size=1)
        return world

    def watched(step, steps, args):  # from the epoch's first step to its last; a round and a checkpoint may wait
        torch.cuda.set_sync_debug_mode("error" if step < steps - 1 else "default")
        return rate(step, steps, args)

    monkeypatch.setattr(train.World, "meet", meet)
    monkeypatch.setattr(train, "learning_rate", watched)
    flags = [*request.getfixturevalue(data), "--batch-size", "8", "--epochs", "1", "--log-seconds", "1000"]
    try:
        assert train.main([*flags, *more, "--tau", "100", "--out", str(tmp_path / "watched")]) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    monkeypatch.setattr(train, "learning_rate", rate)
    assert train.main([*flags, *more, "--num-prior", "1", "--tau", "2", "--out", str(tmp_path / "rounds")]) == 0
    assert all(math.isfinite(float(row["loss"])) for row in read_front(tmp_path / "rounds"))


# ------------------------------------------------------------------------------ sandwich rule, in-place distillation
# Compared with one plain network per pass, gradients added by hand; its memory with a plain step's.


@pytest.mark.parametrize("distill", [True, False])
def test_sandwich_gradient_is_the_sum(distill):
    net, x, y, widths = joined_batch()
    before = copy.deepcopy(dict(net.named_buffers()))
    losses = joslim.sandwich_step(net.train(), x, y, widths, LOWER, label_smoothing=0.1, distill=distill)
    torch.testing.assert_close(dict(net.named_buffers()), before, rtol=0, atol=0)  # running statistics are left alone
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


def test_parts_of_a_batch_make_its_gradient():
    net, x, y, widths = joined_batch()
    losses = joslim.sandwich_step(net, x, y, widths)
    expected = gradient(net)
    net.zero_grad()
    parts = [joslim.sandwich_step(net, *part, widths, scale=0.25) for part in zip(x.chunk(4), y.chunk(4))]
    torch.testing.assert_close(gradient(net), expected, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(sum(parts) / 4, losses)


def test_amp_computes_in_bfloat16():
    net, x, y, widths = joined_batch()
    seen = []
    net.float().fc.register_forward_hook(lambda m, inputs, out: seen.append(out.dtype))
    for amp in (True, False):
        joslim.sandwich_step(net, x.float(), y, widths, amp=amp)
        joslim.evaluate(net, widths, x.float(), y, amp)
    assert seen == 6 * [torch.bfloat16] + 6 * [torch.float32]


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
    for p in (*net.parameters(), *plain.parameters()):
        p.grad = torch.zeros_like(p)
    ours = peak_bytes(lambda: joslim.sandwich_step(net, x, y, [widths_for(net, s, LOWER) for s in range(2)]))
    theirs = peak_bytes(lambda: F.cross_entropy(plain(x), y).backward())
    assert 10 * x.numel() * 4 < theirs and ours <= 1.15 * theirs


@on_a_gpu
@pytest.mark.parametrize("amp", [False, True])
def test_a_replayed_step_is_the_step(amp):
    net, x, y, widths = joined_batch()
    net, other = (copy.deepcopy(net).float().train().to("cuda", memory_format=torch.channels_last) for _ in range(2))

    def gradients(net, x, y, widths):
        net.zero_grad()
        return joslim.sandwich_step(net, x, y, widths, amp=amp)

    replay, turns, graphs = joslim.Replay(lambda *a: gradients(net, *a)), [widths, widths.flip(0), widths[:1]], []
    tolerance = dict(rtol=0.05, atol=0.05) if amp else dict(rtol=1e-3, atol=1e-5)
    for i in range(21):  # seven steps of each; the weights change under way
        images, labels, some = torch.randn_like(x).float().cuda(), y.roll(i).cuda(), turns[i // 7].clone()
        losses = replay(images, labels, some)
        graphs.append(replay.graph is not None)
        torch.testing.assert_close(losses, gradients(other, images, labels, some), **tolerance)
        torch.testing.assert_close(gradient(net), gradient(other), **tolerance)
        with torch.no_grad():
            for p, q in zip(net.parameters(), other.parameters()):
                p -= 0.01 * q.grad
                q -= 0.01 * q.grad
    assert graphs == 3 * (3 * [False] + 4 * [True])


# ------------------------------------------------------------------------------ the non-dominated configurations
# Compared with loops over all pairs, a sum over 20,000 budgets, and plain networks tested by hand.


def test_pareto_front_and_area_by_brute_force():
    for n in (1, 2, 30, 200):
        loss, cost = torch.rand(n), (torch.rand(n) * 10).round() / 10  # ties in cost
        front = joslim.pareto_front(loss, cost).tolist()
        assert sorted(front) == [i for i in range(n) if not dominated(i, loss, cost, range(n))]
        assert cost[front].tolist() == sorted(cost[front].tolist())
        low = cost.min().item()
        grid = low + (1 - low) * (torch.arange(20000).double() + 0.5) / 20000
        best = torch.where(cost[None].double() <= grid[:, None] + 1e-9, loss[None].double(), torch.inf).amin(1)
        assert joslim.front_area(loss, cost) == pytest.approx(best.mean().item() * (1 - low), abs=2e-4)
        errors = (loss * 100).long()  # whole numbers, as counts of errors are
        assert joslim.pareto_front(errors, cost).tolist() == joslim.pareto_front(errors.double(), cost).tolist()
    assert joslim.front_area(torch.ones(2), torch.tensor([0.1, 1.0]), low=0.1) == pytest.approx(0.9)  # float32's 0.1
    tie = torch.ones(4)
    assert joslim.pareto_front(tie, tie).tolist() == [0]
    assert joslim.pareto_front(torch.tensor([torch.nan, 2.0, torch.inf]), torch.tensor([1.0, 2.0, 3.0])).tolist() == [1]


def test_shortlist_takes_whole_fronts():
    loss, cost = torch.rand(50), torch.rand(50)
    chosen = joslim.shortlist(loss, cost, 20).tolist()
    assert 20 <= len(set(chosen)) == len(chosen) < 50
    assert all(dominated(i, loss, cost, chosen) for i in set(range(50)) - set(chosen))
    assert sorted(joslim.shortlist(loss, cost, 99).tolist()) == list(range(50))
    loss[7] = torch.nan
    assert 7 in joslim.shortlist(loss, cost, 1).tolist()


def test_a_long_front_is_thinned_evenly():
    cost = torch.rand(100).double()
    front = cost.argsort()[:60]
    first, last = cost[front[0]].item(), cost[front[-1]].item()
    grid = [first * (last / first) ** (i / 6) for i in range(7)]
    nearest = [min(front.tolist(), key=lambda i: max(cost[i] / c, c / cost[i])) for c in grid]  # noqa: B023
    assert joslim.thin(front, cost, 7).tolist() == list(dict.fromkeys(nearest))
    assert torch.equal(joslim.thin(front, cost, 60), front)


def test_front_csv_is_the_plain_networks(tiny, tmp_path):
    """Which configurations, and every number: by plain networks, and torch's own averaging of statistics."""
    flags = [*tiny, "--front-size", "40", "--out", str(tmp_path)]
    assert train.main(flags) == 0
    state, rows = read_state(tmp_path), read_front(tmp_path)
    net = models.build(**state["network"])
    net.load_state_dict(state["model"])
    run = train.Run(train.parse_args([*flags, "--resume"]), train.World().meet("cpu"), None, [])
    data, run.args.front_size = run.data, 2
    ends = torch.tensor([[1.0], [LOWER]], dtype=torch.float64).expand(2, 6)
    assert torch.equal(train.find_front(run), ends.flip(0))

    # Chosen among the two that every step trains, the history, and as many again: the full one, and what no other beats.
    found, history = train.search(run).widths, state["sampler"]["widths"]
    assert torch.equal(found[: len(history)], history) and len(found) == 33 and len(history) == 17
    a = torch.cat([ends, found])
    ((x, y),) = data.batches("held-out")
    loss = [-math.inf, *(F.cross_entropy(net.extract(w).train()(x), y).item() for w in a[1:])]
    pairs = sorted({*zip(net.flops(a).tolist(), loss)})
    best = [c for i, (c, _) in enumerate(pairs) if not dominated(i, *zip(*pairs), range(len(pairs)))]
    assert len(rows) >= 3 and [int(row["flops"]) for row in rows] == best

    ((x, y),), images = data.batches("test"), [x for x, _ in data.batches("calibrate")]
    for row in rows:
        plain = net.extract(widths_of(row))
        assert int(row["params"]) == sum(p.numel() for p in plain.parameters())
        assert int(row["memory"]) == net.memory(widths_of(row)).item()
        for m in plain.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.reset_running_stats()
                m.momentum = None  # a cumulative average
        with torch.no_grad():
            for batch in images:
                plain.train()(batch)
            logits = plain.eval()(x)
        ranks = (logits > logits.gather(1, y[:, None])).sum(1)  # how many classes are held likelier than the right one
        expected = F.cross_entropy(logits, y).item(), 5.0 * (ranks < 1).sum().item(), 5.0 * (ranks < 5).sum().item()
        assert tuple(float(row[k]) for k in ("loss", "top1", "top5")) == pytest.approx(expected, rel=1e-3)
        hits = (ranks < 1).double()  # whose mean has this standard error
        assert float(row["top1_stderr"]) == pytest.approx(100 * hits.std(correction=0).item() / len(hits) ** 0.5)


def test_finished_weights_are_searched(tiny, refused, tmp_path, monkeypatch):
    """Another method's run, for another cost: its weights stay; each configuration is judged once, on the same images."""
    assert train.main([*tiny, "--method", "slim", "--out", str(tmp_path / "slim")]) == 0
    judged, evaluate = [], train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *args: judged.append((len(args[1]), args[2])) or evaluate(*args))
    flags = ["--search", str(tmp_path / "slim"), "--cost", "memory"]  # all else is as that run had it
    assert train.main([*flags, "--out", str(tmp_path / "searched")]) == 0
    # The two that every step trained; then twice as many as the run's 8 rounds propose, the full network with the second.
    assert [n for n, _ in judged] == [2, 2, 3, *[2] * 14] and all(torch.equal(x, judged[0][1]) for _, x in judged)
    assert len(judged[0][1]) == 16  # the whole held-out split
    one, two = read_state(tmp_path / "slim"), read_state(tmp_path / "searched")
    torch.testing.assert_close(one["model"], two["model"], rtol=0, atol=0)
    assert two["step"] == 8 and two["settings"]["method"] == "twostage"
    memory = [int(row["memory"]) for row in read_front(tmp_path / "searched")]
    assert memory == sorted(memory) and len(memory) > 1
    assert train.main(["--search", str(tmp_path / "searched"), "--cost", "params", "--out", str(tmp_path / "again")]) == 0
    assert read_state(tmp_path / "again")["settings"]["trained_as"] == "slim"
    assert train.main([*tiny, "--method", "twostage", "--out", str(tmp_path / "other")]) == 0
    for source, mine, cost in (("slim", "other", "flops"), ("other", "searched", "memory")):  # a training; another's search
        before, again = (tmp_path / mine / "front.csv").read_bytes(), ["--out", tmp_path / mine, "--resume"]
        refused("holds other weights than those", "--search", tmp_path / source, "--cost", cost, *again)
        assert (tmp_path / mine / "front.csv").read_bytes() == before
    for word, *more in (("has --seed 0", "--seed", "1"), ("not slim", "--method", "slim")):
        refused(word, *flags, *more, "--out", tmp_path / "x")  # or its held-out images were trained on


# ------------------------------------------------------------------------------ BatchNorm recalibrated
# Compared with means and variances of what reaches each norm of the plain network.


def test_calibration_is_the_statistics_by_hand():
    net = models.build("resnet8", 6, 16)
    net.set_widths(widths_for(net, 0, LOWER))
    batches = [torch.randn(5, 3, 16, 16) * s + s for s in (1, 2, 3)]
    joslim.calibrate_bn(net, batches)
    plain, inputs = net.extract().train(), {}
    for name, m in plain.named_modules():
        if isinstance(m, nn.BatchNorm2d):
            m.register_forward_hook(lambda m, i, o, name=name: inputs.setdefault(name, []).append(i[0].detach()))
    for x in batches:
        plain(x)
    for name, seen in inputs.items():
        m = net.get_submodule(name)
        mean, var = (torch.stack([f(i, (0, 2, 3)) for i in seen]).mean(0) for f in (torch.mean, torch.var))
        n = m.writes.active
        torch.testing.assert_close([m.running_mean[:n], m.running_var[:n]], [mean, var], rtol=1e-4, atol=1e-5)
        assert m.momentum == 0
    before, frozen = copy.deepcopy(net.state_dict()), net.layer1.eval()
    joslim.calibrate_bn(net, torch.utils.data.DataLoader([(x, 0) for x in torch.cat(batches)], 5))  # (x, y), as loaders give
    torch.testing.assert_close(dict(net.state_dict()), dict(before), rtol=0, atol=0)
    assert net.training and not any(m.training for m in frozen.modules())
    bad = torch.randn(5, 2, 16, 16), torch.randn(5, 3, 16, 16).double(), None, torch.randn(0, 3, 16, 16)
    for what in ([], *([batches[0], x] for x in bad)):  # in the middle: all is as if nothing had been
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            joslim.calibrate_bn(net, what)
        torch.testing.assert_close(dict(net.state_dict()), dict(before), rtol=0, atol=0)
        assert all(m.momentum == 0 for m in net.modules() if isinstance(m, nn.BatchNorm2d))


# ------------------------------------------------------------------------------ data
# Compared with the bytes that were written, every possible crop of them, and torchvision's own preset.


@pytest.mark.parametrize("n", [40, 300, 6617, 300000])
@pytest.mark.parametrize("flags", [[], ["--epochs", "50"], ["--subnets", "2", "--eval-images", "20"]])
def test_a_folder_s_recipe_gives_the_search_a_tenth(n, flags, monkeypatch):
    """By counting, round for round, the images that pass forward."""
    monkeypatch.setattr(train, "list_images", lambda args: ((range(n), None), (), [], False))
    args = train.parse_args(["--data", "folder", "--data-dir", "x", "--device", "cpu", *(flags if n > 250 else [])])
    steps, history, searched = (n - args.held_out) // args.batch_size * args.epochs, 0, 0
    for step in range(0, steps, args.tau):
        searched, history = searched + history * args.eval_images, history + args.subnets
    searched += 2 * history * args.held_out
    assert steps and searched / (3 * (args.subnets + 2) * args.batch_size * steps) == pytest.approx(0.1, rel=0.25)
    assert args.eval_images <= args.held_out <= n / 5 and 2 <= n / args.batch_size and args.arch == "resnet18"


def test_one_folder_of_class_folders(make_data, tmp_path, capsys):
    """A tenth of each class, at least one of two, is tested, always the same of a seed; front.pt names them."""
    root = Path(make_data("imagenet")[3]) / "train"
    (root / "rare").mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(noise(40, 50, 3).numpy()).save(root / "rare" / name)
    flags = [*QUICK, "--data", "folder", "--data-dir", str(root), "--arch", "resnet8", "--image-size", "8", "--method", "slim"]
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    about = models.read_tensors(tmp_path / "run" / "front.pt")["data"]
    tested = about["test_images"]
    assert Counter(name.split("/")[0] for name in tested) == {"cat": 4, "dog": 4, "rare": 1} and len({*tested}) == 9
    assert all((root / name).exists() for name in tested) and about["classes"] == ["cat", "dog", "rare"]
    data, other = small_data(*flags), small_data(*flags, "--seed", "1")
    assert data.about["test_images"] == tested != other.about["test_images"] and len(data.test_set) == 9
    assert len(data.training_set) + len(data.held_out_set) == 98 - 9
    assert train.main([*flags, "--out", str(tmp_path / "run"), "--resume"]) == 0
    more = ["--seed", "1", "--init", str(tmp_path / "run" / "front.pt"), "--out", str(tmp_path / "init")]  # trained on its tests
    assert train.main([*flags, *more]) == 2 and "held out other images, those of --seed 0" in capsys.readouterr().err
    shutil.rmtree(root / "rare")
    whole = ["--data", "folder", "--data-dir", str(root.parent)]  # train/ and val/
    assert "test_images" not in small_data(*whole, "--image-size", "8").about
    assert train.main(["--data", "folder", "--data-dir", str(root / "cat"), "--out", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize("kind", [*IDX_FILES, *CIFAR_FILES])
def test_arrays_are_read_as_written(kind, make_data):
    args = train.parse_args(make_data(kind))
    torch.manual_seed(0)  # what was drawn is drawn again
    n, shape, labels = (96, (1, 28, 28), IDX_FILES[kind][2]) if kind in IDX_FILES else (100, (3, 32, 32), 10)
    (x, y), (test_x, test_y), names = train.load_arrays(args, train.World().meet("cpu"))
    for read, written in ((x, noise(n, *shape)), (test_x, noise(20, *shape))):  # EMNIST's lie on their sides
        assert torch.equal(read, written.transpose(2, 3) if kind == "emnist" else written)
    assert y.tolist() == [i % labels for i in range(n)] and test_y.tolist() == [i % labels for i in range(20)]
    assert len(names) == (100 if kind == "cifar100" else labels)
    named = {"cifar10": "a9", "cifar100": "b9", "fashion-mnist": "Ankle boot", "emnist": "9", "kmnist": "wo"}
    assert names[9] == named[kind]


def test_batches_depend_on_seed_epoch_and_image_alone(make_data):
    for flags in (make_data("imagenet"), make_data("cifar10")):
        whole = list(small_data(*flags).train(1, 0))[:2]
        later = next(iter(small_data(*flags, "--workers", "2").train(1, 1)))  # resumed; other workers
        torch.testing.assert_close(list(later), list(whole[1]), rtol=0, atol=0)
        parts = [next(iter(small_data(*flags, rank=rank, size=2).train(1, 0)))[0] for rank in (0, 1)]
        assert torch.equal(torch.cat(parts), whole[0][0])  # nor on the number of processes
        assert not torch.equal(next(iter(small_data(*flags, "--seed", "1").train(1, 0)))[0], whole[0][0])
        images = small_data(*flags).training_set
        (first, _), (second, _) = (next(iter(images.load(torch.arange(8)[None], epoch))) for epoch in (0, 1))
        assert not any(torch.equal(a, b) for a, b in zip(first, second))


def test_crops_and_flips_are_among_all_there_are(make_data):
    """Of the images that are not held out, each under its label."""
    data, raw = small_data(*make_data("cifar10")), lambda images: [bytes(x.contiguous().numpy()) for x in images]
    images, origin, found = data.training_set, {}, []  # padded by 4 on each side
    inside = images.x[:, :, 4:-4, 4:-4]
    assert (images.x.numpy() == np.pad(inside.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)), "reflect")).all()
    kept, held, test = map(raw, (inside, data.held_out_set.x, data.test_set.x))
    assert (len(kept), len(held), len({*kept, *held}), len({*kept, *held, *test})) == (84, 16, 100, 120)
    for top, left, flip in itertools.product(range(9), range(9), (False, True)):
        crops = images.x[:, :, top : top + 32, left : left + 32]
        origin |= {crop: (i, top, left, flip) for i, crop in enumerate(raw(crops.flip(-1) if flip else crops))}
    for x, y in images.load(torch.arange(84).view(2, 42), epoch=0):
        found += [(*origin[crop], label) for crop, label in zip(raw(x), y.tolist())]
    i, top, left, flip, label = zip(*found)
    assert i == (*range(84),) and list(label) == images.y.tolist()
    assert set(top) == set(left) == set(range(9)) and len({*zip(top, left)}) > 40 and 25 < sum(flip) < 59


def test_batches_of_each_kind(make_data):
    """Scaled to mean 0 and deviation 1. Rounds take the next held-out images each, all of them before any twice; each of two
    processes takes all."""
    flags = [*make_data("fashion-mnist"), "--calibrate-images", "80", "--eval-images", "6"]
    data, second = small_data(*flags), small_data(*flags, rank=1, size=2)
    x = torch.cat([x for x, _ in data.batches("calibrate")])
    torch.testing.assert_close(torch.stack([x.mean(), x.std()]), torch.tensor([0.0, 1.0]), atol=1e-5, rtol=0)
    ordered = torch.cat([x for x, _ in data.train(0, 0)]).flatten(1)  # neither cropped nor flipped
    assert all((x.flatten(1) == image).all(1).any() for image in ordered)
    ((x, _),) = data.batches("held-out")
    for number in range(5):
        (batch, _), (again, _) = data.held_out(number), second.held_out(number)
        assert torch.equal(batch, x[[(6 * number + k) % 16 for k in range(6)]]) and torch.equal(again, batch)


def test_images_of_folders_are_torchvisions(make_data):
    """What is tested is as torchvision's own preset has it."""
    from torchvision.transforms._presets import ImageClassification

    flags = [*make_data("imagenet"), "--image-size", "28"]
    ((x, y),) = small_data(*flags).batches("test")
    preset, folder = ImageClassification(crop_size=28, resize_size=32), torchvision.datasets.ImageFolder(f"{flags[3]}/val")
    torch.testing.assert_close(x, torch.stack([preset(image) for image, _ in folder]), atol=1e-5, rtol=0)
    assert y.tolist() == folder.targets


def test_augmentation_is_asked_for(make_data, monkeypatch):
    """Letters are not mirrored, photos are, and jittered; what is small enough is decoded once, and is as from its file."""
    flags = [*make_data("imagenet"), "--image-size", "32"]
    halves = Image.new("RGB", (40, 40), (100, 100, 100))
    halves.paste((150, 150, 150), (20, 0, 40, 40))  # bright on the right
    for path in Path(flags[3], "train").rglob("*.jpeg"):
        halves.save(path)

    def mirrored(*more):
        x = torch.cat([x for x, _ in small_data(*flags, *more).train(0, 0)])
        return (x[..., 20:].mean((1, 2, 3)) < x[..., :12].mean((1, 2, 3))).sum().item(), x[:, 0] * 0.229 + 0.485

    for augment in ("none", "shift", "imagenet"):
        assert mirrored("--augment", augment, "--no-flip")[0] == 0
        assert 16 < mirrored("--augment", augment, "--flip")[0] < 48
    (flips, red), plain = mirrored(), mirrored("--augment", "none", "--no-flip")[1]
    assert 16 < flips < 48 and red.max() > 1.2 * 150 / 255 and red.min() < 0.8 * 100 / 255 and (plain == plain[0]).all()
    memory = small_data(*flags, "--augment", "shift")
    monkeypatch.setattr(train, "IN_MEMORY", 0)
    files = small_data(*flags, "--augment", "shift")
    assert type(memory.training_set).__name__ == "ArrayImages" and type(files.training_set).__name__ == "FolderImages"
    for data in (memory, files):  # shifts bring no colour of their own, which calibration and tests would not see
        x = torch.cat([x for x, _ in data.train(0, 0)]) * data.training_set.std / 255 + data.training_set.mean / 255
        assert 0.97 * 100 / 255 < x.min() and x.max() < 1.03 * 150 / 255
    for which in ("held-out", "test", "calibrate"):
        for (x, y), (raw, label) in zip(memory.batches(which), files.batches(which)):
            scaled = [v * images.std + images.mean for v, images in ((x, memory.training_set), (raw, files.training_set))]
            torch.testing.assert_close(*scaled, atol=1e-3, rtol=0)
            assert torch.equal(y, label)


RED, BLUE, GREY = (200, 30, 30), (20, 40, 220), (90, 90, 90)
WHITE = (255, 255, 255)


def picture(mode="RGB", left=RED, right=BLUE):
    """24 x 16 pixels of two colours, the upper left quarter another: no two of its turns and mirrors are the same."""
    image = Image.new("RGB", (24, 16), right)
    image.paste(left, (0, 0, 12, 16))
    image.paste(GREY, (0, 0, 12, 4))
    return image.convert(mode)


def saved(form, image=picture(), **how):  # noqa: B008
    image.save(raw := io.BytesIO(), form, **how, **({"lossless": True, "exact": True} if form == "WEBP" else {}))
    return raw.getvalue()


def transparent(mode, ground=(0, 0, 0)):
    """The picture where it is opaque, on the right; on the left a transparent ground of some colour."""
    image = picture("RGBA", left=ground)
    image.paste((*ground, 0), (0, 0, 12, 16))
    return image.convert(mode)


def on_white(mode="RGB"):
    image = picture(mode).convert("RGB")
    image.paste(WHITE, (0, 0, 12, 16))
    return image


def sixteen(mode):
    grey = torch.arange(24.0).expand(16, 24) * 2500  # 0 to 57500
    return Image.frombytes(mode, (24, 16), grey.to(torch.int32).numpy().astype(">u2" if mode == "I;16B" else "<u2").tobytes())


SIXTEEN = Image.fromarray((torch.arange(24.0).expand(16, 24) * 2500 / 257).round().byte().numpy()).convert("RGB")


def lab():
    rgb, profile = picture(), ImageCms.createProfile
    return ImageCms.profileToProfile(rgb, profile("sRGB"), profile("LAB"), outputMode="LAB")


# A camera's eight ways to lie, undone as the EXIF standard has it.
TURNS = {1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE",
         8: "ROTATE_270"}  # fmt: skip


def turned(orientation):
    """What the sensor saw of the upright picture: orientation 6 is shown turned by 90 clockwise."""
    exif, how = Image.Exif(), TURNS[orientation]
    exif[0x0112] = orientation
    return dict(image=picture().transpose(getattr(Image.Transpose, how)) if how else picture(), exif=exif)


def tiff(bits, white_is_zero):
    """A grey TIFF of one row, its pixels 0, half and all of what the bits allow; written tag by tag."""
    values = [0, 2 ** (bits - 1), 2**bits - 1, 0]
    raw = b"".join(struct.pack("<H", v) for v in values) if bits == 16 else None
    if bits == 12:  # two pixels in three bytes
        raw = b"".join((values[k] << 12 | values[k + 1]).to_bytes(3, "big") for k in (0, 2))
    known = 256, 257, 258, 259, 262, 273, 277, 278, 279  # width, height, bits, compression, what 0 means, where, ...
    tags = dict(zip(known, (4, 1, bits, 1, not white_is_zero, 8 + 2 + 9 * 12 + 4, 1, 1, len(raw))))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + raw


def greys(*values):
    return Image.frombytes("L", (len(values), 1), bytes(values)).convert("RGB")


FLAT = Image.new("RGB", (24, 16), GREY)
ODD = {  # files, and what a person sees; None: a palette's own colours on white
    "1": (saved("PNG", picture("1")), picture("1").convert("RGB")),
    "L": (saved("BMP", picture("L")), picture("L").convert("RGB")),
    "P": (saved("GIF", picture("P")), picture("P").convert("RGB")), "CMYK": (saved("TIFF", picture("CMYK")), picture()),
    "LA": (saved("PNG", picture("LA")), picture("L").convert("RGB")), "RGBA": (saved("PNG", picture("RGBA")), picture()),
    "clear black": (saved("PNG", transparent("RGBA")), on_white()), "WEBP": (saved("WEBP", transparent("RGBA")), on_white()),
    "clear pink": (saved("PNG", transparent("RGBA", (255, 0, 255))), on_white()),
    "clear LA": (saved("PNG", transparent("LA")), on_white("L")),
    "clear TIFF": (saved("TIFF", transparent("RGBA")), on_white()),
    "clear GIF": (saved("GIF", transparent("RGBA")), None), "clear P": (saved("PNG", transparent("RGBA").quantize()), None),
    "key colour": (saved("PNG", transparency=RED), picture(left=WHITE)), "LAB": (saved("TIFF", lab()), picture()),
    "I;16": (saved("PNG", sixteen("I;16")), SIXTEEN), "I;16 TIFF": (saved("TIFF", sixteen("I;16")), SIXTEEN),
    "I;16B": (saved("TIFF", sixteen("I;16B")), SIXTEEN), "F": (saved("TIFF", Image.new("F", (24, 16))), ValueError),
    "I": (saved("TIFF", Image.new("I", (24, 16))), ValueError),
    "12 bits": (tiff(12, False), greys(0, 128, 255, 0)), "16 bits": (tiff(16, False), greys(0, 128, 255, 0)),
    "white is 0": (tiff(16, True), greys(255, 127, 0, 255)),
    **{f"{form} {k}": (saved(form, **turned(k)), picture()) for form in ("PNG", "WEBP", "TIFF") for k in TURNS},
    **{f"{form} {exif}": (saved(form, FLAT, exif=exif), FLAT) for form in ("PNG", "WEBP", "JPEG")
       for exif in (b"Exif\0\0garbage", b"\xff" * 30, b"Exif\0\0II*\0\x08\0\0\0\xff\xff")},
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_images_are_what_a_person_sees(name, tmp_path):
    (raw, expected), path, tensor = ODD[name], tmp_path / "x", torchvision.transforms.v2.functional.pil_to_tensor
    path.write_bytes(raw)
    if expected is ValueError:
        return refuses("32 bits have no known range", train.decode, path)
    seen = train.decode(path)
    assert seen.mode == "RGB" and seen.size == (expected or picture()).size
    seen = tensor(seen).float()
    if expected is None:
        assert (seen[:, :, :12] == 255).all() and (seen[:, :, 12:].amin(0) < 100).all()
    else:
        assert (seen - tensor(expected)).abs().max() <= (8 if name in ("LAB", "CMYK") else 0)
    return None


def png(size, *chunks, depth=8):
    """Of these chunks, whatever they hold."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*c) for c in chunks) + chunk(b"IEND", b"")


UNREADABLE = {
    "empty.png": b"", "words.jpg": b"no image", "page.jpeg": b"<html>404</html>", "zeros.bmp": bytes(500),
    "text.png": png((8, 8), (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21))), (b"IDAT", zlib.compress(bytes(72)))),
    "huge.png": png((20000, 10000), (b"IDAT", zlib.compress(b"")), depth=1), "nothing.png": png((8, 8)),
    "cut.jpg": saved("JPEG")[:-60], "cut.png": saved("PNG")[:-40], "cut.tif": saved("TIFF")[:100],
    "cut.gif": saved("GIF")[:40], "cut.webp": saved("WEBP")[:-30], "float.tiff": saved("TIFF", Image.new("F", (9, 9))),
    "gone.jpg": None,
}  # fmt: skip


@pytest.mark.parametrize("part, augment, workers", [
    ("train", "imagenet", "0"), ("train", "imagenet", "1"), ("val", "imagenet", "0"), ("val", "shift", "1"),
    ("train", "none", "0"),
])  # fmt: skip
def test_unreadable_images_are_named(part, augment, workers, photos, refused, tmp_path, monkeypatch):
    """Whatever a decoder raises, wherever it is met: one line, the path first and whole."""
    flags = [*photos, "--augment", augment, "--workers", workers, "--epochs", "1"]
    folder = tmp_path / "imagenet" / part / "dog"
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    for n, (name, raw) in enumerate(UNREADABLE.items()):
        path = folder / f"a: b {name}"  # a name that a split at colons would lose
        path.symlink_to("nowhere") if raw is None else path.write_bytes(raw)
        for other in folder.glob("*.jpeg"):  # all of them, so that the first batch has it
            if part == "train" and name in ("cut.jpg", "nothing.png", "float.tiff"):
                shutil.copyfile(path, other)
        err = refused("", *flags, "--out", tmp_path / f"out{n}")
        what = "No such file" if name == "gone.jpg" else r"not a readable image \(\w+: "
        assert re.match(rf"train.py: {re.escape(str(folder))}/.*: {what}", err), err
        path.unlink()


def fill(folder, *names):
    """Files of these names that are no images."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"no image")


def link(folder, *names):
    """Links in a folder, by name, to what lies elsewhere."""
    for name, to in names:
        (folder / name).symlink_to(to)


FORMATS = dict(jfif="JPEG", gif="GIF", JPG="JPEG", tif="TIFF", webp="WEBP")


@pytest.mark.parametrize("put, said, counts", [
    (lambda t, v: fill(t, ".cache/x.jpeg", "cat/.cache/x.jpeg", "cat/._0.jpeg", "cat/.hidden/deep/x.png", ".DS_Store"),
     "5 hidden", [48, 48]),
    (lambda t, v: fill(t, "dog/notes.txt", "dog/more.TXT", "dog/clip.mp4", "dog/noname", "README.md"),
     "2 .txt, 1 .mp4, 1 without suffix, 1 outside of class folders", [48, 48]),
    (lambda t, v: [(t / "cat" / s).mkdir() or picture().save(t / "cat" / s / f"x.{s}", form) for s, form in FORMATS.items()],
     "", [53, 48]),
    (lambda t, v: (os.mkfifo(t / "cat" / "pipe.png"), link(t / "dog", ("piped.png", t / "cat" / "pipe.png"))),
     "2 special files", [48, 48]),  # which would wait for a writer
    (lambda t, v: [shutil.copytree(v / "cat", t / name) for name in ("@eaDir", "cat/@eaDir", "lost+found", "dog/__MACOSX")],
     "4 file servers'", [48, 48]),
    (lambda t, v: link(t, ("cat/again", t / "cat"), ("dog/up", t)), "2 linked once more", [48, 48]),
    (lambda t, v: ((t / "cat" / "0.jpeg").rename(t / "cat" / "z.jpeg"),
                   link(t, ("cat/aside", t / "dog"), ("cat/0.jpeg", t / "cat" / "z.jpeg"))),
     "2 linked once more", [48, 48]),  # where its own folder has it, that is its class
    (lambda t, v: os.link(t / "cat" / "0.jpeg", t / "cat" / "more.jpeg"), "1 linked once more", [48, 48]),
    (lambda t, v: link(t / "cat", *((name, v / "cat") for name in ("one", "two", "three"))),
     "2 linked once more, 10 of 20 test images are also trained on", [58, 48]),
    (lambda t, v: [shutil.copy(path, t / path.parent.name / f"copy of {path.name}") for path in v.rglob("*.jpeg")],
     "20 of 20 test images are also trained on", [58, 58]),
])  # fmt: skip
def test_what_is_in_a_folder_is_counted(put, said, counts, make_data, tmp_path, capsys):
    """An image once, by whatever links it is met; the rest by what it is. Copies of test images are told."""
    flags, root = make_data("imagenet"), tmp_path / "imagenet"
    put(root / "train", root / "val")
    data, out = small_data(*flags), capsys.readouterr().out
    assert data.about["classes"] == ["cat", "dog"]
    assert torch.cat([data.training_set.y, data.held_out_set.y]).bincount().tolist() == counts
    assert f"{root / 'train'}: 2 classes, {sum(counts)} images" in out and f"{root / 'val'}: 2 classes, 20 images\n" in out
    assert all(what in out for what in said.split(", ")), out
    assert ("left out" in out) == any(what[:1].isdigit() and "also" not in what for what in said.split(", "))
    assert ("also trained on" in out) == ("also trained on" in said)


def test_folders_that_cannot_be_read_are_named(photos, refused, tmp_path, monkeypatch):
    scandir = os.scandir
    for closed in ("train", "train/dog", "val/cat"):

        def denied(path):
            if Path(path) == tmp_path / "imagenet" / closed:  # noqa: B023
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", denied)
        refused(f"train.py: {tmp_path / 'imagenet' / closed}: Permission denied\n", *photos, "--out", tmp_path / "out")


@pytest.mark.parametrize("labels, kept", [
    ([0] * 90 + [1] * 3 + [2], 3), ([0] * 50 + [1] * 44, 2), (list(range(12)) + [12] * 82, 13), ([*range(90)] + [0] * 4, 34),
])  # fmt: skip
def test_every_class_keeps_a_training_image(labels, kept, capsys):
    labels, world = torch.tensor(labels), train.World()
    for seed in range(20):
        args = train.parse_args([*QUICK, "--held-out", "60", "--seed", str(seed)])
        held, rest = train.split(labels, args, world)
        assert sorted([*held.tolist(), *rest.tolist()]) == list(range(94)) and len(held) == 60
        assert len(set(labels[rest].tolist())) == kept  # all there are, or as many as there are training images
        plain = torch.randperm(94, generator=train.seeded(2, seed))
        if set(labels[plain[60:]].tolist()) == set(labels.tolist()):
            assert torch.equal(torch.cat([held, rest]), plain)  # nothing is rare: as it always was
        none = len(set(labels.tolist())) - kept
        assert (f"{none} classes have no training image" in capsys.readouterr().out) == (none > 0)


def test_memory_follows_the_data(tmp_path):
    """Array sets resized, and extremely thin images, in a process of their own."""
    write_data("fashion-mnist", tmp_path)
    code = """if True:
        import numpy as np, resource, torch, train
        from PIL import Image, ImageCms
        torch.set_num_threads(1)
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        args = train.parse_args("--data fashion-mnist --data-dir . --image-size 224 --held-out 500 --augment shift".split())
        x, y = torch.randint(256, (4000, 1, 28, 28), dtype=torch.uint8), torch.zeros(4000, dtype=torch.long)
        train.array_sets(args, train.World().meet("cpu"), x[:900], y[:900], x[:9], y[:9])
        before = peak()
        sets = train.array_sets(args, train.World().meet("cpu"), x, y, x[:9], y[:9])
        assert (peak() - before) < 1.6 * sum(s.x.nbytes for s in sets), (peak() - before) / sum(s.x.nbytes for s in sets)
        before = peak()
        Image.new("RGB", (20000, 1)).save("thin.png")
        for augment in ("none", "shift", "imagenet"):
            args.augment = augment
            zero, device = torch.tensor([0]), torch.device("cpu")
            images = train.FolderImages(np.array([b"thin.png"]), zero, zero, args, device)
            assert all(images[epoch, 0][0].shape == (3, 224, 224) for epoch in (None, 1))
        assert peak() - before < 2e8, peak() - before
    """
    python("-c", code, cwd=tmp_path, path=ROOT)


def test_held_out_images_of_folders_are_decoded_once(make_data, monkeypatch):
    flags, times, decode = make_data("imagenet"), Counter(), train.decode
    files = small_data(*flags)
    monkeypatch.setattr(train, "IN_MEMORY", 3 * 16**2 * 16)  # bytes, of no more than they
    monkeypatch.setattr(train, "decode", lambda path: (times.update([path]), decode(path))[1])
    data = small_data(*flags)
    for number in range(5):
        torch.testing.assert_close(list(data.held_out(number)), list(files.held_out(number)), rtol=0, atol=0)
    list(data.batches("held-out"))
    assert sum(f"{os.sep}train{os.sep}" in path for path in times) == 16 and set(times.values()) == {1}


def test_synthetic_images_are_known_by_their_recipe(monkeypatch):
    """Processors differ in a bit of some: a run begun on one goes on on another. But not with other images held out."""
    digests, synthetic = [], train.synthetic
    one, two, other = synthetic(50, 0), synthetic(50, 0), synthetic(50, 1)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and not torch.equal(one[0], other[0])
    for bit, flags in ((0, []), (1, []), (0, ["--held-out", "50"])):
        monkeypatch.setattr(train, "synthetic", lambda n, seed: ((s := synthetic(n // 10, seed))[0] ^ bit, s[1]))  # noqa: B023
        digests.append(small_data(*flags).about["digest"])
    assert digests[0] == digests[1] != digests[2]


# ------------------------------------------------------------------------------ whole runs, of any data and network
# Compared with plain networks of the same weights.


@pytest.mark.parametrize("data, arch", [("emnist", "resnet8"), ("cifar10", "resnet20"), ("imagenet", "mbv2")])
def test_real_formats_train(data, arch, make_data, tmp_path):
    flags = [*QUICK, "--tau", "2", *make_data(data), "--arch", arch, *(["--image-size", "32"] if arch == "mbv2" else [])]
    assert train.main([*flags, "--workers", "1", "--out", str(tmp_path / "out")]) == 0
    rows = read_front(tmp_path / "out")
    assert list(rows[0]) == ["flops", "params", "memory", "loss", "top1", "top1_stderr", "top5", "widths"]
    how = {"emnist": (47, 28, 1), "cifar10": (10, 32, 3), "imagenet": (2, 32, 3, 8)}[data]  # 8: a divisor, by its recipe
    net = models.build(arch, *how)
    for row in rows:
        costs = [getattr(net, cost)(widths_of(row)).item() for cost in train.COSTS]
        assert costs == [int(row[cost]) for cost in train.COSTS]
    assert int(rows[-1]["flops"]) == net.flops(1.0).item()
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names - {"front.png"} == {"checkpoint.pt", "checkpoint.previous.pt", "log.jsonl", "front.csv", "front.pt"}


OWN = """
from torch import nn
import beside

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.grouped, self.drop = nn.Conv2d(12, 12, 3, padding=1, groups=4), nn.Dropout(0.3)
        self.fc = nn.Sequential(nn.Linear(12 * 4, classes), nn.BatchNorm1d(classes))

    def forward(self, x):
        x = self.stem(x)
        x = nn.functional.adaptive_avg_pool2d(x + self.grouped(x).relu(), 2)
        return self.fc(self.drop(x.flatten(1)))

class Two(Net):
    when = True
    def forward(self, x):
        return (super().forward(x),) * 2 if self.training == self.when else super().forward(x)

class Evals(Two):
    when = False

def broken(classes):
    raise RuntimeError("theirs")

def leaves(classes):
    raise SystemExit(0)

def half(classes):
    return Net(classes).half()

def frozen(classes):
    net = Net(classes)
    net.stem[0] = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1))
    net.stem[0][3].weight.requires_grad_(False)
    net.spare, net.norm = nn.Linear(2, 2), nn.InstanceNorm2d(12, track_running_stats=True)
    net.grouped = nn.Sequential(net.grouped, net.norm)
    return net
"""


@pytest.fixture
def own_py(tmp_path, monkeypatch):
    """A file of networks of the reader's own, and one that it imports."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


def own_network(name):
    exec(OWN.replace("import beside", ""), names := {})
    return names[name](10)


@pytest.mark.parametrize("arch, size", [("own.py:Net", 8), ("squeezenet1_1", 32)])
def test_any_network_trains(arch, size, tiny, own_py, refused, tmp_path, monkeypatch):
    """Trained, stopped, resumed as if it had not been, exported; and its front.pt in the hands of who has its class."""
    flags = [*tiny, "--epochs", "2", "--image-size", str(size), "--arch", str(tmp_path / arch) if ".py" in arch else arch]
    assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    run_until(3, [*flags, "--out", str(tmp_path / "parts"), "--save-minutes", "0"], monkeypatch)
    assert train.main([*flags, "--out", str(tmp_path / "parts"), "--resume"]) == 0
    assert same_run(tmp_path / "whole", tmp_path / "parts")  # dropout and all
    assert train.main(["--out", str(tmp_path / "whole"), "--export", "0.9"]) == 0 and list((tmp_path / "whole").glob("*.pt2"))
    path, mine = str(tmp_path / "whole" / "front.pt"), arch == "own.py:Net"
    if mine:
        refuses("a network of your own: load", models.load, path)
        moved = own_network("Net")
        moved.stem = moved._modules.pop("stem")  # now the last
        for odd in (moved, models.slimmable(own_network("Net"), (1, 8, 8), divisor=2)):  # it would run at other widths
            refuses("divisor 1, its layers in the same order", models.load, path, net=odd)
        state = read_state(tmp_path / "parts")
        torch.save(state | {"model": dict(reversed(state["model"].items()))}, tmp_path / "parts" / "checkpoint.pt")
        refused("another network now", *flags, "--out", tmp_path / "parts", "--resume")  # as by what the file imports
        own_py.write_text(OWN.replace("12", "16"))
        refused("that run has --arch-file ", *flags, "--out", tmp_path / "parts", "--resume")
    net = models.load(path, net=own_network("Net") if mine else None)
    row = net.use(flops=0.5)
    plain, data = net.extract(), small_data(*tiny, "--image-size", str(size))
    ((x, y),) = data.batches("test")
    assert type(plain).__name__ == ("Net" if mine else "SqueezeNet")
    assert 5 * (plain(x).argmax(1) == y).sum().item() == row["top1"]
    assert {*plain.state_dict()} == {*net.state_dict()} and not {type(m) for m in plain.modules()} & {*models.LAYERS}


@pytest.mark.parametrize("arch, size, word", [
    ("own.py:broken", 8, "RuntimeError: theirs"), ("own.py:leaves", 8, "SystemExit"),
    ("own.py:Two", 8, "does not give one logit a class for each image in train(True)"),
    ("own.py:Evals", 8, "does not give one logit a class for each image in train(False)"),
    ("own.py:half", 8, "RuntimeError"), ("own.py:nothing", 8, "no attribute 'nothing'"), ("none.py:Net", 8, "No such file"),
    ("resnet8 --lower 1", 8, "keeps every width"), ("vit_b_16", 32, "keeps every width"), ("resnet9", 8, "unknown 'resnet9'"),
    ("alexnet", 32, "Output size is too small"),
])  # fmt: skip
def test_networks_that_cannot_be_trained_as_they_are(arch, size, word, tiny, own_py, refused, tmp_path, monkeypatch):
    """One line, before the data are read."""
    monkeypatch.setattr(train, "read_arrays", None if "lower" not in arch else train.read_arrays)
    arch = str(tmp_path / arch) if ".py" in arch else arch
    refused(word, *tiny, "--image-size", size, "--arch", *arch.split(), "--out", tmp_path / "out")


def test_a_network_of_ones_own_on_two_processes(tiny, own_py, tmp_path):
    """What has no gradient; buffers that each process would fill from its own images: front.csv is what front.pt gives."""
    flags = [*tiny, "--arch", f"{own_py.rename(tmp_path / 'own')}:frozen", "--epochs", "6", "--out", str(tmp_path / "out")]
    assert ends(two(flags)) == ((0, 0), "")
    net = models.load(str(tmp_path / "out" / "front.pt"), net=own_network("frozen"))
    ((x, y),) = small_data(*tiny).batches("test")
    assert len(net.front["loss"]) > 1
    for cost, loss in zip(net.front["flops"].tolist(), net.front["loss"].tolist()):
        net.use(flops=cost)
        assert F.cross_entropy(net(x), y).item() == pytest.approx(loss, rel=1e-5)


# ------------------------------------------------------------------------------ from the front to something that runs
# Compared with front.csv, with plain networks, with files loaded where nothing of this project is, with torchvision.


def test_front_pt_is_front_csv(copied, tiny, capsys):
    """Every configuration, by every cost, as a ratio, absolute or as printed: at once, without images, to the digit."""
    assert train.main([*tiny, "--out", str(copied), "--resume"]) == 0  # which prints its table once more
    printed = [line.split() for line in capsys.readouterr().out.splitlines() if " ± " in line]
    net, rows, costs = models.load(str(copied / "front.pt")), read_front(copied), ("flops", "params", "memory")
    assert len(rows) > 2
    ((x, y),) = small_data(*tiny).batches("test")
    for (row, cells), (k, cost) in itertools.product(zip(rows, printed, strict=True), enumerate(costs)):
        full, own = float(rows[-1][cost]), float(row[cost])
        for budget in (float(cells[2 * k]) * 1e6, float(cells[2 * k + 1].rstrip("%")) / 100):
            found = net.use(**{cost: budget})[cost]
            assert found == own or cost != "flops" and found <= own
        last = [r for r in rows if float(r[cost]) <= own][-1]  # the costliest of what fits
        for budget in (own, own / full):
            assert net.use(**{cost: budget}) == {k: float(v) for k, v in last.items() if k != "widths"}
        with torch.no_grad():
            for one in (net, net.extract()):
                assert F.cross_entropy(one(x), y).item() == pytest.approx(float(last["loss"]), rel=1e-4)
                assert 5 * (one(x).argmax(1) == y).sum().item() == float(last["top1"])
    assert net.data["classes"] == torchvision.datasets.FashionMNIST.classes
    raw = train.load_arrays(train.parse_args(tiny), train.World().meet("cpu"))[1][0]
    small = torchvision.transforms.v2.functional.resize(raw, [8, 8], antialias=True)
    mean, std = (torch.tensor(net.data[k]).view(-1, 1, 1) for k in ("mean", "std"))
    torch.testing.assert_close((small / 255 - mean) / std, x)


def test_budgets(finished):
    net = models.load(str(finished / "front.pt"))
    for cost in ("flops", "params", "memory"):
        with pytest.raises(ValueError, match=f"{cost}: nothing fits into 1e-09; the smallest needs") as refused_:
            net.use(**{cost: 1e-9})
        for budget in re.search(r"needs ([\d.]+), ([\d.]+) of", str(refused_.value)).groups():  # which is a budget, too
            assert net.use(**{cost: float(budget)})[cost] == net.front[cost].min()
    assert net.use(flops=1.0, memory=0.9)["memory"] <= 0.9 * net.front["memory"].max()  # several hold at once
    small = float(net.front["params"].min())
    assert net.use(flops=1.0, params=small)["params"] == small
    refuses("memory: nothing fits", net.use, flops=1.0, memory=1e-9)
    refuses("flops: nothing fits into 2;", net.use, flops=2)
    refuses("no front with a latency", net.use, latency=0.5)
    refuses("no front with a top1", net.use, top1=50)
    refuses("no front", models.build("resnet8", 5, 16).use, flops=0.5)
    refuses("name a budget", net.use)
    for digits in (0, 1, 3):
        costs = 10 ** torch.empty(30, dtype=torch.float64).uniform_(-3, 3)
        assert all(float(s) >= v * (1 - 1e-9) for s, v in zip(models.round_up(costs, digits), costs.tolist()))


@pytest.mark.parametrize("holder", ["buffers", "a deep copy", "shared memory", "inference mode"])
def test_use_and_calibration_write_into_nothing_that_others_hold(holder, finished):
    with torch.inference_mode(holder == "inference mode"):
        net = models.load(str(finished / "front.pt"))
        net.use(flops=1.0)
    if holder == "shared memory":
        net.share_memory()
    other = copy.deepcopy(net) if holder == "a deep copy" else None
    held = list((other or net).buffers())
    before, front = [b.clone() for b in held], net.statistics.clone()
    net.use(flops=1e-9 + (net.front["flops"].min() / net.front["flops"].max()).item())
    narrow, x = net(torch.ones(2, 1, 8, 8)), torch.randn(8, 1, 8, 8)
    joslim.calibrate_bn(net, [x])
    assert all(map(torch.equal, held, before)) and torch.equal(net.statistics, front)
    assert not torch.equal(models.get_statistics(net), front[0])  # it did calibrate
    net.use(flops=1e-9 + (net.front["flops"].min() / net.front["flops"].max()).item())
    assert torch.equal(net(torch.ones(2, 1, 8, 8)), narrow)
    net.statistics = net.statistics[:, :-1]  # of another network: nothing has changed
    widths = [g.active for g in net.groups]
    with pytest.raises(RuntimeError):
        net.use(flops=1.0)
    assert [g.active for g in net.groups] == widths and torch.equal(net(torch.ones(2, 1, 8, 8)), narrow)


def test_front_pt_needs_models_and_torch_alone(finished, tmp_path):
    shutil.copy(ROOT / "models.py", tmp_path)
    code = "import sys, models; print(models.load(sys.argv[1]).use(flops=0.9)['top1'], 'torchvision' in sys.modules)"
    rows = read_front(finished)
    top1 = [row["top1"] for row in rows if int(row["flops"]) <= 0.9 * int(rows[-1]["flops"])][-1]
    assert python("-c", code, str(finished / "front.pt"), cwd=tmp_path).split() == [top1, "False"]


def test_export_runs_without_this_project(copied, tmp_path, capsys):
    assert train.main(["--out", str(copied), "--export", "0.705"]) == 0  # has a file of its own
    assert [p.name for p in copied.glob("*.pt2")] == ["flops-0.705.pt2"] and capsys.readouterr().out
    assert train.main(["--out", str(copied), "--export", "0.7"]) == 0
    net = models.load(str(copied / "front.pt"))
    row, x = net.use(flops=0.7), torch.randn(5, 1, 8, 8)
    (line,), path = capsys.readouterr().out.splitlines(), copied / "flops-0.70.pt2"
    top1, expected = re.search(r"test top-1 ([\d.]+) % \(front.csv ([\d.]+)\)", line).groups()
    assert line.startswith(f"{path}: {path.stat().st_size / 1e6:.2f} MB, ") and top1 == expected == f"{row['top1']:.2f}"
    torch.save(x, tmp_path / "x.pt")
    code = """if True:
        import sys, torch
        net, x = torch.export.load(sys.argv[1]).module(), torch.load("x.pt")
        torch.save([net(x), net(x[:1])], "y.pt")
        assert not {"models", "joslim", "train", "torchvision"} & set(sys.modules)
    """
    python("-c", code, str(path), cwd=tmp_path)
    for ours, inputs in zip(torch.load(tmp_path / "y.pt"), (x, x[:1])):
        torch.testing.assert_close(ours, net(inputs).detach(), rtol=1e-4, atol=1e-5)


def test_fine_tuning(copied, capsys, monkeypatch):
    """It is what a plain loop over the same images makes of the network; one no better on held-out images is not written."""
    args, seen = train.parse_args(["--out", str(copied), "--export", "0.7", "--finetune", "2"]), []
    fit = train.train_plain
    monkeypatch.setattr(train, "train_plain", lambda *a: seen.append(fit(*a)) or seen[-1])
    capsys.readouterr()
    train.export(args, train.World().meet("cpu"))
    out = capsys.readouterr().out
    net, data = models.load(str(copied / "front.pt")), train.Data(args, train.World().meet("cpu"))
    net.use(flops=0.7)
    plain, step = net.extract().train(), 0
    groups = [{"params": [p], "weight_decay": 5e-4 if p.ndim > 1 else 0} for p in plain.parameters()]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    for epoch in range(2):
        for x, y in data.train(epoch, 0):
            for group in optimizer.param_groups:
                group["lr"] = 0.5 / 2 * 32 / 256 * (4 - step) / 4  # to zero
            optimizer.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            optimizer.step()
            step += 1
    for mine, theirs in zip(plain.parameters(), seen[0].parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    before, after = map(float, re.search(r"held-out loss ([\d.]+), fine-tuned ([\d.]+)", out).groups())
    ((x, y),) = data.batches("held-out")
    assert F.cross_entropy(seen[0](x), y).item() == pytest.approx(after, abs=1e-3)
    assert ("flops-0.70-tuned-2.pt2" in out) == (after < before) != ("no better, and not written" in out)

    def worse(net, *_):
        net.load_state_dict({k: v * (3 if "fc" in k else 1) for k, v in net.state_dict().items()})
        return net.eval()

    monkeypatch.setattr(train, "train_plain", worse)
    train.export(args, data.world)
    assert "no better, and not written" in capsys.readouterr().out and (copied / "flops-0.70.pt2").exists()


def test_latency_fit_finds_a_known_formula():
    """Times that are made of FLOPs, activations and a constant are found again, for widths not seen; never negative."""
    net = models.build("resnet20", 10, 32)
    a = torch.stack([widths_for(net, s, LOWER) for s in range(60)])
    c = net.channels(a)
    first = torch.tensor([4.0 * (n == "conv1") + n.startswith("layer1") for n in net.names])  # of 32 x 32 pixels
    truth = 1.5 + net.flops(a) / 2e7 + c @ first.double() / 400
    assert net.fit_latency(a[:40], truth[:40]).abs().max() < 0.01
    torch.testing.assert_close(net.latency(a[40:]), truth[40:], rtol=0.02, atol=0)
    assert (net.latency_table >= 0).all()
    refuses("latency: measure", models.build("resnet8", 10, 8).latency, 1.0)
    assert (models.time_networks(models.build("resnet8", 10, 8).bfloat16(), a[:1, :6]) > 0).all()


def test_latency_as_a_cost(tiny, refused, tmp_path, monkeypatch):
    flags = [*tiny, "--cost", "latency", "--threads", "1", "--latency-batch", "2", "--out", str(tmp_path)]
    run_until(4, [*flags, "--save-minutes", "0"], monkeypatch)
    before, (measured,) = read_state(tmp_path)["latency"], read_log(tmp_path, "latency")
    assert len(measured["widths"]) == len(measured["milliseconds"]) == 80 and len(measured["unseen_errors"]) == 20
    assert train.main([*flags, "--resume"]) == 0  # nothing is measured anew: the search goes on with what it began with
    assert len(read_log(tmp_path, "latency")) == 1
    assert torch.equal(read_state(tmp_path)["latency"], before)
    rows = read_front(tmp_path)
    times = [float(row["latency"]) for row in rows]
    assert times == sorted(times) and times[0] > 0 and int(rows[-1]["flops"]) == max(int(r["flops"]) for r in rows)
    net = models.load(str(tmp_path / "front.pt"))
    assert net.use(latency=0.999)["latency"] <= 0.999 * times[-1] or len(rows) == 1
    assert net.latency(1.0) > 0
    state = read_state(tmp_path)
    torch.save(state | {"settings": state["settings"] | {"machine": "H100"}}, tmp_path / "checkpoint.pt")
    refused("that run has --machine H100, this one cpu", *flags, "--resume")  # whose times would be mixed


def test_channel_counts_in_multiples(tiny, tmp_path):
    net = models.build("mbv2", 10, 32, divisor=8)
    a = torch.stack([widths_for(net, s) for s in range(20)])
    assert (net.channels(a) % 8 == 0).all() and (net.channels(a) >= 8).all()
    assert ((net.channels(a) - a * net.channels(1.0)).abs() <= 4 + 4 * (a * net.channels(1.0) < 8)).all()
    plain = net.extract(a[0])
    costs_are(net, a[0], plain, torch.randn(1, 3, 32, 32))
    assert all(m.out_channels % 8 == 0 for m in plain.modules() if isinstance(m, nn.Conv2d))
    odd = models.build("resnet8", 10, 32, divisor=24)  # of which no group's channels are a multiple
    assert odd.channels(1.0).tolist() == models.build("resnet8", 10, 32).channels(1.0).tolist()
    assert train.main([*tiny, "--divisor", "4", "--out", str(tmp_path)]) == 0
    net = models.load(str(tmp_path / "front.pt"))
    for row in read_front(tmp_path):
        net.use(flops=float(row["flops"]))
        assert all(g.active % 4 == 0 for g in net.groups)
        assert int(row["params"]) == sum(p.numel() for p in net.extract().parameters())


@pytest.mark.parametrize("arch", ["mbv2", "resnet18", "resnet50", "googlenet", "squeezenet1_1"])
def test_pretrained_weights_sorted(arch, tmp_path, capsys):
    """The full network is torchvision's, as published; in each group the channels that are read most come first."""
    more = {"aux_logits": True, "init_weights": False} if arch == "googlenet" else {}
    theirs = ready(torchvision.models.get_model(torchvisions(arch), weights=None, num_classes=7, **more)).float()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    net, other, x = models.build(arch, 7, 64).eval(), models.build(arch, 5, 64), torch.randn(2, 3, 64, 64)
    for one in (net, other):
        train.load_init(one, train.read_init(tmp_path / "weights.pth")[0], tmp_path, print)
    torch.testing.assert_close(net(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert capsys.readouterr().out.count("of other classes: the classifier starts anew") == 1
    first = net.names[0] + ".weight"
    torch.testing.assert_close(other.state_dict()[first], net.state_dict()[first])
    readers = {g: [m for m in net.modules() if isinstance(m, (models.Conv2d, models.Linear)) and m.reads is g
                   and not getattr(m, "depthwise", False)] for g in net.groups}  # fmt: skip
    for layers in readers.values() if arch in models.ARCHS else ():
        read = sum(m.weight.abs().flatten(2).sum((0, 2)) if m.weight.ndim == 4 else m.weight.abs().sum(0) for m in layers)
        assert (read.diff() <= 1e-3).all()


def test_runs_start_from_weights(finished, tiny, refused, tmp_path, capsys):
    """A front.pt's."""
    flags = [*tiny, "--method", "slim", "--epochs", "1", "--lr", "0"]
    assert train.main([*flags, "--init", str(finished / "front.pt"), "--out", str(tmp_path / "new")]) == 0
    one, two = (models.load(str(folder / "front.pt")) for folder in (finished, tmp_path / "new"))
    x = torch.randn(3, 1, 8, 8)
    for net in (one, two):
        models.set_statistics(net, torch.cat([torch.full((len(m.running_mean),), v) for m in net.modules()
                                              if isinstance(m, nn.BatchNorm2d) for v in (0.0, 1.0)]))  # fmt: skip
        net.set_widths(0.5)
    torch.testing.assert_close(one(x), two(x), rtol=1e-4, atol=1e-5)  # no step has moved it, nor its channels
    for more in (["--seed", "1"], ["--held-out", "20"]):  # else what it was trained on would be held out
        refused("held out other images, those of --seed 0 --held-out 16", *flags, *more, "--init", finished / "front.pt",
                "--out", tmp_path / "y")  # fmt: skip
    # Of as many classes, but others; of images some of which may be in these tests.
    state = torch.load(finished / "front.pt", weights_only=True)
    state["data"] |= {"classes": state["data"]["classes"][::-1], "digest": "x"}
    torch.save(state, tmp_path / "other.pt")
    capsys.readouterr()
    assert train.main([*flags, "--init", str(tmp_path / "other.pt"), "--out", str(tmp_path / "other")]) == 0
    out, other = capsys.readouterr().out, models.load(str(tmp_path / "other" / "front.pt")).state_dict()
    assert "of other classes: the classifier starts anew" in out and "trained on other images; what is here" in out
    assert [k for k, v in one.state_dict().items() if v.is_floating_point() and not torch.equal(v, other[k]) and "running" not in k] == [
        "fc.weight", "fc.bias"]  # fmt: skip


# ------------------------------------------------------------------------------ stopping, resuming
# Compared with the same run unbroken.


@pytest.mark.parametrize("how", ["joslim --tau 2 --fresh-widths", "slim", "twostage --tau 4"])
def test_resumed_run_is_the_unbroken_run(how, tiny, tmp_path, capsys, monkeypatch):
    flags = [*tiny, "--method", *how.split()]
    assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0

    flags += ["--out", str(tmp_path / "parts"), "--resume", "--threads", "1"]  # which decide nothing where FLOPs are the cost
    for step in (3, 6):  # in the middle of an epoch and of a round's widths; after an epoch
        run_until(step, [*flags, "--save-minutes", "0"], monkeypatch)
    with monkeypatch.context() as patch:  # and in the middle of the choice of the front
        patch.setattr(train, "find_front", lambda run: os.kill(os.getpid(), signal.SIGTERM))
        capsys.readouterr()
        assert train.main(flags) == 143
    assert "stopped at step 8, all saved" in capsys.readouterr().err
    assert train.main(flags) == 0
    assert same_run(tmp_path / "whole", tmp_path / "parts")


@on_a_gpu
def test_a_cpu_run_continues_on_the_gpu(tiny, tmp_path, monkeypatch):
    """Weights, and momentum with them, go on where they were: as on the CPU, but for the GPU's precision."""
    flags, folders = [*tiny, "--method", "slim", "--no-amp"], [tmp_path / d for d in ("cpu", "cuda")]
    run_until(2, [*flags, "--out", str(folders[0])], monkeypatch)  # after the first of four epochs
    shutil.copytree(*folders)

    def weights(folder):
        return torch.cat([v.flatten().double() for v in read_state(folder)["model"].values()])

    before = weights(folders[0])
    for device, folder in zip(("cpu", "cuda"), folders):
        assert train.main([*flags, "--out", str(folder), "--resume", "--device", device]) == 0
    there, here = (weights(f) for f in folders)
    assert (there - here).norm() < 0.2 * (here - before).norm()


def in_session(number):
    """The processes of a session, zombies aside."""
    stats = [path.read_text().rsplit(")", 1)[1].split() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
    return [s for s in stats if int(s[3]) == number and s[0] != "Z"]


def stopped(folder, line):
    """The line says how to continue what is saved."""
    command = shlex.split(line.split("continue with: ")[1])
    assert command[-2:] == [str(folder), "--resume"] and "train.py" in command
    assert read_state(folder)["step"] == int(re.search(r"stopped at step (\d+), all saved", line)[1]) > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU])
def test_signals_to_the_whole_group(number, photos, tmp_path):
    """A terminal closes, a cluster preempts: loading processes get the signal as well, and must not go first."""
    out = tmp_path / "a b"
    run = Forked([*photos, "--workers", "2", "--log-seconds", "0", "--epochs", "4000", "--out", str(out)])
    run.await_line("epoch")
    os.killpg(run.pid, number)
    code, err = run.finish(20)
    assert code == 128 + number and err.count("\n") == 1, err
    stopped(out, err)
    assert not in_session(run.pid)  # no loading process is left


@pytest.mark.parametrize("which", [(1,), (0,), (1, 0), "late"])
def test_one_of_two_processes_is_stopped(which, tiny, tmp_path):
    """Whichever it is, both end after the same step, one speaks, and the checkpoint is there. Where it is too late for the
    last step's message, they agree once more before the front, which takes both."""
    late = ("after = train.Run.after_step\n"
            "def then(run, *a):\n"
            "    after(run, *a)\n"
            "    run.step == run.steps and os.kill(os.getpid(), signal.SIGTERM)\n"
            "train.Run.after_step = then")  # fmt: skip
    if which == "late":
        runs = two([*tiny, "--out", str(tmp_path)], ("", late))
    else:
        runs = two([*tiny, "--epochs", "4000", "--out", str(tmp_path)])
        runs[0].await_line("epoch")
        for rank in which:
            os.kill(runs[rank].pid, signal.SIGTERM)
            time.sleep(0.05)
    codes, err = ends(runs, 20)
    assert codes == (143, 143) and err.count("\n") == 1, err
    stopped(tmp_path, err)


def test_others_children_live_on(photos, tmp_path):
    """A run ends its loading processes, and no other that its process has."""
    fork = multiprocessing.get_context("fork")
    others = [fork.Process(target=time.sleep, args=(60,), daemon=daemon) for daemon in (True, False)]
    for other in others:
        other.start()
    with subprocess.Popen(["sleep", "60"]) as one:
        assert train.main([*photos, "--workers", "1", "--epochs", "1", "--out", str(tmp_path)]) == 0
        assert one.poll() is None and all(other.is_alive() for other in others)
        for other in (one, *others):
            other.kill()


@pytest.mark.parametrize("when", ["load_arrays", "find_front", "test_front"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_outside_of_training(when, number, tiny, refused, tmp_path, monkeypatch):
    """Before there is anything to save, and when all is saved: one line, at once."""
    monkeypatch.setattr(train, when, lambda *_: os.kill(os.getpid(), number))
    argv = [*tiny, "--method", "slim", "--epochs", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["pytest", "--something-else"])
    err = refused("stopped ", *argv, code=128 + number)
    if when == "load_arrays":
        assert "stopped before training began; nothing has changed" in err
    else:
        assert err.rstrip().endswith(shlex.join(["train.py", *argv, "--resume"])) and "pytest --" not in err


# ------------------------------------------------------------------------------ several processes
# Compared with one; a fault of theirs is one message.


def test_torchrun_processes_agree(tiny, tmp_path):
    """The run checks it itself before it tests its front."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    assert "2 processes agree" in python(*command, *tiny, "--out", str(tmp_path))
    assert len(read_front(tmp_path)) >= 2


@pytest.mark.parametrize("method", ["joslim", "twostage"])
def test_the_historys_losses_are_the_same_by_any_number_of_processes(method, tiny, tmp_path):
    """Weights that stay as they are: what each process tells its sampler, whole histories or, where finished weights are
    searched, a few new configurations, of which a third process may have none. Here the processes hold equal bits."""
    flags, told = [*tiny, "--method", method, "--lr", "0", "--batch-size", "30", "--num-prior", "14"], {}
    for size in (1, 2, 3):
        patches = [f"observe, told = train.Joslim.observe, []\n"
                   f"def then(sampler, losses, *where):\n"
                   f"    told.append(losses.double())\n"
                   f"    train.torch.save(told, '{tmp_path}/{size} {rank}.pt')\n"
                   f"    observe(sampler, losses, *where)\n"
                   f"train.Joslim.observe = then" for rank in range(size)]  # fmt: skip
        assert ends(two([*flags, "--out", str(tmp_path / str(size))], patches)) == (size * (0,), "")
        told[size], *others = (torch.load(tmp_path / f"{size} {rank}.pt") for rank in range(size))
        for other in others:
            torch.testing.assert_close(other, told[size], rtol=0, atol=0)
    assert [len(losses) for losses in told[1]] == ([15, 17, *8 * [2]] if method == "joslim" else [0, *6 * [2], 3, *9 * [2]])
    for size in (2, 3):
        torch.testing.assert_close(told[size], told[1], rtol=1e-5, atol=0)


OFFLINE = "import torchvision; torchvision.datasets.mnist.download_and_extract_archive = None"
LATE = "fails = train.World.first_to_fail; train.World.first_to_fail = lambda w: (train.time.sleep(0.5), fails(w))[1]"
OTHERWISE = "parse = train.parse_args; train.parse_args = lambda argv: parse([*argv, *{}])"
OTHER_DATA = ("load = train.load_arrays\n"
              "train.load_arrays = lambda *a: ((p := load(*a))[0][0][-1, 0, 0, 0].bitwise_xor_(1), p)[1]")  # fmt: skip
DRIFT = ("step = train.sandwich_step\n"
         "train.sandwich_step = lambda net, *a, **k: (net.fc.bias.data.add_(1e-6), step(net, *a, **k))[1]")  # fmt: skip


@pytest.mark.parametrize("flags, patches, word, codes", [
    ("tiny --tau 0", ("", ""), "--tau: expected", {1, 2}),
    ("tiny --data-dir /nowhere", ("", ""), "/nowhere is not a folder", {1, 2}),
    ("tiny --data kmnist --download", (OFFLINE, OFFLINE), "--download: kmnist could not be fetched", {1, 2}),
    ("tiny --data kmnist --download", (OFFLINE, f"{OFFLINE}; {LATE}"), "--download: kmnist could not be fetched", {1, 2}),
    ("tiny --batch-size 33", ("", ""), "does not divide among 2 processes", {1, 2}),
    ("tiny --lr 1e30", ("", ""), "Try a smaller --lr", {1}),
    ("tiny", ("", OTHERWISE.format(["--label-smoothing", "0.5"])), "--label-smoothing: ", {1, 2}),
    ("tiny", ("", OTHER_DATA), "--data-dir: ", {1, 2}),
    ("tiny --method slim", ("", DRIFT), "step 2: the processes have different", {1}),
    ("photos", ("", "decode = train.decode; train.decode = lambda path: decode('/dev/null')"), "not a readable image", {1, 2}),
    ("photos", ("", "train.decode = lambda path: os.kill(os.getpid(), signal.SIGKILL)"), "another process has gone", {1, -9}),
    ("photos", ("", "train.FolderImages.__getitem__ = lambda *_: {}['bug']"), "KeyError: 'bug'", {1}),
    ("photos", ("", "train.evaluate = lambda *_: {}['bug']"), "KeyError: 'bug'", {1}),
])  # fmt: skip
def test_a_fault_is_said_once(flags, patches, word, codes, request, tmp_path):
    """Of both processes, or of process 1 alone, which meets a broken image, is killed, has a bug, was started differently or
    comes to differ: the other leaves without a word of its own, and nothing is saved."""
    data, *more = flags.split()
    seen, err = ends(two([*request.getfixturevalue(data), *more, "--out", str(tmp_path / "out")], patches), 20)
    bug = "bug" in patches[1]
    assert set(seen) <= codes and max(codes, key=abs) in seen and word in err, (seen, err)
    assert err.count("Traceback") == bug and (err.count("\n") == 1 or bug and "train.py: " not in err), err
    assert data == "photos" or not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("env, word", [
    ({"WORLD_SIZE": "4", "RANK": "0"}, "MASTER_ADDR expected"), ({"WORLD_SIZE": "4"}, "RANK expected"),
    ({"WORLD_SIZE": "four", "RANK": "0"}, "'four'"), ({"WORLD_SIZE": "2", "RANK": "zero"}, "'zero'"),
    ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "no process 2 of 2"),
    ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "http"}, "'http'"),
    ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "9"}, "localhost:9"),
])  # fmt: skip
def test_processes_that_do_not_meet(env, word, tiny, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "PATIENCE", timedelta(seconds=1))
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert "torchrun" in refused(word, *tiny, "--out", tmp_path)


def test_a_master_that_does_not_answer_is_waited_for_aloud(tiny, tmp_path):
    env = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    sooner = "import threading; Timer = threading.Timer; threading.Timer = lambda seconds, *how: Timer(seconds / 20, *how)"
    run = Forked([*tiny, "--out", str(tmp_path)], env, sooner)
    run.await_line("waiting for process 0 at 127.0.0.1:9, for 30 minutes at most")
    os.kill(run.pid, signal.SIGINT)
    assert run.finish(5)[0] == -signal.SIGINT


# ------------------------------------------------------------------------------ terminals, file systems, workers


@pytest.mark.parametrize("patch", [
    "sys.stdout.reconfigure(encoding='ascii', errors='strict'); sys.stderr.reconfigure(encoding='ascii', errors='strict')",
    "read, write = os.pipe(); os.close(read); os.dup2(write, 1); os.dup2(write, 2)",  # a pipe whose other end has gone
    "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)", "os.dup2(os.open('/dev/full', os.O_WRONLY), 2)",
    "sys.stdout = sys.stderr = None", "master, slave = os.openpty(); os.dup2(slave, 1); os.close(slave); os.close(master)",
])  # fmt: skip
def test_no_run_depends_on_its_terminal(patch, tiny, tmp_path):
    """What a terminal cannot show is escaped; one that is gone, or a full disk behind it, is done without."""
    flags = [*tiny, "--method", "slim", "--out", str(tmp_path / "Bögen 漢字")]
    assert Forked(flags, patch=patch).finish() == (0, "")
    assert read_front(tmp_path / "Bögen 漢字")
    code, err = Forked(flags, patch=patch).finish()
    assert code == 2 and ("ascii" not in patch or "B\\xf6gen \\u6f22" in err) and "Traceback" not in err


@pytest.mark.parametrize("patch, word, code", [
    ("n = os.open('/', 0); import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (n + 3, n + 3))", "Too many open", 2),
    ("import torch; torch.utils.data.DataLoader.__iter__ = lambda *_: "
     "fail(RuntimeError('unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)'))",
     "Too many open files", 2),
    ("train.evaluate = lambda *_: fail(RuntimeError(\"can't start new thread\"))", "new thread; the last checkpoint", 2),
    ("train.find_front = lambda *_: fail(TimeoutError(110, 'Connection timed out'))", "timed out", 2),
    ("train.thin = lambda *_: fail(MemoryError())", "needs less", 2),
    ("signal.signal(signal.SIGHUP, signal.SIG_IGN); loop = train.train; "  # as nohup has it
     "train.train = lambda run: (os.kill(os.getpid(), signal.SIGHUP), loop(run))", "", 0),
    ("import concurrent.futures as c; main = train.main; "  # in a thread
     "train.main = lambda argv: c.ThreadPoolExecutor().submit(main, argv).result()", "", 0),
    ("class Tee:\n    def __init__(self, s): self.write = s.write\nsys.stdout = Tee(sys.stdout)", "", 0),
    ("class Bad:\n    def write(self, t): raise AttributeError('x')\nsys.stdout = Bad()", "", 0),
    ("here = os.path.abspath(train.__file__); import tempfile; os.chdir(d := tempfile.mkdtemp()); loop = train.train; "
     "train.train = lambda run: (os.rmdir(d), os.kill(os.getpid(), 15), loop(run))", "stopped at step 1", 143),
    ("import multiprocessing; multiprocessing.current_process()._config['daemon'] = True", "", 0),
])  # fmt: skip
def test_what_the_machine_does_is_one_line(patch, word, code, photos, tmp_path):
    """Whatever raises it, wherever: no traceback, and nothing lost that was saved."""
    fail = "def fail(e): raise e\n"
    seen, err = Forked([*photos, "--workers", "2", "--out", str(tmp_path / "o")], patch=fail + patch).finish()
    assert seen == code and "Traceback" not in err and err.count("\n") == (code != 0) and word in err, (seen, err)


@pytest.mark.parametrize("failure", [ImportError("libfreetype.so.6"), SystemExit(3), RuntimeError("no latex\nfound")])
def test_a_broken_matplotlib_costs_the_picture(failure, copied, tiny, monkeypatch, capsys):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise failure

    monkeypatch.setitem(sys.modules, "matplotlib.figure", Broken("matplotlib.figure"))
    (copied / "front.png").unlink(missing_ok=True)
    assert train.main([*tiny, "--resume", "--out", str(copied)]) == 0
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line.startswith("no front.png: ")] and not err
    assert not (copied / "front.png").exists()


def test_file_systems_without_locks(tiny, tmp_path, monkeypatch, capsys):
    for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, None):  # None: a system that has no fcntl

        def lockf(*_):
            raise OSError(number, "no locks")  # noqa: B023

        monkeypatch.setattr(train, "fcntl", number and types.SimpleNamespace(lockf=lockf, LOCK_EX=2, LOCK_NB=4))
        assert train.main([*tiny, "--method", "slim", "--epochs", "1", "--out", str(tmp_path / str(number))]) == 0
        assert "no locks on this file system" in capsys.readouterr().out


def test_home_folders(tiny, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    flags = [*tiny, "--method", "slim", "--epochs", "1"]
    assert train.main([*flags, "--out=~/run"]) == 0 and (tmp_path / "run" / "front.csv").exists()
    assert train.main([*flags, "--search=~/run", "--method=twostage", "--out=~/again"]) == 0
    assert not (tmp_path / "~").exists()
    refused(str(tmp_path / "none"), *flags, "--data-dir=~/none")
    refused("--out: expected a folder", *flags, "--out=~nobody-of-this-name/x")


@pytest.mark.parametrize("number", [signal.SIGBUS, signal.SIGKILL, signal.SIGSEGV])
def test_a_loading_process_that_dies(number, photos, tmp_path):
    """Of a full /dev/shm, of too much memory, of a decoder's fault: one line says what to change."""
    flags = [*photos, "--workers", "2", "--out", str(tmp_path)]
    in_a_worker = f"os.kill(os.getpid(), {number:d}) if torch.utils.data.get_worker_info() else decode(path)"
    run = Forked(flags, patch=f"import torch; decode = train.decode; train.decode = lambda path: {in_a_worker}")
    code, err = run.finish()
    assert code == 2 and err.count("train.py: ") == 1 and "Traceback" not in err, err  # beside torch's own words
    assert "--workers" in err and "--shm-size" in err and not in_session(run.pid)


def test_nothing_of_a_run_is_overwritten(finished, tiny, refused, tmp_path):
    """Whichever file was kept. Nor is a front without a checkpoint to go on from, or another program's log."""
    for name in ("", "checkpoint.pt", "checkpoint.previous.pt", "front.csv", "front.pt", "front.png"):
        out = tmp_path / f"only {name}"
        shutil.copytree(finished, out, ignore=lambda _, names: {*names} - {name} if name else ())  # noqa: B023
        if name == "front.png":  # which a run has where matplotlib is
            (out / name).write_bytes(b"a drawing")
        before = {p.name: p.read_bytes() for p in out.iterdir()}
        refused("already holds a run; continue it with --resume", *tiny, "--out", out)
        if name.startswith("front"):
            refused(f"holds {name}, but no checkpoint", *tiny, "--out", out, "--resume")
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_no_room_for_what_a_run_leaves(finished, copied, tiny):
    """Wherever in a file the disk is full: one line, and the checkpoint stands. (Forked: the limit is the process's.)"""
    patch = ("import resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
             "save = train.save_tensors; train.save_tensors = lambda path, *a, **k: (path.name == 'front.pt' and "
             "resource.setrlimit(resource.RLIMIT_FSIZE, (N, N)), save(path, *a, **k))")  # fmt: skip
    before = (finished / "front.pt").read_bytes()
    for size in (4096, len(before) // 2, len(before) - 1):
        run = Forked([*tiny, "--out", str(copied), "--resume"], patch=patch.replace("(N, N)", f"({size}, {size})"))
        code, err = run.finish()
        assert code == 2 and err.count("\n") == 1 and "could not be written" in err, err
        assert (copied / "front.pt").read_bytes() == before


@pytest.mark.parametrize("harm", [
    lambda run: run.rename(run.with_name("moved")), lambda run: (run / "log.jsonl").unlink(),
    lambda run: (run.rename(run.with_name("moved")), run.mkdir(), (run / "checkpoint.pt").write_bytes(b"another's")),
    lambda run: ((run / "log.jsonl").unlink(), (run / "log.jsonl").write_bytes(b"another's")),
])  # fmt: skip
@pytest.mark.parametrize("when", ["save", "report"])
def test_a_folder_that_is_taken_away(when, harm, tiny, refused, tmp_path, monkeypatch):
    """The state goes into a new folder; what has come into the old one's place stays as it is."""
    fn, run = getattr(train.Run, when), tmp_path / "run"

    def after(self, *args):
        if self.step == (4 if when == "save" else 8):
            harm(run)
        return fn(self, *args)

    monkeypatch.setattr(train.Run, when, after)
    flags = [*tiny, "--method", "slim", "--out"]
    out = Path(re.search(r"all saved in (\S+):", refused("all saved in", *flags, run, code=1))[1])
    assert out.parent == tmp_path and out.name.startswith("run.")
    assert not (run / "front.csv").exists()
    for path in (run / "log.jsonl", *([run / "checkpoint.pt"] if (tmp_path / "moved").exists() else [])):
        assert not path.exists() or path.read_bytes() == b"another's"
    monkeypatch.undo()
    if when == "report":
        assert (out / "front.csv").exists()
    else:
        assert train.main([*flags, str(out), "--resume"]) == 0 and read_state(out)["step"] == 8


def test_restarts_continue_what_their_job_began(finished, tiny, tmp_path):
    """torchrun --max-restarts starts a refused run again: a refusal stays one. Its store outlives the processes."""
    store = functools.partial(torch.distributed.TCPStore, "127.0.0.1", 0, is_master=True)
    world, args = train.World(), lambda out: train.parse_args([*tiny, "--out", str(out)])
    world.job = store()
    for resumes in (False, True):
        with train.run_folder(mine := args(tmp_path / "new"), world):
            assert mine.resume == resumes
            (mine.out / "checkpoint.pt").write_bytes(b"")
    for out, job in ((finished, world.job), (tmp_path / "new", store())):  # another job's
        world.job = job
        for _ in range(2):
            with pytest.raises(train.UserError, match="already holds a run"), train.run_folder(args(out), world):
                pass


@pytest.mark.parametrize("step, rest", [(5, b""), (5, b'{"event": "tr'), (1, b"half"), (7, b"\n")])
def test_the_log_has_each_step_once(step, rest, tiny, tmp_path, monkeypatch):
    """A run killed between two checkpoints, in the midst of a line."""

    def killed(at, *_):
        if at == step:
            raise KeyboardInterrupt
        return 0.1

    flags = [*tiny, "--method", "slim", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", killed)
        assert train.main(flags) == 130
    with open(tmp_path / "log.jsonl", "ab") as f:
        f.write(rest)
    assert train.main([*flags, "--resume"]) == 0
    assert [e["step"] for e in read_log(tmp_path, "train")] == [*range(1, 9)]


def test_the_log_has_all_steps_of_a_checkpoint(tiny, tmp_path, monkeypatch):
    """However seldom a line is due; or a run that is often stopped would have none, and not notice a loss at chance."""
    run_until(4, [*tiny, "--log-seconds", "999", "--out", str(tmp_path)], monkeypatch)
    assert [e["step"] for e in read_log(tmp_path, "train")] == [2, 4]


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_another_programs_log_stays(resume, tiny, refused, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"loss": 0.1}\n')
    refused("holds a log.jsonl that is not a run's", *tiny, "--out", tmp_path, *resume)
    assert [*tmp_path.iterdir()] == [tmp_path / "log.jsonl"] and (tmp_path / "log.jsonl").read_text() == '{"loss": 0.1}\n'


def test_a_folder_in_use(tiny, refused, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"event": "not a whole line')
    code = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / "log.jsonl"], **pipes)
    other.stdout.readline()
    refused("in use", *tiny, "--out", tmp_path, "--resume")
    other.communicate()
    assert (tmp_path / "log.jsonl").read_text() == '{"event": "not a whole line'
    assert train.main([*tiny, "--method", "slim", "--out", str(tmp_path), "--resume"]) == 0
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["event"] == "settings"


# ------------------------------------------------------------------------------ damage
# Compared with the unbroken run, or with the one line on stderr that names the fault.


def damage(path, how):
    raw, largest = bytearray(path.read_bytes()), max(zipfile.ZipFile(path).infolist(), key=lambda part: part.file_size)
    if how == "flipped":  # one bit of one weight
        raw[largest.header_offset + largest.file_size // 2] ^= 16
    if how == "hole":  # a page that was never written
        raw[largest.header_offset + 512 : largest.header_offset + 4096] = bytes(4096 - 512)
    path.write_bytes({"truncated": raw[:-200], "empty": b"", "garbage": os.urandom(5000)}.get(how, raw))


def contents(folder):
    """Of what a run may not touch where it is refused; its log says what was tried."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".pt", ".csv")}


RAW, LABELS, TEN = "FashionMNIST/raw", "train-labels-idx1-ubyte.gz", "cifar-10-batches-py"


@pytest.mark.parametrize("kind, change", [
    ("imagenet", lambda root: picture().save(root / "train/cat/3.jpeg")),
    ("imagenet", lambda root: (root / "train/cat/3.jpeg").unlink()),
    ("imagenet", lambda root: (root / "train/cat/3.jpeg").rename(root / "train/cat/99.jpeg")),
    ("imagenet", lambda root: (root / "val/dog/3.jpeg").unlink()),
    ("imagenet", lambda root: (p := root / "train/cat/3.jpeg").write_bytes(p.read_bytes()[:-1] + b"x")),  # of the same size
    ("imagenet", lambda root: [shutil.copytree(root / part / "cat", root / part / "cow") for part in ("train", "val")]),
    ("fashion-mnist", lambda root: write_idx(root / RAW / LABELS, torch.arange(96).flip(0).byte() % 10)),
    ("fashion-mnist", lambda root: write_idx(root / RAW / "t10k-images-idx3-ubyte.gz", noise(20, 28, 28))),
])  # fmt: skip
def test_a_run_knows_its_data(kind, change, make_data, refused, tmp_path):
    """What has changed between stop and --resume, or --search, would move images between held-out and training."""
    flags = [*QUICK, *make_data(kind), "--arch", "resnet8", "--image-size", "16", "--epochs", "1"]
    run = [*flags, "--method", "slim", "--out", str(tmp_path / "run"), "--resume"]
    assert train.main(run) == 0
    shutil.copytree(tmp_path / kind, tmp_path / "moved")  # the same files in another place are the same data
    assert train.main([*run, "--data-dir", str(tmp_path / "moved")]) == 0
    about = read_state(tmp_path / "run")["data"]
    assert about["classes"] == (["cat", "dog"] if kind == "imagenet" else torchvision.datasets.FashionMNIST.classes)
    for path in (tmp_path / kind).rglob("*ubyte"):
        path.unlink()  # unpacked
    change(tmp_path / kind)
    before = contents(tmp_path / "run")
    for again in (run, [*flags, "--search", tmp_path / "run", "--out", tmp_path / "new"]):
        refused("had other images than", *again)
    assert contents(tmp_path / "run") == before


class Evil:
    """Pickled, it makes a folder where it is read."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


READERS = {  # of a finished run's files: which one, the flags, and what each says of one that is damaged
    "resume": ("checkpoint.pt", lambda tiny, run: [*tiny, "--out", run, "--resume"], "checkpoint.pt: not a "),
    "search": ("checkpoint.pt", lambda tiny, run: ["--search", run, "--out", run.parent / "new"], "checkpoint.pt: not a "),
    "export": ("front.pt", lambda tiny, run: ["--out", run, "--export", "0.9"], "--export: "),
    "init": ("front.pt", lambda tiny, run: [*tiny, "--init", run / "front.pt", "--out", run.parent / "new"], "front.pt: not "),
}


@pytest.mark.parametrize("how", ["truncated", "flipped", "hole", "empty", "garbage", "evil", "something else", "gone"])
@pytest.mark.parametrize("reader", READERS)
def test_damaged_files(reader, how, copied, tiny, refused, tmp_path):
    """Whatever reads it says so in one line, believes and runs none of it, and touches nothing."""
    name, flags, word = READERS[reader]
    for path in (copied / name, copied / "checkpoint.previous.pt"):  # which serves else: see below
        if how in ("evil", "something else"):
            torch.save({"model": Evil(tmp_path / "ran")} if how == "evil" else [1, 2], path)
        elif how == "gone":
            path.unlink()
            word = "holds front.csv, but no checkpoint" if reader == "resume" else f"{name}"
        else:
            damage(path, how)
    before = contents(copied)
    err = refused(word, *flags(tiny, copied))
    assert reader != "resume" or how == "gone" or err.count(": not a ") == 2  # names both
    assert contents(copied) == before and not (tmp_path / "ran").exists() and not list((tmp_path / "new").rglob("*.pt"))


def test_an_older_checkpoint_serves(finished, copied, tiny, capsys):
    """The damaged one is kept, under another name."""
    damage(copied / "checkpoint.pt", "flipped")
    damaged = (copied / "checkpoint.pt").read_bytes()
    assert train.main([*tiny, "--out", str(copied), "--resume"]) == 0
    assert "checkpoint.pt: not a readable" in capsys.readouterr().out
    assert same_run(finished, copied) and (copied / "checkpoint.damaged.pt").read_bytes() == damaged


@pytest.mark.parametrize("failure", [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle"),
                                     MemoryError(), RuntimeError("can't allocate memory: you tried ...")])  # fmt: skip
def test_a_read_that_failed_is_not_damage(failure, copied, tiny, refused, monkeypatch):
    def fail(*_, **__):
        raise failure

    module, name = (models, "open") if isinstance(failure, OSError) else (torch, "load")
    monkeypatch.setattr(module, name, fail, raising=False)
    before = contents(copied)
    for reader in ("resume", "export"):
        assert re.search(r"Input/output|Stale|needs less", refused("", *READERS[reader][1](tiny, copied)))
    assert contents(copied) == before


@pytest.mark.parametrize("name, odd, reader, word", [
    ("checkpoint.pt", lambda good: good | {"format": 5}, "resume", f"version of this code (format 5, here {train.FORMAT})"),
    ("checkpoint.pt", lambda good: {k: v for k, v in good.items() if k != "settings"}, "search", "not a checkpoint"),
    ("checkpoint.pt", lambda good: good | {"step": good["steps"] - 1}, "search", "at step 7 of 8"),
    ("front.pt", lambda good: good["model"], "export", "not a front.pt"),
    ("front.pt", lambda good: good | {"format": 99}, "export", "not a front.pt"),
    ("front.pt", lambda good: good | {"model": [1]}, "export", "front.pt: "),
    ("front.pt", lambda good: good | {"statistics": None}, "export", "front.pt: "),
    ("front.pt", lambda good: good | {"statistics": good["statistics"][:, 1:]}, "export", "front.pt: "),
    ("front.pt", lambda good: good | {"network": None}, "export", "front.pt: "),
    ("front.pt", lambda good: good | {"network": good["network"] | {"more": 1}}, "export", "front.pt: "),
    ("front.pt", lambda good: good | {"network": good["network"] | {"num_classes": 3}}, "export", "front.pt: "),
    ("front.pt", lambda good: good | {"front": {}}, "export", "front.pt: "),
    ("front.pt", lambda good: torchvision.models.resnet18().state_dict(), "init", "not weights of this network"),
    ("front.pt", lambda good: {}, "init", "not weights of this"), ("front.pt", lambda good: [1, 2], "init", "not readable"),
    ("front.pt", lambda good: {"model": 3}, "init", "not readable"),
    ("front.pt", lambda good: {"conv1.weight": 3}, "init", "not weights of this"),
])  # fmt: skip
def test_files_of_something_else(name, odd, reader, word, copied, tiny, refused):
    torch.save(odd(torch.load(copied / name, weights_only=True)), copied / name)
    before = contents(copied)
    refused(word, *READERS[reader][1](tiny, copied))
    assert contents(copied) == before and not list((copied.parent / "new").glob("*.pt"))
    if name == "front.pt":
        refuses("^[^\n]*front.pt: [^\n]*$", models.load, str(copied / name))


def test_runs_of_something_else(copied, tiny, refused, tmp_path, monkeypatch):
    """What decides a run's numbers must be as it was; what is exported, within what there is."""
    monkeypatch.chdir("/")
    for reader, word, *more in (
        ("resume", "--arch resnet8, this one mbv2; do as it has, or", "--arch", "mbv2"),
        ("resume", "--amp False, this one True; do as it has, or", "--amp"),  # as one made on a GPU says without
        ("resume", "--fresh-widths False, this one True; do as it has, or", "--fresh-widths"),
        ("resume", "--init None, this one /x; do as it has, or", "--init", "x"),  # whole, however it is called
        ("search", "that run has --arch resnet8", "--arch", "mbv2"), ("search", "has --init None", "--init", "x"),
        ("search", "that run has --epochs 4", "--epochs", "5"), ("search", "nowhere/checkpoint.pt", "--search", "/nowhere"),
        ("search", "no --search", "--export", "0.5"),
        ("export", "the smallest needs", "--export", "0.01"), ("export", "--export: expected", "--export", "x"),
        ("export", "/nowhere is not a folder", "--data-dir", "/nowhere"),
        ("export", "nowhere/checkpoint.pt", "--out", "/nowhere"),
        ("export", "that run has --arch resnet8", "--arch", "resnet20"),
        ("export", "that run has --image-size 8", "--image-size", "12"),
    ):  # fmt: skip
        before = contents(copied)
        refused(word, *READERS[reader][1](tiny, copied), *more)
        assert contents(copied) == before and not list(copied.glob("*.pt2"))
    refused("needs --out", "--finetune", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("one process", "--out", copied, "--export", "0.9")  # of whose images another would be told to take its share
    refuses("front.pt: ", models.load, str(copied / "front.pt"), net=nn.Sequential(nn.Conv2d(1, 4, 3)))


def after_steps(change, monkeypatch):
    """Has `change(n, net, losses)` come after the run's n-th step; what it returns are that step's losses."""
    step, count = train.sandwich_step, itertools.count(1)
    monkeypatch.setattr(train, "sandwich_step", lambda net, *rest, **how: change(next(count), net, step(net, *rest, **how)))


@pytest.mark.parametrize("fall, bad, kept", [
    ("never", (), 6), ("at 3", range(3, 9), 2), ("at 5", range(5, 9), 4), ("at 6, back at 7", (6,), 4),
    ("from the start", range(1, 9), 6),
])  # fmt: skip
def test_a_loss_back_at_chance_is_told_and_keeps_what_was_before(fall, bad, kept, tiny, tmp_path, capsys, monkeypatch):
    after_steps(lambda n, net, losses: losses * 0 + (2.5 if n in bad or n > 8 else 0.1), monkeypatch)
    assert train.main([*tiny, "--method", "slim", "--out", str(tmp_path)]) == 0  # two steps an epoch, a line each
    out = capsys.readouterr().out
    assert out.count("loss is back at chance") == (fall not in ("never", "from the start"))
    assert torch.load(tmp_path / "checkpoint.previous.pt", weights_only=True)["step"] == kept
    if fall == "at 3":  # nor does a resumed run forget it
        shutil.copy(tmp_path / "checkpoint.pt", tmp_path / "last.pt")
        assert train.main([*tiny, "--method", "slim", "--out", str(tmp_path), "--resume"]) == 0
        assert torch.load(tmp_path / "checkpoint.previous.pt", weights_only=True)["step"] == 2


@pytest.mark.parametrize("flags, poor", [("--lr 1000", True), ("--lr 0", True), ("--epochs 30 --lr 0.3", False)])
def test_a_front_at_chance_is_told(flags, poor, tiny, tmp_path, capsys):
    """Its images are noise: what is learnt of them tells on nothing; but the same images as a test can be learnt by heart."""
    root = write_data("fashion-mnist", tmp_path / "data")
    for kind in () if poor else ("images-idx3", "labels-idx1"):
        shutil.copy(root / RAW / f"train-{kind}-ubyte.gz", root / RAW / f"t10k-{kind}-ubyte.gz")
    flags = [*tiny, "--data-dir", str(root), "--method", "slim", *flags.split(), "--out", str(tmp_path / "out")]
    assert train.main(flags) == 0
    out = capsys.readouterr().out
    assert ("no network is better than chance: to say the commonest class is right for 10.00 %" in out) == poor
    said = re.search(r"within its error: ([\d.]+) % with (\d+)% of its flops, (\d+)% of its params, (\d+)% of its memory", out)
    assert (said is None) == poor
    if said:  # the first row, by rising cost, that is as good
        rows = read_front(tmp_path / "out")
        full = rows[-1]
        row = next(r for r in rows if float(r["top1"]) >= float(full["top1"]) - float(full["top1_stderr"]))
        shares = (f"{int(row[cost]) / int(full[cost]):.0%}".rstrip("%") for cost in train.COSTS)
        assert said.groups() == (f"{float(row['top1']):.2f}", *shares)


@pytest.mark.parametrize("more, poor", [
    ("", False), ("--tau 4", True), ("--num-prior 20 --method slim", False), ("--num-prior 16 --method twostage", True),
])  # fmt: skip
def test_a_search_without_its_gp_is_told(more, poor, tiny, tmp_path, capsys):
    assert train.main([*tiny, *more.split(), "--out", str(tmp_path)]) == 0
    assert ("end before the GP's first proposal" in capsys.readouterr().out) == poor


def test_what_is_not_finite_reaches_no_checkpoint(tiny, refused, tmp_path, monkeypatch):
    """Neither a loss, nor a gradient whose losses are finite."""
    err = refused("Try a smaller --lr", *tiny, "--lr", "1e30", "--out", tmp_path / "loss", code=1)
    assert re.search(r"step 2: loss \w+ of .* at learning rate 1.25e\+29", err)
    few = ["--batch-size", "2", "--eval-images", "2", "--held-out", "2"]  # of whose 1 x 1 maps BatchNorm makes 1 and -1
    word = "Try a larger --batch-size: BatchNorm averages over 2 images"
    refused(word, *tiny, *few, "--lr", "1e30", "--out", tmp_path / "few", code=1)
    assert not list(tmp_path.rglob("*.pt"))

    def overflow(n, net, losses):
        if n == 4:  # the second epoch's last: no later loss betrays it before the weights are saved
            next(net.parameters()).grad[0] = torch.inf
        return losses

    after_steps(overflow, monkeypatch)
    flags = [*tiny, "--method", "slim", "--log-seconds", "99", "--out", tmp_path]
    assert "learning rate" in refused("step 4: a gradient of the full network, widths [", *flags, code=1)
    state = read_state(tmp_path)
    assert state["step"] == 2 and all(v.isfinite().all() for v in state["model"].values())


def test_a_configuration_that_is_not_finite_is_left_out(tiny, refused, tmp_path, capsys, monkeypatch):
    evaluate = train.evaluate

    def one_bad(net, widths, *rest):
        losses = evaluate(net, widths, *rest)
        losses[:1] = torch.nan
        return losses

    monkeypatch.setattr(train, "evaluate", one_bad)
    assert train.main([*tiny, "--out", str(tmp_path)]) == 0
    assert "of 1 configurations is not finite" in capsys.readouterr().out
    sampler = read_state(tmp_path)["sampler"]
    assert sampler["losses"][0].isnan() and sampler["widths"].isfinite().all()
    (bad,) = {str(e["widths"]) for e in read_log(tmp_path, "not finite")}
    assert bad == str(sampler["widths"][:1].tolist())
    monkeypatch.setattr(train, "evaluate", lambda *a: evaluate(*a) * torch.nan)  # but if all are bad
    refused("no configuration's held-out loss is finite", *tiny, "--out", tmp_path / "all", code=1)


# ------------------------------------------------------------------------------ bad input
# One line on stderr and exit code 2 from train.py, a ValueError from everything else; either names what is wrong.


@pytest.mark.parametrize("flags, word", [
    ("--epochs 0", "--epochs: expected a whole number, at least 1"), ("--epochs many", "--epochs: expected a whole number"),
    ("--tau 0", "--tau"), ("--subnets 0", "--subnets"), ("--workers -1", "--workers"), ("--image-size 1", "at least 2"),
    ("--lower 0", "--lower: expected a number in (0, 1]"), ("--lower 1.5", "--lower"), ("--frobnicate", "--frobnicate"),
    ("--lr -1", "--lr: expected a number, at least 0"), ("--lr nan", "--lr"), ("--lr inf", "--lr"),
    ("--label-smoothing 1", "--label-smoothing: expected a number in [0, 1)"), ("--seed 4294967296", "2^32"),
    ("--arch vgg", "--arch vgg: ValueError: arch: unknown 'vgg', choose from resnet8"), ("--data mnist", "--data: invalid"),
    ("--device abacus", "'abacus'"), ("--device meta", "--device: expected cpu, cuda or cuda:N, got 'meta'"),
    ("--batch-size 90", "--batch-size 90 and --held-out 16: there are 96 training images"),
    ("--batch-size 1", "BatchNorm needs two images"), ("--eval-images 1", "--eval-images: expected"),
    ("--calibrate-images 1", "--calibrate-images: expected"), ("--augment imagenet", "none or shift"),
    ("--eval-images 17", "--eval-images 17 is more than --held-out 16"), ("--accumulate 3", "--accumulate 3"),
    ("--search /nowhere", "/nowhere/checkpoint.pt"), ("--method slim --search RUN", "not slim"), ("--out /proc/x", "/proc"),
    ("--data cifar100 --data-dir /nowhere", "/nowhere is not a folder"),
    ("--data cifar10 --data-dir .", "cifar-10-batches-py/data_batch_1: missing"),
    ("--data kmnist --data-dir .", "KMNIST/raw/train-images-idx3-ubyte: missing"),
    ("--data imagenet --data-dir /nowhere", "/nowhere/train is missing"), ("--out=", "--out: expected a folder, got ''"),
    ("--image-size 10000000", "needs less"), ("--init /nowhere.pth --data-dir /nowhere", "--init: /nowhere.pth"),
])  # fmt: skip
def test_bad_flags_are_one_line_and_exit_2(flags, word, tiny, refused, tmp_path):
    refused(word, *tiny, "--out", tmp_path / "out", *flags.split())
    assert not list(tmp_path.rglob("*.pt"))


def test_data_that_lack_their_folder_and_the_help(capsys, monkeypatch):
    with pytest.raises(train.UserError, match="--data-dir: --data cifar10 needs it"):
        train.parse_args(["--data", "cifar10"])
    with pytest.raises(train.UserError, match="--data-dir: --data synthetic reads no files"):  # one's own would not be seen
        train.parse_args(["--data-dir", "."])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "x")
    with pytest.raises(train.UserError, match="LOCAL_WORLD_SIZE is 'x'"):
        train.parse_args([])
    with pytest.raises(SystemExit) as stop:
        train.parse_args(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"{data} {arch}" in out for data, arch in train.RECIPES)


def renamed(root, one, two):
    """The class dog, as train/ and as val/ call it."""
    for part, name in (("train", one), ("val", two)):
        (root / part / "dog").rename(root / part / name)


@pytest.mark.parametrize("kind, harm, word", [
    ("imagenet", lambda root: shutil.rmtree(root / "val"), "val is missing"),
    ("imagenet", lambda root: shutil.rmtree(root / "train"), "train is missing"),
    ("imagenet", lambda root: [shutil.rmtree(p) for p in (root / "train").iterdir()], "train"),
    ("imagenet", lambda root: (root / "val" / "dog").rename(root / "val" / "cow"), "'cow', 'dog'"),
    ("imagenet", lambda root: [p.unlink() for p in (root / "train" / "dog").iterdir()], "dog"),
    ("fashion-mnist", lambda root: (root / RAW / "t10k-labels-idx1-ubyte.gz").unlink(), "t10k-labels"),
    ("fashion-mnist", lambda root: (root / RAW / "train-images-idx3-ubyte.gz").write_bytes(b"x"), "train-images"),
    ("fashion-mnist", lambda root: (root / RAW / "train-images-idx3-ubyte").write_bytes(b"x" * 99), "raw: train images"),
    ("fashion-mnist", lambda root: write_idx(root / RAW / LABELS, torch.arange(96).byte()), "not all of fashion-mnist's 10 classes"),
    ("fashion-mnist", lambda root: write_idx(root / RAW / LABELS, torch.zeros(95).byte()), "95 labels"),
    ("cifar10", lambda root: (root / TEN / "test_batch").write_bytes(b""), "test_batch"),
    ("cifar10", lambda root: (root / TEN / "batches.meta").unlink(), "batches.meta"),
    ("cifar10", lambda root: shutil.rmtree(root / TEN), TEN),
    ("cifar10", lambda root: (root / TEN / "data_batch_3").write_bytes(pickle.dumps(Evil(root / "ran"))), "data_batch_3"),
    # Names that look alike are told apart.
    ("imagenet", lambda root: renamed(root, "caf\u00e9", "cafe\u0301"), r"'caf\xe9'"),
    ("imagenet", lambda root: renamed(root, "dog", "dog "), "'dog '"),
    ("imagenet", lambda root: renamed(root, "d\u043eg", "dog"), r"'d\u043eg'"),
])  # fmt: skip
def test_bad_data_are_one_line_and_exit_2(kind, harm, word, make_data, refused, tmp_path):
    flags = make_data(kind)
    harm(tmp_path / kind)
    refused(word, *QUICK, *flags, "--out", tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.pt")) and not (tmp_path / kind / "ran").exists()


@pytest.mark.parametrize("kind, failure, word", [
    ("fashion-mnist", URLError("no mirror"), "Error downloading train-images"),  # torchvision goes on to more lines
    ("emnist", OSError("no route"), "OSError: no route"),
    ("cifar10", ValueError("no number\nand more"), "ValueError: no number)"),
])  # fmt: skip
def test_downloads_fetch_what_is_missing_or_fail_in_one_line(kind, failure, word, make_data, tmp_path, monkeypatch):
    args = train.parse_args([*make_data(kind), "--download"])

    def fetch(*_, **__):
        raise failure

    for module in (torchvision.datasets.mnist, torchvision.datasets.cifar):
        monkeypatch.setattr(module, "download_and_extract_archive", fetch)
    train.load_arrays(args, train.World().meet("cpu"))  # all is there, if packed: nothing is fetched
    missing = {"fashion-mnist": "train-labels*", "emnist": "*test-images*", "cifar10": "data_batch_3"}[kind]
    for path in [*(tmp_path / kind).rglob(missing)]:  # of EMNIST the training files are there
        path.unlink()
    for folder in (tmp_path / kind, tmp_path / "not" / "there"):
        args.data_dir = folder
        with pytest.raises(train.UserError, match=f"^--download: {kind} could not be fetched") as refused:
            train.load_arrays(args, train.World().meet("cpu"))
        assert word in str(refused.value) and "\n" not in str(refused.value)


def test_more_processes_than_gpus(monkeypatch):
    with pytest.raises(train.UserError, match="GPU 99"):
        train.World().meet("cuda:99")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train.World, "find_others", lambda world, _: vars(world).update(rank=1, local_rank=1, size=2))
    with pytest.raises(train.UserError, match="GPU 1 asked for, this machine has 1"):
        train.World().meet("cuda")


ONE, FAR, X = torch.ones(3), torch.empty(3, device="meta"), torch.rand(5, 2)  # meta: a device that every machine has
IMAGES, LABELS5 = torch.rand(4, 3, 16, 16), torch.zeros(4, dtype=torch.long)
NET, MODEL, UNIT = models.build("resnet8", 5, 16), gp.GP(X, X.sum(1)), (0.0, 1.0)


def total(x):
    return x.sum(-1)


def one_step(x=IMAGES, y=LABELS5, widths=(), **how):
    joslim.sandwich_step(NET, x, y, widths, **how)


def three(widths=None, **more):
    """One with a history of three."""
    made = joslim.Joslim(2, mean_width, num_prior=1, **more)
    made.sample(2)
    made.observe(torch.ones(3))
    made.widths = made.widths if widths is None else widths
    return made


@pytest.mark.parametrize("what, call", [
    ("dim", lambda: joslim.RandomWidths(0)), ("lower", lambda: joslim.UniformWidths(3, lower=math.nan)),
    ("seed", lambda: joslim.RandomWidths(3, seed=2**32 + 5)), ("seed", lambda: joslim.Joslim(3, mean_width, seed=-1)),
    ("num_prior", lambda: joslim.Joslim(3, mean_width, num_prior=0)), ("beta", lambda: joslim.Joslim(3, mean_width, beta=-1)),
    ("ema", lambda: joslim.Joslim(3, mean_width, ema=1.0)),
    ("cost: expected to", lambda: joslim.Joslim(3, lambda a, **_: 2 * mean_width(a))),
    ("cost: expected to", lambda: joslim.Joslim(3, lambda a, **_: 2 - mean_width(a))),
    ("cost: expected finite", lambda: joslim.Joslim(3, lambda a, **_: mean_width(a) * math.nan)),
    ("cost: expected finite", lambda: joslim.Joslim(3, lambda a, **_: a)),
    ("m must", lambda: joslim.UniformWidths(3).sample(0)), ("m must", lambda: three().sample(0)),
    ("keep must", lambda: three().sample(2, 3)), ("keep must", lambda: three().sample(2, 0)),
    ("widths: expected shape", lambda: three(torch.ones(3, 3)).sample(2)),
    ("widths: expected values in", lambda: three(torch.full((3, 2), 0.2)).sample(2)),
    ("losses: expected shape", lambda: three(torch.ones(4, 2)).sample(1)), ("y: expected", lambda: one_step(y=LABELS5[:3])),
    ("y: expected", lambda: one_step(y=LABELS5.float())), ("x: expected at", lambda: one_step(IMAGES.byte())),
    ("x: expected at", lambda: one_step(IMAGES[:0], LABELS5[:0])),
    ("x: expected torch.float32", lambda: one_step(IMAGES.double())),
    ("label_smoothing", lambda: one_step(label_smoothing=1.5)), ("scale", lambda: one_step(scale=math.nan)),
    ("a: this network has 6 widths", lambda: one_step(widths=[ONE])), ("a: widths must lie", lambda: one_step(lower=0.0)),
    ("widths: expected configurations", lambda: one_step(widths=torch.ones(6))),
    ("y: expected", lambda: joslim.evaluate(NET, [], IMAGES, LABELS5[:2])),
    ("x: expected on cpu", lambda: joslim.evaluate(NET, [], FAR, LABELS5)),
    ("x: expected torch.float32", lambda: joslim.calibrate_bn(NET, [IMAGES.double()])),
    ("cost: expected a tensor on cpu", lambda: joslim.pareto_front(ONE, FAR)),
    ("loss: expected", lambda: joslim.pareto_front(ONE * 1j, ONE)), ("k must", lambda: joslim.shortlist(ONE, ONE, 0)),
    ("cost: expected shape", lambda: joslim.shortlist(ONE, torch.ones(4), 2)),
    ("loss: none", lambda: joslim.front_area(ONE * torch.nan, ONE)),
    ("low: no", lambda: joslim.front_area(ONE, ONE, low=0.5)), ("low, high", lambda: joslim.front_area(ONE, ONE, high=0.5)),
    ("x: expected shape", lambda: gp.GP(X[0], ONE)), ("x: expected shape", lambda: gp.GP(X[:0], X[:0, 0])),
    ("x: every value must lie", lambda: gp.GP(X + 1, X[:, 0])), ("y: expected shape", lambda: gp.GP(X, ONE)),
    ("y: every value must lie", lambda: gp.GP(X, X[:, 0].double() + 1e200)),
    ("y: every", lambda: gp.GP(X, X[:, 0] * torch.nan)), ("y: every", lambda: gp.GP(X, X[:, 0] * 1j)),
    ("y: expected a tensor on cpu", lambda: gp.GP(ONE[:, None], FAR)),
    ("hyper: expected shape", lambda: gp.GP(X, X[:, 0], ONE[:2])),
    ("x: expected shape", lambda: MODEL.posterior(torch.rand(3, 4))),
    ("x: expected a tensor on cpu", lambda: MODEL.posterior(X.to("meta"))),
    ("x: every value must lie", lambda: MODEL.posterior(X - 2)), ("max_points", lambda: MODEL.fit(0)),
    ("iterations", lambda: MODEL.fit(iterations=0)), ("beta", lambda: gp.ucb(ONE, ONE, math.nan)),
    ("mean: every", lambda: gp.ucb(ONE / 0, ONE, 1)), ("variance: must", lambda: gp.ucb(ONE, -ONE, 1)),
    ("variance: expected a tensor on cpu", lambda: gp.ucb(ONE, FAR, 1)),
    ("objectives: every", lambda: gp.chebyshev(ONE / 0, ONE)),
    ("weights: expected shape", lambda: gp.chebyshev(ONE, ONE[:2])), ("weights: must", lambda: gp.chebyshev(ONE, -ONE)),
    ("weights: expected a tensor on cpu", lambda: gp.chebyshev(ONE, FAR)), ("rho", lambda: gp.chebyshev(ONE, ONE, rho=-1)),
    ("lower, upper", lambda: gp.optimize_acquisition(total, 1.0, 0.0, 2)),
    ("lower, upper", lambda: gp.optimize_acquisition(total, 0.0, math.inf, 2)),
    ("starts: expected shape", lambda: gp.optimize_acquisition(total, *UNIT, 2, starts=ONE[None])),
    ("steps", lambda: gp.optimize_acquisition(total, *UNIT, 2, steps=0)),
    ("fn: expected", lambda: gp.optimize_acquisition(lambda x: x.sum(), *UNIT, 2)), ("max", lambda: models.WidthGroup(0)),
    ("unknown 'resnet9'", lambda: models.build("resnet9", 5, 16)), ("num_classes", lambda: models.build("mbv2", 0, 32)),
    ("not to 1 inputs a channel", lambda: models.Concatenation(models.Concatenation(NET.groups[0], each=4), NET.groups[1])),
    ("image_size", lambda: models.build("mbv2", 5, 0)), ("in_channels", lambda: models.build("mbv2", 5, 32, 0)),
    ("a: this network", lambda: NET.flops(torch.ones(2, 5))), ("a: widths must lie", lambda: NET.memory(0.0)),
])  # fmt: skip
def test_bad_calls_name_what_is_wrong(what, call):
    refuses(what, call)


def test_losses_that_are_refused_leave_no_trace():
    """Among those of a history whose losses are known."""
    for what, *losses in (
        ("losses: expected", torch.ones(2)), ("losses: must not be negative", torch.tensor([1.0, torch.nan, -1e-9])),
        ("losses, where: expected", torch.ones(1), torch.ones(1)), ("losses, where: expected", 1j * torch.ones(3)),
        ("where: expected", torch.ones(1), torch.tensor([9])), ("where: expected", torch.ones(1), torch.tensor([-1])),
    ):  # fmt: skip
        refuses(what, (one := three()).observe, *losses)
        assert len(one.widths) == 3 and (one.losses == 1).all()


# ------------------------------------------------------------------------------ README
# Compared with what its names, commands and snippets do here.


def test_readmes_map_names_what_exists():
    section = (ROOT / "README.md").read_text().split("## From the paper to the code\n")[1].split("\n#")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    names = [re.findall(r"`((?:models|joslim|gp|train)(?:\.\w+)+)`", row) for row in rows]
    assert all(names) and len(sum(names, [])) >= 12, rows
    for name in sum(names, []):
        module, *path = name.split(".")
        thing = globals()[module]
        for part in path:
            thing = getattr(thing, part)
        assert callable(thing), name


def test_readmes_commands_parse(finished, tmp_path):
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^    .*?train\.py(.*)$", text, re.M)
    assert len(commands) >= 5
    photos = write_data("imagenet", tmp_path)
    for flags in commands:
        flags = flags.replace("RUN", str(finished)).replace("PHOTOS", str(photos))
        train.parse_args(shlex.split(flags, comments=True))


def test_readmes_snippets_run(tmp_path, monkeypatch):
    """One after the other, where the run that they read has its place."""
    monkeypatch.chdir(tmp_path)
    flags = ["--epochs", "1", "--batch-size", "2048", "--image-size", "8", "--held-out", "64", "--front-size", "3"]
    assert train.main(["--device", "cpu", *flags]) == 0
    snippets = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    names = {}
    for code in snippets:
        exec(compile(code, "README.md", "exec"), names)
    assert len(snippets) >= 3
    plain, x = names["plain"], torch.randn(2, 3, 8, 8)
    assert plain(x).shape == (2, 60) and not {type(m) for m in plain.modules()} & {models.Slimmable, *models.LAYERS}
    assert macs_by_hooks(plain, x[:1]) == int(names["row"]["flops"]) and names["name"] in map(str, range(60))
    small, full = names["small"], torchvision.models.mobilenet_v3_small()
    assert type(small) is type(full) and small(torch.randn(2, 3, 64, 64)).shape == (2, 1000)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in full.parameters())
