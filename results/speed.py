"""Speed, compared with the plain or conventional way.

    python results/speed.py DATA                               the input pipeline on this data; prints a table
    python results/speed.py --photos PHOTOS --cifar CIFAR      everything; 15 minutes on 2 cores
    python results/speed.py --parts "step of imagenet: ours" --out DIR     this part alone, into DIR
    python results/speed.py --show                             only write the page

Start it from the repository's root. DATA is anything that simsiam.py takes. PHOTOS is a folder of photographs
(default: drawn JPEGs of 500 x 375), CIFAR a CIFAR-10 folder (default: the drawn shapes).

Each part has a process of its own, which ends at the part's time limit. It is written into
results/speed.json, or speed-cuda.json on a GPU, as soon as it is measured; results/speed.md is made from
both. Add --resume to continue after an interruption. It has not finished on a GPU yet: there is one part from
an H200.

The steps of the input pipeline are interleaved, and medians reported. Ratios within a table mean more than
the figures.
"""
import argparse
import json
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial

sys.path.insert(0, os.getcwd())
import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch.utils.flop_counter import FlopCounterMode

import augment
import simsiam
from harness.common.errors import BadImage, Refused, printable
from harness.common.machine import device_name, fastest_layout, peak_memory
from harness.data.images import read_rgb
from harness.data.loading import Decoder, decode
from harness.data.opening import open_data
from harness.data.source import Source
from harness.training import recipes
from results.pages import table, write
from results.rows import in_time, read_json, records, write_json

CPU = torch.device("cpu")
FILES = {"cuda": "speed-cuda.json", "cpu": "speed.json"}
PAGE = "results/speed.md"
PEAK = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312}  # dense bf16 TFLOP/s, from the data sheets
STEPS = {  # recipe, batch, steps a repeat
    "cuda": [
        ("cifar10", 512, 20),
        ("imagenet", 256, 5),
    ],
    "cpu": [
        ("shapes", 64, 40),
        ("cifar10", 64, 1),
        ("imagenet", 8, 1),
    ],
}
VARIANTS = {
    "plain": {"plain": True},
    "ours": {},
    "ours, compiled": {"compiled": True},
}


# --- Timing ---------------------------------------------------------------------------------------

def wait_for(device):
    """Wait until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(function, device=CPU, n=1):
    """The mean time of n calls."""
    wait_for(device)
    began = time.perf_counter()
    for _ in range(n):
        function()
    wait_for(device)
    return (time.perf_counter() - began) / n


def alone(step, device, times=5):
    """A step that nothing runs ahead of: the median ms until the device is told, and until it has done it."""
    told, done = [], []
    for _ in range(times):
        wait_for(device)
        began = time.perf_counter()
        step()
        told.append(time.perf_counter() - began)
        wait_for(device)
        done.append(time.perf_counter() - began)
    return [round(1000 * statistics.median(seconds), 1) for seconds in (told, done)]


def in_turn(variants, rounds, device=CPU, n=1):
    """{name: function} -> {name: median seconds of a call}, in turn, after a round that doesn't count"""
    times = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, function in variants.items():
            times[name].append(seconds_of(function, device, n))
    return {name: statistics.median(its[1:]) for name, its in times.items()}


# --- The input pipeline, and the conventional one -------------------------------------------------

def opened(source, i):
    """The i-th image as a PIL image, decoded."""
    if source.pixels is None:
        return read_rgb(source.files[i])
    return Image.fromarray(source.image(i).numpy())


def view_by_pillow(image, crop, colour, policy):
    """A view of a PIL image by Pillow's operations, as the released code makes it.

    crop, colour: of this view -> (3, S, S) float32, normalised; only this last operation is in floats
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
    """The views that load_views makes of these images, one by one, the conventional way: [x1, x2]"""
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
    """A worker's part: crops of these images, two views each. Images in memory are cut on the device."""
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
    """The photometric part, which the device does with the crops."""
    for v in range(2):
        colour = augment.draw_colour(policy, 0, 0, index, v)
        augment.photometric(crops[v], colour, policy)


