"""What lies at DATA: look() says it as a value, and reads names only, and labels in text files.

Each row of LAYOUTS is one way in which images come: how it is recognised, and who looks closer. The first
row that fits counts. A new way is a new row. Every file below DATA is used, or is counted in Found.left_out
with the reason.
"""
import collections
import os
from typing import NamedTuple

from ..common.errors import Refused
from . import cifar
from .images import is_image
from .lists import KINDS, looks_like, read_list
from .splits import folder_with_splits, with_splits, without_splits
from .tars import as_folder, is_tar, locate
from .walk import Found, Listing, Split, as_files, describe, entries, look_into, walk


class Layout(NamedTuple):
    """A row of LAYOUTS."""
    name: str     # in words, for people
    fits: object  # (path, names of what lies in it; none of a file) -> whether it is this layout
    look: object  # (path, keep) -> Found, without the layout's name; see look. Raises Refused


def look(path, keep=None):
    """What lies at a path (text or bytes) -> Found

    keep    the folder in which the indexes of tar files are kept, or None
    Raises Refused where there is nothing that can be used.
    """
    path = os.fsencode(path)
    path = path.rstrip(b"/") or b"/"  # completion puts one behind a folder
    if not os.path.exists(path):
        raise Refused(f"{os.fsdecode(path)}: no such file or folder; give an image folder, a list of files, "
                      "or a CIFAR-10 folder")
    names = {entry.name for entry in entries(path)} if os.path.isdir(path) else set()
    row = next(row for row in LAYOUTS if row.fits(path, names))
    found = row.look(path, keep)
    return found._replace(layout=found.layout or row.name)


# --- CIFAR ----------------------------------------------------------------------------------------------

def look_at_cifar(layout):
    """-> a function that looks at a folder of this layout of CIFAR (a cifar.Layout).

    Of what else lies there, images are counted; the archive's own files are not.
    """
    def look_closer(root, keep):
        where = os.fsdecode(root)
        train, val = (Split(where, batches=batches, layout=layout) for batches in layout.batches)
        beside = len(walk(root).images)
        return Found("", train, val, {"images beside CIFAR's files": beside})

    return look_closer


def cifars_in(path):
    """The folders of CIFAR in a folder, under the names that the archives give them -> paths"""
    inside = [os.path.join(path, name) for name in cifar.FOLDERS]
    return [folder for folder in inside if os.path.isdir(folder)
            and any(row.fits(folder, set(os.listdir(folder))) for row in cifar.LAYOUTS)]


def holds_cifar(path, names):
    """Whether a folder holds a CIFAR folder, as torchvision's root does, and no images."""
    return bool(names & {*cifar.FOLDERS}) and bool(cifars_in(path)) and not walk(path).images


def look_inside(root, keep):
    """The one CIFAR folder in it. Raises Refused where there are two: which is meant, only the user
    knows."""
    there = cifars_in(root)
    if len(there) != 1:
        shown = ", ".join(os.fsdecode(os.path.basename(folder)) for folder in there)
        raise Refused(f"{os.fsdecode(root)}: holds {len(there)} data sets, {shown}; name one of them")
    return look(there[0], keep)


# --- Files ----------------------------------------------------------------------------------------------

def look_at_image(path, keep):
    """One picture is a data set too: to look at its views."""
    return Found("", Split(os.fsdecode(path), as_files([path])))


def look_at_list(path, keep):
    """A path on each line."""
    return Found("", Split(os.fsdecode(path), as_files(read_list(path))))


def refuse_file(path, keep):
    """Say what it is instead."""
    raise Refused(f"{os.fsdecode(path)}: {looks_like(path)}")


# --- Folders of images ----------------------------------------------------------------------------------

def look_at_folder(root, keep):
    """A folder of images, with tar files perhaps."""
    return look_at_listing(root, walk(root, keep))


def look_at_tar(path, keep):
    """A tar file, as the folder in whose place it is."""
    index = look_into(path, keep)
    listing = Listing(index.names.tolist(), collections.Counter(index.left_out), [index])
    return look_at_listing(as_folder(path), listing)


def look_at_listing(root, listing):
    """A folder of images: with splits and classes, or without (harness/data/splits.py)."""
    if not listing.images:
        raise Refused(nothing_there(root, listing.left_out))
    folder = folder_with_splits(root, listing.images)
    if folder is None:
        found = without_splits(root, listing)
    else:
        found = with_splits(root, folder, listing)
        if folder != root:
            inside = os.fsdecode(os.path.relpath(folder, root))
            found = found._replace(notes=(f"the splits were found in {inside}/", *found.notes))
    splits = [split for split in (found.train, found.val) if split]
    train, *val = (split._replace(where=place_shown(split.where, listing.tars)) for split in splits)
    notes = found.notes + about_tars(listing, splits)
    return found._replace(train=train, val=val[0] if val else None, tars=listing.tars, notes=notes)


def about_tars(listing, splits):
    """What has to be said of the tar files: which of the images are theirs, if not all, and that labels in
    them are not read. -> notes"""
    notes = []
    theirs = sum(len(index.names) for index in listing.tars)
    if 0 < theirs < len(listing.images):  # else all are: no need to look at a million names
        theirs = sum((locate(split.files, listing.tars).archive >= 0).sum() for split in splits)
    if 0 < theirs < sum(len(split.files) for split in splits):
        shown = ", ".join(os.fsdecode(os.path.basename(index.archive.path)) for index in listing.tars[:3])
        more = f" and {len(listing.tars) - 3} more" if len(listing.tars) > 3 else ""
        notes.append(f"{theirs} of the images lie in tar files ({shown}{more})")
    if any(".txt" in index.left_out for index in listing.tars):
        notes.append("text files in a tar file are not read: labels must lie beside it")
    return tuple(notes)


def place_shown(where, tars):
    """The folder that a split comes from, with .tar where it is a tar file."""
    for index in tars:
        path = os.fsdecode(index.archive.path)
        folder = os.fsdecode(as_folder(index.archive.path))
        if where == folder or where.startswith(folder + "/"):
            return path + where.removeprefix(folder)
    return where


def nothing_there(root, left_out):
    """The line that refuses a folder without images: what lies there, and what to do.

    The advice is for the most frequent kind of file that we know.
    """
    there = describe(left_out) or "it is empty"
    hint = "give a folder of JPEG, PNG or other image files"
    for suffix, _ in left_out.most_common():
        if suffix in KINDS:
            hint = f"{suffix}: {KINDS[suffix]}"
            break
    return f"{os.fsdecode(root)}: no images there ({there}); {hint}"


LAYOUTS = [
    # A folder of CIFAR holds no image files: it is recognised by the names of its batches.
    *(Layout(f"{row.name} ({row.form})", row.fits, look_at_cifar(row)) for row in cifar.LAYOUTS),
    Layout("a folder around CIFAR's", holds_cifar, look_inside),
    Layout("an image folder", lambda path, names: os.path.isdir(path), look_at_folder),
    Layout("a tar file", lambda path, names: os.path.isfile(path) and is_tar(path), look_at_tar),
    Layout("one image", lambda path, names: is_image(path), look_at_image),
    Layout("a file that holds no list", lambda path, names: looks_like(path), refuse_file),
    Layout("a list of images", lambda path, names: True, look_at_list),
]
