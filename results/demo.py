"""The demo, with and without stop-gradient, on five seeds: the README's first picture and its table.

    python results/demo.py [--minutes 60]      repeat until everything is done
    python results/demo.py --show              only write the page

Start it from the repository's root. The setting was chosen on seeds 7 to 13, after an earlier
one had failed on two of the seeds here, 0 to 4.
"""
import os
import sys

sys.path.insert(0, os.getcwd())

from harness.common.pictures import BLUE, ORANGE, draw_panels
from results.pages import cell, page_with, table
from results.rows import Kept, Runs, columns, epochs_of, make_missing, parser_for, run_script, top1_of

KEPT = Kept("results/demo", "runs/demo")
PICTURE = "results/demo/curves.png"
WITH = Runs("with-stopgrad", "simsiam.py --knn-every 1", range(5))
WITHOUT = Runs(
    "without-stopgrad", "simsiam.py --experiment fig2-without-stopgrad --knn-every 1", range(5), {})


def demo_table():
    runs = KEPT.of(WITH.name).values()
    collapsed = KEPT.of(WITHOUT.name).values()
    raw = [run["log"][0]["knn_pixels"] for run in runs]
    untrained = [epochs_of(run)[0]["knn"] for run in runs]
    linear = [top1_of(run) for run in runs]
    rows = [
        ["raw pixels", cell(raw[:1]), "-", "-", "-"],
        ["untrained network", cell(untrained), "-", "-", "-"],
        ["**SimSiam**", *figures(runs), cell(linear)],
        ["without stop-gradient", *figures(collapsed), "-"],
    ]
    return table(["drawn shapes, seeds 0 to 4", "kNN top-1, %", "loss", "std x sqrt(d)", "linear, %"], rows)


def figures(runs):
    """kNN, loss and std of the last epochs."""
    _, loss, std, knn = columns(list(runs))
    return [knn, loss, std]


def draw():
    """The three panels of the paper's Fig. 2: blue with stop-gradient, orange without."""
    runs = [(epochs_of(run), BLUE) for run in KEPT.of(WITH.name).values()]
    runs += [(epochs_of(run), ORANGE) for run in KEPT.of(WITHOUT.name).values()]
    raw = KEPT.of(WITH.name)[0]["log"][0]["knn_pixels"]
    panels = [
        ("loss", "training loss", -1, 0, None),
        ("std", "std x sqrt(d)  (red: scattered)", 0, 1.1, 1),
        ("knn", "kNN top-1 in percent  (red: raw pixels)", 0, 100, raw),
    ]
    draw_panels(PICTURE, panels, runs, columns=3)


def pages():
    return page_with("README.md", [demo_table()])


def make_runs(args, deadline):
    make_missing(KEPT, [WITH, WITHOUT], deadline)


def main():
    run_script(parser_for(__doc__), make_runs, pages, draw)


if __name__ == "__main__":
    main()
