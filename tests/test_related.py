"""related.py: SimSiam's neighbours, against loops in numpy, closed forms, and SimSiam itself.

    python -m pytest -q tests/test_related.py       the quick ones
    python -m tests.test_related                    writes the map in results/related.md

First come the facts that we typed from the papers and the authors' code; then each method's equations and
identities; what people got wrong; the optimisers; the program; the map from the papers to the code.
"""
import concurrent.futures
import copy
import functools
import itertools
import math
import re
import shlex
import sys
import threading
import types
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import augment
import related
import simsiam
import tests.helpers
from harness.data import opening, shapes
from harness.training import processes
from lineval import LARS
from results.pages import write_tables
from tests import world_related
from tests.claims import (arguments_for, check_claims, check_equation, check_it_dies, claims, equation_table,
                          module_with, mutant_of, the_test_called)
from tests.helpers import (CPU, ROOT, TINY, equal, here, interrupted_before, kill_when, log_of, losses_of,
                           refusal, save_image, slow, torchrun, vectors)

pytest_plugins = ["tests.fixtures"]
METHODS = ["simclr", "mocov2", "byol", "swav"]
ALL = [*METHODS, "clip"]


# ------------------------------------------------------------------------------------------------------------
# Typed from the papers, and from the authors' code
# ------------------------------------------------------------------------------------------------------------

AUTHORS = {  # for ImageNet; heads and batches as in SimSiam's Table 4
    "simclr": dict(
        arch="resnet50", proj_layers=3, proj_hidden=2048, dim=128, predictor="none", temperature=0.1,
        affine=True, bn=(1, 1, 1, 0), optimizer="lars-inside", base_lr=0.3, batch=4096, weight_decay=1e-6,
        warmup=10, momentum=0.9, last_bn=0, area=(0.08, 1), strength=(0.8, 0.8, 0.8, 0.2), jitter=0.8,
        gray=0.2, blur=0.5),
    "mocov2": dict(
        arch="resnet50", proj_layers=2, proj_hidden=2048, dim=128, predictor="none", bn=(0, 0, 1, 0),
        temperature=0.2, queue=65536, tau=0.999, last_bn=1, optimizer="sgd", base_lr=0.03, batch=256,
        weight_decay=1e-4, warmup=0, momentum=0.9, area=(0.2, 1), strength=(0.4, 0.4, 0.4, 0.1), jitter=0.8,
        gray=0.2, blur=0.5),
    "byol": dict(
        arch="resnet50", proj_layers=2, proj_hidden=4096, dim=256, predictor="mlp", pred_dim=4096,
        bn=(1, 0, 1, 0), tau=0.99, tau_rises=True, last_bn=1, optimizer="lars-outside", base_lr=0.45,
        batch=4096, weight_decay=1e-6, warmup=10, momentum=0.9, area=(0.08, 1),
        strength=(0.4, 0.4, 0.2, 0.1), jitter=0.8, gray=0.2),
    "swav": dict(
        arch="resnet50", proj_layers=3, proj_hidden=2048, dim=128, predictor="none", bn=(1, 0, 1, 0),
        temperature=0.1, prototypes=3000, eps=0.05, iterations=3, freeze=1, last_bn=1, optimizer="larc",
        base_lr=0.3,
        lr_end=0.001, batch=4096, weight_decay=1e-6, warmup=10, momentum=0.9, area=(0.08, 1),
        strength=(0.8, 0.8, 0.8, 0.2), jitter=0.8, gray=0.2, blur=0.5)}

RESULTS = {  # SimSiam's Table 4, Sec. 6.2, footnote 2, supplement D; BYOL's Table 21
    "simclr": ({}, "66.5"),
    "table4-simclr-100-epochs": (dict(epochs=100), "66.5"),
    "table4-simclr-200-epochs": (dict(epochs=200), "68.3"),
    "table4-simclr-400-epochs": (dict(epochs=400), "69.8"),
    "table4-simclr-800-epochs": (dict(epochs=800), "70.4"),
    "sec62-simclr": ({}, "66.5"),
    "sec62-simclr-predictor": (dict(predictor="mlp", stopgrad=False), "66.4"),
    "sec62-simclr-predictor-stopgrad": (dict(predictor="mlp", stopgrad=True), "66.0"),
    "suppD-simclr": ({}, "91.1"),
    "mocov2": ({}, "67.4"),
    "table4-mocov2-100-epochs": (dict(epochs=100), "67.4"),
    "table4-mocov2-200-epochs": (dict(epochs=200), "69.9"),
    "table4-mocov2-400-epochs": (dict(epochs=400), "71.0"),
    "table4-mocov2-800-epochs": (dict(epochs=800), "72.2"),
    "byol": ({}, "66.5"),
    "table4-byol-100-epochs": (dict(epochs=100, base_lr=0.45, weight_decay=1e-6, tau=0.99), "66.5"),
    "table4-byol-200-epochs": (dict(epochs=200, base_lr=0.3, weight_decay=1e-6, tau=0.99), "70.6"),
    "table4-byol-400-epochs": (dict(epochs=400, base_lr=0.3, weight_decay=1e-6, tau=0.99), "73.2"),
    "table4-byol-800-epochs": (dict(epochs=800, base_lr=0.2, weight_decay=1.5e-6, tau=0.996), "74.3"),
    "byol-tau-0": (dict(epochs=300, base_lr=0.3, tau=0, tau_rises=False, pred_lr_times=1), "5.5"),
    "fn2-byol-tau-0": (dict(epochs=300, base_lr=0.3, tau=0, tau_rises=False, pred_lr_times=10), "66.9"),
    "swav": ({}, "66.5"),
    "table4-swav-100-epochs": (dict(epochs=100), "66.5"),
    "table4-swav-200-epochs": (dict(epochs=200), "69.1"),
    "table4-swav-400-epochs": (dict(epochs=400), "70.7"),
    "table4-swav-800-epochs": (dict(epochs=800), "71.8"),
    "sec62-swav": ({}, "66.5"),
    "sec62-swav-predictor": (dict(predictor="mlp", stopgrad=True), "65.2"),
    "sec62-swav-without-stopgrad": (dict(predictor="none", stopgrad=False), "diverges")}

# What a method cannot do without, beside SimSiam's own settings: the only ones by which small recipes differ.
NEEDED = {
    "simclr": {"temperature", "stopgrad"},
    "mocov2": {"temperature", "queue", "tau"},
    "byol": {"tau", "tau_rises", "pred_lr_times", "base_lr"},        # its loss is 4 times as steep
    "swav": {"temperature", "prototypes", "eps", "iterations", "freeze", "lr_end", "stopgrad"}}


settings_of_row = functools.partial(tests.helpers.settings_of_row, related)


@pytest.mark.parametrize("name", METHODS)
def test_recipes_for_imagenet_are_the_authors(name):
    """The settings of a run that names nothing else against the table above."""
    run = settings_of_row(name, "imagenet")
    assert {key: run[key] for key in AUTHORS[name]} == AUTHORS[name]
    assert run["pred_lr"] == "cosine" or name == "mocov2"            # which has no predictor


@pytest.mark.parametrize("recipe", ["cifar10", "shapes"])
@pytest.mark.parametrize("name", METHODS)
def test_small_recipes_are_simsiams_but_for_what_a_method_needs(name, recipe):
    """Against SimSiam's own recipe: one comparison under one roof (supplement D)."""
    own = simsiam.recipe(recipe)
    run = settings_of_row(name, recipe)
    changed = {key for key in related.METHODS[name].SETTINGS if run[key] != own.get(key)}
    expected = set(NEEDED[name])
    if recipe == "shapes" and name in ("mocov2", "byol"):            # for the time that a step takes
        expected.add("epochs")
    if (recipe, name) == ("shapes", "swav"):                         # a seed failed at SimSiam's
        expected.add("base_lr")
    assert changed - {"predictor", "optimizer", "last_bn"} == expected
    assert run["last_bn"] == 0
    assert run["predictor"] == ("mlp" if name == "byol" else "none")
    assert run["optimizer"] == "sgd"
    assert run["cifar_stem"]                                         # no max-pool on 32 pixels


def test_experiments_are_the_papers_rows():
    """Against the table above; each belongs to one method."""
    rows = [name for method in related.METHODS.values() for name in method.EXPERIMENTS]
    assert rows == [*RESULTS, "clip"]


@pytest.mark.parametrize("experiment", RESULTS)
def test_experiments_hold_the_papers_settings_and_results(experiment):
    """Each row against the table above; nothing else changes against its method."""
    expected, top1 = RESULTS[experiment]
    args = related.parse(["--experiment", experiment])
    row = settings_of_row(experiment, "imagenet")
    baseline = settings_of_row(args.method.NAME, "imagenet")
    assert {key: row[key] for key in expected} == expected
    assert {key for key in row if row[key] != baseline[key]} - {"experiment"} <= expected.keys()
    assert top1 in args.method.EXPERIMENTS[experiment][1]


def test_a_small_recipe_keeps_its_own_lr_in_a_row_of_imagenets_recipes():
    """BYOL's recipes by length are for LARS on ImageNet; what makes the row stays."""
    own = simsiam.recipe("cifar10", related.BYOL.SETTINGS)
    row = settings_of_row("fn2-byol-tau-0", "cifar10")
    assert (row["base_lr"], row["weight_decay"]) == (own["base_lr"], own["weight_decay"])
    assert (row["tau"], row["tau_rises"], row["pred_lr_times"]) == (0, False, 10)


# ------------------------------------------------------------------------------------------------------------
# SimCLR
# ------------------------------------------------------------------------------------------------------------

