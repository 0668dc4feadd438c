"""A multi-layer network with its backpropagation written out by hand.

Every layer has ``forward(x, train_flg)`` and ``backward(dout)``, the interface of :class:`xpoptim.Dropout`.
The array namespace is an argument, so the same code runs on NumPy and on CuPy.
"""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType
from typing import TypeAlias

import numpy as np

import xpoptim as xo

Array: TypeAlias = np.ndarray  # or CuPy's, which has the same methods


class Affine:
    """A fully connected layer, ``y = x @ W + b``.

    ``W`` and ``b`` are the very arrays of the network's parameter dict: an optimizer writes into them in
    place, so the layer sees every update without being told.
    """

    def __init__(self, W: Array, b: Array) -> None:
        self.W, self.b = W, b

    def forward(self, x: Array, train_flg: bool) -> Array:
        self.x = x
        return x @ self.W + self.b

    def backward(self, dout: Array) -> Array:
        self.dW = self.x.T @ dout
        self.db = dout.sum(axis=0)
        return dout @ self.W.T


class ReLU:
    """``y = max(x, 0)``, element by element."""

    def forward(self, x: Array, train_flg: bool) -> Array:
        self.positive = x > 0
        return x * self.positive

    def backward(self, dout: Array) -> Array:
        return dout * self.positive


class SoftmaxCrossEntropy:
    """Mean over a batch of ``-log softmax(scores)[label]``."""

    def __init__(self, xp: ModuleType) -> None:
        self.xp = xp

    def forward(self, scores: Array, labels: Array) -> Array:
        shifted = scores - scores.max(axis=1, keepdims=True)  # softmax is unchanged, exp cannot overflow
        log_softmax = shifted - self.xp.log(self.xp.exp(shifted).sum(axis=1, keepdims=True))
        self.probabilities = self.xp.exp(log_softmax)
        self.labels = labels
        return -log_softmax[self.xp.arange(len(labels)), labels].mean()

    def backward(self) -> Array:
        dscores = self.probabilities.copy()
        dscores[self.xp.arange(len(self.labels)), self.labels] -= 1
        return dscores / len(self.labels)


class Network:
    """Affine layers with ReLU and Dropout after each hidden one; softmax cross-entropy is the loss.

    Weights start by He et al. (2015), normal with variance ``2 / inputs``; biases start at zero.

    Parameters
    ----------
    sizes
        Width of each layer, inputs first and classes last.
    xp
        The array namespace, ``numpy`` or ``cupy``.
    seed
        Seed of the weights and the Dropout masks; the weights are drawn by NumPy, so that they are the same
        numbers on every backend.
    dropout_ratio
        Share of hidden values that a training step drops; 0 leaves the Dropout layers out.
    dtype
        ``"float32"`` or ``"float64"``.

    Examples
    --------
    >>> import numpy as np
    >>> network = Network((64, 32, 10), np, seed=0)
    >>> {key: value.shape for key, value in network.params.items()}
    {'W1': (64, 32), 'b1': (32,), 'W2': (32, 10), 'b2': (10,)}
    """

    def __init__(
        self,
        sizes: tuple[int, ...],
        xp: ModuleType = np,
        *,
        seed: int = 0,
        dropout_ratio: float = 0.0,
        dtype: str = "float32",
    ) -> None:
        self.params: dict[str, Array] = {}
        self.affines: list[Affine] = []
        self.layers: list[Affine | ReLU | xo.Dropout] = []
        self.loss_layer = SoftmaxCrossEntropy(xp)
        rng = np.random.default_rng(seed)
        for number, (inputs, outputs) in enumerate(pairwise(sizes), start=1):
            weights = rng.standard_normal((inputs, outputs)) * np.sqrt(2 / inputs)
            affine = Affine(xp.asarray(weights.astype(dtype)), xp.zeros(outputs, dtype=dtype))
            self.params[f"W{number}"], self.params[f"b{number}"] = affine.W, affine.b
            self.affines.append(affine)
            self.layers.append(affine)
            if number < len(sizes) - 1:
                self.layers.append(ReLU())
                if dropout_ratio > 0:
                    # Layers of one seed need a number each, or those of equal width would share their masks.
                    self.layers.append(xo.Dropout(dropout_ratio, seed=seed, layer=number))

    def predict(self, x: Array, train_flg: bool = False) -> Array:
        """Scores, one row per image and one column per class."""
        for layer in self.layers:
            x = layer.forward(x, train_flg)
        return x

    def loss(self, x: Array, labels: Array, train_flg: bool = False) -> Array:
        """Mean cross-entropy, a 0-d array."""
        return self.loss_layer.forward(self.predict(x, train_flg), labels)

    def accuracy(self, x: Array, labels: Array) -> float:
        """Share of images whose highest score is their label's."""
        return float((self.predict(x).argmax(axis=1) == labels).mean())

    def gradient(self, x: Array, labels: Array) -> dict[str, Array]:
        """Gradient of the training loss by every parameter, by backpropagation, under the parameters' keys."""
        self.loss(x, labels, train_flg=True)
        dout = self.loss_layer.backward()
        for layer in reversed(self.layers):
            dout = layer.backward(dout)
        grads = {}
        for number, affine in enumerate(self.affines, start=1):
            grads[f"W{number}"], grads[f"b{number}"] = affine.dW, affine.db
        return grads
