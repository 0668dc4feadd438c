"""The demo's network, plain optimizers, trainings and paths, each against something independent of it."""

import math
import sys
from importlib.util import find_spec

import numpy as np
import pytest

import xpoptim as xo
from xpoptim.demo import DemoError, missing_extra, surface, training
from xpoptim.demo.network import Network

needs_sklearn = pytest.mark.skipif(find_spec("sklearn") is None, reason="needs scikit-learn: pip install '.[demo]'")
NUMPY = training.open_backend("numpy")


def ignore(step, curve):
    pass


# The network


@pytest.mark.parametrize("dropout_ratio", [0.0, 0.4])
def test_the_backpropagation_agrees_with_central_differences(dropout_ratio):
    rng = np.random.default_rng(3)
    x, labels = rng.standard_normal((9, 6)), rng.integers(0, 4, 9)

    def network():  # a new one has the masks of its first call again
        return Network((6, 8, 7, 4), np, seed=5, dropout_ratio=dropout_ratio, dtype="float64")

    point = {key: value + 0.1 * rng.standard_normal(value.shape) for key, value in network().params.items()}

    def loss(params):
        there = network()
        for key, value in params.items():
            there.params[key][...] = value
        return float(there.loss(x, labels, train_flg=True))

    here = network()
    for key, value in point.items():
        here.params[key][...] = value
    grads = here.gradient(x, labels)
    assert grads.keys() == point.keys()
    for key, value in point.items():
        expected = np.empty_like(value)
        for index in np.ndindex(value.shape):
            up, down = (dict(point, **{key: value.copy()}) for _ in range(2))
            up[key][index] += 1e-6
            down[key][index] -= 1e-6
            expected[index] = (loss(up) - loss(down)) / 2e-6
        np.testing.assert_allclose(grads[key], expected, rtol=1e-6, atol=1e-9, err_msg=key)
    assert all(np.abs(grad).max() > 1e-3 for grad in grads.values())


def test_the_loss_is_the_mean_negative_log_probability_of_the_labels():
    network = Network((3, 5, 4), np, seed=1, dtype="float64")
    x, labels = np.random.default_rng(2).standard_normal((6, 3)), np.array([0, 1, 2, 3, 0, 1])
    expected = 0.0
    for scores, label in zip(network.predict(x).tolist(), labels, strict=True):
        expected -= scores[label] - math.log(math.fsum(math.exp(score) for score in scores))
    assert float(network.loss(x, labels)) == pytest.approx(expected / 6, rel=1e-12)


def test_the_loss_of_huge_scores_is_finite():
    network = Network((2, 3), np, dtype="float64")
    network.params["W1"][...] = [[1e5, 0, -1e5], [0, 0, 0]]
    assert float(network.loss(np.array([[1.0, 0.0]]), np.array([2]))) == pytest.approx(2e5)


def test_the_layers_hold_the_arrays_of_the_parameter_dict():
    network = Network((4, 6, 3), np, seed=0)
    x, labels = np.ones((2, 4), np.float32), np.array([0, 1])
    before = network.predict(x)
    xo.SGD(lr=1.0).update(network.params, network.gradient(x, labels))
    assert not np.array_equal(network.predict(x), before)
    assert all(grad.dtype == np.float32 for grad in network.gradient(x, labels).values())


def test_the_weights_start_by_he():
    """Normal with variance 2 / inputs, so that a layer's ReLU hands on values of the size that it was given."""
    network = Network((400, 300, 100), np, seed=0, dtype="float64")
    for key, inputs in (("W1", 400), ("W2", 300)):
        weights = network.params[key]
        assert weights.std() == pytest.approx(math.sqrt(2 / inputs), rel=0.02)
        assert abs(weights.mean()) < 0.02 * weights.std() * 2
    assert not network.params["b1"].any()


def test_dropout_is_active_in_training_only_and_differs_between_layers():
    network = Network((4, 50, 50, 3), np, seed=0, dropout_ratio=0.5)
    x = np.ones((8, 4), np.float32)
    np.testing.assert_array_equal(network.predict(x), network.predict(x))
    assert not np.array_equal(network.predict(x, train_flg=True), network.predict(x, train_flg=True))
    first, second = (layer.mask for layer in network.layers if isinstance(layer, xo.Dropout))
    assert not np.array_equal(first, second)


# The plain optimizers: to be a fair comparison they must do the same


@pytest.mark.parametrize("entry", training.ENTRIES, ids=lambda entry: entry.name)
def test_each_plain_optimizer_does_what_the_fused_one_does(entry):
    rng = np.random.default_rng(0)
    ours = {"W": rng.standard_normal((4, 5)), "b": rng.standard_normal(5)}
    theirs = {key: value.copy() for key, value in ours.items()}
    start = {key: value.copy() for key, value in ours.items()}
    optimizer, plain_optimizer = entry.make(entry.lr), entry.make_plain(entry.lr, np)
    assert type(optimizer) is getattr(xo, entry.name)
    for _ in range(20):
        grads = {key: rng.standard_normal(value.shape) for key, value in ours.items()}
        optimizer.update(ours, grads)
        plain_optimizer.update(theirs, grads)
    for key in ours:
        np.testing.assert_allclose(theirs[key], ours[key], rtol=1e-11, atol=1e-13)
        assert np.abs(ours[key] - start[key]).min() > 1e-6


# The training


