"""What a recipe with dynamics or watching may not ask for: one line each."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dnr_plugin.dynamics.timetable import Timetable
from dnr_plugin.errors import InputError
from dnr_plugin.network.runtimes import Compiled, OnnxRuntime
from dnr_plugin.pruning.layers import Limits
from dnr_plugin.recipe.load import load_recipe
from dnr_plugin.runs.checks import check_live_noise, check_recipe, limits_of
from dnr_plugin.runs.timetable import check_timetable, timetable

# 320 images in batches of 32: ten steps an epoch, ten epochs
BASE = ["train.epochs=10", "prune.observe={samples: 64, min_samples: 32}", "prune.mode=dynamic",
        "prune.recalibrate=null"]  # fmt: skip
WATCH = [*BASE, "prune.mode=watch", "prune.target=null"]


def lines(tiny: Path, *overrides: str, images: int | None = 320) -> list[str]:
    recipe = load_recipe(tiny, [*BASE, *overrides])
    with pytest.raises(InputError) as caught:
        check_timetable(recipe, images)
    return list(caught.value.problems)


def test_a_timetable_in_steps(tiny: Path) -> None:
    recipe = load_recipe(
        tiny,
        [*BASE, "prune.dynamics={check_every: 0.5, warmup_epochs: 1.3, until: 0.55, remove_at: [2, 5.5], patience: 3}"],
    )
    times = timetable(recipe, 320)
    assert times == Timetable(5, until=55, watched=2, warmup=13, remove_at=(20, 55))
    assert (times.first, times.last) == (3, 11)
    check_timetable(recipe, 320)
    assert Timetable(5, until=54, warmup=0).first == 1
    assert (Timetable(5, until=54, warmup=16).first, Timetable(5, until=54).last) == (4, 10)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["prune.dynamics={patience: 6}"],
            "patience: expected at most 5, the checks from warm-up (epoch 1) to the last removal (epoch 6), found 6",
        ),
        (
            ["prune.dynamics={patience: 2, remove_at: [2.0]}"],
            "patience: expected at most 1, the checks from warm-up (epoch 1) to the last removal (epoch 2), found 2",
        ),
        (
            ["prune.dynamics={warmup_epochs: 7}"],
            "warmup_epochs: expected to end before the last removal (epoch 6), found 7",
        ),
        (
            ["prune.dynamics={remove_at: [2, 6.5]}"],
            "remove_at: expected epochs with a check up to epoch 6, which is until (0.6) of train.epochs (10), "
            "found 6.5",
        ),
        (  # the check after epoch 5 comes with epoch 6, which is past the end
            ["train.epochs=5", "prune.dynamics={remove_at: [5], check_every: 2, until: 1.0}"],
            "remove_at: expected epochs with a check up to epoch 5, which is until (1) of train.epochs (5), found 5",
        ),
        (["prune.dynamics={check_every: 11}"], "check_every: expected at most 10, the epochs there are, found 11"),
    ],
)
def test_a_run_too_short_for_its_dynamics(tiny: Path, overrides: list[str], expected: str) -> None:
    assert lines(tiny, *overrides) == [f"prune.dynamics.{expected}"]


def test_the_limits_themselves_are_allowed(tiny: Path) -> None:
    for dynamics in ("{patience: 5}", "{remove_at: [2, 6]}", "{warmup_epochs: 4}", "{check_every: 1, patience: 0}"):
        check_timetable(load_recipe(tiny, [*BASE, f"prune.dynamics={dynamics}"]), 320)


def test_fewer_images_between_checks_than_death_is_judged_on(tiny: Path) -> None:
    few = ["prune.dynamics.check_every=0.1", "prune.observe={samples: 64, min_samples: 33}"]
    line = "prune.observe.min_samples: expected at most 32, the images from one check to the next, found 33"
    assert lines(tiny, *few) == [line]
    assert lines(tiny, *WATCH[len(BASE):], *few) == [line]  # fmt: skip
    check_timetable(load_recipe(tiny, [*BASE, few[0], "prune.observe={samples: 64, min_samples: 32}"]), 320)


@pytest.mark.parametrize("mode", ["dynamic", "watch"])
def test_dynamics_need_training(tiny: Path, mode: str) -> None:
    more = WATCH[len(BASE) :] if mode == "watch" else []
    expected = f"train.epochs: expected at least 1 with prune.mode {mode}, found 0"
    assert lines(tiny, *more, "train.epochs=0") == [expected]
    assert lines(tiny, *more, "train.epochs=0", images=None) == [expected]


def test_what_cannot_be_known_is_not_refused(tiny: Path) -> None:
    check_timetable(load_recipe(tiny, [*BASE, "prune.dynamics={patience: 60}"]), None)
    check_timetable(load_recipe(tiny, ["train.epochs=0"]), 320)  # after_training


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["prune.target=null", "prune.mode=dynamic"], "target: expected one with mode dynamic, found nothing"),
        (["prune.target=null"], "target: expected one with mode after_training, found nothing"),
        (["prune.mode=watch"], "target: expected nothing with mode watch, found flops"),
        (
            ["prune.target={latency: 0.5}", "prune.mode=dynamic"],
            "target: expected another than latency with mode dynamic, whose timings could not be resumed, "
            "found latency",
        ),
        (
            ["prune.round_to=auto", "prune.mode=dynamic"],
            "round_to: expected a number with mode dynamic, while which nothing is timed, found auto",
        ),
        (
            ["prune.scope=latency_aware"],
            "scope: expected another with target flops, which counts no time, found latency_aware",
        ),
        (
            ["prune.runtime=compiled"],
            "runtime: expected nothing without target latency or round_to auto, which time, found compiled",
        ),
        (
            ["prune.mode=dynamic", "prune.runtime=onnxruntime"],
            "runtime: expected nothing with mode dynamic, found onnxruntime",
        ),
        (
            ["prune.dynamics={patience: 3}"],
            "dynamics: expected check_every alone with mode after_training, found patience",
        ),
        (["prune.mode=dynamic", "prune.steps=2"], "steps: expected nothing with mode dynamic, found 2"),
        (["prune.mode=dynamic", "prune.recalibrate=100"], "recalibrate: expected nothing with mode dynamic, found 100"),
        (["prune.mode=dynamic", "prune.fold=false"], "fold: expected nothing where candidates are zeroed, found false"),
        *(
            (
                ["prune.target=null", "prune.mode=watch", f"prune.{name}={value}"],
                f"{name}: expected nothing with mode watch, found {value}",
            )
            for name, value in (("scope", "global"), ("round_to", "8"), ("max_pruning_ratio", "0.5"), ("fold", "false"))
        ),
        (
            ["prune.target=null", "prune.mode=watch", "prune.dynamics={check_every: 2, patience: 1}"],
            "dynamics: expected check_every alone with mode watch, found patience",
        ),
    ],
)
def test_options_that_the_mode_does_not_use(tiny: Path, overrides: list[str], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(tiny, ["prune.recalibrate=null", *overrides])
    (problem,) = caught.value.problems
    assert f"prune.{expected}" in problem


@pytest.mark.parametrize(
    "overrides",
    [
        ["prune.mode=dynamic"],
        ["prune.mode=dynamic", "prune.target={dead: true}"],
        ["prune.mode=dynamic", "prune.fold=false", "prune.dynamics={patience: 0}"],
        ["prune.mode=dynamic", "prune.fold=false", "prune.dynamics={zero: false}"],
        ["prune.mode=watch", "prune.target=null", "prune.dynamics={check_every: 0.5}"],
        ["prune.dynamics={check_every: 0.5}"],
    ],
)
def test_options_that_it_does_use(tiny: Path, overrides: list[str]) -> None:
    load_recipe(tiny, ["prune.recalibrate=null", *overrides])


def test_noise_on_live_neurons_is_for_training_alone(tiny: Path) -> None:
    """Nobody looks at the neurons while the network is fine-tuned."""
    noise = "pressure.noise={std: 0.1, neurons: live}"
    check_live_noise(load_recipe(tiny, [f"train.{noise}"]))
    with pytest.raises(InputError) as caught:
        check_live_noise(load_recipe(tiny, [f"train.{noise}", f"finetune.{noise}"]))
    assert caught.value.problems == (
        "finetune.pressure.noise.neurons: expected all, since only train checks which neurons are live, found live",
    )


def test_noise_on_live_neurons_needs_checks_that_take_place(tiny: Path) -> None:
    noise = "train.pressure.noise={std: 0.1, neurons: live}"
    check_timetable(load_recipe(tiny, [noise]), 192)
    with pytest.raises(InputError, match=r"prune\.dynamics\.check_every: expected at most 2"):
        check_timetable(load_recipe(tiny, [noise, "prune.dynamics={check_every: 50}"]), 192)


def test_limits_are_those_of_the_recipe(tiny: Path) -> None:
    given = ["prune.ignored=[fc]", "prune.round_to=2", "prune.max_pruning_ratio=0.6", "prune.verify=false"]
    assert limits_of(load_recipe(tiny, given)) == Limits(["fc"], 2, 0.6, verify=False)
    assert limits_of(load_recipe(tiny)).verify


def test_check_counts_images_that_only_the_folder_tells(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a run would; without reading an image."""
    from dnr_plugin.cli.main import main

    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            (tmp_path / "images" / split / name / "0.png").touch()
    recipe = yaml.safe_load(tiny.read_text())
    recipe["data"] = {"name": "imagefolder", "root": str(tmp_path / "images"), "image_size": 16}
    tiny.write_text(yaml.safe_dump(recipe))
    assert main(["check", str(tiny)]) == 2
    said = capsys.readouterr().err
    assert "train.batch_size: expected at most 2, the number of training images" in said
    assert "prune.observe.min_samples: expected at most 2" in said


def test_runtimes_that_this_machine_lacks_are_all_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any training, one line each."""
    monkeypatch.setattr(Compiled, "problem", lambda self: "no C++ compiler")
    monkeypatch.setattr(OnnxRuntime, "problem", lambda self: "no onnx")
    check_recipe(load_recipe(tiny))
    overrides = ["prune.target={latency: 0.5}", "prune.runtime=onnxruntime", "report.runtimes=[compiled]"]
    with pytest.raises(InputError) as caught:
        check_recipe(load_recipe(tiny, overrides))
    expected = "expected a runtime that can be used here, found"
    assert caught.value.problems == (
        f"prune.runtime: {expected} onnxruntime and no onnx",
        f"report.runtimes: {expected} compiled and no C++ compiler",
    )
