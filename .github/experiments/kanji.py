#!/usr/bin/env python3
"""Kanji of Debian's fonts, to be read in fonts that were never trained on: an image folder for `train.py --data imagenet`.

    python .github/experiments/kanji.py --packages           # the Debian packages that it wants, for `apt-get install`
    python .github/experiments/kanji.py DIR                  # DIR/train/<character>/*.png, DIR/val/, and DIR/sample.png

Nothing is installed, and what is installed decides: the faces found are printed, and the same fonts give the same images,
byte for byte. Of each face of each package it is tested which of the 2965 kanji of JIS level 1 it has. A face that looks like
one before it is left out, and so is one that looks like hardly any other: cursive handwriting, whose characters are other
shapes. Packages whose faces look alike are a family, and families are either trained on or tested on, so that no test font is
a sibling of a training font. Classes are characters that all faces have, drawn at random.

Each image is a character in one face at 24 x 24 pixels: turned by up to 12 degrees, sheared, scaled and shifted, blurred, of
random contrast, with noise.
"""

import argparse
import itertools
import random
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

# Debian's fonts with kanji, but for those (ipafont, yozvox-yozfont, cns11643, ...) whose faces others have or that are huge.
PACKAGES = """fonts-aoyagi-kouzan-t fonts-aoyagi-soseki fonts-arphic-bkai00mp fonts-arphic-bsmi00lp fonts-arphic-ukai
    fonts-arphic-uming fonts-cwtex-kai fonts-cwtex-ming fonts-dejima-mincho fonts-dotgothic16 fonts-hanazono fonts-horai-umefont
    fonts-ipaexfont-gothic fonts-ipaexfont-mincho fonts-kiloji fonts-konatu fonts-kouzan-mouhitsu fonts-lxgw-wenkai fonts-migmix
    fonts-monapo fonts-morisawa-bizud-gothic fonts-morisawa-bizud-mincho fonts-motoya-l-cedar fonts-motoya-l-maruberi
    fonts-noto-cjk fonts-oradano-mincho-gsrr fonts-reggae fonts-ricty-diminished fonts-sawarabi-gothic fonts-sawarabi-mincho
    fonts-seto fonts-takao-gothic fonts-takao-mincho fonts-train fonts-umeplus fonts-vlgothic fonts-wqy-microhei fonts-wqy-zenhei
    fonts-yozvox-yozfont-edu""".split()
LEVEL_1 = [bytes((row + 0xA0, cell + 0xA0)).decode("euc_jp") for row in range(16, 48) for cell in range(1, 95)
           if (row, cell) <= (47, 51)]  # fmt: skip
PIXELS, DRAWN = 24, 64
# Faces are compared by the correlation of their ink, on these characters.
COMPARED, SAME, SIBLINGS, CURSIVE = "永東国書道愛鬱語体勝厚劇像線曜議", 0.97, 0.9, 0.65


def draw(font, character):
    """The character in the middle of DRAWN x DRAWN pixels, float in [0, 1]: ink is 1."""
    image = Image.new("L", (DRAWN, DRAWN))
    ImageDraw.Draw(image).text((DRAWN / 2, DRAWN / 2), character, 255, font, anchor="mm")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(DRAWN, DRAWN).float() / 255


def mask(font, character):
    """What the face draws, as bytes: none where it draws nothing, or a fault in its program stops it."""
    try:
        drawn = font.getmask(character)
        return bytes(drawn) if drawn.getbbox() else b""
    except OSError:
        return b""


def known_kanji(font):
    """Those of level 1 that the face draws, and not as it draws what it does not have."""
    small = font.font_variant(size=16)
    none = {b"", mask(small, "\uffff")}
    return {c for c in LEVEL_1 if mask(small, c) not in none}


