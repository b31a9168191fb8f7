"""Seeds that depend on each other in no visible way: of weights, order, augmentation, places."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *path: int | str) -> int:
    """A seed for one purpose of a run, in [0, 2**63): ``derive_seed(seed, "train", epoch)``.

    Neighbouring seeds and paths give unrelated streams, which ``seed + epoch`` would not.
    """
    text = "/".join(map(str, (seed, *path)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