def brute_nt_xent(z1, z2, t):
    """SimCLR Eq. (1) and its mean, one pair after the other, in numpy."""
    z = np.concatenate([z1.detach().numpy(), z2.detach().numpy()])
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    n = len(z1)
    losses = []
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        others = sum(math.exp(z[i] @ z[k] / t) for k in range(2 * n) if k != i)
        losses.append(-math.log(math.exp(z[i] @ z[j] / t) / others))
    return np.mean(losses)


@pytest.mark.parametrize("t", [0.1, 0.5, 1.0])
def test_simclr_eq1_is_a_double_loop(t):
    """Against the loop; float64 stays float64."""
    z1, z2, *_ = vectors(n=7, d=5)
    L = related.nt_xent(z1, z2, t)
    assert L.dtype == torch.float64
    assert L.item() == pytest.approx(brute_nt_xent(z1, z2, t), rel=1e-12)


def test_nt_xent_doesnt_see_what_it_must_not():
    """Symmetric; the same for other lengths, one rotation of all, one order of the images."""
    z1, z2, *_ = (z.detach() for z in vectors(n=7, d=5))
    L = related.nt_xent(z1, z2, 0.5)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    same = [(z2, z1), (3 * z1, z2 * torch.rand(7, 1).double()), (z1 @ rotation, z2 @ rotation),
            (z1[order], z2[order])]
    for a, b in same:
        assert related.nt_xent(a, b, 0.5).item() == pytest.approx(L.item(), rel=1e-12)
    assert abs(related.nt_xent(z1, z2[order], 0.5) - L) > 0.1         # but for which belong together


@pytest.mark.parametrize("n, t", [(6, 0.5), (9, 0.1)])
def test_nt_xents_range(n, t):
    """Collapsed, log(2N - 1); at a simplex, the minimum that the curves start from."""
    same = torch.ones(n, 4, dtype=torch.float64)
    assert related.nt_xent(same, same, t).item() == pytest.approx(math.log(2 * n - 1), rel=1e-12)
    simplex = torch.eye(n, dtype=torch.float64) - 1 / n
    at_best = related.nt_xent(simplex, 2 * simplex, t).item()
    assert at_best == pytest.approx(method_of("simclr", batch=n, temperature=t).minimum, rel=1e-12)
    z1, z2, *_ = vectors(n=n, d=n)
    assert related.nt_xent(z1, z2, t) > at_best


def test_simclrs_loss_has_its_gradient():
    """Against differences of the loop: all 2N vectors take part, none is a constant."""
    z1, z2, *_ = vectors(n=4, d=3)
    gradient, _ = torch.autograd.grad(related.nt_xent(z1, z2, 0.5), [z1, z2])
    h = 1e-6
    for i, k in itertools.product(range(4), range(3)):
        up, down = z1.detach().clone(), z1.detach().clone()
        up[i, k] += h
        down[i, k] -= h
        slope = (brute_nt_xent(up, z2, 0.5) - brute_nt_xent(down, z2, 0.5)) / (2 * h)
        assert gradient[i, k].item() == pytest.approx(slope, abs=1e-8)


def test_sec62_with_h_the_identity_is_simclr_and_half_its_gradient_with_stopgrad():
    """Sec. 4.2's argument, for NT-Xent."""
    z1, z2, *_ = vectors(n=5, d=4)
    plain = method_of("simclr")
    with_h = method_of("simclr", predictor="mlp")
    with_both = method_of("simclr", predictor="mlp", stopgrad=True)
    losses = [method.loss(z1, z2, z1, z2) for method in (plain, with_h, with_both)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-12)
    assert losses[2].item() == pytest.approx(losses[0].item(), rel=1e-12)
    whole, same, half = (torch.autograd.grad(L, [z1, z2]) for L in losses)
    for g, g_same, g_half in zip(whole, same, half):
        assert torch.allclose(g, g_same, atol=1e-14)
        assert torch.allclose(g, 2 * g_half, atol=1e-14)


@pytest.mark.parametrize("arch, last", [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_last_bn_is_the_scale_that_residual_blocks_start_with(arch, last):
    """By name: the last BN of each block, and no other."""
    for value in (0.0, 1.0):
        model = method_of("byol", arch=arch, last_bn=value).model
        for name, w in model.encoder.named_parameters():
            if re.search(r"bn\d\.weight$", name):
                expected = value if name.startswith("layer") and f".{last}." in name else 1.0
                assert (w == expected).all(), name


def test_simclrs_output_bn_has_a_scale_and_no_offset():
    """Of the recipe for ImageNet: the offset exists, and stays 0."""
    model = method_of("simclr", affine=True).model
    assert model.encoder.fc[-1].weight.requires_grad
    assert not model.encoder.fc[-1].bias.requires_grad
    assert not model.encoder.fc[-1].bias.any()


# ------------------------------------------------------------------------------------------------------------
# MoCo v2, and the momentum encoder
# ------------------------------------------------------------------------------------------------------------

def queue_of(K, d, seed=5):
    """(K, d) unit rows in float64."""
    rows = torch.randn(K, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows / rows.norm(dim=1, keepdim=True)


def test_moco_v2_eq1_is_a_softmax_over_one_and_k():
    """Against a loop in numpy; no gradient flows into keys or queue."""
    q, k, *_ = vectors(n=6, d=5)
    queue = queue_of(11, 5).requires_grad_()
    L = related.info_nce(q, k, queue, 0.2)
    expected = []
    for a, b in zip(q.detach().numpy(), k.detach().numpy()):
        a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
        positive = math.exp(a @ b / 0.2)
        negatives = sum(math.exp(a @ row / 0.2) for row in queue.detach().numpy())
        expected.append(-math.log(positive / (positive + negatives)))
    assert L.item() == pytest.approx(np.mean(expected), rel=1e-12)
    L.backward()
    assert q.grad.abs().max() > 0
    assert k.grad is None


def test_info_nces_range():
    """All cosines equal: log(1 + K). Negatives opposite to it: the minimum that the curves start from."""
    q = torch.ones(3, 4, dtype=torch.float64)
    queue = torch.full((32, 4), 0.5, dtype=torch.float64)
    assert related.info_nce(q, q, queue, 0.2).item() == pytest.approx(math.log(33), rel=1e-12)
    at_best = related.info_nce(q, q, -queue, 0.2).item()
    assert at_best == pytest.approx(method_of("mocov2", queue=32, temperature=0.2).minimum, rel=1e-9)


def test_info_nce_with_the_batchs_other_keys_is_one_direction_of_cross_entropy():
    """Against cross-entropy of q k^T / t with the diagonal as labels."""
    q, k, *_ = (v.detach() for v in vectors(n=6, d=5))
    q, k = (v / v.norm(dim=1, keepdim=True) for v in (q, k))
    expected = torch.nn.functional.cross_entropy(q @ k.T / 0.3, torch.arange(6))
    one_by_one = []
    for i in range(6):
        others = torch.cat([k[:i], k[i + 1:]])
        one_by_one.append(related.info_nce(q[i:i + 1], k[i:i + 1], others, 0.3))
    assert torch.stack(one_by_one).mean().item() == pytest.approx(expected.item(), rel=1e-12)


def two_networks():
    """A pair of networks of other weights, with BN, in float64."""
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).double())
    return made


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.99, 1.0])
def test_byol_eq1_moves_the_target_towards_the_online_network(tau):
    """Against numpy, three times: with the online network constant, what is between them shrinks by tau."""
    target, online = two_networks()
    before = [w.detach().numpy().copy() for w in target.parameters()]
    statistics = {name: t.clone() for name, t in target.named_buffers()}
    online.train()(torch.randn(5, 3, dtype=torch.float64))            # its statistics are others now
    for _ in range(3):
        related.momentum_update(target, online, tau)
    for w, start, theta in zip(target.parameters(), before, online.parameters()):
        theta = theta.detach().numpy()
        assert np.allclose(w.detach().numpy(), theta + tau ** 3 * (start - theta), rtol=1e-12, atol=1e-15)
        if tau in (0, 1):
            assert (w.detach().numpy() == (start if tau else theta)).all()
    assert equal(dict(target.named_buffers()), statistics)            # parameters only


def steps_of(name, steps, **more):
    """A method in training: yields (method, views, objective) before each step, which it then makes."""
    torch.manual_seed(0)
    method = method_of(name, **more)
    method.model.double()
    optimizer = method.optimizer()
    parts = method.parts(CPU)
    views = itertools.islice(itertools.cycle(world_related.views(method.views)), steps)
    stream = method.stream(lambda batches: batches, views, parts, 0, world_related.NO_AUTOCAST)
    for step, (x, objective) in enumerate(stream):
        yield method, x, objective
        method.set_lr(optimizer, step)
        simsiam.train_step(method.model, objective, optimizer, world_related.NO_AUTOCAST, x)
        method.after_step(step)


def method_of(name, **more):
    """A method with a tiny model, in this process alone."""
    made = not torch.distributed.is_initialized()
    if made:
        processes.join_world(CPU)
    torch.manual_seed(0)
    method = related.METHODS[name](world_related.settings(name, **more), world_related.data())
    method.build()
    return method


