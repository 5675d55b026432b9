"""The figures and pages that we show, against the logs and measurements in results/ that they are made of."""
import hashlib
import json
import re
import runpy
import statistics

import numpy as np
import pytest
import torch

import related
import simsiam
from harness.data.opening import open_data
from harness.data.shapes import draw_shapes
from harness.data.source import Source
from results.pairs import difference
from results.speed import model_of
from tests.helpers import ROOT, log_of, slow

RESULTS = ROOT / "results"


def words_of(page):
    """A page's words, one space between them, wherever its lines end."""
    return " ".join((ROOT / page).read_text().split())


def readme():
    """The README's words."""
    return words_of("README.md")


def read_json(name):
    """A file of measurements."""
    return json.loads((RESULTS / name).read_text())


# --- The README's runs --------------------------------------------------------------------------------------

RUNS = {  # run: the figures of its log that the README has
    "shapes": ["loss", "std", "knn", "untrained", "pixels"],
    "shapes-fig2-without-stopgrad": ["loss", "std", "knn"],
}
EVALUATIONS = [  # whose accuracy the README has
    "shapes/lineval-cached",
    "shapes/untrained-lineval-cached",
    "cifar10-width4/lineval-cached",
]
ELSEWHERE = [  # those in results/README.md
    "shapes/lineval-cached",
    "shapes/untrained-lineval-cached",
    "cifar10-width4/lineval-cached",
    "cifar10-width4/untrained-lineval-cached",
    "cifar10-width4/lineval-knn",
]


@pytest.mark.parametrize("run, figure", [(run, figure) for run in RUNS for figure in RUNS[run]])
def test_readmes_figures_are_those_of_the_logs_in_results(run, figure):
    """The last epoch's, the untrained network's, the raw pixels'; each as the README rounds it."""
    start, untrained, *_, last, end = log_of(RESULTS / run)
    assert end["event"] == "end"
    figures = {
        "loss": f"{last['loss']:.3f}",
        "std": f"{last['std']:.2f}",
        "knn": f"{last['knn']:.1f}%",
        "untrained": f"{untrained['knn']:.1f}%",
        "pixels": f"{start['knn_pixels']:.1f}%"}
    assert figures[figure] in readme()


def demos():
    """The logs of the demo: on seeds 0 to 4, with a core each, which are SimSiam's among its neighbours; and
    that of seed 0 with two."""
    of_seeds = [RESULTS / f"related/shapes-simsiam-{seed}.jsonl" for seed in range(5)]
    return [records(path) for path in (*of_seeds, RESULTS / "shapes/log.jsonl")]


def records(path):
    """The lines of a log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_demo_is_steady():
    """Five seeds: the mean and the standard deviation that the README has; each far above raw pixels and the
    untrained network; all of them, and seed 0 with two threads, in the range that it promises."""
    knn = []
    for log, seed in zip(demos(), [0, 1, 2, 3, 4, 0], strict=True):
        start, untrained, *_, last, end = log
        assert end["event"] == "end"
        assert start["settings"]["seed"] == seed
        assert {**start["settings"], "seed": 0, "workers": 0} == {**demos()[0][0]["settings"], "workers": 0}
        assert last["knn"] >= 25 + max(start["knn_pixels"], untrained["knn"])
        knn.append(last["knn"])
    assert np.std(knn[:5], ddof=1) <= 5
    assert f"five seeds gave {mean_and_std(knn[:5])}" in readme()
    assert f"`related/shapes-simsiam-*.jsonl`: {mean_and_std(knn[:5])}." in words_of("results/README.md")
    low, high = map(int, re.search(r"expect (\d+) to (\d+)", readme()).groups())
    assert high - low <= 15
    assert low <= min(knn) and max(knn) <= high


def test_readmes_run_without_stopgrad_is_that_of_the_same_data():
    """Its raw pixels and untrained network against those of the run with stop-gradient."""
    start, untrained, *_ = log_of(RESULTS / "shapes")
    other_start, other_untrained, *_ = log_of(RESULTS / "shapes-fig2-without-stopgrad")
    assert other_start["knn_pixels"] == start["knn_pixels"]
    assert other_untrained["knn"] == untrained["knn"]


@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_readmes_linear_accuracies_are_those_in_results(evaluation):
    """top1 of the evaluation's file."""
    assert f"{read_json(evaluation + '.json')['top1']:.1f}%" in readme()


@pytest.mark.parametrize("evaluation", ELSEWHERE)
def test_results_readme_has_the_linear_accuracies(evaluation):
    """top1 and top5 of the evaluation's file, in the table of results/README.md."""
    result = read_json(evaluation + ".json")
    row = rf"^\| `{evaluation}` \|.*\| {result['top1']:.2f} \| {result['top5']:.2f} \|$"
    assert re.search(row, (RESULTS / "README.md").read_text(), re.M)


@pytest.mark.parametrize("evaluation", [name for name in ELSEWHERE if name.startswith("cifar10")])
def test_kept_evaluations_are_of_the_kept_backbone(evaluation):
    """The hash in the evaluation's file against that of the backbone, where it is of a trained network."""
    backbone = (RESULTS / "cifar10-width4/backbone.pth").read_bytes()
    result = read_json(evaluation + ".json")
    expected = hashlib.sha256(backbone).hexdigest()
    if "untrained" in evaluation:
        expected = None
    assert result["sha256"] == expected


