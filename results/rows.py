"""Runs of a row, seed by seed, and what is kept of them: a file for each row, with a line for each seed.

    {"seed", "command", "log": the records of the run's log,
     "evaluations": {name: lineval.json's content, and the records of its log if it has one}}

A run with a line is not made again; an interrupted one continues from its folder under runs/. On a CPU each
run has its own core: two jobs on a core each take less time than one after the other on both. On a GPU one
runs at a time.
"""
import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import queue
import shlex
import signal
import statistics
import subprocess
import sys
import time
import traceback
from typing import NamedTuple

import torch

from harness.common.errors import Refused
from harness.common.files import replacing
from results.pages import cell, write


class Runs(NamedTuple):
    """Runs that differ only in the seed."""
    name: str     # of their file
    command: str  # the program and its options
    seeds: tuple
    evaluations: dict = {"cached": "--cached"}  # name: lineval.py's options


class Interrupted(Exception):
    """The time is up."""


# --- What is kept -----------------------------------------------------------------------------------------

class Kept:
    """A folder of files, a line for each run. scratch: the folder of the runs themselves"""

    def __init__(self, folder, scratch):
        self.folder = folder
        self.scratch = scratch

    def path(self, name):
        return f"{self.folder}/{name}.jsonl"

    def of(self, name):
        """{seed: line}"""
        return {line["seed"]: line for line in records(self.path(name))}

    def add(self, name, line, data=None):
        """Add a line, or replace that of its seed. data: an absolute path of the data is not kept"""
        lines = self.of(name) | {line["seed"]: line}
        text = "".join(json.dumps(lines[seed]) + "\n" for seed in sorted(lines))
        if data is not None and os.path.isabs(data):
            text = text.replace(data, "CIFAR")
        os.makedirs(self.folder, exist_ok=True)
        with replacing(self.path(name), "w") as f:
            f.write(text)

    def missing(self, rows):
        """[(Runs, seed)] that lack a line or an evaluation in it; one seed of all rows, then the next"""
        jobs = [(runs, seed) for runs in rows for seed in runs.seeds if not self.has(runs, seed)]
        return sorted(jobs, key=lambda job: job[1])

    def has(self, runs, seed):
        line = self.of(runs.name).get(seed)
        return line is not None and runs.evaluations.keys() <= line["evaluations"].keys()


def records(path):
    """A log's records; none if there is no log yet. A kill may have cut the last line short."""
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return [json.loads(line) for line in f if line.endswith("}\n")]


def append(path, record):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a") as f:
        f.write(json.dumps(record) + "\n")


def read_json(path):
    """A file's content; {} if there is no file."""
    if not os.path.exists(path):
        return {}
    with open(path) as f:
        return json.load(f)


def write_json(path, content):
    with open(path, "w") as f:
        f.write(json.dumps(content, indent=1) + "\n")


def epochs_of(line):
    """The log's records of the untrained network and the epochs."""
    return [record for record in line["log"] if record["event"] == "epoch"]


def last(line, key):
    """A figure of the last epoch."""
    return epochs_of(line)[-1][key]


def minutes_of(line):
    """The time of all epochs, everything included."""
    return sum(epoch["wall_seconds"] for epoch in epochs_of(line)[1:]) / 60


def top1_of(line, evaluation="cached"):
    """None for a run that has diverged."""
    return line["evaluations"][evaluation]["top1"]


def columns(runs):
    """A row's cells: number of runs; mean loss and std, and kNN, of their last epochs."""
    loss = statistics.mean(last(run, "loss") for run in runs)
    std = statistics.mean(last(run, "std") for run in runs)
    knn = cell([last(run, "knn") for run in runs])
    return [len(runs), f"{loss:.3f}", f"{std:.2f}", knn]


# --- Making runs ------------------------------------------------------------------------------------------

def make_missing(kept, rows, deadline, data=None):
    """Make and keep the missing runs. data: as in Kept.add"""
    make_all(kept, kept.missing(rows), deadline, data)


def make_all(kept, todo, deadline, data=None):
    """Make and keep these runs, [(Runs, seed)], in this order."""
    for runs, seed in todo:
        print(f"missing: {runs.name}, seed {seed}")
    jobs = [(kept, runs, seed, deadline) for runs, seed in todo]
    for name, line in results_of(make, jobs):
        kept.add(name, line, data)
        print(f"done: {name}, seed {line['seed']}", flush=True)


