#!/usr/bin/env python3
"""The authors' own code beside ours, on the default run's images or on kanji: how good is its front, and how long does it take?

    git clone https://github.com/cmu-enyac/Joslim AUTHORS && git -C AUTHORS checkout 9b743d9
    pip install botorch
    python .github/experiments/vs_authors.py AUTHORS SEED [--kanji DIR]     # the folder that kanji.py made

Their joslim.py, one thread, on a CPU: our images and batches through their loader's interface, a resnet8 of their layers with the 3 x 3
stem of the paper, our learning rate, epochs, rounds and sub-networks of a step, no fresh widths. Patched by text, and each patch must find
its place: devices, the image size, the number of classes, botorch's new name for a fit. Its history is judged, its front chosen, calibrated
and tested as train.py does; and again after our search of its finished weights, which goes on from that history as ours does, with as many
visits. Then our code with --no-fresh-widths (not on kanji). Some ten minutes a seed, on kanji an hour. Caveats: 43 or 106 configurations,
where the paper has 1000; the smallest widths; recipes that were made for our code. Figures go to results/vs-authors/.
"""

import argparse
import csv
import json
import os
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import kanji_resnet8
import runs

sys.path.insert(0, str(runs.PROJECT))
import joslim as ours  # noqa: E402
import models  # noqa: E402
import train  # noqa: E402

PATCHES = [
    ("from botorch.fit import fit_gpytorch_model", "from botorch.fit import fit_gpytorch_mll as fit_gpytorch_model"),
    (".cuda(self.device)", ".to(self.device)"),
    ("torch.cuda.current_device()", "'cpu'"),
    ("num_classes = 100\n", "num_classes = OUR_CLASSES\n"),
    ("self.img_size = 32", "self.img_size = OUR_SIZE"),
    ('"--warmup", type=int', '"--warmup", type=float'),
    ("parameterization, weights = self.sample_arch(", "parameterization, weights = timed(self.sample_arch, "),
    ("start = time.time()\n    joslim.train(args)", "start = time.time()\n    found.append(joslim)\n    joslim.train(args)"),
]


class Loader:
    """Our batches, as their training loop asks for them: an epoch's, or held-out ones without end."""

    def __init__(self, data, which):
        self.data, self.which, self.epoch, self.sampler = data, which, 0, self

    def __len__(self):
        return self.data.steps

    def set_epoch(self, epoch):
        pass

    def __iter__(self):
        if self.which == "train":
            yield from self.data.train(self.epoch)
            self.epoch += 1
        else:
            number = 0
            while True:
                yield tuple(self.data.held_out(number))
                number += 1


def run_theirs(folder, args, data, seconds):
    """Trains by their code -> their object, with its network and history. `seconds`: a list that gets those of each proposal."""
    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = type("SummaryWriter", (), {"__init__": lambda *_, **__: None, "add_scalar": lambda *_: None,
                                                      "add_histogram": lambda *_: None})  # fmt: skip
    lmdb = types.ModuleType("utils.folder2lmdb")
    lmdb.ImageFolderLMDB = None
    sys.modules |= {"torch.utils.tensorboard": board, "utils.folder2lmdb": lmdb}
    del sys.modules["joslim"]
    sys.path.insert(0, str(folder))
    import model as networks
    import utils.drivers as drivers
    from model import slim_resnet
    from model.dyn_model import SlimBasicBlock, SlimBN, SlimConv2d

    class Stem(nn.Module):  # 3 x 3, BatchNorm, ReLU: the paper's
        def __init__(self, reads, writes):
            super().__init__()
            self.conv, self.norm = SlimConv2d(reads, writes, 3, padding=1, bias=False), SlimBN(writes)

        def forward(self, x):
            return self.norm(self.conv(x)).relu()

        def set_out_ch(self, count):
            self.conv.set_out_ch(count)
            self.norm.set_out_ch(count)

    def slim_resnet8(num_classes):
        net = slim_resnet.SlimResNet(SlimBasicBlock, [1, 1, 1], num_classes=num_classes)
        net.features[0] = Stem(3, 16)
        net._initialize_weights()
        return net

    networks.slim_resnet8 = slim_resnet8
    drivers.get_dataloader = lambda *_, **__: (Loader(data, "train"), Loader(data, "held-out"), None)
    source = (folder / "joslim.py").read_text()
    for old, new in PATCHES:
        if old not in source:
            raise ValueError(f"their joslim.py has no {old!r}: is it at 9b743d9?")
        source = source.replace(old, new)

    def timed(fn, first, number, *rest):
        start = time.perf_counter()
        result = fn(first, number, *rest)
        if number > first:  # before, widths are drawn
            seconds.append(time.perf_counter() - start)
            print(f"proposal {len(seconds)}: {seconds[-1]:.1f} s", flush=True)
        return result

    found = []
    flags = dict(name="x", dataset="CIFAR100", network="slim_resnet8", epochs=args.epochs, warmup=args.warmup_epochs, baselr=args.lr,
                 tau=args.tau, wd=args.weight_decay, label_smoothing=0, batch_size=args.batch_size, lower_channel=args.lower,
                 num_sampled_arch=args.subnets, baseline=-3, print_freq=256, prior_points=args.num_prior, scheduler="linear_decay",
                 seed=args.seed)  # fmt: skip
    sys.argv = ["joslim.py", *(str(part) for name, value in flags.items() for part in (f"--{name}", value))]
    exec(compile(source, "joslim.py of the authors", "exec"), {"__name__": "__main__", "timed": timed, "found": found,
                                                                   "OUR_CLASSES": len(data.about["classes"]),
                                                                   "OUR_SIZE": args.image_size})  # fmt: skip
    return found[0]


