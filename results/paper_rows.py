"""The paper's rows on a small setting: how much each differs from the row that the paper compares it with,
and whether the paper's claim holds.

    python results/paper_rows.py [--minutes 60]       on drawn shapes; again until it says that all is done
    python results/paper_rows.py --show               only say what is missing, and make the pages anew
    python results/paper_rows.py --data CIFAR --epochs 20 --seeds 0 1 2    on a GPU. Not run there yet

Start it from the repository's root, on Linux. Three things are run: the candidates among which the setting
was chosen (CANDIDATES, seeds 7 to 9), the rows (ROWS, seeds 0 to 4), and a closer look at Table 3 (seeds 0 to
2). A run is `python simsiam.py` and then `python lineval.py --cached`; on a CPU each has a core of its own.
Runs that differ in the seed alone lie in one file of results/paper_rows, a line each, with the commands, the
log and the accuracy. A run that has its line is not made again.

A row is compared with another by pairs of runs of one seed, so of the same views, in the same order, and the
same first weights of the backbone. The images are the same for all runs. What comes of that becomes the
tables of results/paper_rows.md and results/README.md, and a picture.
"""
import argparse
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import statistics
import sys
import time
from typing import NamedTuple

sys.path.insert(0, os.getcwd())

import simsiam
from harness.common.errors import Refused
from harness.common.pictures import BLUE, RED
from results.cifar10 import Interrupted, cell, do, records
from results.cores import results_of
from results.pages import Panel, draw_rows, tick, write_tables
from results.pairs import T95, difference, half_interval

PAGE = pathlib.Path("results/paper_rows.md")
FRONT = pathlib.Path("results/README.md")
PICTURE = "results/paper_rows.png"

# The setting: the candidate whose cached linear accuracy varies the least over seeds 7 to 9, at least 30
# points above the untrained network's, in at most 4 minutes a run on one core.
CANDIDATES = (
    "--size 16 --epochs 8",
    "--size 16 --epochs 12",
    "--size 20 --epochs 8",
    "--size 24 --epochs 6",
    "--size 24 --epochs 8",
    "--size 16 --epochs 12 --base-lr 1",
)
SETTING = "--size 16 --epochs 12"
CHOOSING = (7, 8, 9)
SEEDS = (0, 1, 2, 3, 4)


class Row(NamedTuple):
    """A row of the paper: an experiment of simsiam.py."""
    beside: str  # the experiment that the paper compares it with
    claim: str   # what the paper says of it, as `verdict` judges it
    words: str   # what the paper says of it


DECAYED = "fig2-with-stopgrad"  # Table 1's baseline is this same run
CONSTANT = "simsiam"            # Table 1 (c) and Table 3 (c) are this same run
ROWS = {
    "simsiam": Row(
        DECAYED, "no worse", "Table 1 (c): with a constant lr of h it is even better"),
    "fig2-without-stopgrad": Row(DECAYED, "collapses", "Fig. 2: without stop-gradient it collapses"),
    "table1-a-no-predictor": Row(DECAYED, "collapses", "Table 1 (a): without h it collapses"),
    "table1-b-fixed-predictor": Row(
        DECAYED, "does not converge", "Table 1 (b): with h fixed as initialised it doesn't converge"),
    "table3-a-no-bn": Row(
        CONSTANT, "worse", "Table 3 (a): without BN in the heads it doesn't collapse, but is much worse"),
    "table3-b-hidden-bn": Row(
        CONSTANT, "no worse", "Table 3 (b): with BN on the hidden layers alone it is nearly as good"),
    "table3-d-all-bn": Row(CONSTANT, "unstable", "Table 3 (d): with a BN on h's output too it is unstable"),
    "sec42-asymmetric-no-h": Row(
        "sec46-asymmetric", "fails", "Sec. 4.2: the asymmetric loss fails without h"),
    "sec45-cross-entropy": Row(
        CONSTANT, "worse", "Sec. 4.5: with cross-entropy it works, but is worse"),
    "sec46-asymmetric": Row(
        CONSTANT, "worse", "Sec. 4.6: with the asymmetric loss it works, but is worse"),
    "sec46-asymmetric-2x": Row(
        "sec46-asymmetric", "better", "Sec. 4.6: with two pairs of views the asymmetric loss is less behind"),
    "sec52-100-step": Row(
        CONSTANT, "no worse", "Sec. 5.2: with 100 steps on the same targets it is even better"),
    "sec52-moving-average": Row(
        "table1-a-no-predictor", "better", "Sec. 5.2: with a moving average it works even without h"),
    "suppB-dim-256": Row(CONSTANT, "worse", "Supp. B: with an eighth of d it works, but is worse"),
    "suppB-hidden-d": Row(
        CONSTANT, "less stable", "Supp. B: without the bottleneck in h it can be less stable or fail"),
}

