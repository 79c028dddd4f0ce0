#!/usr/bin/env python3
"""Whose networks are better at equal budgets, and by more than seeds differ?

    python .github/experiments/compare.py RUN RUN ...                        # picture: runs/compare.png
    python .github/experiments/compare.py RUN RUN ... --out PICTURE.png --markdown

A RUN is a folder with front.csv and settings.json, such as those under results/, or with the
log.jsonl that train.py leaves. The first RUN's method is the one whose lead over the others is shown.

Within a budget a run offers the costliest network of its front: it has the least held-out loss, so
nothing is chosen by test accuracy. Means are over budgets from the smallest network's cost (where
runs differ: the dearest) to the full one's, spaced evenly in the cost and, since half of it means as
much to the owner of a small device, in its logarithm; bands of budgets are spaced in the logarithm, too, so that no figure sits on
a single jump of a front. A lead is paired by seed: its mean, the 95 % interval of that (Student's t), and in how many seeds it is one.
Needs numpy, and matplotlib for the picture.
"""

import argparse
import csv
import json
import sys
import textwrap
from pathlib import Path

import numpy as np

PICTURE = Path("runs", "compare.png")
BANDS = (0.02, 0.07), (0.07, 0.15), (0.15, 0.3), (0.3, 0.6), (0.6, 1.0)
COLUMNS = ["test loss", "top-1", "top-1, even costs", *(f"{100 * a:.0f} to {b:.0%}" for a, b in BANDS)]
# Student's t for a two-sided 95 % interval, by the number of seeds less one.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
BY_SEED = ("top-1",)
WRITTEN = {"flops": "FLOPs", "params": "parameters"}
# Settings of which no line is needed where they differ.
TOLD = {"event", "step", "method", "trained_as", "cost", "seed", "widths", "seconds", "search_share", "torch", "commit"}


def last_event(folder, event):
    """The last entry of this name in a run's log.jsonl."""
    with open(folder / "log.jsonl") as f:
        return json.loads([line for line in f if line.startswith(f'{{"event": "{event}"')][-1])


def read_run(folder):
    """A finished run's settings and front: for each numeric column of front.csv an array (k,)."""
    try:
        with open(folder / "front.csv", newline="") as f:
            rows = list(csv.DictReader(f))
        front = {name: np.array([float(row[name]) for row in rows]) for name in rows[0] if name != "widths"}
        file = folder / "settings.json"
        settings = json.loads(file.read_text()) if file.exists() else last_event(folder, "settings") | last_event(folder, "done")
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise ValueError(f"{folder} holds no finished run ({type(e).__name__}: {e})") from None
    return settings, front


def kind(settings):
    source = settings.get("trained_as")
    return settings["method"] if source in (None, settings["method"]) else f"{source}'s weights searched"


def within(front, cost, budgets):
    """Test loss and top-1 (2, ...) of the front's costliest network within each budget; nan where none is."""
    at = np.searchsorted(front[cost], np.asarray(budgets) + 1e-9, side="right") - 1
    return np.where(at < 0, np.nan, np.stack([front["loss"][at], front["top1"][at]]))


def score(front, cost, low):
    """COLUMNS of one run. low: the least budget."""
    loss, top1 = within(front, cost, np.geomspace(low, 1, 200)).mean(1)
    even = within(front, cost, np.linspace(low, 1, 200))[1].mean()
    # A band must be there for the most part: half of it, in the logarithm.
    bands = [within(front, cost, np.geomspace(max(a, low), b, 50))[1].mean() if low**2 < a * b else np.nan for a, b in BANDS]
    return np.array([loss, top1, even, *bands])


def panels(runs):
    """For each cost to be shown: its name, the least budget, kind -> seed -> front, and (settings, front) of all alone.

    Costs are shares of the full network's from here on.
    """
    for name in ("data", "arch", "image_size"):
        if len(values := {str(s.get(name)) for s, _ in runs}) > 1:
            raise ValueError(f"the runs differ in {name}: {', '.join(sorted(values))}")
    slimmable = [(s, front) for s, front in runs if s["method"] != "alone"]
    if not slimmable:
        raise ValueError("at least one run must be of a slimmable network")
    # slim's uniform line is the same whatever the cost: it serves all for which the others were run.
    wanted = {s["cost"] for s, _ in slimmable if kind(s) != "slim"} or {s["cost"] for s, _ in slimmable}
    for cost in (column for column in runs[0][1] if column in wanted):
        full = max(front[cost].max() for _, front in slimmable)
        shares = [(s, front | {cost: front[cost] / full}) for s, front in runs]
        kinds = {}
        for s, front in shares:
            if s["method"] != "alone" and (s["cost"] == cost or kind(s) == "slim"):
                if s["seed"] in kinds.setdefault(kind(s), {}):
                    raise ValueError(f"two runs are of {kind(s)}, {cost}, seed {s['seed']}")
                kinds[kind(s)][s["seed"]] = front | {"time": (s["seconds"] / 60, 100 * s["search_share"])}
        low = max(front[cost][0] for by_seed in kinds.values() for front in by_seed.values())
        yield cost, low, kinds, [(s, front) for s, front in shares if s["method"] == "alone"]


