"""The paper as tests: each compares the code with something independent: float64, plain torch, a count.

    python -m pytest -q test_simsiam.py             the quick ones
    SLOW=1 python -m pytest -q test_simsiam.py      all
    python test_simsiam.py                          writes the README's map from the paper to the code

First come the facts that we typed from the paper; then the equations in the paper's order, the model, the
settings, the experiments, the map from the paper to the code, the README. All other tests are in tests/.
"""
import collections
import contextlib
import copy
import functools
import inspect
import itertools
import math
import re
import shlex
import signal
import sys
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import augment
import lineval
import simsiam
import tests.helpers
from harness.data import loading, shapes
from harness.training.per_image import PerImageVectors
from results.pages import write_tables
from tests import shape_comments
from tests.claims import (arguments_for, check_claims, check_equation, check_it_dies, claims, equation_table,
                          mutant_of, the_test_called, trailing_comments)
from tests.helpers import (CPU, RELEASED_HEADS, ROOT, TINY, equal, here, log_of, numpy_D, slow, start,
                           tiny_model, torchrun, torchvision_names, vectors, weights_of)

pytest_plugins = ["tests.fixtures"]
NO_AUTOCAST = torch.autocast("cpu", enabled=False)


# ------------------------------------------------------------------------------------------------------------
# Typed from the paper, and from the released files
# ------------------------------------------------------------------------------------------------------------

PAPER = {  # Sec. 3; supplements A and D; Table 1 (c)
    "imagenet": dict(
        arch="resnet50", width=1.0, cifar_stem=False, proj_layers=3, proj_hidden=2048, dim=2048, pred_dim=512,
        epochs=100, batch=512, base_lr=0.05, momentum=0.9, weight_decay=0.0001, warmup=0, pred_lr="constant",
        size=224, area=(0.2, 1.0), aspect=(0.75, 1 / 0.75), flip=0.5,
        jitter=0.8, strength=(0.4, 0.4, 0.4, 0.1), gray=0.2, blur=0.5, sigma=(0.1, 2.0),
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), centre=0.875),
    "cifar10": dict(
        arch="resnet18", width=1.0, cifar_stem=True, proj_layers=2, dim=2048,
        epochs=800, batch=512, base_lr=0.03, momentum=0.9, weight_decay=0.0005, warmup=0, pred_lr="constant",
        size=32, area=(0.2, 1.0), flip=0.5,
        jitter=0.8, strength=(0.4, 0.4, 0.4, 0.1), gray=0.2, blur=0.0, centre=1.0)}

LINEAR = {  # supplement A; the base lr of lars is the released code's
    "lars": {"base_lr": 0.1, "batch": 4096, "epochs": 90},
    "sgd": {"base_lr": 30, "batch": 256, "epochs": 100}}

PAPERS_RESULTS = {  # what a row changes on ImageNet, and the top-1 that its table has
    "simsiam": (dict(batch=512), "68.1"),
    "fig2-with-stopgrad": (dict(pred_lr="cosine"), "67.7"),
    "fig2-without-stopgrad": (dict(pred_lr="cosine", objective="without-stopgrad"), "0.1"),
    "table1-baseline": (dict(pred_lr="cosine", predictor="mlp"), "67.7"),
    "table1-a-no-predictor": (dict(pred_lr="cosine", predictor="none"), "0.1"),
    "table1-b-fixed-predictor": (dict(pred_lr="cosine", predictor="fixed"), "1.5"),
    "table1-c-constant-lr": (dict(pred_lr="constant"), "68.1"),
    "table2-batch-64": (dict(batch=64, warmup=0), "66.1"),
    "table2-batch-128": (dict(batch=128, warmup=0), "67.3"),
    "table2-batch-256": (dict(batch=256, warmup=0), "68.1"),
    "table2-batch-512": (dict(batch=512, warmup=0), "68.1"),
    "table2-batch-1024": (dict(batch=1024, warmup=10), "68.0"),
    "table2-batch-2048": (dict(batch=2048, warmup=10), "67.9"),
    "table2-batch-4096": (dict(batch=4096, warmup=10), "64.0"),
    "table3-a-no-bn": (dict(bn=(0, 0, 0, 0), warmup=10), "34.6"),
    "table3-b-hidden-bn": (dict(bn=(1, 0, 1, 0), warmup=0), "67.4"),
    "table3-c-default": (dict(bn=(1, 1, 1, 0), warmup=0), "68.1"),
    "table3-d-all-bn": (dict(bn=(1, 1, 1, 1), warmup=0), "unstable"),
    "sec3-affine-output-bn": (dict(affine=True), "68.2 without"),
    "sec42-asymmetric-no-h": (dict(objective="asymmetric", predictor="none"), "fails"),
    "sec45-cross-entropy": (dict(objective="cross-entropy"), "63.2"),
    "sec46-asymmetric": (dict(objective="asymmetric", predictor="mlp"), "64.8"),
    "sec46-asymmetric-2x": (dict(objective="asymmetric-2x"), "67.3"),
    "sec52-1-step": (dict(eta="alternate", k=1), "68.1"),
    "sec52-10-step": (dict(eta="alternate", k=10), "68.7"),
    "sec52-100-step": (dict(eta="alternate", k=100), "68.9"),
    "sec52-1-epoch": (dict(eta="alternate", k=0), "67.0"),
    "sec52-moving-average": (dict(eta="average", m=0.8, predictor="none"), "55.0"),
    "suppA-fc-std-0.01": (dict(fc_std=0.01), "may not converge"),
    "suppB-dim-256": (dict(dim=256, pred_dim=64), "65.3"),
    "suppB-dim-512": (dict(dim=512, pred_dim=128), "67.2"),
    "suppB-dim-1024": (dict(dim=1024, pred_dim=256), "67.5"),
    "suppB-dim-2048": (dict(dim=2048, pred_dim=512), "68.1"),
    "suppB-hidden-d": (dict(dim=2048, pred_dim=2048), "can fail"),
    "table4-100-epochs": (dict(batch=256, epochs=100), "68.1"),
    "table4-200-epochs": (dict(batch=256, epochs=200), "70.0"),
    "table4-400-epochs": (dict(batch=256, epochs=400), "70.8"),
    "table4-800-epochs": (dict(batch=256, epochs=800), "71.3"),
    "table5-base": (dict(batch=256, epochs=200), "the base"),
    "table5-recipe": (
        dict(batch=256, epochs=200, base_lr=0.5, weight_decay=1e-5), "better than the base recipe")}


# ------------------------------------------------------------------------------------------------------------
# 1. The equations, in the paper's order
# ------------------------------------------------------------------------------------------------------------

def unit(v):
    """Each row divided by its norm."""
    return v / v.norm(dim=1, keepdim=True)


def gradients_of(L, *inputs):
    """The gradient with respect to each input; None where there is none."""
    return torch.autograd.grad(L, inputs, allow_unused=True, retain_graph=True)


def squared_error(a, b):
    """The mean over the rows of |a - b|^2."""
    return ((a - b) ** 2).sum(dim=1).mean()


# --- Sec. 3: the loss ---------------------------------------------------------------------------------------

def test_eq01_D_is_the_negative_cosine():
    """Value and gradients against numpy and against the formula's derivative by hand."""
    p, z, *_ = vectors()
    value = simsiam.D(p, z).item()
    assert value == pytest.approx(numpy_D(p, z), abs=1e-14)
    assert value == pytest.approx(squared_error(unit(p), unit(z)).item() / 2 - 1, abs=1e-14)
    assert simsiam.D(p, 3 * p).item() == pytest.approx(-1)
    assert simsiam.D(p, -p).item() == pytest.approx(1)
    gradients = gradients_of(simsiam.D(p, z), p, z)                  # both: D does not detach
    for x, y, gradient in ((p, z, gradients[0]), (z, p, gradients[1])):
        x_unit, y_unit = unit(x), unit(y)
        cosine = (x_unit * y_unit).sum(dim=1, keepdim=True)
        by_hand = -(y_unit - cosine * x_unit) / x.norm(dim=1, keepdim=True) / len(x)
        assert torch.allclose(gradient, by_hand, atol=1e-14)


def test_eq02_symmetrised_loss():
    """Against numpy, and the minimum."""
    p1, p2, z1, z2 = vectors()
    L = numpy_D(p1, z2) / 2 + numpy_D(p2, z1) / 2
    assert simsiam.loss_without_stopgrad(p1, p2, z1, z2).item() == pytest.approx(L, abs=1e-14)
    assert simsiam.loss_without_stopgrad(z1, z2, 3 * z2, 2 * z1).item() == pytest.approx(-1)


def test_eq03_stopgrad_is_the_identity_without_gradient():
    """Against the tensor that goes in."""
    z, *_ = vectors()
    assert torch.equal(simsiam.stopgrad(z), z)
    assert not simsiam.stopgrad(z).requires_grad


def test_eq04_loss_and_its_gradients():
    """The value against numpy, the gradients against those of Eq. (2): the same for p, none for z."""
    p1, p2, z1, z2 = vectors()
    L = simsiam.loss(p1, p2, z1, z2)
    assert L.item() == pytest.approx(numpy_D(p1, z2) / 2 + numpy_D(p2, z1) / 2, abs=1e-14)
    assert simsiam.loss(z1, z2, 3 * z2, 2 * z1).item() == pytest.approx(-1)          # the minimum
    stopped = gradients_of(L, p1, p2, z1, z2)
    whole = gradients_of(simsiam.loss_without_stopgrad(p1, p2, z1, z2), p1, p2, z1, z2)
    assert torch.equal(stopped[0], whole[0])
    assert torch.equal(stopped[1], whole[1])
    assert stopped[2:] == (None, None)
    assert whole[2].abs().max() > 0
    assert whole[3].abs().max() > 0