@pytest.mark.parametrize("run", [*RUNS, "cifar10-width4", "cifar10-width8-high-lr"])
def test_results_readme_has_the_figures_of_each_run(run):
    """The row of a run's folder against its log."""
    start, untrained, *rest, last, end = log_of(RESULTS / run)
    assert end["event"] == "end"
    knn = [start["knn_pixels"], untrained["knn"], last["knn"]]
    minutes = sum(epoch["seconds"] for epoch in [*rest, last]) / 60
    row = re.search(rf"^\| `{run}` \|(.*)\|$", (RESULTS / "README.md").read_text(), re.M)
    assert [cell.strip() for cell in row[1].split("|")][1:] == [
        " / ".join(f"{value:.1f}" for value in knn), f"{last['loss']:.3f}", f"{last['std']:.2f}",
        f"{minutes:.1f} min"]


# --- CIFAR-10 -----------------------------------------------------------------------------------------------

ROWS = {"50-epochs": 1, "small": 3, "small-decayed-predictor": 3}  # how many seeds


def cells_of(name):
    """The cells of a row of the README's table of results, after the first."""
    row = re.search(rf"^\| `{name}`[^|]*\|(.*)\|$", (ROOT / "README.md").read_text(), re.M)
    return [cell.strip() for cell in row[1].split("|")]


def mean_and_std(values):
    """As the README has them; nothing where nothing was measured, and of one value the value."""
    if len(values) < 2:
        return "".join(f"{value:.1f}" for value in values)
    return f"{np.mean(values):.1f} +- {np.std(values, ddof=1):.1f}"


@pytest.mark.parametrize("name, seeds", ROWS.items())
def test_readmes_results_are_those_of_the_logs(name, seeds):
    """Mean and standard deviation over the seeds, from log.jsonl and the evaluations' files."""
    runs = [RESULTS / "cifar10" / f"{name}-{seed}" for seed in range(seeds)]
    logs = [log_of(run) for run in runs]
    assert [log[0]["settings"]["seed"] for log in logs] == list(range(seeds))
    assert [log[-1]["event"] for log in logs] == ["end"] * seeds
    expected = [str(logs[0][-1]["epochs"]), mean_and_std([log[-2]["knn"] for log in logs])]
    for protocol in ("sgd", "lars", "cached"):
        files = [run / f"lineval-{protocol}.json" for run in runs]
        results = [json.loads(file.read_text()) for file in files if file.exists()]
        for result in results:
            assert result["protocol"] == protocol
            assert result["val_images"] == 10_000
        expected.append(mean_and_std([result["top1"] for result in results]))
    assert cells_of(name) == expected


def test_held_out_images_are_training_images_that_are_not_trained_on(tmp_path, monkeypatch):
    """results/cifar10.py's folder of 50 drawn images: every tenth stands in the place of the test images."""
    monkeypatch.chdir(ROOT)
    cifar10 = runpy.run_path("results/cifar10.py")
    monkeypatch.chdir(tmp_path)
    train = draw_shapes(0, 0, 50)
    cifar10["write_folder"]("all", train, np.arange(50), draw_shapes(1, 0, 20), np.arange(20))
    part, held_out, _ = open_data(cifar10["hold_out"]("all"))
    rest = [i for i in range(50) if i % 10]
    assert torch.equal(part.pixels, train.pixels[rest])
    assert part.labels.tolist() == train.labels[rest].tolist()
    assert torch.equal(held_out.pixels, train.pixels[::10])
    assert held_out.labels.tolist() == train.labels[::10].tolist()


def test_sgd_and_lars_have_the_lr_that_is_best_on_held_out_images():
    """The base lr of the evaluations on test images against the accuracies on a tenth of the training images:
    neither the smallest nor the largest that was tried."""
    for protocol in ("sgd", "lars"):
        tried = [read_json(f"cifar10/small-0/{path.name}")
                 for path in (RESULTS / "cifar10/small-0").glob(f"held-out-{protocol}-*.json")]
        assert {result["val_images"] for result in tried} == {1000}
        top1 = {result["base_lr"]: result["top1"] for result in tried}
        best = max(top1, key=top1.get)
        evaluations = (RESULTS / "cifar10").glob(f"small*/lineval-{protocol}.json")
        assert {json.loads(path.read_text())["base_lr"] for path in evaluations} == {best}
        assert min(top1) < best < max(top1)


def test_results_readme_says_what_the_runs_on_cifar10_gave():
    """Their number; kNN of the small ones, and that of the raw pixels; that the pairs of one seed can't tell
    a decayed predictor lr from a constant one, by kNN or by a linear layer."""
    page = words_of("results/README.md")
    assert len(list((RESULTS / "cifar10").glob("*/log.jsonl"))) == 7 and "`cifar10` | seven runs" in page
    knn, cached = {}, {}
    for name in ("small", "small-decayed-predictor"):
        runs = {seed: f"cifar10/{name}-{seed}" for seed in range(3)}
        logs = [log_of(RESULTS / run) for run in runs.values()]
        knn[name] = {seed: log[-1]["knn"] for seed, log in enumerate(logs)}
        cached[name] = {seed: read_json(f"{run}/lineval-cached.json")["top1"] for seed, run in runs.items()}
    pixels = logs[0][0]["knn_pixels"]
    assert f"kNN {mean_and_std(list(knn['small'].values()))} where raw pixels give {pixels:.1f}" in page
    for measured in (knn, cached):
        between = difference(measured["small-decayed-predictor"], measured["small"])
        assert between.low < 0 < between.high


