"""What neurons cost once others stand in for them, against least squares by brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dnr_plugin.scoring.brain_surgeon import Reader, damages, inverse_of, reproduce


def lost(x: np.ndarray, w: np.ndarray, gone: list[int]) -> float:
    """Mean square of what outputs lose without some centred inputs, the others' weights fitted to samples anew."""
    x = x - x.mean(0)
    y = x @ w.T
    stays = [k for k in range(x.shape[1]) if k not in gone]
    fitted = x[:, stays] @ np.linalg.lstsq(x[:, stays], y, rcond=None)[0] if stays else 0.0
    return float(((y - fitted) ** 2).sum(1).mean())


def brute_force(readers: list[tuple[np.ndarray, np.ndarray, list[int], list[list[int]]]], n: int) -> tuple[list, list]:
    """One neuron after another, with every cost computed from scratch."""
    order: list[int] = []
    costs, before = [0.0] * n, 0.0
    while len(order) < n:
        totals = {}
        for neuron in set(range(n)) - set(order):
            total = 0.0
            for x, w, neurons, columns in readers:
                gone = [c for k, own in zip(neurons, columns, strict=True) if k in [*order, neuron] for c in own]
                total += lost(x, w, gone)
            totals[neuron] = total
        cheapest = min(totals, key=lambda k: totals[k])
        order.append(cheapest)
        costs[len(order) - 1] = totals[cheapest] - before
        before = totals[cheapest]
    return order, costs