@needs_sklearn
def test_the_digits_are_split_without_overlap():
    data = training.load_digits(np, seed=0)
    assert data.x_train.shape == (1437, 64)
    assert data.x_test.shape == (360, 64)
    assert data.x_train.dtype == np.float32
    assert data.x_train.min() == 0
    assert data.x_train.max() == 1
    assert set(data.y_train.tolist()) == set(data.y_test.tolist()) == set(range(10))
    everything = np.concatenate([data.x_train, data.x_test])
    from sklearn import datasets

    expected = (datasets.load_digits().data / 16).astype(np.float32)
    assert sorted(map(bytes, everything)) == sorted(map(bytes, expected))


@needs_sklearn
def test_wrong_labels_are_wrong_and_the_others_right():
    right = training.load_digits(np, 4, train_images=300)
    wrong = training.load_digits(np, 4, train_images=300, wrong_labels=60)
    np.testing.assert_array_equal(wrong.x_train, right.x_train)
    np.testing.assert_array_equal(wrong.y_train != right.y_train, np.arange(300) < 60)
    np.testing.assert_array_equal(wrong.y_test, right.y_test)
    assert set(wrong.y_train.tolist()) <= set(range(10))


def test_each_pass_shows_an_image_at_most_once():
    steps = list(training.batches(350, 7, seed=1))
    assert all(step.shape == (training.BATCH,) for step in steps)
    for k in (0, 3):
        shown = np.concatenate(steps[k : k + 3])
        assert len(set(shown.tolist())) == 300
        assert shown.max() < 350
    assert not np.array_equal(np.concatenate(steps[:3]), np.concatenate(steps[3:6]))


@pytest.mark.parametrize("logarithmic", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 39, 1000])
def test_the_first_and_the_last_step_are_measured(steps, logarithmic):
    measured = training.measured_steps(steps, logarithmic=logarithmic)
    assert {1, steps} <= measured <= set(range(1, steps + 1))
    assert len(measured) <= training.POINTS


@needs_sklearn
def test_a_training_learns_and_its_seed_fixes_it():
    data = training.load_digits(np, seed=0)
    adam = next(entry for entry in training.ENTRIES if entry.name == "Adam")
    first, again = (training.compare(NUMPY, adam, data, 0, 40, ignore) for _ in range(2))
    other = training.compare(NUMPY, adam, data, 1, 40, ignore)
    assert first.curve.test_accuracy[-1] > 0.8
    assert first.curve.loss[-1] < 0.5 * first.curve.loss[0]
    assert first.curve == again.curve
    assert first.curve != other.curve
    assert first.difference < 1e-5
    assert len(first.fused_seconds) == len(first.plain_seconds) == len(first.gradient_seconds) == 40


@needs_sklearn
def test_on_another_backend_every_timed_part_waits_for_the_device():
    waits = []
    backend = training.Backend("cupy", np, lambda: waits.append(1))
    data = training.load_digits(np, seed=0)
    result = training.compare(backend, training.ENTRIES[0], data, 0, 3, ignore)
    assert len(waits) == 3 * 3 * 2  # steps; gradients and two optimizers; before and after
    assert result.curve == training.compare(NUMPY, training.ENTRIES[0], data, 0, 3, ignore).curve


@needs_sklearn
def test_dropout_narrows_the_gap_between_training_and_test():
    without, with_dropout = (training.overfit(NUMPY, ratio, 0, 250, ignore) for ratio in (0.0, 0.5))
    gaps = [curve.train_accuracy[-1] - curve.test_accuracy[-1] for curve in (without, with_dropout)]
    assert gaps[0] > 0.1
    assert abs(gaps[1]) < 0.12
    assert gaps[1] < gaps[0] - 0.1


# The valley


def test_the_way_of_sgd_is_the_geometric_one():
    points = surface.path(surface.optimizers()["SGD"])
    expected = [(-7 * (1 - 0.95 / 10) ** k, 2 * (1 - 0.95 * 2) ** k) for k in range(31)]
    np.testing.assert_allclose(points, expected, rtol=1e-13)


@pytest.mark.parametrize("name", ["SGD", "Momentum", "AdaGrad", "Adam"])
def test_every_way_starts_at_the_book_s_point_and_ends_near_the_minimum(name):
    points = surface.path(surface.optimizers()[name])
    assert len(points) == 31
    assert points[0] == (-7.0, 2.0)
    assert all(type(value) is float for point in points for value in point)
    assert surface.height(*points[-1]) < 0.15 < surface.height(*points[0])


def test_the_first_steps_of_adagrad_and_adam_have_the_length_of_the_learning_rate():
    for name, rate in (("AdaGrad", 1.5), ("Adam", 0.3)):
        _, second = surface.path(surface.optimizers()[name], updates=1)
        assert second == pytest.approx((-7 + rate, 2 - rate), rel=1e-4)


def test_the_slope_is_the_gradient_of_the_height():
    for x, y in ((-7.0, 2.0), (3.0, -1.5)):
        slope = surface.slope(x, y)
        assert slope["x"] == pytest.approx((surface.height(x + 1e-6, y) - surface.height(x - 1e-6, y)) / 2e-6)
        assert slope["y"] == pytest.approx((surface.height(x, y + 1e-6) - surface.height(x, y - 1e-6)) / 2e-6)


# What may be missing


@pytest.mark.parametrize("module", ["rich", "matplotlib", "sklearn"])
def test_a_missing_package_is_named_by_its_distribution(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert {"sklearn": "scikit-learn"}.get(module, module) in missing_extra()


def test_without_cupy_the_backend_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DemoError, match=r"needs CuPy.*cuda12"):
        training.open_backend("cupy")
