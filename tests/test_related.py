"""related.py: SimSiam's neighbours, against loops in numpy, closed forms, and SimSiam itself.

    python -m pytest -q tests/test_related.py       the quick ones
    python -m tests.test_related                    writes the map in results/related.md

First come the facts that we typed from the papers and the authors' code; then the methods' losses and steps;
CLIP's words and figures; several processes; the program; common mistakes, put in; the map from the papers to
the code.
"""
import collections
import contextlib
import copy
import functools
import itertools
import math
import re
import shlex
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import augment
import related
import simsiam
import tests.helpers
from harness.data import shapes
from harness.evaluation import report
from harness.training import processes, recipes
from results.pages import write_tables
from tests import world_related
from tests.claims import check_claims, check_departures, check_it_dies, claims, equation_table
from tests.claims import mutant, mutant_of
from tests.experiments import check_resumed, check_rows, check_run
from tests.helpers import CPU, ROOT, close, equal, here, kill_when
from tests.helpers import losses_of, refusal, slow, tensors_in, torchrun, unit, vectors, weights_of

pytest_plugins = ["tests.fixtures"]
METHODS = ["simclr", "mocov2", "byol", "swav"]
ALL = [*METHODS, "clip"]


# ------------------------------------------------------------------------------------------------------------
# Typed from the papers, and from the authors' code
# ------------------------------------------------------------------------------------------------------------

EACH = dict(
    arch="resnet50", proj_layers=3, proj_hidden=2048, dim=128, predictor="none", bn=(1, 0, 1, 0),
    last_bn=1, momentum=0.9, base_lr=0.3, batch=4096, weight_decay=1e-6, warmup=10, pred_lr="cosine",
    area=(0.08, 1), jitter=0.8, strength=(0.8, 0.8, 0.8, 0.2), gray=0.2, blur=0.5)
AUTHORS = {  # on ImageNet; heads and batches as in SimSiam's Table 4
    "simclr": EACH | dict(affine=True, bn=(1, 1, 1, 0), last_bn=0, temperature=0.1, optimizer="lars-inside"),
    "mocov2": EACH | dict(
        proj_layers=2, bn=(0, 0, 1, 0), temperature=0.2, queue=65536, tau=0.999, optimizer="sgd",
        base_lr=0.03, batch=256, weight_decay=1e-4, warmup=0, pred_lr="constant",
        area=(0.2, 1), strength=(0.4, 0.4, 0.4, 0.1)),
    "byol": EACH | dict(
        proj_layers=2, proj_hidden=4096, dim=256, predictor="mlp", pred_dim=4096, tau=0.99, tau_rises=True,
        optimizer="lars-outside", base_lr=0.45, strength=(0.4, 0.4, 0.2, 0.1)),
    "swav": EACH | dict(
        temperature=0.1, prototypes=3000, eps=0.05, iterations=3, freeze=1, optimizer="larc", lr_end=0.001)}

TABLE_4 = {  # top-1 after 100, 200, 400, 800 epochs
    "simclr": ["66.5", "68.3", "69.8", "70.4"],
    "mocov2": ["67.4", "69.9", "71.0", "72.2"],
    "byol": ["66.5", "70.6", "73.2", "74.3"],
    "swav": ["66.5", "69.1", "70.7", "71.8"]}
OF_300 = dict(base_lr=0.3, weight_decay=1e-6, tau=0.99)              # BYOL's recipes, by their epochs
OF_1000 = dict(base_lr=0.2, weight_decay=1.5e-6, tau=0.996)
BYOLS = {200: OF_300, 400: OF_300, 800: OF_1000}
STILL = dict(epochs=300, base_lr=0.3, tau=0, tau_rises=False)
OTHERS = {  # SimSiam's Sec. 6.2, footnote 2, supplement D; BYOL's Table 21
    "simclr": {
        "sec62-simclr": ({}, "66.5"),
        "sec62-simclr-predictor": (dict(predictor="mlp", stopgrad=False), "66.4"),
        "sec62-simclr-predictor-stopgrad": (dict(predictor="mlp", stopgrad=True), "66.0"),
        "suppD-simclr": ({}, "91.1")},
    "mocov2": {},
    "byol": {
        "byol-tau-0": (dict(pred_lr_times=1, **STILL), "5.5"),
        "fn2-byol-tau-0": (dict(pred_lr_times=10, **STILL), "66.9")},
    "swav": {
        "sec62-swav": ({}, "66.5"),
        "sec62-swav-predictor": (dict(predictor="mlp", stopgrad=True), "65.2"),
        "sec62-swav-without-stopgrad": (dict(predictor="none", stopgrad=False), "diverges")}}
RESULTS = {}
for name in METHODS:
    RESULTS[name] = {}, TABLE_4[name][0]
    for epochs, top1 in zip((100, 200, 400, 800), TABLE_4[name]):
        changes = BYOLS.get(epochs, {}) if name == "byol" else {}
        RESULTS[f"table4-{name}-{epochs}-epochs"] = changes | dict(epochs=epochs), top1
    RESULTS |= OTHERS[name]

# What a method needs besides SimSiam's own settings. Small recipes differ from SimSiam's in nothing else.
NEEDED = {
    "simclr": {"temperature", "stopgrad"},
    "mocov2": {"temperature", "queue", "tau"},
    "byol": {"tau", "tau_rises", "pred_lr_times", "base_lr"},        # its loss is 4 times as steep
    "swav": {"temperature", "prototypes", "eps", "iterations", "freeze", "lr_end", "stopgrad"}}
NEEDED_ON_SHAPES = {  # besides
    "mocov2": {"epochs"},                                            # because a step takes longer
    "byol": {"epochs"},
    "swav": {"base_lr"}}                                             # with SimSiam's, a seed failed


settings_of_row = functools.partial(tests.helpers.settings_of_row, related)


@pytest.mark.parametrize("name", METHODS)
def test_recipes_for_imagenet_are_the_authors(name):
    """The settings of a run without further options, against the table above."""
    run = settings_of_row(name, "imagenet")
    assert {key: run[key] for key in AUTHORS[name]} == AUTHORS[name]