def test_cifar10_page_is_made_of_the_logs_that_are_kept(monkeypatch):
    """results/cifar10.md against what results/cifar10.py makes of them."""
    monkeypatch.chdir(ROOT)
    page = (RESULTS / "cifar10.md").read_text()
    note = re.search(r"`results/cifar10`\. (.*?) Top-1 in percent", page)[1]
    assert runpy.run_path("results/cifar10.py")["page"](note, "results/cifar10") == page


def test_what_the_readmes_say_of_a_gpu_is_in_its_logs():
    """README's and results/README.md's sentences against the logs of 50 epochs, speed-cuda.json and the
    outcomes of the checks."""
    run = "cifar10/50-epochs-0"
    start, _, *epochs, end = log_of(RESULTS / run)
    top1 = read_json(f"{run}/lineval-cached.json")["top1"]
    minutes = sum(epoch["wall_seconds"] for epoch in epochs) / 60
    assert (start["device"], start["torch"]) == ("NVIDIA H200", "2.11.0+cu130")
    assert f"kNN {end['knn']:.1f}% and {top1:.1f}% by a linear layer, in {minutes:.1f} minutes" in readme()
    page = words_of("results/README.md")
    seconds = statistics.median(epoch["seconds"] for epoch in epochs)
    variants = read_json("speed-cuda.json")["step of cifar10"]["variants"]
    of_steps = 97 * variants["ours"]["ms"] / 1000
    assert f"An epoch takes {seconds:.1f} s, its steps on views that are there {of_steps:.1f} s" in page
    assert f"800 would take {800 * seconds / 60:.0f} minutes" in page
    checks = read_json("drills/gpu.json")
    assert [name for name, outcome in checks.items() if not outcome["good"]] == ["waits"]
    assert checks["commands"]["seen"] == "all 16 end well" and "runs of 16 commands end well" in page
    assert checks["gradients"]["seen"] == "cosine 0.9911" and "(cosine 0.991)" in page
    assert checks["two"]["seen"] == "losses -0.0814 and -0.0813" and "the mean loss of one to 0.0001" in page
    assert f"{epochs[-1]['memory_mb']:,} MiB" in (RESULTS / "operations.md").read_text()


def test_the_page_on_ones_own_data_is_made_of_its_lines(monkeypatch):
    """results/own-data.md against what results/own_data.py makes of own-data.jsonl; the gains that a run's
    start block names, rounded, against the page's."""
    monkeypatch.chdir(ROOT)
    page = (RESULTS / "own-data.md").read_text()
    assert runpy.run_path("results/own_data.py")["page"]() == page
    gains = re.findall(r"about ([\d,]+) steps: \+([\d.]+) to \+([\d.]+) points", page)
    said = [f"{steps} (steps )?gained {float(low):.0f} to {float(high):.0f}" for steps, low, high in gains]
    assert [steps for steps, *_ in gains] == ["500", "1,500", "4,000"]
    source = " ".join(re.sub(r'"\s+f?"', "", (ROOT / "simsiam.py").read_text()).split())
    for words in said:
        assert re.search(words, source), words


def test_the_page_on_the_neighbours_has_the_table_of_their_logs(monkeypatch):
    """results/related.md against what results/neighbours.py makes of results/related."""
    monkeypatch.chdir(ROOT)
    page = (RESULTS / "related.md").read_text()
    made = runpy.run_path("results/neighbours.py")
    assert made["table"]() in page
    assert made["comparison"]() in page


NETWORK = ("arch", "width", "cifar_stem", "batch", "epochs", "size", "images")
VIEWS = ("area", "jitter", "strength", "gray", "blur", "flip", "weight_decay", "momentum")  # CLIP has its own


@pytest.mark.parametrize("data", ["shapes", "cifar10"])
def test_the_neighbours_that_were_measured_had_the_same_network_views_and_epochs(data):
    """Settings in the logs against those of SimSiam's."""
    logs = sorted((RESULTS / "related").glob(f"{data}-*.jsonl"))
    settings = [json.loads(log.read_text().splitlines()[0])["settings"] for log in logs]
    first = next((its for its in settings if its["experiment"] == "simsiam"), None)
    for log, its in zip(logs, settings):
        same = NETWORK if its["experiment"] == "clip" else NETWORK + VIEWS
        assert {name: its[name] for name in same} == {name: first[name] for name in same}, log.name
        assert its["seed"] == int(log.stem.rpartition("-")[2])


def test_on_cifar10_the_neighbours_have_what_was_chosen_on_shapes(monkeypatch):
    """The options of results/neighbours.py against the recipe for shapes; BYOL's and SwAV's lr is half of
    SimSiam's in both."""
    monkeypatch.chdir(ROOT)
    made = runpy.run_path("results/neighbours.py")
    for name, method in related.METHODS.items():
        if name == "clip":
            continue
        _, *options = made["command_of"]("cifar10", "CIFAR", name)
        args = vars(related.parse(options))
        chosen = simsiam.recipe("shapes", method.SETTINGS)
        for setting in ("temperature", "queue", "tau", "prototypes", "eps"):
            if setting in chosen:
                assert args[setting] == chosen[setting], (name, setting)
        share = chosen["base_lr"] / simsiam.recipe("shapes")["base_lr"]
        assert args["base_lr"] == pytest.approx(0.4 * share)


