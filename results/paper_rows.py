"""Every row of the paper on one small setting, and whether the paper's finding holds there in kind.

    python results/paper_rows.py                                        shapes, three seeds, two minutes a run
    python results/paper_rows.py --data CIFAR --epochs 20 --seeds 1     on a GPU. Not run there yet

Start it from the repository's root, on Linux. The first makes results/paper_rows.md, the second makes
results/paper_rows-cifar10.md. What follows -- on the command line goes to simsiam.py.

A run is `python simsiam.py --experiment NAME ...` and then `python lineval.py --cached`. Its figures become
a line of the .jsonl file beside the page. A run that has its line is not run again: the same command
continues an interrupted table. On a CPU each run has a core of its own.
"""
import argparse
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from itertools import pairwise
from operator import itemgetter

sys.path.insert(0, os.getcwd())
import simsiam
from harness.data import open_data
from harness.errors import Refused
from results.cores import results_of

# These rows are run first: they are in the page even if the time runs out.
FIRST = ("simsiam", "fig2", "table1", "table3", "sec4", "sec5")

# The paper's finding about a row, and the row that it compares with. An accuracy counts as worse where it is
# at least 1.5 points lower. "" is no claim: the paper only says that the row may fail, or transfers best.
CLAIMS = {
    "fig2-without-stopgrad": ("collapses", "fig2-with-stopgrad"),
    "table1-a-no-predictor": ("collapses", "table1-baseline"),
    "table1-b-fixed-predictor": ("does not converge", "table1-baseline"),
    "table1-c-constant-lr": ("works", "table1-baseline"),
    "table2-batch-64": ("works worse", "simsiam"),
    "table2-batch-128": ("works", "simsiam"),
    "table2-batch-256": ("works", "simsiam"),
    "table2-batch-1024": ("works", "simsiam"),
    "table2-batch-2048": ("works", "simsiam"),
    "table2-batch-4096": ("works worse", "simsiam"),
    "table3-a-no-bn": ("works worse", "simsiam"),
    "table3-b-hidden-bn": ("works", "simsiam"),
    "table3-d-all-bn": ("unstable", "simsiam"),
    "sec3-affine-output-bn": ("works", "simsiam"),
    "sec42-asymmetric-no-h": ("collapses", "simsiam"),
    "sec45-cross-entropy": ("works worse", "simsiam"),
    "sec46-asymmetric": ("works worse", "simsiam"),
    "sec46-asymmetric-2x": ("works", "simsiam"),
    "sec52-1-step": ("works", "simsiam"),
    "sec52-10-step": ("works", "simsiam"),
    "sec52-100-step": ("works", "simsiam"),
    "sec52-1-epoch": ("works", "simsiam"),
    "sec52-moving-average": ("works worse", "simsiam"),
    "suppA-fc-std-0.01": ("", "simsiam"),
    "suppB-dim-256": ("works worse", "simsiam"),
    "suppB-dim-512": ("works", "simsiam"),
    "suppB-dim-1024": ("works", "simsiam"),
    "suppB-hidden-d": ("", "simsiam"),
    "table4-200-epochs": ("works better", "table4-100-epochs"),
    "table4-400-epochs": ("works better", "table4-100-epochs"),
    "table4-800-epochs": ("works better", "table4-100-epochs"),
    "table5-base": ("", "simsiam"),
    "table5-recipe": ("", "simsiam"),
}

# Claims that did not hold on shapes at first: our guess why, an option that tests it, the rows to run with it
WITHOUT_BN = ["simsiam", "table3-a-no-bn", "table3-b-hidden-bn"]
SLOW_TO_DIFFER = ["simsiam", "sec46-asymmetric", "sec52-moving-average", "table2-batch-64", "suppB-dim-256"]
GUESSES = [
    ("lr 0.25 is too high without BN", ["--base-lr", "0.1"], WITHOUT_BN),
    ("lr 0.25 is too low for the instability", ["--base-lr", "4"], ["simsiam", "table3-d-all-bn"]),
    ("6 epochs are too few for the difference", ["--epochs", "12"], SLOW_TO_DIFFER),
]


# --- The verdict ----------------------------------------------------------------------------------

