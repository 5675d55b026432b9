"""An evaluation's lines on the screen, and the files of its result."""
import csv
import io
import json
import os
import shlex
import sys

import numpy as np
import torch
import torch.nn.functional as F

from ..common.files import read, refusing, replacing, save
from ..common.machine import device_name, hardware
from ..common.pictures import draw_neighbors
from ..training.options import as_text
from .backbones import in_words
from .features import if_unequal
from .weights import describe_found

# --- On the screen ----------------------------------------------------------------------------------------

def describe_evaluation(job, backbone, rows):
    """What to know about an evaluation before it starts: {heading: text}. rows: those about the data"""
    s = job.settings
    # Which network it is, and where it is from.
    origin = "untrained, BN calibrated"
    if backbone.found:
        origin = f"sha256 {backbone.sha256[:12]}, {describe_found(backbone.found)}"
        if backbone.epochs is not None:
            origin = f"{backbone.epochs} epochs, {origin}"
    # How we show images to it, and where that is from.
    told = f"of recipe {s['recipe']}, as the file names none"
    if backbone.settings:
        told = "as in its pre-training"
    if s["views_given"]:
        told = f"{', '.join(s['views_given'])} as given"
    # What judges it, and is trained for that.
    protocol = "none: nothing is trained or judged"
    if "protocol" in s:
        protocol = f"{s['protocol']}: {s['note']}"
    if "epochs" in s:
        base_lr = "by a sweep" if s["base_lr"] is None else s["base_lr"]
        protocol += f"; {s['epochs']} epochs, batch {s['batch']}, base lr {base_lr}"
    return {
        "backbone": f"{s['backbone']}: {in_words(*backbone.shape)} ({origin})",
        **rows,
        "views": f"{s['size']} pixels, mean {as_text(s['mean'])}, std {as_text(s['std'])} "
                 f"({told}; --size --mean --std)",
        "protocol": protocol,
        "processes": f"{s['world']}, {hardware(s, job.device)}",
        "writes to": job.out,
    }


def describe_accuracy(found):
    """The accuracies that `accuracy` found, for the screen."""
    text = f"top-1 {found['top1']:.2f}%"
    if "top5" in found:
        text += f", top-5 {found['top5']:.2f}%"
    return text + if_unequal(found["top1"], found["balanced"], found["largest_class"])


# --- In files ---------------------------------------------------------------------------------------------

def settings_in(path, settings):
    """A lineval.json -> what it has of these settings, and they themselves, as JSON holds them"""
    with open(path) as f, refusing(path, "no lineval.json"):
        content = json.load(f)
    then = {name: content.get(name) for name in settings}
    if "base_lr" in then and settings["base_lr"] is None:
        then["base_lr"] = None  # a sweep chose what is there
    return then, json.loads(json.dumps(settings))


def write_result(job, judged, bank, queries, bad_images, network):
    """Write lineval.json, classifier.pth if a layer was trained, and neighbors.png.

    bank, queries   features of the training and of the validation images, (n, D) each
    network         the digest of the frozen network

    classifier.pth has the layer's weight (C, D) and bias (C,), the classes' names, the note, and what
    --classify needs: the evaluation's settings, and the network's digest.
    lineval.json has the accuracy first, then everything that it could depend on:

        top1, top5                  percent of the validation images that could be read, after the last epoch;
                                    top5 only if there are more than five classes
        balanced, largest_class     the mean of top1 within each class; the largest class's share
        protocol, note              which protocol, and whether it is the paper's
        base_lr, batch, epochs, lr  of the linear layer, if one was trained
        backbone, sha256, ...       what was evaluated
        data, content, ...          on what; content is a number that tells data sets apart
        views_given                 which of size, mean and std the command line named
        held_out_top1               cached: how each lr of the sweep did on held-out training images; of
                                    fewer than 10,000 images, the least cross-entropy decides instead
        best_epoch_not_the_result   lars, sgd: for papers that report it
        images, val_images          how many could be read and took part
        bad_images                  how many could not be read
    """
    result = {
        **judged.accuracy,
        **job.settings,
        **judged.found,
        "bad_images": bad_images,
        "torch": torch.__version__,
        "hardware": device_name(job.device),
        "command": shlex.join(sys.argv),
    }
    with replacing(os.path.join(job.out, "lineval.json"), "w") as f:
        f.write(json.dumps(result, indent=1) + "\n")
    if judged.layer is not None:
        content = {
            "weight": judged.layer.weight.detach().cpu(),
            "bias": judged.layer.bias.detach().cpu(),
            "classes": job.train.classes,
            "note": job.settings["note"],
            "settings": job.settings,
            "network": network,
        }
        save(content, os.path.join(job.out, "classifier.pth"))
    chosen, nearest = neighbors(job.train, job.val, bank, queries)
    draw_neighbors(os.path.join(job.out, "neighbors.png"), job.train, job.val, chosen, nearest)


def neighbors(train, val, bank, queries, rows=10, columns=8):
    """Some validation images, sorted by class, and the training images nearest to each by cosine.

    -> (R,), (R, C)
    """
    # Even steps through the sorted images meet as many classes as possible.
    by_class = np.argsort(val.labels, kind="stable")
    places = np.linspace(0, len(val) - 1, min(rows, len(val)))
    chosen = by_class[places.astype(int)]
    similarity = F.normalize(queries[chosen]) @ F.normalize(bank).T
    nearest = similarity.topk(min(columns, len(train))).indices
    return chosen, nearest.cpu().numpy()


def read_classifier(path):
    """A classifier.pth -> its content. Raises Refused if it isn't one, or lacks what applying it needs."""
    content = read(path)
    with refusing(path, "no classifier.pth of lineval.py"):
        return {name: content[name] for name in ("weight", "bias", "classes", "settings", "network")}


def write_classes(path, splits, classifier):
    """Write a table: each image's name (or number), its most probable class, and that one's probability.

    splits      as for save_features
    classifier  see read_classifier
    """
    names = []
    for split, (source, _) in splits.items():
        numbers = [f"{split}/{i}" for i in range(len(source))]  # images in CIFAR's files have no names
        names += numbers if source.files is None else map(os.fsdecode, source.names)
    v = torch.cat([v for _, v in splits.values()]).cpu()
    scores = v @ classifier["weight"].T + classifier["bias"]
    best = scores.softmax(dim=1).max(dim=1)
    with replacing(path) as f:
        text = io.TextIOWrapper(f, "utf-8", "surrogateescape", newline="")
        table = csv.writer(text)
        table.writerow(["file", "class", "probability"])
        for name, p, k in zip(names, *best):
            table.writerow([name, classifier["classes"][k], f"{p:.4f}"])
        text.detach()


def save_features(path, splits, settings):
    """Save features of good images, with labels, classes and file names if these are known.

    The file has NAME_features (n, D) float32, NAME_labels (n,) and NAME_files (n,) bytes for each split, and
    the settings as JSON: the backbone, its sha256, the views.
    splits      {NAME, "train" or "val": (source of good images, their features)}
    """
    arrays = {"settings": np.array(json.dumps(settings))}
    for name, (source, v) in splits.items():
        arrays[f"{name}_features"] = v.cpu().numpy()
        if source.labels is not None:
            arrays["classes"] = np.array(source.classes)
            arrays[f"{name}_labels"] = source.labels
        if source.files is not None:
            arrays[f"{name}_files"] = source.names
    # We open the file ourselves, because numpy would add .npz to its name.
    with replacing(path) as f:
        np.savez(f, **arrays)