VERDICTS = [  # a claim, an interval of differences, and what it says of the claim
    ("no better", -3, -1, "holds"), ("no better", -0.5, 0.9, "holds"), ("no better", 0.2, 3, "does not hold"),
    ("no better", -2, 2, "can't be told here"), ("worse: it diverges", -9, -1, "holds"),
    ("worse: it diverges", -9, 1, "can't be told here"), ("worse: it diverges", -0.5, 0.5, "does not hold"),
]


def test_a_verdict_on_section_62_is_what_the_interval_bears_out(monkeypatch):
    """Against cases that were decided by hand."""
    monkeypatch.chdir(ROOT)
    verdict = runpy.run_path("results/neighbours.py")["verdict"]
    assert [verdict(claim, low, high) for claim, low, high, _ in VERDICTS] == [said for *_, said in VERDICTS]


def test_readme_has_the_knn_accuracy_of_each_neighbour(monkeypatch):
    """Against what results/neighbours.py makes of the logs. All learned, by seed 0's, far more than raw
    pixels tell."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "README.md").read_text()
    assert runpy.run_path("results/neighbours.py")["in_readme"](text) == text
    for method in related.METHODS:
        assert re.search(rf"`--method {method}` \|[^|]*\| \d\d\.\d", text), method
        lines = (RESULTS / f"related/shapes-{method}-0.jsonl").read_text().splitlines()
        log = [json.loads(line) for line in lines]
        *_, last, end = log
        assert end["event"] == "end"
        assert last["knn"] >= 20 + max(log[0]["knn_pixels"], log[1]["knn"])


# --- The paper's rows ---------------------------------------------------------------------------------------

@pytest.fixture
def paper_rows(monkeypatch):
    """What results/paper_rows.py defines."""
    monkeypatch.chdir(ROOT)
    return runpy.run_path("results/paper_rows.py")


def test_the_pages_on_the_papers_rows_have_the_tables_of_the_kept_runs(paper_rows):
    """results/paper_rows.md and results/README.md against what the script makes of results/paper_rows."""
    kept = paper_rows["Kept"]("results/paper_rows")
    page = (RESULTS / "paper_rows.md").read_text()
    for table in ("candidates_table", "rows_table", "differences_table", "looks_table",
                  "factors_table"):
        assert paper_rows[table](kept) in page
    assert paper_rows["claims_table"](kept) in (RESULTS / "README.md").read_text()


def test_the_kept_runs_are_those_of_the_script(paper_rows):
    """Each file's runs against the script's list: no file and no seed that it wouldn't make, the settings of
    the log against what its options say, the accuracy of a run that ended."""
    expected = {one.name: one for group in paper_rows["programme"]() for one in group}
    for path in sorted((RESULTS / "paper_rows").glob("*.jsonl")):
        one = expected[path.stem]
        results = records(path)
        seeds = [result["seed"] for result in results]
        assert len(set(seeds)) == len(seeds) and set(seeds) <= set(one.seeds), path.name
        for result in results:
            start, *_, end = result["log"]
            args = simsiam.parse([*one.options.split(), "--seed", f"{result['seed']}"])
            settings = simsiam.settings_for(args, stand_in_for_shapes(), 1)
            for name in {*simsiam.SETTINGS, "seed", "experiment"} - {"knn_every"}:  # which changes no figure
                assert as_json(settings[name]) == start["settings"][name], (path.name, name)
            assert one.options in result["command"]
            assert (end["event"] == "end") == (result["top1"] is not None)


def stand_in_for_shapes():
    """A Source of as many images as the shapes have, of which only the number counts."""
    one = torch.zeros(1, dtype=torch.uint8)
    return Source(pixels=one.expand(simsiam.OWN_IMAGES["shapes"], 3, 32, 32), labels=None, classes=[])


def as_json(value):
    """As a log has it."""
    return json.loads(json.dumps(value))


def test_pairs_began_alike(paper_rows):
    """Runs of one seed at one size of the views: the same images, raw pixels and untrained network."""
    began = {}
    for path in sorted((RESULTS / "paper_rows").glob("*.jsonl")):
        for result in records(path):
            start, untrained, *_ = result["log"]
            key = result["seed"], start["settings"]["size"]
            mine = start["settings"]["content"], start["knn_pixels"], untrained["knn"]
            assert began.setdefault(key, mine) == mine, path.name


def test_the_setting_is_the_candidate_that_varies_least(paper_rows):
    """By the kept runs: the least standard deviation of those that are 30 points above the untrained
    network, whose accuracy the page has."""
    kept = paper_rows["Kept"]("results/paper_rows")
    untrained = read_json("paper_rows/untrained.json")["top1"]
    assert f"An untrained network has {untrained:.1f}" in words_of("results/paper_rows.md")
    spread = {}
    for options in paper_rows["CANDIDATES"]:
        runs = kept.of(paper_rows["name_of_candidate"](options))
        assert set(runs) == {7, 8, 9}
        top1 = [result["top1"] for result in runs.values()]
        if np.mean(top1) >= 30 + untrained:
            spread[options] = np.std(top1, ddof=1)
    assert min(spread, key=spread.get) == paper_rows["SETTING"]


def test_some_rows_stand_for_others(paper_rows):
    """The experiments that the page calls one and the same run have the same settings, whatever the
    setting."""
    for one, other in (("table1-baseline", "fig2-with-stopgrad"), ("table1-c-constant-lr", "simsiam"),
                       ("table3-c-default", "simsiam")):
        found = []
        for name in (one, other):
            args = simsiam.parse(f"--experiment {name} {paper_rows['SETTING']}".split())
            settings = simsiam.settings_for(args, stand_in_for_shapes(), 1)
            found.append(settings | {"experiment": None})
        assert found[0] == found[1]


def result_of(top1, losses=(-0.5, -0.9), is_collapsed=False, knn=(20, 80)):
    """A kept run, as far as a verdict looks at it. knn: of the untrained network, and at the end"""
    untrained = {"event": "epoch", "loss": None, "knn": knn[0], "collapsed": False}
    epochs = [{"event": "epoch", "loss": loss, "knn": knn[1], "collapsed": is_collapsed} for loss in losses]
    return {"seed": None, "top1": top1, "log": [{"event": "start"}, untrained, *epochs]}


def runs_of(*results):
    return {seed: result | {"seed": seed} for seed, result in enumerate(results)}


GOOD = runs_of(result_of(90), result_of(92), result_of(91))
COLLAPSED = result_of(20, is_collapsed=True)
DIVERGED = result_of(None, losses=(-0.3,))
LEARNED_NOTHING = result_of(30, knn=(20, 24))
UNSTABLE = result_of(91, losses=(-0.9, -0.8))
CASES = [  # claim, runs beside GOOD, the verdict by hand
    ("collapses", runs_of(*[COLLAPSED] * 3), "holds"),
    ("collapses", runs_of(COLLAPSED, result_of(80), result_of(80)), "can't be told here"),
    ("collapses", runs_of(*[result_of(20)] * 3), "does not"),
    ("collapses", runs_of(*[DIVERGED] * 3), "does not"),
    ("fails", runs_of(COLLAPSED, DIVERGED, LEARNED_NOTHING), "holds"),
    ("fails", runs_of(COLLAPSED, DIVERGED, result_of(30, knn=(20, 26))), "can't be told here"),
    ("fails", GOOD, "does not"),
    ("does not converge", runs_of(*[result_of(20, losses=(-0.3, -0.4))] * 3), "holds"),
    ("does not converge", runs_of(*[DIVERGED] * 3), "holds"),
    ("does not converge", runs_of(*[result_of(20, losses=(-0.3, -0.5))] * 3), "does not"),
    ("unstable", runs_of(*[UNSTABLE] * 3), "holds"),
    ("unstable", runs_of(UNSTABLE, DIVERGED, result_of(90)), "can't be told here"),
    ("unstable", runs_of(*[result_of(90, losses=(-0.9, -0.86))] * 3), "does not"),
    ("worse", runs_of(result_of(80), result_of(83), result_of(81)), "holds"),
    ("worse", runs_of(result_of(60), result_of(99), result_of(91)), "can't be told here"),
    ("worse", runs_of(result_of(90.1), result_of(92), result_of(91)), "does not"),
    ("worse", runs_of(result_of(80), result_of(83), DIVERGED), "does not"),
    ("worse", runs_of(result_of(80), result_of(83), LEARNED_NOTHING), "does not"),
    ("worse", runs_of(*[COLLAPSED] * 3), "does not"),
    ("better", runs_of(result_of(95), result_of(97), result_of(96.5)), "holds"),
    ("better", runs_of(result_of(95), result_of(97), COLLAPSED), "does not"),
    ("better", runs_of(result_of(60), result_of(99), result_of(91)), "can't be told here"),
    ("better", runs_of(result_of(90.1), result_of(92), result_of(91)), "does not"),
    ("no worse", runs_of(result_of(90.1), result_of(92), result_of(91)), "holds"),
    ("no worse", runs_of(result_of(60), result_of(99), result_of(91)), "can't be told here"),
    ("no worse", runs_of(result_of(80), result_of(83), result_of(81)), "does not"),
    ("no worse", runs_of(result_of(91), result_of(93), COLLAPSED), "does not"),
    ("less stable", GOOD, "can't be told here"),
    ("less stable", runs_of(result_of(90), DIVERGED, result_of(91)), "holds"),
    ("less stable", runs_of(result_of(90), UNSTABLE, result_of(91)), "holds"),
]


@pytest.mark.parametrize("claim, mine, expected", CASES)
def test_a_verdict_on_a_row_is_what_its_runs_bear_out(paper_rows, claim, mine, expected):
    """Against cases that were decided by hand."""
    assert paper_rows["verdict"](claim, mine, GOOD) == expected


def test_less_stable_counts_both_sides(paper_rows):
    """A row against one that is unstable in its first run."""
    beside = runs_of(UNSTABLE, result_of(92), result_of(91))
    for mine, expected in (
            (GOOD, "does not"),
            (runs_of(COLLAPSED, result_of(90), result_of(90)), "can't be told here"),
            (runs_of(result_of(90), DIVERGED, result_of(91)), "can't be told here"),
            (runs_of(UNSTABLE, DIVERGED, result_of(91)), "holds")):
        assert paper_rows["verdict"]("less stable", mine, beside) == expected


def test_the_page_has_the_bounds_of_the_rules(paper_rows):
    """The words of results/paper_rows.md against the script's constants."""
    page = words_of("results/paper_rows.md")
    for words in (f"more than {paper_rows['RISE']:g} above that of the epoch before",
                  f"less than {paper_rows['LEARNED']:g} points above its untrained network's",
                  f"doesn't if it lies above -{paper_rows['POINT']:g} point",
                  f"holds if it lies above -{paper_rows['NEAR']:g} points",
                  f"counts as chance, {paper_rows['CHANCE']:g}."):
        assert words in page


