"""For the experiments of this folder: `list_methods` lists, `queue` makes runs of train.py, `keep` keeps their figures in results/,
`train_alone` does both for networks alone, `compare_methods` prints tables."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from compare import compare, last_event

PROJECT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"


def list_methods(root, settings, seeds, costs=("flops", "memory")):
    """Jobs (name, flags, needs) that compare the methods, for each seed and cost: `joslim`, `slim`, `twostage`, and the weights of the
    first two searched as `twostage`'s are, from nothing. All but `slim`, whose front is the uniform line, end with as many visits on
    the same images."""
    jobs, (first, *others) = [], costs
    for seed in seeds:
        shared = [*settings, "--seed", seed]
        slim, twostage = f"slim-{seed}", f"twostage-{first}-{seed}"
        jobs += [(f"joslim-{cost}-{seed}", [*shared, "--method", "joslim", "--cost", cost]) for cost in costs]
        jobs += [(slim, [*shared, "--method", "slim"]), (twostage, [*shared, "--method", "twostage", "--cost", first])]
        # Random widths are the same whatever the cost: these weights serve the others, too.
        jobs += [(f"twostage-{cost}-{seed}", ["--search", root / twostage, "--cost", cost], [twostage]) for cost in others]
        jobs += [(f"slimsearched-{cost}-{seed}", ["--search", root / slim, "--cost", cost], [slim]) for cost in costs]
        joslims = {cost: f"joslim-{cost}-{seed}" for cost in costs}
        jobs += [(f"joslimsearched-{cost}-{seed}", ["--search", root / name, "--cost", cost], [name]) for cost, name in joslims.items()]
    return jobs


def compare_methods(folders, picture, markdown=True):
    """Tables and picture of the folders that `list_methods` named, as run; then, what was trained: all weights searched from nothing."""
    compare([f for f in folders if not f.name.startswith("joslimsearched-")], picture, markdown=markdown)
    print("\nall weights searched from nothing")
    kinds = ("joslimsearched", "twostage", "slimsearched")
    compare([f for kind in kinds for f in folders if f.name.startswith(f"{kind}-")], None, markdown=markdown)


def queue(jobs, root, at_once=2, script="train.py"):
    """Makes the runs ROOT/name for all jobs (name, flags) or (name, flags, names of those it needs first).

    Each is `python SCRIPT *flags --out ROOT/name --resume` in one thread, `at_once` of them at a time, in
    the order of the list; what it prints goes to ROOT/name.log. Finished runs are skipped and stopped ones
    continued, so a queue that was stopped is continued by the same command. After a failure none is begun;
    those under way end first, then it is raised. A name that other flags made is refused: ROOT/name.command has them.
    """
    root.mkdir(parents=True, exist_ok=True)
    waiting = {name: (flags, set(*needs)) for name, flags, *needs in jobs}
    finished, running = set(), {}  # names, and future -> name
    with ThreadPoolExecutor(at_once) as pool:
        while waiting or running:
            ready = [name for name, (_, needs) in waiting.items() if needs <= finished]
            for name in ready[: at_once - len(running)]:
                flags, _ = waiting.pop(name)
                running[pool.submit(run, root / name, flags, script)] = name
            if not running:
                raise ValueError(f"nothing makes what these need: {', '.join(waiting)}")
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()  # raises what it raised
                finished.add(running.pop(future))


def run(out, flags, script):
    told = shlex.join(map(str, flags)) + "\n"
    command_file, commit_file = Path(f"{out}.command"), Path(f"{out}.commit")
    if command_file.exists() and command_file.read_text() != told:
        raise ValueError(f"{out} was made by other flags (see {command_file}); move it away")
    if (out / "front.csv").exists():
        print(f"{out} is finished", flush=True)
        return
    print(f"{out} begins", flush=True)
    start = time.perf_counter()
    command = [sys.executable, script, *map(str, flags), "--out", str(out.resolve()), "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=PROJECT, capture_output=True, text=True)
    command_file.write_text(told)
    begun = commit_file.read_text().split() if commit_file.exists() else []  # of a run that is continued
    commit_file.write_text(" ".join(dict.fromkeys([*begun, commit.stdout.strip()])) + "\n")
    with open(f"{out}.log", "a") as log:
        ended = subprocess.run(command, cwd=PROJECT, env=environment, stdout=log, stderr=log)
    if ended.returncode:
        raise RuntimeError(f"{out} failed with exit code {ended.returncode}; see {out}.log")
    print(f"{out} ends after {time.perf_counter() - start:.0f} s", flush=True)


def keep(root, names, folder):
    """Copies the front.csv of these finished runs to results/FOLDER/name, with a settings.json -> these folders.

    settings.json has the run's settings, the data's digest, its seconds and the share of them that the search took, and the commit.
    """
    kept = []
    for name in names:
        settings, done = (last_event(root / name, event) for event in ("settings", "done"))
        settings |= {key: done[key] for key in ("seconds", "search_share")}
        plain = {key: value for key, value in settings.items() if key not in ("event", "step")}
        kept.append(keep_one(root / name, RESULTS / folder / name, plain))
    return kept


def train_alone(jobs, root, folder):
    """Makes the networks alone of jobs (name, alone.py's flags) and keeps their figures in results/FOLDER/name -> these folders."""
    queue(jobs, root, script=".github/experiments/alone.py")
    return [keep_one(root / name, RESULTS / folder / name, json.loads((root / name / "settings.json").read_text())) for name, _ in jobs]


def keep_one(run, kept, settings):
    if (commit := Path(f"{run}.commit")).exists():
        settings["commit"] = commit.read_text().strip()
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "front.csv", kept / "front.csv")
    (kept / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
    return kept
