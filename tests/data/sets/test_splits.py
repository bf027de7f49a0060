import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusers_byoc.data import Population, read_split, split_cells, write_split


def population(groups, labels=None):
    ids = tuple(f"cell {index}" for index in range(len(groups)))
    return Population(ids, tuple(labels or ["a"] * len(groups)), tuple(map(str, groups)))


SINGLE = population(range(100), ["a"] * 50 + ["b"] * 30 + ["c"] * 20)
labels_and_groups = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), min_size=1, max_size=60)


def count(population, ids):
    label_of = dict(zip(population.ids, population.labels, strict=True))
    return {name: sum(label_of[cell] == name for cell in ids) for name in "abc"}


def test_the_default_is_80_to_20_of_every_label():
    split = split_cells(SINGLE)
    assert count(SINGLE, split.held_out) == {"a": 10, "b": 6, "c": 4}
    assert count(SINGLE, split.train) == {"a": 40, "b": 24, "c": 16}


def test_every_cell_is_held_out_in_one_fold():
    splits = [split_cells(SINGLE, num_folds=5, fold=fold) for fold in range(5)]
    assert sorted(cell for split in splits for cell in split.held_out) == sorted(SINGLE.ids)
    for split in splits:
        assert count(SINGLE, split.held_out) == {"a": 10, "b": 6, "c": 4}
        assert sorted((*split.train, *split.held_out)) == sorted(SINGLE.ids)


@given(labels_and_groups, st.integers(2, 5), st.integers(0, 3), st.randoms())
def test_groups_stay_together_whatever_the_order(cells, num_folds, seed, random):
    labels, groups = zip(*cells, strict=True)
    whole = population(groups, labels)
    if len(set(groups)) < num_folds:
        with pytest.raises(ValueError, match="groups"):
            split_cells(whole, num_folds=num_folds, fold=0, seed=seed)
        return
    order = random.sample(range(len(cells)), len(cells))
    shuffled = Population(*(tuple(column[i] for i in order) for column in (whole.ids, whole.labels, whole.groups)))
    group_of = dict(zip(whole.ids, whole.groups, strict=True))
    held_out = []
    for options in [{"num_folds": num_folds, "fold": fold} for fold in range(num_folds)] + [{}]:
        split = split_cells(whole, seed=seed, **options)
        assert split.train and split.held_out
        assert not {group_of[cell] for cell in split.train} & {group_of[cell] for cell in split.held_out}
        assert split_cells(shuffled, seed=seed, **options) == split
        held_out += split.held_out if options else ()
    assert sorted(held_out) == sorted(whole.ids)


def test_groups_of_different_sizes_come_near_the_share():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), rng.integers(1, 60, 40))
    labels = [str(label) for label in np.array(["a", "b", "c"])[groups % 3]]
    whole = population(groups, labels)
    split = split_cells(whole)
    for name, total in count(whole, whole.ids).items():
        assert abs(count(whole, split.held_out)[name] - 0.2 * total) < 0.05 * total


def test_the_seed_decides():
    assert split_cells(SINGLE, seed=1) == split_cells(SINGLE, seed=1)
    assert split_cells(SINGLE, seed=1).held_out != split_cells(SINGLE, seed=0).held_out


def test_nothing_held_out():
    split = split_cells(population([0, 0, 0]), held_out_share=0)
    assert len(split.train) == 3 and split.held_out == ()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"held_out_share": 1.0}, r"\[0, 1\), got 1.0"),
        ({"held_out_share": float("nan")}, r"\[0, 1\), got nan"),
        ({"num_folds": 1, "fold": 0}, "at least 2"),
        ({"num_folds": 5, "fold": 5}, "0 to 4, got 5"),
        ({"num_folds": 5}, "0 to 4, got None"),
        ({"fold": 1}, "Expected `num_folds`"),
        ({"num_folds": 101, "fold": 0}, "at least 101 groups"),
        ({"seed": -1}, "seed"),
    ],
)
def test_refusals(options, match):
    with pytest.raises(ValueError, match=match):
        split_cells(SINGLE, **options)


def test_one_source_image_cannot_be_split():
    with pytest.raises(ValueError, match=r"at least 2 groups .* got 1 \(plate\). Group by another column"):
        split_cells(population(["plate"] * 9))


def test_file_round_trip(tmp_path):
    split = split_cells(SINGLE, num_folds=5, fold=2, seed=7)
    write_split(tmp_path / "run" / "split.json", split)
    assert read_split(tmp_path / "run" / "split.json", SINGLE) == split
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["split.json"]


@pytest.mark.parametrize(
    "other",
    [
        population(range(99), ["a"] * 50 + ["b"] * 30 + ["c"] * 19),
        population(range(101), ["a"] * 51 + ["b"] * 30 + ["c"] * 20),
        population(range(100), ["a"] * 49 + ["b"] * 31 + ["c"] * 20),
    ],
)
def test_a_split_of_other_cells_is_refused(tmp_path, other):
    write_split(tmp_path / "split.json", split_cells(SINGLE))
    with pytest.raises(ValueError, match="Expected the 100 cells for which .*split.json"):
        read_split(tmp_path / "split.json", other)


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"train": 3, "held_out": []})])
def test_what_is_no_split_is_refused(tmp_path, content):
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(ValueError, match="Expected a split file, got .*split.json"):
        read_split(tmp_path / "split.json", SINGLE)
