"""The pages in results/ against what the scripts make of the logs; the logs against what the pages say."""
import hashlib
import importlib
import json

import numpy as np
import pytest
import torch

import simsiam
from harness.data.opening import open_data
from harness.data.shapes import draw_shapes
from harness.data.source import Source
from harness.evaluation import report
from harness.training import recipes
from results import bf16, cifar10, neighbours, own_data, paper_rows
from results.pages import cell, difference, with_tables
from results.rows import Kept, Runs, epochs_of, last, read_json, records, top1_of
from tests.helpers import ROOT

SCRIPTS = ("bf16", "cifar10", "neighbours", "own_data", "paper_rows", "peers", "singles", "speed")


@pytest.fixture(autouse=True)
def root(monkeypatch):
    """The scripts are started from the repository's root."""
    monkeypatch.chdir(ROOT)


# --- The pages ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", SCRIPTS)
def test_a_page_is_what_its_script_makes_of_the_logs(script):
    """Each page that a script makes, or makes tables in, against the file."""
    for path, text in importlib.import_module(f"results.{script}").pages().items():
        assert text == (ROOT / path).read_text(), f"python results/{script}.py --show writes {path}"


def test_a_table_takes_the_place_of_the_one_with_its_header():
    """In the middle of a text, and at its end; a header that isn't there is an error."""
    page = "one\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\ntwo\n\n| c |\n|---|\n| 3 |\n"
    made = with_tables(page, ["| a | b |\n|---|---|\n", "| c |\n|---|\n| 4 |\n"])
    assert made == "one\n\n| a | b |\n|---|---|\n\ntwo\n\n| c |\n|---|\n| 4 |\n"
    with pytest.raises(AssertionError, match="no table"):
        with_tables(page, ["| d |\n|---|\n"])


@pytest.mark.parametrize("name, beside", [("fig2-without-stopgrad", "fig2-with-stopgrad"),
                                          ("sec45-cross-entropy", "simsiam"),
                                          ("sec52-moving-average", "table1-a-no-predictor")])
def test_a_rows_figures_on_the_page_are_those_of_its_lines(name, beside):
    """Mean difference, standard error, loss and accuracy, computed here by numpy."""
    runs = records(f"results/paper_rows/{name}.jsonl")
    mine = accuracies_of(runs)
    theirs = accuracies_of(records(f"results/paper_rows/{beside}.jsonl"))
    pairs = [mine[seed] - theirs[seed] for seed in range(5)]
    ends = [run["log"][-2]["loss"] for run in runs]
    page = (ROOT / "results/paper_rows.md").read_text()
    for figures in (f"| 5 | {np.mean(pairs):+.2f} +- {np.std(pairs, ddof=1) / 5 ** 0.5:.2f} |",
                    f"| 5 | {min(ends):.3f}, {max(ends):.3f} |",
                    f"| {np.mean(list(mine.values())):.1f} +- {np.std(list(mine.values()), ddof=1):.1f} |"):
        assert figures in page


def accuracies_of(runs):
    """{seed: accuracy}"""
    return {run["seed"]: run["evaluations"]["cached"]["top1"] for run in runs}


def figures_of_runs():
    """What README.md says of single runs, of the demo's seeds, and of the GPU."""
    start, untrained, *_, end, _ = records("results/shapes/log.jsonl")
    yield f"raw pixels {start['knn_pixels']:.1f}%, untrained {untrained['knn']:.1f}%"
    yield f"loss {end['loss']:.3f}, std x sqrt(d) {end['std']:.2f} | {end['knn']:.1f}%"
    *_, end, _ = records("results/shapes-fig2-without-stopgrad/log.jsonl")
    yield f"loss {end['loss']:.3f}, std x sqrt(d) {end['std']:.2f} | {end['knn']:.1f}%"
    for name in ("shapes/", "shapes/untrained-", "cifar10-width4/", "cifar10-width4/untrained-"):
        yield f"{read_json(f'results/{name}lineval-cached.json')['top1']:.1f}%"
    demo = [last(run, "knn") for run in neighbours.KEPT.of("shapes-simsiam").values()]
    yield f"five seeds gave {np.mean(demo):.1f} +- {np.std(demo, ddof=1):.1f}"
    run, = cifar10.KEPT.of("50-epochs").values()
    minutes = sum(epoch["wall_seconds"] for epoch in epochs_of(run)[1:]) / 60
    yield (f"kNN {last(run, 'knn'):.1f}% and {top1_of(run):.1f}% by a linear layer, in {minutes:.1f} minutes "
           f"(raw pixels {run['log'][0]['knn_pixels']:.1f}%, untrained {epochs_of(run)[0]['knn']:.1f}%)")


