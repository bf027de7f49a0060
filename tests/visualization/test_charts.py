import numpy as np
import pytest

from diffusers_byoc.visualization import degradation_curves, feature_distributions, metric_bars


def legend_texts(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_bars_are_means_and_whiskers_standard_deviations():
    scores = {"FID": {"ours": {"A": [1, 2, 3], "B": 5.0}, "theirs": {"B": [4, 6]}}, "MMD": {"ours": {"A": [7.0]}}}
    figure = metric_bars(scores)
    fid, mmd = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["FID", "MMD"]
    assert [bar.get_height() for bar in fid.patches] == [2, 5, 5]
    assert [bar.get_height() for bar in mmd.patches] == [7]
    whiskers = [
        container.lines[2][0].get_segments()[0][:, 1] for container in fid.containers if hasattr(container, "has_yerr")
    ]
    np.testing.assert_allclose(whiskers, [[1, 3], [5 - 2**0.5, 5 + 2**0.5]])
    assert legend_texts(figure) == ["ours", "theirs"]
    assert [label.get_text() for label in fid.get_xticklabels()] == ["A", "B"]
    centers = [bar.get_x() + bar.get_width() / 2 for bar in fid.patches]
    assert centers[0] < 0 < centers[1] - 0.5 and centers[1] < 1 < centers[2]


def test_distributions_are_densities_over_common_bins():
    rng = np.random.default_rng(0)
    features = {
        "real": {"volume": rng.normal(10, 1, 200), "parts": [1, 1, 2]},
        "generated": {"volume": [*rng.normal(12, 1, 49), np.nan], "parts": [1, 3]},
    }
    figure = feature_distributions(features, p_values={"volume": 1e-9}, distances={"volume": 2.0, "parts": 0.5})
    volume, parts = figure.axes
    assert volume.get_title() == "volume\np < 0.001, W = 2\nundefined: 1 generated"
    assert parts.get_title() == "parts\nW = 0.5"
    assert legend_texts(figure) == ["real (n = 200)", "generated (n = 50)"]
    for axes in figure.axes:
        edges = [stairs.get_data().edges for stairs in axes.patches]
        assert all(np.array_equal(edges[0], other) for other in edges)
        for stairs in axes.patches:
            assert (stairs.get_data().values * np.diff(stairs.get_data().edges)).sum() == pytest.approx(1)
    np.testing.assert_allclose(parts.patches[0].get_data().values, [2 / 3, 1 / 3, 0])
    assert [line.get_xdata()[0] for line in parts.lines] == [1, 2]


def test_a_count_in_which_no_cell_differs_has_the_bin_of_a_count():
    (axes,) = feature_distributions({"real": {"parts": [2, 2, 2]}, "generated": {"parts": [2]}}).axes
    np.testing.assert_allclose(axes.patches[0].get_data().edges, [1.5, 2.5])
    assert all(tick == round(tick) for tick in axes.get_xticks())


def test_a_legend_stands_in_one_row_where_it_fits_and_in_equal_rows_else():
    def legend_columns(*methods):  # in a figure of 6.4 inches
        scores = {metric: {method: {"": 1.0} for method in methods} for metric in ("FID", "MMD")}
        return metric_bars(scores).legends[0]._ncols

    assert legend_columns("generated", "real", "shuffled channels", "blurred") == 4
    assert legend_columns(*(f"a long name, {index}" for index in range(4))) == 2


@pytest.mark.parametrize("values", [[3.0], [3.0, 3.0], [0.0, 0.0], [np.nan, np.nan], [0.0, 1e-3, 1e12], [-1e30, 1e30]])
def test_odd_distributions_are_drawn(values):
    figure = feature_distributions({"real": {"f": values}, "generated": {"f": [1.0, 2.0]}})
    figure.canvas.draw()
    assert len(figure.axes[0].patches[0].get_data().values) <= 40


def test_curves_are_means_over_repeats_in_a_band():
    figure = degradation_curves(
        {"blur": [0, 1, 2], "noise": [0.0, 0.5]}, {"FID": {"blur": [[0, 0], [1, 3], [4, 4]], "noise": [1, 2]}}
    )
    axes = figure.axes[0]
    blur, noise = axes.lines
    np.testing.assert_allclose(blur.get_xydata(), [[0, 0], [1, 2], [2, 4]])
    np.testing.assert_allclose(noise.get_xydata(), [[0, 1], [0.5, 2]])
    (band,) = axes.collections
    vertices = band.get_paths()[0].vertices
    middle = vertices[vertices[:, 0] == 1][:, 1]
    assert (middle.min(), middle.max()) == pytest.approx((2 - 2**0.5, 2 + 2**0.5))
    assert legend_texts(figure) == ["blur", "noise"]


def test_no_two_of_fifteen_curves_look_alike():
    figure = degradation_curves([0, 1], {"FID": {str(index): [0, 1] for index in range(15)}})
    assert len({(line.get_color(), line.get_marker()) for line in figure.axes[0].lines}) == 15


@pytest.mark.parametrize(("num_panels", "expected"), [(1, 1), (3, 3), (4, 2), (5, 3), (9, 3)])
def test_panels_stand_in_even_rows(num_panels, expected):
    figure = degradation_curves([0, 1], {str(index): {"blur": [0, 1]} for index in range(num_panels)})
    figure.canvas.draw()
    assert len({round(axes.get_position().x0, 3) for axes in figure.axes}) == expected
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metric_bars({}), "at least a metric.*got nothing"),
        (lambda: metric_bars({"FID": [1, 2]}), "at least a method.*got list"),
        (lambda: metric_bars({"FID": {"ours": {"A": [1, np.nan]}}}), r"finite .*\['ours'\]\['A'\], got nan in 1 of 2"),
        (lambda: metric_bars({"FID": {"ours": {"A": []}}}), "row of finite numbers"),
        (lambda: metric_bars({"FID": {"ours": {"A": 1}}}, num_columns=0), "num_columns"),
        (lambda: feature_distributions({"a": {"f": [1]}, "b": {"g": [1]}}), r"same features.*\['f', 'g'\]"),
        (lambda: feature_distributions({"a": {"f": [np.inf]}}), "finite"),
        (
            lambda: feature_distributions({"a": {"f": [1]}}, p_values={"g": 0.1}),
            r"p_values of some of .*, got \['g'\]",
        ),
        (lambda: degradation_curves([0, 1], {"FID": {"blur": [1, 2, 3]}}), r"2 levels .*, got shape \(3,\)"),
        (lambda: degradation_curves([1, 0], {"FID": {"blur": [1, 2]}}), "that rise"),
        (lambda: degradation_curves({"noise": [0, 1]}, {"FID": {"blur": [1, 2]}}), r"got none of \['blur'\]"),
        (lambda: degradation_curves([0, 1], {"FID": {"blur": [1, np.nan]}}), "finite"),
    ],
)
def test_bad_input_is_refused_with_the_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()
