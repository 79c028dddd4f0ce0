#!/usr/bin/env python3
"""How many ImageNet-like photos a second does a core decode and augment, and would other ways be faster?

    python .github/experiments/loading.py

100 JPEGs made in code, of 500 x 375 pixels (ImageNet's average) and some 90 KB, in one thread: as train.py loads them (Pillow's
decoder, torchvision's transforms on tensors, seeded for each image); without the seeds, as are the next two: the same transforms
on Pillow's images, and torchvision's decoder instead of Pillow's. The best of five passes each; they take turns.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.transforms import v2 as transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train  # noqa: E402


def make_photos(folder, n=100):
    """Noise at all scales, the finer the fainter, as photos have it."""
    g, paths = torch.Generator().manual_seed(0), []
    for i in range(n):
        scales = (F.interpolate(torch.randn(1, 3, 6 * 2**k, 8 * 2**k, generator=g), (375, 500), mode="bicubic") / 1.2**k
                  for k in range(7))  # fmt: skip
        x = sum(scales)[0]
        x = (120 + 50 * (x - x.mean()) / x.std()).clamp(0, 255).byte().permute(1, 2, 0).contiguous()
        paths.append(Path(folder, f"{i}.jpeg"))
        Image.fromarray(x.numpy()).save(paths[-1], quality=90)
    return paths


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    args = train.parse_args("--data imagenet --data-dir . --workers 0".split())
    with tempfile.TemporaryDirectory() as folder:
        paths = make_photos(folder)
        n, labels = len(paths), torch.zeros(len(paths), dtype=torch.int64)
        images = train.FolderImages(np.array([str(p).encode() for p in paths]), labels, torch.arange(n), args, torch.device("cpu"))
        _, crop, jitter, flip, _ = images.augmented.transforms
        on_tensors, on_images = (transforms.Compose([crop, jitter, flip, *last]) for last in ([], [transforms.PILToTensor()]))
        ways = {
            "train.py": lambda i: images[0, i],
            "without a seed for each image": lambda i: images.augmented(train.decode(str(paths[i]))),
            "transforms on Pillow's images": lambda i: on_images(train.decode(str(paths[i]))),
            "torchvision's decoder": lambda i: on_tensors(torchvision.io.decode_image(str(paths[i]), mode="RGB")),
        }
        best = dict.fromkeys(ways, 0.0)
        for _ in range(5):
            for name, way in ways.items():
                start = time.perf_counter()
                for i in range(n):
                    way(i)
                best[name] = max(best[name], n / (time.perf_counter() - start))
        size = sum(p.stat().st_size for p in paths) / n / 1000
        print(f"{n} photos of {size:.0f} KB, one thread, Pillow {Image.__version__}, torchvision {torchvision.__version__}")
        for name, rate in best.items():
            print(f"{name:30} {rate:5.0f} images/s")