@pytest.mark.parametrize("recipe", ["cifar10", "shapes"])
@pytest.mark.parametrize("name", METHODS)
def test_small_recipes_are_simsiams_but_for_what_a_method_needs(name, recipe):
    """Against SimSiam's own recipe, because methods are compared under equal conditions (supplement D)."""
    run = settings_of_row(name, recipe)
    expected = recipes.recipe(recipe, simsiam.SETTINGS) | dict(
        last_bn=0, optimizer="sgd", predictor="mlp" if name == "byol" else "none")
    settings = related.METHODS[name].SETTINGS
    changed = {key for key in settings if run[key] != expected.get(key)}
    needed = NEEDED[name]
    if recipe == "shapes":
        needed = needed | NEEDED_ON_SHAPES.get(name, set())
    assert changed == needed


def test_experiments_hold_the_papers_settings_and_results():
    """Each row against the table above; it changes nothing else of its method."""
    methods = [related.METHODS[name] for name in METHODS]
    check_rows(related, methods, RESULTS)
    assert list(related.CLIP.EXPERIMENTS) == ["clip"]


def test_a_small_recipe_keeps_its_own_lr_in_a_row_of_imagenets_recipes():
    """BYOL's recipes by length are for LARS on ImageNet; only what makes the row stays. The run says so."""
    row = settings_of_row("fn2-byol-tau-0", "cifar10")
    kept = {key: row[key] for key in ("base_lr", "weight_decay", "tau", "tau_rises", "pred_lr_times")}
    assert kept == dict(base_lr=0.0075, weight_decay=0.0005, tau=0, tau_rises=False, pred_lr_times=10)
    said = report.describe_experiment(related.BYOL(row, None, CPU))
    assert "here base_lr 0.0075, weight_decay 0.0005, not what the row says" in said


# ------------------------------------------------------------------------------------------------------------
# The losses
# ------------------------------------------------------------------------------------------------------------

def arrays(*tensors):
    """Tensors as arrays, each row divided by its norm."""
    return [unit(t.detach().numpy()) for t in tensors]


def softmax_loss(logits, right):
    """-log of the softmax of these numbers, at the index of the right one."""
    e = np.exp(np.asarray(logits))
    return -math.log(e[right] / e.sum())


@pytest.mark.parametrize("t", [0.1, 0.5, 1.0])
def test_simclr_eq1_is_a_double_loop(t):
    """Pair by pair in numpy; all 2N vectors have a gradient, none is a constant."""
    z1, z2, *_ = vectors(n=7, d=5)
    z = np.concatenate(arrays(z1, z2))
    losses = []
    for i in range(14):
        others = [k for k in range(14) if k != i]
        positive = others.index((i + 7) % 14)
        losses.append(softmax_loss(z[others] @ z[i] / t, positive))
    assert close(related.nt_xent(z1, z2, t), np.mean(losses))
    nt_xent = functools.partial(related.nt_xent, temperature=t)
    assert torch.autograd.gradcheck(nt_xent, (z1, z2), raise_exception=False)


def queue_of(K, d):
    """(K, d) unit rows in float64."""
    generator = torch.Generator().manual_seed(5)
    return unit(torch.randn(K, d, generator=generator, dtype=torch.float64))


def test_moco_v2_eq1_is_a_softmax_over_one_and_k():
    """Against a loop in numpy; no gradient flows into the keys."""
    q, k, *_ = vectors(n=6, d=5)
    queue = queue_of(11, 5)
    L = related.info_nce(q, k, queue, 0.2)
    losses = []
    for a, b in zip(*arrays(q, k)):
        cosines = np.array([a @ b, *(queue.numpy() @ a)])
        losses.append(softmax_loss(cosines / 0.2, 0))
    assert close(L, np.mean(losses))
    L.backward()
    assert q.grad.abs().max() > 0
    assert k.grad is None


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
    """The loop in numpy; each image's code sums to 1 after any number of iterations."""
    scores = some_scores().requires_grad_()
    q = related.sinkhorn(scores, 0.05, iterations)
    assert not q.requires_grad
    assert close(q, sinkhorn_in_numpy(scores.detach().numpy(), 0.05, iterations))
    assert close(q.sum(dim=1), torch.ones(9))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_codes_are_finite_in_any_precision(dtype):
    """exp(1 / 0.03) is 3e14, beyond half precision; a score of -1 gives e^-67 of that."""
    scores = some_scores(64, 8).to(dtype)
    scores[0] = -1
    q = related.sinkhorn(scores, 0.03, 3)
    assert q.dtype == torch.float32
    assert close(q, sinkhorn_in_numpy(scores.double().numpy(), 0.03, 3), 1e-4)  # of exp, at up to 67


def objective_of_codes(Q, scores, eps):
    """What the codes Q (K, B) maximise."""
    entropy = -(Q * np.log(Q)).sum()
    return np.trace(Q.T @ scores.T) + eps * entropy                   # SwAV Eq. (3): similarity and entropy


def marginals(Q):
    """The sums of the prototypes' rows and of the images' columns, divided by what they must be."""
    K, B = Q.shape
    return K * Q.sum(axis=1), B * Q.sum(axis=0)                       # SwAV Eq. (4): an equal partition


def test_swav_eq3_the_codes_are_at_the_maximum():
    """After many iterations, every small step that keeps all sums lowers the objective."""
    scores = some_scores()
    Q = related.sinkhorn(scores, 1.0, 500).numpy().T / 9
    best = objective_of_codes(Q, scores.numpy(), 1.0)
    rng = np.random.default_rng(0)
    for _ in range(100):
        way = rng.normal(size=Q.shape)
        way -= way.mean(axis=0)
        way -= way.mean(axis=1, keepdims=True)
        assert objective_of_codes(Q + 1e-4 * way, scores.numpy(), 1.0) < best


def test_swav_eq4_the_codes_are_an_equal_partition():
    """Both marginals after many iterations; after three, only the images'."""
    for iterations, even in ((500, True), (3, False)):
        codes = related.sinkhorn(some_scores(), 0.3, iterations)
        rows, columns = marginals(codes.numpy().T / 9)
        assert close(rows, np.ones(4)) == even
        assert close(columns, np.ones(9))


