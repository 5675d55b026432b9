"""How fast it is, beside the plain or conventional way.

    python results/speed.py DATA                               the input pipeline on this data; prints a table
    python results/speed.py --photos PHOTOS --cifar CIFAR      everything; 15 minutes on 2 cores

Start it from the repository's root. DATA is whatever simsiam.py takes. PHOTOS is a folder of photographs
(default: drawn JPEGs of 500 x 375), CIFAR a CIFAR-10 folder (default: the drawn shapes).

The second writes each part into results/speed.json, or speed-cuda.json on a GPU, as soon as it is measured,
and makes results/speed.md of both. Add --resume to continue after an interruption. On a GPU
it has not come to its end yet: of an H200 there is one part.

Variants are interleaved, and medians reported. The ratios within a table count more than the figures.
"""
import argparse
import json
import multiprocessing
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
import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch.utils.flop_counter import FlopCounterMode

import augment
import simsiam
from harness.common.machine import device_name, fastest_layout, peak_memory
from harness.common.errors import BadImage, Refused, printable
from harness.common.files import replacing
from harness.data.images import read_rgb
from harness.data.loading import Decoder, decode
from harness.data.opening import open_data
from harness.data.source import Source

CPU = torch.device("cpu")
PEAK = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312}  # dense bf16 TFLOP/s, from the data sheets
STEPS = {  # recipe, batch, steps a repeat
    "cuda": [
        ("cifar10", 512, 20),
        ("imagenet", 512, 5),
    ],
    "cpu": [
        ("shapes", 64, 4),
        ("cifar10", 64, 1),
        ("imagenet", 8, 1),
    ],
}
VARIANTS = {  # name: (as simsiam.py has it, compiled)
    "plain": (False, False),
    "ours": (True, False),
    "ours, compiled": (True, True),
}


def wait_for(device):
    """A GPU works behind our back: wait until it has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


# --- The input pipeline, and the conventional one -------------------------------------------------

def opened(source, i):
    """The i-th image as a PIL image, decoded."""
    if source.pixels is None:
        return read_rgb(source.files[i])
    return Image.fromarray(source.image(i).numpy())


def view_by_pillow(image, crop, colour, policy):
    """A view of a PIL image as the released code's kind of pipeline makes it: by Pillow's operations.

    crop, colour: of this one view -> (3, S, S) float32, normalised. Only that last operation is in floats.
    """
    right = crop.left + crop.width
    bottom = crop.top + crop.height
    view = image.crop((crop.left, crop.top, right, bottom))
    view = view.resize((policy.size, policy.size), Image.Resampling.BILINEAR)
    if colour.jitter:
        for change in colour.order:
            view = changed_by_pillow(view, change, colour.factor[change])
    if colour.gray:
        view = view.convert("L").convert("RGB")
    if colour.sigma > 0:
        view = view.filter(ImageFilter.GaussianBlur(float(colour.sigma)))
    if crop.flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(view)).permute(2, 0, 1)
    return augment.normalize(pixels.contiguous().float(), policy)


def changed_by_pillow(view, change, factor):
    """One of the four colour changes, numbered as in augment.Colour."""
    if change < 3:
        enhancer = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[change]
        return enhancer(view).enhance(factor)
    h, s, v = view.convert("HSV").split()
    turned = np.asarray(h) + np.uint8(round(255 * factor) % 256)
    return Image.merge("HSV", (Image.fromarray(turned), s, v)).convert("RGB")


def views_by_pillow(source, policy, seed, epoch, index):
    """The views that load_views makes of these images, the conventional way, one after the other: [x1, x2]"""
    colours = [augment.draw_colour(policy, seed, epoch, index, v) for v in range(2)]
    views = ([], [])
    for k, i in enumerate(index):
        image = opened(source, i)
        size = image.height, image.width
        crops = augment.draw_crop(policy, seed, epoch, [i, i], [0, 1], *size)
        for v in range(2):
            crop = augment.Crop(*(a[v] for a in crops))
            colour = augment.Colour(*(a[k] for a in colours[v]))
            views[v].append(view_by_pillow(image, crop, colour, policy))
    return [torch.stack(x) for x in views]


def cut(source, policy, device, index):
    """The crops of these images, two views each: a worker's part. Images in memory are cut on the device."""
    if source.pixels is None:
        decoder = Decoder(source, partial(augment.cut_views, policy, 0, 2))
        _, _, _, crops, bad = decoder.__getitems__((0, index, True))
        if isinstance(bad, BadImage):
            raise bad
        return crops
    pixels = source.pixels.to(device)
    batches = [(0, index)]
    _, _, crops = next(augment.cut_views_in_memory(pixels, policy, 0, batches, 2))
    return crops


