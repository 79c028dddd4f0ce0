#!/usr/bin/env python3
"""How fast is a joint step on this GPU, what of it is idle, and what do convolution plans cost?

    python .github/experiments/gpu.py               # ten minutes of one GPU, or more
    python .github/experiments/gpu.py --small       # a minute, small sizes, on a CPU: only to see that it works

A joint step is the sandwich rule's: the full network, two random configurations and the smallest, forward and backward, and one
step of SGD. Printed for each network and form: images/s (ten steps, queued together and waited for once), the same
steps with the plain networks of these widths (cut beforehand), the share of the time in which no kernel ran, and the memory
beside that of the full network's step alone. Then whole runs of train.py, with and without bf16. Then `evaluate`'s time for a
configuration that it has not seen, whose convolutions cuDNN makes plans for (plan_cache.py counts them), and for it again.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))
import models  # noqa: E402
from joslim import Replay, evaluate, sandwich_step  # noqa: E402

LOWER, STEPS = 0.42, 10
FORMS = {  # name: bf16, channels_last, fused optimiser, CUDA graph
    "float32, NCHW": (False, False, False, False),
    "float32, channels_last": (False, True, False, False),
    "bf16, channels_last": (True, True, False, False),
    "bf16, channels_last, fused SGD": (True, True, True, False),
    "bf16, channels_last, graph": (True, True, False, True),  # train.py's
}


class Bench:
    """One network in one form, its images and its steps."""

    def __init__(self, arch, size, batch, divisor, bf16, channels_last, fused, graph, device):
        torch.manual_seed(0)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.net = models.build(arch, 1000, size, divisor=divisor).to(device, memory_format=self.layout).train()
        self.x = torch.randn(batch, 3, size, size, device=device).to(memory_format=self.layout)
        self.y = torch.randint(1000, (batch,), device=device)
        self.graph, self.bf16, self.how = graph, bf16, {"lr": 0.01, "momentum": 0.9, "fused": fused or None}
        self.widths = LOWER + (1 - LOWER) * torch.rand(2, self.net.num_widths, dtype=torch.float64)

    def joint(self):
        """A step of the slimmable network, as a function to call again and again."""
        optimizer = torch.optim.SGD(self.net.parameters(), **self.how)

        def gradients(x, y, widths):
            optimizer.zero_grad()
            return sandwich_step(self.net, x, y, widths, LOWER, amp=self.bf16)

        gradients = Replay(gradients) if self.graph else gradients

        def step():
            gradients(self.x, self.y, self.widths)
            optimizer.step()

        return step

    def plain(self, widths):
        """The same of plain networks of these widths."""
        nets = [self.net.extract(a).to(memory_format=self.layout).train() for a in widths]
        optimizer = torch.optim.SGD([p for net in nets for p in net.parameters()], **self.how)

        def step():
            optimizer.zero_grad()
            for net in nets:
                with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.bf16):
                    loss = F.cross_entropy(net(self.x), self.y)
                loss.backward()
            optimizer.step()

        return step


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(step, device, steps):
    """Of one step; `steps` of them are queued before the device is waited for."""
    for _ in range(5):
        step()
    wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait(device)
    return (time.perf_counter() - start) / steps


def idle(step, device):
    """The share of five steps' time in which the GPU ran no kernel."""
    if device.type != "cuda":
        return float("nan")
    wait(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        start = time.perf_counter()
        for _ in range(5):
            step()
        wait(device)
        wall = time.perf_counter() - start
    return 1 - sum(e.self_device_time_total for e in profile.key_averages()) / 1e6 / wall


def peak(step, device):
    """MB that a program of this step takes from the GPU, its weights and what torch keeps for later included."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(5):
        step()
    return torch.cuda.max_memory_reserved() / 1e6


def print_steps(cases, device, steps):
    print(f"{'network':9} {'form':31} {'images/s':>9} {'plain':>9} {'ratio':>6} {'idle':>6} {'MB':>8} {'full alone':>10}")
    for arch, size, batch, divisor in cases:
        for name, form in FORMS.items():
            if any(form[2:]) and device.type != "cuda":
                continue
            bench = Bench(arch, size, batch, divisor, *form, device)
            full, smallest = torch.ones_like(bench.widths[0]), torch.full_like(bench.widths[0], LOWER)
            joint, plain = bench.joint(), bench.plain([full, *bench.widths, smallest])
            times = [seconds(step, device, steps) for step in (joint, plain)]
            share = idle(joint, device)
            del joint, plain
            most, alone = peak(bench.joint(), device), peak(bench.plain([full]), device)
            print(f"{arch:9} {name:31} {batch / times[0]:9.0f} {batch / times[1]:9.0f} {times[0] / times[1]:6.2f} {share:6.1%} "
                  f"{most:8.0f} {alone:10.0f}", flush=True)  # fmt: skip
            del bench


def print_plans(cases, device):
    print(f"\n{'network':9} {'divisor':>7} {'history':>7} {'ms a configuration':>19} {'again':>6}, 64 images")
    for arch, size, divisor, n in cases:
        bench = Bench(arch, size, 64, divisor, device.type == "cuda", True, False, False, device)
        widths = LOWER + (1 - LOWER) * torch.rand(n, bench.net.num_widths, dtype=torch.float64)
        times = []
        for _ in range(2):
            wait(device)
            start = time.perf_counter()
            evaluate(bench.net, widths, bench.x, bench.y, bench.bf16)
            wait(device)
            times.append(1e3 * (time.perf_counter() - start) / n)
        print(f"{arch:9} {divisor:7} {n:7} {times[0]:19.1f} {times[1]:6.1f}", flush=True)


def print_run(flags):
    print(f"\npython train.py {' '.join(flags)}", flush=True)
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "train.py", *flags, "--out", out], cwd=PROJECT, capture_output=True, text=True)
        print("\n".join((done.stdout + done.stderr).splitlines()[-8:]))
        print(f"exit code {done.returncode}, {time.perf_counter() - start:.0f} s in all")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--small", action="store_true", help="small sizes on the CPU, whose figures mean nothing")
    args = p.parse_args()
    device = torch.device("cpu" if args.small else "cuda")
    print(f"{'CPU' if args.small else torch.cuda.get_device_name()}, torch {torch.__version__}")
    if args.small:
        print_steps([("resnet20", 32, 8, 1), ("resnet18", 32, 4, 8), ("mbv2", 32, 4, 8)], device, 1)
        print_run("--epochs 1 --batch-size 1024 --tau 4 --front-size 2 --device cpu".split())
        print_plans([("mbv2", 32, 1, 3), ("mbv2", 32, 8, 3)], device)
    else:
        small = [("resnet20", 32, 1024, 1), ("resnet56", 32, 128, 1)]
        print_steps([*small, ("resnet18", 224, 256, 8), ("mbv2", 224, 256, 8), ("mbv2", 224, 128, 8)], device, STEPS)
        for precision in ("--amp", "--no-amp"):
            print_run(["--arch", "resnet20", "--epochs", "2", "--no-fresh-widths", precision])
        print_plans([("mbv2", 224, divisor, n) for n in (20, 150, 400) for divisor in (8, 1)], device)


if __name__ == "__main__":
    main()
