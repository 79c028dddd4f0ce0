#!/usr/bin/env python3
"""An example of one's own folder: what kind of icon is it? PNGs of Debian's icon themes, with alpha channels, from 22 to 256 pixels.

    apt-get install --no-install-recommends oxygen-icon-theme gnome-icon-theme mate-icon-theme
    python .github/experiments/icons.py DIR                        # DIR/train/<kind>/*.png and DIR/val/
    python train.py --data folder --data-dir DIR                   # no other flag
    python .github/experiments/icons.py DIR --few 300 DIR2         # some 300 of the training images, in one folder of class folders

Nine kinds, as the themes sort them: actions, apps, categories, devices, emblems, emotes, mimetypes, places, status. A name goes to
the training or to the test images in all themes and sizes, so that no test icon is a training icon of another size. Links are left out.
"""

import argparse
import hashlib
import shutil
import sys
from pathlib import Path

THEMES, ROOT = ("oxygen", "gnome", "mate"), Path("/usr/share/icons")
KINDS = "actions apps categories devices emblems emotes mimetypes places status".split()


def icons():
    """(kind, theme, pixels, path) of each, in a fixed order."""
    for theme in THEMES:
        for path in sorted((ROOT / theme).rglob("*.png")):
            size, kind = path.parts[-3], path.parts[-2]
            pixels = size.partition("x")[0]
            if kind in KINDS and pixels.isdigit() and int(pixels) >= 22 and not path.is_symlink():
                yield kind, theme, int(pixels), path


def number(text):
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("dir", type=Path, metavar="DIR")
    p.add_argument("--few", nargs=2, metavar=("N", "DIR2"), help="copy some N training images of DIR to DIR2, without train/ and val/")
    args = p.parse_args()
    if args.few:
        images = sorted((args.dir / "train").glob("*/*.png"), key=lambda path: number(path.name))[: int(args.few[0])]
        copies = [(path, Path(args.few[1], path.parent.name, path.name)) for path in images]
    else:
        copies = [(path, args.dir / ("train" if number(path.stem) % 5 else "val") / kind / f"{theme}-{pixels}-{path.name}")
                  for kind, theme, pixels, path in icons()]  # fmt: skip
    if not copies:
        sys.exit("icons.py: no icons; see above for the packages to install")
    for path, copy in copies:
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    print(f"{len(copies)} images")


if __name__ == "__main__":
    main()
