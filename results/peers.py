"""Views and steps compared with torchvision, lightly and kornia, if these are installed.

    python results/peers.py --photos PHOTOS --cifar CIFAR
    python results/peers.py --show                              only write the page

Start it from the repository's root, on an idle CPU. Nothing else here needs these libraries; one that isn't
installed is named and skipped. Everything runs in one process with one torch, on one thread unless stated
otherwise, the variants in turn; figures are medians. It writes results/peers.json and the tables in
results/peers.md.

A "view" is the paper's: crop, flip, jitter, grayscale, blur at 224 pixels. Ours is measured twice: a worker
process's part (decode, crop, resize), to be compared with a worker's elsewhere, and all of it on the CPU.
Steps are SimSiam's on the same network: forward of two views, loss, backward, SGD.
"""
import importlib
import os
import sys
from functools import partial

sys.path.insert(0, os.getcwd())

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import augment
import resnet
import simsiam
from harness.common.errors import Refused
from harness.common.machine import cpu_has_bf16
from harness.data.opening import open_data
from harness.data.source import Source
from harness.training import recipes
from harness.training.processes import join_world
from results.pages import page_with, table
from results.rows import parser_for, read_json, run_script, write_json
from results.speed import CPU, do_part, in_turn, make_step

RESULT = "results/peers.json"
PAGE = "results/peers.md"
LIBRARIES = ("torchvision", "lightly", "kornia")
STEPS = {  # recipe, batch
    "ResNet-18, 32 pixels, batch 64": ("cifar10", 64),
    "ResNet-50, 224 pixels, batch 8": ("imagenet", 8),
}
PHOTOS = 24
SMALL = 256  # images of 32 pixels a batch
THREADS = 2  # of the steps
MEAN, STD = augment.Policy().mean, augment.Policy().std


def imported(name):
    """A library, or None if it isn't installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def rates(seconds, images):
    """Images a second of each variant."""
    return {name: round(images / value, 1) for name, value in seconds.items()}


# --- Views ----------------------------------------------------------------------------------------

def released_transforms(size, blur):
    """The released code's, from torchvision, with its own blur."""
    from torchvision import transforms
    parts = [
        transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        *([transforms.RandomApply([pillow_blur], p=0.5)] if blur else []),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    return transforms.Compose(parts)


def pillow_blur(image):
    """Gaussian blur with a std between 0.1 and 2, by Pillow, as in the released code."""
    from PIL import ImageFilter
    return image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0)))


def views_elsewhere(size, blur, images):
    """Other libraries' variants. images: a function that returns PIL images"""
    variants = {}
    if imported("torchvision"):
        released = released_transforms(size, blur)
        variants["the released transforms, by torchvision"] = lambda: [
            [released(image), released(image)] for image in images()]
    if imported("lightly"):
        from lightly.transforms import SimSiamTransform
        lightlys = SimSiamTransform(input_size=size, gaussian_blur=0.5 if blur else 0.0)
        variants["lightly"] = lambda: [lightlys(image) for image in images()]
    return variants


def views_of_photos(photos):
    """Two views of each of some photographs, from their files."""
    files = open_data(photos).train.files
    chosen = np.linspace(0, len(files) - 1, PHOTOS).astype(int)
    source = Source(files=files[chosen])

    def ours(part):
        index = np.arange(PHOTOS)
        return partial(do_part, part, source, augment.Policy(), CPU, index, None)

    variants = {
        "ours: a worker's part": ours("decode and cut"),
        "ours: all on the CPU": ours("all"),
        "decoding alone": ours("decode"),
        **views_elsewhere(224, True, ours("decode")),
    }
    return rates(in_turn(variants, 7), PHOTOS)


def views_of_small_images(cifar):
    """Two views of each image of a batch in memory, without blur."""
    train = open_data(cifar).train
    pixels = train.pixels[:SMALL]
    pictures = [Image.fromarray(train.image(i).numpy()) for i in range(SMALL)]
    policy = augment.Policy(size=32, blur=0)
    variants = {
        "ours": partial(do_part, "all", train, policy, CPU, np.arange(SMALL), None),
        **views_elsewhere(32, False, lambda: pictures),
    }
    if imported("kornia"):
        import kornia.augmentation as K
        kornias = nn.Sequential(
            K.RandomResizedCrop((32, 32), scale=(0.2, 1.0)),
            K.ColorJiggle(0.4, 0.4, 0.4, 0.1, p=0.8),
            K.RandomGrayscale(p=0.2),
            K.RandomHorizontalFlip(),
            K.Normalize(torch.tensor(MEAN), torch.tensor(STD)))
        variants["kornia, in batches"] = lambda: (kornias(pixels / 255), kornias(pixels / 255))
    return rates(in_turn(variants, 7), SMALL)


# --- Steps ----------------------------------------------------------------------------------------

