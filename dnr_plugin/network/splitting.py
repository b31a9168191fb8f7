"""`split_attention`: puts attention whose projections are layers of their own in the place of a model's own."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dnr_plugin.errors import InputError
from dnr_plugin.network.attention import (
    AttentionCore,
    AttentionScores,
    SplitAttention,
    SplitMultihead,
    SplitTokens,
    split_modules,
)
from dnr_plugin.network.calling import (
    batch_inputs,
    call,
    eager,
    eval_outputs,
    kept_modes,
    output_difference,
    tensors,
)
from dnr_plugin.network.window_attention import (
    CosineWindowCore,
    RelativeCore,
    SplitPartitions,
    SplitWindows,
    WindowCore,
)

# What a linear layer for query, key and value, the one behind the heads, and the number of heads are called.
_NAMES = (("qkv", "proj", "num_heads"), ("to_qkv", "merge", "n_heads"))
_TOLERANCE, _TOLERANCE_16_BITS = 1e-4, 0.05  # of an attention's largest output


def _linears(weight: Tensor, bias: Tensor | None) -> list[nn.Linear]:
    """Query, key and value of a joint matrix [3 * out, in]."""
    linears = []
    for number, part in enumerate(weight.detach().chunk(3)):
        linear = nn.Linear(part.shape[1], part.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(part.clone(), requires_grad=weight.requires_grad)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().chunk(3)[number].clone(), requires_grad=bias.requires_grad)
        linears.append(linear)
    return linears


def _of_multihead(module: nn.MultiheadAttention) -> SplitAttention:
    if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
        raise ValueError("its query, key and value are not of one width, or it adds keys of its own")
    out = nn.Linear(module.embed_dim, module.embed_dim, bias=module.out_proj.bias is not None, device="meta")
    out.weight, out.bias = module.out_proj.weight, module.out_proj.bias
    core = AttentionCore(module.embed_dim, module.num_heads, module.head_dim**-0.5, module.dropout)
    return SplitMultihead(
        *_linears(module.in_proj_weight, module.in_proj_bias), out, core, batch_first=module.batch_first
    )


def _joint(module: Any) -> tuple[nn.Linear, nn.Linear, int] | None:
    """The linear layers and the heads of attention with a joint projection, or None of anything else."""
    for names in _NAMES:
        joint, out, heads = (getattr(module, name, None) for name in names)
        if isinstance(joint, nn.Linear) and isinstance(out, nn.Linear) and isinstance(heads, int):
            return joint, out, heads
    return None


def _of_joint(module: Any) -> SplitAttention:
    """Of what has no weights but those of its linear layers, or of the relative positions of torchvision's networks."""
    layers = _joint(module)
    assert layers is not None, "asked of attention alone"
    joint, out, heads = layers
    query, key, value = _linears(joint.weight, joint.bias)
    channels, own = query.out_features, {*joint.parameters(), *out.parameters()}
    scale = (channels // heads) ** -0.5
    others = {name for name, parameter in module.named_parameters() if parameter not in own}
    if not others:
        core = AttentionCore(channels, heads, float(getattr(module, "scale", scale)), _rate(module, "attn_drop"))
        return SplitTokens(query, key, value, out, core, out_dropout=_rate(module, "proj_drop"))
    if others == {"relative_position_bias_table"} and hasattr(module, "scale_factor"):  # MaxViT
        core = RelativeCore(
            channels, heads, module.scale_factor, 0.0, {"table": (module.relative_position_bias_table, 1)},
            pairs=module.relative_position_index,
        )  # fmt: skip
        return SplitPartitions(query, key, value, out, core)
    windowed = hasattr(module, "shift_size") and hasattr(module, "attention_dropout")
    if others == {"relative_position_bias_table"} and windowed:
        core = WindowCore(
            channels, heads, scale, module.attention_dropout, {"table": (module.relative_position_bias_table, 1)},
            **_windows(module),
        )  # fmt: skip
    elif others == {"logit_scale", "cpb_mlp.0.weight", "cpb_mlp.0.bias", "cpb_mlp.2.weight"} and windowed:  # Swin V2
        key.register_parameter("bias", None)  # which counts as zero whatever it is, and does not train
        core = CosineWindowCore(
            channels, heads, 1.0, module.attention_dropout,
            {"log_scale": (module.logit_scale, 0), "positions": (module.cpb_mlp[2].weight, 0)},
            hidden=module.cpb_mlp[0], offsets=module.relative_coords_table, **_windows(module),
        )  # fmt: skip
    else:
        raise ValueError("it has other weights than those of its projections and of relative positions")
    return SplitWindows(query, key, value, out, core, out_dropout=module.dropout)


def _windows(module: Any) -> dict[str, Any]:
    return {"pairs": module.relative_position_index, "window": module.window_size, "shift": module.shift_size}


def _rate(module: nn.Module, name: str) -> float:
    dropout = getattr(module, name, None)
    return float(dropout.p) if isinstance(dropout, nn.Dropout) else 0.0


def _split(module: nn.Module) -> SplitAttention:
    """A `SplitAttention` that should do the same.

    Raises:
        ValueError: it cannot, with the reason.
    """
    if any(module._forward_hooks) or any(module._forward_pre_hooks):
        raise ValueError("hooks hang on it")
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    if any("weight" not in linear._parameters for linear in linears):
        raise ValueError("a weight of it is computed when it runs")
    return (_of_multihead(module) if isinstance(module, nn.MultiheadAttention) else _of_joint(module)).train(
        module.training
    )


def _is_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) or _joint(module) is not None