@pytest.fixture(autouse=True)
def no_world_left():
    """method_of may have made one."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_mocos_queue_holds_the_last_keys_the_oldest_go_first():
    """Against a list: keys enter after the step, view 1's before view 2's; K / 2N steps replace all."""
    kept = None
    for step, (method, x, objective) in enumerate(steps_of("mocov2", 5, queue=96)):
        queue = method.queue
        if kept is None:
            kept = list(queue.rows.clone())
            at_first = torch.stack(kept)
        from_the_oldest = torch.roll(queue.rows, -32 * step, dims=0)
        assert torch.allclose(from_the_oldest, torch.stack(kept), atol=1e-12)
        target = copy.deepcopy(method.target)                         # as it makes this step's keys
        with torch.no_grad():
            keys = [target(view) for view in x]
        for k in torch.cat(keys):
            kept = [*kept[1:], k / k.norm()]
    assert not any((row == at_first).all(dim=1).any() for row in torch.stack(kept))


def test_mocos_directions_meet_the_same_queue():
    """The loss of a step against info_nce of both directions on the queue as it is before the step."""
    for method, x, objective in steps_of("mocov2", 3):
        before = method.queue.rows.clone()
        p, z = method.model(*x)
        k1, k2 = method.keys
        t = method.s["temperature"]
        expected = (related.info_nce(z[0], k2, before, t) + related.info_nce(z[1], k1, before, t)) / 2
        assert objective(*p, *z).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("name", ["mocov2", "byol"])
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_target_with_tau_1_never_moves_and_with_tau_0_is_the_online_network(name, tau):
    """Bit for bit, over three steps."""
    still = {"tau_rises": False} if name == "byol" else {}
    start = None
    for method, _, _ in steps_of(name, 4, tau=tau, **still):
        start = start or copy.deepcopy(method.target)
        expected = start if tau == 1 else method.model.encoder
        for w, other in zip(method.target.parameters(), expected.parameters()):
            assert torch.equal(w, other)
            assert not w.requires_grad


def test_a_queue_that_the_keys_dont_fill_evenly_is_refused():
    """K must be a multiple of 2N, or the oldest keys would be replaced in part."""
    with pytest.raises(related.Refused, match="--queue 100: twice the batch, 32 keys a step"):
        related.MoCoV2.check({"queue": 100, "batch": 16})


def test_a_queue_longer_than_the_data_is_told(tmp_path, small, capsys):
    """50 images, 96 keys: the start block says that an image's own old keys are negatives."""
    assert run("mocov2", small, tmp_path / "run") is None
    assert "an image's own older keys are among its negatives" in " ".join(capsys.readouterr().out.split())


# ------------------------------------------------------------------------------------------------------------
# BYOL
# ------------------------------------------------------------------------------------------------------------

def byol_loss(p1, p2, target1, target2):
    """BYOL's objective for given targets."""
    method = method_of("byol")
    with mock.patch.object(method, "targets", lambda views, autocast: [target1, target2]):
        return method.objective(None, None)(p1, p2, None, None)


def test_byol_eq2_is_the_squared_distance_of_both_directions():
    """Against numpy: |p/|p| - z'/|z'||^2, summed over directions; and 4 + 4 times SimSiam's loss."""
    p1, p2, z1, z2 = vectors()
    L = byol_loss(p1, p2, z1, z2)
    expected = 0
    for pair in ((p1, z2), (p2, z1)):
        arrays = [v.detach().numpy() for v in pair]
        p, z = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in arrays)
        expected += ((p - z) ** 2).sum(axis=1).mean()
    assert L.item() == pytest.approx(expected, rel=1e-12)
    assert L.item() == pytest.approx(4 + 4 * simsiam.loss(p1, p2, z1, z2).item(), rel=1e-12)
    L.backward()
    assert z1.grad is None and z2.grad is None
    assert byol_loss(p1, p1, p1, p1).item() == pytest.approx(0, abs=1e-12)
    assert byol_loss(p1, p1, -p1, -p1).item() == pytest.approx(8, rel=1e-12)


def test_byol_with_tau_0_has_four_times_simsiams_gradient():
    """In train mode BN uses the batch: the target's z are the online z. Each step's gradients."""
    for method, x, objective in steps_of("byol", 3, tau=0.0, tau_rises=False):
        gradients = []
        for loss in (objective, simsiam.loss):
            model = copy.deepcopy(method.model)
            p, z = model(*x)
            gradients.append(torch.autograd.grad(loss(*p, *z), list(model.parameters())))
        for byols, simsiams in zip(*gradients):
            assert torch.allclose(byols, 4 * simsiams, rtol=1e-9, atol=1e-11)


def test_tau_rises_to_1_by_half_a_cosine():
    """At the start, in the middle, at the end: by the run's steps."""
    method = method_of("byol", tau=0.9)
    assert method.total_steps == 9
    assert method.tau(0) == pytest.approx(0.9)
    assert method.tau(4.5) == pytest.approx(0.95)
    assert method.tau(9) == 1
    taus = [method.tau(step) for step in range(10)]
    assert taus == sorted(taus)
    assert taus[3] == pytest.approx(1 - 0.1 * (math.cos(math.pi / 3) + 1) / 2)


# ------------------------------------------------------------------------------------------------------------
# SwAV
# ------------------------------------------------------------------------------------------------------------

def some_scores(B=9, K=4, seed=3):
    """Cosines in float64."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.uniform(-1, 1, size=(B, K)))


def sinkhorn_in_numpy(scores, eps, iterations):
    """As SwAV's listing has it, with its marginals: Q (K, B), times B, transposed."""
    Q = np.exp(scores.T / eps)
    Q /= Q.sum()
    K, B = Q.shape
    for _ in range(iterations):
        Q *= (1 / K / Q.sum(axis=1))[:, None]
        Q *= (1 / B / Q.sum(axis=0))[None, :]
    return (B * Q).T


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_swav_eq5_is_the_listings_loop(iterations):
    """Against the loop in numpy; each image's code sums to 1 after any number of iterations."""
    scores = some_scores().requires_grad_()
    q = related.sinkhorn(scores, 0.05, iterations)
    assert q.dtype == torch.float64
    assert not q.requires_grad
    assert np.allclose(q.numpy(), sinkhorn_in_numpy(scores.detach().numpy(), 0.05, iterations), rtol=1e-10)
    assert torch.allclose(q.sum(dim=1), torch.ones(9).double(), atol=1e-13)


def test_sinkhorns_identities():
    """Log odds are the scores'; constants for all or for a prototype change nothing; equal: uniform."""
    scores = some_scores()
    q = related.sinkhorn(scores, 0.3, 3)
    log_q = q.log()
    for i, j, k, l in ((0, 1, 2, 3), (4, 8, 0, 1)):
        odds = log_q[i, k] + log_q[j, l] - log_q[i, l] - log_q[j, k]
        of_scores = (scores[i, k] + scores[j, l] - scores[i, l] - scores[j, k]) / 0.3
        assert odds.item() == pytest.approx(of_scores.item(), abs=1e-12)
    for constant in (5.0, torch.tensor([1.0, -2.0, 0.5, 7.0])):
        assert torch.allclose(related.sinkhorn(scores + constant, 0.3, 3), q, atol=1e-12)
    per_image = torch.linspace(-1, 1, 9).double()[:, None]           # in the limit alone
    assert not torch.allclose(related.sinkhorn(scores + per_image, 0.3, 3), q, atol=1e-3)
    limits = [related.sinkhorn(s, 0.3, 500) for s in (scores, scores + per_image)]
    assert torch.allclose(*limits, atol=1e-9)
    uniform = related.sinkhorn(torch.full((9, 4), 0.7), 0.05, 3)
    assert torch.allclose(uniform, torch.full((9, 4), 0.25), atol=1e-6)


