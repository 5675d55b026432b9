"""kill -9 at random instants of a run, which must then end with the weights of a run that nobody killed.

    python tests/drills/kills.py --kills 120 --seed 0
    python tests/drills/kills.py --kills 60 --seed 0 --signals HUP TERM USR2 INT

With --signals, one of these is sent instead. The run must then be saved at most two steps further on, in a
checkpoint that nothing but the signal has asked for, unless it was still starting.

Start it from the repository's root, on Linux; it takes some minutes on 2 cores. After each kill the run is
resumed. When it has ended, its weights and momentum must equal those of the uninterrupted run, bit for bit.

The run is a tiny network on drawn shapes. For kill -9 it writes a checkpoint after every step, so many kills
hit the writing. Each process is forked from this one, which has imported torch already. In a byte of shared
memory it says what it is doing.
"""
import argparse
import collections
import math
import mmap
import os
import pathlib
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time

sys.path.insert(0, os.getcwd())
import torch

import simsiam
from harness.training import ends
from harness.training.log import Log
from harness.training.run import Run
from results.rows import write_json
from tests.helpers import TINY, equal, weights_of, write_folder

KEPT = "results/drills/kills.json"
IMAGES = 480  # to train on
PHASES = ["starting", "between steps", "in a step", "writing a checkpoint", "writing the log", "kNN", "ended"]
OPTIONS = [*TINY, *shlex.split("--workers 0")]
SHARED = mmap.mmap(-1, 8)  # of the child: its phase, as a number, and in the rest the steps that it has begun


def told(phase, function, afterwards=None):
    """The same function, which also tells the parent process that this phase lasts while it runs."""
    def tells(*given, **options):
        before = SHARED[0]
        SHARED[0] = PHASES.index(phase)
        try:
            return function(*given, **options)
        finally:
            SHARED[0] = PHASES.index(afterwards) if afterwards else before

    return tells


def counted(train_step):
    """The same step, which tells the parent process how many have begun."""
    def counts(method, network, optimizer, step, *views):
        SHARED[1:5] = (step + 1).to_bytes(4)
        return train_step(method, network, optimizer, step, *views)

    return counts


Run.begin = told("starting", Run.begin, afterwards="between steps")
Run.save = told("writing a checkpoint", Run.save)
Log.add = told("writing the log", Log.add)
simsiam.SimSiamMethod.train_step = told("in a step", counted(simsiam.SimSiamMethod.train_step))
simsiam.knn_of = told("kNN", simsiam.knn_of)


def live(data, out, number=signal.SIGKILL, seconds=math.inf):
    """Start or resume the run in a child, and send it a signal after so many seconds -> its phase then"""
    SHARED[0] = PHASES.index("starting")
    SHARED[1:5] = position_of(out).to_bytes(4)
    end = time.monotonic() + seconds
    child = os.fork()
    if child == 0:
        try:
            train(data, out, save_minutes=0 if number == signal.SIGKILL else 60)
        finally:
            os._exit(1)  # Ctrl-C before the program has begun must not end what this process was forked from
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if status != 0:
            sys.exit(f"kills.py: a resumed run failed (status {status}); its folder is {out}")
        if ended:
            return "ended"
        time.sleep(0.001)
    phase, begun = PHASES[SHARED[0]], int.from_bytes(SHARED[1:5])
    os.kill(child, number)
    _, status = os.waitpid(child, 0)
    if number == signal.SIGKILL or phase == "starting":
        return phase
    if status == 0:
        return "ended"
    position = position_of(out)
    if os.waitstatus_to_exitcode(status) != 128 + number or not begun <= position <= begun + 2:
        sys.exit(f"kills.py: {number} came in step {begun} ({phase}); the run ended with status {status}, "
                 f"saved at {position}; its folder is {out}")
    return phase


def position_of(out):
    """How many steps a run's checkpoint has done; 0 without one."""
    if not (out / "checkpoint.pth").exists():
        return 0
    checkpoint = torch.load(out / "checkpoint.pth", weights_only=True)
    return checkpoint["epoch"] * (IMAGES // checkpoint["settings"]["batch"]) + checkpoint["step"]


def train(data, out, save_minutes):
    """The child: the whole program. Does not return."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    ends.has_host = lambda: False  # it ends as a script of its own does
    options = [*OPTIONS, "--save-minutes", str(save_minutes), "--out", str(out), "--resume", "auto"]
    args = simsiam.parse([str(data), *options])
    ends.run_and_leave("simsiam.py", simsiam.pretrain, args)


def drill(folder, kills, seed, signals):
    """So many kills, and then until the current run has ended -> {phase: kills}, runs"""
    rng = random.Random(seed)
    data = folder / "data"
    for split, count in (("train", IMAGES), ("val", 60)):
        write_folder(data, split, count, 16)
    began = time.monotonic()
    live(data, folder / "whole")
    whole_time = time.monotonic() - began
    print(f"an uninterrupted run takes {whole_time:.1f} s", file=sys.stderr, flush=True)
    hits = collections.Counter()
    runs = 0
    while hits.total() < kills:
        while True:
            number = signal.Signals["SIG" + signals[hits.total() % len(signals)]]
            phase = live(data, folder / "killed", number, rng.uniform(0, whole_time))
            if phase == "ended":
                break
            hits[phase] += 1
        if not equal(weights_of(folder / "killed"), weights_of(folder / "whole")):
            sys.exit(f"kills.py: after {hits.total()} kills, other weights than the uninterrupted run's")
        runs += 1
        shutil.rmtree(folder / "killed")
        print(f"{hits.total()} kills, {runs} runs ended as they should", file=sys.stderr, flush=True)
    return hits, runs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", nargs="+", default=["KILL"], metavar="NAME", help="in turn")
    args = parser.parse_args()
    # One thread, because OpenMP's do not survive the fork.
    first, *_ = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {first})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        hits, runs = drill(pathlib.Path(folder), args.kills, args.seed, args.signals)
    kept = KEPT if args.signals == ["KILL"] else KEPT.replace("kills", "signals")
    write_json(kept, {
        "command": shlex.join(["python", *sys.argv]),
        "kills": hits.total(),
        "hits": {phase: hits[phase] for phase in PHASES[:-1]},
        "runs": runs,
        "ended with the uninterrupted weights": runs,
        "seed": args.seed,
        "torch": torch.__version__,
        "device": f"CPU, {torch.get_num_threads()} threads",
    })
    print(f"{hits.total()} kills in {runs} runs, all as they should: {kept}")


if __name__ == "__main__":
    main()
