"""Whether a criterion is asked for a penalty on weights, not for what to remove.

Torch-Pruning's pruners for sparse training (`GroupNormPruner`, `GrowingRegPruner`) ask the criterion twice: in
``regularize`` and ``update_reg``, for every group, the classifier's included, and in ``step``. They tell it nothing of
which it is; but None, which in ``step`` leaves a group alone, is an error in ``regularize``, where NaN does so.
"""

from __future__ import annotations

import sys

import torch_pruning as tp

_PENALTIES = ("regularize", "update_reg")
_DEEPEST = 8  # calls between a pruner's method and the criterion: estimate_importance, and torch's decorators


def for_a_penalty() -> bool:
    """Whether one of Torch-Pruning's pruners asks, on the way to a penalty on weights."""
    frame = sys._getframe(1)
    for _ in range(_DEEPEST):
        if frame.f_back is None:
            return False
        frame = frame.f_back
        if isinstance(frame.f_locals.get("self"), tp.pruner.BasePruner):
            if frame.f_code.co_name in _PENALTIES:
                return True
            if frame.f_code.co_name != "estimate_importance":
                return False
    return False