def test_sinkhorns_limits():
    """Many iterations: prototypes share evenly. Large eps: uniform. Small eps, K = B: a permutation."""
    scores = some_scores()
    even = torch.full((4,), 9 / 4).double()
    assert torch.allclose(related.sinkhorn(scores, 0.3, 200).sum(dim=0), even)
    assert not torch.allclose(related.sinkhorn(scores, 0.3, 3).sum(dim=0), even)
    assert torch.allclose(related.sinkhorn(scores, 1e3, 3), torch.full((9, 4), 0.25).double(), atol=1e-3)
    codes = related.sinkhorn(some_scores(6, 6), 1e-3, 5000)
    assert torch.allclose(codes, codes.round(), atol=1e-2)
    assert torch.equal(codes.round().sum(dim=0), torch.ones(6).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_codes_are_finite_in_any_precision(dtype):
    """exp(1 / 0.03) is 3e14, beyond half precision; a score of -1 there is e^-67 of that."""
    scores = some_scores(64, 8).to(dtype)
    scores[0] = -1
    q = related.sinkhorn(scores, 0.03, 3)
    assert q.dtype == torch.float32
    assert torch.allclose(q.sum(dim=1), torch.ones(64), atol=1e-5)
    assert np.allclose(q.numpy(), sinkhorn_in_numpy(scores.double().numpy(), 0.03, 3), atol=1e-4)


def objective_of_codes(Q, scores, eps):
    """What the codes Q (K, B) maximise."""
    entropy = -(Q * np.log(Q)).sum()
    return np.trace(Q.T @ scores.T) + eps * entropy                   # SwAV Eq. (3): similarity and entropy


def marginals(Q):
    """The sums of the prototypes' rows and of the images' columns, in units of what they are to be."""
    K, B = Q.shape
    return K * Q.sum(axis=1), B * Q.sum(axis=0)                       # SwAV Eq. (4): an equal partition


def test_swav_eq3_the_codes_are_at_the_maximum():
    """After many iterations: every small way from there that keeps all sums lowers the objective."""
    scores = some_scores().numpy()
    Q = related.sinkhorn(torch.from_numpy(scores), 1.0, 500).numpy().T / 9
    best = objective_of_codes(Q, scores, 1.0)
    rng = np.random.default_rng(0)
    for _ in range(50):
        way = rng.normal(size=Q.shape)
        way -= way.mean(axis=0)
        way -= way.mean(axis=1, keepdims=True)
        for size in (1e-4, -1e-4):
            assert objective_of_codes(Q + size * way, scores, 1.0) < best


def test_swav_eq4_the_codes_are_an_equal_partition():
    """After many iterations, both marginals; after three, the images' alone."""
    scores = some_scores()
    for iterations, even in ((500, True), (3, False)):
        rows, columns = marginals(related.sinkhorn(scores, 0.3, iterations).numpy().T / 9)
        assert np.allclose(rows, 1, atol=1e-9) == even
        assert np.allclose(columns, 1, atol=1e-12)


def test_swav_eq2_is_a_cross_entropy():
    """Against numpy, one image after the other."""
    s, q = some_scores(), related.sinkhorn(some_scores(seed=4), 0.3, 3)
    expected = []
    for scores, code in zip(s.numpy(), q.numpy()):
        p = np.exp(scores / 0.1) / np.exp(scores / 0.1).sum()
        expected.append(-sum(code[k] * math.log(p[k]) for k in range(4)))
    assert related.swapped(s, q, 0.1).item() == pytest.approx(np.mean(expected), rel=1e-12)


def test_swav_eq1_swaps_the_codes():
    """Against codes and cross-entropies by hand: view 1's scores with view 2's codes. The mean of both."""
    method = method_of("swav")
    _, prototypes = method.model.predictor
    z1, z2, *_ = vectors(n=8, d=16)
    method.model.double()
    s1, s2 = prototypes(z1), prototypes(z2)
    eps = method.s["eps"]
    codes = [torch.from_numpy(sinkhorn_in_numpy(s.detach().numpy(), eps, 3)) for s in (s1, s2)]
    t = method.s["temperature"]
    expected = (related.swapped(s1, codes[1], t) + related.swapped(s2, codes[0], t)) / 2
    L = method.loss(s1, s2, z1, z2)
    assert L.item() == pytest.approx(expected.item(), rel=1e-9)
    gradient, = torch.autograd.grad(L, prototypes.weight, retain_graph=True)
    by_hand, = torch.autograd.grad(expected, prototypes.weight)
    assert torch.allclose(gradient, by_hand, atol=1e-12)              # none through the codes
    assert gradient.abs().max() > 0


def test_swavs_predictor_predicts_z_and_the_codes_are_those_of_z():
    """Sec. 6.2's row: p is the cosines of h(z) with the prototypes, q comes from those of z."""
    method = method_of("swav", predictor="mlp")
    method.model.double()
    h, prototypes = method.model.predictor
    z1, z2, *_ = vectors(n=8, d=16)
    p1, p2 = method.model.predictor(z1), method.model.predictor(z2)
    c = F.normalize(prototypes.weight, dim=1)
    for p, z in ((p1, z1), (p2, z2)):
        assert not torch.allclose(h(z), z)
        assert torch.allclose(p, F.normalize(h(z), dim=1) @ c.T, atol=1e-12)
    q1, q2 = (method.codes(F.normalize(z, dim=1) @ c.T) for z in (z1, z2))
    t = method.s["temperature"]
    expected = (related.swapped(p1, q2, t) + related.swapped(p2, q1, t)) / 2
    assert method.loss(p1, p2, z1, z2).item() == pytest.approx(expected.item(), rel=1e-9)
    parts = method.modules()
    assert parts["predictor"] is h and parts["prototypes"] is prototypes


def test_swavs_range():
    """Collapsed, log K; never below the mean entropy of the codes."""
    scores = torch.full((6, 5), 0.3, dtype=torch.float64)
    q = related.sinkhorn(scores, 0.05, 3)
    assert related.swapped(scores, q, 0.1).item() == pytest.approx(math.log(5), rel=1e-12)
    codes = related.sinkhorn(some_scores(), 0.3, 3)
    entropy = -(codes * codes.log()).sum(dim=1).mean()
    assert related.swapped(0.1 * codes.log(), codes, 0.1).item() == pytest.approx(entropy.item(), rel=1e-12)
    assert related.swapped(some_scores(seed=8), codes, 0.1) > entropy


def test_scores_are_cosines_without_a_bias():
    """Of z and prototypes of any length: at most 1 in size, and 1 for a prototype itself."""
    prototypes = related.Prototypes(5, 7)
    assert [name for name, _ in prototypes.named_parameters()] == ["weight"]
    scores = prototypes(1e4 * torch.randn(20, 5))
    assert scores.abs().max() <= 1 + 1e-6
    assert torch.allclose(prototypes(3 * prototypes.weight).diagonal(), torch.ones(7), atol=1e-6)


def test_without_stopgrad_the_gradient_goes_through_every_iteration():
    """Against differences of the loss, which has the loop in it."""
    method = method_of("swav", stopgrad=False)
    method.model.double()
    _, prototypes = method.model.predictor

    def value(z1, z2):
        return method.loss(prototypes(z1), prototypes(z2), z1, z2)

    z1, z2, *_ = vectors(n=5, d=16)
    assert torch.autograd.gradcheck(value, (z1, z2))
    with_stopgrad = method_of("swav")
    with_stopgrad.model.double()
    L = with_stopgrad.loss(with_stopgrad.model.predictor(z1), with_stopgrad.model.predictor(z2), z1, z2)
    other, = torch.autograd.grad(L, z1)
    own, = torch.autograd.grad(value(z1, z2), z1)
    assert (own - other).abs().max() > 1e-3


@pytest.mark.parametrize("optimizer", ["sgd", "larc"])
def test_prototypes_are_frozen_in_the_first_epoch(optimizer):
    """freeze 1, three steps an epoch: prototypes move from the fourth step on, all else from the first. Their
    first step is that of one gradient: no momentum has gathered."""
    for step, (method, x, objective) in enumerate(steps_of("swav", 5, freeze=1, optimizer=optimizer)):
        if step == 0:
            start = copy.deepcopy(method.model)
        frozen = torch.equal(method.model.predictor.prototypes.weight, start.predictor.prototypes.weight)
        assert frozen == (step <= 3)
        moved = not torch.equal(method.model.encoder.conv1.weight, start.encoder.conv1.weight)
        assert moved == (step >= 1)
        if step == 3:
            w = method.model.predictor.prototypes.weight
            p, z = copy.deepcopy(method.model)(*x)
            gradient, = torch.autograd.grad(method.loss(*method.model(*x)[0], *z), w)
            first = gradient + method.s["weight_decay"] * w.detach()
        if step == 4:
            way = start.predictor.prototypes.weight - method.model.predictor.prototypes.weight
            assert torch.cosine_similarity(way.flatten(), first.flatten(), dim=0).item() == pytest.approx(1)


# ------------------------------------------------------------------------------------------------------------
# CLIP
# ------------------------------------------------------------------------------------------------------------

def test_clip_fig_3_is_cross_entropy_both_ways():
    """Against a loop in numpy; symmetric in image and text."""
    image, text, *_ = vectors(n=6, d=5)
    log_scale = torch.tensor(1.2, dtype=torch.float64)
    L = related.clip_loss(image, text, log_scale)
    i, t = (v.detach().numpy() for v in (image, text))
    i, t = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (i, t))
    losses = []
    for k in range(6):
        for a, b in ((i, t), (t, i)):
            logits = [math.exp(1.2) * (a[k] @ b[j]) for j in range(6)]
            losses.append(-math.log(math.exp(logits[k]) / sum(map(math.exp, logits))))
    assert L.item() == pytest.approx(np.mean(losses), rel=1e-12)
    assert related.clip_loss(text, image, log_scale).item() == pytest.approx(L.item(), rel=1e-12)


def test_clips_range():
    """Uninformative: log N. At best, a simplex. Captions that occur twice: never below log 2."""
    log_scale = torch.tensor(math.log(100.0), dtype=torch.float64)
    same = torch.ones(8, 4, dtype=torch.float64)
    assert related.clip_loss(same, same, log_scale).item() == pytest.approx(math.log(8), rel=1e-12)
    simplex = torch.eye(8, dtype=torch.float64) - 1 / 8
    for a in (1.0, 10.0):
        expected = math.log(1 + 7 * math.exp(-a * 8 / 7))
        found = related.clip_loss(simplex, simplex, torch.tensor(math.log(a), dtype=torch.float64))
        assert found.item() == pytest.approx(expected, rel=1e-12)
    twice = simplex.repeat(2, 1)
    assert related.clip_loss(twice, twice, log_scale).item() == pytest.approx(math.log(2), rel=1e-9)


def test_clip_with_the_diagonal_is_infonce_of_the_batch():
    """One direction: info_nce with the batch's other captions as a queue, at temperature 1 / scale."""
    image, text, *_ = (v.detach() for v in vectors(n=5, d=4))
    text = text / text.norm(dim=1, keepdim=True)
    image = image / image.norm(dim=1, keepdim=True)
    both = []
    for a, b in ((image, text), (text, image)):
        for k in range(5):
            others = torch.cat([b[:k], b[k + 1:]])
            both.append(related.info_nce(a[k:k + 1], b[k:k + 1], others, 0.25).item())
    L = related.clip_loss(image, text, torch.tensor(math.log(4.0), dtype=torch.float64))
    assert L.item() == pytest.approx(np.mean(both), rel=1e-12)


