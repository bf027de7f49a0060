from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from diffusers_byoc.data import PhantomCells, VolumeProcessor
from diffusers_byoc.evaluation import FEATURES, CellSet, EvaluationSettings, Extractor, Variant, extract_features


def counted_set(num_cells, reads, changes):
    def volume(index):
        reads[index] += 1
        return np.full((2, 4, 4, 4), index, np.float32)

    def negative(volumes):
        changes.update(volumes[:, 0, 0, 0, 0].astype(int).tolist())
        return -volumes

    return CellSet("real", num_cells, volume, variants={"negative": Variant("negative", negative)})


def first(volumes):
    return volumes[:, 0, 0, 0, :1]


def double(volumes):
    return 2 * first(volumes)


def test_each_cell_is_read_once_and_changed_once_for_all_kinds_of_features(tmp_path):
    reads, changes = Counter(), Counter()
    cells = counted_set(40, reads, changes)
    extractors = {"first": Extractor("first", first), "double": Extractor("double", double)}
    features = extract_features(cells, extractors, tmp_path)
    assert reads == changes == Counter(range(40))
    for row, sign in (("real", 1), ("negative", -1)):
        np.testing.assert_array_equal(features[row]["first"][:, 0], sign * np.arange(40))
        np.testing.assert_array_equal(features[row]["double"][:, 0], sign * 2 * np.arange(40))

    # again: read, to know that they are the same, but neither changed nor measured
    def never(volumes):
        raise AssertionError

    again = {kind: Extractor(kind, never) for kind in extractors}
    kept = extract_features(cells, again, tmp_path)
    assert changes == Counter(range(40))
    np.testing.assert_array_equal(kept["negative"]["double"], features["negative"]["double"])
    # without the row that is made of them, they are still the same cells
    alone = extract_features(replace(cells, variants={}), again, tmp_path)
    assert list(alone) == ["real"]
    np.testing.assert_array_equal(alone["real"]["double"], features["real"]["double"])
    # other settings are another identity
    with pytest.raises(AssertionError):
        extract_features(cells, {"first": Extractor("first, otherwise", never)}, tmp_path)


def test_channels_are_not_lent_between_neighbours(tmp_path):
    together = []

    def note(volumes):
        together.append(volumes[:, 0, 0, 0, 0].astype(int).tolist())
        return volumes

    cells = counted_set(64, Counter(), Counter())
    cells = CellSet("real", 64, cells.volume, variants={"noted": Variant("noted", note)})
    extract_features(cells, {"first": Extractor("first", first)}, tmp_path)
    assert min(b - a for chunk in together for a, b in zip(chunk, chunk[1:], strict=False)) == 4


def test_kinds_of_features_have_a_row_a_cell():
    cells = PhantomCells(2, VolumeProcessor(sample_size=32), ["nocodazole"], seed=7)
    volumes = np.stack([(cells[index]["volumes"].numpy() + 1) / 2 for index in range(2)])
    for settings, given in (
        (EvaluationSettings(), volumes),
        (EvaluationSettings(channel_names=("nucleus", "cell")), volumes[:, ::-1].copy()),
        (EvaluationSettings(channel_names=("membrane",)), volumes[:, :1]),
    ):
        for kind in FEATURES:
            if kind != "med3d":
                extractor = FEATURES[kind](settings)
                features = extractor.extract(given)
                assert features.ndim == 2 and len(features) == 2, kind
                assert extractor.names is None or len(extractor.names) == features.shape[1], kind
    found = [FEATURES["morphology"](EvaluationSettings()).extract(volumes)]
    found.append(
        FEATURES["morphology"](EvaluationSettings(channel_names=("nucleus", "cell"))).extract(volumes[:, ::-1].copy())
    )
    np.testing.assert_array_equal(*found)