def split_attention(model: nn.Module, example_inputs: Any, images: Any = None) -> dict[str, str]:
    """Lets a model's attention lose heads, and channels of query and key: a layer for each projection, in its place.

    Outputs stay what they are, which is checked for every attention; what gives others stays as it was. Parameters are
    new ones: to be called before an optimizer is made of them. Handled are ``nn.MultiheadAttention``, modules with
    linear layers ``qkv`` and ``proj`` (timm, DeiT and others), torchvision's Swin, with the cosine attention of its
    second version, and its MaxViT.

    Args:
        model: changed in place.
        example_inputs: as Torch-Pruning takes them.
        images: batches like those of training, by which channels of query and key are put into the order in which they
            count (see the module); by the weights alone where there are none.

    Returns:
        Attention that was left as it was -> why.

    Raises:
        InputError: the model has no attention of these kinds, or all of it was left; images do not fit, or in the order
            that they suggest outputs would be others. The model is as it was then.
    """
    model = eager(model)
    found = {name: module for name, module in model.named_modules() if _is_attention(module)}
    splits, left = _splits(model, example_inputs, found)
    if not splits:
        reasons = "".join(f"; {name}: {reason}" for name, reason in [*left.items()][:3])
        raise InputError(f"model: expected attention that can be split, found {'none' if not found else reasons[2:]}")
    before = eval_outputs(model, example_inputs)
    for name, split in splits.items():
        _replace(model, found[name], split)
    try:
        _order_channels(model, example_inputs, images)
        difference = output_difference(before, eval_outputs(model, example_inputs))[1]
        if difference > 10 * _tolerance(before):
            raise InputError(
                f"model: expected the outputs to stay what they are, found a difference of {difference:.1g}"
            )
    except BaseException:
        for name, split in splits.items():
            _replace(model, split, found[name])
        raise
    return left


