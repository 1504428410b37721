"""The true probabilities of pinads: closed form, true to the labels, and turned by their parameters."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from mldcn.datasets.pinads import Contexts, PinadsConfig, World, batches, bayes, label_matrix, simulate
from mldcn.datasets.pinads.log import PairCounts
from mldcn.datasets.pinads.truth import TERMS, WEIGHTS
from mldcn.datasets.pinads.world import DEVICES, SURFACES, TASKS, stream

SMALL = PinadsConfig(num_users=400, num_items=150, num_advertisers=15, chunk_requests=256)
SIZE = 40_000


@pytest.fixture(scope="module")
def world() -> World:
    return World(SMALL)


@pytest.fixture(scope="module")
def log(world):
    parts = list(batches(world, SIZE))
    frame = pl.concat([pl.from_arrow(batch) for batch, _ in parts])
    truth = np.concatenate([probability for _, probability in parts])
    labels = np.concatenate([label_matrix(batch) for batch, _ in parts])
    return frame, truth, labels


def traffic(world: World, size: int = 4000):
    return world.traffic(stream(7, 99), size)


def test_the_truth_of_a_logged_row_follows_from_its_columns_alone(world, log):
    frame, truth, _ = log
    contexts = Contexts(
        time=frame["timestamp"].to_numpy(),
        surface=np.array([SURFACES.index(name) for name in frame["surface"]]),
        device=np.array([DEVICES.index(name) for name in frame["device"]]),
        position=frame["position"].to_numpy(),
    )
    assert (contexts.hour == frame["hour"].to_numpy()).all()
    assert (contexts.weekday == frame["weekday"].to_numpy()).all()
    users = frame["user_id"].to_numpy() - 1
    items = world.item_rows(frame["pin_id"].to_numpy())
    assert (world.items.pin_id[items] == frame["pin_id"].to_numpy()).all()
    assert np.array_equal(World(SMALL).probability(users, items, contexts), truth)


@pytest.mark.parametrize("task", range(4))
def test_labels_come_as_often_as_their_true_probability_says(log, task):
    # Twenty groups of rows by probability: each group's count of positives within 4.5 deviations, and the
    # sum of squares of all twenty (chi-squared, mean 20) not absurd.
    _, truth, labels = log
    known = ~np.isnan(labels[:, task])
    p, y = truth[known, task], labels[known, task]
    z = []
    for rows in np.array_split(np.argsort(p), 20):
        z.append((y[rows].sum() - p[rows].sum()) / np.sqrt((p[rows] * (1 - p[rows])).sum()))
    assert np.abs(z).max() < 4.5
    assert np.square(z).sum() < 50


def test_the_logs_rates_are_those_asked_for(log):
    _, _, labels = log
    assert np.nanmean(labels, axis=0) == pytest.approx(SMALL.rates, rel=0.2)


def test_bayes_is_what_scikit_learn_says_of_the_true_probabilities(log):
    _, truth, labels = log
    told = bayes(truth, labels)
    for task, name in enumerate(TASKS):
        known = ~np.isnan(labels[:, task])
        p, y = truth[known, task], labels[known, task]
        assert told[name]["rows"] == known.sum()
        assert told[name]["auc_on_labels"] == pytest.approx(roc_auc_score(y, p), abs=1e-4)
        assert told[name]["logloss_on_labels"] == pytest.approx(log_loss(y, p), abs=1e-9)
        # The expected figures differ from those by the labels' luck only.
        assert told[name]["auc"] == pytest.approx(told[name]["auc_on_labels"], abs=0.02)
        assert told[name]["logloss"] == pytest.approx(told[name]["logloss_on_labels"], rel=0.05)


def test_expected_auc_is_the_sum_over_all_pairs():
    p = np.random.default_rng(3).uniform(0.01, 0.9, size=(200, 4))
    told = bayes(p, np.zeros((200, 4)))
    for task, name in enumerate(TASKS):
        q = p[:, task]
        pairs = q[:, None] * (1 - q)[None, :]
        above = (q[:, None] > q[None, :]) + 0.5 * (q[:, None] == q[None, :])
        assert told[name]["auc"] == pytest.approx((pairs * above).sum() / pairs.sum(), abs=1e-4)
        assert told[name]["auc_on_labels"] is None


def test_no_model_of_other_scores_beats_the_truth(log):
    _, truth, labels = log
    noise = np.random.default_rng(0).normal(size=len(truth))
    best = roc_auc_score(labels[:, 0], truth[:, 0])
    assert roc_auc_score(labels[:, 0], np.log(truth[:, 0]) + 0.5 * noise) < best


def test_terms_are_standardised_and_add_up_to_the_logit(world):
    users, items, contexts = traffic(world)
    terms = world.terms(users, items, contexts)
    assert set(terms) == set(WEIGHTS["mixed"])
    for values in terms.values():
        assert np.abs(values.mean(axis=0)).max() < 0.15
        assert values.std(axis=0) == pytest.approx(np.ones(4), abs=0.15)
    logit = world.bias - world.position_effect * np.log(contexts.position)[:, None]
    logit = logit + sum(world.weights[term] * values for term, values in terms.items())
    assert np.allclose(logit, world.logit(users, items, contexts))
    assert np.allclose(1 / (1 + np.exp(-logit)), world.probability(users, items, contexts))


def test_position_takes_from_click_and_save_only(world):
    users, items, contexts = traffic(world, 500)
    top = Contexts(contexts.time, contexts.surface, contexts.device, np.ones(500, dtype=np.int64))
    fifth = Contexts(contexts.time, contexts.surface, contexts.device, np.full(500, 5))
    lost = world.logit(users, items, top) - world.logit(users, items, fifth)
    assert np.allclose(lost, SMALL.position_effect * np.log(5) * np.array([1, 0, 0, 1]))
    blind = World(SMALL.model_copy(update={"position_effect": 0.0}))
    assert np.array_equal(blind.probability(users, items, top), blind.probability(users, items, fifth))


@pytest.mark.parametrize("truth", ["mixed", "low_order", "dense"])
def test_each_kind_of_truth_has_its_terms_at_alike_difficulty(truth):
    world = World(SMALL.model_copy(update={"truth": truth}))
    users, items, contexts = traffic(world)
    assert set(world.terms(users, items, contexts)) == set(WEIGHTS[truth])
    p = world.probability(users, items, contexts)
    assert bayes(p, np.zeros_like(p))["click"]["auc"] == pytest.approx(0.84, abs=0.04)


def test_low_order_truth_is_of_order_two():
    # A function of order two has no third difference over user, item and context changed together.
    world = World(SMALL.model_copy(update={"truth": "low_order", "position_effect": 0.0}))
    mixed = World(SMALL.model_copy(update={"position_effect": 0.0}))
    rng = np.random.default_rng(5)
    n = 300
    users, items = rng.integers(400, size=(2, n)), rng.integers(150, size=(2, n))
    moments = [traffic(world, n)[2], World(SMALL).traffic(stream(8, 1), n)[2]]

    def third(of: World) -> np.ndarray:
        return sum(
            (-1) ** (a + b + c) * of.logit(users[a], items[b], moments[c])
            for a in (0, 1)
            for b in (0, 1)
            for c in (0, 1)
        )

    assert np.abs(third(world)).max() < 1e-4
    assert np.abs(third(mixed)).mean() > 0.3


def test_the_gate_decides_which_crosses_count(world):
    # Averaged over contexts away, the gated term still depends on the context for most pairs.
    users, items, contexts = traffic(world)
    gate = np.exp(3.0 * world._gate(users, items, contexts))
    gate /= gate.sum(axis=1, keepdims=True)
    assert (gate.max(axis=1) > 0.6).mean() > 0.6
    assert np.bincount(gate.argmax(axis=1), minlength=4).min() > 0.05 * len(gate)


def test_weights_turn_single_terms():
    world = World(SMALL.model_copy(update={"weights": {"gated": 0.0, "dense": 0.5}}))
    assert "gated" not in world.weights
    assert world.weights["dense"] == 0.5
    assert set(WEIGHTS["mixed"]) <= set(TERMS)
    with pytest.raises(ValueError, match="unknown term 'gate'"):
        World(SMALL.model_copy(update={"weights": {"gate": 1.0}}))


def test_the_world_does_not_depend_on_the_logs_size(world):
    users, items, contexts = traffic(world, 100)
    before = world.probability(users, items, contexts)
    config = SMALL.model_copy(update={"warm_up": 0.0})
    first, other = (next(simulate(World(config), size))[0] for size in (500, 5000))
    assert np.array_equal(first.users, other.users[:500])
    assert np.array_equal(world.probability(users, items, contexts), before)


def test_pair_counts_add_up():
    rng = np.random.default_rng(0)
    counts, plain = PairCounts(2), np.zeros((50, 2), dtype=np.int64)
    for size in (0, 5, 300, 1, 40, 40, 7):
        keys, values = rng.integers(50, size=size), rng.integers(3, size=(size, 2))
        counts.add(keys, values)
        np.add.at(plain, keys, values)
        assert np.array_equal(counts.get(np.arange(50)), plain)