def test_z_is_a_constant_as_a_target_only():
    """The encoder gets a gradient through p1, which is made of z1; z1 itself gives it none."""
    x, p2, _, z2 = vectors()
    f = torch.nn.Linear(5, 5).double()
    z1 = f(x.detach())
    p1 = 2 * z1 + z1.roll(1, 1)
    gradient, = gradients_of(simsiam.loss(p1, p2, z1, z2), f.weight)
    assert gradient.abs().max() > 0


# --- Sec. 5.1: the hypothesis, on a toy problem. 5 images, 4 equally likely augmentations of each, F linear -

TOY = np.random.default_rng(0).normal(size=(5, 4, 3))                # T(x): image x under augmentation T
TOY_THETA = np.random.default_rng(1).normal(size=(3, 2))


def toy_L(theta, eta):
    """The mean over images x and augmentations T."""
    return np.mean(np.sum((TOY @ theta - eta[:, None]) ** 2, axis=-1))  # Eq. (5): the error of eta


def toy_eta(theta):
    """One vector per image."""
    return (TOY @ theta).mean(axis=1)  # Eq. (9): the mean over the augmentations


def numeric_gradient(f, at, h=1e-6):
    """The gradient of f, by central differences."""
    slopes = []
    for k in range(at.size):
        step = np.zeros(at.size)
        step[k] = h
        step = step.reshape(at.shape)
        slopes.append((f(at + step) - f(at - step)) / (2 * h))
    return np.reshape(slopes, at.shape)


def test_eq05_is_the_squared_error_that_D_stands_for():
    """Against a sum written out. With normalised outputs and eta (footnote 5) it is 2 D and a constant."""
    eta = np.random.default_rng(2).normal(size=(5, 2))
    errors = [((TOY[x, t] @ TOY_THETA - eta[x]) ** 2).sum() for x in range(5) for t in range(4)]
    assert toy_L(TOY_THETA, eta) == pytest.approx(sum(errors) / 20)
    outputs = unit(torch.tensor(TOY @ TOY_THETA).flatten(0, 1))
    targets = unit(torch.tensor(eta).repeat_interleave(4, dim=0))
    error = squared_error(outputs, targets).item()
    assert error == pytest.approx(2 + 2 * simsiam.D(outputs, targets).item())


def test_eq06_alternating_lowers_the_loss_until_it_is_at_the_minimum_over_both():
    """The alternation's end against the smallest eigenvalue. |theta| = 1, because theta = 0 is collapse."""
    assert toy_L(np.zeros((3, 1)), np.zeros((5, 1))) == 0
    within = TOY - TOY.mean(axis=1, keepdims=True)
    scatter = np.einsum("xti,xtj->ij", within, within) / 20
    minimum = np.linalg.eigvalsh(scatter)[0]  # Eq. (6): over theta of norm 1 and all eta
    theta = np.ones((3, 1)) / math.sqrt(3)
    losses = []
    for _ in range(2000):
        eta = toy_eta(theta)
        theta = theta - 0.2 * numeric_gradient(lambda v: toy_L(v, eta), theta)
        theta = theta / np.linalg.norm(theta)
        losses.append(toy_L(theta, toy_eta(theta)))
    assert np.diff(losses).max() <= 1e-9
    assert losses[-1] == pytest.approx(minimum, rel=1e-4)


def test_eq07_theta_is_fitted_to_an_eta_that_stays():
    """The value against numpy; gradients for p alone, half those of the squared error."""
    p1, p2, z1, z2 = vectors()
    eta1, eta2, *_ = vectors(seed=1)
    L = simsiam.towards(eta1, eta2)(p1, p2, z1, z2)
    assert L.item() == pytest.approx((numpy_D(p1, eta2) + numpy_D(p2, eta1)) / 2, abs=1e-14)
    gradients = gradients_of(L, p1, p2, z1, z2, eta1, eta2)
    assert gradients[2:] == (None, None, None, None)
    error1 = squared_error(unit(p1), unit(eta2.detach()))
    error2 = squared_error(unit(p2), unit(eta1.detach()))
    for a, b in zip(gradients, gradients_of((error1 + error2) / 2, p1, p2)):
        assert torch.allclose(a, b / 2, atol=1e-14)


def test_eq08_the_problem_of_eta_is_one_per_image():
    """Each image alone, by least squares, against the mean over its augmentations."""
    for x in range(5):
        ones = np.ones((4, 1))
        alone = np.linalg.lstsq(ones, TOY[x] @ TOY_THETA, rcond=None)[0]             # Eq. (8): of one image
        assert np.allclose(alone, toy_eta(TOY_THETA)[x])


def test_eq09_eta_is_the_mean_over_the_augmentations():
    """No gradient there, and no other eta nearby is better."""
    rng = np.random.default_rng(2)
    eta = toy_eta(TOY_THETA)
    assert np.abs(numeric_gradient(lambda v: toy_L(TOY_THETA, v), eta)).max() < 1e-8
    for _ in range(100):
        assert toy_L(TOY_THETA, eta + 0.1 * rng.normal(size=eta.shape)) > toy_L(TOY_THETA, eta)


# --- Sec. 5.1: the hypothesis, in training ------------------------------------------------------------------

def drawn_views(batches):
    """(indices, [x1, x2]) in float32 of 40 drawn shapes."""
    source = shapes.draw_shapes(0, 0, 40, 16)
    return augment.load_views(source, augment.Policy(size=16), 0, batches, CPU, 0)


def batches_of(steps):
    """The first steps of training on 40 images with batches of 10: four an epoch."""
    return itertools.islice(loading.index_batches(0, 40, 10, 4), steps)


def new_model(dtype=torch.float64, **options):
    """The same tiny model at each call."""
    torch.manual_seed(0)
    return tiny_model(width=1 / 8, **options).to(dtype)


def trained(stream, steps=7, dtype=torch.float64, **options):
    """A new model after some steps on the stream of (views, objective), and its losses."""
    model = new_model(dtype, **options)
    optimizer = simsiam.sgd(model, 0.9, 1e-4)
    losses = []

    def views(batches):
        return ((index, [v.to(dtype) for v in x]) for index, x in drawn_views(batches))

    for t, (x, objective) in enumerate(stream(model, views, batches_of(steps))):
        simsiam.set_lr(optimizer, 0.3, t, 2 * steps, 0, "cosine")
        L, _ = simsiam.train_step(model, objective, optimizer, NO_AUTOCAST, x)
        losses.append(L.item())
    assert len(losses) == steps
    return model, losses


def plain_steps(model, views, batches):
    """A stream for `trained`: plain training."""
    return simsiam.plain(views(batches), simsiam.loss)


def k_steps(k, steps=7):
    """A stream for `trained`: Sec. 5.2's k-step alternation."""
    def stream(model, views, batches):
        theta = copy.deepcopy(model)
        twice = views(simsiam.twice(batches, k, 0))
        return simsiam.alternate(twice, model, theta, k, 0, steps, NO_AUTOCAST)

    return stream


def averaged_steps(store, m):
    """A stream for `trained`: Sec. 5.2's moving average."""
    return lambda model, views, batches: simsiam.average(views(batches), store, m)


def test_eq10_eta_is_what_the_outer_loops_weights_make_of_the_same_views():
    """Against a loop that copies every theta^t, keeps nothing else, and takes the squared error."""
    k, steps = 3, 7
    model, losses = trained(k_steps(k, steps), steps)
    reference = new_model()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-4)
    for t, (_, views) in enumerate(drawn_views(batches_of(steps))):
        if t % k == 0:
            theta_t = copy.deepcopy(reference)
        x1, x2 = (x.double() for x in views)
        with torch.no_grad():
            eta1, eta2 = (unit(theta_t.encoder(x)) for x in (x1, x2))
        p1, p2 = (unit(reference.predictor(reference.encoder(x))) for x in (x1, x2))
        error = (squared_error(p1, eta2) + squared_error(p2, eta1)) / 2              # twice D, and a constant
        optimizer.param_groups[0]["lr"] = 0.3 * (1 + math.cos(math.pi * t / 14)) / 2
        optimizer.zero_grad()
        (error / 2).backward()
        optimizer.step()
        assert losses[t] == pytest.approx(error.item() / 2 - 1, abs=1e-9)
    ours = model.encoder.state_dict()
    for name, value in reference.encoder.state_dict().items():  # computing eta leaves no mark on them
        assert torch.allclose(ours[name].double(), value.double(), atol=1e-9), name


