"""Every row of the paper on one small setting: the drawn shapes, about a minute a run on 2 CPU cores.

    python results/paper_on_cpu.py                  from the repository's root; goes on where it was interrupted

Each run is `python simsiam.py --experiment NAME --seed SEED --epochs ...` and then `python lineval.py --cached`. Its figures become a
line of results/paper-on-cpu.jsonl, and what is there already is not run again; from all lines, results/paper-on-cpu.md is made.
"""
import json
import os
import shutil
import statistics
import subprocess
import sys

sys.path.insert(0, os.getcwd())
import simsiam

EPOCHS, SEEDS = 8, (1, 2, 3)     # 8 stand for the paper's 100; the recipe was tuned on seed 7
LINES, TABLE = "results/paper-on-cpu.jsonl", "results/paper-on-cpu.md"


def epochs_of(name):
    return EPOCHS * simsiam.EXPERIMENTS[name][0].get("epochs", 100) // 100


def run(name, seed):
    """One run and its linear evaluation -> a record."""
    out = os.path.join("runs", "paper-on-cpu", f"{name}-{seed}")
    shutil.rmtree(out, ignore_errors=True)
    warmup = ["--warmup", "1"] if "warmup" in simsiam.EXPERIMENTS[name][0] else []
    command = ["simsiam.py", "--experiment", name, "--seed", str(seed), "--epochs", str(epochs_of(name)), *warmup, "--knn-every", "1000", "--out", out]
    subprocess.run([sys.executable, *command], check=True)
    subprocess.run([sys.executable, "lineval.py", "--cached", "--ckpt", os.path.join(out, "checkpoint.pth")], check=True)
    with open(os.path.join(out, "log.jsonl")) as f:
        start, *epochs, _ = map(json.loads, f)
    with open(os.path.join(out, "lineval-cached", "lineval.json")) as f:
        linear = json.load(f)
    settings = {key: start["settings"][key] for key in ("batch", "dim", "pred_dim", "epochs", "warmup")}
    return {"experiment": name, "seed": seed, **{key: epochs[-1][key] for key in ("loss", "std", "knn", "collapsed", "seconds")}, "linear": linear["top1"],
            "losses": [record["loss"] for record in epochs[1:]], **settings, "torch": start["torch"], "device": start["device"],
            "command": " ".join(["python", *command])}


def main():
    done = []
    if os.path.exists(LINES):
        with open(LINES) as f:
            done = [json.loads(line) for line in f]
    for seed in SEEDS:
        for name in simsiam.EXPERIMENTS:
            if any((r["experiment"], r["seed"]) == (name, seed) for r in done):
                continue
            done.append(run(name, seed))
            with open(LINES, "a") as f:
                f.write(json.dumps(done[-1]) + "\n")
            with open(TABLE, "w") as f:
                f.write(table(done))


def spread(values, digits):
    """Mean, and the standard deviation where there is one."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(done):
    lines = [__doc__.splitlines()[0], "", f"{EPOCHS} epochs stand for the paper's 100. " + "; ".join(sorted({f"{r['device']}, torch {r['torch']}" for r in done})) + ".",
             "", "| experiment | here | seeds | loss | std x sqrt(d) | kNN | linear, cached | the paper, ImageNet |", "|---|---|---|---|---|---|---|---|"]
    for name, (_, paper) in simsiam.EXPERIMENTS.items():
        runs = [r for r in done if r["experiment"] == name]
        if runs:
            s = runs[0]
            here = f"batch {s['batch']}, d {s['dim']}-{s['pred_dim']}, {s['epochs']} epochs"
            figures = " | ".join(spread([r[key] for r in runs], digits) for key, digits in (("loss", 3), ("std", 2), ("knn", 1), ("linear", 1)))
            lines.append(f"| {name} | {here} | {len(runs)} | {figures} | {paper} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