def test_clips_scale_is_learned_and_never_above_100():
    """It starts at 1 / 0.07, moves, and is clamped after each step."""
    for step, (method, _, _) in enumerate(steps_of("clip", 4, base_lr=16.0)):
        scale = method.model.log_scale.exp().item()
        if step == 0:
            assert scale == pytest.approx(1 / 0.07)
            start = scale
        else:
            assert scale != start
        assert 1 <= scale <= 100 * (1 + 1e-6)
    with torch.no_grad():
        method.model.log_scale.fill_(9.0)
    method.after_step(0)
    assert method.model.log_scale.exp().item() == pytest.approx(100)


def test_clips_text_is_the_mean_of_known_words():
    """Against numpy: order doesn't count, unknown words are left out, a text of unknown words is 0."""
    method = method_of("clip")
    texts = ["a small star", "star a small", "a small, SMALL star!", "a small xylophone star", "xylophone"]
    found = method.text_vectors(texts, CPU).detach().numpy()
    embeddings = method.model.words.weight.detach().numpy()
    number = {word: k for k, word in enumerate(sorted(method.vocabulary.words), 1)}
    for text, vector in zip(texts, found):
        known = [number[word] for word in re.findall(r"[a-z]+", text.lower()) if word in number]
        if not known:
            assert (vector == 0).all()
            continue
        mean = embeddings[known].mean(axis=0) @ method.model.project.weight.detach().numpy().T
        assert np.allclose(vector, mean / np.linalg.norm(mean), atol=1e-6)


def test_clips_figures_are_shares_of_the_right_ones():
    """Against loops in numpy, on 10 validation images with classes."""
    method = method_of("clip")
    data = world_related.data()
    settings = method.s | {"workers": 0}
    job = types.SimpleNamespace(val=data.val, train=data.train, device=CPU, settings=settings)
    job.test_views = lambda source, batches: augment.load_centres(
        source, augment.Policy(size=16), batches, CPU, 0)
    encoder = method.model.encoder.eval()
    found = method.measure(encoder, job, world_related.NO_AUTOCAST)
    (_, x), = job.test_views(data.val, [(0, np.arange(10))])
    with torch.no_grad():
        image = simsiam.l2_normalize(encoder(x)).numpy()
        text = method.text_vectors(data.val.captions, CPU).numpy()
        names = method.text_vectors([f"a {name}" for name in data.val.classes], CPU).numpy()
    hits = [data.val.captions[(image[i] @ text.T).argmax()] == data.val.captions[i] for i in range(10)]
    assert found["image_to_text"] == pytest.approx(10 * sum(hits))
    hits = [(image @ text[i]).argmax() == i for i in range(10)]
    assert found["text_to_image"] == pytest.approx(10 * sum(hits))
    hits = [(names @ image[i]).argmax() == data.val.labels[i] for i in range(10)]
    assert found["zero_shot"] == pytest.approx(10 * sum(hits))


def test_a_stand_in_brings_its_own_caption(tmp_path):
    """Of four images the second and the last are bad: what a step gets against the images that are shown."""
    kinds = ["disc", "star", "cross", "arrow"]
    for number, kind in enumerate(kinds):
        image = tmp_path / f"{number}.png"
        save_image(image, shapes.draw_shapes(0, number, 1, 16).image(0))
        if number in (1, 3):
            image.write_bytes(b"no image")
    text = "".join(f"{number}.png\t{kind}\n" for number, kind in enumerate(kinds))
    (tmp_path / "list.txt").write_text(text)
    opened = opening.open_captions(tmp_path / "list.txt")
    processes.join_world(CPU)
    method = related.CLIP(world_related.settings("clip"), opened)
    method.build()
    method.parts(CPU)
    x = torch.zeros(4, 3, 16, 16)
    (_, numbers), _ = next(method.stream(lambda batches: batches, iter([(np.arange(4), [x])]), {}, 0, None))
    words = [method.vocabulary.words[row[0] - 1] for row in numbers.tolist()]
    assert words == ["disc", "cross", "cross", "disc"]


def test_an_equal_caption_is_as_good_as_ones_own():
    """Three texts, two of them the same; the third is taken for another."""
    similarity = torch.tensor([[0.1, 0.9, 0.0], [0.2, 0.1, 0.0], [0.9, 0.0, 0.1]])
    assert related.share_right(similarity, ["a", "a", "b"]) == pytest.approx(100 * 2 / 3)


def test_resume_with_other_captions_is_refused(tmp_path, small):
    """The same images, another text."""
    captions = write_captions(small)
    options = [captions, *WITHOUT_HEADS, "--method", "clip", "--out", tmp_path / "run"]
    assert here("related.py", *options) is None
    captions.write_text(captions.read_text().replace("star", "comet").replace("disc", "comet"))
    assert "captions" in here("related.py", *options, "--resume")
    write_captions(small)


# ------------------------------------------------------------------------------------------------------------
# The optimisers
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lr_inside", [True, False])
def test_lars_of_simclr_and_byol_is_its_formula_step_by_step(lr_inside):
    """Against numpy at four lrs: a weight; a bias that is left out; zeros; a tensor without gradient."""
    torch.manual_seed(0)
    initial = torch.randn(4, 3), torch.randn(4), torch.zeros(2, 2), torch.ones(3)
    weights = [torch.nn.Parameter(t.double()) for t in initial]
    groups = [{"params": [weights[0], weights[2], weights[3]], "weight_decay": 0.1},
              {"params": [weights[1]], "adapted": False}]
    optimizer = related.JointLARS(groups, lr=0.0, momentum=0.9, lr_inside=lr_inside)
    expected = [w.detach().numpy().copy() for w in weights]
    velocity = [0.0, 0.0, 0.0]
    for lr in (1.6, 0.8, 0.3, 0.1):
        rng = np.random.default_rng(int(10 * lr))
        for k, w in enumerate(weights[:3]):
            g = rng.normal(size=w.shape)
            w.grad = torch.from_numpy(g.copy())
            if k != 1:
                g = g + 0.1 * expected[k]
                norm = np.sqrt((expected[k] ** 2).sum())
                g = g * (0.001 * norm / np.sqrt((g ** 2).sum()) if norm > 0 else 1)
            velocity[k] = 0.9 * velocity[k] + (lr * g if lr_inside else g)
            expected[k] = expected[k] - (velocity[k] if lr_inside else lr * velocity[k])
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        for w, value in zip(weights, expected):
            assert np.allclose(w.detach().numpy(), value, rtol=1e-12, atol=1e-15)
    assert abs(expected[2]).max() > 0                                # zeros were left
    assert (expected[3] == 1).all()                                  # no gradient, no step


@pytest.mark.parametrize("form", [LARS, related.JointLARS, related.FORMS["lars-inside"][0]])
def test_a_first_step_of_lars_is_as_long_as_the_weight_says(form):
    """lr x 0.001 x |w|, whatever the gradient's length, at weight decay 0 too."""
    for length in (1e-3, 1e3):
        w = torch.nn.Parameter(torch.randn(5, 4).double())
        start = w.detach().clone()
        w.grad = length * torch.randn(5, 4).double()
        form([w], lr=2.0, momentum=0.9).step()
        assert (w - start).norm().item() == pytest.approx(2 * 0.001 * start.norm().item(), rel=1e-4)


@pytest.mark.parametrize("lrs, same", [((0.5, 0.5, 0.5), True), ((0.5, 0.3, 0.1), False)])
def test_the_lrs_place_matters_with_a_schedule_alone(lrs, same):
    """Inside against outside the momentum."""
    ends = []
    for lr_inside in (True, False):
        generator = torch.Generator().manual_seed(0)
        w = torch.nn.Parameter(torch.randn(5, 4, generator=generator).double())
        optimizer = related.JointLARS([w], lr=0.0, momentum=0.9, lr_inside=lr_inside)
        for lr in lrs:
            w.grad = torch.randn(5, 4, generator=generator).double()
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        ends.append(w.detach())
    assert torch.allclose(*ends, rtol=1e-12, atol=0) == same


@pytest.mark.parametrize("name", METHODS)
def test_bn_and_biases_are_left_out_where_the_authors_do_so(name):
    """By module type: every BN, those in the heads too, and every bias; each parameter in one group."""
    method = method_of(name, optimizer=AUTHORS[name]["optimizer"], affine=name == "simclr")
    optimizer = method.optimizer()
    members = [w for group in optimizer.param_groups for w in group["params"]]
    assert len(members) == len({id(w) for w in members}) == len(list(method.model.parameters()))
    expected = set()
    for module in method.model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            expected |= {id(w) for w in module.parameters()}
        elif getattr(module, "bias", None) is not None:
            expected.add(id(module.bias))
    assert len(expected) > 40
    left_out = {id(w) for g in optimizer.param_groups if not g["adapted"] for w in g["params"]}
    assert left_out == (expected if name in ("simclr", "byol") else set())
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (method.s["weight_decay"] if group["adapted"] else 0)
    assert optimizer.param_groups[0]["module"] == "encoder"
    assert isinstance(optimizer, LARS) == (name != "mocov2")


def test_the_lr_warms_up_falls_to_its_end_and_is_another_for_the_predictor():
    """Against the formula: SwAV's last lr; BYOL's predictor at ten times the lr, constant or not."""
    def lrs(name, step, **more):
        method = method_of(name, epochs=10, warmup=2, **more)
        optimizer = method.optimizer()
        method.set_lr(optimizer, step)
        return {group["module"]: group["lr"] for group in optimizer.param_groups}

    lr = 1.0 * 16 / 256
    assert lrs("swav", 2, pred_lr="cosine")["encoder"] == pytest.approx(lr * 3 / 6)
    half = lr * (0.001 + 0.999 / 2)
    assert lrs("swav", 18, lr_end=0.001)["encoder"] == pytest.approx(half)
    assert lrs("swav", 30, lr_end=0.001)["encoder"] == pytest.approx(lr * 0.001)
    assert lrs("byol", 18, pred_lr="cosine", pred_lr_times=10)["predictor"] == pytest.approx(10 * lr / 2)
    assert lrs("byol", 18, pred_lr="constant", pred_lr_times=10)["predictor"] == pytest.approx(10 * lr)
    assert lrs("byol", 18)["encoder"] == pytest.approx(lr / 2)