def test_eq11_plain_training_takes_the_gradient_step_of_its_problem():
    """One step of plain training against one of SGD on Eq. (11), normalised outputs, both views in turn."""
    model, losses = trained(plain_steps, steps=1, predictor="none")
    theta = new_model(predictor="none")
    theta_t = copy.deepcopy(theta).requires_grad_(False)
    (_, views), = drawn_views(batches_of(1))
    x1, x2 = (x.double() for x in views)
    errors = []
    for x, other in ((x1, x2), (x2, x1)):
        difference = unit(theta.encoder(x)) - unit(theta_t.encoder(other))
        errors.append((difference ** 2).sum(dim=1).mean())           # Eq. (11): theta moves, its target stays
    error = sum(errors) / 2                                          # twice D, and a constant
    assert losses == [pytest.approx(error.item() / 2 - 1, abs=1e-9)]
    gradients = torch.autograd.grad(error, list(theta.parameters()))
    for w, gradient, ours in zip(theta.parameters(), gradients, model.parameters()):
        assert torch.allclose(w - 0.3 * (gradient / 2 + 1e-4 * w), ours, atol=1e-9)


# --- Algorithm 1 --------------------------------------------------------------------------------------------

def released(state, x, blocks):
    """p, z of a batch: f and h as functions of a state_dict, without modules."""
    def bn(x, name):
        scale = state.get(name + ".weight")
        offset = state.get(name + ".bias")
        return F.batch_norm(x, None, None, scale, offset, training=True)

    x = F.conv2d(x, state["encoder.conv1.weight"], stride=2, padding=3)
    x = F.max_pool2d(F.relu(bn(x, "encoder.bn1")), 3, 2, 1)
    for stage, count in enumerate(blocks):
        for block in range(count):
            at = f"encoder.layer{stage + 1}.{block}."
            stride = 2 if stage > 0 and block == 0 else 1
            y = F.relu(bn(F.conv2d(x, state[at + "conv1.weight"]), at + "bn1"))
            y = F.relu(bn(F.conv2d(y, state[at + "conv2.weight"], stride=stride, padding=1), at + "bn2"))
            y = bn(F.conv2d(y, state[at + "conv3.weight"]), at + "bn3")
            if block == 0:
                x = F.conv2d(x, state[at + "downsample.0.weight"], stride=stride)
                x = bn(x, at + "downsample.1")
            x = F.relu(x + y)
    z = x.mean(dim=(2, 3))
    z = F.relu(bn(z @ state["encoder.fc.0.weight"].T, "encoder.fc.1"))
    z = F.relu(bn(z @ state["encoder.fc.3.weight"].T, "encoder.fc.4"))
    z = bn(z @ state["encoder.fc.6.weight"].T, "encoder.fc.7")
    p = F.relu(bn(z @ state["predictor.0.weight"].T, "predictor.1"))
    return p @ state["predictor.3.weight"].T + state["predictor.3.bias"], z


def test_alg1_parity_with_the_released_model():
    """Loss, gradients and weights over three steps of SGD in float64, against functions of a state_dict."""
    torch.manual_seed(0)
    model = tiny_model(arch="resnet50", proj_layers=3, cifar_stem=False).double()
    for w in model.parameters():
        w.data += 0.1 * torch.randn_like(w)  # away from zero scales and offsets, which would hide errors
    state = {name: w.detach().clone().requires_grad_() for name, w in model.named_parameters()}
    velocity = {name: torch.zeros_like(w) for name, w in state.items()}
    optimizer = simsiam.sgd(model, 0.9, 0.01)
    cosine = torch.nn.CosineSimilarity(dim=1)
    for step in range(3):
        x1, x2 = torch.randn(2, 6, 3, 40, 40, dtype=torch.float64)
        simsiam.set_lr(optimizer, 0.1, step, 4, 0, "cosine")
        L, z = simsiam.train_step(model, simsiam.loss, optimizer, NO_AUTOCAST, [x1, x2])
        p1, z1 = released(state, x1, (3, 4, 6, 3))
        p2, z2 = released(state, x2, (3, 4, 6, 3))
        expected = -(cosine(p1, z2.detach()).mean() + cosine(p2, z1.detach()).mean()) * 0.5
        assert L.item() == pytest.approx(expected.item(), abs=1e-10)
        assert torch.allclose(z[0], z1, atol=1e-8)
        assert torch.allclose(z[1], z2, atol=1e-8)
        gradients = dict(zip(state, torch.autograd.grad(expected, state.values())))
        lr = 0.1 * (1 + math.cos(math.pi * step / 4)) / 2
        for name, w in model.named_parameters():
            assert torch.allclose(w.grad, gradients[name], rtol=1e-6, atol=1e-9), name
            with torch.no_grad():
                velocity[name] = 0.9 * velocity[name] + gradients[name] + 0.01 * state[name]
                state[name] -= lr * velocity[name]
            assert torch.allclose(w, state[name], rtol=1e-6, atol=1e-9), name


# --- Sec. 3: optimisation -----------------------------------------------------------------------------------

def test_sec3_lr_rule_is_linear():
    """Against the paper's own figures, and one below a batch of 256."""
    assert simsiam.initial_lr(0.05, 512) == 0.1
    assert simsiam.initial_lr(0.05, 256) == 0.05
    assert simsiam.initial_lr(0.03, 64) == 0.0075


