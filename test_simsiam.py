"""The paper as tests. Each compares the code with something independent: float64, plain torch, a count.

    python -m pytest -q test_simsiam.py             the quick ones
    SLOW=1 python -m pytest -q test_simsiam.py      all
    python test_simsiam.py                          writes the README's map from the paper to the code

First come the facts that we typed from the paper, then the equations in the paper's order, the model, the
settings, the experiments, the map from the paper to the code, and the README. Other tests are in tests/.
"""
import contextlib
import copy
import functools
import itertools
import math
import re
import shlex
import sys

# harness comes before torch, because it says how torch's threads wait.
from harness.data import loading, shapes
from harness.evaluation import report
from harness.training.per_image import PerImageVectors

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import augment
import lineval
import related
import simsiam
import tests.helpers
from results.pages import write_tables
from tests import shape_comments
from tests.claims import check_claims, check_departures, check_it_dies, claims, equation_table
from tests.claims import mutant_of, trailing_comments
from tests.experiments import check_resumed, check_rows, check_run
from tests.helpers import CPU, RELEASED_HEADS, ROOT, TINY, TINY_BACKBONE, TINY_HEADS, close, equal, here
from tests.helpers import interrupted_before, losses_of, numpy_D, settings_of, slow, tiny_model
from tests.helpers import torchrun, torchvision_names, unit, vectors

pytest_plugins = ["tests.fixtures"]
NO_AUTOCAST = torch.autocast("cpu", enabled=False)


# ------------------------------------------------------------------------------------------------------------
# Typed from the paper, and from the released files
# ------------------------------------------------------------------------------------------------------------

BOTH = dict(
    width=1.0, momentum=0.9, warmup=0, pred_lr="constant",
    area=(0.2, 1.0), flip=0.5, jitter=0.8, gray=0.2,
    strength=(0.4, 0.4, 0.4, 0.1))
PAPER = {  # Sec. 3; supplements A and D; Table 1 (c)
    "imagenet": BOTH | dict(
        arch="resnet50", cifar_stem=False,
        proj_layers=3, proj_hidden=2048, dim=2048, pred_dim=512,
        epochs=100, batch=512, base_lr=0.05, weight_decay=0.0001,
        size=224, aspect=(0.75, 1 / 0.75), blur=0.5, sigma=(0.1, 2.0),
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), centre=0.875),
    "cifar10": BOTH | dict(
        arch="resnet18", cifar_stem=True,
        proj_layers=2, dim=2048,
        epochs=800, batch=512, base_lr=0.03, weight_decay=0.0005,
        size=32, blur=0.0, centre=1.0)}

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
        dict(batch=256, epochs=200, base_lr=0.5, weight_decay=1e-5), "better than the base")}


# ------------------------------------------------------------------------------------------------------------
# 1. The equations, in the paper's order
# ------------------------------------------------------------------------------------------------------------

def gradients_of(L, *inputs):
    """The gradient with respect to each input; None where there is none."""
    return torch.autograd.grad(L, inputs, allow_unused=True, retain_graph=True)


def squared_error(a, b):
    """|a - b|^2, averaged over the rows."""
    return ((a - b) ** 2).sum(dim=1).mean()


def numpy_loss(p1, p2, target1, target2, similarity=numpy_D):
    """Eq. (4) in numpy: each view's p with the other view's target."""
    return (similarity(p1, target2) + similarity(p2, target1)) / 2


# --- Sec. 3: the loss ---------------------------------------------------------------------------------------

def slope_of_D(p, z):
    """The gradient of D with respect to p, derived by hand."""
    cosine = (unit(p) * unit(z)).sum(dim=1, keepdim=True)
    return (cosine * unit(p) - unit(z)) / p.norm(dim=1, keepdim=True) / len(p)


def test_eq01_D_is_the_negative_cosine():
    """The value against numpy, the gradients against the derivative by hand."""
    p, z, *_ = vectors()
    L = simsiam.D(p, z)
    assert close(L, numpy_D(p, z))
    assert close(L, squared_error(unit(p), unit(z)) / 2 - 1)
    assert close(simsiam.D(p, 3 * p), -1)
    of_p, of_z = gradients_of(L, p, z)                               # both: D does not detach
    assert close(of_p, slope_of_D(p, z))
    assert close(of_z, slope_of_D(z, p))


def test_eq02_symmetrised_loss():
    """Against numpy."""
    p1, p2, z1, z2 = vectors()
    L = simsiam.loss_without_stopgrad(p1, p2, z1, z2)
    assert close(L, numpy_loss(p1, p2, z1, z2))


def test_eq03_stopgrad_is_the_identity_without_gradient():
    """Against its argument."""
    z, *_ = vectors()
    assert torch.equal(simsiam.stopgrad(z), z)
    assert not simsiam.stopgrad(z).requires_grad


def test_eq04_loss_and_its_gradients():
    """The value against numpy, the gradients against those of Eq. (2): the same for p, none for z."""
    p1, p2, z1, z2 = vectors()
    L = simsiam.loss(p1, p2, z1, z2)
    assert close(L, numpy_loss(p1, p2, z1, z2))
    stopped = gradients_of(L, p1, p2, z1, z2)
    whole = gradients_of(simsiam.loss_without_stopgrad(p1, p2, z1, z2), p1, p2, z1, z2)
    assert torch.equal(stopped[0], whole[0])
    assert torch.equal(stopped[1], whole[1])
    assert stopped[2:] == (None, None)
    assert whole[2].abs().max() > 0
    assert whole[3].abs().max() > 0


# --- Sec. 5.1: the hypothesis, on a toy problem. 5 images, 4 equally likely augmentations of each, F linear -

TOY = np.random.default_rng(0).normal(size=(5, 4, 3))                # T(x): image x under augmentation T
TOY_THETA = np.random.default_rng(1).normal(size=(3, 2))


def toy_L(theta, eta):
    """The mean over images x and augmentations T."""
    error = TOY @ theta - eta[:, None]  # Eq. (5): of theta's outputs to eta
    return np.mean(np.sum(error ** 2, axis=-1))


def toy_eta(theta):
    """One vector per image."""
    return (TOY @ theta).mean(axis=1)  # Eq. (9): the mean over the augmentations


def test_eq05_is_the_squared_error_that_D_stands_for():
    """Against a sum in full. With outputs and eta normalised (footnote 5) it is 2 D plus a constant."""
    eta = np.random.default_rng(2).normal(size=(5, 2))
    total = 0
    for x, t in np.ndindex(5, 4):
        total += ((TOY[x, t] @ TOY_THETA - eta[x]) ** 2).sum()
    assert close(toy_L(TOY_THETA, eta), total / 20)
    outputs = unit(torch.tensor(TOY @ TOY_THETA).flatten(0, 1))
    targets = unit(torch.tensor(eta).repeat_interleave(4, dim=0))
    assert close(squared_error(outputs, targets), 2 + 2 * simsiam.D(outputs, targets))