def change_colours(crops, policy, index):
    """The photometric part: what is done on the device with the crops."""
    for v in range(2):
        colour = augment.draw_colour(policy, 0, 0, index, v)
        augment.photometric(crops[v], colour, policy)


def rate(source, policy, device, part):
    """Images a second of a part of the pipeline in this process: two views of each image of the source."""
    index = np.arange(len(source))
    crops = None
    if part == "colour":
        crops = [view.to(device) for view in cut(source, policy, device, index)]
    wait_for(device)
    began = time.perf_counter()
    do_part(part, source, policy, device, index, crops)
    wait_for(device)
    return len(source) / (time.perf_counter() - began)


def do_part(part, source, policy, device, index, crops):
    if part == "decode":
        return [opened(source, i) for i in index]
    if part == "decode and cut":
        return cut(source, policy, device, index)
    if part == "colour":
        return change_colours(crops, policy, index)
    if part == "all":
        batches = [(0, index)]
        return list(augment.load_views(source, policy, 0, batches, device, 0))
    if part == "all, by Pillow":
        return views_by_pillow(source, policy, 0, 0, index)
    raise ValueError(part)


def loader_rate(source, policy, device, workers):
    """Images a second that the DataLoader brings, decoded and cut.

    The first batches wait in its queues while it starts. We count from when it has emptied them once.
    """
    batches = [(0, np.arange(len(source)))] * 12 * workers
    cut_two_views = partial(augment.cut_views, policy, 0, 2)
    arrivals = []
    for _ in decode(source, cut_two_views, batches, device, workers):
        arrivals.append(time.perf_counter())
    first, *others = arrivals[4 * workers:]
    return len(source) * len(others) / (others[-1] - first)


