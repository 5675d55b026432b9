"""Every row of the paper on one small setting, and whether what the paper found holds there in kind.

    python results/paper_rows.py                                          shapes, three seeds: paper-on-cpu.md, two minutes a run
    python results/paper_rows.py --data CIFAR --epochs 20 --seeds 1       on a GPU: paper-on-cifar10.md. Not run by us yet

From the repository's root, on Linux. A run is `python simsiam.py --experiment NAME ...` and then `python lineval.py --cached`. Its figures
become a line of results/<table>.jsonl; what is there already is not run again, so that an interrupted table goes on where it was. On a
CPU each run has a core of its own: two at a time, on a core each, take less time than one after the other on both.
What comes after -- goes to simsiam.py.
"""
import argparse
import concurrent.futures
import json
import math
import os
import queue
import shlex
import shutil
import statistics
import subprocess
import sys

sys.path.insert(0, os.getcwd())
import augment
import simsiam

FIRST = ("simsiam", "fig2", "table1", "table3", "sec4", "sec5")  # what a table begins with, should time run out

# What the paper found of each row, and beside which other row. Its own accuracy counts as worse where it is at least 1.5 points lower.
# Rows of which it says only that they may fail, or where they transfer best, have no claim that could hold or not
CLAIMS = {"fig2-without-stopgrad": ("collapses", "fig2-with-stopgrad"), "table1-a-no-predictor": ("collapses", "table1-baseline"),
          "table1-b-fixed-predictor": ("does not converge", "table1-baseline"), "table1-c-constant-lr": ("works", "table1-baseline"),
          "table2-batch-64": ("works worse", "simsiam"), "table2-batch-128": ("works", "simsiam"), "table2-batch-256": ("works", "simsiam"),
          "table2-batch-1024": ("works", "simsiam"), "table2-batch-2048": ("works", "simsiam"), "table2-batch-4096": ("works worse", "simsiam"),
          "table3-a-no-bn": ("works worse", "simsiam"), "table3-b-hidden-bn": ("works", "simsiam"), "table3-d-all-bn": ("unstable", "simsiam"),
          "sec3-affine-output-bn": ("works", "simsiam"), "sec42-asymmetric-no-h": ("collapses", "simsiam"),
          "sec45-cross-entropy": ("works worse", "simsiam"), "sec46-asymmetric": ("works worse", "simsiam"), "sec46-asymmetric-2x": ("works", "simsiam"),
          "sec52-1-step": ("works", "simsiam"), "sec52-10-step": ("works", "simsiam"), "sec52-100-step": ("works", "simsiam"),
          "sec52-1-epoch": ("works", "simsiam"), "sec52-moving-average": ("works worse", "simsiam"), "suppA-fc-std-0.01": ("", "simsiam"),
          "suppB-dim-256": ("works worse", "simsiam"), "suppB-dim-512": ("works", "simsiam"), "suppB-dim-1024": ("works", "simsiam"),
          "suppB-hidden-d": ("", "simsiam"), "table4-200-epochs": ("works better", "table4-100-epochs"),
          "table4-400-epochs": ("works better", "table4-100-epochs"), "table4-800-epochs": ("works better", "table4-100-epochs"),
          "table5-recipe": ("", "simsiam")}

# Claims that did not hold on shapes at first: what we guessed, the option that would show it, and the rows to run with it again
GUESSES = [("lr 0.25 is too high without BN", ["--base-lr", "0.1"], ["simsiam", "table3-a-no-bn", "table3-b-hidden-bn"]),
           ("lr 0.25 is too low for the instability", ["--base-lr", "4"], ["simsiam", "table3-d-all-bn"]),
           ("6 epochs are too few for the difference", ["--epochs", "12"], ["simsiam", "sec46-asymmetric", "sec52-moving-average", "table2-batch-64", "suppB-dim-256"])]


