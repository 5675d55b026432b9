"""kill -9 at random instants of a run, which must then end with the weights of a run that nobody killed.

    python tests/drills/kills.py --kills 120 --seed 0

Start it from the repository's root, on Linux; it takes some minutes on 2 cores. After each kill the run is
resumed. When it has ended, its weights and momentum must equal those of the uninterrupted run, bit for bit.

The run is a tiny network on drawn shapes that writes a checkpoint after every step, so many kills hit the
writing. Each process is forked from this one, which has imported torch already. In a byte of shared memory it
says what it is doing.
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
PHASES = ["starting", "between steps", "in a step", "writing a checkpoint", "writing the log", "kNN", "ended"]
OPTIONS = [*TINY, *shlex.split("--workers 0 --save-minutes 0")]
SHARED = mmap.mmap(-1, 1)  # the child's phase, as a number


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


Run.begin = told("starting", Run.begin, afterwards="between steps")
Run.save = told("writing a checkpoint", Run.save)
Log.add = told("writing the log", Log.add)
simsiam.SimSiamMethod.train_step = told("in a step", simsiam.SimSiamMethod.train_step)
simsiam.knn_of = told("kNN", simsiam.knn_of)


def live(data, out, seconds=math.inf):
    """Start or resume the run in a child, and kill it after so many seconds -> its last phase"""
    SHARED[0] = PHASES.index("starting")
    end = time.monotonic() + seconds
    child = os.fork()
    if child == 0:
        train(data, out)
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if status != 0:
            sys.exit(f"kills.py: a resumed run failed (status {status}); its folder is {out}")
        if ended:
            return "ended"
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return PHASES[SHARED[0]]


def train(data, out):
    """The child: the whole program. Does not return."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    args = simsiam.parse([str(data), *OPTIONS, "--out", str(out), "--resume", "auto"])
    ends.run_and_leave("simsiam.py", simsiam.pretrain, args)


def drill(folder, kills, seed):
    """So many kills, and then until the current run has ended -> {phase: kills}, runs"""
    rng = random.Random(seed)
    data = folder / "data"
    for split, count in (("train", 480), ("val", 60)):
        write_folder(data, split, count, 16)
    began = time.monotonic()
    live(data, folder / "whole")
    whole_time = time.monotonic() - began
    print(f"an uninterrupted run takes {whole_time:.1f} s", file=sys.stderr, flush=True)
    hits = collections.Counter()
    runs = 0
    while hits.total() < kills:
        while (phase := live(data, folder / "killed", rng.uniform(0, whole_time))) != "ended":
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
    args = parser.parse_args()
    # One thread, because OpenMP's do not survive the fork.
    first, *_ = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {first})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        hits, runs = drill(pathlib.Path(folder), args.kills, args.seed)
    write_json(KEPT, {
        "command": shlex.join(["python", *sys.argv]),
        "kills": hits.total(),
        "hits": {phase: hits[phase] for phase in PHASES[:-1]},
        "runs": runs,
        "ended with the uninterrupted weights": runs,
        "seed": args.seed,
        "torch": torch.__version__,
        "device": f"CPU, {torch.get_num_threads()} threads",
    })
    print(f"{hits.total()} kills in {runs} runs, all as they should: {KEPT}")


if __name__ == "__main__":
    main()