def mean_and_spread(scores):
    """The scores (COLUMNS,) of several seeds as texts: mean ± standard deviation."""
    texts = []
    for name, values in zip(COLUMNS, np.stack(scores).T):
        digits = 4 if "loss" in name else 2
        spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
        texts.append("-" if np.isnan(values).any() else f"{values.mean():.{digits}f}{spread}")
    return texts


def leads_as_text(leads):
    """Paired leads (COLUMNS,) of several seeds as texts: mean, 95 % interval, in how many seeds ours is ahead."""
    texts = []
    for name, values in zip(COLUMNS, np.stack(leads).T):
        digits, n = 3 if "loss" in name else 2, len(values)
        ahead = (values < 0 if "loss" in name else values > 0).sum()
        half = half_interval(values)
        interval = "" if np.isnan(half) else f" ({values.mean() - half:+.{digits}f} to {values.mean() + half:+.{digits}f})"
        texts.append("-" if np.isnan(values).any() else f"{values.mean():+.{digits}f}{interval}, {ahead} of {n}")
    return texts


def show(rows, markdown):
    """Prints rows of texts, the heads first, as an aligned or a markdown table, without columns that say nothing; nothing if there are
    heads only."""
    rows = list(zip(*(column for column in zip(*rows) if set(column[1:]) != {"-"})))
    if len(rows) > 1 and markdown:
        rule = ["---", *["---:"] * (len(rows[0]) - 1)]
        print("", *("| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])), sep="\n")
    elif len(rows) > 1:
        wide = [max(map(len, column)) for column in zip(*rows)]
        print("", *("  ".join([f"{row[0]:{wide[0]}}", *map(str.rjust, row[1:], wide[1:])]) for row in rows), sep="\n")


def tabulate(cost, low, kinds, alone, markdown=False):
    print(f"\n{cost}: means over budgets from {low:.1%} to 100%, evenly spaced in the logarithm, and over bands of them; "
          f"mean ± standard deviation over seeds")  # fmt: skip
    scores = {name: {seed: score(front, cost, low) for seed, front in kinds[name].items()} for name in kinds}
    rows = [["", *COLUMNS, "seeds", "minutes, of search"]]
    for name, by_seed in scores.items():
        minutes, share = np.mean([front["time"] for front in kinds[name].values()], 0)
        rows.append([name, *mean_and_spread(list(by_seed.values())), str(len(by_seed)), f"{minutes:.1f}, {share:.0f} %"])
    show(rows, markdown)

    (first, ours), *others = scores.items()
    rows = [[f"{first}'s lead over", *COLUMNS, *(f"{c} by seed" for c in BY_SEED)]]
    for name, theirs in others:
        leads = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
        if leads:
            digits = {c: 3 if "loss" in c else 2 for c in BY_SEED}
            by_seed = [" ".join(f"{lead[COLUMNS.index(c)]:+.{digits[c]}f}" for lead in leads) for c in BY_SEED]
            rows.append([name, *leads_as_text(leads), *by_seed])
    show(rows, markdown)

    rows = [["top-1 trained alone, and within its cost", "seed", "alone", *kinds]]
    for s, front in alone:
        share, widths = front[cost][0], s["widths"].split()
        shape = f"uniform {widths[0]}" if len(set(widths)) == 1 else "layer-wise"
        others = [f"{within(kinds[k][s['seed']], cost, share)[1]:.2f}" if s["seed"] in kinds[k] else "-" for k in kinds]
        rows.append([f"{share:.1%}, {shape}", str(s["seed"]), f"{front['top1'][0]:.2f}", *others])
    show(rows, markdown)


def half_interval(leads):
    """Half of the 95 % interval of the mean over seeds, the first dimension; nan for a single seed."""
    n = len(leads)
    return T95[n - 1] * leads.std(0, ddof=1) / n**0.5 if n - 1 in T95 else np.full(leads.shape[1:], np.nan)


def verdict(cost, low, kinds):
    """In words, by the logarithmic mean of top-1: over whom the first is ahead, by more than the interval, or behind."""
    (_, ours), *others = kinds.items()
    said = {}
    for name, theirs in others:
        means = [[score(fronts[seed], cost, low)[COLUMNS.index("top-1")] for seed in sorted(ours.keys() & theirs.keys())]
                 for fronts in (ours, theirs)]  # fmt: skip
        leads = np.subtract(*means)
        clear = len(leads) and abs(leads.mean()) > half_interval(leads)
        word = "level with" if not clear else "ahead of" if leads.mean() > 0 else "behind"
        said.setdefault(word, []).append(name)
    lists = {word: " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names) for word, names in said.items()}
    return textwrap.fill(f"{WRITTEN.get(cost, cost)}: " + ", ".join(f"{word} {names}" for word, names in lists.items()), 52)


def draw(shown, picture, log=None):
    """For each cost the fronts, and beside them the first method's lead over each other, paired by seed, with its 95 % interval.

    log: None for a logarithmic axis where the smallest cost is below 15 %."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(10, 4 * len(shown) + 0.5), layout="constrained")
    names = list(dict.fromkeys(name for _, _, kinds, _ in shown for name in kinds))
    for (fronts, lead), (cost, low, kinds, alone) in zip(figure.subplots(len(shown), 2, squeeze=False), shown):
        (first, ours), *_ = kinds.items()
        budgets = np.geomspace(low, 1, 500)
        tops = {name: {s: within(front, cost, budgets)[1] for s, front in by_seed.items()} for name, by_seed in kinds.items()}
        for name, by_seed in tops.items():
            colour, top1 = f"C{names.index(name)}", np.stack(list(by_seed.values()))  # the same colour in every panel
            fronts.plot(100 * budgets, top1.mean(0), color=colour, label=name)
            fronts.fill_between(100 * budgets, top1.min(0), top1.max(0), color=colour, alpha=0.15, linewidth=0)
            both = sorted(by_seed.keys() & tops[first].keys())
            if name != first and both:
                leads = np.stack([tops[first][s] - by_seed[s] for s in both])
                mean, half = leads.mean(0), half_interval(leads)
                lead.plot(100 * budgets, mean, color=colour)
                lead.fill_between(100 * budgets, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
        crosses = [(100 * front[cost][0], front["top1"][0]) for _, front in alone]
        if crosses:
            fronts.plot(*zip(*crosses), "kx", label="trained alone")
        lead.axhline(0, color="black", linewidth=0.8)
        fronts.set(ylabel="test top-1 (%)", title=f"{WRITTEN.get(cost, cost)}: mean and range of {len(ours)} seeds")
        lead.set(ylabel=f"{first}'s lead (points)", title=verdict(cost, low, kinds))
        lead.title.set_fontsize("medium")
        for axes in (fronts, lead):
            axes.set_xlabel(f"{WRITTEN.get(cost, cost)} (% of the full network)")
            if low < 0.15 if log is None else log:
                ticks = [t for t in (1, 2, 3, 5, 7, 10, 20, 30, 50, 70, 100) if t >= 100 * low]
                axes.set_xscale("log")
                axes.set_xticks(ticks, map(str, ticks))
                axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.3)
    figure.legend(*fronts.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def compare(folders, picture=PICTURE, log=None, markdown=False):
    """Prints the tables of these run folders and draws their fronts, unless `picture` is None. Raises ValueError for what cannot be
    compared."""
    runs = [read_run(Path(folder)) for folder in folders]
    shown = list(panels(runs))
    for key in sorted(set().union(*(s for s, _ in runs)) - TOLD):
        if len({str(s[key]) for s, _ in runs if key in s}) > 1:
            print(f"{key} differs: " + ", ".join(sorted({f"{kind(s)} {s[key]}" for s, _ in runs if key in s})))
    for panel in shown:
        tabulate(*panel, markdown)
    if picture is None:
        return
    try:
        draw(shown, picture, log)
        print(f"\n{picture}: fronts are means over seeds, bands their range; leads have their 95 % interval")
    except ImportError:
        print("\nno picture: matplotlib is not installed")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run")
    p.add_argument("--out", type=Path, default=PICTURE, metavar="PICTURE", help="(default: %(default)s)")
    p.add_argument("--log", action=argparse.BooleanOptionalAction,
                   help="a logarithmic axis of costs (default: where the smallest is below 15 %% of the full one)")
    p.add_argument("--markdown", action="store_true", help="print the tables as GitHub markdown")
    args = p.parse_args(argv)
    try:
        compare(args.runs, args.out, args.log, args.markdown)
    except ValueError as e:
        print(f"compare.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII only has no plus-minus
    sys.exit(main())