def test_sec3_schedule_is_a_warm_up_and_half_a_cosine():
    """Against values in closed form."""
    half_root = math.sqrt(0.125)
    factors = [simsiam.cosine(t, 8, 0) for t in (0, 2, 4, 6, 8)]
    assert factors == pytest.approx([1, 0.5 + half_root, 0.5, 0.5 - half_root, 0])
    assert [simsiam.cosine(t, 12, 4) for t in (0, 3, 4, 8, 12)] == pytest.approx([1, 1, 1, 0.5, 0])
    assert [simsiam.warmup(t, 4) for t in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert simsiam.warmup(0, 0) == 1


def lrs_at(step, pred_lr):
    """The lr of f and of h at this step of 12, of which 4 warm up, from an initial lr of 2."""
    optimizer = simsiam.sgd(tiny_model(), 0.9, 1e-4)
    simsiam.set_lr(optimizer, 2.0, step, 12, 4, pred_lr)
    return [group["lr"] for group in optimizer.param_groups]


def test_lr_of_h_is_decayed_or_stays():
    """Table 1 (c), against values in closed form."""
    assert lrs_at(8, "cosine") == pytest.approx([1.0, 1.0])
    assert lrs_at(8, "constant") == pytest.approx([1.0, 2.0])
    assert lrs_at(1, "constant") == [1.0, 2.0]                       # only f warms up


def test_sgd_has_every_parameter_once():
    """The two groups against the model's own parameters."""
    model = tiny_model()
    optimizer = simsiam.sgd(model, 0.9, 1e-4)
    f, h = ([id(w) for w in group["params"]] for group in optimizer.param_groups)
    assert sorted(f + h) == sorted(id(w) for w in model.parameters())
    assert h == [id(w) for w in model.predictor.parameters()]
    for group in optimizer.param_groups:
        assert group["weight_decay"] == 1e-4
        assert group["momentum"] == 0.9


# --- Sec. 4: what is watched, and the ablations' losses -----------------------------------------------------

def test_sec41_std_of_the_normalised_output():
    """Against numpy, and in its two limits: scattered 1/sqrt(d), collapsed 0."""
    z, *_ = vectors(50, 8)
    v = unit(z).detach().numpy()
    assert simsiam.feature_std(z).item() == pytest.approx(v.std(axis=0).mean(), abs=1e-12)
    torch.manual_seed(0)
    assert simsiam.feature_std(torch.randn(4000, 256)).item() * 16 == pytest.approx(1, abs=0.01)
    assert simsiam.feature_std(torch.ones(100, 256)).item() < 1e-4


def test_sec42_no_h_gradient_is_half_of_the_unstopped_one():
    """Without h, the gradient of Eq. (4) against that of D(z1, z2) (Sec. 4.2)."""
    model = tiny_model(predictor="none").double()
    x1, x2 = torch.randn(2, 8, 3, 16, 16, dtype=torch.float64)
    (p1, p2), (z1, z2) = model(x1, x2)
    assert p1 is z1
    assert p2 is z2
    assert not any(name.startswith("predictor") for name in model.state_dict())
    weights = list(model.parameters())
    stopped = gradients_of(simsiam.loss(p1, p2, z1, z2), *weights)
    whole = gradients_of(simsiam.D(z1, z2), *weights)
    for a, b in zip(stopped, whole):
        assert torch.allclose(a, b / 2, atol=1e-12)
    assert max(g.abs().max() for g in whole) > 1e-3


def softmax_in_numpy(v):
    """Over the columns."""
    e = np.exp(v.detach().numpy())
    return e / e.sum(axis=1, keepdims=True)


def test_sec45_cross_entropy_similarity():
    """Value and gradient against numpy, and the minimum."""
    p1, p2, z1, z2 = vectors()
    value12, value21 = (-np.mean(np.sum(softmax_in_numpy(z) * np.log(softmax_in_numpy(p)), axis=1))
                        for p, z in ((p1, z2), (p2, z1)))
    L = simsiam.loss_cross_entropy(p1, p2, z1, z2)
    assert simsiam.D_cross_entropy(p1, z2).item() == pytest.approx(value12, abs=1e-14)
    assert L.item() == pytest.approx((value12 + value21) / 2, abs=1e-14)
    gradients = gradients_of(L, p1, p2, z1, z2)
    by_hand = (softmax_in_numpy(p1) - softmax_in_numpy(z2)) / len(p1)
    assert np.allclose(gradients[0], by_hand / 2, atol=1e-14)
    assert gradients[2:] == (None, None)
    certain = 100 * torch.eye(5, dtype=torch.float64)
    assert simsiam.D_cross_entropy(certain, certain).item() == pytest.approx(0, abs=1e-12)


def test_sec46_asymmetric_losses():
    """Values against numpy, and which of the outputs get a gradient."""
    p1, p2, z1, z2 = vectors()
    p3, p4, z3, z4 = vectors(seed=1)
    assert simsiam.loss_asymmetric(p1, p2, z1, z2).item() == pytest.approx(numpy_D(p1, z2), abs=1e-14)
    L = simsiam.loss_asymmetric_2x(p1, p2, p3, p4, z1, z2, z3, z4)
    assert L.item() == pytest.approx((numpy_D(p1, z2) + numpy_D(p3, z4)) / 2, abs=1e-14)
    gradients = gradients_of(L, p1, p2, p3, p4, z1, z2, z3, z4)
    assert [g is not None for g in gradients] == [True, False, True, False, False, False, False, False]


def test_four_views_of_an_image_are_four():
    """Each view against each other, for Sec. 4.6's two pairs."""
    source = shapes.draw_shapes(0, 0, 8, 16)
    batches = [(0, np.arange(8))]
    (_, x), = augment.load_views(source, augment.Policy(size=16), 0, batches, CPU, 0, views=4)
    assert len(x) == 4
    for a, b in itertools.combinations(x, 2):
        assert (a - b).abs().mean() > 0.1


# --- Sec. 5: h, and the two variants ------------------------------------------------------------------------

def test_sec51_h_predicts_the_mean_over_the_augmentations():
    """The best of all functions of z1, by one Newton step, against E_T[z2]; and p against h(z) in torch."""
    z = torch.tensor(TOY @ TOY_THETA)                                # (5, 4, 2): z of image x under T
    h = torch.zeros(5, 4, 2, dtype=torch.float64, requires_grad=True)  # any function: a table over the z1
    error = ((h[:, :, None] - z[:, None]) ** 2).sum(dim=-1).mean()   # over x, T of z1, T' of z2
    gradient, = gradients_of(error, h)
    best = h - 10 * gradient                                         # a quadratic
    assert torch.allclose(best, z.mean(dim=1, keepdim=True).expand(5, 4, 2))
    model = tiny_model().double().eval()
    p, z = model(*torch.randn(2, 4, 3, 16, 16, dtype=torch.float64))
    w = model.predictor.state_dict()
    for p_i, z_i in zip(p, z):
        hidden = z_i @ w["0.weight"].T
        hidden = F.batch_norm(hidden, w["1.running_mean"], w["1.running_var"], w["1.weight"], w["1.bias"])
        expected = F.relu(hidden) @ w["3.weight"].T + w["3.bias"]
        assert torch.allclose(p_i, expected, atol=1e-12)


def test_sec52_kstep_with_one_step_is_plain_training_bit_for_bit():
    """k = 1 against plain training; k = 3 differs from its second step on."""
    model, losses = trained(plain_steps, dtype=torch.float32)
    one, losses_one = trained(k_steps(1), dtype=torch.float32)
    assert losses == losses_one
    assert equal(model.state_dict(), one.state_dict())
    _, losses_three = trained(k_steps(3), dtype=torch.float32)
    assert losses_three[0] == losses[0]
    assert losses_three[1] != losses[1]


def test_sec52_moving_average_of_eta(world_of_one):
    """Two visits of the same images, against the formula in numpy; the first initialises."""
    store = PerImageVectors(6, 5, CPU)
    store.mine = store.mine.double()
    kept = np.zeros((6, 5))
    for visit, index in enumerate((np.array([4, 1, 0]), np.array([1, 5, 4]))):
        p1, p2, z1, z2 = vectors(3, 5, seed=visit)
        (_, objective), = simsiam.average([(index, None)], store, 0.8)
        L = objective(p1, p2, z1, z2)
        eta1, eta2 = (0.8 * kept[index] + 0.2 * unit(z).detach().numpy() for z in (z1, z2))
        expected = (numpy_D(p1, torch.tensor(eta2)) + numpy_D(p2, torch.tensor(eta1))) / 2
        kept[index] = unit(torch.tensor(eta1 + eta2))
        assert L.item() == pytest.approx(expected, abs=1e-7)
        assert np.allclose(store.state_dict()["vectors"], kept, atol=1e-7)
        gradients = gradients_of(L, p1, p2, z1, z2)
        assert gradients[0] is not None
        assert gradients[2:] == (None, None)                         # eta is a constant


def test_table1_a_is_the_moving_average_with_m_0(world_of_one):
    """m = 0 against plain training without h; m = 0.8 differs from the second visit on."""
    model, losses = trained(plain_steps, predictor="none")
    store = PerImageVectors(40, 16, CPU)
    store.mine = store.mine.double()
    forgetful, losses_0 = trained(averaged_steps(store, 0.0), predictor="none")
    assert losses_0 == pytest.approx(losses, abs=1e-6)
    for a, b in zip(model.parameters(), forgetful.parameters()):
        assert torch.allclose(a, b, atol=1e-6)
    norms = store.mine[:-1].norm(dim=1)  # the last row is no image's
    assert torch.allclose(norms, torch.ones(40, dtype=torch.float64), atol=1e-6)
    _, losses_8 = trained(averaged_steps(PerImageVectors(40, 16, CPU), 0.8), predictor="none")
    assert losses_8[:4] == pytest.approx(losses[:4], abs=1e-6)
    assert losses_8[4] != pytest.approx(losses[4], abs=1e-4)


SEC52 = shlex.split("--recipe cifar10 --knn-every 0 --workers 0")


def means_of_epochs(folder):
    """(loss, std) of each epoch of a run."""
    return [(r["loss"], r["std"]) for r in log_of(folder) if r["event"] == "epoch" and r["epoch"] > 0]


@pytest.fixture
def in_one_and_two(tmp_path, small):
    """A function that runs an experiment in one process and in two -> the two folders."""
    def run(experiment):
        options = [small, *TINY, *SEC52, "--experiment", experiment, "--batch", "10"]
        assert here("simsiam.py", *options, "--out", tmp_path / "one") is None
        two = torchrun(ROOT / "simsiam.py", *options, "--out", tmp_path / "two")
        assert two.returncode == 0, two.stderr
        return tmp_path / "one", tmp_path / "two"

    return run


@slow
@pytest.mark.parametrize("experiment", ["sec52-10-step", "sec52-moving-average"])
def test_experiments_of_sec52_do_the_same_in_two_processes(in_one_and_two, experiment):
    """Loss and std of each epoch in two processes against one."""
    one, two = in_one_and_two(experiment)
    assert len(means_of_epochs(one)) == 3
    assert np.allclose(means_of_epochs(one), means_of_epochs(two), atol=2e-3)


@slow
def test_eta_of_two_processes_is_that_of_one(in_one_and_two):
    """Each image's vector in the checkpoint of two processes against that of one."""
    eta = []
    for folder in in_one_and_two("sec52-moving-average"):
        checkpoint = torch.load(folder / "checkpoint.pth", weights_only=True)
        eta.append(checkpoint["eta"]["vectors"])
    assert (eta[0] * eta[1]).sum(dim=1).min() > 0.95
    assert torch.allclose(eta[0].norm(dim=1), torch.ones(50), atol=1e-5)


@slow
@pytest.mark.parametrize("experiment, at", [
    ("sec52-10-step", 13),
    ("sec52-1-epoch", 10),
    ("sec52-moving-average", 13)])
def test_interrupted_experiment_ends_with_the_uninterrupted_weights(tmp_path, small, experiment, at):
    """Interrupted in an inner loop and resumed, against uninterrupted: eta is made of theta^t again."""
    options = [small, *TINY, *SEC52, "--experiment", experiment, "--batch", "6", "--save-minutes", "0"]
    assert here("simsiam.py", *options, "--out", tmp_path / "whole") is None
    train_step = simsiam.train_step
    steps = itertools.count()

    def interrupted(*arguments):
        if next(steps) == at:
            raise KeyboardInterrupt
        return train_step(*arguments)

    with mock.patch.object(simsiam, "train_step", interrupted):
        assert "interrupted" in here("simsiam.py", *options, "--out", tmp_path / "parts")
    checkpoint = torch.load(tmp_path / "parts/checkpoint.pth", weights_only=True)
    assert checkpoint["epoch"] * 8 + checkpoint["step"] == at
    assert here("simsiam.py", *options, "--out", tmp_path / "parts", "--resume") is None
    assert equal(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))


# --- Supplement A: LARS (You et al. 2017) -------------------------------------------------------------------