def kind(runs, baseline):
    """What these runs (of several seeds) did, in the paper's words: the first that fits. The bounds are ours: written after a look at eight runs
    of 8 epochs, and revised once (the cap of 0.5, and which rows can "not converge") when 18 runs of the table on shapes were in, some of
    whose losses and stds had been seen, but no verdict.

    collapses            loss within 0.1 of its minimum, and std x sqrt(d) below 3/sqrt(batch) (0.1 at least, 0.5 at most)
    does not converge    diverged; or, where loss, targets and steps are the baseline's, the loss fell less than half as far as there
    unstable             in some run, the mean loss of an epoch is above that of the epoch before by more than 0.05
    works worse, works better, works    linear top-1, against two standard errors of the difference, and one point at least
    """
    if any(r["linear"] is None or r["loss"] is None for r in runs):
        return "does not converge"
    changes = simsiam.EXPERIMENTS[runs[0]["experiment"]][0]
    minimum = simsiam.OBJECTIVES[changes.get("objective", "symmetric")][2]
    loss, std, linear = (statistics.mean(r[key] for r in runs) for key in ("loss", "std", "linear"))
    if loss < minimum + 0.1 and std < min(0.5, max(0.1, 3 / math.sqrt(runs[0]["batch"]))):
        return "collapses"
    if not changes.keys() & {"objective", "eta", "batch"} and loss > statistics.mean(r["loss"] for r in baseline) / 2:
        return "does not converge"
    if max((b - a for r in runs for a, b in zip(r["losses"], r["losses"][1:])), default=0) > 0.05:
        return "unstable"
    error = sum(statistics.variance(r["linear"] for r in rs) / len(rs) for rs in (runs, baseline) if len(rs) > 1) ** 0.5
    gain = linear - statistics.mean(r["linear"] for r in baseline)
    return "works" if abs(gain) <= max(1, 2 * error) else "works better" if gain > 0 else "works worse"