# ------------------------------------------------------------------------------------------------------------
# Several processes
# ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Everything in tests/world_related.py, done by two processes."""
    file = tmp_path_factory.mktemp("two") / "result.pth"
    out = torchrun("-m", "tests.world_related", file, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    return torch.load(file)


def gap(one, two):
    """The largest difference between the parts of two runs, and between their losses."""
    (states, losses), (other_states, other_losses) = one, two
    gaps = [abs(a - b) for a, b in zip(losses, other_losses, strict=True)]
    for part, state in states.items():
        assert state.keys() == other_states[part].keys()
        gaps += [(state[k].double() - other_states[part][k].double()).abs().max().item() for k in state]
    return max(gaps)


@slow
@pytest.mark.parametrize("name, variant", [
    ("simclr", "right"),
    ("simclr", "with a predictor"),
    ("mocov2", "right"),
    ("byol", "right"),
    ("swav", "right"),
    ("swav", "with a predictor"),
    ("swav", "without stop-gradient"),
    ("clip", "right")])
def test_two_processes_equal_one_in_float64(two, world_of_one, name, variant):
    """Model, target, queue and losses after six steps, on other images in each process."""
    more = {"with a predictor": {"predictor": "mlp"}, "without stop-gradient": {"stopgrad": False}}
    one = world_related.train(name, **more.get(variant, {}))
    assert gap(one, two[name, variant]) < 1e-9


@slow
@pytest.mark.parametrize("name, variant", [(n, v) for n, wrong in world_related.WRONG.items() for v in wrong])
def test_what_people_got_wrong_with_several_processes_is_seen(two, world_of_one, name, variant):
    """Each wrong way of WRONG differs from one process, by far."""
    assert gap(world_related.train(name), two[name, variant]) > 1e-3


@pytest.mark.parametrize("eps", [0.3, 0.01])
def test_sinkhorn_of_two_halves_is_that_of_the_batch(eps):
    """Without processes: each half's call gets the other's sums, as two threads that wait for each other.

    One half has scores near 1, the other near -1: at eps 0.01 e^180 lies between them.
    """
    scores = some_scores(8, 4) * 0.1 + torch.tensor([0.9] * 4 + [-0.9] * 4).double()[:, None]
    barrier = threading.Barrier(2)
    on_the_table = [None, None]

    def half(rank):
        def exchange(t):
            on_the_table[rank] = t
            barrier.wait()
            total = on_the_table[0] + on_the_table[1]
            barrier.wait()
            return total

        mine = scores[4 * rank:4 * rank + 4]
        return related.sinkhorn(mine, eps, 3, exchange, rank, 2)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(half, [0, 1]))
    assert torch.allclose(torch.cat(halves), related.sinkhorn(scores, eps, 3), rtol=1e-9)


@pytest.mark.parametrize("world", [2, 3])
def test_nt_xents_gather_is_exact_for_each_process(world):
    """Without processes: in the place of a sum come all rows. The mean of all losses has one's gradient."""
    z1, z2, *_ = vectors(n=6, d=5)
    whole = related.nt_xent(z1, z2, 0.5)
    share = 6 // world
    losses = []
    for rank in range(world):
        mine = slice(rank * share, (rank + 1) * share)
        everybodys = iter([z / z.norm(dim=1, keepdim=True) for z in (z1, z2)])
        losses.append(related.nt_xent(z1[mine], z2[mine], 0.5, lambda t: next(everybodys), rank, world))
    mean = sum(losses) / world
    assert mean.item() == pytest.approx(whole.item(), rel=1e-12)
    for a, b in zip(torch.autograd.grad(whole, [z1, z2]), torch.autograd.grad(mean, [z1, z2])):
        assert torch.allclose(a, b, atol=1e-14)


# ------------------------------------------------------------------------------------------------------------
# The program
# ------------------------------------------------------------------------------------------------------------

RUN = [*TINY, *shlex.split("--recipe cifar10 --epochs 1 --knn-every 0 --workers 0")]
FIT = {"mocov2": ["--queue", "96"], "swav": ["--prototypes", "8"]}   # for batches of 16, and of 6


WITHOUT_HEADS = shlex.split("--arch resnet18 --cifar-stem --width 1/16 --dim 16 --batch 16 --epochs 1 "
                            "--size 16 --recipe cifar10 --knn-every 1 --workers 0")


def options_of(name, data):
    """The options of a small run of this method, or experiment."""
    if name == "clip":
        return [write_captions(data), *WITHOUT_HEADS, "--method", "clip"]
    what = ["--method", name] if name in METHODS else ["--experiment", name]
    method = next(m for m in METHODS if m in name)
    return [data, *RUN, *FIT.get(method, []), *what]


def write_captions(folder):
    """A list of a folder's training images with captions -> its path."""
    images = sorted((folder / "train").rglob("*.png"))
    captions = shapes.draw_shapes(9, 0, len(images)).captions
    path = folder / "captions.txt"
    path.write_text("".join(f"{image}\t{caption}\n" for image, caption in zip(images, captions)))
    return path


def run(name, data, out, *more):
    """A run of this method, or experiment, on the small folder, in this process."""
    return here("related.py", *options_of(name, data), *more, "--out", out)


def everything_of(folder):
    """All tensors of a checkpoint's parts: {(part, name): tensor}"""
    checkpoint = torch.load(folder / "checkpoint.pth", weights_only=True)
    found = {}
    for part in ("model", "target", "queue"):
        found |= {(part, name): t for name, t in checkpoint.get(part, {}).items()}
    for k, state in checkpoint["optimizer"]["state"].items():
        found |= {("optimizer", k, name): t for name, t in state.items()}
    return found


PARTS = {"simclr": set(), "mocov2": {"target", "queue"}, "byol": {"target"}, "swav": set(),
         "clip": {"vocabulary"}}


# ImageNet's recipes with small networks and images: LARS and its groups, heads without BN, frozen prototypes.
AUTHORS_WAY = shlex.split("--recipe imagenet --size 24 --warmup 1")


@pytest.mark.parametrize("recipe", ["cifar10", pytest.param("imagenet", marks=slow)])
@pytest.mark.parametrize("name", [
    name if name == "mocov2" else pytest.param(name, marks=slow) for name in ALL])
def test_interrupted_method_ends_with_the_uninterrupted_weights(tmp_path, small, name, recipe):
    """Interrupted in mid-epoch and resumed, against uninterrupted: every part, and the losses."""
    more = ["--batch", "6", "--epochs", "3", "--save-minutes", "0"]
    if recipe == "imagenet":
        more += AUTHORS_WAY
    assert run(name, small, tmp_path / "whole", *more) is None
    with interrupted_before(13):
        assert "interrupted" in run(name, small, tmp_path / "parts", *more)
    checkpoint = torch.load(tmp_path / "parts/checkpoint.pth", weights_only=True)
    assert checkpoint["epoch"] * 8 + checkpoint["step"] == 13
    assert PARTS[name] <= checkpoint.keys()
    assert run(name, small, tmp_path / "parts", *more, "--resume") is None
    whole, parts = (everything_of(tmp_path / folder) for folder in ("whole", "parts"))
    assert equal(whole, parts)
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")


@slow
@pytest.mark.parametrize("name", ALL)
def test_killed_method_ends_with_the_uninterrupted_weights(tmp_path, small, name):
    """kill -9 within an epoch, and --resume, against uninterrupted."""
    options = [*options_of(name, small), *shlex.split(
        "--knn-every 0 --batch 6 --epochs 10 --workers 0 --save-minutes 0")]
    assert here("related.py", *options, "--out", tmp_path / "whole") is None
    killed = tmp_path / "killed"
    command = [sys.executable, ROOT / "related.py", *options, "--out", killed]
    position = kill_when([str(part) for part in command], killed, epoch=2)
    assert position["epoch"] < 9, "the kill came at a moment that shows nothing"
    assert here("related.py", *options, "--out", killed, "--resume") is None
    assert equal(everything_of(tmp_path / "whole"), everything_of(killed))


@slow
@pytest.mark.parametrize("name", ALL)
def test_a_method_trains_in_two_processes(tmp_path, small, name):
    """Losses of each epoch by the command line, in the authors' way, against one process."""
    options = [*options_of(name, small), *AUTHORS_WAY]
    options += ["--epochs", "2", "--batch", "12"]
    if name == "mocov2":
        options += ["--queue", "48"]
    assert here("related.py", *options, "--out", tmp_path / "one") is None
    out = torchrun(ROOT / "related.py", *options, "--out", tmp_path / "two")
    assert out.returncode == 0, out.stderr
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    for epoch in (1, 2):
        assert one[epoch] == pytest.approx(two[epoch], rel=2e-2)     # in float32, at a temperature of 0.1


@pytest.mark.parametrize("experiment", [
    name if name in ("byol", "sec62-simclr-predictor-stopgrad", "sec62-swav-predictor", "fn2-byol-tau-0")
    else pytest.param(name, marks=slow) for name in RESULTS])
