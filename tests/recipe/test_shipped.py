"""The shipped recipes: each loads, explains itself, and passes `dnr check` and `dnr plan` on data of its format."""

from __future__ import annotations

import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import BaseModel

from dnr_plugin.cli.main import main
from dnr_plugin.recipe.load import load_recipe, shipped_recipes
from dnr_plugin.recipe.schema import Recipe

pytestmark = pytest.mark.usefixtures("read_once")
SHIPPED = shipped_recipes()
NAMES = pytest.mark.parametrize("name", SHIPPED)
# What is said for its own sake: it has no default from which it could depart.
UNCOMMENTED = ("name", "description", "model.name", "data.name")


def commands(name: str) -> list[list[str]]:
    """The `dnr` commands in the comments at the top of a recipe, in words."""
    head = SHIPPED[name].read_text().partition("\nname:")[0]
    return [
        shlex.split(line.removeprefix("#"))[1:] for line in head.splitlines() if line.startswith(("#   dnr ", "# dnr "))
    ]


def values(words: list[str], option: str) -> list[str]:
    return [after for word, after in pairwise(words) if word == option]


def varied(words: list[str]) -> list[list[str]]:
    """The overrides of each run of a `dnr sweep`."""
    (option,) = values(words, "--vary")
    dotted, _, found = option.partition("=")
    return [[*values(words, "--set"), f"{dotted}={value}"] for value in found.split(",")]


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in MNIST's format and of its size."""
    root = tmp_path_factory.mktemp("mnist")
    (root / "MNIST" / "raw").mkdir(parents=True)
    random = np.random.default_rng(0)
    for split, count in (("train", 60_000), ("t10k", 10_000)):
        for kind, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            header = np.array([0x0800 + len(shape), *shape], dtype=">u4").tobytes()
            content = random.integers(256 if len(shape) > 1 else 10, size=shape, dtype=np.uint8)
            (root / "MNIST" / "raw" / f"{split}-{kind}-ubyte").write_bytes(header + content.tobytes())
    return root


