"""A quarter of an hour of GPU, well spent: 200 epochs of CIFAR-10, its evaluation, checks and steps.

    python tests/drills/quarter.py ARCHIVE                  and, when it has ended, at once
    python tests/drills/quarter.py ARCHIVE --seconds N      with the seconds that are left, less 30
    python tests/drills/quarter.py ARCHIVE --rehearse 5     on a CPU, tiny: interrupted five times at random

For a machine that starts bare, ends each command after 600 s, and gives back a few files of its folder $OUT.
Start it from the repository's root. ARCHIVE is a tar file of CIFAR-10 as train/<class>/*.jpg and
val/<class>/*.jpg. Nothing else is needed.

The run and its evaluation are processes that go on when the command has ended. A command starts them if they
don't live and aren't done, so the same one continues after any interruption. Every few seconds it copies what
is worth keeping to $OUT. If they are done in time, it measures training steps (speed.py). tests/drills/gpu.py
runs beside the first epochs.

$OUT/found.tar.gz has the run's log and its line for results/cifar10, curves, checks and steps. The backbone
comes in parts: cat backbone.pth.* > backbone.pth
"""
import argparse
import contextlib
import fcntl
import io
import multiprocessing
import os
import pathlib
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from typing import NamedTuple

sys.path.insert(0, os.getcwd())
import numpy as np
import torch
from PIL import Image

from harness.common.files import replacing
from harness.data import cifar
from results.cifar10 import ON_A_GPU
from results.rows import Kept, read_json, records, write_json

KEPT = "results/drills/quarter.json"
PART = 15 << 20  # bytes of a part of the backbone
ROW = "200-epochs-decayed-predictor"  # of results/cifar10.py
SMALL = (f"{ROW}.jsonl", "run/log.jsonl", "run/curves.png", "work.txt", "gpu.json", "gpu.txt",
         "speed-cuda.json", "speed.json", "speed.txt")
TIMES = {"seconds", "wall_seconds", "images_per_s", "data_wait", "memory_mb"}  # differ between two runs


class Plan(NamedTuple):
    """What is done in that time."""
    every: int    # take every so-manieth image
    run: str      # options of simsiam.py
    checks: str   # of tests/drills/gpu.py
    parts: tuple  # of results/speed.py
    pause: float  # seconds from copy to copy


PLAN = Plan(1, f"{ON_A_GPU[ROW].options} --knn-every 20", "--only views waits gradients",
            ("step of imagenet: ours", "run from files", "step of imagenet: ours, compiled",
             "step of cifar10: ours, compiled", "step of cifar10: ours"), 20)
TINY = Plan(60, "--recipe cifar10 --width 1/16 --proj-hidden 32 --dim 32 --pred-dim 8 --size 16 --batch 64 "
                "--epochs 100 --pred-lr cosine --knn-every 20", "--device cpu --only views",
            ("step of shapes: ours",), 1)


# --- The run and its evaluation, which outlive the command ------------------------------------------------

def work(plan, archive, folder):
    """Do what is not done yet."""
    data = folder / "cifar-10-batches-bin"
    if not data.exists():
        unpack(archive, data, plan.every)
    if not (folder / "run/backbone.pth").exists():
        do(f"simsiam.py {data} {plan.run} --out {folder}/run --resume auto")
    do(f"lineval.py --cached --ckpt {folder}/run/checkpoint.pth --out {folder}/cached --resume auto")
    log = records(folder / "run/log.jsonl")
    evaluations = {"cached": read_json(folder / "cached/lineval.json")}
    command = f"python {log[0]['command']}"
    line = {"seed": 0, "command": command, "log": log, "evaluations": evaluations}
    Kept(folder, None).add(ROW, line, f"{data}")


def do(command):
    subprocess.run([sys.executable, *shlex.split(command)], check=True)


def unpack(archive, folder, every):
    """CIFAR-10's binary layout of the archive's images, decoded in memory."""
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.isfile()]
        files = {member.name: tar.extractfile(member).read() for member in members}
    unfinished = folder.with_suffix(".tmp")
    unfinished.mkdir(exist_ok=True)
    for split, batches in zip(("train", "val"), cifar.TEN):
        names = sorted(name for name in files if f"{split}/" in name)[::every]
        labels = [cifar.CLASSES.index(name.split("/")[-2]) for name in names]
        with multiprocessing.Pool() as pool:
            pixels = pool.map(pixels_of, map(files.get, names), chunksize=500)
        order = np.random.default_rng(0).permutation(len(names))
        rows = np.column_stack([np.uint8(labels), pixels])[order]
        for name, part in zip(batches, np.array_split(rows, len(batches))):
            part.tofile(unfinished / f"{name}.bin")
    unfinished.rename(folder)


def pixels_of(file):
    """A JPEG file's bytes -> uint8 (3072,), channel by channel"""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    return np.asarray(image).transpose(2, 0, 1).ravel()


# --- A command ----------------------------------------------------------------------------------------------