def test_what_lr_and_depth_change_is_a_difference_of_gaps(paper_rows, tmp_path):
    """Against gaps of Table 3 (b) to (c) by hand: -4 and -2 at the lower lr, with two layers and three, -10
    and -6 at the higher one. The lr brings -3 - -8 = 5 points, a third layer -4 - -7 = 3; at the lower lr it
    brings 2."""
    low, high = paper_rows["LRS"]
    kept = paper_rows["Kept"](tmp_path)
    for (lr, layers), gap in {(low, 2): -4, (low, 3): -2, (high, 2): -10, (high, 3): -6}.items():
        for seed, default in ((0, 90), (1, 80)):
            for name, its in (("simsiam", default), ("table3-b-hidden-bn", default + gap)):
                kept.add(paper_rows["look"](name, lr, layers).name, result_of(its) | {"seed": seed})
    rows = paper_rows["factors_table"](kept).splitlines()
    assert "| table3-b-hidden-bn | +5.0 | +5.0 to +5.0 | +3.0 | +3.0 to +3.0 | +2.0 | +2.0 to +2.0 |" in rows


def test_what_makes_the_difference_to_the_paper_is_what_the_runs_show(paper_rows):
    """The page's words on Table 3 against its runs at two lrs and depths."""
    kept = paper_rows["Kept"](RESULTS / "paper_rows")
    look = paper_rows["look"]

    def runs(name, lr, layers):
        its = kept.of(look(name, lr, layers).name)
        return [its[seed] for seed in (0, 1, 2)]

    def gap(layers):
        """Of (b) to (c) at the lower lr."""
        return [mine["top1"] - default["top1"] for mine, default in
                zip(runs("table3-b-hidden-bn", 0.5, layers), runs("simsiam", 0.5, layers))]

    no_bn = [run for lr in (0.5, 2) for layers in (2, 3) for run in runs("table3-a-no-bn", lr, layers)]
    assert all(map(paper_rows["collapsed"], no_bn))
    calm, rough = ([paper_rows["unstable"](run) for layers in (2, 3)
                    for run in runs("table3-d-all-bn", lr, layers)] for lr in (0.5, 2))
    assert not any(calm) and sum(rough) > len(rough) / 2
    nearer = np.array(gap(3)) - np.array(gap(2))
    page = words_of("results/paper_rows.md")
    for words in (f"It collapsed in all {len(no_bn)} runs",
                  f"brings it {np.mean(nearer):.1f} points nearer to (c); {-np.mean(gap(3)):.1f} points are",
                  f"it was in none of {len(calm)}"):
        assert words in page
    assert np.mean(nearer) > 4.303 * np.std(nearer, ddof=1) / 3 ** 0.5  # Student's 95% for three pairs


