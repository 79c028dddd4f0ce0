#!/usr/bin/env python3
"""The deployable file's size, how long a switch takes, and how well latency is foretold.

    python .github/experiments/deploy.py       # two minutes; nothing else may run meanwhile

One thread. MobileNetV2's ImageNet form with a front of 20 uniform configurations: bytes of front.pt and of one network,
milliseconds of `net.use`. Then `models.measure_latency` for resnet20 (32 x 32, three times) and mbv2 (224 x 224, once), with
other configurations: the relative errors of the formula for the 20 of 80 that it was not fitted to.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import models  # noqa: E402

torch.set_num_threads(1)
torch.manual_seed(0)
network = dict(arch="mbv2", num_classes=1000, image_size=224)
net, k = models.build(**network), 20
widths = torch.linspace(0.42, 1, k, dtype=torch.float64)[:, None].expand(-1, net.num_widths)
columns = {cost: getattr(net, cost)(widths) for cost in ("flops", "params", "memory")}
columns |= dict.fromkeys(("loss", "top1", "top1_stderr", "top5"), torch.ones(k, dtype=torch.float64)) | {"widths": widths}
about = {"classes": [f"class {c}" for c in range(1000)], "mean": [0.0] * 3, "std": [1.0] * 3, "digest": 64 * "0",
         "split": {"seed": 0, "held_out": 10000}}
state = {"format": 1, "network": network, "model": net.state_dict(), "front": columns, "cost": "flops", "latency": None,
         "statistics": models.get_statistics(net).expand(k, -1).clone(), "data": about}  # fmt: skip
with tempfile.TemporaryDirectory() as folder:
    paths = [Path(folder, name) for name in ("front.pt", "one.pt")]
    torch.save(state, paths[0])
    torch.save(net.extract().state_dict(), paths[1])
    front, one = (path.stat().st_size / 1e6 for path in paths)
    net = models.load(str(paths[0]))
times = []
for i in range(100):
    began = time.perf_counter()
    net.use(flops=(0.5, 0.9)[i % 2])
    times.append(1000 * (time.perf_counter() - began))
print(
    f"mbv2, {k} configurations: front.pt {front:.1f} MB, one network {one:.1f} MB; a switch takes {statistics.median(times):.1f} ms"
)

for arch, size, divisor in (("resnet20", 32, 1), ("resnet20", 32, 8), ("mbv2", 224, 1), ("mbv2", 224, 8)):
    net = models.build(arch, 10, size, divisor=divisor).to(memory_format=torch.channels_last)
    for seed in range(3 if arch == "resnet20" else 1):
        _, times, errors = models.measure_latency(net, 0.42, seed=seed, threads=1)
        print(f"{arch}, divisor {divisor}, seed {seed}: {times.min():.2f} to {times.max():.2f} ms; off for unseen networks by "
              f"{errors.median():.1%} (median), {errors.max():.1%} (worst)", flush=True)  # fmt: skip