def figures_of_speed():
    """What README.md says of speed."""
    found = read_json("results/peers.json")
    step = found["steps"]["ResNet-18, 32 pixels, batch 64"]
    yield f"ResNet-18 takes {step['lightly']['seconds']:.2f} s there"
    yield f"{step['ours, float32']['seconds']:.2f} s here, and {step['ours, bf16']['seconds']:.2f} s in bf16"
    large, small = found["views of 224 pixels"], found["views of 32 pixels"]
    of_a_worker = large["ours: a worker's part"]
    yield f"a worker makes {of_a_worker / large['lightly']:.2f} times"
    yield f"and {small['ours'] / small['lightly']:.2f} times for CIFAR-10"
    found = read_json("results/speed.json")
    files = {part: one_core for part, (one_core, _) in found["photos"].items()}
    memory = {part: one_core for part, (one_core, _) in found["in memory"].items()}
    yield f"makes {files['decode and cut'] / files['all, by Pillow']:.2f} times"
    yield f"at {files['decode and cut'] / files['decode']:.2f} of"
    yield f"it is still {files['all'] / files['all, by Pillow']:.2f} times"
    yield f"is {memory['all'] / memory['all, by Pillow']:.2f} times as fast"
    gains = {}
    for recipe in ("cifar10", "imagenet"):
        variants = found[f"step of {recipe}"]["variants"]
        gains[recipe] = variants["ours"]["images/s"] / variants["plain"]["images/s"]
    yield f"{gains['cifar10']:.2f} from channels_last (ResNet-18, CIFAR), {gains['imagenet']:.2f} with ResNet"
    plain, compiled = (found[run]["seconds of each epoch"][-1] for run in ("run", "run, compiled"))
    yield f"an epoch on the drawn shapes {plain / compiled:.2f} times as fast"


def test_readmes_figures_are_those_of_the_logs():
    """Those that stand between words; its tables of results are their scripts'."""
    words = " ".join((ROOT / "README.md").read_text().split())
    for figure in (*figures_of_runs(), *figures_of_speed()):
        assert figure in words


def test_the_demo_ends_in_the_range_that_the_readme_promises():
    """85 to 100, on five seeds and on seed 0 with two threads; far above raw pixels and the untrained one."""
    logs = [run["log"] for run in neighbours.KEPT.of("shapes-simsiam").values()]
    for start, untrained, *_, end, _ in (*logs, records("results/shapes/log.jsonl")):
        assert 85 <= end["knn"] <= 100
        assert end["knn"] >= 25 + max(start["knn_pixels"], untrained["knn"])


def test_the_advice_on_few_steps_is_that_of_the_runs():
    """simsiam.py's words, from the lines on 1,000 to 5,000 images."""
    found = records(own_data.LINES)
    untrained = {r["images"]: r["cached"] for r in found if r["steps"] == 0}
    for steps in (500, 1500, 4000):
        gains = [r["cached"] - untrained[r["images"]] for r in found
                 if (r["batch"], r["lr"], r["asked"]) == (32, 0.1, steps)]
        said = "500 steps" if steps == 500 else f"{steps:,}"
        assert f"{said} gained {min(gains):.0f} to {max(gains):.0f}" in report.TOO_SHORT


# --- The kept runs ------------------------------------------------------------------------------------------

KEEP_RUNS = (bf16, cifar10, neighbours, paper_rows)


