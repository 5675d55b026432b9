"""The pages in results/ against what the scripts make of the logs; and what the scripts compute, by hand."""
import hashlib
import importlib
import json
import os
import sys
import time

import numpy as np
import pytest
import torch

import simsiam
from harness.data.opening import open_data
from harness.data.shapes import draw_shapes
from harness.data.source import Source
from harness.evaluation import report
from harness.training import recipes
from results import bf16, cifar10, demo, neighbours, paper_rows
from results.pages import difference
from results.rows import (Interrupted, Kept, Runs, epochs_of, in_time, last, parser_for, read_json, records,
                          run_script)
from tests.helpers import ROOT

SCRIPTS = ("bf16", "cifar10", "demo", "neighbours", "own_data", "paper_rows", "peers", "singles", "speed")


@pytest.fixture(autouse=True)
def root(monkeypatch):
    """The scripts are started from the repository's root."""
    monkeypatch.chdir(ROOT)


# --- The pages ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", SCRIPTS)
def test_a_page_is_what_its_script_makes_of_the_logs(script):
    """Each page that a script writes, or writes tables into, against the file."""
    for path, text in importlib.import_module(f"results.{script}").pages().items():
        assert text == (ROOT / path).read_text(), f"python results/{script}.py --show writes {path}"


def test_the_demo_keeps_its_promises():
    """All five seeds learn, far above raw pixels and the untrained network; none without stop-gradient."""
    runs = demo.KEPT.of(demo.WITH.name).values()
    knn = [last(run, "knn") for run in runs]
    assert len(knn) == 5
    assert np.mean(knn) >= 95
    assert min(knn) >= 90
    for run in runs:
        assert np.mean(knn) >= 25 + max(run["log"][0]["knn_pixels"], epochs_of(run)[0]["knn"])
    collapsed = demo.KEPT.of(demo.WITHOUT.name).values()
    assert [last(run, "collapsed") for run in collapsed] == [True] * 5


# --- The kept runs ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", [bf16, cifar10, neighbours, paper_rows])
def test_each_line_is_one_finished_run_and_its_evaluations(script):
    """The log has the line's seed, and has ended unless the run diverged, which leaves no accuracy."""
    for path in (ROOT / script.KEPT.folder).glob("*.jsonl"):
        lines = [line for line in records(path) if "evaluations" in line]
        assert len({line["seed"] for line in lines}) == len(lines), path.name
        for line in lines:
            start, *_, end = line["log"]
            assert start["settings"]["seed"] == line["seed"]
            for evaluation in line["evaluations"].values():
                assert (evaluation["top1"] is not None) == (end["event"] == "end")


def test_the_papers_rows_had_the_settings_of_their_options():
    """The logs against what simsiam.py makes of the options today."""
    pixels = torch.zeros(1, dtype=torch.uint8).expand(recipes.OWN_IMAGES["shapes"], 3, 32, 32)
    source = Source(pixels=pixels, labels=None, classes=[])          # only the number of images counts
    for runs in [runs for rows in paper_rows.programme() for runs in rows]:
        for seed, line in paper_rows.KEPT.of(runs.name).items():
            args = simsiam.parse([*runs.command.split()[1:], "--seed", f"{seed}"])
            settings = json.loads(json.dumps(recipes.settings_for(args, source, 1)))
            logged = line["log"][0]["settings"]
            for name in {*simsiam.SETTINGS, "seed", "experiment"}:
                assert settings[name] == logged[name], (runs.name, name)


FAILED = {"fig2-without-stopgrad", "table1-a-no-predictor", "table1-b-fixed-predictor", "table3-a-no-bn",
          "sec42-asymmetric-no-h"}


def test_the_rank_alarm_is_raised_by_runs_that_are_far_behind_alone():
    """Of the rows' runs: those below the bound are at least 30 points behind (c) of their seed. None of a row
    that learned is below it, nor of the demo."""
    default = paper_rows.accuracies(paper_rows.KEPT.of("simsiam"))
    for name in (paper_rows.DECAYED, *paper_rows.ROWS):
        for seed, run in paper_rows.KEPT.of(name).items():
            if paper_rows.rank_kept(run) < report.LOW_RANK:
                assert name in FAILED
                assert paper_rows.top1(run) <= default[seed] - 30
    for runs, low in ((demo.WITH, False), (demo.WITHOUT, True)):
        for run in demo.KEPT.of(runs.name).values():
            assert (paper_rows.rank_kept(run) < report.LOW_RANK) == low