def kind(runs, baseline):
    """A row's outcome, judged by its runs (of several seeds), in the paper's words: the first that fits.

    collapses            loss within 0.1 of its minimum, and std x sqrt(d) below 3/sqrt(batch); that bound is
                         at least 0.1 and at most 0.5
    does not converge    diverged; or, where loss, targets and steps are the baseline's, the loss fell less
                         than half as far as there
    unstable             in some run, an epoch's mean loss is more than 0.05 above that of the epoch before
    works worse, works better, works    linear top-1, against two standard errors of the difference, and one
                         point at least

    The bounds are ours. We wrote them after a look at eight runs of 8 epochs. We revised them once (the cap
    of 0.5, and which rows can "not converge") when 18 runs of the table on shapes were in. We had seen some
    of their losses and stds then, but no verdict.
    """
    if any(r["linear"] is None or r["loss"] is None for r in runs):
        return "does not converge"
    changes, _ = simsiam.EXPERIMENTS[runs[0]["experiment"]]
    minimum = simsiam.OBJECTIVES[changes.get("objective", "symmetric")].minimum
    loss = mean_of("loss", runs)
    batch = runs[0]["batch"]
    bound = min(0.5, max(0.1, 3 / math.sqrt(batch)))
    if loss < minimum + 0.1 and mean_of("std", runs) < bound:
        return "collapses"
    comparable = not changes.keys() & {"objective", "eta", "batch"}
    if comparable and loss > mean_of("loss", baseline) / 2:
        return "does not converge"
    rises = [after - before for r in runs for before, after in pairwise(r["losses"])]
    if max(rises, default=0) > 0.05:
        return "unstable"
    gain = mean_of("linear", runs) - mean_of("linear", baseline)
    error = math.sqrt(squared_error(runs) + squared_error(baseline))
    if abs(gain) <= max(1, 2 * error):
        return "works"
    return "works better" if gain > 0 else "works worse"


def mean_of(key, runs):
    return statistics.mean(r[key] for r in runs)


def squared_error(runs):
    """Of the mean of their linear top-1; 0 for a single run, which tells nothing of it."""
    if len(runs) < 2:
        return 0
    return statistics.variance(r["linear"] for r in runs) / len(runs)


# --- The table ------------------------------------------------------------------------------------