def test_a_line_is_of_one_run_and_its_evaluations():
    """Each seed once; the log has that seed, and has ended where it has an accuracy, of its checkpoint."""
    for script in KEEP_RUNS:
        for path in (ROOT / script.KEPT.folder).glob("*.jsonl"):
            lines = [line for line in records(path) if "log" in line and "evaluations" in line]
            assert len({line["seed"] for line in lines}) == len(lines), path.name
            for line in lines:
                start, *_, end = line["log"]
                assert start["settings"]["seed"] == line["seed"]
                _, _, out = line["command"].partition("--out ")
                for evaluation in line["evaluations"].values():
                    assert (evaluation["top1"] is not None) == (end["event"] == "end")
                    if evaluation["top1"] is not None:
                        assert f"--ckpt {out.split()[0]}/checkpoint.pth" in evaluation["command"]


PAPERS_ROWS = [runs for rows in paper_rows.programme() for runs in rows]


def test_the_papers_rows_had_the_settings_of_their_options():
    """The logs against what simsiam.py makes of the options; no file and no seed that the script lacks."""
    files = (ROOT / "results/paper_rows").glob("*.jsonl")
    assert {path.stem for path in files} == {runs.name for runs in PAPERS_ROWS}
    for runs in PAPERS_ROWS:
        found = paper_rows.KEPT.of(runs.name)
        assert found.keys() <= set(runs.seeds)
        for seed, line in found.items():
            args = simsiam.parse([*runs.command.split()[1:], "--seed", f"{seed}"])
            settings = as_json(recipes.settings_for(args, stand_in_for_shapes(), 1))
            logged = line["log"][0]["settings"]
            for name in (*simsiam.SETTINGS, "seed", "experiment"):
                assert settings[name] == logged[name], (runs.name, name)


def as_json(value):
    """As a log has it."""
    return json.loads(json.dumps(value))


def stand_in_for_shapes():
    """A Source of as many images as the shapes have, of which only the number counts."""
    count = recipes.OWN_IMAGES["shapes"]
    pixels = torch.zeros(1, dtype=torch.uint8).expand(count, 3, 32, 32)
    return Source(pixels=pixels, labels=None, classes=[])


NETWORK = ("arch", "width", "cifar_stem", "batch", "epochs", "size", "images")
VIEWS = ("area", "jitter", "strength", "gray", "blur", "flip", "weight_decay", "momentum")  # CLIP has its own


def test_the_neighbours_had_the_same_network_views_and_epochs():
    """Settings in the logs against those of SimSiam's."""
    for data, row, runs in neighbours.measured():
        first = neighbours.KEPT.of(f"{data}-simsiam")[0]["log"][0]["settings"]
        same = NETWORK if row == "clip" else NETWORK + VIEWS
        for run in runs:
            settings = run["log"][0]["settings"]
            for name in same:
                assert settings[name] == first[name], (row, name)


def test_the_alarm_of_the_rank_is_between_healthy_and_failed_rows():
    """The paper's rows that learned, and SimSiam's among its neighbours, against those that failed."""
    def ranks(*names):
        runs = [run for name in names for run in paper_rows.KEPT.of(name).values()]
        return list(map(paper_rows.rank_kept, runs))

    healthy = ranks("simsiam", "fig2-with-stopgrad", "sec45-cross-entropy", "sec52-100-step",
                    "suppB-hidden-d")
    healthy += [paper_rows.rank_kept(run) for run in neighbours.KEPT.of("shapes-simsiam").values()]
    failed = ranks("fig2-without-stopgrad", "table1-a-no-predictor", "table1-b-fixed-predictor",
                   "sec42-asymmetric-no-h")
    assert max(failed) < report.LOW_RANK < min(healthy)


@pytest.mark.parametrize("name, trained", [("lineval-cached", True), ("lineval-knn", True),
                                           ("untrained-lineval-cached", False)])
def test_kept_evaluations_are_of_the_kept_backbone(name, trained):
    """The hash in the evaluation's file against that of the backbone; none where the network is untrained."""
    backbone = (ROOT / "results/cifar10-width4/backbone.pth").read_bytes()
    expected = hashlib.sha256(backbone).hexdigest() if trained else None
    assert read_json(f"results/cifar10-width4/{name}.json")["sha256"] == expected


# --- Making runs --------------------------------------------------------------------------------------------