@pytest.mark.parametrize("name, trained", [("lineval-cached", True), ("lineval-knn", True),
                                           ("untrained-lineval-cached", False)])
def test_kept_evaluations_are_of_the_kept_backbone(name, trained):
    """The hash in the evaluation's file against that of the backbone; none where the network is untrained."""
    backbone = (ROOT / "results/cifar10-width4/backbone.pth").read_bytes()
    expected = hashlib.sha256(backbone).hexdigest() if trained else None
    assert read_json(f"results/cifar10-width4/{name}.json")["sha256"] == expected


# --- Making runs --------------------------------------------------------------------------------------------

def test_a_run_without_its_line_or_an_evaluation_is_missing(tmp_path):
    """A new line replaces the old one of its seed; a line that a kill cut short doesn't count."""
    kept = Kept(tmp_path, None)
    row = Runs("row", "", range(3), {"cached": "", "sgd": ""})
    kept.add("row", {"seed": 0, "evaluations": {"cached": {}}})
    kept.add("row", {"seed": 1, "evaluations": {}})
    kept.add("row", {"seed": 1, "evaluations": row.evaluations})
    with open(kept.path("row"), "a") as f:
        f.write('{"seed": 2, "evaluations": {"cached"')
    assert kept.missing([row]) == [(row, 0), (row, 2)]
    assert [line["seed"] for line in records(kept.path("row"))] == [0, 1]


def test_held_out_images_are_training_images_that_are_not_trained_on(tmp_path, monkeypatch):
    """Of 50 drawn images every tenth stands in the place of the test images."""
    monkeypatch.chdir(tmp_path)
    train = draw_shapes(0, 0, 50, 32)
    val = draw_shapes(1, 0, 20, 32)
    cifar10.write_folder("all", train, np.arange(50), val, np.arange(20))
    part, held_out, _ = open_data(cifar10.hold_out("all"))
    rest = [i for i in range(50) if i % 10]
    assert torch.equal(part.pixels, train.pixels[rest])
    assert part.labels.tolist() == train.labels[rest].tolist()
    assert torch.equal(held_out.pixels, train.pixels[::10])
    assert held_out.labels.tolist() == train.labels[::10].tolist()


def test_only_runs_that_can_be_made_are_and_short_ones_first(tmp_path, monkeypatch):
    """Two minutes an epoch and 100 minutes: 50 epochs fit. A kept run that lacks an evaluation needs its
    checkpoint; a protocol without an lr is left out."""
    monkeypatch.setattr(cifar10, "KEPT", Kept(tmp_path / "kept", tmp_path / "runs"))
    plan = cifar10.Plan("--epochs 49", 3, "sgd cached")
    long = cifar10.runs_of("long", cifar10.Plan("--epochs 51", 1, "cached"), "DATA")
    short = cifar10.runs_of("short", plan, "DATA", {"sgd": 3})
    assert short.evaluations == {"sgd": "--sgd --base-lr 3", "cached": "--cached"}
    assert list(cifar10.runs_of("short", plan, "DATA").evaluations) == ["cached"]
    for seed in (0, 1):
        cifar10.KEPT.add("short", {"seed": seed, "evaluations": {"cached": {}}})
    cifar10.checkpoint_of("short", 1).parent.mkdir(parents=True)
    cifar10.checkpoint_of("short", 1).touch()
    todo = cifar10.in_order([long, short], 2, time.monotonic() + 6000)
    assert [(runs.name, seed) for runs, seed in todo] == [("short", 1), ("short", 2), ("long", 0)]


def test_logs_of_unfinished_runs_are_kept(tmp_path, monkeypatch):
    """Copied at the block's end, though it ends by an error; gone once the run has a line."""
    monkeypatch.setattr(cifar10, "KEPT", Kept(tmp_path, tmp_path / "runs"))
    (tmp_path / "runs/row-7").mkdir(parents=True)
    (tmp_path / "runs/row-7/log.jsonl").write_text("an epoch")
    with pytest.raises(Interrupted), cifar10.keeping_logs():
        raise Interrupted
    copy = tmp_path / "unfinished/row-7.jsonl"
    assert copy.read_text() == "an epoch"
    cifar10.KEPT.add("row", {"seed": 7, "evaluations": {}})
    with cifar10.keeping_logs():
        pass
    assert not copy.exists()


