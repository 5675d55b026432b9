"""The labels of a flat validation folder, from a text file beside it.

Each line has an image's name and its class, and perhaps more: val_annotations.txt of Tiny-ImageNet has a
box, and a tab between them; val.txt, for ImageNet's 50,000 as they are downloaded, has a blank. A class is
the name of one of the training folders, or its number as sorted, from 0 on.
"""
import os

from .lists import read_lines

NAMES = (b"val_annotations.txt", b"val.txt")


def labels_beside(parent, folder, images, classes):
    """The labels of these images in a folder -> [(image, label)] sorted, why there are none, and the file
    that was read.

    parent      the folder that the split lies in; the text file is there, or in the split, or between them
    """
    places = [folder, os.path.dirname(folder), parent]
    paths = [os.path.join(place, name) for place in places for name in NAMES]
    path = next((path for path in paths if os.path.isfile(path)), None)
    if path is None:
        return [], "it has no class folders, and there is no val.txt or val_annotations.txt with labels", None
    said = {}
    for line in read_lines(path):
        name, label = name_and_class(line)
        said[os.path.basename(name)] = label
    numbers = numbers_of(set(said.values()), classes)
    name = os.fsdecode(os.path.basename(path))
    if numbers is None:
        problem = (f"{name} has classes that are neither names of the training folders nor numbers from 0 to "
                   f"{len(classes) - 1}")
        return [], problem, path
    pairs = []
    for image in images:
        label = said.get(os.path.basename(image))
        if label is not None:
            pairs.append((image, numbers[label]))
    return sorted(pairs), f"{name} names none of its images", path


def name_and_class(line):
    """The first two things on a line: separated by a tab, or else by the last blank, which a name may hold
    too."""
    if b"\t" in line:
        name, label, *_ = line.split(b"\t")
        return name.strip(), label.strip()
    name, _, label = line.rpartition(b" ")
    return name.strip(), label.strip()


def numbers_of(said, classes):
    """{class as a file says it (bytes): its number}; None unless all are names, or all are numbers."""
    by_name = {os.fsencode(name): k for k, name in enumerate(classes)}
    if said <= by_name.keys():
        return by_name
    by_number = {str(k).encode(): k for k in range(len(classes))}
    if said <= by_number.keys():
        return by_number
    return None
