"""How fast it is, beside the plain or conventional way, measured in one run: results/speed-cpu.json or speed-cuda.json, and speed.md from both.

    python results/speed.py --photos PHOTOS --cifar CIFAR          about 15 minutes on 2 cores; on a GPU, under 10. Not run on a GPU by us yet
    add --resume to go on after an interruption: each part is written when it has been measured

From the repository's root. PHOTOS: a folder of photographs (default: drawn JPEGs of 500 x 375); CIFAR: a CIFAR-10 folder (default: the drawn shapes).
Variants are interleaved, and medians reported: ratios within a table count more than the figures.
"""
import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial

sys.path.insert(0, os.getcwd())
import augment
import numpy as np
import resnet
import simsiam
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

PEAK = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312}  # dense bf16 TFLOP/s, from the data sheets
STEPS = {"cuda": [("imagenet", 512, 10), ("cifar10", 512, 20)], "cpu": [("shapes", 64, 4), ("cifar10", 64, 1), ("imagenet", 8, 1)]}  # recipe, batch, steps
VARIANTS = {"plain": (False, False), "ours": (True, False), "ours, compiled": (True, True)}
WAIT = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None


def drawn_photos(folder):
    """JPEGs about as large, and as hard to decode, as photographs."""
    rng = np.random.default_rng(0)
    for k in range(64):
        image = sum(s * np.kron(rng.normal(size=(3, 375 // s + 1, 500 // s + 1)), np.ones((s, s)))[:, :375, :500] for s in (64, 16, 4, 1))
        Image.fromarray((128 + 0.6 * image).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(os.path.join(folder, f"{k:03}.jpg"), quality=90)


def colours(source, policy, device, repeats=9):
    """Images/s of the photometric part on one core, the colour changes as they are and compiled as --compile does it, interleaved."""
    plain = augment.blend, augment.shift_hue
    ways = {"plain": plain, "compiled": tuple(torch.compile(f, dynamic=True) for f in plain)}
    threads, rates = torch.get_num_threads(), {name: [] for name in ways}
    torch.set_num_threads(1)
    for name in list(ways) * (1 + repeats):  # the first time compiles
        augment.blend, augment.shift_hue = ways[name]
        rates[name].append(augment.rate(source, policy, device, "colour"))
    torch.set_num_threads(threads)
    augment.blend, augment.shift_hue = plain
    return {name: statistics.median(r[1:]) for name, r in rates.items()}


def model_of(recipe):
    """A recipe's model and settings."""
    s = simsiam.recipe_for(None, augment.Source(), recipe)
    return simsiam.SimSiam(s["arch"], s["dim"], s["pred_dim"], s["proj_layers"], s["proj_hidden"], s["width"], s["cifar_stem"]), s


def make_step(device, recipe, batch, ours, compiled):
    """A training step on fixed views, as simsiam.py does it or plainly: NCHW, no autocast (on a GPU, TF32 in the convolutions), the default SGD.
    -> a function that makes n steps and returns the seconds of one"""
    torch.manual_seed(0)
    model, s = model_of(recipe)
    layout = resnet.fastest_layout(model.encoder, device) if ours else torch.contiguous_format
    model = model.to(device, memory_format=layout)
    views = [torch.randn(batch, 3, s["size"], s["size"], device=device).contiguous(memory_format=layout) for _ in range(2)]
    optimizer = simsiam.sgd(model, 0.9, 1e-4)
    if not ours:
        optimizer = torch.optim.SGD([{"params": group["params"]} for group in optimizer.param_groups], lr=0.0, momentum=0.9, weight_decay=1e-4)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=ours and device.type == "cuda")
    if compiled:
        torch._dynamo.reset()  # or it would take other recipes' sizes for ones that vary
        model.compile()

    def run(n):
        WAIT()
        began = time.perf_counter()
        for _ in range(n):
            simsiam.train_step(model, simsiam.loss, optimizer, autocast, views)
        WAIT()
        return (time.perf_counter() - began) / n

    return run


def steps(device, recipe, batch, n, repeats=5):
    """Each variant's images/s (an image: two views, forward and backward), TFLOP/s, seconds until the first step is done, peak MiB on a GPU."""
    made, found = {}, {}
    for name, how in VARIANTS.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() >> 20 if device.type == "cuda" else 0
        made[name] = make_step(device, recipe, batch, *how)
        found[name] = {"first step, s": round(made[name](1), 1)}
        made[name](2)
        found[name]["MiB"] = simsiam.peak_memory(device) - before if device.type == "cuda" else None
    times = {name: [] for name in made}
    for name in list(made) * repeats:
        times[name].append(made[name](n))
    with FlopCounterMode(display=False) as counter:
        made["plain"](1)
    for name, seconds in times.items():
        ms = 1000 * statistics.median(seconds)
        found[name] |= {"ms": round(ms, 1), "images/s": round(1000 * batch / ms, 1), "TFLOP/s": round(counter.get_total_flops() / ms / 1e9, 2)}
    return {"recipe": recipe, "batch": batch, "GFLOP an image": round(counter.get_total_flops() / batch / 1e9, 2), "variants": found}


def imagenet_knn(device):
    """Seconds and MiB for the kNN of all of ImageNet's validation images: 50,000 against 1,281,167, 2048 features each; on a CPU from 208 of them."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    bank = torch.empty(1_281_167, 2048, device=device)
    for part in bank.split(2 ** 14):
        part.normal_()
    queries, labels = torch.randn(50_000 if device.type == "cuda" else 208, 2048, device=device), torch.arange(len(bank), device=device) % 1000
    WAIT()
    began = time.perf_counter()
    simsiam.knn(bank, labels, queries)
    WAIT()
    return {"queries": len(queries), "seconds for 50,000": round((time.perf_counter() - began) * 50_000 / len(queries), 1),
            "MiB": simsiam.peak_memory(device), "of these, the bank": bank.nbytes >> 20}


def communication(recipe):
    """MiB that each process gives to others in a step: gradients, and BN's sums, for forward and backward, of both views."""
    model, _ = model_of(recipe)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    return {"recipe": recipe, "gradients, MiB": round(sum(w.numel() for w in model.parameters()) * 4 / 2 ** 20, 1), "BN layers": len(norms),
            "BN collectives": 2 * 2 * len(norms), "BN, MiB": round(2 * sum(4 * m.num_features + 1 for m in norms) * 4 / 2 ** 20, 2)}


def run_of(*command):
    """A program's run in a folder that goes: how long it took, by the clock and by its log; on a GPU, the linear evaluation too."""
    torch.cuda.empty_cache()  # the program needs the memory
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        subprocess.run([sys.executable, *command, "--out", folder], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        with open(os.path.join(folder, "log.jsonl")) as f:
            epochs = [r for r in map(json.loads, f) if r["event"] == "epoch"]
        linear = None
        if torch.cuda.is_available():
            began = time.perf_counter()
            subprocess.run([sys.executable, "lineval.py", "--cached", "--ckpt", os.path.join(folder, "checkpoint.pth")], check=True, stdout=subprocess.DEVNULL)
            linear = round(time.perf_counter() - began, 1)
        return {"command": shlex.join(["python", *command]), "seconds in all": round(seconds, 1),
                "seconds of each epoch": [round(r["seconds"], 2) for r in epochs[1:]], "images/s": [round(r["images_per_s"]) for r in epochs[1:]],
                "waiting for data": [round(r["data_wait"], 3) for r in epochs[1:]], "lineval --cached, s": linear}


def steps_that_fit(device, recipe, batch, n):
    """steps at this batch, or at half of it."""
    try:
        return steps(device, recipe, batch, n)
    except RuntimeError as error:  # cuDNN's words for too little memory are several
        if not re.search("out of memory|ALLOC_FAILED|unable to find an engine", str(error)):
            raise
    print(f"{recipe}: a batch of {batch} doesn't fit", flush=True)
    return steps(device, recipe, batch // 2, n)  # after the except block, which keeps the first one's memory alive


def processor():
    """The CPU's name, where Linux tells it."""
    if not os.path.exists("/proc/cpuinfo"):
        return "a CPU"
    with open("/proc/cpuinfo") as f:
        return next((line.split(":")[1].strip() for line in f if line.startswith("model name")), "a CPU")


def measure(folder, cifar, device, path, resume):
    """All parts, or with `resume` those that the file lacks; it is written after each."""
    torch.backends.cudnn.benchmark = True  # as simsiam.py and the released code have it
    photos, small = augment.open_data(folder)[0], augment.open_data(cifar)[0]
    data = [cifar] if cifar and device.type == "cuda" else []
    parts = {
        "photos": lambda: augment.bench(photos, augment.Policy(), device),
        "in memory": lambda: augment.bench(small, augment.Policy(size=32, blur=0), device),
        "colours": lambda: {"224 pixels": colours(augment.Source(files=photos.files[:48]), augment.Policy(), device),
                            "32 pixels": colours(augment.Source(pixels=small.pixels[:512]), augment.Policy(size=32, blur=0), device)},
        **{f"step of {recipe}": partial(steps_that_fit, device, recipe, batch, n) for recipe, batch, n in STEPS[device.type]},
        "knn": lambda: imagenet_knn(device),
        "run": lambda: run_of("simsiam.py", *data, "--epochs", "3", "--knn-every", "0"),
        "run, compiled": lambda: run_of("simsiam.py", *data, "--epochs", "3", "--knn-every", "0", "--compile"),
        "communication": lambda: [communication(recipe) for recipe in ("imagenet", "cifar10")]}
    found = {"command": shlex.join(["python", *sys.argv]), "torch": torch.__version__, "device": simsiam.device_name(device), "processor": processor(), "cores": os.cpu_count()}
    if resume and os.path.exists(path):
        with open(path) as f:
            found = json.load(f)
    for name, part in parts.items():
        if name not in found:
            try:
                found[name] = part()
            except Exception:  # the other parts are worth having all the same
                traceback.print_exc()
                continue
            print(json.dumps({name: found[name]}), flush=True)
            with simsiam.replacing(path, "w") as f:
                f.write(json.dumps(found, indent=1).replace(folder, "PHOTOS").replace(cifar or "CIFAR", "CIFAR") + "\n")


def table(heads, rows):
    return [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows), ""]


def page(found):
    """One machine's section of speed.md."""
    out = [f"## {found['device']}", "", f"`{found['command']}`: {found['processor']}, {found['cores']} cores; torch {found['torch']}. Medians of interleaved repeats.", ""]
    for what, title in (("photos", "photographs, two views of 224 pixels"), ("in memory", "32-pixel images in memory, two views")):
        if what not in found:
            continue
        rates, heads, beside = found[what], ["part", "one core", "all cores", "times Pillow, one core", "all cores"], [found[what]["all, by Pillow"]]
        if "decode" in rates:
            heads, beside = heads + ["share of decoding, one core", "all cores"], beside + [rates["decode"]]
        out += [f"**Input pipeline**, {title}, images/s:", ""]
        out += table(heads, [[part, *(f"{r:.0f}" for r in both), *(f"{r / b:.2f}" for other in beside for r, b in zip(both, other))] for part, both in rates.items()])
    if "colours" in found:
        out += ["**Colour changes compiled**, which `--compile` does too, the photometric part on one core, images/s:", ""]
        out += table(["views", "plain", "compiled", "times plain"],
                     [[size, *(f"{r:.0f}" for r in rates.values()), f"{rates['compiled'] / rates['plain']:.2f}"] for size, rates in found["colours"].items()])
    steps = [part for name, part in found.items() if name.startswith("step of ")]
    for s in steps:
        plain = s["variants"]["plain"]["images/s"]
        peak = next((value for name, value in PEAK.items() if name in found["device"]), None)
        out += [f"**Training step**, {s['recipe']}, batch {s['batch']}, {s['GFLOP an image']} GFLOP an image:", ""]
        out += table(["variant", "ms", "images/s", "times plain", "TFLOP/s", "share of the peak", "first step, s", "MiB"],
                     [[name, v["ms"], v["images/s"], f"{v['images/s'] / plain:.2f}", v["TFLOP/s"], f"{v['TFLOP/s'] / peak:.2f}" if peak else "-",
                       v["first step, s"], v["MiB"] or "-"] for name, v in s["variants"].items()])
    fastest = {s["recipe"]: max(v["images/s"] for v in s["variants"].values()) for s in steps}
    if not found["device"].startswith("CPU") and {"imagenet", "cifar10"} <= fastest.keys() and {"photos", "in memory"} <= found.keys():
        cores = " and ".join(f"{fastest['imagenet'] / found['photos'][part][0]:.0f} cores ({part})" for part in ("decode and cut", "all, by Pillow"))
        out += [f"**Feeding it**: {fastest['imagenet']:.0f} images/s of ResNet-50 take {cores}. The views of CIFAR-10 take "
                f"{fastest['cifar10'] / found['in memory']['all'][0]:.2f} of the time of their step; an epoch of steps, {50_000 / fastest['cifar10']:.1f} s, 800 of them, "
                f"{800 / 60 * 50_000 / fastest['cifar10']:.1f} minutes.", ""]
    runs = [part for name, part in found.items() if name.startswith("run")]
    if runs:
        out += ["**Whole runs**:", "", *table(list(runs[0]), [list(run.values()) for run in runs])]
    if "knn" in found:
        out += ["**kNN at ImageNet's size**, from these queries: " + ", ".join(f"{key} {value}" for key, value in found["knn"].items()) + ".", ""]
    return out


NOT_RUN = [
    "## Not run yet", "",
    "- All of this on a GPU: the step in bf16, channels_last, compiled, against the plain one (aim: 1.5 times), peak memory, the cores that feed it, CIFAR-10's epochs (aim: 800 in 15 "
    "minutes) and the share that views have of them (aim: a fifth), `lineval.py --cached` (aim: a minute), kNN of ImageNet's size: "
    "`python results/speed.py --photos PHOTOS --cifar CIFAR`, some 10 minutes on an H100 by estimate; each part is written when it is there, and `--resume` goes on.",
    "- Several GPUs: `torchrun --nproc-per-node 8 simsiam.py IMAGENET --epochs 1`, with and without `--compile`.", ""]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos")
    parser.add_argument("--cifar")
    parser.add_argument("--resume", action="store_true", help="measure only what an interrupted start has not")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.photos is None:
            drawn_photos(folder)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        measure(args.photos or folder, args.cifar, device, f"results/speed-{device.type}.json", args.resume)
    lines = ["Made by `results/speed.py`; what it means is in `results/README.md`.", ""]
    for device in ("cuda", "cpu"):
        if os.path.exists(f"results/speed-{device}.json"):
            with open(f"results/speed-{device}.json") as f:
                found = json.load(f)
            lines += page(found)
    lines += ["## Communication", "", "What a step sends, by counting:", "", *table(list(found["communication"][0]), [list(c.values()) for c in found["communication"]])]
    lines += NOT_RUN if not os.path.exists("results/speed-cuda.json") else []
    with open("results/speed.md", "w") as f:
        f.write("\n".join(lines))


if __name__ == "__main__":
    main()