# Table 3, looked at again, because its rows (a), (b) and (d) did otherwise here than in the paper. Of what
# differs from the paper's ImageNet, two things are tried: our base lr is 2 and its 0.05; our projection MLP
# has two layers, as on CIFAR-10, and its three. So the rows are run with a quarter of the lr, with three
# layers, and with both.
TABLE_3 = ("simsiam", "table3-a-no-bn", "table3-b-hidden-bn", "table3-d-all-bn")
LRS = (0.5, 2)
LAYERS = (2, 3)
LOOKING = (0, 1, 2)


# --- What is to be run ------------------------------------------------------------------------------------

class Runs(NamedTuple):
    """Runs that differ in nothing but the seed."""
    name: str     # of their file
    options: str  # of simsiam.py
    seeds: tuple


def programme():
    """All Runs on shapes: groups of them, in the order of their use."""
    return [choice(), rows_on_shapes(), looks()]


def rows_on_shapes():
    """The rows, and the one that some of them are compared with."""
    return [Runs(name, f"--experiment {name} {SETTING}", SEEDS) for name in (DECAYED, *ROWS)]


def looks():
    """The cells of Table 3's closer look that are not the rows themselves."""
    cells = [look(name, lr, layers) for lr in LRS for layers in LAYERS for name in TABLE_3]
    return [cell for cell in cells if cell.name not in TABLE_3]


def look(name, lr, layers):
    """The runs of a cell; at the recipe's lr and layers those of the row itself."""
    recipe = simsiam.recipe("shapes")
    if (lr, layers) == (recipe["base_lr"], recipe["proj_layers"]):
        return Runs(name, f"--experiment {name} {SETTING}", SEEDS)
    options = f"--experiment {name} {SETTING} --base-lr {lr} --proj-layers {layers}"
    return Runs(f"{name}-lr-{lr}-layers-{layers}", options, LOOKING)


def choice():
    """The candidates."""
    return [Runs(name_of_candidate(options), options, CHOOSING) for options in CANDIDATES]


def name_of_candidate(options):
    """size-16-epochs-8"""
    return re.sub("[- ]+", "-", options).strip("-")


def rows_on_cifar10(folder, epochs, seeds):
    """The rows on the full CIFAR-10. Warm-up, where there is one, is a tenth of the epochs, as in the
    paper."""
    runs = []
    for name in (DECAYED, *ROWS):
        options = f"{shlex.quote(folder)} --experiment {name} --epochs {epochs}"
        changes, _ = simsiam.EXPERIMENTS[name]
        if "warmup" in changes:
            options += f" --warmup {math.ceil(epochs / 10)}"
        runs.append(Runs(name, options, seeds))
    return runs


class Kept:
    """The runs whose results are kept, in a folder of files, a line for each run."""

    def __init__(self, folder):
        self.folder = folder

    def path(self, name):
        return f"{self.folder}/{name}.jsonl"

    def of(self, name):
        """{seed: result}; one that a kill has cut short is none."""
        return {result["seed"]: result for result in records(self.path(name))}

    def add(self, name, result):
        os.makedirs(self.folder, exist_ok=True)
        with open(self.path(name), "a") as f:
            f.write(json.dumps(result) + "\n")

    def missing(self, groups):
        """The jobs that are to be done: (name, options, seed); in each group a seed of all its runs before
        the next seed."""
        jobs = [(number, seed, one) for number, group in enumerate(groups) for one in group
                for seed in one.seeds if seed not in self.of(one.name)]
        jobs.sort(key=lambda job: job[:2])
        return [(one.name, one.options, seed) for _, seed, one in jobs]