def test_swav_eq2_is_a_cross_entropy():
    """Image by image in numpy."""
    scores = some_scores()
    q = related.sinkhorn(some_scores(seed=4), 0.3, 3)
    losses = []
    for image, code in np.ndindex(9, 4):
        losses.append(q[image, code] * softmax_loss(scores[image] / 0.1, code))
    assert close(related.swapped(scores, q, 0.1), sum(losses) / 9)


def test_clip_fig3_is_cross_entropy_both_ways():
    """Against a loop in numpy."""
    image, text, *_ = vectors(n=6, d=5)
    i, t = arrays(image, text)
    losses = []
    for k in range(6):
        losses.append(softmax_loss(math.exp(1.2) * (t @ i[k]), k))
        losses.append(softmax_loss(math.exp(1.2) * (i @ t[k]), k))
    L = related.clip_loss(image, text, torch.tensor(1.2, dtype=torch.float64))
    assert close(L, np.mean(losses))


def test_a_collapsed_loss_is_chance():
    """The figures in the start block: the logarithm of the number of choices."""
    same = torch.ones(8, 4, dtype=torch.float64)
    codes = related.sinkhorn(same, 0.05, 3)
    assert close(related.nt_xent(same, same, 0.5), math.log(15))
    assert close(related.info_nce(same, same, same.repeat(4, 1) / 2, 0.2), math.log(33))
    assert close(related.swapped(same, codes, 0.1), math.log(4))
    assert close(related.clip_loss(same, same, torch.tensor(1.2)), math.log(8))


def test_the_minima_that_the_curves_show_are_reached():
    """SimCLR's at a simplex; MoCo's with negatives opposite to the query."""
    simplex = torch.eye(6, dtype=torch.float64) - 1 / 6
    lowest = related.nt_xent(simplex, simplex, 0.5)
    assert close(lowest, method_of("simclr", batch=6, temperature=0.5).minimum)
    q = unit(torch.ones(8, 4, dtype=torch.float64))
    lowest = related.info_nce(q, q, -q.repeat(4, 1), 0.2)
    assert close(lowest, method_of("mocov2", queue=32, temperature=0.2).minimum)


@pytest.mark.parametrize("loss, more", [
    (related.nt_xent, [0.5]),
    (related.info_nce, [queue_of(11, 5).float(), 0.2]),
    (related.swapped, [0.1]),
    (related.clip_loss, [torch.tensor(1.2)])])
def test_losses_are_taken_in_float32_from_bfloat16(loss, more):
    """The result is float32, and equals that of the same numbers as float32."""
    a, b, *_ = (v.detach().bfloat16() for v in vectors())
    L = loss(a, b, *more)
    assert L.dtype == torch.float32
    assert close(L, loss(a.float(), b.float(), *more), 1e-6)


def test_scores_are_cosines_without_a_bias():
    """For z and prototypes of any length, under autocast too: bf16 would cost a score its third digit."""
    prototypes = related.Prototypes(5, 7)
    assert [name for name, _ in prototypes.named_parameters()] == ["weight"]
    z = 1e4 * torch.randn(20, 5)
    with torch.autocast("cpu", torch.bfloat16):
        scores = prototypes(z)
    assert close(scores, unit(z) @ unit(prototypes.weight).T, 1e-5)


# ------------------------------------------------------------------------------------------------------------
# Steps
# ------------------------------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def no_world_left():
    """method_of may have made one."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def method_of(name, **more):
    """A method with a tiny model, in this process alone."""
    if not torch.distributed.is_initialized():
        processes.join_world(CPU)
    return world_related.new_method(name, **more)


# before, after: copies of the model and the method's other parts. loss: of the step
Step = collections.namedtuple("Step", "views before after loss")


def steps_of(name, count, first=0, **more):
    """Steps of a new method on 48 images, three an epoch, in float64. first: the number of the first"""
    method = method_of(name, **more)
    method.model.double()
    optimizer = method.optimizer()
    everything = types.SimpleNamespace(model=method.model, **method.parts())
    views = itertools.islice(world_related.views(method.views), count)
    steps = []
    before = copy.deepcopy(everything)
    for number, (index, x) in enumerate(views, first):
        method.set_lr(optimizer, number)
        L, _ = method.train_step(method.model, optimizer, number, index, x)
        after = copy.deepcopy(everything)
        if name == "clip":
            x = [*x, method.words[method.shown(index)]]
        steps.append(Step(x, before, after, L.detach()))
        before = after
    assert len(steps) == count
    return steps


LR = 1 / 16     # of the first step: base lr 1, batch 16
DECAY = 5e-4
T = 0.3         # temperature


def sgd(w, gradient):
    """A weight after the first step of SGD."""
    return w - LR * (gradient + DECAY * w)


def lars(w, gradient):
    """After that of SimCLR's and BYOL's LARS, which neither adapts nor decays BN and biases."""
    if w.dim() < 2:
        return w - LR * gradient
    decayed = gradient + DECAY * w
    return w - LR * 0.001 * w.norm() / decayed.norm() * decayed


def larc(w, gradient):
    """After that of SwAV's LARC, which adapts all tensors but zeros and those without a gradient."""
    if not w.any() or not gradient.any():
        return w - LR * gradient
    norms = gradient.norm() + DECAY * w.norm() + 1e-8
    return w - LR * 0.001 * w.norm() / norms * (gradient + DECAY * w)


def adamw(w, gradient):
    """After that of CLIP's AdamW, which decays weights by 0.2, but neither BN nor biases."""
    decay = 0.2 if w.dim() >= 2 else 0
    return w - LR * gradient / (gradient.abs() + 1e-8) - LR * decay * w


def half_a_cosine(step):
    """From 1 at the first of the run's nine steps to 0 after the last."""
    return (1 + math.cos(math.pi * step / 9)) / 2


