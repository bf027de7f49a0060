"""The table, the folds and the report, from sets of cells in memory."""

import json

import numpy as np
import pytest

from diffusers_byoc.data import CellFolder, PhantomCells, VolumeProcessor, write_ome_tiff
from diffusers_byoc.evaluation import (
    FEATURES,
    METRICS,
    CellSet,
    Comparison,
    EvaluationSettings,
    Metric,
    Results,
    Variant,
    compare_rows,
    extract_features,
    make_folds,
    metric_table,
    real_cells,
    write_report,
)


ALL_BUT_MED3D = ["morphology", "texture", "grid", "voxels"]


@pytest.fixture(scope="module")
def volumes():
    cells = PhantomCells(34, VolumeProcessor(sample_size=32), ["nocodazole", "blebbistatin"], seed=7)
    return np.stack([(cells[index]["volumes"].numpy() + 1) / 2 for index in range(34)])


def judge(folder, real_volumes, generated_volumes, channel_names, kinds, classifier_cells=0):
    """Results of a whole evaluation, and what it wrote."""
    (folder / "cells").mkdir()
    for index, volume in enumerate(real_volumes):
        write_ome_tiff(folder / "cells" / f"{index:02}.ome.tif", volume, (1, 1, 1), channel_names)
    processor = VolumeProcessor(sample_size=32, num_channels=len(channel_names), channel_names=channel_names)
    cells = CellFolder(folder / "cells", processor)
    settings = EvaluationSettings(
        channel_names=channel_names,
        classifier_cells=classifier_cells,
    )
    extractors = {kind: FEATURES[kind](settings) for kind in kinds}
    sets = CellSet("generated", len(generated_volumes), lambda i: generated_volumes[i]), real_cells(cells)
    features = {}
    for cell_set in sets:
        features |= extract_features(cell_set, extractors, folder / "cache")
    folds = make_folds(cells, folder, num_folds=2)
    found = compare_rows(sets, features, extractors, folds, settings, folder / "cache")
    names = {kind: extractor.names for kind, extractor in extractors.items() if extractor.names}
    write_report(
        folder,
        Results(
            "a test", False, sets, features, names, found, channel_names, (1, 1, 1), {}, ["A note."], {"all": 1.0}, {}
        ),
    )
    return found, (folder / "metrics.md").read_text(), json.loads((folder / "metrics.json").read_text())


def test_every_metric_stands_in_every_column_and_in_the_page(volumes, tmp_path):
    found, page, record = judge(
        tmp_path, volumes[:22], volumes[22:], ("cell", "nucleus"), ALL_BUT_MED3D, classifier_cells=5
    )
    assert len(found) == 2 and list(found[0]) == ["generated", "real", "shuffled channels", "blurred"]
    keys = {f"{kind}/{metric.name}" for metric in METRICS for kind in metric.kinds if kind != "med3d"}
    undefined = {"morphology/class_accuracy", "texture/class_accuracy"}  # of cells without classes
    for fold in found:
        for row, values in fold.items():
            assert keys <= set(values), row
    for metric in METRICS:
        for kind in metric.kinds:
            is_shown = kind != "med3d" and f"{kind}/{metric.name}" not in undefined
            assert (f"| {metric.title_of(kind)} | {metric.good} |" in page) == is_shown, (kind, metric.name)
    assert "| generated | real | shuffled channels | blurred |" in page and "> A note." in page
    summary = record["summary"]
    assert summary["blurred"]["morphology/frechet"]["mean"] > 5 * summary["real"]["morphology/frechet"]["mean"]
    assert summary["generated"]["morphology/frechet"]["mean"] < summary["blurred"]["morphology/frechet"]["mean"]
    values = [fold["generated"]["morphology/frechet"] for fold in found]
    assert summary["generated"]["morphology/frechet"]["std"] == pytest.approx(np.std(values, ddof=1))
    accuracy = [found[0]["blurred"][f"morphology/classifier_accuracy{end}"] for end in ("_low", "", "_high")]
    assert accuracy == sorted(accuracy)
    for name in ("cells.png", "metrics.png", "distributions_morphology.png", "spectra.png", "nearest.png"):
        assert (tmp_path / name).stat().st_size > 1000 and f"({name})" in page
    assert json.loads((tmp_path / "split_0.json").read_text())["held_out"]


def test_one_channel_is_judged_on_the_morphology_of_its_cell(volumes, tmp_path):
    found, page, _ = judge(tmp_path, volumes[:22, :1], volumes[22:, :1], ("membrane",), ["morphology", "voxels"])
    assert list(found[0]) == ["generated", "real", "blurred"] and "shuffled channels |" not in page
    assert "| Fréchet distance, morphology |" in page and "cell_volume_um3" in page
    assert "nucleus_volume_um3" not in page and "one nucleus" not in page.split("## ")[0].split("| metric")[1]
    both = {row: values["morphology/frechet"] for row, values in found[0].items()}
    assert np.isfinite(list(both.values())).all() and both["blurred"] > 3 * both["real"]


