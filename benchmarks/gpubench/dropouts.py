"""Who drops out: forward and backward of each, on one array."""

from __future__ import annotations

from typing import Any

import numpy as np

from .cases import Case
from .contenders import SAMPLE, Contender, Copy, Launch, as_torch, captured, random_array
from .machine import no_torch

RATIO, SEED = 0.5, 1


class Data:
    """What all contenders read: ``x``, or the gradient of what they gave."""

    def __init__(self, case: Case) -> None:
        self.start = [random_array(case.total, 0)]


class Dropout(Contender):
    """x is read and y written. A new y is made before the one before is given back, so there are two."""

    resident = 12
    backward = False
    scale = 1 / (1 - RATIO)
    y: Any

    def __init__(self, data: Data) -> None:
        (self.x,) = data.start

    def check(self) -> None:
        """About half of the elements are zero, the others twice what they were, or as they were in the book's way."""
        self.step()
        x, y = self.x[:SAMPLE].get(), self.head()
        kept = y != 0
        np.testing.assert_allclose(y[kept], self.scale * x[kept], rtol=1e-6)
        spread = (RATIO * (1 - RATIO) / x.size) ** 0.5
        assert abs(kept.mean() - (1 - RATIO)) < 5 * spread, f"{kept.mean():.0%} of the elements are kept"

    def head(self) -> np.ndarray:
        """The first elements of the result."""
        return self.y[:SAMPLE].get()


class Xpoptim(Dropout):
    """Draws the mask again in backward; the bits are those of NumPy arrays."""

    def __init__(self, data: Data) -> None:
        import xpoptim as xo

        super().__init__(data)
        self.drop = xo.Dropout(RATIO, inverted=True, seed=SEED)
        self.y = self.drop.forward(self.x)

    def step(self) -> None:
        self.y = self.drop.backward(self.x) if self.backward else self.drop.forward(self.x)

    def check(self) -> None:
        import xpoptim as xo

        self.step()
        head = self.x[:SAMPLE].get()
        expected = xo.dropout(head, RATIO, seed=SEED, stream=self.drop.call, inverted=True)  # layer 0
        np.testing.assert_array_equal(self.y[:SAMPLE].get(), expected)

    def graph(self, steps: int) -> Launch:
        """Into the same array, for a graph may not allocate."""
        run = self.drop.backward if self.backward else self.drop.forward
        return captured(lambda: run(self.x, out=self.y), steps)


class XpoptimBackward(Xpoptim):
    backward = True


class CupyCode(Dropout):
    """The book's layer: the mask is kept for backward, and nothing is scaled in training."""

    scale = 1.0

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.forward()

    def forward(self) -> None:
        import cupy

        self.mask = cupy.random.rand(*self.x.shape) > RATIO
        self.y = self.x * self.mask

    def step(self) -> None:
        if self.backward:
            self.y = self.x * self.mask
        else:
            self.forward()


class CupyCodeBackward(CupyCode):
    backward = True


class Torch(Dropout):
    """The fused kernels of ``torch.nn.Dropout``."""

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.tensor = as_torch(self.x)
        self.forward()

    def forward(self) -> None:
        import torch

        self.y, self.mask = torch.native_dropout(self.tensor, RATIO, True)

    def step(self) -> None:
        import torch

        if self.backward:
            given = {"grad_output": self.tensor, "mask": self.mask, "scale": 1 / (1 - RATIO)}
            self.y = torch.ops.aten.native_dropout_backward(**given)
        else:
            self.forward()

    def head(self) -> np.ndarray:
        return self.y[:SAMPLE].cpu().numpy()

    @classmethod
    def missing(cls) -> str:
        return no_torch()


class TorchBackward(Torch):
    backward = True


CONTENDERS: dict[str, type[Any]] = {
    "xpoptim, forward": Xpoptim,
    "xpoptim, backward": XpoptimBackward,
    "torch, forward": Torch,
    "torch, backward": TorchBackward,
    "CuPy code, forward": CupyCode,
    "CuPy code, backward": CupyCodeBackward,
    "copy": Copy,
}