class Table:
    """What is to be run, and its files.

    data      a CIFAR-10 folder, or None for shapes
    epochs    so many stand for the paper's 100
    more      options for simsiam.py
    first     {experiment: the experiment that stands for it}. Some differ on ImageNet, but scaled to this
              setting they are one and the same run, which is run once
    """

    def __init__(self, data, epochs, seeds, more):
        self.data = data
        self.epochs = epochs
        self.seeds = seeds
        self.more = more
        self.name = "paper_rows" if data is None else "paper_rows-cifar10"
        self.lines = f"results/{self.name}.jsonl"
        self.page = f"results/{self.name}.md"
        self.guesses = GUESSES if data is None else []
        train, _, _ = open_data(data)
        self.first = {}
        seen = {}
        for name in simsiam.EXPERIMENTS:
            settings = simsiam.settings_for(simsiam.parse(self.options(name, 0)), train, 1)
            settings = settings | {"experiment": None}
            alike = [other for other in seen if seen[other] == settings]
            self.first[name] = alike[0] if alike else name
            seen[name] = settings

    def options(self, name, seed, guess=()):
        """A run's command line.

        Warm-up is a tenth of the epochs, and a whole one at least. Table 4's schedules have half the epochs
        that they would have by this scale, for want of time.
        """
        changes, _ = simsiam.EXPERIMENTS[name]
        epochs = self.epochs
        if "epochs" in changes:
            epochs = self.epochs * changes["epochs"] // 200
        options = [] if self.data is None else [self.data]
        options += ["--experiment", name, "--seed", str(seed), "--epochs", str(epochs)]
        if "warmup" in changes:
            options += ["--warmup", str(max(1, self.epochs // 10))]
        return [*options, "--knn-every", "1000", *self.more, *guess]

    def run(self, name, seed, guess):
        """One run and its linear evaluation -> a record. Raises RuntimeError where one of them fails.

        To diverge is no failure: the record then has null for loss, std, kNN and linear accuracy.
        """
        out = f"runs/{self.name}/{name}{''.join(guess)}-{seed}"
        shutil.rmtree(out, ignore_errors=True)
        pretrain = ["simsiam.py", *self.options(name, seed, guess), "--out", out]
        evaluate = ["lineval.py", "--cached", "--ckpt", os.path.join(out, "checkpoint.pth")]
        converged = succeeds(pretrain) and succeeds(evaluate)
        with open(os.path.join(out, "log.jsonl")) as f:
            start, *events = map(json.loads, f)
        epochs = [event for event in events if event["event"] == "epoch"]
        record = {"experiment": name, "seed": seed, "guess": list(guess)}
        for key in ("loss", "std", "knn", "collapsed", "seconds"):
            record[key] = epochs[-1][key] if converged else None
        record["linear"] = linear_top1(out) if converged else None
        record["losses"] = [event["loss"] for event in epochs[1:]]
        for key in ("batch", "dim", "pred_dim", "epochs", "warmup"):
            record[key] = start["settings"][key]
        record["torch"] = start["torch"]
        record["device"] = start["device"]
        record["command"] = shlex.join(["python", *pretrain])
        return record

    def done(self):
        """The records of the runs that this table holds. A line that a kill has cut short is no record."""
        if not os.path.exists(self.lines):
            return []
        with open(self.lines) as f:
            records = [json.loads(line) for line in f if line.endswith("}\n")]
        return [r for r in records if self.holds(r)]

    def holds(self, record):
        """Whether this table would start a record's command: python, the script, options, --out, a folder."""
        _, _, *options, _, _ = shlex.split(record["command"])
        return options == self.options(record["experiment"], record["seed"], record["guess"])

    def todo(self):
        """The jobs that are not done: name, seed, guess. Guesses come last, after the long schedules."""
        def urgency(job):
            name, _, _ = job
            changes, _ = simsiam.EXPERIMENTS[name]
            return changes.get("epochs", 100), not name.startswith(FIRST)

        names = [name for name, first in self.first.items() if name == first]
        jobs = [(name, seed, []) for seed in self.seeds for name in names]
        jobs.sort(key=urgency)
        for _, guess, names in self.guesses:
            jobs += [(name, seed, guess) for seed in self.seeds for name in names]
        done = [itemgetter("experiment", "seed", "guess")(record) for record in self.done()]
        return [job for job in jobs if job not in done]

    def make(self):
        """Run what is missing, then write the page."""
        for record in results_of(self.run, self.todo()):
            with open(self.lines, "a") as f:
                f.write(json.dumps(record) + "\n")
            print(record, flush=True)
        with open(self.page, "w") as f:
            f.write(self.text())

    def text(self):
        """The page, from the lines."""
        done = self.done()
        runs = {}
        for name, first in self.first.items():
            found = [r for r in done if r["experiment"] == first and not r["guess"]]
            if found:
                runs[name] = found
        machines = sorted({f"{r['device']}, torch {r['torch']}" for rs in runs.values() for r in rs})
        setting = "the drawn shapes" if self.data is None else "CIFAR-10"
        lines = [f"Every row of the paper on {setting}: {self.epochs} epochs stand for the paper's 100. Made "
                 "by `results/paper_rows.py`, whose `CLAIMS` and `kind` say what the words in the last "
                 f"columns mean. {'; '.join(machines)} a run.", ""]
        lines += heads("experiment", "here")
        for name, rs in runs.items():
            lines.append(f"| {name} | {self.scaled(name, rs[0])} | {columns(name, rs, runs)} |")
        if self.guesses:
            lines += ["", "What was guessed where a claim did not hold at first, tested by the same rows "
                      "with another option, beside simsiam with that option:", ""]
            lines += heads("experiment", "with", "guess")
        for text, guess, names in self.guesses:
            guessed = [r for r in done if r["guess"] == guess]
            runs = {name: [r for r in guessed if r["experiment"] == name] for name in names}
            option = " ".join(guess)
            for name, rs in runs.items():
                if rs:
                    lines.append(f"| {name} | {option} | {text} | {columns(name, rs, runs)} |")
        return "\n".join(lines) + "\n"

    def scaled(self, name, record):
        """What became of a row of the paper in this setting."""
        if name != self.first[name]:
            return f"the run of {self.first[name]}"
        dims = f"d {record['dim']}-{record['pred_dim']}"
        return f"batch {record['batch']}, {dims}, {record['epochs']} epochs"


def succeeds(command):
    """Run a program -> False where it has diverged. Raises RuntimeError where it fails for another reason."""
    ended = subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL,
                           stderr=subprocess.PIPE, text=True)
    if ended.returncode == 0:
        return True
    if "not finite" in ended.stderr:
        return False
    raise RuntimeError(ended.stderr)


def linear_top1(out):
    with open(os.path.join(out, "lineval-cached", "lineval.json")) as f:
        return json.load(f)["top1"]


# --- Cells ----------------------------------------------------------------------------------------

def heads(*names):
    """The two lines that a table begins with: these columns, and those that `columns` fills."""
    names = [*names, "seeds", "loss", "std x sqrt(d)", "kNN", "linear, cached", "the paper, ImageNet",
             "in kind, the paper", "here", "held"]
    rule = "---|" * len(names)
    return [f"| {' | '.join(names)} |", f"|{rule}"]


DIGITS = {"loss": 3, "std": 2, "knn": 1, "linear": 1}


def columns(name, rs, runs):
    """A row's figures and verdict. rs: its runs. runs: those of all rows, {experiment: its runs}."""
    cells = [f"{len(rs)}"]
    for key, digits in DIGITS.items():
        cells.append(spread([r[key] for r in rs], digits))
    _, paper = simsiam.EXPERIMENTS[name]
    claim, beside = CLAIMS.get(name, ("", ""))
    found = kind(rs, runs[beside]) if runs.get(beside) else ""
    return " | ".join([*cells, paper, claim, found, held(claim, found)])


def held(claim, found):
    """yes or no; nothing where there is no claim, or no run to compare with."""
    if not claim or not found:
        return ""
    if found == claim or (claim, found) == ("works", "works better"):
        return "yes"
    return "no"


def spread(values, digits):
    """Mean, and the standard deviation where there is one."""
    if None in values:
        return "not finite"
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} +- {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", metavar="CIFAR", help="a CIFAR-10 folder (default: shapes)")
    parser.add_argument("--epochs", type=int, default=6,
                        help="so many stand for the paper's 100 (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("more", nargs="*", help="after --: options for simsiam.py")
    args = parser.parse_args()
    try:
        Table(args.data, args.epochs, args.seeds, args.more).make()
    except (Refused, OSError, RuntimeError) as error:
        sys.exit(f"paper_rows.py: {error}")
