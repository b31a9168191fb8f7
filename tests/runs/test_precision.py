"""The precision of a run's training: chosen once, kept through kills and sweeps, and named in its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.whole_runs import Killed, assert_same, lasting, stopping_after

from dnr_plugin.benchmarks.testbed import Ground
from dnr_plugin.errors import InputError
from dnr_plugin.recipe.load import load_recipe
from dnr_plugin.recipe.training_sections import TrainOptions
from dnr_plugin.repair import reference
from dnr_plugin.reports.run_report import facts
from dnr_plugin.reports.stored import stored_report
from dnr_plugin.runs import state, training_stage
from dnr_plugin.runs.results import Results
from dnr_plugin.runs.run import run_recipe
from dnr_plugin.runs.state import quiet
from dnr_plugin.runs.sweep import run_sweep
from dnr_plugin.training.precision import Precision, choose_precision

FASTER = Precision("auto", True, None, 32, 20.0, 10.0)
SHORT = ["model.width=4", "train.epochs=1", "finetune.epochs=1", "prune.recalibrate=64"]
CHOSEN = "Trained in bfloat16: a trial step of 32 images took 20 ms in float32 and 10 ms in bfloat16."


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every measurement finds bfloat16 faster; the list gets an entry for each."""
    made: list[Any] = []

    def choose(model: Any, example: Any, options: TrainOptions, *sizes: int) -> Precision:
        if options.amp != "auto":
            return choose_precision(model, example, options, *sizes)
        made.append(options)
        return FASTER

    monkeypatch.setattr(training_stage, "choose_precision", choose)
    return made


def test_a_tiny_run_is_not_measured_and_says_so(tiny: Path, tmp_path: Path) -> None:
    report = run_recipe(load_recipe(tiny, SHORT), tmp_path / "run")
    train, finetune = report["amp"]["train"], report["amp"]["finetune"]
    assert (train["asked"], train["used"], train["float32_ms"]) == ("auto", False, None)
    assert (finetune["used"], finetune["reason"]) == (False, "as in training")
    said = "Trained in float32: its steps are too small to gain by bfloat16. Fine-tuned in float32: as in training."
    assert said in (tmp_path / "run" / "report.md").read_text()
    assert stored_report(tmp_path / "run" / "report.json") == report


def test_what_a_recipe_asks_for_is_done(tiny: Path, tmp_path: Path) -> None:
    asked = ["train.amp=true", "finetune.amp=false"]
    report = run_recipe(load_recipe(tiny, [*SHORT, *asked]), tmp_path / "run")
    assert [report["amp"][stage]["used"] for stage in ("train", "finetune")] == [True, False]
    assert any("Trained in bfloat16: as the recipe asks. Fine-tuned in float32: as" in fact for fact in facts(report))


def test_a_resumed_run_keeps_its_precision(tiny: Path, tmp_path: Path, choices: list[Any]) -> None:
    """Measured once, before the first epoch; the run goes on in it, also in fine-tuning, and ends as a straight one."""
    recipe = load_recipe(tiny, ["model.width=4", "prune.recalibrate=64"])
    report = run_recipe(recipe, tmp_path / "straight")
    assert len(choices) == 1 and CHOSEN in " ".join(facts(report))
    for calls in (8, 21):  # in the second epoch, and while fine-tuning
        choices.clear()
        with pytest.raises(Killed):
            run_recipe(recipe, tmp_path / f"{calls}", track=stopping_after(calls))
        run_recipe(recipe, tmp_path / f"{calls}", resume=True)
        assert len(choices) == 1
        assert_same(lasting(tmp_path / f"{calls}"), lasting(tmp_path / "straight"), calls)


@pytest.mark.parametrize(("amp", "narrow"), [("false", False), ("auto", True), ("true", True)])
def test_repair_runs_in_bfloat16_where_that_serves(
    tiny: Path, tmp_path: Path, amp: str, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(reference, "_LONG", 0)
    report = run_recipe(load_recipe(tiny, [*SHORT, f"train.amp={amp}"]), tmp_path / "run")
    assert report["repair"]["narrow"] is narrow
    assert any(fact.startswith("Repair, in bfloat16, fitted") for fact in facts(report)) is narrow


@pytest.mark.usefixtures("choices")
def test_what_is_reported_is_tested_in_float32(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 are the tests after each epoch alone: not the dense network's, the pruned one's or the last."""
    tested: list[bool] = []
    test = state.evaluate
    monkeypatch.setattr(
        state, "evaluate", lambda *args, amp, **rest: tested.append(amp) or test(*args, amp=amp, **rest)
    )
    run_recipe(load_recipe(tiny, SHORT), tmp_path / "run")
    assert tested == [True, False, False, True, False]


def test_finetuning_alone_chooses_for_itself(tiny: Path, tmp_path: Path, choices: list[Any]) -> None:
    report = run_recipe(load_recipe(tiny, [*SHORT, "train.amp=false"]), tmp_path / "run")
    assert len(choices) == 1
    assert (report["amp"]["train"]["used"], report["amp"]["finetune"]["float32_ms"]) == (False, 20.0)


def test_runs_of_a_sweep_share_it_with_their_training(tiny: Path, tmp_path: Path, choices: list[Any]) -> None:
    done = run_sweep(tiny, SHORT, ["prune.target.flops=0.5,0.7"], tmp_path / "sweep")
    assert len(choices) == 1
    assert [CHOSEN in " ".join(facts(report)) for report in done.reports.values()] == [True, True]


def test_a_benchmark_tests_and_finetunes_as_it_trained(tiny: Path, tmp_path: Path, choices: list[Any]) -> None:
    ground = Ground.trained(load_recipe(tiny, SHORT), tmp_path / "dense", "cpu", quiet)
    again = Ground.trained(load_recipe(tiny, SHORT), tmp_path / "dense", "cpu", quiet)
    assert ground.amp and again.amp and len(choices) == 1
    kinds: set[torch.dtype] = set()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: kinds.add(output.dtype) if isinstance(module, torch.nn.Linear) else None
    )
    with hook:
        ground.finetuned(ground.model)
    assert kinds == {torch.bfloat16}


def test_reports_and_checkpoints_of_earlier_versions_have_none(tiny: Path, tmp_path: Path) -> None:
    report = run_recipe(load_recipe(tiny, SHORT), tmp_path / "run")
    file = tmp_path / "run" / "report.json"
    old = {key: value for key, value in report.items() if key != "amp"}
    file.write_text(json.dumps(old))
    assert stored_report(file) == old
    assert not [fact for fact in facts(old) if fact.startswith("Trained in")]
    file.write_text(json.dumps({**old, "amp": {"train": {"asked": "maybe", "used": True}}}))
    with pytest.raises(InputError, match=r"report\.json: .* found damage: amp\.train\.asked"):
        stored_report(file)
    plain = Results(amp={"train": FASTER}).plain()
    assert Results.of_plain(plain).amp == {"train": FASTER}
    del plain["amp"]
    assert Results.of_plain(plain).amp == {}