def test_a_run_is_missing_without_its_line_or_an_evaluation(tmp_path):
    """Seed by seed; what was made again takes the place of its line; one that a kill cut short is none."""
    kept = Kept(tmp_path, None)
    one = Runs("one", "", (0, 1))
    other = Runs("other", "", (0, 1), {"cached": "", "sgd": ""})
    kept.add("one", {"seed": 0, "evaluations": {"cached": {}}})
    kept.add("other", {"seed": 0, "evaluations": {"cached": {}}})
    kept.add("other", {"seed": 1, "evaluations": {}})
    kept.add("other", {"seed": 1, "evaluations": other.evaluations})
    with open(kept.path("one"), "a") as f:
        f.write('{"seed": 1, "evaluations": {"cached"')
    assert kept.missing([one, other]) == [(other, 0), (one, 1)]
    assert [line["seed"] for line in records(kept.path("other"))] == [0, 1]


def test_held_out_images_are_training_images_that_are_not_trained_on(tmp_path, monkeypatch):
    """Of 50 drawn images every tenth stands in the place of the test images."""
    monkeypatch.chdir(tmp_path)
    train = draw_shapes(0, 0, 50)
    val = draw_shapes(1, 0, 20)
    cifar10.write_folder("all", train, np.arange(50), val, np.arange(20))
    part, held_out, _ = open_data(cifar10.hold_out("all"))
    rest = [i for i in range(50) if i % 10]
    assert torch.equal(part.pixels, train.pixels[rest])
    assert part.labels.tolist() == train.labels[rest].tolist()
    assert torch.equal(held_out.pixels, train.pixels[::10])
    assert held_out.labels.tolist() == train.labels[::10].tolist()


# --- Verdicts -----------------------------------------------------------------------------------------------

def test_a_paired_difference_is_students():
    """Against differences 1, 2, 3 by hand; and for two pairs, a and b, Student's interval in closed form:
    mean +- tan(0.475 pi) |a - b| / 2."""
    found = difference({0: 5, 1: 7, 2: 9, 8: 1}, {0: 4, 1: 5, 2: 6, 9: 1})
    assert found.pairs == [1, 2, 3]
    assert found.mean == 2
    assert found.error == pytest.approx(1 / 3 ** 0.5)
    assert found.high - found.mean == pytest.approx(4.303 / 3 ** 0.5, rel=1e-3)
    two = difference({0: 1, 1: 4}, {0: 0, 1: 0})
    assert two.high - two.mean == pytest.approx(np.tan(0.475 * np.pi) * 3 / 2, rel=1e-3)
    assert difference({0: 1}, {0: 0}) is None
    assert cell([1, None, 2, 3]) == "2.0 +- 1.0"


def test_the_papers_differences_are_those_of_its_tables():
    """A few by hand: 64.8 - 68.1; 0.1 - 67.7; 55.0 - 0.1; 67.3 - 64.8; nothing where it gives no number."""
    for name, expected in (("sec46-asymmetric", -3.3), ("fig2-without-stopgrad", -67.6),
                           ("sec52-moving-average", 54.9), ("sec46-asymmetric-2x", 2.5)):
        assert paper_rows.paper_difference(name) == pytest.approx(expected)
    assert paper_rows.paper_difference("sec42-asymmetric-no-h") is None