@pytest.mark.parametrize("name, beside", [("fig2-without-stopgrad", "fig2-with-stopgrad"),
                                          ("sec45-cross-entropy", "simsiam"),
                                          ("sec52-moving-average", "table1-a-no-predictor")])
def test_a_rows_figures_on_the_page_are_those_of_its_lines(name, beside):
    """Mean difference, standard error, loss and accuracy, computed here from the files."""
    mine, theirs = ({result["seed"]: result for result in records(RESULTS / f"paper_rows/{row}.jsonl")}
                    for row in (name, beside))
    pairs = [mine[seed]["top1"] - theirs[seed]["top1"] for seed in mine.keys() & theirs.keys()]
    error = np.std(pairs, ddof=1) / len(pairs) ** 0.5
    page = (RESULTS / "paper_rows.md").read_text()
    difference_row, row = re.findall(rf"^\| \[{name}\].*$", page, re.M)  # the page's first and second table
    assert f"| {len(pairs)} | {np.mean(pairs):+.2f} +- {error:.2f} |" in difference_row
    ends = [result["log"][-2]["loss"] for result in mine.values()]
    accuracy = mean_and_std([result["top1"] for result in mine.values()])
    assert f"| {len(mine)} | {min(ends):.3f}, {max(ends):.3f} |" in row
    assert f"| {accuracy} |" in row


def test_each_accuracy_is_of_the_run_of_its_line():
    """The evaluation's checkpoint against the run's --out; its protocol against the page's."""
    for path in (RESULTS / "paper_rows").glob("*.jsonl"):
        for result in records(path):
            out = re.search(r"--out (\S+)", result["command"])[1]
            assert f"--ckpt {out}/checkpoint.pth --cached" in result["evaluation"]
            assert out.endswith(f"{path.stem}-{result['seed']}")


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


def test_the_papers_differences_are_those_of_its_tables(paper_rows):
    """A few by hand: 64.8 - 68.1; 0.1 - 67.7; 55.0 - 0.1; 67.3 - 64.8; nothing where it gives no number."""
    of = paper_rows["paper_difference"]
    assert of("sec46-asymmetric") == pytest.approx(-3.3)
    assert of("fig2-without-stopgrad") == pytest.approx(-67.6)
    assert of("sec52-moving-average") == pytest.approx(54.9)
    assert of("sec46-asymmetric-2x") == pytest.approx(2.5)
    assert of("sec42-asymmetric-no-h") is None


# --- Reliability and speed ----------------------------------------------------------------------------------

def test_every_killed_run_ended_with_the_uninterrupted_weights():
    """The counts of results/drills/kills.json against each other."""
    kills = read_json("drills/kills.json")
    assert kills["ended with the uninterrupted weights"] == kills["runs"]
    assert sum(kills["hits"].values()) == kills["kills"] >= 100
    assert kills["hits"]["writing a checkpoint"] >= 20
    assert kills["hits"]["in a step"] >= 20