def test_the_pages_are_written_whatever_ends_the_runs(tmp_path, monkeypatch):
    """An error of a run: the page first, then the message and the exit status."""
    def fail(args, deadline):
        raise RuntimeError("a run has failed")

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit, match="a run has failed"):
        run_script(parser_for("A script."), fail, lambda: {tmp_path / "page.md": "so far"})
    assert (tmp_path / "page.md").read_text() == "so far"


@pytest.mark.parametrize("function, given, said", [
    (divmod, (1, 0), "ZeroDivisionError"),
    (time.sleep, (60,), "has not ended after 0.1 s"),
    (os._exit, (3,), "ended with status 3"),
])
def test_a_part_in_a_process_of_its_own_fails_alone(function, given, said):
    """An error, the limit, or a process that dies, is a RuntimeError here; otherwise there is a result."""
    assert in_time(60, divmod, 7, 2) == (3, 1)
    with pytest.raises(RuntimeError, match=said):
        in_time(0.1 if function is time.sleep else 60, function, *given)


# --- Differences and verdicts -------------------------------------------------------------------------------

def test_a_paired_difference_is_students():
    """Differences 1, 2, 3, worked out by hand; a seed without a partner is left out."""
    found = difference({0: 5, 1: 7, 2: 9, 8: 1}, {0: 4, 1: 5, 2: 6, 9: 1})
    assert found.pairs == [1, 2, 3]
    assert found.mean == 2
    assert found.error == pytest.approx(1 / 3 ** 0.5)
    assert found.high - found.mean == pytest.approx(4.303 / 3 ** 0.5, rel=1e-3)
    assert difference({0: 1}, {0: 0}) is None


def result_of(top1, losses=(-0.5, -0.9), is_collapsed=False, knn=(20, 80)):
    """What a verdict reads of a kept run. knn: of the untrained network, and at the end"""
    untrained = {"event": "epoch", "loss": None, "knn": knn[0], "collapsed": False}
    end = {"event": "epoch", "knn": knn[1], "collapsed": is_collapsed, "wall_seconds": 9}
    epochs = [end | {"loss": loss} for loss in losses]
    return {"seed": None, "evaluations": {"cached": {"top1": top1}},
            "log": [{"event": "start"}, untrained, *epochs]}


def runs_of(*results):
    return {seed: result | {"seed": seed} for seed, result in enumerate(results)}


COLLAPSED = result_of(20, is_collapsed=True)
DIVERGED = result_of(None, losses=(-0.3,))
LEARNED_NOTHING = result_of(30, knn=(20, 24))
LEARNED_LITTLE = result_of(30, knn=(20, 26))
UNSTABLE = result_of(91, losses=(-0.9, -0.8))
CALM = result_of(90, losses=(-0.9, -0.86))
FAR = result_of(20, losses=(-0.3, -0.4))
HALF_WAY = result_of(20, losses=(-0.3, -0.5))
GOOD = runs_of(result_of(90), result_of(92), result_of(91))
ALIKE = runs_of(result_of(90.1), result_of(92), result_of(91))
WORSE = runs_of(result_of(80), result_of(83), result_of(81))
SCATTERED = runs_of(result_of(60), result_of(99), result_of(91))
ONE_DIVERGED = runs_of(result_of(90), DIVERGED, result_of(91))
CASES = [  # claim, runs, those beside them, the verdict by hand
    ("collapses", runs_of(*[COLLAPSED] * 3), GOOD, "holds"),
    ("collapses", runs_of(COLLAPSED, CALM, CALM), GOOD, "can't be told here"),
    ("collapses", runs_of(*[DIVERGED] * 3), GOOD, "does not"),
    ("fails", runs_of(COLLAPSED, DIVERGED, LEARNED_NOTHING), GOOD, "holds"),
    ("fails", runs_of(COLLAPSED, DIVERGED, LEARNED_LITTLE), GOOD, "can't be told here"),
    ("does not converge", runs_of(FAR, DIVERGED, FAR), GOOD, "holds"),
    ("does not converge", runs_of(*[HALF_WAY] * 3), GOOD, "does not"),
    ("unstable", runs_of(UNSTABLE, DIVERGED, CALM), GOOD, "can't be told here"),
    ("unstable", runs_of(*[CALM] * 3), GOOD, "does not"),
    ("worse", WORSE, GOOD, "holds"),
    ("worse", SCATTERED, GOOD, "can't be told here"),
    ("worse", ALIKE, GOOD, "does not"),
    ("better", GOOD, WORSE, "holds"),
    ("better", ONE_DIVERGED, WORSE, "does not"),
    ("no worse", ALIKE, GOOD, "holds"),
    ("no worse", WORSE, GOOD, "does not"),
    ("less stable", ONE_DIVERGED, GOOD, "holds"),
    ("less stable", GOOD, ONE_DIVERGED, "does not"),
    ("less stable", ONE_DIVERGED, ONE_DIVERGED, "can't be told here"),
]