def _splits(
    model: nn.Module, example_inputs: Any, found: Mapping[str, nn.Module]
) -> tuple[dict[str, SplitAttention], dict[str, str]]:
    """What can stand in for a model's attention, and why nothing can for the rest."""
    splits, left = dict[str, SplitAttention](), dict[str, str]()
    owners = Counter(p for module in model.modules() for p in {*module.parameters(recurse=False)})
    for name, module in found.items():
        if any(owners[parameter] > 1 for parameter in module.parameters()):
            left[name] = "it shares a parameter with another layer"
            continue
        try:
            splits[name] = _split(module)
        except (ValueError, AttributeError) as error:
            left[name] = str(error)
    calls: dict[nn.Module, tuple[Any, Any, Any]] = {}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls[module] = args, kwargs, output

    with contextlib.ExitStack() as hooks, kept_modes(model), torch.enable_grad():  # without, torch takes other ways
        model.eval()
        for name in splits:
            hooks.callback(found[name].register_forward_hook(note, with_kwargs=True).remove)
        call(model, example_inputs)
    for name, split in splits.items():
        reason = _unlike(split, calls.get(found[name]))
        if reason is not None:
            left[name] = reason
    return {name: split for name, split in splits.items() if name not in left}, left


def _tolerance(outputs: Sequence[Tensor]) -> float:
    return _TOLERANCE if all(a.element_size() > 2 for a in outputs) else _TOLERANCE_16_BITS


@torch.no_grad()
def _unlike(split: SplitAttention, known: tuple[Any, Any, Any] | None) -> str | None:
    """Why a `SplitAttention` cannot stand in for what was called, or None."""
    if known is None:
        return "it is not called in eval mode"
    args, kwargs, output = known
    try:
        with kept_modes(split):
            given = split.eval()(*args, **kwargs)
    except Exception as error:  # whatever it is called with
        return f"it is called otherwise than expected: {type(error).__name__}: {error}".split("\n")[0]
    expected = [*tensors(output)]
    if output_difference(expected, [*tensors(given)])[1] > _tolerance(expected):
        return "it computes something else than scaled dot products of query and key"
    return None


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Under every name."""
    for parent in [*model.modules()]:
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def split_named(model: nn.Module, names: Sequence[str]) -> None:
    """Splits attention by name, whatever it computes: for a model whose weights are loaded later.

    Raises:
        ValueError: there is none of this name that can be split.
    """
    modules = dict(model.named_modules())
    for name in names:
        module = modules.get(name)
        if module is None or not _is_attention(module):
            raise ValueError(f"{name!r} is no attention that can be split")
        _replace(model, module, _split(module))


@torch.no_grad()
def _order_channels(model: nn.Module, example: Any, images: Any) -> None:
    """Rotates query and key of all split attention by what they give on some images, or by their weights."""
    splits = split_modules(model)
    sums: dict[AttentionScores, tuple[Tensor, Tensor]] = {}

    def add(scores: AttentionScores, query: Tensor, key: Tensor) -> None:
        key = key - key.mean(1, keepdim=True) if scores.centered else key
        moments = [_moments(scores, a) for a in (query, key)]
        before = sums.get(scores)
        sums[scores] = (moments[0], moments[1]) if before is None else (before[0] + moments[0], before[1] + moments[1])

    if images is None:
        for attention in splits.values():
            scores = attention.core.scores
            query, key = scores(attention.query.weight.T[None], attention.key.weight.T[None])
            sums[scores] = _moments(scores, query), _moments(scores, key)
    else:
        with contextlib.ExitStack() as hooks, kept_modes(model):
            model.eval()
            for attention in splits.values():
                handle = attention.core.scores.register_forward_hook(lambda module, _, output: add(module, *output))
                hooks.callback(handle.remove)
            for batch in [images] if isinstance(images, Tensor | dict) else images:
                call(model, batch_inputs(batch, example))
    for name, attention in splits.items():
        moments = sums.get(attention.core.scores)
        if moments is None or not all(bool(a.isfinite().all()) for a in moments):
            raise InputError(f"images: expected batches on which {name} gives finite queries and keys")
        attention.rotate(*moments)


def _moments(scores: AttentionScores, a: Tensor) -> Tensor:
    """Second moments of each head, float64, shape [heads, width, width]."""
    by_head = scores.by_head(a).transpose(0, 1).flatten(1, 2).double()
    return by_head.mT @ by_head