def bench(source, policy, device, repeats=9):
    """Print and return the rates of the pipeline's parts: {part: images/s on one core, on all cores}

    For 48 of the images, or 512 that are in memory; medians of interleaved repeats. In the first column the
    device does its part. In the second each core has a process of its own, which does all on the CPU.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = rates_of_all_parts(sample(source), policy, device, repeats)
    torch.set_num_threads(threads)
    for part, (one, all_cores) in found.items():
        found[part] = [statistics.median(one), statistics.median(all_cores)]
    print_rates(found, device)
    return found


def sample(source):
    """Images from all over a source."""
    count = 48 if source.pixels is None else 512
    chosen = np.linspace(0, len(source) - 1, count).astype(int)
    if source.pixels is None:
        return Source(files=source.files[chosen])
    return Source(pixels=source.pixels[chosen])


def rates_of_all_parts(source, policy, device, repeats):
    """{part: (rates on one core, rates on all cores)}"""
    parts = ["decode and cut", "colour", "all", "all, by Pillow"]
    if source.pixels is None:
        parts = ["decode", *parts]
    found = {part: ([], []) for part in parts}
    cores = os.cpu_count()
    on_a_core = partial(rate, source, policy, CPU)
    with multiprocessing.Pool(cores, torch.set_num_threads, (1,)) as pool:
        for part in parts * repeats:
            one, all_cores = found[part]
            one.append(rate(source, policy, device, part))
            all_cores.append(sum(pool.map(on_a_core, [part] * cores, chunksize=1)))
    if source.pixels is None:
        times = max(1, repeats // 3)
        one = [loader_rate(source, policy, device, 1) for _ in range(times)]
        two = [loader_rate(source, policy, device, 2) for _ in range(times)]
        found["DataLoader, 1 and 2 workers"] = (one, two)
    return found


def print_rates(found, device):
    """The table. Beside each rate stands its ratio to Pillow's, and to decoding's where there is that."""
    beside = {"times Pillow": found["all, by Pillow"]}
    if "decode" in found:
        beside["times decode"] = found["decode"]
    title = f"images/s ({'; '.join(beside)})"
    print(columns(title, f"one core, {device.type}", f"{os.cpu_count()} cores"))
    for part, rates in found.items():
        cells = []
        for k, images_per_s in enumerate(rates):
            ratios = [f"{images_per_s / other[k]:.2f}" for other in beside.values()]
            cells.append(f"{images_per_s:.0f} ({'; '.join(ratios)})")
        print(columns(part, *cells))


def columns(name, one, all_cores):
    return f"{name:40}{one:>26}{all_cores:>26}"


def colours(source, policy, device, repeats=9):
    """Images/s of the photometric part on one core, its colour changes plain, and compiled (--compile)."""
    plain = augment.four_changes
    augment.compile_colours()
    compiled = augment.four_changes
    ways = {"plain": plain, "compiled": compiled}
    rates = {name: [] for name in ways}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in list(ways) * (1 + repeats):
        augment.four_changes = ways[name]
        rates[name].append(rate(source, policy, device, "colour"))
    torch.set_num_threads(threads)
    augment.four_changes = plain
    return {name: statistics.median(found[1:]) for name, found in rates.items()}  # the first time compiles


def colours_at_both_sizes(photos, small, device):
    large = Source(files=photos.files[:48])
    small = Source(pixels=small.pixels[:512])
    return {
        "224 pixels": colours(large, augment.Policy(), device),
        "32 pixels": colours(small, augment.Policy(size=32, blur=0), device),
    }


# --- Training steps -------------------------------------------------------------------------------

def model_of(settings):
    """A recipe's model."""
    names = ("arch", "dim", "pred_dim", "proj_layers", "proj_hidden", "width", "cifar_stem")
    return simsiam.SimSiam(**{name: settings[name] for name in names})


def make_step(device, recipe, batch, ours, compiled):
    """A training step on fixed views -> a function that makes n steps and returns the seconds of one.

    ours: as simsiam.py has it, but on a CPU always in float32 (results/bf16.py has bf16 there). Otherwise
    plainly: NCHW, the default SGD, no autocast (but TF32 in a GPU's convolutions).
    """
    torch.manual_seed(0)
    settings = simsiam.recipe(recipe)
    size = settings["size"]
    model = model_of(settings)
    layout = fastest_layout(model.encoder, device) if ours else torch.contiguous_format
    model = model.to(device, memory_format=layout)
    views = torch.randn(2, batch, 3, size, size, device=device)
    views = [x.contiguous(memory_format=layout) for x in views]
    optimizer = simsiam.sgd(model, 0.9, 1e-4)
    if not ours:
        groups = [{"params": group["params"]} for group in optimizer.param_groups]
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=1e-4)
    bf16 = ours and device.type == "cuda"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    if compiled:
        torch._dynamo.reset()  # or it would take other recipes' sizes for ones that vary
        model.compile()

    def run(n):
        wait_for(device)
        began = time.perf_counter()
        for _ in range(n):
            simsiam.train_step(model, simsiam.loss, optimizer, autocast, views)
        wait_for(device)
        return (time.perf_counter() - began) / n

    return run


def steps(device, recipe, batch, n, repeats=5):
    """Each variant's images/s, TFLOP/s, seconds until its first step is done, peak MiB on a GPU.

    An image is two views, forward and backward.
    """
    made = {}
    found = {}
    for name, (ours, compiled) in VARIANTS.items():
        made[name], found[name] = first_step(device, recipe, batch, ours, compiled)
    times = {name: [] for name in made}
    for name in list(made) * repeats:
        times[name].append(made[name](n))
    with FlopCounterMode(display=False) as counter:
        made["plain"](1)
    flops = counter.get_total_flops()
    for name, seconds in times.items():
        ms = 1000 * statistics.median(seconds)
        found[name]["ms"] = round(ms, 1)
        found[name]["images/s"] = round(1000 * batch / ms, 1)
        found[name]["TFLOP/s"] = round(flops / ms / 1e9, 2)
    return {
        "recipe": recipe,
        "batch": batch,
        "GFLOP an image": round(flops / batch / 1e9, 2),
        "variants": found,
    }