def result_of(top1, losses=(-0.5, -0.9), is_collapsed=False, knn=(20, 80)):
    """A kept run, as far as a verdict looks at it. knn: of the untrained network, and at the end"""
    untrained = {"event": "epoch", "loss": None, "knn": knn[0], "collapsed": False}
    end = {"event": "epoch", "knn": knn[1], "collapsed": is_collapsed}
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
BETTER = runs_of(result_of(95), result_of(97), result_of(96.5))
SCATTERED = runs_of(result_of(60), result_of(99), result_of(91))
ONE_UNSTABLE = runs_of(UNSTABLE, result_of(92), result_of(91))
ONE_DIVERGED = runs_of(result_of(90), DIVERGED, result_of(91))
CASES = [  # claim, runs, those beside them, the verdict by hand
    ("collapses", runs_of(*[COLLAPSED] * 3), GOOD, "holds"),
    ("collapses", runs_of(COLLAPSED, CALM, CALM), GOOD, "can't be told here"),
    ("collapses", runs_of(*[DIVERGED] * 3), GOOD, "does not"),
    ("fails", runs_of(COLLAPSED, DIVERGED, LEARNED_NOTHING), GOOD, "holds"),
    ("fails", runs_of(COLLAPSED, DIVERGED, LEARNED_LITTLE), GOOD, "can't be told here"),
    ("does not converge", runs_of(*[FAR] * 3), GOOD, "holds"),
    ("does not converge", runs_of(*[DIVERGED] * 3), GOOD, "holds"),
    ("does not converge", runs_of(*[HALF_WAY] * 3), GOOD, "does not"),
    ("unstable", runs_of(UNSTABLE, DIVERGED, CALM), GOOD, "can't be told here"),
    ("unstable", runs_of(*[CALM] * 3), GOOD, "does not"),
    ("worse", WORSE, GOOD, "holds"),
    ("worse", SCATTERED, GOOD, "can't be told here"),
    ("worse", ALIKE, GOOD, "does not"),
    ("worse", runs_of(CALM, CALM, LEARNED_NOTHING), GOOD, "does not"),
    ("better", BETTER, GOOD, "holds"),
    ("better", SCATTERED, GOOD, "can't be told here"),
    ("better", ALIKE, GOOD, "does not"),
    ("better", ONE_DIVERGED, WORSE, "does not"),
    ("no worse", ALIKE, GOOD, "holds"),
    ("no worse", WORSE, GOOD, "does not"),
    ("less stable", GOOD, GOOD, "can't be told here"),
    ("less stable", ONE_DIVERGED, GOOD, "holds"),
    ("less stable", GOOD, ONE_UNSTABLE, "does not"),
    ("less stable", ONE_DIVERGED, ONE_UNSTABLE, "can't be told here"),
    ("less stable", runs_of(UNSTABLE, DIVERGED, CALM), ONE_UNSTABLE, "holds"),
]


@pytest.mark.parametrize("claim, mine, beside, expected", CASES)
def test_a_verdict_on_a_row_is_what_its_runs_bear_out(claim, mine, beside, expected):
    """Against cases that were decided by hand."""
    assert paper_rows.verdict(claim, mine, beside) == expected


VERDICTS = [  # a claim, an interval of differences, and what it says of the claim
    ("no better", -3, -1, "holds"), ("no better", -0.5, 0.9, "holds"),
    ("no better", 0.2, 3, "does not hold"),
    ("no better", -2, 2, "can't be told here"), ("worse: it diverges", -9, -1, "holds"),
    ("worse: it diverges", -9, 1, "can't be told here"), ("worse: it diverges", -0.5, 0.5, "does not hold"),
]


def test_a_verdict_on_section_62_is_what_the_interval_bears_out():
    """Against cases that were decided by hand."""
    said = [neighbours.verdict(claim, low, high) for claim, low, high, _ in VERDICTS]
    assert said == [expected for *_, expected in VERDICTS]


def test_what_lr_and_depth_change_is_a_difference_of_gaps(tmp_path):
    """Against gaps of Table 3 (b) to (c) by hand: -4 and -2 at the lower lr, with two layers and three, -10
    and -6 at the higher one. The lr brings -3 - -8 = 5 points, a third layer -4 - -7 = 3; at the lower lr it
    brings 2."""
    low, high = paper_rows.LRS
    kept = Kept(tmp_path, None)
    for lr, layers, gap in ((low, 2, -4), (low, 3, -2), (high, 2, -10), (high, 3, -6)):
        for seed, default in ((0, 90 - 5 * lr), (1, 80 + layers)):
            for name, its in (("simsiam", default), ("table3-b-hidden-bn", default + gap)):
                line = result_of(its) | {"seed": seed}
                kept.add(paper_rows.look(name, lr, layers).name, line)
    rows = paper_rows.factors_table(kept).splitlines()
    assert "| table3-b-hidden-bn | +5.0 | +5.0 to +5.0 | +3.0 | +3.0 to +3.0 | +2.0 | +2.0 to +2.0 |" in rows