def rate(source, policy, device, part):
    """Images a second of a part of the pipeline in this process: two views of each image of the source."""
    index = np.arange(len(source))
    crops = None
    if part == "colour":
        crops = [view.to(device) for view in cut(source, policy, device, index)]
    part_itself = partial(do_part, part, source, policy, device, index, crops)
    return len(source) / seconds_of(part_itself, device)


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
    """Images a second from the DataLoader, decoded and cut.

    The first batches wait in its queues while it starts, so we count once it has emptied them.
    """
    batches = [(0, np.arange(len(source)))] * 12 * workers
    cut_two_views = partial(augment.cut_views, policy, 0, 2)
    arrivals = []
    for _ in decode(source, cut_two_views, 6 * policy.size ** 2, batches, device, workers):
        arrivals.append(time.perf_counter())
    first, *others = arrivals[4 * workers:]
    return len(source) * len(others) / (others[-1] - first)


def bench(source, policy, device, repeats=9):
    """The rates of the pipeline's parts: {part: images/s on one core, on all cores}

    For 48 of the images, or 512 in memory; medians of interleaved repeats. In the first column the device
    does its part. In the second each core has its own process, which does everything on the CPU.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = rates_of_all_parts(sample(source), policy, device, repeats)
    torch.set_num_threads(threads)
    return {part: [statistics.median(one), statistics.median(all_cores)]
            for part, (one, all_cores) in found.items()}


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


# --- Training steps -------------------------------------------------------------------------------

def model_of(settings):
    """A recipe's model."""
    names = ("arch", "dim", "pred_dim", "proj_layers", "proj_hidden", "width", "cifar_stem")
    return simsiam.SimSiam(**{name: settings[name] for name in names})


def make_step(settings, batch, device=CPU, amp=False, plain=False, compiled=False):
    """A training step on fixed views, as a function.

    plain: NCHW, the default SGD, no autocast (but TF32 in a GPU's convolutions); otherwise simsiam.py's.
    """
    torch.manual_seed(0)
    size = settings["size"]
    model = model_of(settings)
    layout = torch.contiguous_format if plain else fastest_layout(model.encoder, device)
    model = model.to(device, memory_format=layout)
    views = torch.randn(2, batch, 3, size, size, device=device)
    views = [x.contiguous(memory_format=layout) for x in views]
    optimizer = simsiam.sgd(model, 0.9, 1e-4)
    if plain:
        groups = [{"params": group["params"]} for group in optimizer.param_groups]
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=1e-4)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=amp)
    if compiled:
        torch._dynamo.reset()  # otherwise it would treat other recipes' sizes as varying
        model.compile()
    return partial(simsiam.train_step, model, optimizer, autocast, *views)


def steps(device, recipe, batch, n, variant, repeats=5):
    """-> what is trained, and a variant's images/s, TFLOP/s, ms of a step alone, seconds of the first, and
    peak MiB on a GPU.

    An image is two views, forward and backward. All are in float32 on a CPU; results/bf16.py has bf16 there.
    """
    settings = recipes.recipe(recipe, simsiam.SETTINGS)
    with FlopCounterMode(display=False) as counter:
        make_step(settings, 2, plain=True)()
    flops = counter.get_total_flops() / 2
    on_a_gpu = device.type == "cuda"
    torch.backends.cudnn.benchmark = True  # as simsiam.py and the released code have it
    step = make_step(settings, batch, device, amp=on_a_gpu and variant != "plain", **VARIANTS[variant])
    first = seconds_of(step, device)
    seconds_of(step, device, 2)
    seconds = statistics.median(seconds_of(step, device, n) for _ in range(repeats))
    return {"recipe": recipe, "batch": batch, "GFLOP an image": round(flops / 1e9, 2)}, {
        "first step, s": round(first, 1),
        "MiB": peak_memory(device) if on_a_gpu else None,
        "ms": round(1000 * seconds, 1),
        "images/s": round(batch / seconds, 1),
        "TFLOP/s": round(batch * flops / seconds / 1e12, 2),
        "alone": alone(step, device),
    }


# --- Whole runs -----------------------------------------------------------------------------------

def run_of(data, *options, judged=False):
    """A whole run: its time by the clock and by its log; if judged, lineval.py's time too.

    data: its DATA, or None for the drawn shapes
    """
    words = [] if data is None else [data]
    shown = [] if data is None else ["DATA"]
    with tempfile.TemporaryDirectory() as folder:
        seconds = seconds_of_command("simsiam.py", *words, *options, "--out", folder)
        _, _, *epochs, _ = records(f"{folder}/log.jsonl")  # without start, untrained network and end
        linear = None
        if judged:
            linear = seconds_of_command("lineval.py", "--cached", "--ckpt", f"{folder}/checkpoint.pth")
    return {
        "command": shlex.join(["python", "simsiam.py", *shown, *options]),
        "seconds in all": seconds,
        "seconds of each epoch": [round(r["seconds"], 2) for r in epochs],
        "images/s": [round(r["images_per_s"]) for r in epochs],
        "waiting for data": [round(r["data_wait"], 3) for r in epochs],
        "lineval --cached, s": linear,
    }