def test_eq06_alternating_lowers_the_loss_until_it_is_at_the_minimum_over_both():
    """Where it ends against the smallest eigenvalue. |theta| = 1, because theta = 0 is collapse."""
    within = TOY - TOY.mean(axis=1, keepdims=True)
    scatter = np.einsum("xti,xtj->ij", within, within) / 20
    minimum = np.linalg.eigvalsh(scatter)[0]  # Eq. (6): over theta of norm 1 and all eta
    theta = np.ones((3, 1)) / math.sqrt(3)
    losses = []
    for _ in range(300):
        eta = toy_eta(theta)
        error = TOY @ theta - eta[:, None]
        theta = theta - 0.2 * 2 * np.einsum("xti,xtj->ij", TOY, error) / 20
        theta = theta / np.linalg.norm(theta)
        losses.append(toy_L(theta, toy_eta(theta)))
    assert np.diff(losses).max() <= 1e-9
    assert close(losses[-1], minimum, 1e-4)


def test_eq07_theta_is_fitted_to_an_eta_that_stays():
    """The value against numpy; gradients for p alone, half those of the squared error."""
    p1, p2, z1, z2 = vectors()
    eta1, eta2, *_ = vectors(seed=1)
    L = simsiam.loss_to_eta(p1, p2, eta1, eta2)
    assert close(L, numpy_loss(p1, p2, eta1, eta2))
    of_p1, of_p2, *others = gradients_of(L, p1, p2, z1, z2, eta1, eta2)
    assert others == [None] * 4
    error = squared_error(unit(p1), unit(eta2)) + squared_error(unit(p2), unit(eta1))
    expected = gradients_of(error / 4, p1, p2)
    assert close(of_p1, expected[0])
    assert close(of_p2, expected[1])


def test_eq08_the_problem_of_eta_is_one_per_image():
    """Each image alone, by least squares, against the mean over its augmentations."""
    for x in range(5):
        ones = np.ones((4, 1))
        alone, *_ = np.linalg.lstsq(ones, TOY[x] @ TOY_THETA, rcond=None)            # Eq. (8): of one image
        assert close(alone[0], toy_eta(TOY_THETA)[x])


def test_eq09_eta_is_the_mean_over_the_augmentations():
    """No other eta nearby is better, in any direction."""
    rng = np.random.default_rng(2)
    eta = toy_eta(TOY_THETA)
    for _ in range(100):
        step = rng.normal(size=eta.shape)
        assert toy_L(TOY_THETA, eta + 0.001 * step) > toy_L(TOY_THETA, eta)


# --- Sec. 5.1: the hypothesis, in training ------------------------------------------------------------------

def drawn_views(steps, **more):
    """The first steps on 40 drawn shapes of 16 pixels, in batches of 10: (indices, [x1, x2]) each."""
    source = shapes.draw_shapes(0, 0, 40, 16)
    batches = itertools.islice(loading.index_batches(0, 40, 10, 4), steps)
    return augment.load_views(source, augment.Policy(size=16), 0, batches, CPU, 0, **more)


def new_model(dtype=torch.float64, **options):
    """The same tiny model at each call."""
    torch.manual_seed(0)
    return tiny_model(**options).to(dtype)


def lr_at(t):
    """The lr of `trained` at this step: half a cosine, from 0.3 to 0 after 12 steps."""
    return 0.3 * (1 + math.cos(math.pi * t / 12)) / 2


SHORT = dict(images=40, batch=10, epochs=3, base_lr=0.3 * 256 / 10, weight_decay=1e-4, warmup=0, amp=False)


def trained(steps=3, dtype=torch.float64, **changes):
    """Make the first steps of a run with these settings -> its method, and its losses"""
    settings = settings_of("shapes", pred_lr="cosine", **SHORT, **TINY_BACKBONE, **TINY_HEADS) | changes
    method = simsiam.SimSiamMethod(settings, None, CPU)
    torch.manual_seed(0)
    method.build().to(dtype)
    optimizer = method.optimizer()
    parts = method.parts()
    if "eta" in parts:
        parts["eta"].mine = parts["eta"].mine.to(dtype)
    losses = []
    for t, (index, x) in enumerate(drawn_views(steps)):
        method.set_lr(optimizer, t)
        L, _ = method.train_step(method.model, optimizer, t, index, [v.to(dtype) for v in x])
        losses.append(L.item())
    assert len(losses) == steps
    return method, losses


def all_close(ours, expected):
    """Whether two models have the same weights up to rounding, each relative to its own size."""
    return all(map(close, ours.parameters(), expected.parameters()))


def test_eq10_eta_is_what_the_outer_loops_weights_make_of_the_same_views():
    """Against a loop that keeps only a copy of each theta^t, and takes the squared error."""
    method, losses = trained(eta="alternate", k=2)
    reference = new_model()
    optimizer = torch.optim.SGD(reference.parameters(), momentum=0.9, weight_decay=1e-4)
    expected = []
    for t, (_, views) in enumerate(drawn_views(3)):
        if t % 2 == 0:
            theta_t = copy.deepcopy(reference)
        x1, x2 = (x.double() for x in views)
        with torch.no_grad():
            eta1, eta2 = (unit(theta_t.encoder(x)) for x in (x1, x2))
        p1 = unit(reference.predictor(reference.encoder(x1)))
        p2 = unit(reference.predictor(reference.encoder(x2)))
        L = (squared_error(p1, eta2) + squared_error(p2, eta1)) / 4 - 1               # D, by way of the error
        optimizer.param_groups[0]["lr"] = lr_at(t)
        optimizer.zero_grad()
        L.backward()
        optimizer.step()
        expected.append(L.item())
    assert close(losses, expected)
    assert all_close(method.model, reference)
    for ours, theirs in zip(method.model.encoder.buffers(), reference.encoder.buffers()):
        assert close(ours, theirs)                                   # computing eta leaves no mark on BN


def test_eq11_plain_training_takes_the_gradient_step_of_its_problem():
    """One step of plain training against one of SGD on Eq. (11), normalised, each view in turn."""
    method, losses = trained(steps=1, predictor="none")
    theta = new_model(predictor="none")
    theta_t = copy.deepcopy(theta).requires_grad_(False)
    (_, views), = drawn_views(1)
    x1, x2 = (x.double() for x in views)
    errors = []
    for x, other in ((x1, x2), (x2, x1)):
        difference = unit(theta.encoder(x)) - unit(theta_t.encoder(other))
        errors.append((difference ** 2).sum(dim=1).mean())           # Eq. (11): theta moves, its target stays
    L = sum(errors) / 4 - 1                                          # D, by way of the error
    assert close(losses, [L.item()])
    L.backward()
    torch.optim.SGD(theta.parameters(), lr_at(0), weight_decay=1e-4).step()
    assert all_close(method.model, theta)


