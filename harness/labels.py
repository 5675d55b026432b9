"""The labels of a flat validation folder, from a text file beside it.

Each line has an image's name and its class, and perhaps more: val_annotations.txt of Tiny-ImageNet has a
box, and tabs; val.txt, for ImageNet's 50,000 as they are downloaded, has a blank. A class is the name of one
of the training folders, or its number as sorted, from 0 on. Whatever could be meant in two ways is not
guessed: a wrong label would only show as a low accuracy.
"""
import os
import re

from .lists import read_lines


def labels_beside(parent, folder, split, images, classes):
    """The labels of these images in a folder -> [(image, label)] sorted, why there are none, and the file
    that was read.

    parent      the folder that the split lies in; the text file is there, or in the split, or between them
    split       the split's name, by which the file is called: val.txt, test.txt
    """
    names = [split + b".txt", split + b"_annotations.txt", b"val_annotations.txt"]
    if re.search(b"^(ilsvrc.*_)?val", split.lower()):
        names.append(b"val.txt")
    places = dict.fromkeys([folder, os.path.dirname(folder), parent])
    paths = [os.path.join(place, name) for place in places for name in names]
    path = next((path for path in paths if os.path.isfile(path)), None)
    if path is None:
        return [], f"it has no class folders, and there is no {os.fsdecode(split)}.txt with labels", None
    shown = os.fsdecode(os.path.basename(path))
    by_name = {os.path.basename(image): image for image in images}
    said = {}
    for line in read_lines(path):
        name, label = name_and_class(line, by_name)
        if name in by_name:
            said[name] = label
    if not said:
        return [], f"{shown} names none of its images", path
    numbers = numbers_of(set(said.values()), classes)
    if numbers is None:
        problem = (f"the classes in {shown} are neither names of the training folders nor numbers from 0 to "
                   f"{len(classes) - 1} (numbers count only if a 0 is among them, and no folder is a number)")
        return [], problem, path
    return sorted((by_name[name], numbers[label]) for name, label in said.items()), None, path


def name_and_class(line, known):
    """An image's name, without folders, and its class: the first two things on a line.

    They are separated by a tab, or by blanks, which a name may hold too: the longest known name counts.
    """
    separator = b"\t" if b"\t" in line else None
    fields = line.split(separator)
    for k in range(len(fields) - 1, 0, -1):
        name = os.path.basename((separator or b" ").join(fields[:k]).strip())
        if name in known:
            return name, fields[k].strip()
    return None, None


def numbers_of(said, classes):
    """{class as a file says it (bytes): its number}; None unless all are names, or all are numbers.

    Folders that are numbers are names, and "1" then is no place among them. Without a 0, numbers may count
    from 1.
    """
    by_name = {os.fsencode(name): k for k, name in enumerate(classes)}
    if said <= by_name.keys():
        return by_name
    by_number = {str(k).encode(): k for k in range(len(classes))}
    if said <= by_number.keys() and b"0" in said and not any(name.isdigit() for name in by_name):
        return by_number
    return None
