"""Builders: sizes and names as published, every bad input named, checkpoints without code, rebuild round trip."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dnr_plugin.errors import InputError
from dnr_plugin.models.build import build_model, rebuild
from dnr_plugin.models.options import check_model, model_names
from dnr_plugin.models.state_dicts import load_checkpoint
from dnr_plugin.recipe.sections import ModelOptions

ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "silu": nn.SiLU, "gelu": nn.GELU}


def build(name: str, num_classes: int = 10, in_channels: int = 3, image_size: int = 32, **options: Any) -> nn.Module:
    return build_model(ModelOptions(name=name, **options), num_classes, in_channels, image_size)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def problems(function: Any, *args: Any, **kwargs: Any) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    assert all("\n" not in line for line in caught.value.problems)
    return caught.value.problems


def problem(function: Any, *args: Any, **kwargs: Any) -> str:
    (line,) = problems(function, *args, **kwargs)
    return line


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 11_173_962),
        ("resnet20", 272_474),
        ("resnet56", 855_770),
        ("vgg16_bn", 14_728_266),
        ("mlp", 3072 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10),
    ],
)
def test_builtin_has_the_published_parameter_count(name: str, count: int) -> None:
    model = build(name)
    assert parameters(model) == count
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_resnet18_is_torchvisions() -> None:
    torchvision = pytest.importorskip("torchvision")
    reference = torchvision.models.resnet18(weights=None).eval()
    model = build("resnet18", 1000, image_size=224, stem="imagenet", width=64).eval()
    model.load_state_dict(reference.state_dict())
    assert list(model.state_dict()) == list(reference.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images), reference(images))


def test_resnet20_widths_and_shortcuts() -> None:
    model = build("resnet20")
    assert [model.get_submodule(f"layer{i}.2.conv2").out_channels for i in (1, 2, 3)] == [16, 32, 64]
    assert model.get_submodule("layer1.0").downsample is None
    assert model.get_submodule("layer2.0.downsample.0").kernel_size == (1, 1)
    assert build("resnet20", width=5).get_submodule("layer3.0.conv1").out_channels == 20


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "vgg16_bn", "mlp"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_is_used_in_every_place(name: str, activation: str) -> None:
    width = {} if name == "mlp" else {"width": 2}
    model = build(name, activation=activation, **width)
    found = [type(m) for m in model.modules() if type(m) in ACTIVATIONS.values()]
    places = {"resnet18": 1 + 2 * 8, "resnet20": 1 + 2 * 9, "vgg16_bn": 13, "mlp": 2}
    assert found == [ACTIVATIONS[activation]] * places[name]
    called = []
    for module in model.modules():
        if type(module) in ACTIVATIONS.values():
            module.register_forward_hook(lambda m, i, o: called.append(m))
    model.eval()(torch.zeros(1, 3, 32, 32))
    assert len(called) == len(set(called)) == places[name]


def test_the_slope_reaches_built_in_and_other_networks() -> None:
    for name in ("resnet18", "vgg16_bn", "mlp", "torchvision.squeezenet1_1"):
        width = {} if name in ("mlp", "torchvision.squeezenet1_1") else {"width": 2}
        for given, slope in ((None, 0.01), (0.0, 0.0), (0.3, 0.3)):
            model = build(name, activation="leaky_relu", negative_slope=given, **width)
            assert {m.negative_slope for m in model.modules() if isinstance(m, nn.LeakyReLU)} == {slope}
            assert not [m for m in model.modules() if isinstance(m, nn.ReLU)]


def test_options_reach_the_network() -> None:
    assert build("vgg16_bn", width=4).classifier.in_features == 32
    assert build("resnet18", width=3).fc.in_features == 24
    assert [m.out_features for m in build("mlp", hidden=[7]).children() if isinstance(m, nn.Linear)] == [7, 10]
    grey = build("mlp", in_channels=1, image_size=28)
    assert grey.eval()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert build("resnet18", width=2, in_channels=1).conv1.in_channels == 1
    assert build("resnet18", width=2, stem="imagenet").conv1.stride == (2, 2)
    assert build("resnet20", width=2, num_classes=10).fc.out_features == 10
    assert build_model(ModelOptions(name="resnet20", width=2, num_classes=12), 10).fc.out_features == 12


def test_convolutions_are_kaiming_initialised() -> None:
    torch.manual_seed(0)
    weight = build("resnet18").get_submodule("layer4.0.conv1").weight  # 256 -> 512: fan-in and fan-out differ
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_0"])
def test_torchvision_model(name: str) -> None:
    model = build(f"torchvision.{name}", 7)
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_left_out_without_a_warning(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build(f"torchvision.{name}")
    assert not [key for key in model.state_dict() if key.lower().startswith("aux")]
    with_heads = build(f"torchvision.{name}", kwargs={"aux_logits": True})
    assert [key for key in with_heads.state_dict() if key.lower().startswith("aux")]


def test_torchvision_kwargs_arrive() -> None:
    assert build("torchvision.mobilenet_v2", kwargs={"width_mult": 0.25}).last_channel == 1280
    assert build("torchvision.mobilenet_v2", kwargs={"dropout": 0.5}).classifier[0].p == 0.5
    check_model(ModelOptions(name="torchvision.vgg11", kwargs={"dropout": 0.1}))
    check_model(ModelOptions(name="torchvision.regnet_y_400mf", kwargs={"norm_layer": None}))


def test_model_names_are_all_accepted() -> None:
    names = model_names()
    assert names[:2] == ["resnet18", "resnet20"] and "torchvision.resnet50" in names
    assert not [name for name in names if "rcnn" in name or "fcn" in name or "raft" in name]
    for name in names:
        check_model(ModelOptions(name=name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "resnet19"},
            "torchvision.NAME or module:function, found 'resnet19'; did you mean 'resnet18'?",
        ),
        (
            {"name": "resnet19"},
            "model.name: expected one of resnet18, resnet20, resnet56, vgg16_bn, mlp, torchvision.NAME",
        ),
        ({"name": "resnet50"}, "found 'resnet50'; did you mean 'torchvision.resnet50'?"),
        ({"name": "torchvision.resnet5"}, "torchvision.vit_b_16, "),
        ({"name": "torchvision.resnet5"}, "found 'torchvision.resnet5'; did you mean 'torchvision.resnet50'?"),
        ({"name": "torchvision.raft_large"}, "found 'torchvision.raft_large'"),
        (
            {"name": "torchvision.resnet50", "width": 16},
            "model.width: expected nothing for torchvision.resnet50, which has no such option, found 16",
        ),
        (
            {"name": "torchvision.resnet50", "negative_slope": 0.2},
            "model.negative_slope: expected nothing with no activation leaky_relu, found 0.2",
        ),
        (
            {"name": "mlp", "activation": "relu", "negative_slope": 0.0},
            "model.negative_slope: expected nothing with activation relu, found 0",
        ),
        (
            {"name": "resnet18", "hidden": [3]},
            "model.hidden: expected nothing for resnet18, which has no such option, found [3]",
        ),
        (
            {"name": "vgg16_bn", "stem": "cifar"},
            "model.stem: expected nothing for vgg16_bn, which has no such option, found cifar",
        ),
        ({"name": "resnet20", "stem": "imagenet"}, "model.stem: expected nothing for resnet20"),
        ({"name": "mlp", "width": 3}, "model.width: expected nothing for mlp"),
        ({"name": "torch.nn:Identity", "width": 3}, "model.width: expected nothing for torch.nn:Identity"),
        ({"name": "mlp", "kwargs": {"a": 1}}, "model.kwargs: expected nothing for mlp, found {'a': 1}"),
        (
            {"name": "torchvision.resnet50", "kwargs": {"weights": "DEFAULT"}},
            "model.kwargs.weights: expected model.checkpoint instead of it, found 'DEFAULT'",
        ),
        (
            {"name": "torchvision.resnet50", "kwargs": {"num_classes": 3}},
            "model.kwargs.num_classes: expected model.num_classes instead of it, found 3",
        ),
        (
            {"name": "torchvision.resnet50", "kwargs": {"norm_layer": nn.BatchNorm2d}},
            "model.kwargs: expected plain values (numbers, strings, lists, mappings): ",
        ),
        (
            {"name": "torchvision.resnet50", "kwargs": {"colour": 1}},
            "model.kwargs: torchvision.resnet50 refuses {'colour': 1}: ResNet.__init__() got an unexpected",
        ),
        (
            {"name": "resnet18", "checkpoint": "no/such.pt"},
            "model.checkpoint: expected a file, found nothing at no/such",
        ),
        ({"name": "resnet18", "checkpoint": "/"}, "model.checkpoint: expected a file, found the folder /"),
    ],
)
def test_bad_options_are_refused_before_building(options: dict[str, Any], message: str) -> None:
    assert message in problem(check_model, ModelOptions(**options))
    assert message in problem(build_model, ModelOptions(**options), 10)


def test_every_problem_gets_a_line() -> None:
    lines = problems(check_model, ModelOptions(name="mlp", width=3, stem="cifar", checkpoint="none.pt"))
    assert [line.split(":")[0] for line in lines] == ["model.width", "model.stem", "model.checkpoint"]


def test_sizes_that_do_not_fit_are_refused() -> None:
    assert problem(build, "vgg16_bn", image_size=28) == (
        "model.name: expected images of at least 32 pixels a side for vgg16_bn, found 28"
    )
    assert problem(build, "torchvision.resnet18", in_channels=1) == (
        "model.name: expected images of 3 channels for torchvision.resnet18, found 1"
    )
    assert problem(build_model, ModelOptions(name="mlp", num_classes=5), 10) == (
        "model.num_classes: expected at least 10, the classes of the data, found 5"
    )


USER = """
from torch import nn
def plain(): return nn.Linear(3, 4)
def net(num_classes, hidden=5): return nn.Sequential(nn.Linear(3, hidden), nn.Linear(hidden, num_classes))
def anything(**kwargs): return nn.Linear(3, kwargs["num_classes"])
def number(): return 3
def broken(): raise OSError("first\\nsecond")
value = 3
"""


def test_user_builder(here: Path) -> None:
    (here / "mine.py").write_text(USER)
    path = list(sys.path)
    assert build("mine:plain").out_features == 4
    assert build("mine:net", 7, kwargs={"hidden": 9})[1].weight.shape == (7, 9)
    assert build("mine:anything", 7).out_features == 7
    assert sys.path == path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mine:"}, "model.name: expected module:function, found 'mine:'"),
        ({"name": "absent:f"}, "model.name: no module 'absent' on the Python path or in "),
        ({"name": "mine:nte"}, "model.name: expected a function 'nte' in mine, found plain, net, anything"),
        ({"name": "mine:nte"}, "; did you mean 'net'?"),
        ({"name": "mine:value"}, "model.name: expected a function 'value' in mine"),
        ({"name": "bad:f"}, "model.name: importing bad raised ModuleNotFoundError: No module named 'nowhere'"),
        ({"name": "wrong:f"}, "model.name: importing wrong raised SyntaxError"),
        ({"name": "mine:net", "kwargs": {"size": 1}}, "refuses {'size': 1}: got an unexpected keyword argument 'size'"),
        (
            {"name": "mine:plain", "num_classes": 10},
            "model.num_classes: expected nothing for mine:plain, which takes no",
        ),
    ],
)
def test_bad_user_builder_is_refused_without_calling_it(here: Path, options: dict[str, Any], message: str) -> None:
    (here / "mine.py").write_text(USER)
    (here / "bad.py").write_text("import nowhere")
    (here / "wrong.py").write_text("def f(:")
    assert message in problem(check_model, ModelOptions(**options))
    assert message in problem(build_model, ModelOptions(**options), 10)


def test_user_builder_that_fails(here: Path) -> None:
    (here / "mine.py").write_text(USER)
    assert problem(build, "mine:broken") == "model.name: mine:broken raised OSError: first"
    assert problem(build, "mine:number") == "model.name: expected a torch.nn.Module from mine:number, it returned 3"


@pytest.mark.parametrize("form", ["bare", "state_dict", "model", "net", "module.", "safetensors"])
def test_checkpoint_is_loaded(tmp_path: Path, form: str) -> None:
    torch.manual_seed(0)
    source = build("resnet20", width=2)
    state: Any = source.state_dict()
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pt")
    if form == "safetensors":
        save_file(state, path)
    else:
        if form == "module.":
            state = {f"module.{key}": value for key, value in state.items()}
        elif form != "bare":
            state = {form: state, "epoch": 3}
        torch.save(state, path)
    model = build("resnet20", width=2, checkpoint=str(path))
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values(), strict=True)
    )


def test_checkpoint_without_batch_counts_is_loaded(tmp_path: Path) -> None:
    state = {k: v + 1 for k, v in build("resnet20", width=2).state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "old.pt")
    model = build("resnet20", width=2)
    load_checkpoint(model, tmp_path / "old.pt")
    assert torch.equal(model.state_dict()["fc.bias"], state["fc.bias"])


def test_checkpoint_that_does_not_fit_names_its_keys_and_changes_nothing(tmp_path: Path) -> None:
    model = build("mlp", hidden=[4, 4, 4], image_size=8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: value + 1 for key, value in model.state_dict().items()}
    del state["1.weight"]
    state |= {f"extra{i}": torch.zeros(1) for i in range(6)}
    state["7.bias"] = torch.zeros(3)
    path = tmp_path / "other.pt"
    torch.save(state, path)
    assert problems(load_checkpoint, model, path) == (
        f"model.checkpoint: {path}: 1 of 8 keys of the model are missing: 1.weight",
        f"model.checkpoint: {path}: 6 of 13 keys in the file are unexpected: "
        "extra0, extra1, extra2, extra3, extra4, ...",
        f"model.checkpoint: {path}: 1 of 8 shapes differ: 7.bias expected [10] found [3]",
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Malicious:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def test_checkpoint_that_needs_code_is_refused_and_not_run(here: Path) -> None:
    for path in (here / "zip.pt", here / "raw.pt"):
        if path.name == "zip.pt":
            torch.save({"state_dict": Malicious()}, path)
        else:
            path.write_bytes(pickle.dumps(Malicious(), protocol=2))
        line = problem(load_checkpoint, nn.Linear(1, 1), path)
        assert f"{path}: expected tensors only, found a pickle that needs code (" in line and "which is not run" in line
    assert not (here / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"hello world", b"PK\x03\x04 and no more", b"\x80\x02"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_checkpoint_is_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(content)
    assert "the file is damaged" in problem(load_checkpoint, nn.Linear(1, 1), path)


def test_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(100, 100)}, tmp_path / "whole.pt")
    (tmp_path / "part.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:5000])
    assert "the file is damaged" in problem(load_checkpoint, nn.Linear(1, 1), tmp_path / "part.pt")


@pytest.mark.parametrize(
    ("content", "found"),
    [([1, 2], "a list"), ({"epoch": 3}, "a dict with epoch"), ({}, "a dict with nothing"), (torch.ones(1), "a Tensor")],
)
def test_checkpoint_that_holds_no_state_dict_is_refused(tmp_path: Path, content: Any, found: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    line = problem(load_checkpoint, nn.Linear(1, 1), tmp_path / "a.pt")
    assert "expected a state_dict, or a dict with one under state_dict, model or net" in line and line.endswith(found)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "resnet18", "width": 4, "stem": "imagenet", "activation": "silu"},
        {"name": "resnet56", "width": 3},
        {"name": "vgg16_bn", "width": 2, "num_classes": 12},
        {"name": "mlp", "hidden": [5]},
        {"name": "torchvision.mobilenet_v2", "kwargs": {"width_mult": 0.25}},
        {"name": "torchvision.googlenet"},
        {"name": "torchvision.googlenet", "activation": "leaky_relu", "negative_slope": 0.2},
        {"name": "resnet20", "width": 2, "activation": "leaky_relu", "negative_slope": 0.2},
    ],
)
def test_rebuild_gives_the_same_architecture(options: dict[str, Any]) -> None:
    builtin = not options["name"].startswith("torchvision.")
    model = build_model(ModelOptions(**options), 10, 1 if builtin else 3, 40)
    spec = json.loads(json.dumps(model.dnr_builder))
    again = rebuild(spec)
    assert str(again) == str(model) and again.dnr_builder == spec
    again.load_state_dict(model.state_dict())
    images = torch.randn(2, 1 if builtin else 3, 40, 40)
    assert torch.equal(again.eval()(images), model.eval()(images))


def test_rebuild_runs_user_code_only_when_allowed(here: Path) -> None:
    (here / "mine.py").write_text(USER)
    spec = build("mine:net", 7, kwargs={"hidden": 9}).dnr_builder
    assert spec == {"name": "mine:net", "kwargs": {"hidden": 9, "num_classes": 7}}
    (here / "loud.py").write_text("open('ran', 'w')")
    assert (
        "architecture: loud:f is a function outside this package and would run its code; pass allow_import=True"
        in problem(rebuild, {"name": "loud:f", "kwargs": {}})
    )
    assert not (here / "ran").exists()
    again = rebuild(spec, allow_import=True)
    assert again[1].weight.shape == (7, 9) and again.dnr_builder == spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "architecture: expected a name and a mapping of kwargs, found {}"),
        (
            {"name": "resnet18", "kwargs": {}},
            "architecture: expected a num_classes and sizes from 1 to 1000000, found {}",
        ),
        ({"name": "resnet18", "kwargs": {"num_classes": True}}, "expected a num_classes and sizes from 1 to 1000000"),
        ({"name": "resnet18", "kwargs": {"num_classes": 2, "wdth": 3}}, "architecture: resnet18 has no argument wdth"),
        ({"name": "resnet18", "kwargs": {"num_classes": 2, "checkpoint": "a"}}, "has no argument checkpoint"),
        (
            {"name": "resnet18", "kwargs": {"num_classes": 2, "width": "3"}},
            "architecture: width: Input should be a valid",
        ),
        (
            {"name": "resnet18", "kwargs": {"num_classes": 2, "stem": "x"}},
            "architecture: stem: Input should be 'cifar'",
        ),
        ({"name": "os.system", "kwargs": {"num_classes": 2}}, "found 'os.system'"),
        ({"name": "torchvision.resnet18", "kwargs": {"num_classes": 2, "weights": "DEFAULT"}}, "model.kwargs.weights"),
    ],
)
def test_rebuild_refuses_malformed_specs(spec: dict[str, Any], message: str) -> None:
    assert message in problem(rebuild, spec)


def test_import_is_light() -> None:
    code = "import sys, dnr_plugin.models, dnr_plugin.data; print(sorted({'torchvision', 'PIL'} & set(sys.modules)))"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert re.fullmatch(r"\[\]\s*", done.stdout)