def run(scratch, deadline, name, options, seed):
    """A run and its linear evaluation -> name, result. Raises Interrupted at the deadline.

    To diverge is a result, too: its accuracy is None then.
    """
    out = f"{scratch}/{name}-{seed}"
    pretrain = ["simsiam.py", *shlex.split(options), "--seed", f"{seed}", "--workers", "0",
                "--knn-every", "1000", "--out", out]
    evaluate = ["lineval.py", "--ckpt", f"{out}/checkpoint.pth", "--cached", "--workers", "0"]
    top1 = None
    try:
        if not os.path.exists(f"{out}/backbone.pth"):
            do([*pretrain, "--resume", "auto"], deadline)
        judged = f"{out}/lineval-cached/lineval.json"
        if not os.path.exists(judged):
            do([*evaluate, "--resume", "auto"], deadline)
        with open(judged) as f:
            top1 = json.load(f)["top1"]
    except RuntimeError as error:
        if "not finite" not in f"{error}":
            raise
    return name, {"seed": seed, "command": shlex.join(["python", *pretrain]),
                  "evaluation": shlex.join(["python", *evaluate]), "top1": top1,
                  "log": records(f"{out}/log.jsonl")}


def measure_untrained(folder, deadline):
    """The cached accuracy of an untrained network at the setting's size, to folder/untrained.json."""
    kept = f"{folder}/untrained.json"
    if not os.path.exists(kept):
        size = simsiam.parse(SETTING.split()).size
        out = "runs/paper_rows/untrained"
        os.makedirs(folder, exist_ok=True)
        do(["lineval.py", "--ckpt", "random:resnet18", "--size", f"{size}", "--cached", "--workers", "0",
            "--out", out], deadline)
        shutil.copy(f"{out}/lineval.json", kept)


# --- What came of a run -----------------------------------------------------------------------------------

CHANCE = 10.0   # of ten classes: the accuracy of a run that has diverged
RISE = 0.05     # of the mean loss from an epoch to the next: those of `simsiam` are 0.01 at most
LEARNED = 5.0   # points of kNN above its untrained network: a run with less has learned nothing


def top1(result):
    return CHANCE if result["top1"] is None else result["top1"]


def epochs_of(result):
    """The log's records of the epochs, without that of the untrained network."""
    return measured(result)[1:]


def measured(result):
    """The log's records of the untrained network and of the epochs."""
    return [record for record in result["log"] if record["event"] == "epoch"]


def last(result, key):
    return measured(result)[-1][key]


def diverged(result):
    return result["top1"] is None


def collapsed(result):
    """By the alarm of the run itself, in the last epoch."""
    return not diverged(result) and last(result, "collapsed")


def learned_nothing(result):
    """It has neither diverged nor collapsed, and yet its kNN is hardly above the untrained network's."""
    if diverged(result) or collapsed(result):
        return False
    return last(result, "knn") < measured(result)[0]["knn"] + LEARNED


def failed(result):
    return diverged(result) or collapsed(result) or learned_nothing(result)


def did_not_converge(result, beside):
    """The loss has fallen less than half as far as that of the run beside it, which has the same minimum."""
    return diverged(result) or last(result, "loss") > last(beside, "loss") / 2


def unstable(result):
    """In some epoch the mean loss was more than RISE above that of the epoch before."""
    losses = [record["loss"] for record in epochs_of(result)]
    return diverged(result) or any(after > before + RISE for before, after in zip(losses, losses[1:]))


# --- The verdict ------------------------------------------------------------------------------------------

HOLDS, FAILS, OPEN = "holds", "does not", "can't be told here"
POINT = 1.0  # a difference that would be too small to speak of
NEAR = 1.5   # so far behind still counts as no worse: twice what the paper's Table 3 (b) is behind (c)


JUDGED_BY_RUN = {  # claim: whether a run bears it out, given the run beside it
    "collapses": lambda run, beside: collapsed(run),
    "fails": lambda run, beside: failed(run),
    "does not converge": did_not_converge,
    "unstable": lambda run, beside: unstable(run),
}
BOUNDS = {  # claim about a difference: it holds above the first bound, and doesn't below the second
    "better": (0, POINT),
    "worse": (0, POINT),  # of the row beside, less this one
    "no worse": (-NEAR, -NEAR),
}