def seconds_of_command(*command):
    run = partial(subprocess.run, [sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return round(seconds_of(run), 1)


# --- All parts ------------------------------------------------------------------------------------

def drawn_photos(folder):
    """JPEGs as large as photographs."""
    rng = np.random.default_rng(0)
    for k in range(64):
        noise = rng.integers(0, 256, (47, 63, 3), np.uint8)
        Image.fromarray(noise).resize((500, 375)).save(os.path.join(folder, f"{k:03}.jpg"), quality=90)


def parts_for(device, photos, cifar):
    """{name: a function that measures it}. photos, cifar: the values of --photos and --cifar"""
    on_a_gpu = device.type == "cuda"
    whole = partial(run_of, cifar if on_a_gpu else None, "--epochs", "3", "--knn-every", "0", judged=on_a_gpu)
    from_files = shlex.split("--recipe imagenet --batch 20 --epochs 1 --knn-every 0")
    parts = {}
    for recipe, batch, n in STEPS[device.type]:
        for variant in VARIANTS:
            parts[f"step of {recipe}: {variant}"] = partial(steps, device, recipe, batch, n, variant)
    parts |= {
        "run": whole,
        "in memory": partial(pipeline, cifar, augment.Policy(size=32, blur=0), device),
        "photos": partial(pipeline, photos, augment.Policy(), device),
        "run, compiled": partial(whole, "--compile"),
    }
    if on_a_gpu:
        parts["run from files"] = partial(run_of, photos, *from_files)
    return parts


def pipeline(data, policy, device):
    """bench on this data's training images."""
    train, _, _ = open_data(data)
    return bench(train, policy, device)


def limit_of(name, device):
    """The seconds that a part may take."""
    if device.type == "cpu":
        return 300 if "step" in name else 1800
    if "step" in name:
        return 110 if "compiled" in name else 60
    return 90 if name == "run from files" else 200


def measure(parts, found, path, device, deadline):
    """Measure the parts that `found` lacks, and write the file after each. None is begun that may end after
    the deadline."""
    for name, part in parts.items():
        about, _, variant = name.partition(": ")
        if variant in found.get(about, {}).get("variants", {}) or about in found and not variant:
            continue
        limit = limit_of(name, device)
        if time.monotonic() + limit > deadline:
            print(f"{name}: not begun, because it may take {limit} s", file=sys.stderr)
            continue
        try:
            result = in_time(limit, part)
        except RuntimeError as error:  # the other parts are still worth having
            print(f"{name}: {error}", file=sys.stderr)
            continue
        if variant:
            trained, result = result
            found.setdefault(about, {**trained, "variants": {}})["variants"][variant] = result
        else:
            found[name] = result
        print(json.dumps({name: result}), flush=True)
        write_json(path, found)


def best_device():
    """The GPU if there is one. main calls it in another process: what has asked can't be forked later."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def conditions(args, device):
    """What the figures were measured with."""
    command = ["python", "results/speed.py"]
    command += ["--photos", "PHOTOS"] if args.photos else []
    command += ["--cifar", "CIFAR"] if args.cifar else []
    return {
        "command": shlex.join(command),
        "torch": torch.__version__,
        "device": in_time(100, device_name, device),
        "processor": processor(),
        "cores": os.cpu_count(),
    }


def processor():
    """The CPU's name, if Linux tells it."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":")[1].strip()
    return "a CPU"


# --- The page -------------------------------------------------------------------------------------

def table_of(records):
    """A table of dicts that have the same keys."""
    first, *_ = records
    return table(first, [record.values() for record in records])


def section(found):
    """One machine's section of the page: a list of paragraphs."""
    machine = f"{found['processor']}, {found['cores']} cores; torch {found['torch']}"
    how = ("Medians; the pipeline's parts are interleaved. Plain steps use NCHW, the default SGD and no "
           "autocast; ours are simsiam.py's, but in float32 on a CPU.")
    out = [f"## {found['device']}", f"`{found['command']}`: {machine}. {how}"]
    for name, title in (("photos", "photographs, two views of 224 pixels"),
                        ("in memory", "32-pixel images in memory, two views")):
        if name in found:
            out += [f"**Input pipeline**, {title}, images/s:", pipeline_table(found[name])]
    for name, part in found.items():
        if name.startswith("step of "):
            title = f"{part['recipe']}, batch {part['batch']}, {part['GFLOP an image']} GFLOP an image"
            out += [f"**Training step**, {title}:", step_table(part, found["device"])]
    runs = [part for name, part in found.items() if name.startswith("run")]
    if runs:
        out += ["**Whole runs**:", table_of(runs)]
    return out


def pipeline_table(rates):
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
    return table(heads, rows)


def step_table(step, device):
    """A recipe's steps. device: its name, from which we know the peak of some GPUs"""
    peak = next((value for name, value in PEAK.items() if name in device), None)
    plain = step["variants"].get("plain")
    rows = []
    for name, v in step["variants"].items():
        rows.append({
            "variant": name,
            "ms": v["ms"],
            "one alone, ms: told / done": " / ".join(map(str, v.get("alone", "-"))),
            "images/s": v["images/s"],
            "times plain": f"{v['images/s'] / plain['images/s']:.2f}" if plain else "-",
            "TFLOP/s": v["TFLOP/s"],
            "share of bf16's peak": f"{v['TFLOP/s'] / peak:.2f}" if peak and name != "plain" else "-",
            "first step, s": v["first step, s"],
            "MiB": v["MiB"] or "-",
        })
    return table_of(rows)


def pages():
    """{path: text}, a GPU's section first."""
    machines = [found for name in FILES.values() if (found := read_json(f"results/{name}"))]
    made_by = "Made by `results/speed.py`. Of which version: [README.md](README.md#of-which-version)."
    paragraphs = ["# Speed", made_by]
    for found in machines:
        paragraphs += section(found)
    return {PAGE: "\n\n".join(paragraph.strip() for paragraph in paragraphs) + "\n"}


# --- The program ----------------------------------------------------------------------------------

def measure_everything(args):
    """All parts, or those of --parts."""
    deadline = time.monotonic() + args.seconds
    device = in_time(100, best_device)
    path = f"{args.out}/{FILES[device.type]}"
    found = conditions(args, device)
    before = read_json(path)
    if args.resume and all(before.get(key) == found[key] for key in ("device", "processor", "torch")):
        found |= before
    with tempfile.TemporaryDirectory() as folder:
        photos = args.photos
        if photos is None:
            drawn_photos(folder)
            photos = folder
        parts = parts_for(device, photos, args.cifar)
        chosen = args.parts or list(parts)
        if unknown := set(chosen) - parts.keys():
            raise Refused(f"--parts: {', '.join(unknown)}; the parts are {', '.join(parts)}")
        measure({name: parts[name] for name in chosen}, found, path, device, deadline)


def bench_of(data, device):
    """Print the pipeline's table for this data, with views as large as augment.py shows them."""
    train, _, _ = open_data(data)
    policy = augment.Policy()
    if train.pixels is not None:
        policy = augment.Policy(size=max(train.pixels.shape[2:]), blur=0)
    print(pipeline_table(bench(train, policy, device)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", metavar="DATA",
                        help="measure the input pipeline on this data, and nothing else; writes no file")
    parser.add_argument("--device", choices=("cuda", "cpu"),
                        help="for DATA (default: cuda where there is one)")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="measure these parts, in this order")
    parser.add_argument("--seconds", type=float, default=1e6, help="begin no part that may end later")
    parser.add_argument("--out", default="results", help="the folder of the figures (default: %(default)s)")
    parser.add_argument("--photos", help="a folder of photographs (default: drawn ones)")
    parser.add_argument("--cifar", help="a CIFAR-10 folder (default: the drawn shapes)")
    parser.add_argument("--resume", action="store_true",
                        help="measure only what an interrupted start on this machine has not")
    parser.add_argument("--show", action="store_true", help="measure nothing, only write the page")
    args = parser.parse_args()
    try:
        if args.data is not None:
            bench_of(args.data, torch.device(args.device) if args.device else best_device())
            return
        if not args.show:
            measure_everything(args)
        if args.out == "results":
            write(pages())
    except (Refused, OSError, ValueError) as error:
        sys.exit(f"speed.py: {printable(error)}")


if __name__ == "__main__":
    main()