def check_steps(name, formula, update=sgd, **more):
    """Compare a method's first two steps with a formula of the parts before each and of the views.

    The losses must be the formula's; the model after the first step, an update by the formula's gradient. A
    target follows after each step.
    """
    first, second = steps_of(name, 2, **more)
    L = formula(first.before, first.views)
    assert close(first.loss, L)
    assert close(second.loss, formula(second.before, second.views))
    L.backward()
    before = dict(first.before.model.named_parameters())
    for parameter, after in first.after.model.named_parameters():
        w = before[parameter]
        expected = update(w, w.grad) if w.requires_grad else w
        assert close(after, expected), parameter
    for number, step in enumerate((first, second)):
        if name in ("mocov2", "byol"):
            tau = 1 - 0.1 * half_a_cosine(number) if name == "byol" else 0.9
            networks = step.after.target, step.before.target, step.after.model.encoder
            for after, xi, theta in zip(*(network.parameters() for network in networks)):
                assert close(after, tau * xi + (1 - tau) * theta)


def of_both(loss, p, targets, *more):
    """The mean of both directions: each view's p with the other view's target."""
    p1, p2 = p
    target1, target2 = targets
    return (loss(p1, target2, *more) + loss(p2, target1, *more)) / 2


def simclr_loss(before, x):
    """NT-Xent of the encoder's outputs."""
    _, (z1, z2) = before.model(*x)
    return related.nt_xent(z1, z2, T)


def simclr_loss_with_h(before, x):
    """Sec. 6.2: Eq. (2) with NT-Xent in the place of D."""
    p, z = before.model(*x)
    return of_both(related.nt_xent, p, z, T)


def simclr_loss_with_h_and_stopgrad(before, x):
    """Sec. 6.2: Eq. (4) with NT-Xent in the place of D."""
    p, z = before.model(*x)
    return of_both(related.nt_xent, p, [z_i.detach() for z_i in z], T)


def moco_loss(before, x):
    """InfoNCE of both views with the target's keys and the queue as it was before the step."""
    _, z = before.model(*x)
    keys = map(before.target, x)
    return of_both(related.info_nce, z, keys, before.queue.rows, T)


def byol_loss(before, x):
    """|p/|p| - z'/|z'||^2 of both directions, summed, where z' is the target's."""
    (p1, p2), _ = before.model(*x)
    target1, target2 = (unit(before.target(view)) for view in x)
    error = (unit(p1) - target2) ** 2 + (unit(p2) - target1) ** 2
    return error.sum(dim=1).mean()


def swav_loss(before, x, codes=torch.no_grad()(related.balance)):
    """Each view's scores, of h(z), with the codes of the other's z."""
    h, prototypes = before.model.predictor
    _, z = before.model(*x)
    c = unit(prototypes.weight).T
    scores = [unit(h(z_i)) @ c for z_i in z]
    q = [codes(unit(z_i) @ c, 0.02, 3) for z_i in z]
    return of_both(related.swapped, scores, q, T)


def swav_loss_with_gradient(before, x):
    """Sec. 6.2: with a gradient through the codes."""
    return swav_loss(before, x, related.balance)


def clip_loss(before, x):
    """CLIP's loss of the images' and the captions' vectors."""
    image, text = before.model(*x)
    return related.clip_loss(image, text, before.model.log_scale)


STEPS = {  # what: (method, formula, what its optimiser does, settings)
    "SimCLR": ("simclr", simclr_loss, sgd, {}),
    "the authors' SimCLR": ("simclr", simclr_loss, lars, dict(optimizer="lars-inside", affine=True)),
    "SimCLR with h": ("simclr", simclr_loss_with_h, sgd, dict(predictor="mlp")),
    "SimCLR with h and stop-gradient": (
        "simclr", simclr_loss_with_h_and_stopgrad, sgd, dict(predictor="mlp", stopgrad=True)),
    "the authors' SwAV": ("swav", swav_loss, larc, dict(optimizer="larc")),
    "SwAV with h": ("swav", swav_loss, sgd, dict(predictor="mlp")),
    "SwAV without stop-gradient": ("swav", swav_loss_with_gradient, sgd, dict(stopgrad=False)),
    "CLIP": ("clip", clip_loss, adamw, {})}


@pytest.mark.parametrize("what", STEPS)
def test_a_step_is_that_of_its_formula(what):
    """Loss and weights."""
    name, formula, update, more = STEPS[what]
    check_steps(name, formula, update, **more)


def test_a_step_of_moco_v2():
    """Loss, weights and target of two steps."""
    check_steps("mocov2", moco_loss, tau=0.9)


def test_a_step_of_the_authors_byol():
    """Loss, weights and target of two steps."""
    check_steps("byol", byol_loss, lars, optimizer="lars-outside", tau=0.9)


def test_byol_eq2_is_the_squared_distance_of_both_directions():
    """Loss, weights and target of two steps."""
    check_steps("byol", byol_loss, tau=0.9)


def test_swav_eq1_swaps_the_codes():
    """Loss and weights of two steps: no gradient flows through the codes."""
    check_steps("swav", swav_loss)


def test_byol_with_tau_0_at_a_quarter_of_the_lr_is_simsiam():
    """Two steps against simsiam.train_step: the loss is 4 + 4 times SimSiam's, so its gradient is 4 times."""
    at_a_quarter = dict(base_lr=0.25, weight_decay=4 * DECAY, pred_lr="cosine")
    steps = steps_of("byol", 2, tau=0.0, tau_rises=False, **at_a_quarter)
    model = steps[0].before.model
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=DECAY)
    for number, step in enumerate(steps):
        optimizer.param_groups[0]["lr"] = LR * half_a_cosine(number)
        L, _ = simsiam.train_step(model, optimizer, contextlib.nullcontext(), *step.views)
        assert close(step.loss, 4 + 4 * L)
        assert all(map(close, step.after.model.parameters(), model.parameters()))


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
def test_byol_eq1_moves_the_target_towards_the_online_network(tau):
    """Three updates towards a constant online network: each shrinks the distance by tau."""
    layers = torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)
    target = torch.nn.Sequential(*layers).double()
    start = copy.deepcopy(target)
    online = copy.deepcopy(target)
    for theta in online.parameters():
        theta.data += torch.randn_like(theta)
    online(torch.randn(5, 3, dtype=torch.float64))                    # changes its statistics
    for _ in range(3):
        related.momentum_update(target, online, tau)
    networks = target, start, online
    for after, xi, theta in zip(*(network.parameters() for network in networks)):
        assert close(after, theta + tau ** 3 * (xi - theta))
    assert equal(dict(target.named_buffers()), dict(start.named_buffers()))