class Table:
    """What is to be run (data and more options of the command line, epochs that stand for the paper's 100, seeds), and its files."""

    def __init__(self, data, epochs, seeds, more):
        self.data, self.epochs, self.seeds, self.more = data, epochs, seeds, more
        self.name = "paper-on-cpu" if data is None else "paper-on-cifar10"
        self.lines, self.page = f"results/{self.name}.jsonl", f"results/{self.name}.md"
        self.guesses = GUESSES if data is None else []
        train, self.first, settings = augment.open_data(data, 0)[0], {}, {}
        for name in simsiam.EXPERIMENTS:  # those that, scaled to this setting, are one and the same run, are run once
            s = simsiam.resolve(simsiam.parse(self.options(name, 0)), train, 1) | {"experiment": None}
            self.first[name] = next((other for other in settings if settings[other] == s), name)
            settings[name] = s

    def options(self, name, seed, guess=()):
        """A run's command line. Warm-up is a tenth of the epochs, and a whole one at least; Table 4's schedules have half the epochs that they
        would have, for time."""
        changes = simsiam.EXPERIMENTS[name][0]
        epochs = self.epochs * changes["epochs"] // 200 if "epochs" in changes else self.epochs
        warmup = ["--warmup", str(max(1, self.epochs // 10))] if "warmup" in changes else []
        return [*([] if self.data is None else [self.data]), "--experiment", name, "--seed", str(seed), "--epochs", str(epochs),
                *warmup, "--knn-every", "1000", *self.more, *guess]

    def run(self, name, seed, guess):
        """One run and its linear evaluation -> a record, with null where the run diverged. Raises RuntimeError where it failed otherwise."""
        out = os.path.join("runs", self.name, "".join([name, *guess, f"-{seed}"]))
        shutil.rmtree(out, ignore_errors=True)
        command = ["simsiam.py", *self.options(name, seed, guess), "--out", out]
        for script in (command, ["lineval.py", "--cached", "--ckpt", os.path.join(out, "checkpoint.pth")]):
            ended = subprocess.run([sys.executable, *script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            diverged = ended.returncode != 0 and "not finite" in ended.stderr
            if diverged:
                break
            if ended.returncode != 0:
                raise RuntimeError(ended.stderr)
        with open(os.path.join(out, "log.jsonl")) as f:
            start, *events = map(json.loads, f)
        epochs, linear = [event for event in events if event["event"] == "epoch"], None
        if not diverged:
            with open(os.path.join(out, "lineval-cached", "lineval.json")) as f:
                linear = json.load(f)["top1"]
        settings = {key: start["settings"][key] for key in ("batch", "dim", "pred_dim", "epochs", "warmup")}
        return {"experiment": name, "seed": seed, "guess": list(guess), **{key: None if diverged else epochs[-1][key] for key in ("loss", "std", "knn", "collapsed", "seconds")}, "linear": linear,
                "losses": [record["loss"] for record in epochs[1:]], **settings, "torch": start["torch"], "device": start["device"],
                "command": shlex.join(["python", *command])}

    def done(self):
        """The records of the runs that this table is to hold; a line that a kill has cut short is none."""
        if not os.path.exists(self.lines):
            return []
        with open(self.lines) as f:
            records = [json.loads(line) for line in f if line.endswith("}\n")]
        return [r for r in records if shlex.split(r["command"])[2:-2] == self.options(r["experiment"], r["seed"], r["guess"])]

    def add(self, job):
        with open(self.lines, "a") as f:
            f.write(json.dumps(job.result()) + "\n")
        print(job.result(), flush=True)

    def make(self):
        """Run what is missing, then write the page."""
        cuda, cores = simsiam.torch.cuda.is_available(), queue.SimpleQueue()
        for core in os.sched_getaffinity(0):
            cores.put(core)
        there = [(r["experiment"], r["seed"], r["guess"]) for r in self.done()]
        todo = [(name, seed, []) for seed in self.seeds for name, first in self.first.items() if name == first]
        todo.sort(key=lambda job: (simsiam.EXPERIMENTS[job[0]][0].get("epochs", 100), not job[0].startswith(FIRST)))  # the long ones last
        todo += [(name, seed, guess) for _, guess, names in self.guesses for seed in self.seeds for name in names]
        todo = [job for job in todo if job not in there]
        pin = (lambda: None) if cuda else (lambda: os.sched_setaffinity(0, {cores.get()}))  # of a thread; its runs inherit it
        pool = concurrent.futures.ThreadPoolExecutor(1 if cuda else cores.qsize(), initializer=pin)
        try:
            for job in concurrent.futures.as_completed([pool.submit(self.run, *job) for job in todo]):
                self.add(job)
        finally:
            pool.shutdown(cancel_futures=True)
        with open(self.page, "w") as f:
            f.write(self.text())

    def text(self):
        """The page, from the lines."""
        done = self.done()
        runs = {name: [r for r in done if r["experiment"] == first and not r["guess"]] for name, first in self.first.items()}
        runs = {name: rs for name, rs in runs.items() if rs}
        machines = sorted({f"{r['device']}, torch {r['torch']}" for rs in runs.values() for r in rs})
        lines = [f"Every row of the paper on {'the drawn shapes' if self.data is None else 'CIFAR-10'}: {self.epochs} epochs stand for the paper's 100. "
                 f"Made by `results/paper_rows.py`, whose `CLAIMS` and `kind` say what the words in the last columns mean. {'; '.join(machines)} a run.", "",
                 "| experiment | here | seeds | loss | std x sqrt(d) | kNN | linear, cached | the paper, ImageNet | in kind, the paper | here | held |",
                 "|---|---|---|---|---|---|---|---|---|---|---|"]
        for name, rs in runs.items():
            s, first = rs[0], self.first[name]
            here = f"batch {s['batch']}, d {s['dim']}-{s['pred_dim']}, {s['epochs']} epochs" if name == first else f"the run of {first}"
            lines.append(f"| {name} | {here} | {columns(name, rs, runs)} |")
        if self.guesses:
            lines += ["", "What was guessed where a claim did not hold at first, tested by the same rows with another option, beside simsiam with that option:", "",
                      "| experiment | with | guess | seeds | loss | std x sqrt(d) | kNN | linear, cached | the paper, ImageNet | in kind, the paper | here | held |",
                      "|---|---|---|---|---|---|---|---|---|---|---|---|"]
        for text, guess, names in self.guesses:
            runs = {name: [r for r in done if (r["experiment"], r["guess"]) == (name, guess)] for name in names}
            lines += [f"| {name} | {' '.join(guess)} | {text} | {columns(name, rs, runs)} |" for name, rs in runs.items() if rs]
        return "\n".join(lines) + "\n"


def columns(name, rs, runs):
    """The figures and the verdict of a row, from its runs, among those of all rows."""
    figures = " | ".join(spread([r[key] for r in rs], digits) for key, digits in (("loss", 3), ("std", 2), ("knn", 1), ("linear", 1)))
    claim, beside = CLAIMS.get(name, ("", ""))
    found = kind(rs, runs[beside]) if runs.get(beside) else ""
    held = "" if not (found and claim) else "yes" if found == claim or (claim, found) == ("works", "works better") else "no"
    return f"{len(rs)} | {figures} | {simsiam.EXPERIMENTS[name][1]} | {claim} | {found} | {held}"


def spread(values, digits):
    """Mean, and the standard deviation where there is one."""
    if None in values:
        return "not finite"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", metavar="CIFAR", help="a CIFAR-10 folder (default: shapes)")
    parser.add_argument("--epochs", type=int, default=6, help="that stand for the paper's 100 (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("more", nargs="*", help="after --: options for simsiam.py")
    args = parser.parse_args()
    Table(args.data, args.epochs, args.seeds, args.more).make()
