"""The figures and pages that we show, against the logs and measurements in results/ that they are made of."""
import hashlib
import json
import re
import runpy

import numpy as np
import pytest

import related
import simsiam
from tests.helpers import ROOT, log_of

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
ELSEWHERE = [  # those that only results/README.md has
    "cifar10-width4/lineval-cached",
    "cifar10-width4/untrained-lineval-cached",
    "cifar10-width4/lineval-sgd",
    "cifar10-width4/lineval-lars",
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
    """The logs of the demo on seeds 0 to 4, and of seed 0 with one thread."""
    names = ["log", *(f"seed-{seed}" for seed in range(1, 5)), "one-thread"]
    return [records(RESULTS / "shapes" / f"{name}.jsonl") for name in names]


def records(path):
    """The lines of a log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_demo_is_steady():
    """Five seeds: the mean and the standard deviation that the README has; each far above raw pixels and the
    untrained network; all of them, and one thread, in the range that it promises."""
    knn = []
    for log, seed in zip(demos(), [0, 1, 2, 3, 4, 0]):
        start, untrained, *_, last, end = log
        assert end["event"] == "end"
        assert start["settings"]["seed"] == seed
        assert {**start["settings"], "seed": 0, "workers": 0} == {**demos()[0][0]["settings"], "workers": 0}
        assert last["knn"] >= 25 + max(start["knn_pixels"], untrained["knn"])
        knn.append(last["knn"])
    assert np.std(knn[:5], ddof=1) <= 3
    assert f"five seeds gave {mean_and_std(knn[:5])}" in readme()
    low, high = map(int, re.search(r"expect (\d+) to (\d+)", readme()).groups())
    assert high - low <= 10
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


@pytest.mark.parametrize("evaluation", ELSEWHERE)
def test_kept_evaluations_are_of_the_kept_backbone(evaluation):
    """The hash in the evaluation's file against that of the backbone, where it is of a trained network."""
    backbone = (RESULTS / "cifar10-width4/backbone.pth").read_bytes()
    result = read_json(evaluation + ".json")
    expected = hashlib.sha256(backbone).hexdigest()
    if "untrained" in evaluation:
        expected = None
    assert result["sha256"] == expected


# --- CIFAR-10 -----------------------------------------------------------------------------------------------

ROWS = ["small", "small-decayed-predictor", "small-affine"]


def cells_of(name):
    """The cells of a row of the README's table of results, after the first."""
    row = re.search(rf"^\| `{name}`[^|]*\|(.*)\|$", (ROOT / "README.md").read_text(), re.M)
    return [cell.strip() for cell in row[1].split("|")]


def mean_and_std(values):
    """As the README has them; nothing where nothing was measured."""
    return f"{np.mean(values):.1f} +- {np.std(values, ddof=1):.1f}" if values else ""


@pytest.mark.parametrize("name", ROWS)
def test_readmes_results_are_those_of_the_logs(name):
    """Mean and standard deviation over three seeds, from log.jsonl and the evaluations' files."""
    runs = [RESULTS / "cifar10" / f"{name}-{seed}" for seed in range(3)]
    logs = [log_of(run) for run in runs]
    assert [log[0]["settings"]["seed"] for log in logs] == [0, 1, 2]
    assert [log[-1]["event"] for log in logs] == ["end"] * 3
    expected = [str(logs[0][-1]["epochs"]), mean_and_std([log[-2]["knn"] for log in logs])]
    for protocol in ("sgd", "lars", "cached"):
        files = [run / f"lineval-{protocol}.json" for run in runs]
        results = [json.loads(file.read_text()) for file in files if file.exists()]
        for result in results:
            assert result["protocol"] == protocol
            assert result["val_images"] == 10_000
        expected.append(mean_and_std([result["top1"] for result in results]))
    assert cells_of(name) == expected


def test_cifar10_page_is_made_of_the_logs_that_are_kept(monkeypatch):
    """results/cifar10.md against what results/cifar10.py makes of them."""
    monkeypatch.chdir(ROOT)
    page = (RESULTS / "cifar10.md").read_text()
    note = re.search(r"`results/cifar10`\. (.*?) Top-1 in percent", page)[1]
    assert runpy.run_path("results/cifar10.py")["page"](note, "results/cifar10") == page


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
    """The README's ratios against results/speed.json; "nothing from --compile" is within a tenth."""
    steps = step_speeds()
    gains = {recipe: f"{speeds['ours'] / speeds['plain']:.2f}" for recipe, speeds in steps.items()}
    assert f"{gains['cifar10']} from channels_last" in readme()
    assert f"{gains['imagenet']} with ResNet-50" in readme()
    for speeds in steps.values():
        assert 0.9 < speeds["ours, compiled"] / speeds["ours"] < 1.1


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


def test_the_page_on_bf16_has_the_table_of_its_logs(monkeypatch):
    """results/bf16.md against what results/bf16.py makes of results/bf16; and the differences by seed."""
    monkeypatch.chdir(ROOT)
    page = (RESULTS / "bf16.md").read_text()
    assert runpy.run_path("results/bf16.py")["table"]() in page
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


def test_start_up_figures_are_those_in_results():
    """The time to list and the size of the names in results/operations.md, against drills/start_up.json."""
    found = read_json("drills/start_up.json")
    names = found["memory with the names, MiB"] - found["memory before, MiB"]
    assert f"{found['listing, s']:.0f} s" in words_of("results/operations.md")
    assert f"{names} MiB" in words_of("results/operations.md")