def verdict(claim, mine, beside):
    """Whether a claim about a row holds, by its runs and those of the row beside it, {seed: result} each.

    those of JUDGED_BY_RUN    holds if all runs bear it out, does not if none does
    less stable               by the seeds of which one of the two runs failed or was unstable and the other
                              wasn't: holds if it was always this row's, does not if always the other's
    worse, better, no worse   does not if a run has failed: in the paper all these rows work. Else by the
                              interval of the difference, see BOUNDS
    """
    pairs = [(mine[seed], beside[seed]) for seed in sorted(mine.keys() & beside.keys())]
    if claim in JUDGED_BY_RUN:
        found = [JUDGED_BY_RUN[claim](run, other) for run, other in pairs]
        return HOLDS if all(found) else OPEN if any(found) else FAILS
    if claim == "less stable":
        shaky = [(failed(run) or unstable(run), failed(other) or unstable(other)) for run, other in pairs]
        found = {here for here, there in shaky if here != there}
        return HOLDS if found == {True} else FAILS if found == {False} else OPEN
    if any(failed(run) for run, _ in pairs):
        return FAILS
    between = linear_difference(beside, mine) if claim == "worse" else linear_difference(mine, beside)
    holds_above, fails_below = BOUNDS[claim]
    return HOLDS if between.low > holds_above else FAILS if between.high < fails_below else OPEN


def linear_difference(mine, beside):
    """Of the linear accuracies -> Difference, or None."""
    return difference(*({seed: top1(result) for seed, result in its.items()} for its in (mine, beside)))


def paper_top1(name):
    """What the paper measured; None where it gives no number."""
    _, paper = simsiam.EXPERIMENTS[name]
    number = re.match(r"\d+\.\d+", paper)
    return float(number[0]) if number else None


def paper_difference(name):
    """The paper's difference to the row beside; None where it gives no number."""
    mine, beside = paper_top1(name), paper_top1(ROWS[name].beside)
    return None if mine is None else mine - beside


# --- The tables -------------------------------------------------------------------------------------------

def compared(kept):
    """Yield the rows that can be compared: name, its runs, those beside it, both of the same seeds, and the
    Difference."""
    for name, row in ROWS.items():
        mine, beside = kept.of(name), kept.of(row.beside)
        between = linear_difference(mine, beside)
        if between:
            seeds = mine.keys() & beside.keys()
            yield name, *({seed: its[seed] for seed in sorted(seeds)} for its in (mine, beside)), between


def label(name):
    """An experiment's name; what stands in for Table 1 (c) and Table 3 (c) is called by both."""
    return "simsiam, (c)" if name == CONSTANT else name


def linked(name):
    """The same, as a link to its runs."""
    return f"[{label(name)}](paper_rows/{name}.jsonl)"


def claims_table(kept):
    """For results/README.md: the paper's claim, what was seen and what the paper saw, n, the verdict."""
    lines = ["| what the paper says | difference here | the paper's | n | verdict |",
             "|---|---|---|---|---|"]
    for name, mine, beside, between in compared(kept):
        row = ROWS[name]
        seen = f"{between.mean:+.1f} +- {between.error:.1f}{outcomes(mine)}"
        words = f"[{row.words}](paper_rows/{name}.jsonl)"
        said = f"[{verdict(row.claim, mine, beside)}](paper_rows.md)"
        lines.append(f"| {words} | {seen} | {paper_cell(name)} | {len(between.pairs)} | {said} |")
    return "\n".join(lines) + "\n"


def paper_cell(name):
    """The paper's difference; a stroke where it gives no number."""
    paper = paper_difference(name)
    return "-" if paper is None else f"{paper:+.1f}"


def outcomes(runs):
    """What some runs came to beside their accuracy, in words: "; 3 of 5 collapsed"."""
    said = ""
    for word, happened in (("diverged", diverged), ("collapsed", collapsed),
                           ("learned nothing", learned_nothing), ("unstable", unstable)):
        count = sum(happened(result) for result in runs.values())
        if count:
            said += f"; {count} of {len(runs)} {word}"
    return said


def rows_table(kept):
    """What was measured of each row."""
    lines = ["| row | seeds | loss | std x sqrt(d) | linear +- standard deviation | outcome | minutes |",
             "|---|---|---|---|---|---|---|"]
    for name in (DECAYED, *ROWS):
        if kept.of(name):
            lines.append(f"| {linked(name)} | {' | '.join(columns(kept.of(name)))} |")
    return "\n".join(lines) + "\n"