@pytest.fixture(scope="module")
def imagefolder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of noise, four training and two validation images each, in the layout of ImageNet."""
    image = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("imagefolder")
    random = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for label in range(10):
            folder = root / split / f"n{label:08}"
            folder.mkdir(parents=True)
            for n in range(count):
                pixels = random.integers(256, size=(64, 64, 3), dtype=np.uint8)
                image.fromarray(pixels).save(folder / f"{n}.JPEG")
    return root


def root_of(name: str, request: pytest.FixtureRequest) -> list[str]:
    """The override that leads a recipe to data of its format."""
    kind = load_recipe(SHIPPED[name]).data.name
    return [] if kind == "shapes" else ["--set", f"data.root={request.getfixturevalue(kind)}"]


def small(name: str) -> list[str]:
    """Overrides that make a plan a matter of a second: a narrow network, few images."""
    recipe = load_recipe(SHIPPED[name])
    few = ["train.batch_size=16", "prune.observe={samples: 40, min_samples: 32}"]
    if recipe.finetune.epochs:
        few.append("finetune.batch_size=16")
    if recipe.model.width is not None:
        few.append("model.width=8")
    if recipe.data.name == "imagefolder":
        few += ["data.image_size=64", "data.workers=0"]
    else:
        few += ["data.train_size=64", "data.test_size=32"]
    if recipe.model.name == "torchvision.resnet50":
        few.append("model.kwargs={width_per_group: 8}")
    return [word for override in few for word in ("--set", override)]


def test_they_are_listed_by_name_and_described() -> None:
    recipes = {name: load_recipe(path) for name, path in SHIPPED.items()}
    assert next(iter(SHIPPED)) == "quickstart" and "cifar10/resnet18-flops50" in SHIPPED
    assert [recipe.name for recipe in recipes.values()] == [name.replace("/", "-") for name in SHIPPED]
    for name, recipe in recipes.items():
        assert 20 < len(recipe.description) < 85, f"{name}: one line of the list"
        assert SHIPPED[name].read_text().startswith("# ")


@NAMES
def test_every_value_that_is_not_the_default_is_explained(name: str) -> None:
    text = SHIPPED[name].read_text()
    lines = text.splitlines()
    explained: dict[str, Any] = {}

    def walk(section: BaseModel, node: yaml.MappingNode, path: str) -> None:
        for key, value in node.value:
            dotted, found = f"{path}{key.value}", getattr(section, key.value)
            if isinstance(value, yaml.MappingNode) and isinstance(found, BaseModel):
                walk(found, value, f"{dotted}.")
                continue
            # What fine-tuning repeats from the training was explained there.
            stage, _, rest = dotted.partition(".")
            if dotted in UNCOMMENTED or (stage == "finetune" and explained.get(f"train.{rest}", ...) == found):
                continue
            explained[dotted] = found
            field = type(section).model_fields[key.value]
            if field.is_required() or found != field.default:
                assert "# " in lines[value.start_mark.line], f"{dotted}: {found} without a comment"

    walk(load_recipe(SHIPPED[name]), yaml.compose(text), "")


@NAMES
def test_commands_in_the_comments_are_valid(name: str) -> None:
    found = commands(name)
    runs = [values(words, "--set") for words in found if words[0] == "run"]
    sweeps = [words for words in found if words[0] == "sweep"]
    assert len(found) == len(runs) + len(sweeps) and runs
    # The last one is the small one. A checkpoint is not there to be loaded.
    recipes = [load_recipe(SHIPPED[name], overrides) for overrides in runs]
    assert recipes[-1].model.width is None or recipes[-1].model.width <= 16
    assert recipes[-1].data.train_size is not None and recipes[-1].data.train_size <= 20_000
    # Neither recipe nor command needs to know what is fast on a machine; the quickstart is to show the same everywhere.
    asked = {options.amp for recipe in recipes for options in (recipe.train, recipe.finetune)}
    assert asked == ({False} if name == "quickstart" else {"auto"})
    for words in found:
        assert words[1] == f"recipes/{name}.yaml"
        known = ("--set", "--vary", "--output")
        assert all(word in known for word in words[2::2]) and len(words) % 2 == 0, "pairs of an option and a value"
    for words in sweeps:
        assert len({load_recipe(SHIPPED[name], overrides).model_dump_json() for overrides in varied(words)}) > 1


@pytest.fixture
def any_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of the tests are fewer than recipes need."""
    monkeypatch.setattr("dnr_plugin.runs.checks.check_images", lambda recipe: None)


@NAMES
@pytest.mark.usefixtures("any_number_of_images")
def test_check(name: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    """As it stands, and as the small command in its comments has it."""
    root = root_of(name, request)
    assert main(["check", name, *root]) == 0, capsys.readouterr().err
    overrides = values(commands(name)[-1], "--set")
    if load_recipe(SHIPPED[name]).data.name == "imagefolder":
        root += ["--set", "data.train_size=null"]  # the images of the test are fewer
    words = [word for override in overrides for word in ("--set", override)]
    assert main(["check", name, *words, *root]) == 0, capsys.readouterr().err


@NAMES
def test_plan(name: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", name, *root_of(name, request), *small(name), "--device", "cpu"]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    recipe: Recipe = load_recipe(SHIPPED[name])
    if recipe.prune.target is None:
        assert "removes nothing" in out
    else:
        assert f"Target {recipe.prune.target.kind}: " in out and " neurons would go" in out


@NAMES
@pytest.mark.usefixtures("any_number_of_images")
def test_the_last_target_of_a_sweep_can_be_reached(
    name: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hardest one, in the network as it stands: narrow ones have other limits."""
    for words in commands(name):
        if words[0] == "sweep" and "prune.target." in values(words, "--vary")[0]:
            hardest = varied(words)[-1][-1]
            assert main(["check", name, *root_of(name, request), "--set", hardest]) == 0, capsys.readouterr().err