def make(kept, runs, seed, deadline):
    """A run and its evaluations -> name, line. Diverging is a result too; its top1 is None."""
    out = f"{kept.scratch}/{runs.name}-{seed}"
    evaluations = {name: {"top1": None} for name in runs.evaluations}
    try:
        pretrain(kept, runs, seed, deadline)
        for name, options in runs.evaluations.items():
            words = ["--ckpt", f"{out}/checkpoint.pth", *shlex.split(options), "--workers", "0"]
            evaluations[name] = evaluate(words, f"{out}/{name}", deadline)
    except RuntimeError as error:
        if "not finite" not in f"{error}":
            raise
    log = records(f"{out}/log.jsonl")
    return runs.name, {"seed": seed, "command": f"python {log[0]['command']}", "log": log,
                       "evaluations": evaluations}


def pretrain(kept, runs, seed, deadline):
    """The run itself, unless it has ended already."""
    out = f"{kept.scratch}/{runs.name}-{seed}"
    if not os.path.exists(f"{out}/backbone.pth"):
        options = ["--seed", f"{seed}", "--out", out, "--resume", "auto"]
        do(shlex.split(runs.command) + options, deadline)


def evaluate(words, out, deadline):
    """A linear evaluation, unless it has ended already -> what is kept of it"""
    if not os.path.exists(f"{out}/lineval.json"):
        do(["lineval.py", *words, "--out", out, "--resume", "auto"], deadline)
    found = read_json(f"{out}/lineval.json")
    log = records(f"{out}/log.jsonl")
    return found | {"log": log} if log else found


def do(command, deadline):
    """Run a command to its end. Raises Interrupted at the deadline, RuntimeError if it fails."""
    if time.monotonic() > deadline:
        raise Interrupted
    print(f"python {shlex.join(command)}", flush=True)
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    try:
        _, errors = process.communicate(timeout=max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # it saves what it has
        process.communicate()
        raise Interrupted from None
    if process.returncode != 0:
        raise RuntimeError(f"python {shlex.join(command)}: {errors}")


def results_of(function, jobs):
    """Yield function(*job) for each job, in the order in which they end.

    If one raises, those that haven't started are dropped, and the error is raised once the others have ended.
    """
    pool = new_pool()
    try:
        futures = [pool.submit(function, *job) for job in jobs]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def new_pool():
    """Threads that start programs: one for a GPU, else one for each core."""
    if torch.cuda.is_available():
        return concurrent.futures.ThreadPoolExecutor(1)
    free = queue.SimpleQueue()
    for core in os.sched_getaffinity(0):
        free.put(core)

    def take_a_core():
        os.sched_setaffinity(0, {free.get()})  # of this thread; the programs that it starts inherit it

    return concurrent.futures.ThreadPoolExecutor(free.qsize(), initializer=take_a_core)


def in_time(seconds, function, *given):
    """function(*given) in a process of its own -> its result. Raises RuntimeError if it fails, or has not
    ended after so many seconds; then it is killed, with all that it has started.

    The process is forked, so this one may not have used a GPU or several threads before.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=answer, args=(sender, function, given))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise RuntimeError(f"has not ended after {seconds} s")
        error, found = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"ended with status {process.exitcode}") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    if error:
        raise RuntimeError(error)
    return found


def answer(sender, function, given):
    """In that process: send (what went wrong, or None; the result)."""
    os.setsid()
    try:
        sender.send((None, function(*given)))
    except Exception as error:
        traceback.print_exc()
        sender.send((f"{type(error).__name__}: {error}", None))


# --- A script that makes runs, and pages of them ----------------------------------------------------------

def parser_for(doc):
    """A parser with the options of all these scripts."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--show", action="store_true", help="run nothing, only write the pages")
    parser.add_argument("--minutes", type=float, default=1e4,
                        help="stop after this long and save everything; the same command continues")
    return parser


def run_script(parser, make_runs, pages, draw=None):
    """make_runs(args, deadline) until time is up; then write pages(), {path: text}, and draw() a picture."""
    args = parser.parse_args()
    try:
        if not args.show:
            make_runs(args, time.monotonic() + 60 * args.minutes)
        print("the pages are written" if args.show else "everything is done")
    except Interrupted:
        print("time is up; the same command continues")
    except (Refused, OSError, RuntimeError) as error:
        sys.exit(f"{parser.prog}: {error}")
    finally:  # whatever has ended the runs, those before it are kept
        write(pages())
        if draw is not None:
            draw()