# --- Algorithm 1 --------------------------------------------------------------------------------------------

def released(state, x, blocks):
    """p and z of a batch: f and h as functions of a state_dict, without modules."""
    def bn(x, name):
        scale = state.get(name + ".weight")
        offset = state.get(name + ".bias")
        return F.batch_norm(x, None, None, scale, offset, training=True)

    def conv(x, name, **options):
        return F.conv2d(x, state[name + ".weight"], **options)

    x = conv(x, "encoder.conv1", stride=2, padding=3)
    x = F.max_pool2d(F.relu(bn(x, "encoder.bn1")), 3, 2, 1)
    for stage, count in enumerate(blocks):
        for block in range(count):
            at = f"encoder.layer{stage + 1}.{block}."
            stride = 2 if stage > 0 and block == 0 else 1
            y = F.relu(bn(conv(x, at + "conv1"), at + "bn1"))
            y = conv(y, at + "conv2", stride=stride, padding=1)
            y = F.relu(bn(y, at + "bn2"))
            y = bn(conv(y, at + "conv3"), at + "bn3")
            if block == 0:
                x = conv(x, at + "downsample.0", stride=stride)
                x = bn(x, at + "downsample.1")
            x = F.relu(x + y)
    z = x.mean(dim=(2, 3))
    for k in (0, 3):
        z = F.relu(bn(z @ state[f"encoder.fc.{k}.weight"].T, f"encoder.fc.{k + 1}"))
    z = bn(z @ state["encoder.fc.6.weight"].T, "encoder.fc.7")
    p = F.relu(bn(z @ state["predictor.0.weight"].T, "predictor.1"))
    return p @ state["predictor.3.weight"].T + state["predictor.3.bias"], z


def test_alg1_parity_with_the_released_model():
    """Loss, gradients and weights over three steps of SGD in float64, against functions of a state_dict."""
    torch.manual_seed(0)
    model = tiny_model(arch="resnet50", proj_layers=3, cifar_stem=False).double()
    for w in model.parameters():
        w.data += 0.1 * torch.randn_like(w)  # away from zero scales and offsets, which would hide errors
    parameters = dict(model.named_parameters())
    state = {name: w.detach().clone().requires_grad_() for name, w in parameters.items()}
    velocity = dict.fromkeys(state, 0)
    optimizer = simsiam.sgd(model, 0.9, 0.01)
    cosine = torch.nn.CosineSimilarity(dim=1)
    for step in range(3):
        x1, x2 = torch.randn(2, 6, 3, 40, 40, dtype=torch.float64)
        simsiam.set_lr(optimizer, 0.1, step, 4, 0, "cosine")
        L, z = simsiam.train_step(model, optimizer, NO_AUTOCAST, x1, x2)
        p1, z1 = released(state, x1, (3, 4, 6, 3))
        p2, z2 = released(state, x2, (3, 4, 6, 3))
        similarity = cosine(p1, z2.detach()).mean() + cosine(p2, z1.detach()).mean()
        expected = -similarity * 0.5
        assert close(L, expected)
        assert close(z[0], z1)
        assert close(z[1], z2)
        gradients = torch.autograd.grad(expected, state.values())
        lr = 0.1 * (1 + math.cos(math.pi * step / 4)) / 2
        for (name, w), gradient in zip(parameters.items(), gradients, strict=True):
            assert close(w.grad, gradient), name
            with torch.no_grad():
                velocity[name] = 0.9 * velocity[name] + gradient + 0.01 * state[name]
                state[name] -= lr * velocity[name]
            assert close(w, state[name]), name


# --- Sec. 3: optimisation -----------------------------------------------------------------------------------

def test_sec3_lr_rule_is_linear():
    """The paper's own figures, and one for a batch below 256."""
    assert simsiam.initial_lr(0.05, 512) == 0.1
    assert simsiam.initial_lr(0.05, 256) == 0.05
    assert simsiam.initial_lr(0.03, 64) == 0.0075


def test_sec3_schedule_is_a_warm_up_and_half_a_cosine():
    """Closed forms."""
    half_root = math.sqrt(0.125)
    fall = [simsiam.cosine(t, 8, 0) for t in (0, 2, 4, 6, 8)]
    assert close(fall, [1, 0.5 + half_root, 0.5, 0.5 - half_root, 0])
    after_warmup = [simsiam.cosine(t, 12, 4) for t in (0, 3, 4, 8, 12)]
    assert close(after_warmup, [1, 1, 1, 0.5, 0])
    rise = [simsiam.warmup(t, 4) for t in range(6)]
    assert rise == [0.25, 0.5, 0.75, 1, 1, 1]
    assert simsiam.warmup(0, 0) == 1


@pytest.mark.parametrize("step, pred_lr, expected", [
    (8, "cosine", [1, 1]),
    (8, "constant", [1, 2]),
    (1, "constant", [1, 2])])                                        # only f warms up
def test_lr_of_h_is_decayed_or_stays(step, pred_lr, expected):
    """Table 1 (c): the lrs of f and h at one of 12 steps, of which 4 warm up to 2."""
    optimizer = simsiam.sgd(tiny_model(), 0.9, 1e-4)
    simsiam.set_lr(optimizer, 2.0, step, 12, 4, pred_lr)
    assert close([group["lr"] for group in optimizer.param_groups], expected)


# --- Sec. 4: what is watched, and the ablations' losses -----------------------------------------------------

def test_sec41_std_of_the_normalised_output():
    """Against numpy, and its two limits: 1/sqrt(d) if scattered, 0 if collapsed."""
    z, *_ = vectors(50, 8)
    v = unit(z).detach().numpy()
    assert close(simsiam.feature_std(z), v.std(axis=0).mean())
    torch.manual_seed(0)
    assert close(simsiam.feature_std(torch.randn(4000, 256)), 1 / 16, 0.01)
    assert simsiam.feature_std(torch.ones(100, 256)) < 1e-3          # the root of a square's rounding


def test_sec42_no_h_gradient_is_half_of_the_unstopped_one():
    """Without h, the gradient of Eq. (4) against that of D(z1, z2)."""
    model = new_model(predictor="none")
    x1, x2 = torch.randn(2, 8, 3, 16, 16, dtype=torch.float64)
    (p1, p2), (z1, z2) = model(x1, x2)
    assert p1 is z1
    assert p2 is z2
    assert not any(name.startswith("predictor") for name in model.state_dict())
    weights = list(model.parameters())
    stopped = gradients_of(simsiam.loss(p1, p2, z1, z2), *weights)
    whole = gradients_of(simsiam.D(z1, z2), *weights)
    for a, b in zip(stopped, whole):
        assert close(a, b / 2)