def test_tau_rises_to_1_by_half_a_cosine():
    """By the run's nine steps."""
    method = method_of("byol", tau=0.9)
    for step in range(10):
        assert close(method.tau(step), 1 - 0.1 * half_a_cosine(step))


def test_mocos_queue_holds_the_last_keys_the_oldest_go_first():
    """Against a list: view 1's keys enter before view 2's, and two steps replace all 12.

    A step's keys come from the target as it was before.
    """
    method_of("mocov2")
    queue = related.Queue(12, 5, like=queue_of(1, 1))
    kept = queue.rows.clone()
    assert close(kept.norm(dim=1), torch.ones(12), 1e-6)              # drawn in float32
    for number in range(3):
        keys = vectors(n=3, d=5, seed=number)[:2]
        related.enqueue(queue, number, *keys)
        kept = torch.cat([kept[6:], unit(torch.cat(keys))])
        assert close(queue.rows.roll(-6 * (number + 1), dims=0), kept)
    step, = steps_of("mocov2", 1)
    keys = [step.before.target(view) for view in step.views]
    assert close(step.after.queue.rows[:32], unit(torch.cat(keys)))


def test_prototypes_are_frozen_in_the_first_epoch():
    """The first epoch's last step against the second's first: prototypes stay, then move; all else moves.

    Their first step is that of one gradient: no momentum has gathered.
    """
    steps = steps_of("swav", 2, first=2, freeze=1)
    for step, stays in zip(steps, (True, False)):
        before, after = step.before.model, step.after.model
        w = before.predictor.prototypes.weight
        assert torch.equal(w, after.predictor.prototypes.weight) == stays
        assert not torch.equal(before.encoder.conv1.weight, after.encoder.conv1.weight)
    gradient, = torch.autograd.grad(swav_loss(step.before, step.views), w)
    expected = w - LR * half_a_cosine(3) * (gradient + DECAY * w)
    assert close(after.predictor.prototypes.weight, expected)


@pytest.mark.parametrize("name, step, more, module, share", [
    ("swav", 18, dict(lr_end=0.001), "encoder", 0.001 + 0.999 / 2),
    ("byol", 18, dict(pred_lr="cosine", pred_lr_times=10), "predictor", 10 / 2),
    ("byol", 18, dict(pred_lr="constant", pred_lr_times=10), "predictor", 10)])
def test_the_lr_falls_to_its_end_and_is_another_for_the_predictor(name, step, more, module, share):
    """Closed forms at some of 30 steps, of which 6 warm up."""
    method = method_of(name, epochs=10, warmup=2, **more)
    optimizer = method.optimizer()
    method.set_lr(optimizer, step)
    lrs = {group["module"]: group["lr"] for group in optimizer.param_groups}
    assert close(lrs[module], LR * share)