@torch.no_grad()
def judge(net, widths, args, data):
    """Losses (n,) of their network at these widths, on the whole held-out split, by batch statistics, as train.py judges."""
    losses = []
    for a in widths:
        net.train().set_real_ch(net.decode_wm(a))
        losses.append(sum(F.cross_entropy(net(x), y).item() * len(x) for x, y in data.batches("held-out")) / args.held_out)
    return torch.tensor(losses, dtype=torch.float64)


def search(theirs, args, data):
    """Their widths (n, d) and others that our search finds for their finished weights, as train.py's goes on from a history."""
    same, channels = models.build("resnet8", len(data.about["classes"]), args.image_size), torch.tensor([16, 32, 64])

    def cost(a, relaxed=False):  # theirs are in another order, and no stage has fewer residual channels than the one before
        residual, inner = ((a[..., 0::2] * channels).cummax(-1).values / channels).unbind(-1), a[..., 1::2].unbind(-1)
        return same.flops(torch.stack([residual[0], inner[0], inner[1], residual[1], inner[2], residual[2]], -1), relaxed) / full

    full = same.flops(1.0).item()
    sampler = ours.Joslim(theirs.model.search_dim, cost, args.lower, args.num_prior, args.beta, args.seed)
    sampler.widths = torch.as_tensor(theirs.X, dtype=torch.float64).clamp(args.lower, 1)
    sampler.losses = torch.full((len(theirs.X),), torch.nan, dtype=torch.float64)
    visits = len(theirs.X) + min(len(theirs.X), train.FINAL)
    while True:
        new = sampler.losses.isnan().nonzero()[:, 0]
        sampler.observe(judge(theirs.model, sampler.widths[new].numpy(), args, data), new)
        if len(sampler.widths) >= visits:
            return sampler.widths.numpy()
        sampler.sample(args.subnets)


@torch.no_grad()
def test(net, widths, args, data):
    """Rows (flops, loss, top1, widths) of their network's front among these widths, chosen and tested as train.py does."""
    widths = np.concatenate([np.full((1, net.search_dim), args.lower), np.ones((1, net.search_dim)), widths])
    flops = torch.tensor([float(net.get_flops_from_wm(a)) for a in widths], dtype=torch.float64)
    ranked, cost = judge(net, widths, args, data), flops / flops[1]
    ranked[1] = -torch.inf
    rows = []
    for i in ours.thin(ours.pareto_front(ranked, cost), cost, args.front_size).tolist():
        net.train().set_real_ch(net.decode_wm(widths[i]))
        ours.calibrate_bn(net, data.batches("calibrate"))
        loss, top1, _ = train.score([net.eval()], data.batches("test"))[0].tolist()
        rows.append((flops[i].item(), loss, top1, " ".join(f"{w:.4f}" for w in widths[i])))
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("authors", type=Path)
    p.add_argument("seed", type=int)
    p.add_argument("--kanji", type=Path, metavar="DIR", help="with kanji_resnet8.py's settings")
    own = p.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    kanji = [*kanji_resnet8.SETTINGS, "--data-dir", str(own.kanji.resolve())] if own.kanji else []
    flags, name = [*kanji, "--seed", str(own.seed), "--device", "cpu"], f"{'kanji-' if kanji else ''}{own.seed}"
    args, root = train.parse_args(flags), Path("runs", "vs-authors").resolve()
    data, seconds, folder = train.Data(args, train.World().meet("cpu")), [], own.authors.resolve()
    os.chdir(tempfile.mkdtemp())  # their code leaves files, and would go on from what it finds
    start = time.perf_counter()
    theirs = run_theirs(folder, args, data, seconds)
    total = time.perf_counter() - start
    print(f"{total / 60:.1f} minutes, {sum(seconds) / total:.0%} of them proposals of {np.mean(seconds):.1f} s", flush=True)
    settings = dict(cost="flops", seed=own.seed, data=args.data, arch="resnet8", image_size=args.image_size, epochs=args.epochs,
                    tau=args.tau, subnets=args.subnets, digest=data.about["digest"], torch=torch.__version__)  # fmt: skip
    as_run = dict(method="authors", seconds=total, search_share=sum(seconds) / total, configurations=len(theirs.X),
                  proposals=len(seconds))  # fmt: skip
    keep(f"authors-{name}", settings | as_run, test(theirs.model, theirs.X, args, data))
    start = time.perf_counter()
    widths = search(theirs, args, data)
    searched = dict(method="twostage", trained_as="authors", seconds=time.perf_counter() - start, search_share=1.0,
                    configurations=len(widths))  # fmt: skip
    keep(f"authorssearched-{name}", settings | searched, test(theirs.model, widths, args, data))
    if not kanji:
        runs.queue([(f"joslim-{name}", [*flags, "--no-fresh-widths"])], root)
        runs.keep(root, [f"joslim-{name}"], "vs-authors")


def keep(name, settings, rows):
    out = runs.RESULTS / "vs-authors" / name
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "front.csv", "w", newline="") as f:
        table = csv.writer(f, lineterminator="\n")
        table.writerow(("flops", "loss", "top1", "widths"))
        table.writerows(rows)
    (out / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")


if __name__ == "__main__":
    main()