def softmax_in_numpy(v):
    """Over the columns."""
    e = np.exp(v.detach().numpy())
    return e / e.sum(axis=1, keepdims=True)


def cross_entropy_in_numpy(p, z):
    """Sec. 4.5's similarity."""
    return -np.mean(np.sum(softmax_in_numpy(z) * np.log(softmax_in_numpy(p)), axis=1))


def test_sec45_cross_entropy_similarity():
    """Value and gradient against numpy."""
    p1, p2, z1, z2 = vectors()
    assert close(simsiam.D_cross_entropy(p1, z2), cross_entropy_in_numpy(p1, z2))
    L = simsiam.loss_cross_entropy(p1, p2, z1, z2)
    assert close(L, numpy_loss(p1, p2, z1, z2, cross_entropy_in_numpy))
    of_p1, _, *others = gradients_of(L, p1, p2, z1, z2)
    by_hand = (softmax_in_numpy(p1) - softmax_in_numpy(z2)) / len(p1)
    assert close(of_p1, by_hand / 2)
    assert others == [None, None]


def test_sec46_asymmetric_losses():
    """Values against numpy, and which of the outputs get a gradient."""
    p1, p2, z1, z2 = vectors()
    p3, p4, z3, z4 = vectors(seed=1)
    assert close(simsiam.loss_asymmetric(p1, p2, z1, z2), numpy_D(p1, z2))
    outputs = p1, p2, p3, p4, z1, z2, z3, z4
    L = simsiam.loss_asymmetric_2x(*outputs)
    assert close(L, (numpy_D(p1, z2) + numpy_D(p3, z4)) / 2)
    there = [g is not None for g in gradients_of(L, *outputs)]
    assert there == [True, False, True, False] + 4 * [False]


def test_four_views_of_an_image_are_four():
    """For Sec. 4.6's two pairs: no view equals another."""
    (_, x), = drawn_views(1, views=4)
    assert len(x) == 4
    for a, b in itertools.combinations(x, 2):
        assert (a - b).abs().mean() > 0.1


# --- Sec. 5: h, and the two variants ------------------------------------------------------------------------

def test_sec51_h_predicts_the_mean_over_the_augmentations():
    """The best of all functions of z1, by a Newton step, against E_T[z2]; and p against h(z)."""
    z = torch.tensor(TOY @ TOY_THETA)                                # (5, 4, 2): z of image x under T
    h = torch.zeros_like(z, requires_grad=True)                      # any function: a table over the z1
    difference = h[:, :, None] - z[:, None]                          # of x, T of z1, T' of z2
    gradient, = gradients_of((difference ** 2).sum(dim=-1).mean(), h)
    best = h - 10 * gradient                                         # a quadratic
    assert close(best, z.mean(dim=1, keepdim=True).expand_as(z))
    model = new_model()
    p, z = model(*torch.randn(2, 4, 3, 16, 16, dtype=torch.float64))
    for p_i, z_i in zip(p, z):
        assert close(p_i, model.predictor(z_i))


def test_sec52_kstep_with_one_step_is_plain_training_bit_for_bit():
    """k = 1 against plain training; k = 3 differs from its second step on."""
    method, losses = trained(dtype=torch.float32)
    one, losses_one = trained(dtype=torch.float32, eta="alternate", k=1)
    assert losses == losses_one
    assert equal(method.model.state_dict(), one.model.state_dict())
    _, losses_three = trained(dtype=torch.float32, eta="alternate", k=3)
    assert losses_three[0] == losses[0]
    assert losses_three[1] != losses[1]


def test_sec52_moving_average_of_eta(world_of_one):
    """Two visits to the same images against the formula in numpy; the first initialises."""
    store = PerImageVectors(6, 5, CPU)
    store.mine = store.mine.double()
    kept = torch.zeros(6, 5, dtype=torch.float64)
    for visit, index in enumerate(np.array([[4, 1, 0], [1, 5, 4]])):
        p1, p2, z1, z2 = vectors(3, 5, seed=visit)
        optimizer = torch.optim.SGD([p1, p2, z1, z2], lr=0.0)

        def network(x1, x2, given=((p1, p2), (z1, z2))):
            return given

        L, _ = simsiam.moving_average_step(store, 0.8, network, optimizer, NO_AUTOCAST, index, None, None)
        eta1, eta2 = (0.8 * kept[index] + 0.2 * unit(z).detach() for z in (z1, z2))
        kept[index] = unit(eta1 + eta2)
        assert close(L, numpy_loss(p1, p2, eta1, eta2))
        assert close(store.state_dict()["vectors"], kept)
        assert p1.grad is not None
        assert p2.grad is not None
        assert z1.grad is None                                       # eta is a constant
        assert z2.grad is None


def test_table1_a_is_the_moving_average_with_m_0(world_of_one):
    """m = 0 against plain training without h; m = 0.8 differs from the second epoch on."""
    method, losses = trained(steps=5, predictor="none")
    forgetful, losses_0 = trained(steps=5, predictor="none", eta="average", m=0.0)
    assert close(losses_0, losses)
    assert all_close(forgetful.model, method.model)
    assert close(forgetful.store.state_dict()["vectors"].norm(dim=1), torch.ones(40))
    _, losses_8 = trained(steps=5, predictor="none", eta="average", m=0.8)
    assert close(losses_8[:4], losses[:4])
    assert not close(losses_8[4], losses[4], 1e-4)


SEC52 = shlex.split("--recipe cifar10 --knn-every 0 --workers 0")