def test_every_experiment_trains(tmp_path, small, experiment):
    """All trainable weights move; losses are finite; the log says which row it is."""
    assert run(experiment, small, tmp_path / "run", "--epochs", "2") is None
    start, _, *epochs, end = log_of(tmp_path / "run")
    assert end["event"] == "end"
    assert start["settings"]["experiment"] == experiment
    assert all(math.isfinite(record["loss"]) for record in epochs)
    assert all(record["lr"] > 0 for record in epochs[:-1])
    args = related.parse(["--experiment", experiment])
    torch.manual_seed(0)
    processes.join_world(CPU)
    method = args.method(start["settings"])
    method.build()
    after = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["model"]
    assert after.keys() == method.model.state_dict().keys()
    for name, w in method.model.named_parameters():
        assert not torch.equal(after[name], w), name


@pytest.mark.parametrize("name", [
    name if name in ("byol", "clip") else pytest.param(name, marks=slow) for name in ALL])
def test_lineval_reads_the_online_network(tmp_path, small, name):
    """The backbone that it evaluates against the model's encoder: not the target."""
    assert run(name, small, tmp_path / "run") is None
    found = tests.helpers.lineval.read_backbone(str(tmp_path / "run/checkpoint.pth")).network.state_dict()
    model = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["model"]
    exported = torch.load(tmp_path / "run/backbone.pth", weights_only=True)
    assert equal(found, exported)
    for key, t in found.items():
        assert torch.equal(t, model[f"encoder.{key}"])
    checkpoint = tmp_path / "run/checkpoint.pth"
    assert here("lineval.py", small, "--ckpt", checkpoint, "--knn", "--workers", "0") is None


def test_default_folder_names_data_and_method():
    """Beside each other, and beside SimSiam's."""
    assert related.parse(["--method", "byol"]).experiment == "byol"
    assert related.parse(["--experiment", "sec62-swav"]).experiment == "sec62-swav"


def test_a_run_goes_to_the_folder_of_its_data_and_method(tmp_path, small, monkeypatch):
    """Without --out."""
    monkeypatch.chdir(tmp_path)
    assert here("related.py", small, *RUN, "--method", "byol") is None
    assert (tmp_path / "runs/small-byol/backbone.pth").exists()


@pytest.mark.parametrize("options, said", [
    ("", "related.py: no method is named; give --method simclr|mocov2|byol|swav|clip, or a row of --experi"),
    ("--experiment table5-base", "related.py: no row is called table5-base; give --method"),
    ("--method dino", "related.py: argument --method: invalid choice: 'dino'"),
    ("--method byol --experiment sec62-swav", "related.py: argument --experiment: invalid choice: 'sec62-s"),
    ("--method swav --batch 16 --affine --bn 1 0 1 0", "related.py: --affine: is of the projection's output"),
    ("--method byol --queue 10", "related.py: unrecognized arguments: --queue 10; see"),
    ("--method mocov2 --tau 2", "related.py: --tau 2.0: from 0 to 1"),
    ("--method swav --iterations 0", "related.py: --iterations 0: from 1 to 1000"),
    ("--method mocov2 --queue 100 --batch 16", "related.py: --queue 100: twice the batch, 32 keys a step"),
    ("--method simclr --objective symmetric", "related.py: unrecognized arguments: --objective symmetric")])
def test_bad_options_are_refused_in_one_line(small, options, said):
    """The beginning of the line."""
    assert refusal("related.py", small, *shlex.split(options)).startswith(said)


def test_resume_with_another_method_is_refused(tmp_path, small):
    """In the folder of a run of BYOL."""
    assert run("byol", small, tmp_path / "run") is None
    assert "byol" in run("simclr", small, tmp_path / "run", "--resume")


def test_no_methods_name_is_in_simsiam():
    """One training loop, which knows none of its users."""
    text = (ROOT / "simsiam.py").read_text().lower()
    assert not re.findall(r"simclr|moco|byol|swav|\bclip\b", text)


def test_list_has_all_rows(capsys):
    """The printed list against the table; it needs no method."""
    with pytest.raises(SystemExit) as end:
        related.parse(["--experiment", "list"])
    assert not end.value.code
    printed = capsys.readouterr().out
    for name, (_, paper) in RESULTS.items():
        assert re.search(rf"^{re.escape(name)} .*{re.escape(paper)}", printed, re.M), name


def test_help_and_first_lines_are_whole_sentences():
    """The help of a method begins with its docstring's first line."""
    for method in related.METHODS.values():
        assert method.__doc__.splitlines()[0].endswith("."), method


@pytest.mark.parametrize("experiment", RESULTS)
def test_losses_are_taken_in_float32_from_bfloat16(experiment):
    """A step's loss under bf16 autocast: float32, that of its outputs as float32; with a finite gradient."""
    args = related.parse(["--experiment", experiment])
    row = args.method.EXPERIMENTS[experiment][0]
    row = {key: value for key, value in row.items() if key not in ("epochs",)}
    method = method_of(args.method.NAME, **row)
    method.parts(CPU)
    views = [torch.randn(16, 3, 16, 16) for _ in range(2)]
    autocast = torch.autocast("cpu", torch.bfloat16)
    objective = method.objective(views, autocast)
    with autocast:
        p, z = method.model(*views)
    L = objective(*p, *z)
    assert L.dtype == torch.float32
    assert any(v.dtype == torch.bfloat16 for v in z)
    assert L.item() == pytest.approx(objective(*(v.float() for v in p + z)).item(), rel=1e-6)
    L.backward()
    for w in method.model.parameters():
        assert w.grad is None or w.grad.isfinite().all()


def test_a_row_of_imagenets_recipes_says_what_a_small_recipe_leaves_out():
    """BYOL's lr at 800 epochs, on CIFAR-10."""
    settings = settings_of_row("table4-byol-800-epochs", "cifar10")
    said = simsiam.describe_experiment(related.BYOL(settings))
    assert "here base_lr 0.0075, weight_decay 0.0005, tau 0.99, not what the row says" in said


@pytest.mark.parametrize("options, word", [("--help", "Sinkhorn"), ("--method swav --help", "--prototypes")])
def test_help_needs_no_method(capsys, options, word):
    """Without one, what the file says of itself; with one, its settings."""
    with pytest.raises(SystemExit) as end:
        related.parse(shlex.split(options))
    assert not end.value.code
    assert word in capsys.readouterr().out


def test_collapse_is_told_by_each_methods_own_sign():
    """BYOL's like SimSiam's, by loss and std; where collapse isn't the minimum, by the std alone."""
    byol, simclr = method_of("byol", batch=32), method_of("simclr", batch=32)
    assert byol.collapsed(0.01, 0.3)
    assert not byol.collapsed(2.0, 0.3)
    at_best = 2 / math.sqrt(32)                                      # behind an output BN
    assert simclr.collapsed(4.1, at_best)
    assert not simclr.collapsed(4.1, 0.95)
    without_bn = method_of("mocov2", bn=(0, 0, 1, 0), affine=False)
    assert without_bn.collapsed(4.1, 0.001)
    assert not without_bn.collapsed(4.1, 0.2)


# ------------------------------------------------------------------------------------------------------------
# What people got wrong, put in
# ------------------------------------------------------------------------------------------------------------

