"""pytest -q -s .ci/test_faults.py    faults, at length: killed, short of workers, short of disk, asked to stop

Each run is compared with the same one unbroken. Several minutes; shows what was seen.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from test_joslim import (  # noqa: E402, F401
    QUICK, ROOT, Forked, in_session, read_state, same_run, stopped, tiny, two, write_data,
)  # fmt: skip


def launch(processes, *options):
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *options]
    return [sys.executable, *(many if processes > 1 else []), "train.py"]


def start(command):
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **streams)


def finish(command):
    out, err = (run := start(command)).communicate(timeout=600)
    assert run.returncode == 0, err
    return out


def await_line(run, *starts):
    for line in run.stdout:
        if line.startswith(starts):
            return line
    raise AssertionError(run.stderr.read())


def family(pid):
    """The process and all its descendants."""
    children = (Path("/proc", str(pid), "task", str(pid), "children")).read_text().split()
    return [pid, *(p for c in children for p in family(int(c)))]


def test_sigterm_of_torchrun(tiny, tmp_path):  # noqa: F811
    run = start([*launch(2), *tiny, "--epochs", "4000", "--out", str(tmp_path / "a b")])
    await_line(run, "epoch")
    for pid in family(run.pid):  # all of them, as a cluster does
        os.kill(pid, signal.SIGTERM)
    _, err = run.communicate(timeout=60)
    (line,) = [line for line in err.splitlines() if line.startswith("train.py: ")]  # torchrun adds words of its own
    stopped(tmp_path / "a b", line)
    print(line)


def test_the_second_of_two_processes_is_stopped_first_20_times(tiny, tmp_path):  # noqa: F811
    pauses = random.Random(0)
    for k in range(20):
        runs = two([*tiny, "--epochs", "4000", "--out", str(tmp_path / str(k))])
        runs[0].await_line("epoch")
        os.kill(runs[1].pid, signal.SIGTERM)
        if k % 2:  # the first as well, a little later, if it is still there
            time.sleep(pauses.uniform(0, 0.3))
            if runs[0].process.is_alive():
                os.kill(runs[0].pid, signal.SIGTERM)
        codes, errs = zip(*(run.finish(20) for run in runs))
        assert codes == (143, 143) and "".join(errs).count("\n") == 1, (codes, errs)
        stopped(tmp_path / str(k), "".join(errs))
    print("20 of 20")


def test_signals_to_the_group_with_loading_processes_20_times(tmp_path):
    root = write_data("imagenet", tmp_path / "data")
    flags = [*QUICK, "--data", "imagenet", "--data-dir", str(root), "--arch", "resnet8", "--image-size", "16",
             "--workers", "2", "--log-seconds", "0", "--epochs", "4000"]  # fmt: skip
    pauses = random.Random(0)
    for k in range(20):
        run = Forked([*flags, "--out", str(tmp_path / str(k))])
        run.await_line("epoch")
        time.sleep(pauses.uniform(0, 0.5))
        number = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)[k % 3]
        os.killpg(run.pid, number)
        code, err = run.finish(20)
        assert code == 128 + number and err.count("\n") == 1 and not in_session(run.pid), (code, err)
        stopped(tmp_path / str(k), err)
    print("20 of 20")


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_25_times(processes, tiny, tmp_path):  # noqa: F811
    flags = [*tiny, "--epochs", "150", "--tau", "4"]
    finish([*launch(processes), *flags, "--out", str(tmp_path / "whole")])
    # Saving after every step, so that many a kill finds a checkpoint half written.
    command = [*launch(processes), *flags, "--out", str(tmp_path / "killed"), "--resume", "--save-minutes", "0"]
    pauses, found = random.Random(0), []
    for _ in range(25):
        run = start(command)
        found.append(await_line(run, "continuing", "no checkpoint").split()[-1])
        time.sleep(pauses.uniform(0, 0.8))
        assert run.poll() is None, "finished before it could be killed: a longer run is needed"
        for pid in family(run.pid):
            os.kill(pid, signal.SIGKILL)
        run.communicate()
    print(f"{processes} processes: continued from steps {' '.join(found)}")
    finish(command)
    assert same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_dead_worker_is_replaced(tiny, tmp_path):  # noqa: F811
    flags = [*tiny, "--epochs", "400", "--tau", "40", "--save-minutes", "0.01", "--log-seconds", "1"]
    finish([*launch(2), *flags, "--out", str(tmp_path / "whole")])
    run = start([*launch(2, "--max-restarts=4"), *flags, "--out", str(tmp_path / "killed")])
    for rank in "1010":  # one restart each: none to spare
        for _ in range(40):  # a line comes before each checkpoint: some of this start's own are there
            await_line(run, "epoch")
        _, *workers = family(run.pid)
        rank_of = {p: dict(v.split("=", 1) for v in Path(f"/proc/{p}/environ").read_text().split("\0") if "=" in v)
                   .get("RANK") for p in workers}  # fmt: skip
        (worker,) = [p for p in workers if rank_of[p] == rank]
        os.kill(worker, signal.SIGKILL)
        print(await_line(run, "continuing").strip())
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    assert same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_full_disk(tiny, tmp_path):  # noqa: F811
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    if subprocess.run([*mount, "size=1600k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        finish([*launch(1), *tiny, "--out", str(tmp_path / "whole")])
        command = [*launch(1), *tiny, "--out", str(disk / "run"), "--resume"]
        out, err = (run := start(command)).communicate(timeout=100)  # the third checkpoint does not fit
        print(err.strip())
        assert run.returncode == 2 and err.count("\n") == 1 and "checkpoint.pt: could not be written (No space" in err
        step = read_state(disk / "run")["step"]
        assert 0 < step < 8 and not list(disk.rglob("*.part"))
        for path, piece in ((disk / "rest", bytes(1024)), (disk / "run" / "log.jsonl", b"\n")):  # the log's last page, too
            with open(path, "ab", buffering=0) as f, pytest.raises(OSError):
                while True:
                    f.write(piece)
        _, err = (run := start(command)).communicate(timeout=100)  # now next to nothing: what the log had too much of
        print(err.strip())
        assert run.returncode == 2 and err.count("\n") == 1 and ": could not be written (No space" in err
        assert read_state(disk / "run")["step"] == step
        (disk / "rest").unlink()
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        finish(command)
        assert same_run(tmp_path / "whole", disk / "run")
    finally:
        subprocess.run(["umount", str(disk)])