def first_step(device, recipe, batch, ours, compiled):
    """-> a variant's step (see make_step), and what its first ones took."""
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() >> 20
    run = make_step(device, recipe, batch, ours, compiled)
    found = {"first step, s": round(run(1), 1)}
    run(2)
    found["MiB"] = peak_memory(device) - before if device.type == "cuda" else None
    return run, found


def steps_that_fit(device, recipe, batch, n):
    """steps() at this batch, or at half of it where the memory doesn't suffice."""
    try:
        return steps(device, recipe, batch, n)
    except RuntimeError as error:  # cuDNN has several messages for too little memory
        if not re.search("out of memory|ALLOC_FAILED|unable to find an engine", str(error)):
            raise
    # After the except block, which keeps the memory of the first attempt.
    print(f"{recipe}: a batch of {batch} doesn't fit", flush=True)
    return steps(device, recipe, batch // 2, n)


def communication():
    """By counting: what each process gives to others in a step, for two recipes."""
    return [communication_of(recipe) for recipe in ("imagenet", "cifar10")]


def communication_of(recipe):
    """MiB of gradients, and of BN's sums: for forward and backward, of both views."""
    model = model_of(simsiam.recipe(recipe))
    kinds = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)
    norms = [module for module in model.modules() if isinstance(module, kinds)]
    gradients = 4 * sum(w.numel() for w in model.parameters())
    sums = 4 * 2 * sum(4 * norm.num_features + 1 for norm in norms)
    return {
        "recipe": recipe,
        "gradients, MiB": round(gradients / 2 ** 20, 1),
        "BN layers": len(norms),
        "BN collectives": 2 * 2 * len(norms),
        "BN, MiB": round(sums / 2 ** 20, 2),
    }


# --- kNN, and whole runs --------------------------------------------------------------------------

def imagenet_knn(device):
    """Seconds and MiB for the kNN of ImageNet: 50,000 validation images against 1,281,167 training images.

    A CPU classifies 208 of them, from which we compute the time for all.
    """
    count = 208
    if device.type == "cuda":
        count = 50_000
        torch.cuda.reset_peak_memory_stats()
    bank = torch.empty(1_281_167, 2048, device=device)
    for part in bank.split(2 ** 14):
        part.normal_()
    labels = torch.arange(len(bank), device=device) % 1000
    queries = torch.randn(count, 2048, device=device)
    wait_for(device)
    began = time.perf_counter()
    simsiam.knn(bank, labels, queries)
    wait_for(device)
    seconds = time.perf_counter() - began
    return {
        "queries": count,
        "seconds for 50,000": round(seconds * 50_000 / count, 1),
        "MiB": peak_memory(device),
        "of these, the bank": bank.nbytes >> 20,
    }


def run_of(cifar, *options):
    """A whole run: its time by the clock and by its log; on a GPU, the time of lineval.py too.

    cifar: its DATA, or None for the drawn shapes. The run's folder is temporary.
    """
    torch.cuda.empty_cache()  # the program needs the memory
    data = [] if cifar is None else [cifar]
    shown = [] if cifar is None else ["CIFAR"]
    with tempfile.TemporaryDirectory() as folder:
        seconds = seconds_of("simsiam.py", *data, *options, "--out", folder)
        with open(os.path.join(folder, "log.jsonl")) as f:
            epochs = [r for r in map(json.loads, f) if r["event"] == "epoch"]
        linear = None
        if torch.cuda.is_available():
            linear = seconds_of("lineval.py", "--cached", "--ckpt", os.path.join(folder, "checkpoint.pth"))
    epochs = epochs[1:]  # without the record of the untrained network
    return {
        "command": shlex.join(["python", "simsiam.py", *shown, *options]),
        "seconds in all": seconds,
        "seconds of each epoch": [round(r["seconds"], 2) for r in epochs],
        "images/s": [round(r["images_per_s"]) for r in epochs],
        "waiting for data": [round(r["data_wait"], 3) for r in epochs],
        "lineval --cached, s": linear,
    }