def made(
    draw: np.random.Generator, features: int, outputs: int, rows: int = 400, mix: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Correlated inputs with means, and weights of clearly different sizes."""
    x = draw.normal(size=(rows, features)) @ (np.eye(features) + mix * draw.normal(size=(features, features)))
    sizes = draw.permutation(1.5 ** (np.arange(features) % 12))
    return x + draw.normal(size=features), draw.normal(size=(outputs, features)) * sizes


def reader(x: np.ndarray, w: np.ndarray, neurons: list[int], columns: list[list[int]]) -> Reader:
    covariance = torch.from_numpy(np.cov(x.T, bias=True).reshape(x.shape[1], x.shape[1]))
    return Reader(inverse_of(covariance), torch.from_numpy(w), torch.tensor(neurons), torch.tensor(columns))


def single(x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[int], list[list[int]]]:
    return x, w, [*range(x.shape[1])], [[k] for k in range(x.shape[1])]


SCENES = ["single", "more outputs than inputs", "blocks", "several readers", "depthwise", "partial"]


def scene(name: str, seed: int) -> tuple[list[tuple[np.ndarray, np.ndarray, list[int], list[list[int]]]], int]:
    draw = np.random.default_rng(seed)
    if name == "single":
        return [single(*made(draw, 6, 4))], 6
    if name == "more outputs than inputs":
        return [single(*made(draw, 5, 20)), single(*made(draw, 5, 3))], 5
    if name == "blocks":  # three inputs each, as behind a flatten, not side by side
        x, w = made(draw, 12, 5, mix=0.3)
        return [(x, w, [0, 1, 2, 3], [[k, 4 + k, 8 + k] for k in range(4)])], 4
    if name == "several readers":
        x, w = made(draw, 10, 3, mix=0.3)
        blocks = (x, w, [2, 0, 1, 4, 3], [[2 * k, 2 * k + 1] for k in range(5)])
        return [single(*made(draw, 5, 4)), blocks, single(*made(draw, 5, 2))], 5
    if name == "depthwise":  # readers of one neuron each, beside one of all
        each = [made(draw, 2, 3) for _ in range(4)]
        return [single(*made(draw, 5, 4)), *((x, w, [k], [[1]]) for k, (x, w) in enumerate(each))], 5
    # neurons that only one of two readers reads, among inputs that are nobody's
    one, other = made(draw, 7, 4), made(draw, 5, 3)
    return [(*one, [0, 2, 3], [[1], [4], [6]]), (*other, [1, 3, 4], [[0], [2], [3]])], 5


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", SCENES)
def test_damages_equal_brute_force(name: str, seed: int) -> None:
    readers, n = scene(name, seed)
    order, costs = damages([reader(*r) for r in readers], n)
    expected, each = brute_force(readers, n)
    assert order == expected
    np.testing.assert_allclose(costs, each, rtol=5e-2, atol=5e-3 * sum(each))
    assert costs.dtype == torch.float64
    assert (costs >= 0).all()


def greedy(readers: list[tuple[np.ndarray, np.ndarray, int]], n: int) -> tuple[list[int], np.ndarray]:
    """Always the cheapest of all, of readers that are an inverse [n * M, n * M], weights and M."""
    readers, order, costs = [(p.copy(), w.copy(), m) for p, w, m in readers], [], []
    while len(order) < n:
        total = np.zeros(n)
        for p, w, m in readers:
            for k in set(range(n)) - set(order):
                own = slice(k * m, (k + 1) * m)
                total[k] += np.trace(np.linalg.solve(p[own, own], w[:, own].T @ w[:, own]))
        total[order] = np.inf
        gone = int(total.argmin())
        order.append(gone)
        costs.append(total[gone])
        for p, w, m in readers:
            own = slice(gone * m, (gone + 1) * m)
            correction = np.linalg.solve(p[own, own], p[own])
            w -= w[:, own] @ correction
            p -= p[:, own] @ correction
    return order, np.array(costs)


@pytest.mark.parametrize(("neurons", "features"), [(300, (1,)), (220, (1, 1)), (48, (4,)), (40, (1, 4))])
@pytest.mark.parametrize("twins", [False, True], ids=["", "twins"])
def test_rounds_take_what_one_by_one_would(neurons: int, features: tuple[int, ...], twins: bool) -> None:
    """Far more neurons than are looked at closely at a time; of twins only one is free."""
    draw, made_of = np.random.default_rng(neurons), []
    for m in features:
        size = neurons * m
        x = draw.normal(size=(4 * size, size)) @ (np.eye(size) + draw.normal(size=(size, size)) / size**0.5)
        if twins:
            x[:, size // 2 :] = x[:, : size - size // 2]
        w = draw.normal(size=(20, size)) * 1.3 ** draw.permutation(size).clip(0, 20)
        made_of.append((inverse_of(torch.from_numpy(np.cov(x.T, bias=True))), torch.from_numpy(w), m))
    columns = {m: torch.arange(neurons * m).view(neurons, m) for m in features}
    before = [(p.clone(), w.clone()) for p, w, _ in made_of]
    order, costs = damages([Reader(p.clone(), w, torch.arange(neurons), columns[m]) for p, w, m in made_of], neurons)
    expected, each = greedy([(p.numpy(), w.numpy(), m) for p, w, m in made_of], neurons)
    assert sorted(order) == [*range(neurons)]
    for share in (4, 2):
        count = neurons // share
        if not twins:  # of which either may go
            assert len({*order[:count]} & {*expected[:count]}) >= 0.85 * count
        assert float(costs[:count].sum()) <= 1.02 * each[:count].sum() + 1e-9
    assert all(torch.equal(p, a) and torch.equal(w, b) for (p, w, _), (a, b) in zip(made_of, before, strict=True))


@pytest.mark.parametrize("features", [1, 4])
def test_a_reader_may_run_out_of_neurons_long_before_others(features: int) -> None:
    """Of grouped convolutions each reads a few: here the first six neurons, which cost next to nothing."""
    draw, neurons = np.random.default_rng(0), 200
    x, w = draw.normal(size=(800, neurons)), draw.normal(size=(8, neurons))
    w[:, :6] *= 1e-3
    few, own = draw.normal(size=(800, 6 * features)), 1e-3 * draw.normal(size=(8, 6 * features))
    columns = np.arange(6 * features).reshape(6, features).tolist()
    order, costs = damages([reader(*single(x, w)), reader(few, own, [*range(6)], columns)], neurons)
    assert sorted(order) == [*range(neurons)]
    assert {*order[:6]} == {*range(6)}
    assert costs.isfinite().all()


@pytest.mark.parametrize("features", [1, 4])
def test_reproduce_equals_least_squares(features: int) -> None:
    """Weights of the remaining inputs, for a share of them that goes."""
    draw = np.random.default_rng(features)
    for share in (0.2, 0.5):
        x, w = made(draw, 10 * features, 6, rows=50 * features + 200, mix=0.2)
        x -= x.mean(0)
        gone = np.zeros(10 * features, dtype=bool)
        gone[draw.permutation(10 * features)[: int(share * 10 * features)]] = True
        halves = [np.cov(part.T, bias=True) for part in (x, x[::2], x[1::2])]
        change = reproduce([torch.from_numpy(c) for c in halves], torch.from_numpy(gone), torch.from_numpy(w))
        expected = np.linalg.lstsq(x[:, ~gone], x[:, gone] @ w[:, gone].T, rcond=None)[0].T

        def error(c: np.ndarray, x: np.ndarray = x, w: np.ndarray = w, gone: np.ndarray = gone) -> float:
            return float(((x[:, ~gone] @ c.T - x[:, gone] @ w[:, gone].T) ** 2).mean())

        assert change.shape == expected.shape
        assert error(change.numpy()) <= 1.02 * error(expected)


def test_damping_grows_where_there_are_few_samples() -> None:
    """Halves that do not confirm each other call for weights that change less."""
    draw = np.random.default_rng(0)
    x, w = draw.normal(size=(40, 30)), draw.normal(size=(5, 30))
    x[:, 20:] = 0.3 * x[:, :10] + draw.normal(size=(40, 10))
    gone = torch.arange(30) >= 20
    whole, *halves = (torch.from_numpy(part.T @ part / len(part)) for part in (x, x[::2], x[1::2]))
    careful = reproduce([whole, *halves], gone, torch.from_numpy(w))
    bold = reproduce([whole], gone, torch.from_numpy(w))
    assert careful.square().sum() < 0.9 * bold.square().sum()


@pytest.mark.parametrize(("neurons", "each"), [(32, 2), (300, 1)])
def test_the_sum_of_damages_is_what_the_outputs_lose(neurons: int, each: int) -> None:
    """A wide random layer: with the corrected weights, measured on the data, whatever order was taken."""
    draw, features = np.random.default_rng(0), neurons * each
    mix = np.eye(features) + 0.4 / features**0.5 * draw.normal(size=(features, features))  # damping hardly counts
    x, w = draw.normal(size=(10 * features, features)) @ mix, draw.normal(size=(32, features))
    x -= x.mean(0)
    covariance = torch.from_numpy(x.T @ x / len(x))
    columns = np.arange(features).reshape(neurons, each)
    read = Reader(inverse_of(covariance), torch.from_numpy(w), torch.arange(neurons), torch.from_numpy(columns))
    order, costs = damages([read], neurons)
    for count in (1, neurons // 2, neurons - 1):
        gone = torch.zeros(features, dtype=torch.bool)
        gone[columns[order[:count]].flatten()] = True
        change = reproduce([covariance], gone, torch.from_numpy(w)).numpy()
        left = w[:, ~gone.numpy()] + change
        actual = ((x @ w.T - x[:, ~gone.numpy()] @ left.T) ** 2).sum(1).mean()
        assert float(costs[:count].sum()) == pytest.approx(actual, rel=0.02)
        assert actual == pytest.approx(lost(x, w, np.flatnonzero(gone).tolist()), rel=0.02)


@pytest.mark.parametrize("readers", [1, 3])
def test_what_others_reproduce_goes_first_and_costs_nothing(readers: int) -> None:
    """A dead neuron, a constant one, one of each duplicated pair (not both), and a combination of others."""
    draw = np.random.default_rng(readers)
    x = draw.normal(size=(500, 12))
    x[:, 0], x[:, 1] = 0.0, 3.0
    x[:, 2] = 2 * x[:, 3] - x[:, 4] + 0.5 * x[:, 5]
    x[:, 6], x[:, 7] = x[:, 8] * 1.5, x[:, 9]
    weights = [draw.normal(size=(4, 12)) + 0.1 for _ in range(readers)]
    order, costs = damages([reader(*single(x, w)) for w in weights], 12)
    free, total = set(order[:5]), float(costs.sum())
    assert {0, 1} < free
    assert len({2, 3, 4, 5} & free) == 1  # any one of those that take part in the combination
    assert len({6, 8} & free) == 1
    assert len({7, 9} & free) == 1
    assert float(costs[:5].max()) < 1e-3 * total / 12
    assert float(costs[5]) > 0.01 * total / 12


@pytest.mark.parametrize("kind", ["zero", "constant rank", "one", "tiny", "no weights"])
def test_singular_covariances_give_finite_numbers(kind: str) -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(50, 8))
    if kind in ("zero", "tiny"):
        x *= {"zero": 0.0, "tiny": 1e-20}[kind]
    elif kind == "one":
        x[:] = x[:, :1]
    elif kind == "constant rank":
        x = x[:, :2] @ draw.normal(size=(2, 8))
    w = draw.normal(size=(4, 8)) * (kind != "no weights")
    for columns in ([[k] for k in range(8)], [[2 * k, 2 * k + 1] for k in range(4)]):
        order, costs = damages([reader(x, w, [*range(len(columns))], columns)], len(columns))
        assert sorted(order) == [*range(len(columns))]
        assert torch.isfinite(costs).all()
        assert (costs >= 0).all()
    covariance, gone = torch.from_numpy(x.T @ x / 50), torch.arange(8) < 5
    assert torch.isfinite(reproduce([covariance], gone, torch.from_numpy(w))).all()
    assert torch.isfinite(reproduce([covariance] * 3, gone, torch.from_numpy(w))).all()