@pytest.mark.parametrize("arch, last", [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_last_bn_is_the_scale_that_residual_blocks_start_with(arch, last):
    """The last BN of each block, and no other."""
    encoder = method_of("byol", arch=arch, last_bn=0.0).model.encoder
    for name, w in encoder.named_parameters():
        if re.search(r"bn\d\.weight$", name):
            at_the_end = name.startswith("layer") and f".{last}." in name
            assert (w == (0 if at_the_end else 1)).all(), name


def test_simclrs_output_bn_has_a_scale_and_no_offset():
    """As on ImageNet: the offset exists but stays 0."""
    bn = method_of("simclr", affine=True).model.encoder.fc[-1]
    assert bn.weight.requires_grad
    assert not bn.bias.requires_grad
    assert not bn.bias.any()


def test_collapse_is_told_by_each_methods_own_sign():
    """BYOL's by loss and std, like SimSiam's; by the std alone where collapse isn't the minimum."""
    byol = method_of("byol", batch=32)
    assert byol.collapsed(0.01, 0.3)
    assert not byol.collapsed(2.0, 0.3)
    simclr = method_of("simclr", batch=32)
    assert simclr.collapsed(4.1, 2 / math.sqrt(32))                  # the least behind an output BN
    assert not simclr.collapsed(4.1, 0.95)
    without_bn = method_of("mocov2", bn=(0, 0, 1, 0))
    assert without_bn.collapsed(4.1, 0.001)
    assert not without_bn.collapsed(4.1, 0.2)


def test_a_run_says_that_its_queue_is_longer_than_the_data():
    """With 48 images and 96 keys, an image's own old keys are negatives."""
    assert "an image's own older keys are among its negatives" in method_of("mocov2", queue=96).describe()


# ------------------------------------------------------------------------------------------------------------
# CLIP's words and figures
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("start, after", [(150.0, 100.0), (0.9, 1.0)])
def test_clips_scale_stays_between_1_and_100(start, after):
    """A step from beyond a bound ends at the bound."""
    step, = steps_of("clip", 1, base_lr=1e-3, scale=start)
    assert close(step.after.model.log_scale.exp(), after)


def text_vectors(method, texts):
    """Texts through the text encoder, as unit vectors in numpy."""
    vectors = method.model.text(method.vocabulary.numbers(texts))
    return F.normalize(vectors, dim=1).detach().numpy()


def test_clips_text_is_the_mean_of_known_words():
    """Order doesn't count, unknown words are left out, a text of unknown words is 0."""
    method = method_of("clip")
    texts = {
        "a small disc": ["a", "small", "disc"],
        "disc a small": ["a", "small", "disc"],
        "a small, SMALL disc!": ["a", "small", "small", "disc"],
        "a small xylophone disc": ["a", "small", "disc"]}
    number = {word: k for k, word in enumerate(sorted(method.vocabulary.words), 1)}
    embeddings = method.model.words.weight
    for text, words in texts.items():
        mean = embeddings[[number[word] for word in words]].mean(dim=0)
        expected = unit(mean[None] @ method.model.project.weight.T)
        assert close(text_vectors(method, [text]), expected, 1e-5)
    assert not text_vectors(method, ["xylophone"]).any()


def test_clips_figures_are_shares_of_the_right_ones():
    """Computed again in numpy, for 48 images with classes. An equal caption is as good as an image's own."""
    method = method_of("clip", width=1 / 8)
    val, *_ = method.data

    def test_views(source, batches):
        return augment.load_centres(source, augment.Policy(size=16), batches, CPU, 0)

    encoder = method.model.encoder.eval()
    job = types.SimpleNamespace(val=val, train=None, device=CPU, test_views=test_views)
    found = method.measure(encoder, job)
    _, x = next(test_views(val, [(0, np.arange(48))]))
    image, = arrays(encoder(x))
    text = text_vectors(method, val.captions)
    names = text_vectors(method, [f"a {name}" for name in val.classes])
    captions = np.array(val.captions)
    right = {
        "image_to_text": captions[(image @ text.T).argmax(axis=1)] == captions,
        "text_to_image": captions[(text @ image.T).argmax(axis=1)] == captions,
        "zero_shot": (image @ names.T).argmax(axis=1) == val.labels}
    for figure, hits in right.items():
        assert hits.any()
        assert close(found[figure], 100 * hits.mean()), figure


def test_a_replacement_brings_its_own_caption(monkeypatch):
    """A bad image is replaced by the next good one; the last one's next is the first."""
    method = method_of("clip")
    for i in (1, 2, 47):
        monkeypatch.setitem(method.data.train.bad, i, "cut short")
    assert method.shown(np.array([0, 1, 2, 3, 46, 47])).tolist() == [0, 3, 3, 3, 46, 0]


# ------------------------------------------------------------------------------------------------------------
# Several processes
# ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The results of tests/world_related.py in two processes."""
    file = tmp_path_factory.mktemp("two") / "result.pth"
    out = torchrun("-m", "tests.world_related", file, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    return torch.load(file)


def gap(one, two):
    """The largest difference between the parts of two runs, and between their losses."""
    (states, losses), (other_states, other_losses) = one, two
    tensors, others = tensors_in(states), tensors_in(other_states)
    assert tensors.keys() == others.keys()
    gaps = [(tensors[name].double() - others[name].double()).abs().max() for name in tensors]
    return max(*gaps, *(abs(a - b) for a, b in zip(losses, other_losses, strict=True)))


@slow
@pytest.mark.parametrize("name, variant, more", [
    *((name, "right", {}) for name in ALL),
    ("simclr", "with a predictor", {"predictor": "mlp"}),
    ("swav", "with a predictor", {"predictor": "mlp"}),
    ("swav", "without stop-gradient", {"stopgrad": False})])
def test_two_processes_equal_one_in_float64(two, world_of_one, name, variant, more):
    """Model, target, queue and losses after six steps, on different images in each process."""
    assert gap(world_related.train(name, **more), two[name, variant]) < 1e-9


WRONG = [(name, variant) for name, variants in world_related.WRONG.items() for variant in variants]


@slow
@pytest.mark.parametrize("name, variant", WRONG)
def test_what_people_got_wrong_with_several_processes_is_seen(two, world_of_one, name, variant):
    """Each mistake differs from one process by far."""
    assert gap(world_related.train(name), two[name, variant]) > 1e-3


@pytest.mark.parametrize("world", [2, 3])
def test_nt_xents_gather_is_exact_for_each_process(world):
    """Without processes: all rows replace the sum. The mean of the losses has the whole batch's gradient."""
    z1, z2, *_ = vectors(n=6, d=5)
    whole = related.nt_xent(z1, z2, 0.5)
    losses = []
    for rank in range(world):
        mine = z1.chunk(world)[rank], z2.chunk(world)[rank]
        everybodys = iter([unit(z1), unit(z2)])
        losses.append(related.nt_xent(*mine, 0.5, lambda t: next(everybodys), rank, world))
    mean = sum(losses) / world
    assert close(mean, whole)
    gradients = torch.autograd.grad(mean, [z1, z2])
    assert all(map(close, gradients, torch.autograd.grad(whole, [z1, z2])))


# ------------------------------------------------------------------------------------------------------------
# The program
# ------------------------------------------------------------------------------------------------------------

HEADS = shlex.split("--proj-hidden 16 --pred-dim 4")
RUN = shlex.split("--arch resnet18 --cifar-stem --width 1/16 --dim 16 --batch 16 --epochs 1 --size 16 "
                  "--base-lr 0.5 --recipe cifar10 --knn-every 0 --workers 0")
FIT = {"mocov2": ["--queue", "96"], "swav": ["--prototypes", "8"]}   # for batches of 16 and 6


def options_of(name, data):
    """The options of a small run of this method or experiment."""
    if name == "clip":
        return [write_captions(data), *RUN, "--method", "clip"]
    method = next(m for m in METHODS if m in name)
    what = "--method" if name in METHODS else "--experiment"
    return [data, *RUN, *HEADS, *FIT.get(method, []), what, name]


def write_captions(folder):
    """A list of a folder's training images with captions -> its path."""
    images = sorted((folder / "train").rglob("*.png"))
    captions = shapes.draw_shapes(9, 0, len(images)).captions
    lines = [f"{image}\t{caption}\n" for image, caption in zip(images, captions)]
    path = folder / "captions.txt"
    path.write_text("".join(lines))
    return path


def run(name, data, out, *more):
    """Run this method or experiment on the small folder, in this process."""
    return here("related.py", *options_of(name, data), *more, "--out", out)


def quick_for(names, of):
    """Parameters: these names of a list are quick, the others slow."""
    return [name if name in names else pytest.param(name, marks=slow) for name in of]


# ImageNet's recipes with small networks and images: LARS and its groups, heads without BN, frozen prototypes.
AUTHORS_WAY = shlex.split("--recipe imagenet --size 24 --warmup 1 --epochs 2")


@pytest.mark.parametrize("recipe", ["cifar10", pytest.param("imagenet", marks=slow)])
@pytest.mark.parametrize("name", quick_for(["mocov2"], ALL))
def test_interrupted_method_ends_with_the_uninterrupted_weights(tmp_path, small, name, recipe):
    """Interrupted in mid-epoch, against uninterrupted: all tensors, and the losses."""
    options = [*options_of(name, small), "--batch", "12", "--epochs", "2"]
    if recipe == "imagenet":
        options += AUTHORS_WAY
    check_resumed(tmp_path, "related.py", options, at=5, steps_per_epoch=4)


@slow
@pytest.mark.parametrize("name", ALL)
def test_killed_method_ends_with_the_uninterrupted_weights(tmp_path, small, name):
    """kill -9 within an epoch, then --resume, against uninterrupted."""
    more = ["--batch", "6", "--epochs", "10", "--save-minutes", "0"]
    assert run(name, small, tmp_path / "whole", *more) is None
    killed = tmp_path / "killed"
    command = [sys.executable, ROOT / "related.py", *options_of(name, small), *more]
    command += ["--out", killed]
    position = kill_when([str(part) for part in command], killed, epoch=2)
    assert position["epoch"] < 9, "the kill came too late to show anything"
    assert run(name, small, killed, *more, "--resume") is None
    assert equal(weights_of(tmp_path / "whole"), weights_of(killed))


@slow
@pytest.mark.parametrize("name", ALL)
def test_a_method_trains_in_two_processes(tmp_path, small, name):
    """Each epoch's loss from the command line, in the authors' way, against one process."""
    more = [*AUTHORS_WAY, "--batch", "12", "--base-lr", "0.01"]
    assert run(name, small, tmp_path / "one", *more) is None
    out = torchrun(ROOT / "related.py", *options_of(name, small), *more, "--out", tmp_path / "two")
    assert out.returncode == 0, out.stderr
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    for epoch in (1, 2):
        assert close(one[epoch], two[epoch], 1e-4)                   # of float32, after 8 steps


QUICK = ["sec62-simclr-predictor-stopgrad", "sec62-swav-predictor"]


@pytest.mark.parametrize("experiment", quick_for(QUICK, RESULTS))
def test_every_experiment_trains(tmp_path, small, experiment):
    """All trainable weights move, losses are finite, and the log names the row."""
    assert run(experiment, small, tmp_path / "run", "--epochs", "2") is None
    processes.join_world(CPU)
    method = related.parse(["--experiment", experiment]).method
    assert check_run(tmp_path / "run", method) == experiment


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small):
    """A function: method -> the folder of its run, made once."""

    @functools.cache
    def train(name):
        out = tmp_path_factory.mktemp("trained") / name
        assert run(name, small, out) is None
        return out

    return train


@pytest.mark.parametrize("name", quick_for(["byol", "clip"], ALL))
def test_lineval_reads_the_online_network(trained, name):
    """It evaluates the model's encoder, not the target."""
    checkpoint = trained(name) / "checkpoint.pth"
    found = tests.helpers.lineval.read_backbone(str(checkpoint)).network.state_dict()
    model = torch.load(checkpoint, weights_only=True)["model"]
    assert equal(found, {key: model[f"encoder.{key}"] for key in found})


def test_a_methods_folder_is_its_own(trained, small):
    """The default folder has its name, and another method is refused there."""
    args = related.parse(["DATA/small", "--method", "byol"])
    assert recipes.default_folder(args) == "runs/small-byol"
    assert "byol" in run("simclr", small, trained("byol"), "--resume")


def test_resume_with_other_captions_is_refused(trained, small):
    """The same images with a different text."""
    out = trained("clip")
    captions = write_captions(small)
    words = captions.read_text().replace("ring", "comet").replace("disc", "comet")
    captions.write_text(words)
    options = [captions, *RUN, "--method", "clip", "--out", out, "--resume"]
    assert "captions" in refusal("related.py", *options)


@pytest.mark.parametrize("options, said", [
    ("", "no method is named; give --method simclr|mocov2|byol|swav|clip, or a row of --experiment list"),
    ("--experiment table5-base", "no row is called table5-base; give --method"),
    ("--method byol --queue 10", "unrecognized arguments: --queue 10; see"),
    ("--method mocov2 --tau 2", "--tau must be between 0 and 1, not 2"),
    ("--method mocov2 --queue 100 --batch 16", "--queue 100 must be a multiple of 32")])
def test_bad_options_are_refused_in_one_line(small, options, said):
    """The beginning of the line."""
    message = refusal("related.py", small, *options.split())
    assert message.startswith("related.py: " + said)


@pytest.mark.parametrize("options, word", [("--help", "Sinkhorn"), ("--method swav --help", "--prototypes")])
def test_help_needs_no_method(capsys, options, word):
    """Without a method, the file's docstring; with one, its settings."""
    with pytest.raises(SystemExit, match="^(None|0)?$"):
        related.parse(options.split())
    assert word in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# Common mistakes, put in
# ------------------------------------------------------------------------------------------------------------

ROOMS = (globals(), vars(world_related))  # where the tests find the module
PITFALLS = {  # what: (text in related.py, wrong text, the test that sees it)
    "the positive is left out, not the anchor itself": (
        "logits.scatter_(1, own, -math.inf)", "logits.scatter_(1, other, -math.inf)",
        "test_simclr_eq1_is_a_double_loop"),
    "negatives of the other view only": (
        "torch.cat([z1, z2]) @ torch.cat(every).T", "torch.cat([z1, z2]) @ torch.cat(every[::-1]).T",
        "test_simclr_eq1_is_a_double_loop"),
    "z isn't normalised": (
        "z1 = l2_normalize(z1) ", "z1 = z1 ",
        "test_simclr_eq1_is_a_double_loop"),
    "labels not shifted by the rank": (
        "torch.arange(n, device=z1.device) + rank * n", "torch.arange(n, device=z1.device)",
        "test_nt_xents_gather_is_exact_for_each_process"),
    "a gradient into the keys": (
        "k = l2_normalize(stopgrad(k))", "k = l2_normalize(k)",
        "test_moco_v2_eq1_is_a_softmax_over_one_and_k"),
    "the views of each process are gathered together": (
        "torch.cat(every).T",
        "torch.stack([torch.stack(z.chunk(world)) for z in every], 1).flatten(0, 2).T",
        "test_nt_xents_gather_is_exact_for_each_process"),
    "one direction's keys enter the queue before the other's loss": (
        "info_nce(z2, k1, queue.rows, temperature)",
        "info_nce(z2, k1, torch.cat([k2, queue.rows[len(k2):]]), temperature)",
        "test_a_step_of_moco_v2"),
    "the newest keys are replaced": (
        "start = count % len(self.rows)", "start = 0",
        "test_mocos_queue_holds_the_last_keys_the_oldest_go_first"),
    "BN statistics are averaged too": (
        "zip(target.parameters(), online.parameters(), strict=True)",
        "zip([*target.parameters(), target[1].running_mean], [*online.parameters(), online[1].running_mean])",
        "test_byol_eq1_moves_the_target_towards_the_online_network"),
    "tau counts a process's share of the steps": (
        "cosine(step, self.total_steps, 0)", "cosine(step, self.total_steps // 2, 0)",
        "test_tau_rises_to_1_by_half_a_cosine"),
    "tau counts epochs": (
        "cosine(step, self.total_steps, 0)", "cosine(step, self.s['epochs'], 0)",
        "test_tau_rises_to_1_by_half_a_cosine"),
    "the target's place is taken by the encoder that is trained": (
        "4 + 4 * loss(p1, p2, target1, target2)", "4 + 4 * loss(p1, p2, z1, z2)",
        "test_byol_eq2_is_the_squared_distance_of_both_directions"),
    "prototypes have a bias": (
        "super().__init__(d, K, bias=False)", "super().__init__(d, K, bias=True)",
        "test_scores_are_cosines_without_a_bias"),
    "SwAV's z isn't normalised": (
        "return l2_normalize(z) @", "return z @",
        "test_scores_are_cosines_without_a_bias"),
    "Sinkhorn in half precision": (
        "log_e = as_float32(scores) / eps", "log_e = scores / eps",
        "test_codes_are_finite_in_any_precision"),
    "CLIP's vectors aren't normalised": (
        "image = l2_normalize(image) ", "image = image ",
        "test_clip_fig3_is_cross_entropy_both_ways"),
    "CLIP's exp is forgotten": (
        "scale = log_scale.exp()", "scale = log_scale",
        "test_clip_fig3_is_cross_entropy_both_ways"),
    "CLIP's scale isn't clamped": (
        "log_scale.clamp_(0.0, math.log(100))", "log_scale.clamp_(0.0)",
        "test_clips_scale_stays_between_1_and_100"),
    "padding counts as a word": (
        "padding_idx=0)", "padding_idx=None)",
        "test_clips_text_is_the_mean_of_known_words"),
    "a gradient through Sinkhorn": (
        "sinkhorn = torch.no_grad()(balance)", "sinkhorn = balance",
        "test_swav_eq1_swaps_the_codes"),
    "prototypes sum to 1, and images don't": (
        "(log_u + log_e + log_v).exp()", "(log_u + log_e).exp()",
        "test_swav_eq5_is_the_listings_loop"),
    "prototypes are never frozen": (
        "prototypes.weight.grad = None", "pass",
        "test_prototypes_are_frozen_in_the_first_epoch"),
    "frozen prototypes decay": (
        "prototypes.weight.grad = None", "prototypes.weight.grad.zero_()",
        "test_prototypes_are_frozen_in_the_first_epoch"),
    "LARS adapts BN in the heads": (
        "(leaves_out and w.dim() < 2)", "(leaves_out and w.dim() < 2 and len(w) != 16)",
        "test_a_step_of_the_authors_byol"),
}


@pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered")
@pytest.mark.parametrize("what", PITFALLS)
def test_a_mistake_put_in_is_seen(what, request):
    """The named test fails with the wrong text in related.py."""
    right, wrong, name = PITFALLS[what]
    check_it_dies(mutant("related.py", right, wrong), ROOMS, globals()[name], request)


# ------------------------------------------------------------------------------------------------------------
# The map from the papers to the code
# ------------------------------------------------------------------------------------------------------------

MAP = {  # tag: (the equation, part of the claimed line, what a mutant has instead, or None)
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


def claims_of_the_papers():
    """All claims of related.py and of this file, in the order of MAP."""
    return claims(["related.py", "tests/test_related.py"], TAG, MAP, globals())


def papers_map():
    """The table in results/related.md."""
    return equation_table(claims_of_the_papers(), MAP, back="../")


def test_every_equation_is_claimed_by_one_line_and_one_test():
    """The tags against MAP."""
    check_claims(claims_of_the_papers(), MAP)


@pytest.mark.parametrize("tag", [tag for tag, (_, _, wrong) in MAP.items() if wrong is not None])
def test_a_mutant_of_every_claimed_line_dies_in_its_test(tag, request):
    """The equation's test fails with the mutant instead of the module."""
    claim, = (claim for claim in claims_of_the_papers() if claim.tag == tag)
    check_it_dies(mutant_of(claim, MAP), ROOMS, globals()[claim.test], request)


DEPARTURES = [  # (words in the line with the mark, first cell of its row in results/related.md), in order
    ("half the sum of both directions", "both directions"),
    ("normalised here", "prototypes"),
    ("resized bilinearly", "resizing"),
    ("brightness is a factor", "brightness and contrast"),
    ("each view passes", "views"),
    ("proportional to the batch", "lr by batch; set"),
    ("warm-up starts", "warm-up"),
    ("pixels are standardised", "pixels"),
    ("the loss is the mean", "sum or mean; weight decay"),
    ("weights start", "initial weights"),
    ("BN is over the whole batch", "BN"),
    ("SimSiam's blur", "views' policies"),
    ("no solarisation", "views' policies"),
    ("fc layers before a BN", "biases of fc layers"),
    ("no queue", "queue of outputs"),
    ("bag of words", "text encoder"),
    ("image encoder", "image encoder"),
    ("0.6", "crop"),
    ("32,768", "lr and warm-up"),
]


def test_every_departure_has_its_row_in_the_page():
    """The marks in related.py against the table above, whose rows are the page's."""
    rows = check_departures("related.py", DEPARTURES, "results/related.md", "| | the authors | here |")
    assert {row for _, row in DEPARTURES} == rows


def test_the_page_has_the_map_of_the_sources():
    """results/related.md has the table that is made from the sources."""
    assert papers_map() in (ROOT / "results/related.md").read_text(), "python -m tests.test_related writes it"


if __name__ == "__main__":
    write_tables(ROOT / "results/related.md", [papers_map()])