@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lars_is_its_formula_step_by_step(weight_decay):
    """Against numpy, at four lrs: a weight, a bias that starts at 0, and a tensor whose gradient is 0."""
    torch.manual_seed(0)
    initial = torch.randn(4, 3), torch.zeros(4), torch.ones(2)
    weights = [torch.nn.Parameter(t.double()) for t in initial]
    expected = [w.detach().numpy().copy() for w in weights]
    velocity = [0.0, 0.0, 0.0]
    optimizer = lineval.LARS(weights, lr=0.0, momentum=0.9, weight_decay=weight_decay)
    for lr in (1.6, 0.8, 0.3, 0.1):
        rng = np.random.default_rng(int(10 * lr))
        for k, w in enumerate(weights):
            gradient = rng.normal(size=w.shape) * (k != 2)
            w.grad = torch.from_numpy(gradient.copy())
            norm = math.sqrt((expected[k] ** 2).sum())
            grad_norm = math.sqrt((gradient ** 2).sum())
            if norm > 0 and grad_norm > 0:
                rate = 0.001 * norm / (grad_norm + weight_decay * norm + 1e-8)
                gradient = rate * (gradient + weight_decay * expected[k])
            velocity[k] = 0.9 * velocity[k] + gradient
            expected[k] = expected[k] - lr * velocity[k]
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        for w, value in zip(weights, expected):
            assert np.allclose(w.detach().numpy(), value, rtol=1e-12, atol=1e-15)
    assert abs(expected[1]).max() > 0                                # the bias left 0
    assert (expected[2] == 1).all()                                  # no gradient, no step


# ------------------------------------------------------------------------------------------------------------
# 2. The model, the step, what is watched
# ------------------------------------------------------------------------------------------------------------

def test_model_has_the_released_models_names_and_shapes():
    """torchvision's backbone and the released heads, in order."""
    with torch.device("meta"):
        model = simsiam.SimSiam()
    backbone = torchvision_names(3, (3, 4, 6, 3), 4)
    expected = {f"encoder.{name}": shape for name, shape in backbone.items() if not name.startswith("fc.")}
    expected |= RELEASED_HEADS
    assert [(name, tuple(t.shape)) for name, t in model.state_dict().items()] == list(expected.items())


def test_views_pass_through_f_separately():
    """Each view's z has its own batch statistics, and is what f makes of this view alone."""
    torch.manual_seed(0)
    model = tiny_model()
    x1 = torch.randn(8, 3, 16, 16)
    x2 = 3 + torch.randn(8, 3, 16, 16)
    p, z = model(x1, x2)
    for p_i, z_i in zip(p, z):
        assert p_i.shape == z_i.shape == (8, 16)
        assert z_i.mean(dim=0).abs().max() < 1e-5
        assert z_i.requires_grad
    assert torch.allclose(model.encoder(x1), z[0], atol=1e-6)


@pytest.mark.parametrize("bn", [(1, 1, 1, 0), (0, 0, 0, 0), (1, 0, 1, 0), (1, 1, 1, 1)])
def test_table3_bn_is_where_the_row_says(bn):
    """The heads' layers against a list; a bias is where no BN follows."""
    model = tiny_model(proj_layers=3, bn=bn)
    proj_hidden, proj_output, pred_hidden, pred_output = (["BatchNorm1d"] * flag for flag in bn)
    hidden = ["Linear", *proj_hidden, "ReLU"]
    assert [type(m).__name__ for m in model.encoder.fc] == [*hidden, *hidden, "Linear", *proj_output]
    hidden = ["Linear", *pred_hidden, "ReLU"]
    assert [type(m).__name__ for m in model.predictor] == [*hidden, "Linear", *pred_output]
    for head in (model.encoder.fc, model.predictor):
        for layer, following in zip(head, [*head[1:], None]):
            if isinstance(layer, torch.nn.Linear):
                assert (layer.bias is None) == isinstance(following, torch.nn.BatchNorm1d)


def test_only_the_affine_output_bn_has_a_scale():
    """By the names in the state_dict."""
    assert "encoder.fc.4.weight" not in tiny_model().state_dict()
    assert "encoder.fc.4.weight" in tiny_model(affine=True).state_dict()


def test_fc_std_is_that_of_the_heads_weights():
    """Against the std asked for, and against that of PyTorch's default: uniform within 1/sqrt(in)."""
    torch.manual_seed(0)
    model = tiny_model(dim=512, pred_dim=128, proj_hidden=512, fc_std=0.01)
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(weights) == 4
    for w in weights:
        assert w.std().item() == pytest.approx(0.01, rel=0.05)
    w = tiny_model(dim=512, pred_dim=128).predictor[0].weight
    assert w.abs().max() <= 512 ** -0.5
    assert w.std().item() == pytest.approx(512 ** -0.5 / 3 ** 0.5, rel=0.02)


def step_of(dtype=torch.float32, autocast=False, compiled=False, steps=1):
    """Loss and gradients (float64, flat) of a tiny model's last step; the start is always the same."""
    torch.manual_seed(0)
    model = tiny_model(width=1 / 4, dim=64, pred_dim=16).to(dtype)
    views = torch.randn(2, 32, 3, 16, 16).to(dtype)
    if compiled:
        model.compile()
    optimizer = simsiam.sgd(model, 0.9, 1e-4)
    precision = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    for _ in range(steps):
        simsiam.set_lr(optimizer, 0.01, 0, 2, 0, "constant")
        L, _ = simsiam.train_step(model, simsiam.loss, optimizer, precision, views)
    return L.item(), torch.cat([w.grad.double().flatten() for w in model.parameters()])


def test_loss_is_taken_in_float32_from_bfloat16():
    """Against numpy in float64."""
    p, z, *_ = (v.detach().to(torch.bfloat16) for v in vectors(64, 512))
    assert simsiam.D(p, z).dtype == torch.float32
    assert simsiam.D(p, z).item() == pytest.approx(numpy_D(p.double(), z.double()), abs=1e-6)


def test_bfloat16_autocast_gives_the_float64_step_up_to_its_digits():
    """Loss and gradients under autocast against those in float64."""
    L, gradient = step_of(autocast=True)
    exact_L, exact = step_of(torch.float64)
    assert L == pytest.approx(exact_L, abs=5e-3)
    assert L != exact_L
    assert F.cosine_similarity(gradient, exact, dim=0) > 0.98
    assert gradient.norm() == pytest.approx(exact.norm().item(), rel=0.1)


@slow
def test_a_compiled_step_is_the_float64_step():
    """Loss and gradients of the second compiled step against those in float64."""
    L, gradient = step_of(compiled=True, steps=2)
    exact_L, exact = step_of(torch.float64, steps=2)
    assert L == pytest.approx(exact_L, abs=1e-5)
    assert torch.allclose(gradient, exact, rtol=1e-3, atol=1e-4 * exact.norm().item())


@pytest.mark.parametrize("n", [8, 32, 128, 512])
def test_collapse_behind_an_output_bn_is_recognised(n):
    """n - 1 outputs at u, one at -u: as near to a point as mean 0 allows. Against the closed form."""
    torch.manual_seed(n)
    u = torch.randn(1, 64, dtype=torch.float64)
    z = torch.cat([u.expand(n - 1, -1), -u])
    std_sqrt_d = simsiam.feature_std(z).item() * 8
    expected = 2 * math.sqrt(n - 1) / n * np.abs(u.numpy()).mean() / np.linalg.norm(u) * 8
    assert std_sqrt_d == pytest.approx(expected, rel=1e-6)
    lowest = simsiam.D(z, z.roll(1, 0)).item()  # views that disagree on which image is the odd one
    assert lowest == pytest.approx(-1 + 4 / n)
    assert simsiam.collapsed(1 + lowest, std_sqrt_d, n)


@pytest.mark.parametrize("n", [8, 32, 128, 512])
@pytest.mark.parametrize("excess, std_sqrt_d", [(0.07, 0.95), (0.01, 0.95), (0.9, 0.05)])
def test_what_is_spread_or_far_from_the_minimum_is_no_collapse(excess, std_sqrt_d, n):
    """A healthy run early and late, and a start at which all outputs are alike."""
    assert not simsiam.collapsed(excess, std_sqrt_d, n)


def test_a_std_of_zero_is_a_collapse_whatever_the_loss():
    """Images that are all the same: the loss is 0, and so is the std."""
    assert simsiam.collapsed(1.0, 0.0, 16)


def test_effective_rank_is_the_exponential_of_an_entropy():
    """Against numpy in float64, from the eigenvalues of the covariance; and in its limits, 1 and D."""
    v = torch.randn(300, 12, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, 12)
    eigenvalues = np.linalg.eigvalsh(np.cov(v.numpy().astype(np.float64).T))
    share = np.sqrt(eigenvalues) / np.sqrt(eigenvalues).sum()
    expected = np.exp(-(share * np.log(share)).sum())
    assert simsiam.effective_rank(v).item() == pytest.approx(expected, rel=1e-4)
    assert 2 < expected < 11
    line = torch.outer(torch.arange(50.0), torch.ones(4)) + 7
    assert simsiam.effective_rank(line).item() == pytest.approx(1, abs=1e-3)
    corners = torch.cat([torch.eye(6), -torch.eye(6)])
    assert simsiam.effective_rank(corners).item() == pytest.approx(6, rel=1e-5)


