import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier

from diffusers_byoc.metrics import transfer_test


def cells(num, shift, seed, num_classes=2):
    """(N, 3) features of which the second tells the classes apart, and their names."""
    generator = np.random.default_rng(seed)
    labels = np.array([f"drug {index % num_classes}" for index in range(num)])
    features = generator.normal(size=(num, 3))
    features[:, 1] += shift * np.array([int(label[-1]) for label in labels])
    return features, labels


def test_what_tells_the_classes_apart_is_carried_over_and_its_lack_shows():
    held_out = cells(200, 6.0, 0)
    good = transfer_test(*cells(100, 6.0, 1), *held_out)
    shuffled, labels = cells(100, 6.0, 2)
    bad = transfer_test(shuffled, np.random.default_rng(0).permutation(labels), *held_out)
    assert good.accuracy > 0.97 and good.num_cells == 200
    assert abs(bad.accuracy - 0.5) < 0.2
    assert good.interval[0] < good.accuracy < good.interval[1] <= 1 and good.interval[0] > bad.interval[1]


def test_the_accuracy_is_that_of_the_trees_and_the_interval_wilsons():
    training, held_out = cells(60, 1.0, 1, 3), cells(50, 1.0, 0, 3)
    found = transfer_test(*training, *held_out, seed=4)
    trees = HistGradientBoostingClassifier(min_samples_leaf=6, random_state=4).fit(*training)
    assert found.accuracy == trees.score(*held_out)
    z, n, p = 1.959964, 50, found.accuracy
    center, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = [(center + sign * half) / (1 + z**2 / n) for sign in (-1, 1)]
    assert found.interval == pytest.approx(expected, abs=1e-6)


def test_a_class_that_was_never_generated_is_never_right():
    held_out = cells(90, 8.0, 0, 3)
    features, labels = cells(90, 8.0, 1, 3)
    two = labels != "drug 2"
    assert transfer_test(features[two], labels[two], *held_out).accuracy == pytest.approx(2 / 3, abs=0.05)


@pytest.mark.parametrize(
    ("labels", "message"),
    [(["a"] * 10, "at least two classes"), (["a", "b"], "a label for each of 10 and 10 cells, got 2 and 10")],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    features = np.zeros((10, 2))
    with pytest.raises(ValueError, match=message):
        transfer_test(features, labels, features, ["a"] * 10)


def test_cells_without_any_feature_are_refused():
    with pytest.raises(ValueError, match="at least one of 3 features, got 10 that have none"):
        transfer_test(np.full((10, 3), np.nan), ["a", "b"] * 5, np.zeros((2, 3)), ["a", "b"])