def test_no_damaged_file_was_more_than_read_or_refused():
    """The outcomes in results/drills/fuzz.json."""
    fuzz = read_json("drills/fuzz.json")
    for kind in ("images", "tar files", "checkpoints"):
        assert fuzz[kind].keys() == {"read", "refused"}
    assert fuzz["whole program"].keys() == {"went on"}


def test_reliability_figures_are_those_in_results():
    """results/operations.md's against the drills' files."""
    kills = read_json("drills/kills.json")
    fuzz = read_json("drills/fuzz.json")
    for figure in (
            f"{kills['kills']} kills",
            f"{kills['hits']['writing a checkpoint']} of them while a checkpoint was written",
            f"{kills['hits']['in a step']} in a step",
            f"{sum(fuzz['images'].values()):,} damaged images",
            f"{sum(fuzz['checkpoints'].values()):,} damaged checkpoints",
            f"{fuzz['checkpoints']['read']} of them unharmed",
            f"{sum(fuzz['tar files'].values()):,} damaged tar files"):
        assert figure in words_of("results/operations.md")


def rank_kept(log):
    """The last epoch's rank, in units of the untrained network's."""
    epochs = [record for record in log if record["event"] == "epoch"]
    return epochs[-1]["rank"] / epochs[0]["rank"]


def test_ranks_in_operations_md_are_those_of_the_logs():
    """Of the rows that learned and of those that failed, of SimSiam beside its neighbours, of Table 3 (a);
    the alarm's bound is between healthy and failed."""
    def of_rows(*names):
        return [rank_kept(result["log"]) for name in names
                for result in records(RESULTS / f"paper_rows/{name}.jsonl")]

    def of_neighbours(data, seeds):
        return [rank_kept(records(RESULTS / f"related/{data}-simsiam-{seed}.jsonl")) for seed in range(seeds)]

    healthy = of_rows("simsiam", "fig2-with-stopgrad", "sec45-cross-entropy", "sec52-100-step",
                      "suppB-hidden-d")
    healthy += of_neighbours("shapes", 5)
    failed = of_rows("fig2-without-stopgrad", "table1-a-no-predictor", "table1-b-fixed-predictor",
                     "sec42-asymmetric-no-h")
    no_bn = of_rows("table3-a-no-bn")
    low, high = sorted(of_neighbours("cifar10", 2))
    for figure in (
            f"{len(healthy)} healthy runs ended with {min(healthy):.2f} to {max(healthy):.2f} of",
            f"{len(failed)} that failed with {min(failed):.2f} to {max(failed):.2f};",
            f"two had {low:.2f} and {high:.2f}. A run below {simsiam.LOW_RANK} is told so",
            f"kept {min(no_bn):.2f} to {max(no_bn):.2f} here"):
        assert figure in words_of("results/operations.md")
    assert max(failed) < simsiam.LOW_RANK < min(healthy)


def speeds_of(what):
    """{part of the input pipeline: images/s on one core}"""
    return {part: one_core for part, (one_core, _) in read_json("speed.json")[what].items()}


def step_speeds():
    """{recipe: {variant: images/s of a training step}}"""
    parts = read_json("speed.json")
    steps = [part for name, part in parts.items() if name.startswith("step of ")]
    return {step["recipe"]: {name: v["images/s"] for name, v in step["variants"].items()} for step in steps}


def test_pipelines_speeds_are_those_in_results():
    """The README's ratios against results/speed.json."""
    files = speeds_of("photos")
    memory = speeds_of("in memory")
    for figure in (
            f"makes {files['decode and cut'] / files['all, by Pillow']:.2f} times",
            f"at {files['decode and cut'] / files['decode']:.2f} of",
            f"it is still {files['all'] / files['all, by Pillow']:.2f} times",
            f"is {memory['all'] / memory['all, by Pillow']:.2f} times as fast"):
        assert figure in readme()


def test_steps_speeds_are_those_in_results():
    """The README's ratios against results/speed.json; that --compile gains nothing is within a tenth."""
    steps = step_speeds()
    gains = {recipe: f"{speeds['ours'] / speeds['plain']:.2f}" for recipe, speeds in steps.items()}
    assert f"{gains['cifar10']} from channels_last" in readme()
    assert f"{gains['imagenet']} with ResNet-50" in readme()
    for recipe in ("cifar10", "imagenet"):
        assert 0.9 < steps[recipe]["ours, compiled"] / steps[recipe]["ours"] < 1.1
    plain, compiled = (read_json("speed.json")[run]["seconds of each epoch"][-1]
                       for run in ("run", "run, compiled"))
    assert f"an epoch on the drawn shapes {plain / compiled:.2f} times as fast" in readme()


PEERS_STEPS = ("ResNet-18, 32 pixels, batch 64", "ResNet-50, 224 pixels, batch 8")