def faces(package):
    """(name, font) of each face in the package that has at least 2000 of the kanji."""
    listed = subprocess.run(["dpkg", "-L", package], capture_output=True, text=True).stdout.split("\n")
    for path in sorted(p for p in listed if p.lower().endswith((".ttf", ".otf", ".ttc")) and Path(p).exists()):
        for index in range(20):
            try:
                font = ImageFont.truetype(path, DRAWN * 3 // 4, index)
            except OSError:  # no more faces in the file
                break
            known = known_kanji(font)
            if len(known) >= 2000:
                yield f"{package.removeprefix('fonts-')}-{Path(path).stem}-{index}".replace(" ", "_"), font, known


def look(font):
    """By which faces are compared: some characters' ink, blurred a little, of mean 0 and length 1."""
    ink = F.avg_pool2d(torch.stack([draw(font, c) for c in COMPARED])[:, None], 4).flatten()
    ink = ink - ink.mean()
    return ink / ink.norm().clamp_min(1e-9)


def find(packages):
    """Distinct faces {name: (package, font, known)}, and each package's family."""
    kept, looks = {}, {}
    for package in packages:
        for name, font, known in faces(package):
            mine = look(font)
            if all(mine @ other < SAME for other in looks.values()):
                kept[name], looks[name] = (package, font, known), mine
    typical = {name: sum(looks.values()) - mine for name, mine in looks.items()}
    cursive = [name for name, mine in looks.items() if mine @ typical[name] / typical[name].norm() < CURSIVE]
    kept = {name: face for name, face in kept.items() if name not in cursive}
    family = {package: package for package, *_ in kept.values()}
    for one, other in itertools.combinations(kept, 2):
        if looks[one] @ looks[other] > SIBLINGS:
            old, new = family[kept[other][0]], family[kept[one][0]]
            family = {p: new if f == old else f for p, f in family.items()}
    return kept, family


def distort(ink, g):
    """(n, DRAWN, DRAWN) of ink -> n images (n, PIXELS, PIXELS), uint8."""
    n = len(ink)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    angle, scale, shear = uniform(-0.2, 0.2), uniform(0.85, 1.2), uniform(-0.2, 0.2)
    rows = torch.stack([torch.stack([angle.cos(), -angle.sin() + shear], 1), torch.stack([angle.sin(), angle.cos()], 1)], 1)
    theta = torch.cat([rows * scale[:, None, None], uniform(-0.12, 0.12, 2, 1)], 2)
    x = F.grid_sample(
        ink[:, None], F.affine_grid(theta, (n, 1, 3 * PIXELS, 3 * PIXELS), align_corners=False), align_corners=False
    )
    x = F.avg_pool2d(x, 3)
    x = x.lerp(F.avg_pool2d(F.pad(x, [1] * 4, "replicate"), 3, 1), uniform(0, 0.8, 1, 1, 1))[:, 0]
    paper, contrast = uniform(0.7, 1, 1, 1), uniform(0.4, 1, 1, 1)
    x = paper * (1 - contrast * x) + 0.05 * torch.randn(x.shape, generator=g)
    return (255 * x).round().clamp(0, 255).byte()


def show(folder, characters, columns=20):
    """A sheet of images, a character a column: five of the training faces and five of the tests, labelled."""
    sheet, x0 = Image.new("L", (150 + PIXELS * columns, PIXELS * 10 + 8), 255), 150
    for part, text, y0 in (("train", "training fonts", 0), ("val", "test fonts", PIXELS * 5 + 8)):
        names = sorted(path.name for path in (folder / part / characters[0]).glob("*-0.png"))
        ImageDraw.Draw(sheet).text((10, y0 + PIXELS * 2.5), text, 0, ImageFont.load_default(18), anchor="lm")
        for row, name in enumerate(names[:: len(names) // 5][:5]):
            for column, c in enumerate(characters[:columns]):
                sheet.paste(Image.open(folder / part / c / name), (x0 + PIXELS * column, y0 + PIXELS * row))
    sheet.save(folder / "sample.png", optimize=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("dir", type=Path, nargs="?", metavar="DIR")
    p.add_argument("--packages", action="store_true", help="print the packages' names")
    p.add_argument("--classes", type=int, default=200)
    p.add_argument(
        "--each", type=int, default=6, help="training images of each character in each face; half as many for tests"
    )
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    if args.packages or args.dir is None:
        return print(" ".join(PACKAGES))
    torch.set_num_threads(1)
    missing = [name for name in PACKAGES if subprocess.run(["dpkg", "-s", name], capture_output=True).returncode]
    if missing:
        sys.exit(f"kanji.py: fonts are missing: apt-get install {' '.join(missing)}")
    kept, family = find(PACKAGES)
    families = sorted({family[package] for package, *_ in kept.values()})
    random.Random(args.seed).shuffle(families)
    test, count = set(), 0
    for name in families:  # a fifth of the faces, or a little more
        size = sum(family[package] == name for package, *_ in kept.values())
        if count < len(kept) / 5 and size < len(kept) / 5:
            test.add(name)
            count += size
    everywhere = sorted(set.intersection(*(known for *_, known in kept.values())))
    characters = sorted(random.Random(args.seed).sample(everywhere, args.classes))
    print(f"{len(kept)} faces of {len({k[0] for k in kept.values()})} packages in {len(families)} families, {count} of them for "
          f"tests; {len(everywhere)} characters in all faces, {len(characters)} taken")  # fmt: skip
    for number, (name, (package, font, _)) in enumerate(sorted(kept.items())):
        part, each = ("val", max(1, args.each // 2)) if family[package] in test else ("train", args.each)
        g = torch.Generator().manual_seed(1000 * args.seed + number)
        ink = torch.stack([draw(font, c) for c in characters]).repeat_interleave(each, 0)
        for k, pixels in enumerate(distort(ink, g)):
            folder = args.dir / part / characters[k // each]
            folder.mkdir(parents=True, exist_ok=True)
            Image.frombytes("L", (PIXELS, PIXELS), pixels.numpy().tobytes()).save(folder / f"{name}-{k % each}.png")
        print(f"{part:5} {name}", flush=True)
    show(args.dir, characters)


if __name__ == "__main__":
    main()