def seconds_of(*command):
    began = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - began, 1)


# --- All parts ------------------------------------------------------------------------------------

def drawn_photos(folder):
    """JPEGs about as large, and as hard to decode, as photographs."""
    rng = np.random.default_rng(0)
    for k in range(64):
        image = 0
        for s in (64, 16, 4, 1):  # noise in squares of s pixels
            noise = rng.normal(size=(3, 375 // s + 1, 500 // s + 1))
            squares = np.kron(noise, np.ones((s, s)))
            image = image + s * squares[:, :375, :500]
        pixels = (128 + 0.6 * image).clip(0, 255).astype(np.uint8)
        picture = Image.fromarray(pixels.transpose(1, 2, 0))
        picture.save(os.path.join(folder, f"{k:03}.jpg"), quality=90)


def parts_for(photos, cifar, device):
    """{name: a function that measures it}. photos, cifar: what --photos and --cifar name."""
    large, _, _ = open_data(photos)
    small, _, _ = open_data(cifar)
    data = cifar if device.type == "cuda" else None
    options = ("--epochs", "3", "--knn-every", "0")
    parts = {}
    for recipe, batch, n in STEPS[device.type]:
        parts[f"step of {recipe}"] = partial(steps_that_fit, device, recipe, batch, n)
    return parts | {
        "knn": partial(imagenet_knn, device),
        "run": partial(run_of, data, *options),
        "in memory": partial(bench, small, augment.Policy(size=32, blur=0), device),
        "photos": partial(bench, large, augment.Policy(), device),
        "run, compiled": partial(run_of, data, *options, "--compile"),
        "colours": partial(colours_at_both_sizes, large, small, device),
        "communication": communication,
    }


def measure(parts, found, path):
    """Measure the parts that `found` lacks. The file is written after each."""
    for name, part in parts.items():
        if name in found:
            continue
        try:
            found[name] = part()
        except Exception:  # the other parts are worth having all the same
            traceback.print_exc()
            continue
        print(json.dumps({name: found[name]}), flush=True)
        with replacing(path, "w") as f:
            f.write(json.dumps(found, indent=1) + "\n")


def conditions(args, device):
    """What the figures were measured with."""
    command = ["python", "results/speed.py"]
    command += ["--photos", "PHOTOS"] if args.photos else []
    command += ["--cifar", "CIFAR"] if args.cifar else []
    return {
        "command": shlex.join(command),
        "torch": torch.__version__,
        "device": device_name(device),
        "processor": processor(),
        "cores": os.cpu_count(),
    }


def processor():
    """The CPU's name, where Linux tells it."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":")[1].strip()
    return "a CPU"


# --- The page -------------------------------------------------------------------------------------

def table(heads, rows):
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        lines.append(f"| {' | '.join(map(str, row))} |")
    return [*lines, ""]


def table_of(records):
    """A table of dicts that have the same keys."""
    first, *_ = records
    return table(list(first), [list(record.values()) for record in records])


def is_of_a_cpu(found):
    return found["device"].startswith("CPU")


def page(found):
    """One machine's section of speed.md."""
    machine = f"{found['processor']}, {found['cores']} cores; torch {found['torch']}"
    measured = (f"`{found['command']}`: {machine}. Medians of interleaved repeats. Of the steps, plain is "
                "NCHW, the default SGD, no autocast; ours is simsiam.py's, but in float32 on a CPU.")
    out = [f"## {found['device']}", "", measured, ""]
    if "photos" in found:
        out += pipeline_section("photographs, two views of 224 pixels", found["photos"])
    if "in memory" in found:
        out += pipeline_section("32-pixel images in memory, two views", found["in memory"])
    if "colours" in found:
        out += colours_section(found["colours"])
    for name, part in found.items():
        if name.startswith("step of "):
            out += step_section(part, found["device"])
    needed = {"step of imagenet", "step of cifar10", "photos", "in memory"}
    if needed <= found.keys() and not is_of_a_cpu(found):
        out += feeding_section(found)
    runs = [part for name, part in found.items() if name.startswith("run")]
    if runs:
        out += ["**Whole runs**:", "", *table_of(runs)]
    if "knn" in found:
        out += [knn_line(found["knn"]), ""]
    return out


def knn_line(found):
    measured = f"{found['queries']:,} queries measured"
    seconds = f"50,000 take {found['seconds for 50,000']:,.0f} s"
    memory = f"{found['MiB']:,} MiB in all, {found['of these, the bank']:,} of them the bank"
    return f"**kNN at ImageNet's size**: {measured}; at their rate {seconds}; {memory}."


def pipeline_section(title, rates):
    heads = ["part", "one core", "all cores", "times Pillow, one core", "all cores"]
    beside = [rates["all, by Pillow"]]
    if "decode" in rates:
        heads += ["share of decoding, one core", "all cores"]
        beside += [rates["decode"]]
    rows = []
    for part, both in rates.items():
        row = [part, *(f"{r:.0f}" for r in both)]
        for other in beside:
            row += [f"{r / b:.2f}" for r, b in zip(both, other)]
        rows.append(row)
    return [f"**Input pipeline**, {title}, images/s:", "", *table(heads, rows)]


def colours_section(found):
    rows = []
    for size, rates in found.items():
        ratio = rates["compiled"] / rates["plain"]
        rows.append([size, *(f"{r:.0f}" for r in rates.values()), f"{ratio:.2f}"])
    title = ("**Colour changes compiled**, which `--compile` does too, the photometric part on one core, "
             "images/s:")
    return [title, "", *table(["views", "plain", "compiled", "times plain"], rows)]


def step_section(step, device):
    """Of one recipe. device: its name, by which we know the peak of some GPUs."""
    peak = next((value for name, value in PEAK.items() if name in device), None)
    plain = step["variants"]["plain"]["images/s"]
    rows = []
    for name, v in step["variants"].items():
        rows.append({
            "variant": name,
            "ms": v["ms"],
            "images/s": v["images/s"],
            "times plain": f"{v['images/s'] / plain:.2f}",
            "TFLOP/s": v["TFLOP/s"],
            "share of bf16's peak": f"{v['TFLOP/s'] / peak:.2f}" if peak and name != "plain" else "-",
            "first step, s": v["first step, s"],
            "MiB": v["MiB"] or "-",
        })
    title = f"{step['recipe']}, batch {step['batch']}, {step['GFLOP an image']} GFLOP an image"
    return [f"**Training step**, {title}:", "", *table_of(rows)]


def feeding_section(found):
    """How many cores a GPU's fastest steps need, and the views' share of the time."""
    imagenet = fastest(found["step of imagenet"])
    cores = []
    for part in ("decode and cut", "all, by Pillow"):
        one_core, _ = found["photos"][part]
        cores.append(f"{imagenet / one_core:.0f} cores ({part})")
    cifar10 = fastest(found["step of cifar10"])
    with_the_device, _ = found["in memory"]["all"]
    views = cifar10 / with_the_device
    epoch = 50_000 / cifar10
    return [f"**Feeding it**: {imagenet:.0f} images/s of ResNet-50 take {' and '.join(cores)}. The views of "
            f"CIFAR-10 take {views:.2f} of the time of their step; an epoch of steps, {epoch:.1f} s, 800 of "
            f"them, {800 / 60 * epoch:.1f} minutes.", ""]


def fastest(step):
    """Images/s of the fastest variant."""
    return max(variant["images/s"] for variant in step["variants"].values())


def aims_section(found):
    """The aims on a GPU, and what came of them. found: what one has measured, {} if none has"""
    title = "The aims on a GPU, and what it has measured; README.md, \"Not run\", has the commands:"
    return ["## Aims on a GPU", "", title, "",
            *table(["aim", "measured"], [[aim, measured(found)] for aim, measured in AIMS.items()])]


NOT_MEASURED = "not measured"


def gain_seen(found):
    """How many times as fast as the plain step the compiled one is, for each recipe."""
    gains = []
    for name, step in found.items():
        if name.startswith("step of "):
            plain, compiled = (step["variants"][way]["images/s"] for way in ("plain", "ours, compiled"))
            gains.append(f"{step['recipe']} {compiled / plain:.2f}")
    return ", ".join(gains) or NOT_MEASURED


def minutes_seen(found):
    """Of 800 epochs' steps, the views not counted."""
    if "step of cifar10" not in found:
        return NOT_MEASURED
    minutes = 800 * 50_000 / 60 / fastest(found["step of cifar10"])
    missed = "missed: " if minutes > 15 else ""
    return f"{missed}the steps alone, of the fastest variant, take {minutes:.1f} minutes"


def judging_seen(found):
    """By a whole run, where it was one of CIFAR-10."""
    if "run" not in found or "CIFAR" not in found["run"]["command"]:
        return NOT_MEASURED
    return f"{found['run']['lineval --cached, s']} s"


AIMS = {
    "a step in bf16, channels_last and compiled: 1.5 times as fast as the plain one": gain_seen,
    "800 epochs of CIFAR-10 in 15 minutes, of which the views take a fifth at most": minutes_seen,
    "`lineval.py --cached` of CIFAR-10 in a minute": judging_seen,
}


def whole_page(machines):
    """speed.md. machines: what was found on each, a GPU's first."""
    lines = ["Made by `results/speed.py`; what it means is in `results/README.md`.", ""]
    for found in machines:
        lines += page(found)
    counted = [found["communication"] for found in machines if "communication" in found]
    if counted:  # the same on all machines
        lines += ["## Communication", "", "What a step sends, by counting:", "", *table_of(counted[0])]
    first, *_ = machines
    lines += aims_section({} if is_of_a_cpu(first) else first)
    return "\n".join(lines)


# --- The program ----------------------------------------------------------------------------------

FILES = {"cuda": "results/speed-cuda.json", "cpu": "results/speed.json"}


def read_json(path):
    """What an earlier start has measured; nothing where there was none."""
    if not os.path.exists(path):
        return {}
    with open(path) as f:
        return json.load(f)


def measured_here(path, now):
    """What an earlier start has measured. Raises Refused where that was another machine, or another torch."""
    before = read_json(path)
    for key in ("device", "processor", "torch"):
        if before and before[key] != now[key]:
            raise Refused(f"--resume: {path} has figures of {before[key]}, and this is {now[key]}: without "
                          "--resume all is measured here")
    return before


def measure_everything(args, device):
    torch.backends.cudnn.benchmark = True  # as simsiam.py and the released code have it
    path = FILES[device.type]
    found = conditions(args, device)
    if args.resume:
        found |= measured_here(path, found)
    with tempfile.TemporaryDirectory() as folder:
        photos = args.photos
        if photos is None:
            drawn_photos(folder)
            photos = folder
        measure(parts_for(photos, args.cifar, device), found, path)
    machines = [read_json(file) for file in FILES.values()]
    with open("results/speed.md", "w") as f:
        f.write(whole_page([found for found in machines if found]))


def bench_of(data, device):
    """The pipeline's table for this data, with views as large as augment.py shows them."""
    train, _, _ = open_data(data)
    policy = augment.Policy()
    if train.pixels is not None:
        policy = augment.Policy(size=max(train.pixels.shape[2:]), blur=0)
    bench(train, policy, device)


def main():
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", metavar="DATA",
                        help="measure the input pipeline on this data, and nothing else; writes no file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=best,
                        help="for DATA (default: cuda where there is one)")
    parser.add_argument("--photos", help="a folder of photographs (default: drawn ones)")
    parser.add_argument("--cifar", help="a CIFAR-10 folder (default: the drawn shapes)")
    parser.add_argument("--resume", action="store_true",
                        help="measure only the parts that an interrupted start has not")
    args = parser.parse_args()
    try:
        if args.data is None:
            measure_everything(args, torch.device(best))
        else:
            bench_of(args.data, torch.device(args.device))
    except (Refused, OSError, ValueError) as error:
        sys.exit(f"speed.py: {printable(error)}")


if __name__ == "__main__":
    main()
