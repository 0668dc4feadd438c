"""What an error about an unknown name adds."""

from __future__ import annotations

from collections.abc import Iterable

# What other libraries call our hyperparameters, where the spelling does not tell; the first that is known counts.
_OURS = {
    "alpha": ("decay_rate", "lr"),  # RMSprop of torch and Chainer; Adam of its paper and of Chainer
    "b1": ("beta1",),
    "b2": ("beta2",),
    "clipnorm": ("clip_norm_each", "clip_norm"),
    "eta": ("lr",),
    "global_clipnorm": ("clip_norm",),
    "grad_clip": ("clip_norm",),
    "l2": ("weight_decay",),
    "learn_rate": ("lr",),
    "learning_rate": ("lr",),
    "max_norm": ("clip_norm",),
    "rho": ("decay_rate",),
    "step_size": ("lr",),
    "wd": ("weight_decay",),
}


def near(name: str, known: Iterable[str]) -> str:
    """The known name that was meant, as the end of a message; an empty string if none is alike.

    >>> near("beta_1", ["lr", "beta1", "beta2"]), near("learning_rate", ["lr", "eps"]), near("x", ["lr", "eps"])
    (" (did you mean 'beta1'?)", " (did you mean 'lr'?)", '')
    """
    import difflib  # only errors need it

    known, plain = list(known), name.lower()
    found = [ours for ours in _OURS.get(plain, ()) if ours in known] or difflib.get_close_matches(plain, known, n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