def lightlys_step(arch, cifar_stem, batch, size):
    """A step of lightly's parts on our ResNet, as in its example for SimSiam."""
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
    torch.manual_seed(0)
    backbone = resnet.ARCHS[arch](width=1, cifar_stem=cifar_stem)
    features = backbone.num_features
    backbone.fc = nn.Identity()
    projection = SimSiamProjectionHead(features, 2048, 2048)
    prediction = SimSiamPredictionHead(2048, 512, 2048)
    if cifar_stem:  # two layers, as ours
        layers = list(projection.layers)
        projection.layers = nn.Sequential(*layers[:3], *layers[-2:])
    parameters = [w for module in (backbone, projection, prediction) for w in module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-4)
    criterion = NegativeCosineSimilarity()
    views = [torch.randn(batch, 3, size, size) for _ in range(2)]

    def step():
        z1, z2 = (projection(backbone(x).flatten(1)) for x in views)
        p1, p2 = prediction(z1), prediction(z2)
        L = 0.5 * (criterion(p1, z2.detach()) + criterion(p2, z1.detach()))
        optimizer.zero_grad()
        L.backward()
        optimizer.step()

    return step


def steps():
    """{case: {variant: seconds, and the share of a large product's rate}}"""
    torch.set_num_threads(THREADS)
    peak = {"float32": matmul_rate(torch.float32), "bf16": matmul_rate(torch.bfloat16)}
    out = {"a large product, GFLOP/s": {name: round(rate) for name, rate in peak.items()}}
    for case, (recipe, batch) in STEPS.items():
        settings = recipes.recipe(recipe, simsiam.SETTINGS)
        variants = {"ours, float32": make_step(settings, batch)}
        if cpu_has_bf16():
            variants["ours, bf16"] = make_step(settings, batch, amp=True)
        if imported("lightly"):
            arch, cifar_stem, size = (settings[name] for name in ("arch", "cifar_stem", "size"))
            variants["lightly"] = lightlys_step(arch, cifar_stem, batch, size)
        with FlopCounterMode(display=False) as counter:
            variants["ours, float32"]()
        flops = counter.get_total_flops()
        seconds = in_turn(variants, 5)
        out[case] = {}
        for name, value in seconds.items():
            large = peak["bf16" if name == "ours, bf16" else "float32"]
            share = flops / value / 1e9 / large
            out[case][name] = {"seconds": round(value, 3), "share": round(share, 2)}
    return out


def matmul_rate(dtype):
    """GFLOP/s of a product of two 2048 x 2048 matrices."""
    a = torch.randn(2048, 2048).to(dtype)
    b = torch.randn(2048, 2048).to(dtype)
    seconds = in_turn({"product": lambda: a @ b}, 5)["product"]
    return 2 * 2048 ** 3 / seconds / 1e9


# --- The page -------------------------------------------------------------------------------------

def table_of_views(title, found):
    """Images a second, and ours relative to each of the others."""
    ours = next(iter(found.values()))
    rows = [[name, f"{value:,.0f}", f"{ours / value:.2f}"] for name, value in found.items()]
    return table([title, "images/s", "ours is"], rows)


def table_of_steps(found):
    """Seconds a step, the share of a large product's rate, and times lightly's speed."""
    rows = []
    for case in STEPS:
        theirs = found[case].get("lightly", {}).get("seconds")
        for name, row in found[case].items():
            times = f"{theirs / row['seconds']:.2f}" if theirs else "not installed"
            rows.append([case, name, f"{row['seconds']:.3f}", f"{row['share']:.0%}", times])
    return table(["step", "variant", "s", "share of a large product", "times lightly's speed"], rows)


def pages():
    found = read_json(RESULT)
    return page_with(PAGE, [
        table_of_views("224 pixels, from files", found["views of 224 pixels"]),
        table_of_views("32 pixels, in memory", found["views of 32 pixels"]),
        table_of_steps(found["steps"]),
    ])


def measure(args, deadline):
    if not args.photos or not args.cifar:
        raise Refused("--photos and --cifar are needed, or --show")
    join_world(torch.device("cpu"))
    versions = {name: getattr(imported(name), "__version__", None) for name in LIBRARIES}
    for name, version in versions.items():
        if version is None:
            print(f"{name} is not installed: left out")
    torch.set_num_threads(1)
    write_json(RESULT, {
        "command": "python results/peers.py --photos PHOTOS --cifar CIFAR",
        "torch": torch.__version__, **versions,
        "cores": len(os.sched_getaffinity(0)), "threads of a step": THREADS,
        "views of 224 pixels": views_of_photos(args.photos),
        "views of 32 pixels": views_of_small_images(args.cifar),
        "steps": steps(),
    })


def main():
    parser = parser_for(__doc__)
    parser.add_argument("--photos", help="a folder of photographs")
    parser.add_argument("--cifar", help="a CIFAR-10 folder")
    run_script(parser, measure, pages)


if __name__ == "__main__":
    main()