ROOMS = (globals(), vars(world_related))  # where the tests find the module
PITFALLS = {  # what: (text in related.py, wrong text, the test that sees it, its arguments)
    "the positive is left out, not the anchor itself": (
        "logits.scatter_(1, own, -math.inf)", "logits.scatter_(1, other, -math.inf)",
        "test_simclr_eq1_is_a_double_loop", [0.5]),
    "negatives of the other view only": (
        "torch.cat([z1, z2]) @ torch.cat(every).T", "torch.cat([z1, z2]) @ torch.cat(every[::-1]).T",
        "test_simclr_eq1_is_a_double_loop", [0.5]),
    "z isn't normalised": (
        "z1 = l2_normalize(z1) ", "z1 = z1 ",
        "test_nt_xent_doesnt_see_what_it_must_not", []),
    "labels not shifted by the rank": (
        "torch.arange(n, device=z1.device) + rank * n", "torch.arange(n, device=z1.device)",
        "test_nt_xents_gather_is_exact_for_each_process", [2]),
    "a gradient into the keys": (
        "k = l2_normalize(stopgrad(k))", "k = l2_normalize(k)",
        "test_moco_v2_eq1_is_a_softmax_over_one_and_k", []),
    "one direction's keys enter the queue before the other's loss": (
        "return info_nce(z1, k2, queue, t) / 2 + info_nce(z2, k1, queue, t) / 2",
        "return (info_nce(z1, k2, queue, t) + (self.queue.put(k2, 0), info_nce(z2, k1, queue, t))[1]) / 2",
        "test_mocos_directions_meet_the_same_queue", []),
    "the newest keys are replaced": (
        "start = count % len(self.rows)", "start = 0",
        "test_mocos_queue_holds_the_last_keys_the_oldest_go_first", []),
    "BN statistics are averaged too": (
        "zip(target.parameters(), online.parameters(), strict=True)",
        "zip([*target.parameters(), target[1].running_mean], [*online.parameters(), online[1].running_mean])",
        "test_byol_eq1_moves_the_target_towards_the_online_network", [0.3]),
    "tau counts a process's share of the steps": (
        "cosine(step, self.total_steps, 0)", "cosine(step, self.total_steps // 2, 0)",
        "test_tau_rises_to_1_by_half_a_cosine", []),
    "tau counts epochs": (
        "cosine(step, self.total_steps, 0)", "cosine(step, self.s['epochs'], 0)",
        "test_tau_rises_to_1_by_half_a_cosine", []),
    "a gradient into the target": (
        "4 + 4 * loss(p1, p2, target1, target2)", "4 + 4 * simsiam_loss(p1, p2, target1, target2)",
        "test_byol_eq2_is_the_squared_distance_of_both_directions", []),
    "prototypes have a bias": (
        "super().__init__(d, K, bias=False)", "super().__init__(d, K, bias=True)",
        "test_scores_are_cosines_without_a_bias", []),
    "SwAV's z isn't normalised": (
        "return l2_normalize(z) @", "return z @",
        "test_scores_are_cosines_without_a_bias", []),
    "Sinkhorn in half precision": (
        "log_e = as_float32(scores) / eps", "log_e = scores / eps",
        "test_codes_are_finite_in_any_precision", [torch.float16]),
    "CLIP's vectors aren't normalised": (
        "image = l2_normalize(image) ", "image = image ",
        "test_clip_fig_3_is_cross_entropy_both_ways", []),
    "CLIP's exp is forgotten": (
        "scale = log_scale.exp()", "scale = log_scale",
        "test_clip_fig_3_is_cross_entropy_both_ways", []),
    "CLIP's scale isn't clamped": (
        "log_scale.clamp_(0.0, math.log(100))", "log_scale.clamp_(0.0)",
        "test_clips_scale_is_learned_and_never_above_100", []),
    "padding counts as a word": (
        "padding_idx=0)", "padding_idx=None)",
        "test_clips_text_is_the_mean_of_known_words", []),
    "a gradient through Sinkhorn": (
        "sinkhorn = torch.no_grad()(balance)", "sinkhorn = balance",
        "test_swav_eq1_swaps_the_codes", []),
    "prototypes sum to 1, and images don't": (
        "(log_u + log_e + log_v).exp()", "(log_u + log_e).exp()",
        "test_swav_eq5_is_the_listings_loop", [3]),
    "prototypes are never frozen": (
        "group[\"lr\"] = 0.0", "pass",
        "test_prototypes_are_frozen_in_the_first_epoch", ["sgd"]),
    "frozen prototypes gather momentum": (
        "optimizer.state.pop(w, None)", "pass",
        "test_prototypes_are_frozen_in_the_first_epoch", ["larc"]),
    "LARS adapts BN in the heads": (
        "(leaves_out and w.dim() < 2)", "(leaves_out and w.dim() < 2 and len(w) != 16)",
        "test_bn_and_biases_are_left_out_where_the_authors_do_so", ["byol"]),
}


@pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered")
@pytest.mark.parametrize("what", PITFALLS)
def test_a_pitfall_put_in_is_seen(what, monkeypatch):
    """The named test passes, and fails with the wrong text in related.py."""
    right, wrong, test, arguments = PITFALLS[what]
    lines = (ROOT / "related.py").read_text().splitlines()
    places = [number for number, line in enumerate(lines, 1) if right in line]
    assert len(places) == 1, (right, places)
    mutant = module_with("related.py", places[0], right, wrong)
    mutant.simsiam_loss = lambda p1, p2, z1, z2: simsiam.D(p1, z2) / 2 + simsiam.D(p2, z1) / 2
    check_it_dies(mutant, ROOMS, monkeypatch, globals()[test], *arguments)


# ------------------------------------------------------------------------------------------------------------
# The map from the papers to the code
# ------------------------------------------------------------------------------------------------------------

MAP = {  # tag: (the equation, what the claimed line has, what a mutant has in its place, where there is one)
    "SimCLR Eq. (1)": (
        r"\ell_{i,j} = -\log \frac{\exp(\mathrm{sim}(z_i, z_j) / \tau)}"
        r"{\sum_{k \neq i} \exp(\mathrm{sim}(z_i, z_k) / \tau)}",
        "- positive)", "+ positive)"),
    "MoCo v2 Eq. (1)": (
        r"\mathcal{L}_q = -\log \frac{\exp(q \cdot k_+ / \tau)}"
        r"{\exp(q \cdot k_+ / \tau) + \sum_{k_-} \exp(q \cdot k_- / \tau)}",
        "logits[:, 0]", "logits[:, 1]"),
    "BYOL Eq. (1)": (
        r"\xi \leftarrow \tau \xi + (1 - \tau) \theta",
        "tau * xi + (1 - tau) * theta", "(1 - tau) * xi + tau * theta"),
    "BYOL Eq. (2)": (
        r"\mathcal{L} = \lVert \bar{q}_\theta(z_\theta) - \bar{z}'_\xi \rVert_2^2 "
        r"= 2 - 2 \cos(q_\theta(z_\theta), z'_\xi)",
        "4 + 4", "2 + 2"),
    "SwAV Eq. (1)": (
        r"L(z_t, z_s) = \ell(z_t, q_s) + \ell(z_s, q_t)",
        "swapped(p1, q2, t)", "swapped(p1, q1, t)"),
    "SwAV Eq. (2)": (
        r"\ell(z_t, q_s) = -\sum_k q_s^{(k)} \log \frac{\exp(z_t^\top c_k / \tau)}"
        r"{\sum_{k'} \exp(z_t^\top c_{k'} / \tau)}",
        "(q * log_p)", "(log_p * log_p)"),
    "SwAV Eq. (3)": (
        r"\max_{Q \in \mathcal{Q}} \mathrm{Tr}(Q^\top C^\top Z) + \varepsilon H(Q)",
        "eps * entropy", None),
    "SwAV Eq. (4)": (
        r"\mathcal{Q} = \lbrace Q : Q 1_B = \frac{1}{K} 1_K, Q^\top 1_K = \frac{1}{B} 1_B \rbrace",
        "Q.sum(axis=1)", None),
    "SwAV Eq. (5)": (
        r"Q = \mathrm{Diag}(u) \exp(C^\top Z / \varepsilon) \mathrm{Diag}(v)",
        "log_e + log_v", "log_e - log_v"),
    "CLIP Fig. 3": (
        r"\frac{1}{2} (\mathrm{CE}(e^s I_e T_e^\top) + \mathrm{CE}(e^s T_e I_e^\top))",
        "(of_images + of_texts) / 2", "of_images")}
TAG = re.compile(r"# ((?:SimCLR|MoCo v2|BYOL|SwAV|CLIP) (?:Eq\. \(\d\)|Fig\. \d)): (.*)")


def named_after(tag):
    """MoCo v2 Eq. (1) -> the one test called test_moco_v2_eq1_..."""
    stem = re.sub(r"[^a-z0-9]+", "_", tag.lower().replace("eq. (", "eq")).strip("_")
    return the_test_called(stem, globals())


def claims_of_the_papers():
    """All claims of related.py and of this file, in the order of MAP."""
    return claims(["related.py", "tests/test_related.py"], TAG, MAP, named_after)


def papers_map():
    """The table in results/related.md."""
    return equation_table(claims_of_the_papers(), MAP, back="../")


def test_every_equation_is_claimed_by_one_line_and_one_test():
    """The tags against MAP; statements alone have no mutant."""
    check_claims(claims_of_the_papers(), MAP)
    for claim in claims_of_the_papers():
        assert (MAP[claim.tag][2] is None) == (claim.file != "related.py"), claim


@pytest.mark.parametrize("tag", MAP)
def test_equations_are_whole_in_a_markdown_table(tag):
    """Braces match, and there is nothing that Markdown takes for itself."""
    check_equation(MAP[tag][0])


@pytest.mark.parametrize("tag", [tag for tag in MAP if MAP[tag][2] is not None])
def test_a_mutant_of_every_claimed_line_dies_in_its_test(tag, monkeypatch, request):
    """The equation's test passes, and fails with the mutant in the module's place."""
    test = globals()[named_after(tag)]
    claim, = (claim for claim in claims_of_the_papers() if claim.tag == tag)
    check_it_dies(mutant_of(claim, MAP), ROOMS, monkeypatch, test, **arguments_for(test, request))


DEPARTURES = [  # (words in the line with the mark, first cell of its row in results/related.md), in order
    ("resized bilinearly", "resizing"),
    ("each view passes", "views"),
    ("in proportion to the batch", "lr by batch; set"),
    ("pixels are standardised", "pixels"),
    ("BN is over the whole batch", "BN"),
    ("SimSiam's blur", "views' policies"),
    ("no solarisation", "views' policies"),
    ("fc layers before a BN", "biases of fc layers"),
    ("normalised here", "prototypes"),
    ("no queue", "queue of outputs"),
    ("bag of words", "text encoder"),
    ("0.6", "crop"),
    ("32,768", "lr and warm-up"),
]


def test_every_departure_has_its_row_in_the_page():
    """The marks in related.py against the table above, in order; its rows against the page's table."""
    marks = [line for line in (ROOT / "related.py").read_text().splitlines() if "DEPARTURE" in line]
    assert len(marks) == len(DEPARTURES)
    table = (ROOT / "results/related.md").read_text().split("| | the authors | here |")[1]
    rows = re.findall(r"^\| ([^|]+) \|", table.split("\n\n")[0], re.M)
    for mark, (word, row) in zip(marks, DEPARTURES):
        assert word in mark
        assert row in rows
    assert {row for _, row in DEPARTURES} == set(rows)


def test_the_page_has_the_map_of_the_sources():
    """results/related.md against the table that is made from the sources."""
    assert papers_map() in (ROOT / "results/related.md").read_text(), "python -m tests.test_related writes it"


if __name__ == "__main__":
    write_tables(ROOT / "results/related.md", [papers_map()])