def columns(runs):
    """Of some runs, as cells: seeds, loss, std, linear accuracy, outcome, minutes."""
    results = list(runs.values())
    whole = [result for result in results if not diverged(result)]
    loss, std = (span([last(result, key) for result in whole], digits)
                 for key, digits in (("loss", 3), ("std", 2)))
    minutes = statistics.mean(sum(e["wall_seconds"] for e in epochs_of(r)) / 60 for r in results)
    return [f"{len(results)}", loss, std, cell([top1(r) for r in results]),
            outcomes(runs).removeprefix("; ") or "-", f"{minutes:.1f}"]


def span(values, digits):
    """The smallest and the largest."""
    return f"{min(values):.{digits}f}, {max(values):.{digits}f}" if values else "-"


def differences_table(kept):
    """Each row against the one beside it: the mean paired difference, and the paper's."""
    lines = ["| row | beside | pairs | difference +- standard error | 95% | the paper's | claim | verdict |",
             "|---|---|---|---|---|---|---|---|"]
    for name, mine, beside, between in compared(kept):
        row = ROWS[name]
        cells = [linked(name), linked(row.beside), f"{len(between.pairs)}",
                 f"{between.mean:+.2f} +- {between.error:.2f}", f"{between.low:+.1f} to {between.high:+.1f}",
                 paper_cell(name), row.claim, verdict(row.claim, mine, beside)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def candidates_table(kept):
    """The candidates for the setting."""
    lines = ["| candidate | seeds | linear, cached | standard deviation | minutes |", "|---|---|---|---|---|"]
    for options in CANDIDATES:
        runs = kept.of(name_of_candidate(options))
        if len(runs) > 1:
            values = [top1(result) for result in runs.values()]
            *_, minutes = columns(runs)
            seeds = ", ".join(f"{seed}" for seed in sorted(runs))
            chosen = "**" if options == SETTING else ""
            lines.append(f"| {chosen}`{options}`{chosen} | {seeds} | {statistics.mean(values):.1f} | "
                         f"{statistics.stdev(values):.2f} | {minutes} |")
    return "\n".join(lines) + "\n"


def looks_table(kept):
    """Table 3 at other lrs and depths."""
    letters = ("(c) default", "(a) no BN", "(b) hidden layers", "(d) all layers")
    lines = [f"| --base-lr | --proj-layers | {' | '.join(letters)} |", "|---|---|---|---|---|---|"]
    for lr in LRS:
        for layers in LAYERS:
            cells = []
            for name in TABLE_3:
                runs = looked_at(kept, name, lr, layers)
                shown = cell([top1(result) for result in runs.values()]) + outcomes(runs)
                file = f"paper_rows/{look(name, lr, layers).name}.jsonl"
                cells.append(f"[{shown}]({file})" if runs else "not run")
            lines.append(f"| {lr} | {layers} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def factors_table(kept):
    """What lr and depth change in the gap between a row of Table 3 and (c): means of runs of one seed, with
    Student's interval."""
    low, high = LRS
    two, three = LAYERS
    changes = {  # words: the cells of the closer look whose gaps are compared, and those with which
        f"lr {low}, not {high}": ([(low, two), (low, three)], [(high, two), (high, three)]),
        f"{three} layers, not {two}": ([(low, three), (high, three)], [(low, two), (high, two)]),
        f"{three} layers, not {two}, at lr {low}": ([(low, three)], [(low, two)]),
    }
    lines = [f"| gap to (c) | {' | 95% | '.join(changes)} | 95% |", "|---|---|---|---|---|---|---|"]
    for name in TABLE_3[1:]:
        cells = [name]
        for those, these in changes.values():
            change = difference(mean_gap(kept, name, those), mean_gap(kept, name, these))
            if change is None:
                cells += ["-", "-"]
            else:
                cells += [f"{change.mean:+.1f}", f"{change.low:+.1f} to {change.high:+.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def mean_gap(kept, name, cells):
    """{seed: a row's accuracy less that of (c), the mean over some cells of the closer look}"""
    gaps = [gaps_to_c(kept, name, lr, layers) for lr, layers in cells]
    seeds = set.intersection(*map(set, gaps))
    return {seed: statistics.mean(gap[seed] for gap in gaps) for seed in seeds}


def gaps_to_c(kept, name, lr, layers):
    """{seed: a row's accuracy less that of (c)} in a cell of the closer look."""
    mine, default = (looked_at(kept, row, lr, layers) for row in (name, CONSTANT))
    return {seed: top1(mine[seed]) - top1(default[seed]) for seed in mine.keys() & default.keys()}


def looked_at(kept, name, lr, layers):
    """The runs of a cell, {seed: result}. The rows themselves have more seeds than the closer look."""
    runs = kept.of(look(name, lr, layers).name)
    return {seed: runs[seed] for seed in LOOKING if seed in runs}


def picture(kept, path):
    """The differences with their intervals, the paper's beside ours: a panel for the rows that failed in the
    paper, and one for the others."""
    fail, work = [], []
    for name, *_, between in compared(kept):
        rows = fail if ROWS[name].claim in JUDGED_BY_RUN else work
        rows.append((label(name), [between.pairs, the_papers(name)]))
    panels = []
    for title, rows in (("the paper saw these fail", fail),
                        ("the paper saw these work, some less well", work)):
        if rows:
            values = [value for _, both in rows for its in both for value in its]
            every = tick(max(values) - min(values))
            low, high = every * math.floor(min(values) / every), every * math.ceil(max(values) / every)
            panels.append(Panel(f"{title}: points against the row beside it", rows, low, max(every, high)))
    measures = {"here: a dot a seed, 95% for their mean": BLUE, "the paper, on ImageNet": RED}
    if panels:
        draw_rows(path, panels, measures, half_interval)


def the_papers(name):
    """The paper's difference as a list; empty where it gives no number."""
    paper = paper_difference(name)
    return [] if paper is None else [paper]


# --- The program ------------------------------------------------------------------------------------------

def write_pages(kept):
    """The tables and the picture of what is kept of the shapes."""
    write_tables(PAGE, [candidates_table(kept), rows_table(kept), differences_table(kept),
                        looks_table(kept), factors_table(kept)])
    write_tables(FRONT, [claims_table(kept)])
    picture(kept, PICTURE)


def write_cifar10_page(kept, epochs):
    """A page of its own for the rows on the full CIFAR-10."""
    page = pathlib.Path(f"{kept.folder}.md")
    page.write_text(f"The paper's rows on the full CIFAR-10, made by `results/paper_rows.py --data CIFAR "
                    f"--epochs {epochs}`. paper_rows.md has the rules.\n\n"
                    f"{rows_table(kept)}\n{differences_table(kept)}")


def show(kept, groups):
    """Say how many of the runs are kept, and which are missing."""
    runs = [one for group in groups for one in group]
    print(f"{sum(len(one.seeds) for one in runs) - len(kept.missing(groups))} runs are kept")
    for one in runs:
        missing = [f"{seed}" for seed in one.seeds if seed not in kept.of(one.name)]
        if missing:
            print(f"missing: {one.name}, seeds {' '.join(missing)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", metavar="CIFAR", help="the full CIFAR-10 (default: shapes)")
    parser.add_argument("--epochs", type=int, default=20, help="on CIFAR-10 (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], choices=range(max(T95)),
                        help="on CIFAR-10 (default: 0 1 2)")
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--minutes", type=float, default=1e4,
                        help="stop after so many, everything saved; the same command goes on")
    args = parser.parse_args()
    if args.data is None:
        kept, groups, scratch = Kept("results/paper_rows"), programme(), "runs/paper_rows"
    else:
        kept = Kept(f"results/paper_rows-cifar10-{args.epochs}-epochs")
        scratch = f"runs/paper_rows-cifar10-{args.epochs}-epochs"
        groups = [rows_on_cifar10(args.data, args.epochs, tuple(args.seeds))]
    show(kept, groups)
    deadline = time.monotonic() + 60 * args.minutes
    state = "all is done"
    try:
        todo = [] if args.show else [(scratch, deadline, *job) for job in kept.missing(groups)]
        if todo and args.data is None:
            measure_untrained(kept.folder, deadline)
        for name, result in results_of(run, todo):
            kept.add(name, result)
            print(f"done: {name}, seed {result['seed']}: {result['top1']}", flush=True)
    except Interrupted:
        state = "time is up; the same command goes on"
    except (Refused, OSError, RuntimeError) as error:
        sys.exit(f"paper_rows.py: {error}")
    if args.data is None:
        write_pages(kept)
    else:
        write_cifar10_page(kept, args.epochs)
    print(state)


if __name__ == "__main__":
    main()
