"""kill -9 at random instants of a run, and what is left: after each, the run is resumed; at its end the weights must be, bit for bit, those
of a run that nobody killed.

    python results/kills.py --kills 120 --seed 0          from the repository's root, on Linux; some minutes on 2 CPU cores

The run is small (a tiny network on drawn shapes) and writes a checkpoint after every step, so that many kills fall into the writing. Each
process is forked from this one, which has imported torch already, and notes in a shared byte what it is doing.
"""
import argparse
import collections
import contextlib
import json
import mmap
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time

sys.path.insert(0, os.getcwd())
import simsiam
import torch

PHASES = ["starting", "between steps", "in a step", "writing a checkpoint", "writing the log", "kNN", "ended"]
OPTIONS = shlex.split("--arch resnet18 --cifar-stem --width 1/16 --dim 16 --pred-dim 4 --proj-hidden 16 --batch 16 --epochs 3 --size 16 --base-lr 0.5 "
                      "--knn-every 1 --save-minutes 0 --workers 0")


def note_phases(marker):
    """Make the program write what it does into the marker."""
    def during(phase):
        @contextlib.contextmanager
        def block(*args):
            before, marker[0] = marker[0], phase(*args)
            yield
            marker[0] = before
        return block

    def wrap(name, phase):
        function = getattr(simsiam, name)

        def noted(*args, **options):
            with during(lambda: phase)():
                return function(*args, **options)
        setattr(simsiam, name, noted)

    wrap("train_step", 2), wrap("monitor", 5), wrap("calibrated", 5)
    replacing, record = simsiam.replacing, simsiam.Run.record

    @contextlib.contextmanager
    def noted_replacing(path, *args, **options):
        with during(lambda: 3 if path.endswith(".pth") else 4)(), replacing(path, *args, **options) as f:
            yield f

    def noted_record(*args, **options):
        with during(lambda: 4)():
            return record(*args, **options)

    begin = simsiam.Run.begin

    def noted_begin(*args, **options):
        begin(*args, **options)
        marker[0] = 1

    simsiam.replacing, simsiam.Run.record, simsiam.Run.begin = noted_replacing, noted_record, noted_begin


def live(data, out, marker, seconds=None):
    """One process's life: it starts, or goes on, and is killed after so many seconds -> what it was doing, how long it lived."""
    marker[0], began = 0, time.monotonic()
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        note_phases(marker)
        said = simsiam.launch("simsiam.py", simsiam.pretrain, simsiam.parse([data, *OPTIONS, "--out", out, "--resume", "auto"]))
        marker[0] = PHASES.index("ended") if said is None else marker[0]
        simsiam.leave(said)
    while seconds is None or time.monotonic() - began < seconds:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if status != 0:
                sys.exit(f"kills.py: a resumed run failed (status {status}); its folder is {out}")
            return PHASES[marker[0]], time.monotonic() - began
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return PHASES[marker[0]], seconds


def weights(out):
    checkpoint = torch.load(os.path.join(out, "checkpoint.pth"), weights_only=True)
    return checkpoint["model"] | {f"momentum {k}": v["momentum_buffer"] for k, v in checkpoint["optimizer"]["state"].items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, marker = random.Random(args.seed), mmap.mmap(-1, 1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])  # one thread: OpenMP's would not survive the fork
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = os.path.join(folder, "data")
        for split, start, count in (("train", 0, 480), ("val", 4000, 60)):
            source = simsiam.augment.draw_shapes(0, start, count, 16)
            for i in range(count):
                os.makedirs(place := os.path.join(data, split, str(source.labels[i])), exist_ok=True)
                simsiam.Image.fromarray(source.image(i).numpy()).save(os.path.join(place, f"{i:04}.png"))
        _, whole_time = live(data, os.path.join(folder, "whole"), marker)
        whole = weights(os.path.join(folder, "whole"))
        print(f"an uninterrupted run takes {whole_time:.1f} s", file=sys.stderr, flush=True)
        hits, runs = collections.Counter(), 0
        while hits.total() < args.kills:
            out, phase = os.path.join(folder, "killed"), None
            while phase != "ended":
                phase, _ = live(data, out, marker, rng.uniform(0, whole_time))
                hits[phase] += phase != "ended"
                print(f"{hits.total()} kills, {runs} runs ended as they should; now {phase}", file=sys.stderr, flush=True)
            again = weights(out)
            if again.keys() != whole.keys() or not all(torch.equal(again[k], whole[k]) for k in whole):
                sys.exit(f"kills.py: after {hits.total()} kills, other weights than the uninterrupted run's")
            runs += 1
            shutil.rmtree(out)
    result = {"command": shlex.join(["python", *sys.argv]), "kills": hits.total(), "hits": {phase: hits[phase] for phase in PHASES[:-1]}, "runs": runs,
              "ended with the uninterrupted weights": runs, "seed": args.seed, "torch": torch.__version__, "device": f"CPU, {torch.get_num_threads()} threads"}
    with open("results/kills.json", "w") as f:
        f.write(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