@pytest.mark.parametrize("claim, mine, beside, expected", CASES)
def test_a_verdict_on_a_row_is_what_its_runs_bear_out(claim, mine, beside, expected):
    """Against cases decided by hand."""
    assert paper_rows.verdict(claim, mine, beside) == expected


@pytest.mark.parametrize("claim, low, high, expected", [
    ("no better", -0.5, 0.9, "holds"),
    ("no better", 0.2, 3, "does not hold"),
    ("no better", -2, 2, "can't be told here"),
    ("worse: it diverges", -9, -1, "holds"),
    ("worse: it diverges", -9, 1, "can't be told here"),
    ("worse: it diverges", -0.5, 0.5, "does not hold")])
def test_a_verdict_on_section_62_is_what_the_interval_bears_out(claim, low, high, expected):
    """Against cases decided by hand."""
    assert neighbours.verdict(claim, low, high) == expected


def test_the_setting_is_the_fit_candidate_whose_differences_vary_least(tmp_path):
    """The kept runs' choice; and one by hand. The first is too bad, the last collapses in a run; the third
    row's differences have a deviation of 2 in the second candidate, and of 1 in the third."""
    assert paper_rows.chosen(paper_rows.KEPT) == paper_rows.SETTING
    kept = Kept(tmp_path, None)
    accuracies = [(60, 0), (80, 2), (90, 1), (85, 0)]
    for options, (mean, deviation) in zip(paper_rows.CANDIDATES, accuracies, strict=True):
        for seed, sign in ((7, -1), (8, 0), (9, 1)):
            ours = (mean, mean - 3, mean - 2 + sign * deviation)
            for name, top1 in zip(paper_rows.TRIED, ours, strict=True):
                line = result_of(top1, is_collapsed=(top1, seed) == (83, 9))
                kept.add(paper_rows.candidate(name, options).name, line | {"seed": seed})
    assert paper_rows.chosen(kept) == paper_rows.CANDIDATES[2]


def test_a_candidate_has_a_line_once_all_its_runs_are_there(tmp_path):
    """A start that was interrupted among them still writes its page."""
    kept = Kept(tmp_path, None)
    for options, seeds in zip(paper_rows.CANDIDATES, ((7, 8, 9), (7, 8), (7,))):
        for name in paper_rows.TRIED:
            for seed in seeds:
                kept.add(paper_rows.candidate(name, options).name, result_of(80) | {"seed": seed})
    _, _, _, *lines = paper_rows.candidates_table(kept).splitlines()
    assert [paper_rows.CANDIDATES[0] in line for line in lines] == [True]


def test_rows_that_are_not_decided_get_more_seeds(tmp_path):
    """Where all rows are alike: one that scatters, and that beside it; not one that failures would tell."""
    kept = Kept(tmp_path, None)
    for name in (paper_rows.DECAYED, *paper_rows.ROWS):
        for seed in paper_rows.SEEDS:
            top1 = 90 + 9 * (seed - 2) * (name == "sec45-cross-entropy")
            kept.add(name, result_of(top1) | {"seed": seed})
    more = paper_rows.more_seeds(kept)
    assert [runs.name for runs in more] == ["sec45-cross-entropy", "simsiam"]
    assert {runs.seeds for runs in more} == {paper_rows.MORE_SEEDS}
    assert not {*paper_rows.MORE_SEEDS} & {*paper_rows.SEEDS, *paper_rows.CHOOSING}