def test_knn_agrees_with_a_loop():
    """Votes of every query against a loop over its neighbours in numpy."""
    rng = np.random.default_rng(0)
    bank = unit(torch.tensor(rng.normal(size=(300, 8)))).numpy()
    queries = unit(torch.tensor(rng.normal(size=(70, 8)))).numpy()
    labels = rng.integers(0, 5, 300)
    expected = []
    for q in queries:
        votes = np.zeros(5)
        for i in np.argsort(-bank @ q)[:20]:
            votes[labels[i]] += math.exp(bank[i] @ q / 0.1)
        expected.append(np.where(votes > 0, votes, -np.inf))         # no votes: never among the five best
    bank, labels, queries = (torch.from_numpy(array) for array in (bank, labels, queries))
    found = simsiam.knn(bank.float(), labels, queries.float(), 20, 0.1)
    assert found.shape == (70, 5)
    assert np.allclose(found, expected, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------
# 3. The settings
# ------------------------------------------------------------------------------------------------------------

settings_of_row = functools.partial(tests.helpers.settings_of_row, simsiam)


@pytest.mark.parametrize("recipe", PAPER)
def test_recipes_hold_the_papers_settings(recipe):
    """The recipe, and the settings of a run that names nothing else, against the table above."""
    column = simsiam.recipe(recipe)
    assert {name: column[name] for name in PAPER[recipe]} == PAPER[recipe]
    run = settings_of_row("simsiam", recipe)
    assert {name: run[name] for name in PAPER[recipe]} == PAPER[recipe]


def test_default_policy_is_the_papers_for_imagenet():
    """augment.Policy() against the table above; the paper flips nothing upside down."""
    expected = {**PAPER["imagenet"], "vflip": 0}
    assert augment.Policy()._asdict() == {name: expected[name] for name in augment.Policy._fields}


def test_linear_protocols_hold_the_papers_settings():
    """Against supplement A; which protocol a recipe has."""
    for name, expected in LINEAR.items():
        protocol = lineval.PROTOCOLS[name]
        assert {option: getattr(protocol, option) for option in expected} == expected
    assert lineval.DEFAULT == {"imagenet": "lars", "cifar10": "sgd", "shapes": "cached"}


def test_linear_protocols_lrs_fall_as_the_papers_do():
    """Steps at 60 and 80 of 100 epochs, half a cosine for LARS."""
    sgd, lars = (lineval.PROTOCOLS[name].schedule for name in ("sgd", "lars"))
    last_steps = [sgd(epoch * 7 + 6, 700) for epoch in range(100)]
    assert last_steps == pytest.approx([1] * 60 + [0.1] * 20 + [0.01] * 20)
    assert [lars(t, 90) for t in (0, 30, 45, 90)] == pytest.approx([1, 0.75, 0.5, 0])


def test_linear_layer_starts_as_in_the_released_code():
    """Weight from a normal of std 0.01, bias 0."""
    layer = lineval.linear_layer(512, 1000)
    assert layer.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert layer.weight.mean().abs() < 1e-4
    assert not layer.bias.any()


@pytest.mark.parametrize("protocol, kind", [("lars", lineval.LARS), ("sgd", torch.optim.SGD)])
def test_linear_protocols_have_the_papers_optimizers(protocol, kind):
    """Momentum 0.9 and no weight decay, on the weight and the bias."""
    layer = lineval.linear_layer(8, 3)
    optimizer = lineval.PROTOCOLS[protocol].optimizer(layer.parameters())
    group, = optimizer.param_groups
    assert type(optimizer) is kind
    assert group["momentum"] == 0.9
    assert group["weight_decay"] == 0
    assert len(group["params"]) == 2


# ------------------------------------------------------------------------------------------------------------
# 4. The experiments
# ------------------------------------------------------------------------------------------------------------

def test_experiments_are_the_papers_rows():
    """Against the table above."""
    assert simsiam.EXPERIMENTS.keys() == PAPERS_RESULTS.keys()


@pytest.mark.parametrize("experiment", PAPERS_RESULTS)
def test_experiments_hold_the_papers_settings_and_results(experiment):
    """Each row against the table above; nothing else changes."""
    expected, top1 = PAPERS_RESULTS[experiment]
    baseline = settings_of_row("simsiam", "imagenet")
    row = settings_of_row(experiment, "imagenet")
    assert {name: row[name] for name in expected} == expected
    assert {name for name in row if row[name] != baseline[name]} - {"experiment"} <= expected.keys()
    assert top1 in simsiam.EXPERIMENTS[experiment][1]


@pytest.mark.parametrize("experiment, recipe, expected", [
    ("table2-batch-4096", "cifar10", {"batch": 4096}),
    ("table2-batch-4096", "shapes", {"batch": 256}),
    ("table2-batch-64", "shapes", {"batch": 4}),
    ("table2-batch-1024", "shapes", {"warmup": 1}),
    ("suppB-dim-512", "shapes", {"dim": 128, "pred_dim": 32}),
    ("table4-200-epochs", "shapes", {"epochs": 12}),
    ("table4-200-epochs", "cifar10", {"epochs": 200})])
def test_experiments_scale_to_smaller_recipes(experiment, recipe, expected):
    """Against figures in proportion, worked out by hand."""
    row = settings_of_row(experiment, recipe)
    assert {name: row[name] for name in expected} == expected


def test_options_override_the_experiments_row():
    """Against the option."""
    assert settings_of_row("table2-batch-64", "shapes", "--batch", "32")["batch"] == 32


@pytest.mark.parametrize("experiment, note", [
    pytest.param("suppB-dim-512", "67.2); here dim 128, pred_dim 32, not what the row says\n", id="scaled"),
    pytest.param("sec45-cross-entropy", "63.2)\n", id="as it is")])
def test_a_scaled_experiment_says_so(small, tmp_path, capsys, experiment, note):
    """The run's first lines against the row."""
    options = "--recipe shapes --width 1/16 --size 16 --knn-every 0 --workers 0 --epochs 1 --batch 25".split()
    assert here("simsiam.py", small, *options, "--experiment", experiment, "--out", tmp_path / "run") is None
    assert f"experiment  {experiment} (the paper on ImageNet: {note}" in capsys.readouterr().out


def test_experiment_list_names_all_of_them(capsys):
    """The printed list against the table in simsiam.py."""
    with pytest.raises(SystemExit) as end:
        simsiam.parse(["--experiment", "list"])
    assert not end.value.code
    printed = capsys.readouterr().out
    for name, (_, paper) in simsiam.EXPERIMENTS.items():
        assert re.search(rf"^{re.escape(name)} .*{re.escape(paper)}", printed, re.M), name


ALL_ROWS = "--width 1/16 --proj-hidden 16 --size 16 --batch 25 --base-lr 0.1 --knn-every 0 --workers 0"
DIMS = {  # where the row has its own; else --dim 16 --pred-dim 4
    "suppB-dim-256": "",
    "suppB-dim-512": "",
    "suppB-dim-1024": "",
    "suppB-dim-2048": "",
    "suppB-hidden-d": ""}
EPOCHS = {  # where the row warms up; else --epochs 2
    "table2-batch-1024": "--epochs 3 --warmup 1",
    "table2-batch-2048": "--epochs 3 --warmup 1",
    "table2-batch-4096": "--epochs 3 --warmup 1",
    "table3-a-no-bn": "--epochs 3 --warmup 1"}
QUICK = [
    "simsiam",
    "fig2-without-stopgrad",
    "table1-b-fixed-predictor",
    "table3-a-no-bn",
    "sec45-cross-entropy",
    "sec46-asymmetric-2x",
    "sec52-10-step",
    "sec52-moving-average"]


def rows_to_train():
    """Every experiment with both small recipes; a few of them are quick."""
    rows = []
    for recipe, experiment in itertools.product(["shapes", "cifar10"], PAPERS_RESULTS):
        marks = [] if recipe == "shapes" and experiment in QUICK else slow
        rows.append(pytest.param(experiment, recipe, marks=marks, id=f"{experiment}-{recipe}"))
    return rows


@pytest.mark.parametrize("experiment, recipe", rows_to_train())
def test_every_experiment_trains(tmp_path, small, experiment, recipe):
    """All weights have moved from where they start, but for a fixed predictor's. Losses are finite."""
    dims = DIMS.get(experiment, "--dim 16 --pred-dim 4")
    epochs = EPOCHS.get(experiment, "--epochs 2")
    options = shlex.split(f"{ALL_ROWS} {dims} {epochs} --recipe {recipe} --experiment {experiment}")
    assert here("simsiam.py", small, *options, "--out", tmp_path / "run") is None
    start, _, *epochs, end = log_of(tmp_path / "run")
    assert end["event"] == "end"
    assert start["settings"]["experiment"] == experiment
    for record in epochs:
        assert math.isfinite(record["loss"])
    for record in epochs[:-1]:
        assert record["lr"] > 0
    torch.manual_seed(0)
    shape = {name: start["settings"][name] for name in inspect.signature(simsiam.SimSiam).parameters}
    model = simsiam.SimSiam(**shape)
    after = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["model"]
    assert after.keys() == model.state_dict().keys()
    for name, w in model.named_parameters():
        fixed = experiment == "table1-b-fixed-predictor" and name.startswith("predictor.")
        assert torch.equal(after[name], w) == fixed, name


# ------------------------------------------------------------------------------------------------------------
# 5. The map from the paper to the code. A tag that trails a line of code claims that the line is the equation
# ------------------------------------------------------------------------------------------------------------

MAP = {  # tag: (the equation, what the claimed line has, what a mutant has in its place, where there is one)
    "Eq. (1)": (
        r"\mathcal{D}(p_1, z_2) = -\frac{p_1}{\lVert p_1 \rVert_2} \cdot \frac{z_2}{\lVert z_2 \rVert_2}",
        "-(l2", "(l2"),
    "Eq. (2)": (
        r"\mathcal{L} = \frac{1}{2} \mathcal{D}(p_1, z_2) + \frac{1}{2} \mathcal{D}(p_2, z_1)",
        "D(p2, z1)", "D(p2, z2)"),
    "Eq. (3)": (
        r"\mathcal{D}(p_1, \mathrm{stopgrad}(z_2))",
        "z.detach()", "z"),
    "Eq. (4)": (
        r"\mathcal{L} = \frac{1}{2} \mathcal{D}(p_1, \mathrm{stopgrad}(z_2)) "
        r"+ \frac{1}{2} \mathcal{D}(p_2, \mathrm{stopgrad}(z_1))",
        "stopgrad(z1)", "stopgrad(z2)"),
    "Eq. (5)": (
        r"\mathcal{L}(\theta, \eta) = \mathbb{E}_{x, \mathcal{T}} "
        r"[ \lVert \mathcal{F}_{\theta}(\mathcal{T}(x)) - \eta_x \rVert_2^2 ]",
        "TOY @ theta - eta", None),
    "Eq. (6)": (
        r"\min_{\theta, \eta} \mathcal{L}(\theta, \eta)",
        "minimum = ", None),
    "Eq. (7)": (
        r"\theta^t \leftarrow \arg \min_{\theta} \mathcal{L}(\theta, \eta^{t-1})",
        "eta1, eta2)", "eta2, eta1)"),
    "Eq. (8)": (
        r"\eta^t \leftarrow \arg \min_{\eta} \mathcal{L}(\theta^t, \eta)",
        "lstsq", None),
    "Eq. (9)": (
        r"\eta_x^t \leftarrow \mathbb{E}_{\mathcal{T}} [ \mathcal{F}_{\theta^t}(\mathcal{T}(x)) ]",
        ".mean(axis=1)", None),
    "Eq. (10)": (
        r"\eta_x^t \leftarrow \mathcal{F}_{\theta^t}(\mathcal{T}'(x))",
        "embed(theta, x", "embed(theta, x[::-1]"),
    "Eq. (11)": (
        r"\theta^{t+1} \leftarrow \arg \min_{\theta} \mathbb{E}_{x, \mathcal{T}} [ \lVert "
        r"\mathcal{F}_{\theta}(\mathcal{T}(x)) - \mathcal{F}_{\theta^t}(\mathcal{T}'(x)) \rVert_2^2 ]",
        "difference ** 2", None),
    "Alg. 1": (
        r"\mathrm{update}(f, h)",
        "optimizer.step()", "pass"),
    "Sec. 3 (lr)": (
        r"\mathrm{lr} \times \mathrm{BatchSize} / 256",
        "256", "512"),
    "Sec. 3 (schedule)": (
        r"\frac{1}{2} (1 + \cos(\pi t / T))",
        "math.pi", "2 * math.pi"),
    "Sec. 4.1 (std)": (
        r"\frac{1}{d} \sum_{i=1}^{d} \mathrm{std}(z'_i), z' = z / \lVert z \rVert_2",
        ".sqrt()", ""),
    "Sec. 4.2 (no h)": (
        r"h(z) = z",
        "nn.Identity()", "nn.ReLU()"),
    "Sec. 4.5": (
        r"\mathcal{D}(p_1, z_2) = -\mathrm{softmax}(z_2) \cdot \log \mathrm{softmax}(p_1)",
        "(target * log_p)", "(log_p * log_p)"),
    "Sec. 4.6": (
        r"\mathcal{L} = \mathcal{D}(p_1, \mathrm{stopgrad}(z_2))",
        "stopgrad(z2)", "stopgrad(z1)"),
    "Sec. 5.1 (h)": (
        r"h(z_1) = \mathbb{E}_z [z_2] = \mathbb{E}_{\mathcal{T}} [f(\mathcal{T}(x))]",
        "h(z_i)", "z_i"),
    "Sec. 5.2 (k-step)": (
        r"\mathcal{L}(\theta, \eta^t), \eta^t = \mathrm{const}",
        "towards(eta1, eta2)", "towards(eta2, eta1)"),
    "Sec. 5.2 (moving average)": (
        r"\eta_x^t \leftarrow m \eta_x^{t-1} + (1 - m) \mathcal{F}_{\theta^t}(\mathcal{T}'(x))",
        "(1 - m)", "m"),
    "LARS Alg. 1": (
        r"\lambda = \eta \frac{\lVert w \rVert}{\lVert \nabla L(w) \rVert + \beta \lVert w \rVert}",
        "rate = self.trust * norm", "rate = self.trust")}

SOURCES = ["simsiam.py", "lineval.py", "augment.py", "resnet.py", "test_simsiam.py"]
TAG = re.compile(r"# ((?:LARS )?(?:Eq|Alg|Sec)\. [\d.()]+(?: \([\w -]+\))?): (.*)")


def named_after(tag):
    """Eq. (4) -> the one test called test_eq04_...; Sec. 4.1 (std) -> test_sec41_std_...; and so on."""
    stem = tag.lower().replace("k-step", "kstep")
    stem = re.sub(r"^eq\. \((\d+)\)$", lambda m: f"eq{int(m[1]):02}", stem)
    stem = re.sub(r"^sec\. (\d)(?:\.(\d))?", lambda m: "sec" + m[1] + (m[2] or ""), stem)
    stem = stem.replace("lars alg. 1", "lars").replace("alg. 1", "alg1")
    stem = re.sub(r"[^a-z0-9]+", "_", stem).strip("_")
    return the_test_called(stem, globals())


def claims_of_the_paper():
    """All claims of the sources, in the order of MAP."""
    return claims(SOURCES, TAG, MAP, named_after)


def test_every_equation_is_claimed_by_one_line_and_one_test():
    """The tags of the sources against MAP."""
    check_claims(claims_of_the_paper(), MAP)


def test_every_claim_outside_the_tests_has_a_mutant():
    """MAP against the claims."""
    for claim in claims_of_the_paper():
        mutant_text = MAP[claim.tag][2]
        assert (mutant_text is None) == (claim.file == "test_simsiam.py"), claim


def paper_map():
    """The README's table: from the claims, and the equations in MAP."""
    return equation_table(claims_of_the_paper(), MAP)


# What of the paper is no equation: {what: (where it has it, file, the beginning of the line that does it,
# the test's file and name)}. Each line's beginning occurs once in its file.
SETTINGS_MAP = {
    "crop": ("supp. A", "augment.py", "def draw_crop(",
             "tests/test_augment.py", "test_crops_are_distributed_as_random_resized_crop_draws_them"),
    "colour jitter": ("supp. A", "augment.py", "def change_colours(",
                      "tests/test_augment.py", "test_the_four_changes_come_in_each_views_own_order"),
    "grayscale": ("supp. A", "augment.py", "def luma(",
                  "tests/test_augment.py", "test_grayscale_agrees_with_pillow"),
    "blur": ("supp. A", "augment.py", "def blur(",
             "tests/test_augment.py", "test_blur_is_exact_and_agrees_with_pillow"),
    "flip": ("supp. A", "augment.py", "    flipped = [axis for",
             "tests/test_augment.py", "test_crop_and_resize_agree_with_pillow"),
    "projection MLP": ("Sec. 3", "simsiam.py", "def projection_mlp(",
                       "test_simsiam.py", "test_model_has_the_released_models_names_and_shapes"),
    "prediction MLP": ("Sec. 3", "simsiam.py", "def prediction_mlp(",
                       "test_simsiam.py", "test_model_has_the_released_models_names_and_shapes"),
    "weight decay on all": ("Sec. 3", "simsiam.py", "def sgd(",
                            "test_simsiam.py", "test_sgd_has_every_parameter_once"),
    "all settings": ("Sec. 3; supp. A, D", "simsiam.py", "SETTINGS = {",
                     "test_simsiam.py", "test_recipes_hold_the_papers_settings"),
    "the ablations": ("Sec. 4, 5; supp. A, B", "simsiam.py", "EXPERIMENTS = {",
                      "test_simsiam.py", "test_experiments_hold_the_papers_settings_and_results"),
    "LARS evaluation": ("supp. A", "lineval.py", '    "lars": Protocol(',
                        "tests/test_lineval.py", "test_two_processes_give_the_accuracy_of_one"),
    "SGD evaluation": ("supp. A", "lineval.py", '    "sgd": Protocol(',
                       "tests/test_lineval.py", "test_two_processes_give_the_accuracy_of_one"),
    "kNN monitor": ("supp. D", "simsiam.py", "def knn(",
                    "test_simsiam.py", "test_knn_agrees_with_a_loop"),
}


def line_of(file, beginning):
    """The number of the one line of a file that begins so."""
    lines = (ROOT / file).read_text().splitlines()
    found = [number for number, line in enumerate(lines, 1) if line.startswith(beginning)]
    assert len(found) == 1, (file, beginning, found)
    return found[0]


def settings_map():
    """The README's second table, from SETTINGS_MAP."""
    rows = ["| setting | in the paper | line | test |", "|---|---|---|---|"]
    for what, (where, file, beginning, test_file, test) in SETTINGS_MAP.items():
        number = line_of(file, beginning)
        line_of(test_file, f"def {test}(")
        rows.append(f"| {what} | {where} | [{file}:{number}]({file}#L{number}) | [`{test}`]({test_file}) |")
    return "\n".join(rows) + "\n"


READING = [  # what to read, the file, from and up to the lines that begin so, and what to read it beside
    ("sections 1 to 4", "simsiam.py", '"""', "# --- 5.", "Sec. 3: loss, heads, optimiser, training loop"),
    ("", "resnet.py", '"""', None, "He et al. 2016, Table 1"),
    ("", "augment.py", '"""', None, "supplement A: crop, flip, jitter, grayscale, blur"),
    ("sections 5 to 8", "simsiam.py", "# --- 5.", "# --- 9.", "Sec. 4 and 5: ablations, the hypothesis"),
    ("the protocols", "lineval.py", '"""', "# --- 6. The program", "supplement A: linear evaluation"),
    ("", "related.py", '"""', None, "Sec. 6.2, Table 4: SimCLR, MoCo v2, BYOL, SwAV"),
    ("", "test_simsiam.py", '"""', None, "the whole paper: each equation, against something independent"),
]


def reading_table():
    """The README's table of what to read in which order, from READING."""
    rows = ["| read | lines | beside |", "|---|---|---|"]
    for part, file, start, end, beside in READING:
        lines = (ROOT / file).read_text().splitlines()
        first = next(number for number, line in enumerate(lines) if line.startswith(start))
        last = len(lines) if end is None else line_of(file, end) - 1
        name = f"[{file}]({file}#L{first + 1})"
        if part:
            name = f"{name}, {part}"
        rows.append(f"| {name} | {last - first} | {beside} |")
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize("made", [paper_map, settings_map, reading_table])
def test_readme_has_the_map_of_the_sources(made):
    """The tables in the README against those that are made from the sources."""
    assert made() in (ROOT / "README.md").read_text(), "python test_simsiam.py writes them"


@pytest.mark.parametrize("tag", MAP)
def test_equations_are_whole_in_a_markdown_table(tag):
    """Braces match, and there is nothing that Markdown takes for itself."""
    check_equation(MAP[tag][0])


@pytest.mark.parametrize("tag", [tag for tag in MAP if MAP[tag][2] is not None])
def test_a_mutant_of_every_claimed_line_dies_in_its_test(tag, monkeypatch, request):
    """The equation's test passes, and fails with the mutant in the module's place."""
    test = globals()[named_after(tag)]
    arguments = arguments_for(test, request)
    claim, = (claim for claim in claims_of_the_paper() if claim.tag == tag)
    check_it_dies(mutant_of(claim, MAP), (globals(), vars(tests.helpers)), monkeypatch, test, **arguments)


# --- Shape comments, `name = ...  # (N, d)`. tests/shape_comments.py makes them checks ----------------------

SHAPE_COMMENTS = {
    "simsiam.py": 10,
    "augment.py": 34,
    "lineval.py": 9,
    "related.py": 19,
    "harness/training/batchnorm.py": 2,
    "harness/evaluation/features.py": 1,
    "harness/training/per_image.py": 2,
    "harness/data/shapes.py": 1}


def test_shape_comments_are_what_happens(tmp_path, monkeypatch, ten, large):
    """Each is executed, in some runs and a layer; their number in each file against the table above."""
    with shape_comments.checking_shapes() as importer:
        for name in ("simsiam", "lineval", "related"):
            monkeypatch.setitem(vars(tests.helpers), name, sys.modules[name])
        small = [ten, *TINY, *shlex.split("--epochs 1 --workers 0 --experiment sec52-moving-average")]
        photos = [large, *TINY, *shlex.split("--epochs 1 --workers 0 --recipe imagenet --size 24")]
        checkpoint = tmp_path / "small/checkpoint.pth"
        linear = [ten, *shlex.split("--cached --epochs 1 --workers 0 --ckpt"), checkpoint]
        assert here("simsiam.py", *small, "--out", tmp_path / "small") is None
        assert here("simsiam.py", *photos, "--out", tmp_path / "photos") is None
        assert here("lineval.py", *linear) is None
        for method in ("simclr", "mocov2", "swav --prototypes 16"):  # as many as SimSiam's p has numbers
            tiny = [ten, *TINY, *shlex.split(f"--epochs 1 --workers 0 --method {method}")]
            assert here("related.py", *tiny, "--out", tmp_path / method) is None
        sys.modules["simsiam"].D_cross_entropy(*torch.randn(2, 4, 5))
        sys.modules["related"].clip_loss(*torch.randn(2, 4, 5), torch.tensor(1.0))
        sys.modules["harness.data.shapes"].draw_shapes(0, 0, 2)
        sys.modules["harness.training.processes"].join_world(CPU)
        sys.modules["harness.training.batchnorm"].SyncBatchNorm(5)(torch.randn(4, 5, 2, 2))
        torch.distributed.destroy_process_group()
    assert importer.places - importer.seen == set()
    assert collections.Counter(file for file, *_ in importer.places) == SHAPE_COMMENTS


def test_no_shape_comment_stands_where_it_is_not_executed():
    """Those that tokenizing the sources finds against the assignments that are checked."""
    for file in map(shape_comments.file_of, shape_comments.SCRIPTS + shape_comments.ROOMS):
        found = {line for line, text in trailing_comments(file) if shape_comments.SHAPE.fullmatch(text)}
        assert found == {line for _, line, _ in shape_comments.ShapeChecks(file).places}, file


# --- Departures from the paper ------------------------------------------------------------------------------

DEPARTURES = {  # file: [(words in the line with the mark, first cell of its row in the README)], in order
    "simsiam.py": [
        ("affine", "projection's output BN"),
        ("first hidden width", "projection's first hidden width"),
        ("every step", "lr set")],
    "augment.py": [
        ("blur", "blur probability")],
    "resnet.py": [
        ("initializers", "convolutions' initialisation")],
    "lineval.py": [
        ("released code's lr", "linear evaluation's base lr"),
        ("incomplete batch", "linear evaluation's last batch")]}


@pytest.mark.parametrize("file", DEPARTURES)
def test_every_departure_has_its_row_in_the_readme(file):
    """The marks in the code against the table above, in order; its rows against the README's table."""
    marks = [line for line in (ROOT / file).read_text().splitlines() if "DEPARTURE" in line]
    assert len(marks) == len(DEPARTURES[file])
    table = (ROOT / "README.md").read_text().split("| | paper | released code | here |")[1]
    rows = re.findall(r"^\| ([^|]+) \|", table.split("\n\n")[0], re.M)
    for mark, (word, row) in zip(marks, DEPARTURES[file]):
        assert word in mark
        assert row in rows


# ------------------------------------------------------------------------------------------------------------
# 6. The README. Its figures are compared with the logs in tests/test_results.py
# ------------------------------------------------------------------------------------------------------------

def commands_of(script):
    """The arguments of every command in the README's listings that calls this script."""
    found = []
    readme = (ROOT / "README.md").read_text().replace("\\\n", "")     # a command may go on in the next line
    for listing in re.findall(r"```bash\n(.*?)```", readme, re.S):
        for line in listing.splitlines():
            _, script_there, arguments = line.split("#")[0].partition(f" {script}")
            if script_there:
                found.append(shlex.split(arguments))
    return found


@pytest.mark.parametrize("module, at_least", [(simsiam, 5), (lineval, 5), (augment, 1)])
def test_readme_commands_parse(module, at_least):
    """By the scripts' own parsers."""
    commands = commands_of(f"{module.__name__}.py")
    assert len(commands) >= at_least
    for arguments in commands:
        lists = "list" in arguments
        with pytest.raises(SystemExit, match="^$") if lists else contextlib.nullcontext():
            module.parse(arguments)


def test_readmes_first_command_runs(tmp_path):
    """As it stands, for some steps; slow tests in tests/ run it until it has learned, and evaluate it."""
    quick_start = (ROOT / "README.md").read_text().split("## Quick start")[1]
    command, _, _ = re.search(r"```bash\n(.*?)\n", quick_start)[1].partition("#")
    assert command.strip() == "python simsiam.py"
    with start("-u", ROOT / "simsiam.py", cwd=tmp_path) as process:
        for line in process.stdout:
            if line.startswith("epoch 0/6  untrained"):
                break
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert "; the same command with --resume goes on" in errors
    assert process.returncode == 128 + signal.SIGINT
    first, untrained = log_of(tmp_path / "runs/shapes")
    assert first["command"].endswith("simsiam.py")
    assert untrained["knn"] < first["knn_pixels"]


def test_readme_shows_the_algorithm_as_it_is():
    """A step by the README's listing of Algorithm 1, executed, against simsiam.train_step."""
    listing = re.search(r"```python\n(# Algorithm 1.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    torch.manual_seed(0)
    images = torch.randn(2, 8, 3, 16, 16)
    views = iter(images)
    model = tiny_model()
    reference = copy.deepcopy(model)
    optimizer, optimizer_again = (simsiam.sgd(m, 0.9, 1e-4) for m in (model, reference))
    simsiam.set_lr(optimizer, 0.1, 0, 2, 0, "constant")
    simsiam.set_lr(optimizer_again, 0.1, 0, 2, 0, "constant")
    names = {"f": model.encoder, "h": model.predictor, "augment": lambda x: next(views)}
    exec(listing, {"F": F, "loader": [images], "optimizer": optimizer} | names)
    simsiam.train_step(reference, simsiam.loss, optimizer_again, NO_AUTOCAST, images)
    for a, b in zip(model.parameters(), reference.parameters()):
        assert torch.allclose(a, b, atol=1e-6)


if __name__ == "__main__":
    write_tables(ROOT / "README.md", [paper_map(), settings_map(), reading_table()])
