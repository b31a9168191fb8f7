"""Recipes: what is read, what is refused and in which words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from dnr_plugin.errors import InputError
from dnr_plugin.models.networks import BUILTIN
from dnr_plugin.recipe.difference import differing_fields
from dnr_plugin.recipe.load import load_recipe, write_recipe
from dnr_plugin.recipe.schema import Recipe
from dnr_plugin.recipe.schema_wording import option_reference
from dnr_plugin.recipe.sections import ModelOptions

GOOD = """\
name: small
model:
  name: resnet18
  width: 16
data:
  name: shapes
train:
  epochs: 4
  lr: 0.05
prune:
  target:
    flops: 0.5
finetune:
  epochs: 2
"""
SETS = "shapes, cifar10, cifar100, mnist, imagefolder"
KNOWN_DATA = "name, root, download, train_size, test_size, image_size, augment, workers"
KNOWN_TRAIN = (
    "epochs, batch_size, optimizer, lr, momentum, nesterov, weight_decay, schedule, warmup_epochs, clip_norm, "
    "label_smoothing, amp, pressure"
)
KNOWN_TARGETS = "flops, params, latency, neuron_sparsity, weight_sparsity, dead"
KNOWN_OBSERVE = "samples, min_samples, share, threshold, bins"


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A good recipe as ``r.yaml`` in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(GOOD)
    return Path("r.yaml")


def problems(path: str | Path, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_recipe(path, overrides)
    assert all(line.isprintable() for line in caught.value.problems), "one line per problem"
    return list(caught.value.problems)


def edited(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


FILES = {
    "unknown option, near": (
        edited("  width: 16", "  widht: 16"),
        ["r.yaml:4: model.widht: expected an option of model, found unknown 'widht'; did you mean 'width'?"],
    ),
    "unknown option, far": (
        edited("  name: shapes", "  name: shapes\n  zzz: 1"),
        [f"r.yaml:7: data.zzz: expected an option of data, found unknown 'zzz'; known are {KNOWN_DATA}"],
    ),
    "unknown section": (
        GOOD + "prun:\n  steps: 2\n",
        ["r.yaml:15: prun: expected an option of the recipe, found unknown 'prun'; did you mean 'prune'?"],
    ),
    "unknown literal": (
        edited("name: shapes", "name: cifar11"),
        [f"r.yaml:6: data.name: expected one of {SETS}, found 'cifar11'; did you mean 'cifar10'?"],
    ),
    "unknown literal in a list": (
        edited("name: shapes", "name: shapes\n  augment:\n    - crop\n    - flop"),
        ["r.yaml:9: data.augment.1: expected one of flip, crop, cutout, found 'flop'; did you mean 'flip'?"],
    ),
    "literal of another type": (
        edited("name: shapes", "name: 10"),
        [f"r.yaml:6: data.name: expected one of {SETS}, found 10"],
    ),
    "missing option": (
        edited("  epochs: 4\n", ""),
        ["r.yaml:7: train.epochs: expected an integer of at least 0, found nothing"],
    ),
    "missing section": (
        edited("data:\n  name: shapes\n", ""),
        [f"r.yaml:1: data: expected a mapping of {KNOWN_DATA}, found nothing"],
    ),
    "empty section": (
        edited("data:\n  name: shapes\n", "data:\n"),
        [f"r.yaml:5: data: expected a mapping of {KNOWN_DATA}, found null"],
    ),
    "section is a list": (
        edited("data:\n  name: shapes\n", "data: [shapes]\n"),
        [f"r.yaml:5: data: expected a mapping of {KNOWN_DATA}, found a list"],
    ),
    "target is a number": (
        edited("  target:\n    flops: 0.5\n", "  target: 0.5\n"),
        [f"r.yaml:11: prune.target: expected a mapping of {KNOWN_TARGETS}, found 0.5"],
    ),
    "text for an integer": (
        edited("epochs: 4", "epochs: ten"),
        ["r.yaml:8: train.epochs: expected an integer of at least 0, found 'ten'"],
    ),
    "float for an integer": (
        edited("width: 16", "width: 16.0"),
        ["r.yaml:4: model.width: expected an integer of at least 1, found 16.0"],
    ),
    "boolean for an integer": (
        edited("epochs: 4", "epochs: true"),
        ["r.yaml:8: train.epochs: expected an integer of at least 0, found true"],
    ),
    "boolean for a number": (
        edited("lr: 0.05", "lr: true"),
        ["r.yaml:9: train.lr: expected a number above 0, found true"],
    ),
    "list for a number": (
        edited("lr: 0.05", "lr: [1]"),
        ["r.yaml:9: train.lr: expected a number above 0, found a list"],
    ),
    "null for a number": (edited("lr: 0.05", "lr:"), ["r.yaml:9: train.lr: expected a number above 0, found null"]),
    "number for text": (
        edited("name: small", "name: small\ndescription: 5"),
        ["r.yaml:2: description: expected text, found 5"],
    ),
    "yes for a boolean": (
        edited("lr: 0.05", "amp: yes"),
        ["r.yaml:9: train.amp: expected one of auto, true, false, found 'yes'"],
    ),
    "underscores": (
        edited("lr: 0.05", "batch_size: 1_000"),
        ["r.yaml:9: train.batch_size: expected an integer of at least 2, found '1_000'"],
    ),
    "sexagesimal": (
        edited("lr: 0.05", "batch_size: 12:30:45"),
        ["r.yaml:9: train.batch_size: expected an integer of at least 2, found '12:30:45'"],
    ),
    "date": (
        edited("lr: 0.05", "lr: 2024-01-01"),
        ["r.yaml:9: train.lr: expected a number above 0, found '2024-01-01'"],
    ),
    "too large": (
        edited("flops: 0.5", "flops: 1.5"),
        ["r.yaml:12: prune.target.flops: expected a number above 0 and below 1, found 1.5"],
    ),
    "too small": (edited("lr: 0.05", "lr: -1e-4"), ["r.yaml:9: train.lr: expected a number above 0, found -0.0001"]),
    "nan": (edited("lr: 0.05", "lr: .nan"), ["r.yaml:9: train.lr: expected a finite number, found .nan"]),
    "inf": (edited("lr: 0.05", "lr: -.inf"), ["r.yaml:9: train.lr: expected a finite number, found -.inf"]),
    "overflow": (edited("lr: 0.05", "lr: 1e999"), ["r.yaml:9: train.lr: expected a finite number, found 1e999"]),
    "nan for a builder": (
        edited("width: 16", "kwargs: {a: {b: .nan}}"),
        ["r.yaml:4: model.kwargs.a.b: expected a finite number, found .nan"],
    ),
    "a very long integer": (
        edited("name: small", f"name: small\nseed: {'9' * 5000}"),
        ["r.yaml:2: seed: expected at most 40 digits, found 5000"],
    ),
    "pattern": (
        edited("name: small", "name: ../small"),
        ["r.yaml:1: name: expected text matching ^[A-Za-z0-9][A-Za-z0-9._-]*$, found '../small'"],
    ),
    "two targets": (
        edited("flops: 0.5", "flops: 0.5\n    params: 0.3"),
        [f"r.yaml:11: prune.target: expected exactly one of {KNOWN_TARGETS}, found flops, params"],
    ),
    "no target": (
        edited("  target:\n    flops: 0.5\n", "  target: {}\n"),
        [f"r.yaml:11: prune.target: expected exactly one of {KNOWN_TARGETS}, found none"],
    ),
    "combination of options": (
        edited("lr: 0.05", "warmup_epochs: 5"),
        ["r.yaml:9: train.warmup_epochs: expected less than epochs (4), found 5"],
    ),
    "duplicate key": (
        edited("lr: 0.05", "lr: 0.05\n  epochs: 5"),
        ["r.yaml:10: train.epochs: expected each key once, found it again (first at r.yaml:8)"],
    ),
    "key is a number": (GOOD + "  7: x\n", ["r.yaml:15: finetune: expected text as a key, found 7"]),
    "key is a list": (GOOD + "? [a]\n: x\n", ["r.yaml:15: the recipe: expected text as a key, found a sequence"]),
    "key is missing": (GOOD + "?\n: x\n", ["r.yaml:15: the recipe: expected text as a key, found null"]),
    "key with a line break": (
        edited("name: shapes", 'name: shapes\n  "ro\\not": x'),
        [r"r.yaml:7: data.'ro\not': expected an option of data, found unknown 'ro\not'; did you mean 'root'?"],
    ),
    "merge key": (
        edited("lr: 0.05", "<<: {lr: 1.0}"),
        [f"r.yaml:9: train.<<: expected an option of train, found unknown '<<'; known are {KNOWN_TRAIN}"],
    ),
    "long value": (
        edited("name: shapes", f"name: shapes\n  download: {'x' * 1000}"),
        [f"r.yaml:7: data.download: expected true or false, found '{'x' * 75} ..."],
    ),
    "python tag": (
        edited("width: 16", "checkpoint: !!python/object/apply:os.system [echo]"),
        ["r.yaml:4: expected no YAML tags, found 'tag:yaml.org,2002:python/object/apply:os.system'"],
    ),
    "tag": (edited("lr: 0.05", "lr: !foo 0.05"), ["r.yaml:9: expected no YAML tags, found '!foo'"]),
    "standard tag": (
        edited("lr: 0.05", "lr: !!float 1"),
        ["r.yaml:9: expected no YAML tags, found 'tag:yaml.org,2002:float'"],
    ),
    "anchor": (edited("train:\n", "train: &t\n"), ["r.yaml:7: expected no YAML anchors or aliases, found 't'"]),
    "alias": (edited("lr: 0.05", "lr: *t"), ["r.yaml:9: expected no YAML anchors or aliases, found 't'"]),
    "tab": (
        edited("  lr: 0.05", "\tlr: 0.05"),
        ["r.yaml:9: not YAML: found character '\\t' that cannot start any token (while scanning for the next token)"],
    ),
    "two colons": (edited("lr: 0.05", "lr: 0.05: 1"), ["r.yaml:9: not YAML: mapping values are not allowed here"]),
    "open bracket": (
        GOOD + "description: [a\n",
        ["r.yaml:16: not YAML: expected ',' or ']', but got '<stream end>' (while parsing a flow sequence)"],
    ),
    "escape beyond Unicode": (edited("small", '"\\UFFFFFFFF"'), ["r.yaml:1: not YAML: "]),
    "control character": (edited("small", "sm\0all"), ["r.yaml:1: not YAML: unprintable character U+0000"]),
    "two documents": (GOOD + "---\nname: b\n", ["r.yaml:15: expected one YAML document, found another"]),
    "list": ("\n- a\n- b\n", ["r.yaml:2: expected a mapping of options, found a list"]),
    "scalar": ("hello\n", ["r.yaml:1: expected a mapping of options, found 'hello'"]),
    "empty": ("", ["r.yaml:1: expected a mapping of options, found an empty file"]),
    "only comments": ("# nothing\n", ["r.yaml:1: expected a mapping of options, found an empty file"]),
    "empty document": ("---\n", ["r.yaml:1: expected a mapping of options, found an empty file"]),
    "deep": (
        GOOD + "description: " + "[" * 5000,
        ["r.yaml:15: expected at most 20 levels of nesting, found more"],
    ),
    "deep blocks": (
        "".join(f"{' ' * depth}a:\n" for depth in range(500)),
        ["r.yaml:20: expected at most 20 levels of nesting, found more"],
    ),
    "large": (GOOD + "#" * 2**20, ["r.yaml: expected at most 1048576 bytes, found more"]),
    "several at once": (
        edited("epochs: 4", "epochs: -1\n  epochs: 3")
        .replace("lr: 0.05", "ler: .inf")
        .replace("flops: 0.5", "flops: 0"),
        [
            "r.yaml:9: train.epochs: expected each key once, found it again (first at r.yaml:8)",
            "r.yaml:10: train.ler: expected a finite number, found .inf",
            "r.yaml:8: train.epochs: expected an integer of at least 0, found -1",
            "r.yaml:13: prune.target.flops: expected a number above 0 and below 1, found 0",
        ],
    ),
}


@pytest.mark.parametrize(("text", "expected"), FILES.values(), ids=FILES.keys())
def test_bad_file(good: Path, text: str, expected: list[str]) -> None:
    good.write_text(text)
    found = problems("r.yaml")
    if expected[0].endswith("not YAML: "):  # Python's own words follow, which differ between versions
        assert len(found) == 1 and found[0].startswith(expected[0])
    else:
        assert found == expected


OVERRIDES = {
    "wrong type": (["train.epochs=ten"], ["train.epochs: expected an integer of at least 0, found 'ten'"]),
    "unknown option": (
        ["train.epoch=3"],
        ["train.epoch: expected an option of train, found unknown 'epoch'; did you mean 'epochs'?"],
    ),
    "unknown section": (
        ["trian.epochs=3"],
        ["trian: expected an option of the recipe, found unknown 'trian'; did you mean 'train'?"],
    ),
    "unknown section in a section": (
        ["prune.observer.samples=3"],
        ["prune.observer: expected an option of prune, found unknown 'observer'; did you mean 'observe'?"],
    ),
    "unknown option in a new section": (
        ["prune.observe.zzz=3"],
        [f"prune.observe.zzz: expected an option of prune.observe, found unknown 'zzz'; known are {KNOWN_OBSERVE}"],
    ),
    "missing in what was replaced": (["data={}"], [f"data.name: expected one of {SETS}, found nothing"]),
    "through a scalar": (["model.name.x=1"], ["model.name.x: expected model.name to be a mapping, found 'resnet18'"]),
    "two targets": (
        ["prune.target.params=0.3"],
        [f"prune.target: expected exactly one of {KNOWN_TARGETS}, found flops, params"],
    ),
    "combination with the file": (
        ["train.warmup_epochs=4"],
        ["train.warmup_epochs: expected less than epochs (4), found 4"],
    ),
    "no value": (
        ["train.epochs="],
        ["train.epochs: expected a value (null for none, \"''\" for empty text), found nothing"],
    ),
    "not YAML": (
        ["data.augment=[flip"],
        ["data.augment: not YAML: expected ',' or ']', but got '<stream end>' (while parsing a flow sequence)"],
    ),
    "alias": (["prune.ignored=*a"], ["prune.ignored: expected no YAML anchors or aliases, found 'a'"]),
    "tag": (["model.checkpoint=!x y"], ["model.checkpoint: expected no YAML tags, found '!x'"]),
    "nan": (["train.lr=.nan"], ["train.lr: expected a finite number, found .nan"]),
    "null for a required one": (["train.epochs=null"], ["train.epochs: expected an integer of at least 0, found null"]),
    "item of a list": (["data.augment=[crop, x]"], ["data.augment.1: expected one of flip, crop, cutout, found 'x'"]),
}


def test_repair_and_what_it_settles(good: Path) -> None:
    """By default neurons are ranked by redundancy, layers fitted, and statistics not taken anew."""
    default = load_recipe(good).prune
    assert (default.score, default.criterion, default.repair, default.repair_samples) == (
        None,
        "redundancy",
        True,
        4096,
    )
    assert (default.recalibrate, default.recalibration) == (None, 0)
    without = load_recipe(good, ["prune.repair=false"]).prune
    assert (without.criterion, without.recalibration) == ("redundancy", 2048)
    assert load_recipe(good, ["prune.recalibrate=100"]).prune.recalibration == 100
    assert load_recipe(good, ["prune.score=magnitude"]).prune.criterion == "magnitude"
    assert load_recipe(good, ["prune.repair_samples=64"]).prune.repair_samples == 64
    assert default.repair_pairs is False
    assert load_recipe(good, ["prune.repair_pairs=true"]).prune.repair_pairs is True
    for mode in (["prune.mode=dynamic"], ["prune.mode=watch", "prune.target=null"]):
        assert load_recipe(good, mode).prune.criterion == "variation"
    several = load_recipe(good, ["prune.steps=2", "prune.recalibrate=0"]).prune
    assert several.recalibration == 0
    assert load_recipe(good, ["prune.scope=cost_aware"]).prune.scope == "cost_aware"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["prune={target: {flops: 0.5}, repair: false, repair_samples: 100}"],
            "prune.repair_samples: expected nothing without repair, found 100",
        ),
        (
            ["prune={target: {flops: 0.5}, repair: false, repair_pairs: true}"],
            "prune.repair_pairs: expected nothing without repair, found true",
        ),
        (
            ["prune={target: {flops: 0.5}, mode: dynamic, repair_pairs: true}"],
            "prune.repair_pairs: expected nothing with mode dynamic, found true",
        ),
        (
            ["prune={mode: watch, repair_pairs: true}"],
            "prune.repair_pairs: expected nothing with mode watch, found true",
        ),
        (
            ["prune={target: {flops: 0.5}, mode: dynamic, score: redundancy}"],
            "prune.score: expected another with mode dynamic, which has no repair, found redundancy",
        ),
        (
            ["prune={target: {flops: 0.5}, mode: dynamic, repair: false}"],
            "prune.repair: expected nothing with mode dynamic, found false",
        ),
        (
            ["prune={target: {flops: 0.5}, mode: dynamic, repair_samples: 100}"],
            "prune.repair_samples: expected nothing with mode dynamic, found 100",
        ),
        (["prune={mode: watch, repair: false}"], "prune.repair: expected nothing with mode watch, found false"),
        (["prune={mode: watch, score: redundancy}"], "prune.score: expected nothing with mode watch, found redundancy"),
        (
            ["prune={target: {flops: 0.5}, steps: 2, recalibrate: 0, repair: false}"],
            "prune.recalibrate: expected above 0, or repair, with several steps, which observe in between, found 0",
        ),
        (["prune.repair_samples=10"], "prune.repair_samples: expected an integer of at least 64, found 10"),
    ],
)
def test_options_of_repair_that_do_not_fit(good: Path, overrides: list[str], expected: str) -> None:
    (problem,) = problems(good, *overrides)
    assert problem == f"--set {overrides[-1]}: {expected}"


@pytest.mark.parametrize(("overrides", "expected"), OVERRIDES.values(), ids=OVERRIDES.keys())
def test_bad_override(good: Path, overrides: list[str], expected: list[str]) -> None:
    assert problems(good, *overrides) == [f"--set {overrides[-1]}: {line}" for line in expected]


@pytest.mark.parametrize("text", ["train.epochs", "=3", "train..epochs=3", ".epochs=3", "train.=3", ""])
def test_override_that_names_no_option(good: Path, text: str) -> None:
    assert problems(good, text) == [f"--set {text}: expected option.name=value, found {text!r}"]


def test_override_at_fault_is_named_where_the_file_holds_the_other_half(good: Path) -> None:
    good.write_text(edited("lr: 0.05", "warmup_epochs: 3"))
    assert problems(good, "train.lr=0.01", "train.epochs=2", "prune.steps=2") == [
        "--set train.epochs=2: train.warmup_epochs: expected less than epochs (2), found 3"
    ]


def test_override_is_not_blamed_for_the_file(good: Path) -> None:
    good.write_text(edited("lr: 0.05", "warmup_epochs: 5"))
    assert problems(good, "train.lr=0.01", "finetune.epochs=1") == [
        "r.yaml:9: train.warmup_epochs: expected less than epochs (4), found 5"
    ]


def test_file_and_override_problems_together(good: Path) -> None:
    good.write_text(edited("width: 16", "width: 0"))
    assert problems(good, "train.lr=0", "oops", "data.root=5") == [
        "--set oops: expected option.name=value, found 'oops'",
        "r.yaml:4: model.width: expected an integer of at least 1, found 0",
        "--set data.root=5: data.root: expected text, found 5",
        "--set train.lr=0: train.lr: expected a number above 0, found 0",
    ]


def test_override_with_a_line_break_stays_one_line(good: Path) -> None:
    assert problems(good, "data.root=[a,\nb]") == [r"--set 'data.root=[a,\nb]': data.root: expected text, found a list"]


def test_no_file(good: Path) -> None:
    assert problems("none.yaml") == ["none.yaml: expected a recipe file, found no such file"]
    assert problems(".") == [".: expected a recipe file, found a directory"]
    assert problems("r.yaml/x") == ["r.yaml/x: expected a recipe file, found one that cannot be read (Not a directory)"]


@pytest.mark.skipif(os.name == "nt" or getattr(os, "geteuid", int)() == 0, reason="root reads every file")
def test_unreadable_file(good: Path) -> None:
    good.chmod(0)
    assert problems(good) == ["r.yaml: expected a recipe file, found one that cannot be read (Permission denied)"]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"name: small\ndescription: \xff\n", "r.yaml:2: expected UTF-8 text, found byte 0xff"),
        (GOOD.encode("utf-16"), "r.yaml:1: expected UTF-8 text, found byte 0xff"),
        (b"\x89PNG\r\n", "r.yaml:1: expected UTF-8 text, found byte 0x89"),
    ],
)
def test_undecodable_file(good: Path, raw: bytes, expected: str) -> None:
    good.write_bytes(raw)
    assert problems(good) == [expected]


def test_good_file_and_its_defaults(good: Path) -> None:
    recipe = load_recipe(good)
    assert (recipe.name, recipe.model.width, recipe.train.lr, recipe.finetune.epochs) == ("small", 16, 0.05, 2)
    assert (recipe.prune.target.kind, recipe.prune.target.value) == ("flops", 0.5)
    assert (recipe.train.batch_size, recipe.prune.observe.samples, recipe.data.root) == (128, 2048, None)


def test_byte_order_mark_and_windows_lines(good: Path) -> None:
    good.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_recipe(str(good)).name == "small"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("5e-4", 5e-4), ("1E3", 1000.0), (".5", 0.5), ("5.", 5.0), ("+1.5e+2", 150.0), ("1", 1),
        ("010", 10), ("0o10", 8), ("0x10", 16), ("-7", -7), ("1_000", "1_000"), ("12:30:45", "12:30:45"),
        ("on", "on"), ("off", "off"), ("yes", "yes"), ("NO", "NO"), ("y", "y"), ("true", True), ("FALSE", False),
        ("2024-01-01", "2024-01-01"), ("~", None), ("null", None), ("'1'", "1"), ('"true"', "true"), ("=", "="),
        ("module:function", "module:function"), ("0b1", "0b1"), ("1e", "1e"), ("''", ""), ("[1, a]", [1, "a"]),
        ("{a: 1e-1}", {"a": 0.1}), ("-", "-"),
    ],
)  # fmt: skip
def test_plain_scalars_follow_yaml_1_2(good: Path, text: str, value: object) -> None:
    if text != "-":  # a plain dash on its own opens a list item
        found = load_recipe(good, [f"model.kwargs.x={text}"]).model.kwargs["x"]
        assert found == value and type(found) is type(value)
    else:
        assert load_recipe(good, [f"model.kwargs.x={text}"]).model.kwargs["x"] == [None]


def test_overrides(good: Path) -> None:
    recipe = load_recipe(
        good,
        [
            "prune.target={params: 0.3}",
            "model.width=null",
            "train.lr=5e-4",
            "train.weight_decay=0",
            "train.amp=true",
            "data.augment=[crop, flip]",
            "data.root=~/sets/a=b",
            "prune.observe.samples=4096",
            "prune.observe.bins=8",
            "description=''",
            "train.epochs=7",
            "train.epochs=9",
        ],
    )
    assert (recipe.prune.target.kind, recipe.prune.target.value) == ("params", 0.3)
    assert recipe.model.width is None
    assert (recipe.train.lr, recipe.train.weight_decay, recipe.train.amp, recipe.train.epochs) == (5e-4, 0.0, True, 9)
    assert (recipe.data.augment, recipe.data.root) == (["crop", "flip"], "~/sets/a=b")
    assert (recipe.prune.observe.samples, recipe.prune.observe.bins, recipe.description) == (4096, 8, "")


def test_override_mends_the_file(good: Path) -> None:
    good.write_text(edited("lr: 0.05", "lr: fast").replace("flops: 0.5", "flops: 2\n    params: 0.5"))
    recipe = load_recipe(good, ["train.lr=1", "prune.target.flops=null"])
    assert (recipe.train.lr, recipe.prune.target.kind) == (1.0, "params")


HARD_TEXTS = [
    "1e-4", "010", "0o10", "12:30:45", "yes", "No", "null", "~", "", " x ", "a: b", "# x", "a\nb\n", "é 🙂", "\t",
    "\x00\x85\u2028",
    "2024-01-01", "1_000", "=", "<<", ".nan", "'", '"', "- a", "&a", "*a", "!a", "%a", "{", "long " * 60,
    "\ufeffx", "0x1F", "+.inf",
]  # fmt: skip


def test_round_trip(good: Path) -> None:
    recipe = load_recipe(
        good, ["train.lr=1e-30", "seed=4294967295", "model.hidden=[1, 2]", "prune.target={dead: true}"]
    ).model_copy(update={"description": "é: yes # no"})
    values = [*HARD_TEXTS, True, None, 1, 1.0, -0.5, 1e16, 1e-7, {"a": [[], {}]}]
    kwargs = {**dict.fromkeys(HARD_TEXTS, 0), "values": values, "again": values}
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"kwargs": kwargs})})
    write_recipe(recipe, "out.yaml")
    again = load_recipe("out.yaml")
    assert again == recipe
    assert differing_fields(again, recipe) == []
    plain = yaml.safe_load(Path("out.yaml").read_text(encoding="utf-8"))
    assert plain == recipe.model_dump(), "other YAML readers agree"
    assert list(plain) == list(Recipe.model_fields) and list(plain["train"]) == list(type(recipe.train).model_fields)


def test_differing_fields(good: Path) -> None:
    a = load_recipe(good, ["model.kwargs={x: 1}"])
    b = load_recipe(good, ["model.kwargs={x: true, y: z}", "prune.target={params: 0.5}", "data.augment=[flip]"])
    assert differing_fields(a, a) == []
    assert differing_fields(a, b) == [
        "model.kwargs.x: 1, true",
        'data.augment: [], ["flip"]',
        "prune.target.flops: 0.5, null",
        "prune.target.params: null, 0.5",
        'model.kwargs.y: nothing, "z"',
    ]


def test_option_reference_names_every_option(good: Path) -> None:
    text = option_reference()

    def names(section: dict[str, object], prefix: str = "") -> list[str]:
        return [
            name
            for key, value in section.items()
            for name in (
                names(value, f"{prefix}{key}.") if isinstance(value, dict) and key != "kwargs" else [f"{prefix}{key}"]
            )
        ]

    optional = [
        f"{stage}.pressure.{section}"
        for stage in ("train", "finetune")
        for section in ("bn_l1={strength: 0}", "noise={std: 0}")
    ]
    options = names(load_recipe(good, optional).model_dump())
    assert sorted(line.split("`")[1] for line in text.splitlines() if line.startswith("- `")) == sorted(options)
    for name in options:
        assert text.count(f"- `{name}` [") == 1, name
    assert "- `prune.target.flops` [a number above 0 and below 1 (or null); default null]: share of the FLOPs" in text
    assert "- `train.epochs` [an integer of at least 0; required]: passes over the training images\n" in text
    assert "- `data.augment` [a list, each item one of flip, crop, cutout; default []]: " in text
    assert "\n## prune.observe\n" in text
    assert "\n## train.pressure.noise\n\nnormal noise added to the gradients (or null, the default)\n" in text


def test_no_pydantic_words_in_any_message(good: Path) -> None:
    """Every option, given a value of each wrong kind: plain words that name the option."""
    for line in option_reference().splitlines():
        if not line.startswith("- `") or "kwargs" in line:
            continue
        name = line.split("`")[1]
        for value in ("{a: 1}", "[[1]]", "'?'", "-1.5", "1e308", "[]"):
            try:
                load_recipe(good, [f"{name}={value}"])
            except InputError as exc:
                for problem in exc.problems:
                    assert problem.startswith(f"--set {name}={value}: {name.rpartition('.')[0]}")
                    assert ": expected " in problem and ", found " in problem
                    assert not any(
                        word in problem.lower() for word in ("pydantic", "http", "input should", "value error")
                    )


def test_numbers_that_cannot_work_are_refused(good: Path) -> None:
    good.write_text(edited("lr: 0.05", f"lr: {'9' * 40}"))
    with pytest.raises(InputError, match=r"train\.lr: expected a number above 0 and at most 1e\+30, found 9999"):
        load_recipe(good)


def test_the_help_of_model_name_lists_every_network_of_ours() -> None:
    assert str(ModelOptions.model_fields["name"].description).startswith(", ".join(BUILTIN) + ";")


@pytest.mark.parametrize("value", ["1", "auto8", "[4]", "2.5", "true"])
def test_an_option_of_two_types_is_one_problem(good: Path, value: str) -> None:
    shown = {"auto8": "'auto8'", "[4]": "a list"}.get(value, value)
    expected = f"prune.round_to: expected an integer of at least 2 or auto, found {shown}"
    assert problems(good, f"prune.round_to={value}") == [f"--set prune.round_to={value}: {expected}"]
    for fine in ("auto", "8", "null"):
        load_recipe(good, [f"prune.round_to={fine}"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("report.runtimes=[compiled, compiled]", "expected each of them once, found compiled, compiled"),
        ("report.runtimes=[eager]", "expected one of compiled, onnxruntime, found 'eager'"),
        ("prune.runtime=onnx", "expected one of eager, compiled, onnxruntime, found 'onnx'"),
    ],
)
def test_runtimes_that_there_are_not(good: Path, override: str, expected: str) -> None:
    (problem,) = problems(good, override)
    assert expected in problem