def test_what_the_3d_network_found_is_kept_without_changing_the_cells_again(tmp_path, monkeypatch):
    changes = []

    def negative(volumes):
        changes.append(len(volumes))
        return -volumes

    cells = np.random.default_rng(0).random((30, 1, 2, 2, 2), np.float32)
    real = CellSet("real", 30, lambda i: cells[i], variants={"negative": Variant("negative", negative)})
    folds = [(np.arange(10), np.arange(10, 30)), (np.arange(20, 30), np.arange(20))]
    monkeypatch.setattr(
        "diffusers_byoc.evaluation.comparison.compute_metrics", lambda kind, c: {"mean": float(c.candidate.mean())}
    )
    again = [compare_rows([real], {}, {}, folds, EvaluationSettings(classifier_cells=5), tmp_path) for _ in range(2)]
    assert again[0] == again[1] and changes == [5, 5]
    assert all(fold["negative"]["mean"] < 0 < fold["real"]["mean"] for fold in again[0])


def test_a_new_row_of_the_table_reaches_the_results_and_the_page(volumes, tmp_path, monkeypatch):
    rows = (
        *METRICS,
        Metric("mean_offset", "offset of the means", "0", ("voxels",), lambda c: c.candidate.mean() - c.real.mean()),
    )
    monkeypatch.setattr(metric_table, "METRICS", rows)
    monkeypatch.setattr("diffusers_byoc.evaluation.report.METRICS", rows)
    found, page, _ = judge(tmp_path, volumes[:22], volumes[22:], ("cell", "nucleus"), ["voxels"])
    assert abs(found[0]["real"]["voxels/mean_offset"]) < 0.05
    assert "| offset of the means | 0 |" in page


def test_classes_are_learned_from_a_row_and_named_in_held_out_real_cells():
    generator = np.random.default_rng(0)
    labels = np.tile(["a", "b"], 30)
    real, good, bad = generator.normal(size=(3, 60, 2))
    real[labels == "b"] += 6
    good[labels == "b"] += 6

    def accuracy(candidate, labels):
        comparison = Comparison(real, candidate, real, ("x", "y"), False, EvaluationSettings(), labels)
        return metric_table.compute_metrics("texture", comparison)["texture/class_accuracy"]

    assert accuracy(good, (labels, labels)) > 0.95
    assert accuracy(bad, (labels, labels)) < 0.8
    assert np.isnan(accuracy(good, None)) and np.isnan(accuracy(good, (labels, np.repeat("a", 60))))


@pytest.mark.parametrize("value", [np.nan, 0.5])
def test_empty_cells_teach_no_classes_and_equal_ones_chance(value):
    labels, real = np.tile(["a", "b"], 10), np.random.default_rng(0).random((20, 3))
    names, both = ("x", "y", "z"), (labels, labels)
    comparison = Comparison(real, np.full((20, 3), value), real, names, False, EvaluationSettings(), both)
    found = metric_table.compute_metrics("texture", comparison)
    of_classes = [f"class_accuracy{end}" for end in ("", "_low", "_high")]
    undefined = {f"texture/{name}" for name in (*of_classes, "features_that_differ", "median_effect")}
    assert {key for key, number in found.items() if np.isnan(number)} == (undefined if np.isnan(value) else set())
    assert found["texture/classifier_accuracy"] > 0.9
    assert np.isnan(value) or found["texture/class_accuracy"] == 0.5


def test_volumes_are_compared_by_mean_and_spread():
    real = np.random.default_rng(0).lognormal(size=(30, 1))
    candidate = 3 * real - real.mean()
    comparison = Comparison(real, candidate, real, ("cell_volume_um3",), False, EvaluationSettings())
    by_name = {metric.name: metric.compute for metric in METRICS}
    assert by_name["volume_mean"](comparison) == pytest.approx(2)
    assert by_name["volume_spread"](comparison) == pytest.approx(3)


def test_functions_that_several_rows_share_are_called_once():
    calls = []
    comparison = Comparison(*np.random.default_rng(0).random((3, 8, 2)), None, False, EvaluationSettings())
    for _ in range(2):
        assert comparison.once(lambda c, calls=calls: calls.append(c)) is None
    function = calls.append
    comparison.once(function), comparison.once(function)
    assert len(calls) == 3


def test_few_real_cells_are_refused(volumes):
    cells = PhantomCells(20, VolumeProcessor(sample_size=32), ["nocodazole"], seed=7)
    with pytest.raises(ValueError, match="at least 10 real cells on each side of a split, got 4 of 20"):
        make_folds(cells, num_folds=5)