def command(plan, args, folder, out):
    """Start what doesn't live and isn't done; copy until the time is up or all is done."""
    end = time.monotonic() + args.seconds
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / f"{ROW}.jsonl"
    if not done.exists():
        start_work(args, folder)
    if not (folder / "gpu.txt").exists():
        start(["tests/drills/gpu.py", *shlex.split(plan.checks), "--out", folder], folder / "gpu.txt")
    while time.monotonic() < end - plan.pause and not done.exists() and is_alive(folder):
        copy(folder, out)
        time.sleep(plan.pause)
    if done.exists():
        seconds = end - time.monotonic() - plan.pause
        start(["results/speed.py", "--parts", *plan.parts, "--resume", "--seconds", f"{seconds}",
               "--out", folder], folder / "speed.txt").wait()
    copy(folder, out)
    print("done" if done.exists() else "not done yet: the same command goes on")
    print(*records(folder / "run/log.jsonl")[-1:])


def start_work(args, folder):
    """Start the work, unless it lives: it has the lock from its start to its end."""
    with open(folder / "lock", "w") as lock:
        if is_free(lock):
            words = [__file__, args.archive, "--work", "--scratch", folder]
            words += ["--tiny"] if args.tiny else []
            process = start(words, folder / "work.txt", pass_fds=[lock.fileno()])
            (folder / "pid").write_text(f"{process.pid}")


def is_free(lock):
    """Take the lock, unless another process has it -> whether we have it"""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_alive(folder):
    with open(folder / "lock", "w") as lock:
        return not is_free(lock)


def start(words, path, **options):
    """Start one of our programs in a session of its own, which survives the end of this command."""
    with open(path, "a") as said:
        options |= {"stdout": said, "stderr": said, "stdin": subprocess.DEVNULL, "start_new_session": True}
        return subprocess.Popen([sys.executable, *words], **options)


def copy(folder, out):
    """What is worth keeping, each file whole at every instant."""
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "found.tar.gz") as file, tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name in SMALL:
            if (folder / name).exists():
                tar.add(folder / name, name)
    backbone = folder / "run/backbone.pth"
    if backbone.exists() and not (out / "backbone.pth.0").exists():
        content = backbone.read_bytes()
        for number, begin in enumerate(range(0, len(content), PART)):
            with replacing(out / f"backbone.pth.{number}") as file:
                file.write(content[begin:begin + PART])


# --- The rehearsal ------------------------------------------------------------------------------------------

def rehearse(args, folder):
    """Interrupt a tiny run at random: the command alone, as a limit does, or all of it, by kill -9. It must
    end with the log, weights and accuracy of one that nobody interrupted."""
    words = [sys.executable, __file__, args.archive, "--tiny", "--seconds", "600", "--scratch"]
    env = {**os.environ, "OUT": f"{folder}/out"}
    began = time.monotonic()
    subprocess.run([*words, folder / "whole"], check=True, env=env)
    seconds = time.monotonic() - began
    shutil.rmtree(folder / "out")
    rng = random.Random(args.seed)
    killed = [*words, folder / "killed"]
    hits = []
    for _ in range(args.rehearse):
        process = subprocess.Popen(killed, env=env, stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(0, 1.5 * seconds / args.rehearse))
        process.kill()
        process.wait()
        how = rng.choice(["command ended", "all killed"])
        if how == "all killed":
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                os.killpg(int((folder / "killed/pid").read_text()), signal.SIGKILL)
        hits.append(f"{how} {place_of(records(folder / 'killed/run/log.jsonl'))}")
        print(hits[-1], flush=True)
    subprocess.run(killed, check=True, env=env)
    whole, other = (outcome_of(folder / name) for name in ("whole", "killed"))
    parts = sorted((folder / "out").glob("backbone.pth.*"))
    joined = b"".join(part.read_bytes() for part in parts)
    assert joined == (folder / "killed/run/backbone.pth").read_bytes()
    for name in whole:
        assert whole[name] == other[name], name
    write_json(KEPT, {"command": f"python tests/drills/quarter.py ARCHIVE --rehearse {args.rehearse}",
                      "options of the run": TINY.run, "uninterrupted, s": round(seconds),
                      "interruptions": "; ".join(hits), "epochs with the same log": len(whole["epochs"]),
                      "weights and accuracy": "the same", "torch": torch.__version__})


def place_of(log):
    """Where a run with this log is."""
    if not log:
        return "before the run"
    if log[-1]["event"] == "end":
        return "after the run"
    return f"in epoch {log[-1].get('epoch', 0) + 1}"


def outcome_of(folder):
    """What two equal runs have in common: the epochs of the log, without times; accuracy; weights."""
    epochs = [r for r in records(folder / "run/log.jsonl") if r["event"] == "epoch"]
    epochs = [{key: value for key, value in r.items() if key not in TIMES} for r in epochs]
    weights = torch.load(folder / "run/checkpoint.pth", weights_only=True)["model"]
    return {"epochs": epochs, "top1": read_json(folder / "cached/lineval.json")["top1"],
            "weights": {name: w.tolist() for name, w in weights.items()}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", metavar="ARCHIVE")
    parser.add_argument("--seconds", type=float, default=570, help="of this command (default: %(default)s)")
    parser.add_argument("--scratch", default="/tmp/quarter", help="the run's folder (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="minutes on a CPU instead: every 60th image")
    parser.add_argument("--rehearse", type=int, metavar="N", help="interrupt a tiny run so many times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    plan = TINY if args.tiny else PLAN
    folder = pathlib.Path(args.scratch)
    if args.work:
        work(plan, args.archive, folder)
    elif args.rehearse:
        with tempfile.TemporaryDirectory() as folder:
            rehearse(args, pathlib.Path(folder))
    else:
        command(plan, args, folder, pathlib.Path(os.environ["OUT"]))


if __name__ == "__main__":
    main()