def test_results_readme_has_what_was_reached_of_the_aims():
    """Its words on speed.md and peers.md against the files of measurements."""
    files, memory = speeds_of("photos"), speeds_of("in memory")
    found = read_json("peers.json")
    large, small = found["views of 224 pixels"], found["views of 32 pixels"]
    a_worker = large["ours: a worker's part"]
    released = "the released transforms, by torchvision"
    gains = {}
    for variant in ("ours, float32", "ours, bf16"):
        steps = [found["steps"][name] for name in PEERS_STEPS]
        gains[variant] = " and ".join(f"{step['lightly']['seconds'] / step[variant]['seconds']:.2f}"
                                      for step in steps)
    for figure in (
            f"3.3 times Pillow for a worker ({files['decode and cut'] / files['all, by Pillow']:.2f})",
            f"14 times in memory at 32 pixels ({memory['all'] / memory['all, by Pillow']:.2f}: missed)",
            f"at 224 pixels ({a_worker / large[released]:.2f})",
            f"20 times at 32 ({small['ours'] / small[released]:.2f}: missed)",
            f"in float32 ({gains['ours, float32']})",
            f"in bf16 ({gains['ours, bf16'].replace(' and', ': missed, and')})"):
        assert figure in words_of("results/README.md")


def test_figures_of_tar_files_are_those_in_results():
    """results/operations.md's against drills/tar.json."""
    found = read_json("drills/tar.json")
    _, (worker, _) = found["memory after 200 steps, MiB: main, worker; and shared"]
    for figure in (
            f"with {found['images']:,} images in all",
            f"the first start takes {found['first start, s']:.0f} s",
            f"the next {found['second start, s']:.0f} s",
            f"a worker has {worker} MiB",
            f"makes {found['ratio, tar to folder']:.2f} times as many"):
        assert figure in words_of("results/operations.md")


def kept_for_backward(settings, bf16, n):
    """The MiB of all tensors that backward keeps of the loss of n images, weights aside."""
    model = model_of(settings)
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # which keeps the place from being used again
        return tensor

    views = torch.randn(2, n, 3, settings["size"], settings["size"])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            p, z = model(*views)
        simsiam.loss(*p, *z)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items()
               if place not in weights) / 2**20


@slow
@pytest.mark.parametrize("recipe, digits, words", [
    ("imagenet", 0, "ResNet-50 at 224 pixels {} MiB in bf16 and {} MiB in float32"),
    ("cifar10", 1, "ResNet-18 at 32 pixels {} and {} MiB")])
def test_memory_by_image_is_what_backward_keeps(recipe, digits, words):
    """results/operations.md's figures against the tensors themselves: what an image more brings, because bf16
    keeps a copy of the weights too, once."""
    settings = simsiam.recipe(recipe)
    counted = [(kept_for_backward(settings, bf16, 4) - kept_for_backward(settings, bf16, 2)) / 2
               for bf16 in (True, False)]
    expected = words.format(*(f"{mib:.{digits}f}" for mib in counted))
    assert expected in words_of("results/operations.md")


def test_the_page_on_bf16_has_the_tables_of_its_logs(monkeypatch):
    """results/bf16.md against what results/bf16.py makes of results/bf16; and the differences by seed."""
    monkeypatch.chdir(ROOT)
    page = (RESULTS / "bf16.md").read_text()
    made = runpy.run_path("results/bf16.py")
    assert made["table"]() in page
    assert made["speed_table"]() in page
    knn = {}
    for precision in ("float32", "bf16"):
        for seed in range(2):
            *_, last = map(json.loads, (RESULTS / f"bf16/{precision}-{seed}.jsonl").read_text().splitlines())
            knn[precision, seed] = last["knn"]
    lower = sorted(knn["float32", seed] - knn["bf16", seed] for seed in range(2))
    assert f"kNN is {lower[0]:.1f} and {lower[1]:.1f} points lower" in page


def test_the_page_beside_other_libraries_is_made_of_its_measurements(monkeypatch):
    """results/peers.md against results/peers.json; and the README's figures."""
    monkeypatch.chdir(ROOT)
    found = read_json("peers.json")
    page = (RESULTS / "peers.md").read_text()
    for table in runpy.run_path("results/peers.py")["tables"](found):
        assert table in page
    step = found["steps"]["ResNet-18, 32 pixels, batch 64"]
    large, small = found["views of 224 pixels"], found["views of 32 pixels"]
    of_a_worker = large["ours: a worker's part"]
    for figure in (
            f"ResNet-18 takes {step['lightly']['seconds']:.2f} s there",
            f"{step['ours, float32']['seconds']:.2f} s here",
            f"and {step['ours, bf16']['seconds']:.2f} s in bf16",
            f"a worker makes {of_a_worker / large['lightly']:.2f} times",
            f"and {small['ours'] / small['lightly']:.2f} times for CIFAR-10"):
        assert figure in readme()


def test_the_page_on_speed_is_made_of_its_measurements(monkeypatch):
    """results/speed.md against what results/speed.py makes of the files of both machines."""
    monkeypatch.chdir(ROOT)
    machines = [read_json("speed-cuda.json"), read_json("speed.json")]
    page = runpy.run_path("results/speed.py")["whole_page"](machines)
    assert page == (RESULTS / "speed.md").read_text()


def test_start_up_figures_are_those_in_results():
    """The time to list and the size of the names in results/operations.md, against drills/start_up.json."""
    found = read_json("drills/start_up.json")
    names = found["memory with the names, MiB"] - found["memory before, MiB"]
    early, late = (found[f"memory after {steps} steps, MiB: main, workers; and shared"]
                   for steps in (20, 1000))
    for figure in (
            f"listing takes {found['listing, s']:.0f} s",
            f"the names {names} MiB",
            f"a worker grows from {early[1][0]} to {late[1][0]} MiB, the main process from {early[0][0]} to "
            f"{late[0][0]}"):
        assert figure in words_of("results/operations.md")