@slow
@pytest.mark.parametrize("experiment", ["sec52-10-step", "sec52-moving-average"])
def test_experiments_of_sec52_do_the_same_in_two_processes(tmp_path, small, experiment):
    """Each epoch's loss and each image's vector in the checkpoint, against one process."""
    options = [small, *TINY, *SEC52, "--experiment", experiment, "--batch", "10", "--base-lr", "0.1"]
    assert here("simsiam.py", *options, "--out", tmp_path / "one") is None
    done = torchrun(ROOT / "simsiam.py", *options, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    folders = [tmp_path / "one", tmp_path / "two"]
    one, two = map(losses_of, folders)
    for epoch in (1, 2, 3):
        assert close(one[epoch], two[epoch], 1e-3)                   # of float32, after 15 steps
    if experiment == "sec52-moving-average":
        checkpoints = [torch.load(folder / "checkpoint.pth", weights_only=True) for folder in folders]
        eta_of_one, eta_of_two = (checkpoint["eta"]["vectors"] for checkpoint in checkpoints)
        assert close(eta_of_one.norm(dim=1), torch.ones(50), 1e-5)
        assert close(eta_of_one, eta_of_two, 0.05)


@slow
@pytest.mark.parametrize("experiment, at", [
    ("sec52-10-step", 13),
    ("sec52-1-epoch", 10),
    ("sec52-moving-average", 13)])
def test_interrupted_experiment_ends_with_the_uninterrupted_weights(tmp_path, small, experiment, at):
    """Interrupted within an inner loop, against uninterrupted: eta comes from theta^t again."""
    options = [small, *TINY, *SEC52, "--experiment", experiment, "--batch", "6"]
    check_resumed(tmp_path, "simsiam.py", options, at, steps_per_epoch=8)


# --- Supplement A: LARS (You et al. 2017) -------------------------------------------------------------------

@pytest.mark.parametrize("joint, decay, lr_inside", [
    (False, 0.0, False), (False, 0.1, False),                        # the released code's
    (True, 0.1, False), (True, 0.1, True)])                          # BYOL's, SimCLR's
def test_lars_alg1_is_its_formula_step_by_step(joint, decay, lr_inside):
    """Against numpy, at four lrs: a weight, a bias that starts at 0, and a third tensor.

    The third has a gradient of 0 in the released code's form, and is not adapted in the others.
    """
    rng = np.random.default_rng(0)
    expected = [rng.normal(size=(4, 3)), np.zeros(4), np.ones(2)]
    weights = [torch.nn.Parameter(torch.tensor(w)) for w in expected]
    groups = [{"params": weights[:2], "weight_decay": decay}, {"params": weights[2:], "weight_decay": decay}]
    if joint:
        groups[1]["adapted"] = False
        optimizer = related.JointLARS(groups, lr=0.0, momentum=0.9, lr_inside=lr_inside)
    else:
        optimizer = lineval.LARS(groups, lr=0.0, momentum=0.9)
    velocity = [0.0] * 3
    for lr in (1.6, 0.8, 0.3, 0.1):
        for k, w in enumerate(weights):
            gradient = rng.normal(size=w.shape)
            if k == 2 and not joint:
                gradient = 0 * gradient
            w.grad = torch.tensor(gradient)
            norm = np.linalg.norm(expected[k])
            step = gradient + decay * expected[k]
            length = np.linalg.norm(step) if joint else np.linalg.norm(gradient) + decay * norm + 1e-8
            if k == 2 and not joint:
                step = gradient                                      # without weight decay
            elif k < 2 and norm > 0:
                step = 0.001 * norm / length * step
            velocity[k] = 0.9 * velocity[k] + (lr if lr_inside else 1) * step
            expected[k] = expected[k] - (1 if lr_inside else lr) * velocity[k]
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        assert all(map(close, weights, expected))


# ------------------------------------------------------------------------------------------------------------
# 2. The model, the step, what is watched
# ------------------------------------------------------------------------------------------------------------

def test_model_has_the_released_models_names_and_shapes():
    """torchvision's backbone, then the released heads, in order."""
    with torch.device("meta"):
        model = simsiam.SimSiam()
    backbone = torchvision_names(3, (3, 4, 6, 3), 4)
    expected = {f"encoder.{name}": shape for name, shape in backbone.items() if not name.startswith("fc.")}
    expected |= RELEASED_HEADS
    found = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert list(found.items()) == list(expected.items())


@pytest.mark.parametrize("bn", ["1110", "0000", "1010", "1111"])
def test_table3_bn_is_where_the_row_says(bn):
    """The heads' layers against a list; a layer has a bias unless a BN follows."""
    flags = [int(flag) for flag in bn]
    model = tiny_model(proj_layers=3, bn=flags)
    proj_hidden, proj_output, pred_hidden, pred_output = (["BatchNorm1d"] * flag for flag in flags)
    hidden = ["Linear", *proj_hidden, "ReLU"]
    expected = [
        [*hidden, *hidden, "Linear", *proj_output],
        ["Linear", *pred_hidden, "ReLU", "Linear", *pred_output]]
    for head, names in zip((model.encoder.fc, model.predictor), expected):
        assert [type(layer).__name__ for layer in head] == names
        for layer, following in zip(head, [*names[1:], None]):
            if isinstance(layer, torch.nn.Linear):
                assert (layer.bias is None) == (following == "BatchNorm1d")


def test_only_the_affine_output_bn_has_a_scale():
    """By the names in the state_dict."""
    assert "encoder.fc.4.weight" not in tiny_model().state_dict()
    assert "encoder.fc.4.weight" in tiny_model(affine=True).state_dict()


def test_fc_std_is_that_of_the_heads_weights():
    """Against the std asked for."""
    torch.manual_seed(0)
    model = tiny_model(dim=512, pred_dim=128, proj_hidden=512, fc_std=0.01)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(layers) == 4
    for layer in layers:
        assert close(layer.weight.std(), 0.01, 0.05)


def step_of(dtype=torch.float32, autocast=False, compiled=False, steps=1):
    """Loss and gradients (float64, flat) of a tiny model's last step; the start is always the same."""
    model = new_model(dtype, width=1 / 4, dim=64, pred_dim=16)
    views = torch.randn(2, 32, 3, 16, 16).to(dtype)
    if compiled:
        model.compile()
    optimizer = simsiam.sgd(model, 0.9, 1e-4)
    precision = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    for _ in range(steps):
        simsiam.set_lr(optimizer, 0.01, 0, 2, 0, "constant")
        L, _ = simsiam.train_step(model, optimizer, precision, *views)
    gradients = [w.grad.double().flatten() for w in model.parameters()]
    return L.double(), torch.cat(gradients)


def test_loss_is_taken_in_float32_from_bfloat16():
    """Against numpy in float64."""
    p, z, *_ = (v.detach().to(torch.bfloat16) for v in vectors(64, 512))
    L = simsiam.D(p, z)
    assert L.dtype == torch.float32
    assert abs(L - numpy_D(p.double(), z.double())) < 1e-6           # of cosines, whose size is 1


def test_bfloat16_autocast_gives_the_float64_step_up_to_its_digits():
    """Loss and gradients under autocast against those in float64."""
    L, gradient = step_of(autocast=True)
    exact_L, exact = step_of(torch.float64)
    assert abs(L - exact_L) < 0.01                                   # of cosines, to 2^-8 of their size
    assert L != exact_L
    assert F.cosine_similarity(gradient, exact, dim=0) > 0.98
    assert close(gradient.norm(), exact.norm(), 0.1)


@slow
def test_a_compiled_step_is_the_float64_step():
    """Loss and gradients of the second compiled step against those in float64."""
    L, gradient = step_of(compiled=True, steps=2)
    exact_L, exact = step_of(torch.float64, steps=2)
    assert abs(L - exact_L) < 1e-5                                   # of cosines, whose size is 1
    assert (gradient - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize("n", [8, 32, 128, 512])
def test_collapse_behind_an_output_bn_is_recognised(n):
    """n - 1 outputs at u and one at -u, as near to a point as mean 0 allows, against the closed form.

    Healthy runs early and late, and a start with equal outputs, are no collapse. A std of 0 is one, whatever
    the loss.
    """
    torch.manual_seed(n)
    u = unit(torch.randn(1, 64, dtype=torch.float64))
    z = torch.cat([u.expand(n - 1, -1), -u])
    std_sqrt_d = simsiam.feature_std(z) * 8
    assert close(std_sqrt_d, 2 * math.sqrt(n - 1) / n * u.abs().mean() * 8)
    lowest = simsiam.D(z, z.roll(1, 0))  # views that disagree on which image is the odd one
    assert close(lowest, -1 + 4 / n)
    assert simsiam.collapsed(1 + lowest, std_sqrt_d, n)
    assert simsiam.collapsed(1.0, 0.0, n)
    for excess, healthy in ((0.07, 0.95), (0.01, 0.95), (0.9, 0.05)):
        assert not simsiam.collapsed(excess, healthy, n)


def test_effective_rank_is_the_exponential_of_an_entropy():
    """Against numpy, from the covariance's eigenvalues; and in the limit, D."""
    torch.manual_seed(0)
    v = torch.randn(300, 12, dtype=torch.float64) * torch.logspace(-2, 1, 12)
    root = np.sqrt(np.linalg.eigvalsh(np.cov(v.numpy().T)))
    share = root / root.sum()
    expected = np.exp(-(share * np.log(share)).sum())
    assert close(simsiam.effective_rank(v), expected)
    assert 2 < expected < 11
    corners = torch.cat([torch.eye(6), -torch.eye(6)])
    assert close(simsiam.effective_rank(corners), 6, 1e-5)


def test_knn_agrees_with_a_loop():
    """Every query's votes against a loop over its neighbours in numpy."""
    torch.manual_seed(0)
    bank = unit(torch.randn(300, 8, dtype=torch.float64))
    queries = unit(torch.randn(70, 8, dtype=torch.float64))
    labels = torch.randint(0, 5, (300,))
    expected = []
    for q in queries:
        cosines = (bank @ q).numpy()
        votes = np.zeros(5)
        for i in np.argsort(-cosines)[:20]:
            votes[labels[i]] += math.exp(cosines[i] / 0.1)
        expected.append(np.where(votes > 0, votes, -np.inf))         # without votes, never among the best
    found = simsiam.knn(bank.float(), labels, queries.float(), 20, 0.1)
    assert found.shape == (70, 5)
    assert np.allclose(found, expected, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------
# 3. The settings
# ------------------------------------------------------------------------------------------------------------

settings_of_row = functools.partial(tests.helpers.settings_of_row, simsiam)


@pytest.mark.parametrize("recipe", PAPER)
def test_recipes_hold_the_papers_settings(recipe):
    """The settings of a run without further options, against the table above."""
    run = settings_of_row("simsiam", recipe)
    assert {name: run[name] for name in PAPER[recipe]} == PAPER[recipe]


def test_default_policy_is_the_papers_for_imagenet():
    """augment.Policy() against the table above; the paper flips nothing upside down."""
    expected = PAPER["imagenet"] | {"vflip": 0}
    for name, value in augment.Policy()._asdict().items():
        assert value == expected[name], name


def test_linear_protocols_hold_the_papers_settings():
    """Supplement A: SGD or LARS, momentum 0.9, no weight decay; and each recipe's protocol."""
    for name, expected in LINEAR.items():
        protocol = lineval.PROTOCOLS[name]
        assert {option: getattr(protocol, option) for option in expected} == expected
        weight_and_bias = lineval.linear_layer(8, 3).parameters()
        optimizer = protocol.optimizer(weight_and_bias)
        assert isinstance(optimizer, lineval.LARS if name == "lars" else torch.optim.SGD)
        group, = optimizer.param_groups
        assert len(group["params"]) == 2
        assert group["momentum"] == 0.9
        assert group["weight_decay"] == 0
    assert lineval.DEFAULT == {"imagenet": "lars", "cifar10": "sgd", "shapes": "cached"}


def test_linear_protocols_lrs_fall_as_the_papers_do():
    """SGD's drops after 60 and 80 of 100 epochs; for LARS, half a cosine."""
    sgd, lars = (lineval.PROTOCOLS[name].schedule for name in ("sgd", "lars"))
    steps = [sgd(epoch * 7 + 6, 700) for epoch in range(100)]
    assert close(steps, [1] * 60 + [0.1] * 20 + [0.01] * 20)
    assert close([lars(t, 90) for t in (0, 30, 45, 90)], [1, 0.75, 0.5, 0])


def test_linear_layer_starts_as_in_the_released_code():
    """Weights from a normal distribution of std 0.01, bias 0."""
    torch.manual_seed(0)
    layer = lineval.linear_layer(512, 1000)
    assert close(layer.weight.std(), 0.01, 0.02)
    assert layer.weight.mean().abs() < 1e-4
    assert not layer.bias.any()


# ------------------------------------------------------------------------------------------------------------
# 4. The experiments
# ------------------------------------------------------------------------------------------------------------

def test_experiments_hold_the_papers_settings_and_results():
    """Each row against the table above; nothing else changes."""
    check_rows(simsiam, [simsiam.SimSiamMethod], PAPERS_RESULTS)


@pytest.mark.parametrize("experiment, recipe, expected", [
    ("table2-batch-4096", "cifar10", {"batch": 4096}),
    ("table2-batch-4096", "shapes", {"batch": 512}),
    ("table2-batch-1024", "shapes", {"warmup": 1}),
    ("suppB-dim-512", "shapes", {"dim": 128, "pred_dim": 32}),
    ("table4-200-epochs", "shapes", {"epochs": 12}),
    ("table4-200-epochs", "cifar10", {"epochs": 200})])
def test_experiments_scale_to_smaller_recipes(experiment, recipe, expected):
    """In proportion, worked out by hand. An option overrides the row."""
    row = settings_of_row(experiment, recipe)
    assert {name: row[name] for name in expected} == expected
    assert settings_of_row(experiment, recipe, "--batch", "32")["batch"] == 32


@pytest.mark.parametrize("experiment, note", [
    ("suppB-dim-512", "67.2); here dim 128, pred_dim 32, not what the row says"),
    ("sec45-cross-entropy", "63.2)")])
def test_a_scaled_experiment_says_so(experiment, note):
    """The start block's line on the row."""
    method = simsiam.SimSiamMethod(settings_of_row(experiment, "shapes"), None, CPU)
    assert report.describe_experiment(method) == f"{experiment} (the paper on ImageNet: {note}"


ALL_ROWS = "--width 1/16 --proj-hidden 16 --size 16 --batch 25 --base-lr 0.1 --knn-every 0 --workers 0"
QUICK = ["table1-b-fixed-predictor", "sec46-asymmetric-2x", "sec52-10-step"]


def rows_to_train():
    """Every experiment with both small recipes; a few are quick."""
    rows = []
    for recipe, experiment in itertools.product(["shapes", "cifar10"], PAPERS_RESULTS):
        quick = recipe == "shapes" and experiment in QUICK
        marks = [] if quick else slow
        rows.append(pytest.param(experiment, recipe, marks=marks, id=f"{experiment}-{recipe}"))
    return rows


@pytest.mark.parametrize("experiment, recipe", rows_to_train())
def test_every_experiment_trains(tmp_path, small, experiment, recipe):
    """All weights move but a fixed predictor's, and losses are finite."""
    options = f"{ALL_ROWS} --recipe {recipe} --experiment {experiment}"
    row, _ = PAPERS_RESULTS[experiment]
    if "pred_dim" not in row:
        options += " --dim 16 --pred-dim 4"
    options += " --epochs 3 --warmup 1" if row.get("warmup") else " --epochs 2"
    assert here("simsiam.py", small, *options.split(), "--out", tmp_path / "run") is None
    fixed = ("predictor.",) if experiment == "table1-b-fixed-predictor" else ()
    assert check_run(tmp_path / "run", simsiam.SimSiamMethod, fixed) == experiment


# ------------------------------------------------------------------------------------------------------------
# 5. The map from the paper to the code. A tag that trails a line of code claims that the line is the equation
# ------------------------------------------------------------------------------------------------------------

MAP = {  # tag: (the equation, part of the claimed line, what a mutant has instead, or None)
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
        "autocast, x1, x2)", "autocast, x2, x1)"),
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
        "eta1, eta2)", "eta2, eta1)"),
    "Sec. 5.2 (moving average)": (
        r"\eta_x^t \leftarrow m \eta_x^{t-1} + (1 - m) \mathcal{F}_{\theta^t}(\mathcal{T}'(x))",
        "(1 - m)", "m"),
    "LARS Alg. 1": (
        r"\lambda = \eta \frac{\lVert w \rVert}{\lVert \nabla L(w) \rVert + \beta \lVert w \rVert}",
        "rate = self.trust * norm", "rate = self.trust")}

SOURCES = ["simsiam.py", "lineval.py", "augment.py", "resnet.py", "test_simsiam.py"]
TAG = re.compile(r"# ((?:LARS )?(?:Eq|Alg|Sec)\. [\d.()]+(?: \([\w -]+\))?): (.*)")


def claims_of_the_paper():
    """All claims of the sources, in the order of MAP."""
    return claims(SOURCES, TAG, MAP, globals())


def test_every_equation_is_claimed_by_one_line_and_one_test():
    """The tags of the sources against MAP."""
    check_claims(claims_of_the_paper(), MAP)


# The rest of the paper: {what: (where the paper has it, file, the beginning of the line that does it, the
# test's file and name)}. Each beginning occurs once in its file.
SETTINGS_MAP = {
    "crop": ("supp. A", "augment.py", "def draw_crop(",
             "tests/test_augment.py", "test_crops_are_distributed_as_random_resized_crop_draws_them"),
    "jitter, grayscale, blur": (
        "supp. A", "augment.py", "    if colour.jitter:",
        "tests/test_augment.py", "test_changes_are_exact_and_come_in_each_views_own_order"),
    "flip": ("supp. A", "augment.py", "        x = x.flip(2)",
             "tests/test_one_view.py", "test_crop_resize_and_flip_agree_with_pillow"),
    "the two heads": ("Sec. 3", "simsiam.py", "def projection_mlp(",
                      "test_simsiam.py", "test_model_has_the_released_models_names_and_shapes"),
    "weight decay on all": ("Sec. 3", "simsiam.py", "def sgd(",
                            "test_simsiam.py", "test_alg1_parity_with_the_released_model"),
    "all settings": ("Sec. 3; supp. A, D", "simsiam.py", "SETTINGS = {",
                     "test_simsiam.py", "test_recipes_hold_the_papers_settings"),
    "the ablations": ("Sec. 4, 5; supp. A, B", "simsiam.py", "EXPERIMENTS = {",
                      "test_simsiam.py", "test_experiments_hold_the_papers_settings_and_results"),
    "linear evaluation": ("supp. A", "lineval.py", "PROTOCOLS = {",
                          "tests/test_lineval.py", "test_two_processes_give_the_accuracy_of_one"),
    "kNN monitor": ("supp. D", "simsiam.py", "def knn(",
                    "test_simsiam.py", "test_knn_agrees_with_a_loop"),
}


def line_of(file, beginning):
    """The number of the only line of a file with this beginning."""
    lines = (ROOT / file).read_text().splitlines()
    found = [number for number, line in enumerate(lines, 1) if line.startswith(beginning)]
    assert len(found) == 1, (file, beginning, found)
    return found[0]


def paper_map():
    """The README's table: the claims with their equations from MAP, then SETTINGS_MAP."""
    rows = []
    for what, (where, file, beginning, test_file, test) in SETTINGS_MAP.items():
        number = line_of(file, beginning)
        line_of(test_file, f"def {test}(")
        rows.append(f"| {where} | {what} | [{file}:{number}]({file}#L{number}) | [`{test}`]({test_file}) |\n")
    return equation_table(claims_of_the_paper(), MAP) + "".join(rows)


READING = [  # what to read, the file, the beginnings of its first line and of the line after it; beside what
    ("sections 1 to 4", "simsiam.py", '"""', "# --- 5.", "Sec. 3: loss, heads, optimiser, training loop"),
    ("", "resnet.py", '"""', None, "He et al. 2016, Table 1"),
    ("", "augment.py", '"""', None, "supplement A: crop, flip, jitter, grayscale, blur"),
    ("sections 5 to 8", "simsiam.py", "# --- 5.", "# --- 9.", "Sec. 4 and 5: ablations, the hypothesis"),
    ("the protocols", "lineval.py", '"""', "# --- 6. The program", "supplement A: linear evaluation"),
    ("", "related.py", '"""', None, "Sec. 6.2, Table 4: SimCLR, MoCo v2, BYOL, SwAV"),
    ("", "test_simsiam.py", '"""', None, "the whole paper: each equation, checked independently"),
]


def reading_table():
    """The README's table of what to read in which order, from READING."""
    rows = ["| read | lines | beside |", "|---|---|---|"]
    for part, file, beginning, end, beside in READING:
        lines = (ROOT / file).read_text().splitlines()
        first = next(number for number, line in enumerate(lines) if line.startswith(beginning))
        last = len(lines) if end is None else line_of(file, end) - 1
        name = f"[{file}]({file}#L{first + 1})"
        if part:
            name = f"{name}, {part}"
        rows.append(f"| {name} | {last - first} | {beside} |")
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize("made", [paper_map, reading_table])
def test_readme_has_the_map_of_the_sources(made):
    """The README has the tables that are made from the sources."""
    assert made() in (ROOT / "README.md").read_text(), "python test_simsiam.py writes them"


@pytest.mark.parametrize("tag", [tag for tag, (_, _, wrong) in MAP.items() if wrong is not None])
def test_a_mutant_of_every_claimed_line_dies_in_its_test(tag, request):
    """The equation's test fails with the mutant instead of the module."""
    claim, = (claim for claim in claims_of_the_paper() if claim.tag == tag)
    rooms = globals(), vars(tests.helpers)
    check_it_dies(mutant_of(claim, MAP), rooms, globals()[claim.test], request)


# --- Shape comments, `name = ...  # (N, d)`. tests/shape_comments.py turns them into checks -----------------

def test_shape_comments_are_what_happens(tmp_path, monkeypatch, ten, large):
    """All that tokenizing the sources finds are executed, in some runs and calls."""
    with shape_comments.checking_shapes() as importer:
        for name in ("simsiam", "lineval"):
            monkeypatch.setitem(vars(tests.helpers), name, sys.modules[name])
        small = "--epochs 1 --workers 0 --experiment sec52-moving-average"
        photos = "--epochs 1 --workers 0 --recipe imagenet --size 24"
        linear = "--cached --epochs 1 --workers 0 --ckpt"
        assert here("simsiam.py", ten, *TINY, *small.split(), "--out", tmp_path / "small") is None
        assert here("simsiam.py", large, *TINY, *photos.split(), "--out", tmp_path / "photos") is None
        assert here("lineval.py", ten, *linear.split(), tmp_path / "small/checkpoint.pth") is None
        a, b = torch.randn(2, 4, 5)
        sys.modules["simsiam"].D_cross_entropy(a, b)
        related = sys.modules["related"]
        related.nt_xent(a, b, 0.5)
        related.info_nce(a, b, torch.randn(8, 5), 0.2)
        related.Queue(8, 5, like=a)
        related.balance(a, 0.05, 3)
        related.swapped(a, b, 0.1)
        related.clip_loss(a, b, torch.tensor(1.0))
        sys.modules["harness.data.shapes"].draw_shapes(0, 0, 2)
        sys.modules["harness.training.processes"].join_world(CPU)
        sys.modules["harness.training.batchnorm"].SyncBatchNorm(5)(torch.randn(4, 5, 2, 2))
        torch.distributed.destroy_process_group()
    assert importer.places - importer.seen == set()
    found = set()
    for file in map(shape_comments.file_of, shape_comments.SCRIPTS + shape_comments.ROOMS):
        found |= {(file, line) for line, text in trailing_comments(file) if shape_comments.is_shape(text)}
    assert found == {(file, line) for file, line, _ in importer.places}
    assert len(found) > 70


# --- Departures from the paper ------------------------------------------------------------------------------

DEPARTURES = {  # file: [(words in the line with the mark, first cell of its row in the README)], in order
    "simsiam.py": [
        ("affine", "projection's output BN"),
        ("first hidden width", "projection's first hidden width"),
        ("every step", "lr updated")],
    "augment.py": [
        ("blur", "blur probability")],
    "resnet.py": [
        ("initializers", "convolutions' initialisation")],
    "lineval.py": [
        ("released code's lr", "linear evaluation's base lr"),
        ("incomplete batch", "linear evaluation's last batch")]}


@pytest.mark.parametrize("file", DEPARTURES)
def test_every_departure_has_its_row_in_the_readme(file):
    """The marks in the code against the table above, and its rows against the README's."""
    check_departures(file, DEPARTURES[file], "README.md", "| | paper | released code | here |")


# ------------------------------------------------------------------------------------------------------------
# 6. The README. tests/test_results.py compares its figures with the logs
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


@pytest.mark.parametrize("module, at_least", [(simsiam, 5), (lineval, 4), (augment, 1)])
def test_readme_commands_parse(module, at_least):
    """By the scripts' own parsers."""
    commands = commands_of(f"{module.__name__}.py")
    assert len(commands) >= at_least
    for arguments in commands:
        lists = "list" in arguments
        with pytest.raises(SystemExit, match="^$") if lists else contextlib.nullcontext():
            module.parse(arguments)


def test_readmes_first_command_makes_its_first_step(tmp_path, monkeypatch, capsys):
    """The first one under "Set up and run", after pip's; in this process and with fewer shapes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "TRAINING", 100)
    monkeypatch.setattr(shapes, "VALIDATION", 20)
    set_up = (ROOT / "README.md").read_text().split("## Set up and run")[1]
    command = re.search(r"```bash\npip install .* && (.*?)\n", set_up)[1]
    python, script, *arguments = shlex.split(command)
    assert python == "python"
    with interrupted_before(1):
        assert "interrupted" in here(script, *arguments)
    assert capsys.readouterr().out.startswith("data        the drawn shapes: 100 images")


def test_readme_shows_the_algorithm_as_it_is():
    """A step of the README's listing of Algorithm 1, executed, against simsiam.train_step."""
    listing = re.search(r"```python\n(# Algorithm 1.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    models = [new_model(), new_model()]
    model, reference = models
    optimizer, optimizer_again = (simsiam.sgd(m, 0.9, 1e-4) for m in models)
    simsiam.set_lr(optimizer, 0.1, 0, 2, 0, "constant")
    simsiam.set_lr(optimizer_again, 0.1, 0, 2, 0, "constant")
    images = torch.randn(2, 8, 3, 16, 16, dtype=torch.float64)
    views = iter(images)
    names = {"f": model.encoder, "h": model.predictor, "augment": lambda x: next(views)}
    exec(listing, {"F": F, "loader": [images], "optimizer": optimizer} | names)
    simsiam.train_step(reference, optimizer_again, NO_AUTOCAST, *images)
    assert all_close(model, reference)


if __name__ == "__main__":
    write_tables(ROOT / "README.md", [paper_map(), reading_table()])
