"""Charts of what is measured on cells: metrics, shapes, and how a metric answers to damage. On white, for print."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .canvas import check_columns, new_figure


if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch


#: Colours of methods, sets of cells and kinds of damage, in their order; a further one starts again at the first.
#: Source: Okabe and Ito 2008, "Color Universal Design".
SERIES_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_MAX_BINS = 40


def metric_bars(
    scores: Mapping[str, Mapping[str, Mapping[str, float | Sequence[float]]]],
    num_columns: int | None = None,
) -> Figure:
    """A panel a metric: a group of bars a data set, in it a bar a method (BYOC, Figure 6).

    A bar is the mean of its values, its whisker their standard deviation (n - 1), the dots the values themselves.

    Args:
        scores: metric -> method -> data set -> its values over repeats (folds, seeds), or one number, which gets no
            whisker: ``{"FID ↓": {"BYOC": {"Nocodazole": [1.9, 1.8, 2.0]}}}``. A method may lack data sets.
        num_columns: panels in a row; None takes up to 3.

    Returns:
        A figure on white, for `write_png` or for any matplotlib canvas.

    Raises:
        ValueError: if there is nothing to draw or a value is not finite.
        ImportError: if matplotlib is missing.
    """
    check_columns(num_columns)
    values = {
        metric: {
            method: {
                group: _finite(numbers, f"scores[{metric!r}][{method!r}][{group!r}]")
                for group, numbers in _filled(groups, f"scores[{metric!r}][{method!r}]", "a data set").items()
            }
            for method, groups in _filled(methods, f"scores[{metric!r}]", "a method").items()
        }
        for metric, methods in _filled(scores, "scores", "a metric").items()
    }
    methods = _union(values.values())
    groups = _union(by_group for by_method in values.values() for by_group in by_method.values())

    bar = min(0.84 / len(methods), 0.4)
    panel_width = max(3.2, 0.9 + len(groups) * max(0.75, 0.22 * len(methods)))
    figure, panels = _panels(len(values), num_columns, 3, panel_width, 2.9)
    for axes, (metric, by_method) in zip(panels, values.items(), strict=True):
        for index, method in enumerate(methods):
            color = _series_color(index)
            for place, group in enumerate(groups):
                numbers = by_method.get(method, {}).get(group)
                if numbers is None:
                    continue
                x = place + (index - (len(methods) - 1) / 2) * bar
                axes.bar(x, numbers.mean(), 0.92 * bar, color=color, alpha=0.75)
                if len(numbers) > 1:
                    axes.errorbar(x, numbers.mean(), numbers.std(ddof=1), color="black", linewidth=1.0, capsize=2.5)
                    spread = np.linspace(-0.18, 0.18, len(numbers)) * bar
                    axes.scatter(x + spread, numbers, s=7, color="black", alpha=0.55, linewidths=0, zorder=3)
        axes.set_xticks(range(len(groups)), groups)
        axes.set_xlim(-0.6, len(groups) - 0.4)
        _slant_long_ticks(axes, groups, panel_width)
        axes.set_title(metric, fontsize=11)
        axes.tick_params(axis="x", length=0)
    _legend(figure, _patches(methods))
    return figure


def feature_distributions(
    features: Mapping[str, Mapping[str, Sequence[float]]],
    p_values: Mapping[str, float] | None = None,
    distances: Mapping[str, float] | None = None,
    distance_name: str = "W",
    num_columns: int | None = None,
) -> Figure:
    """A panel a feature: its distributions in sets of cells, one over the other, real against generated.

    Histograms with bins in common, as densities, and each set's median as a dashed line. Values that are nan (the
    share of a nucleus that a cell does not have) are left out and counted in the title.

    Args:
        features: set -> feature -> one value a cell: ``{"real": {"volume, µm³": [...]}, "generated": {...}}``. Every
            set holds the same features.
        p_values: feature -> p-value of a test between the sets, for the panel's title; features may be missing.
        distances: feature -> distance between the sets, for the panel's title; features may be missing.
        distance_name: what the distance is called in the titles; W for Wasserstein's.
        num_columns: panels in a row; None takes up to 4.

    Returns:
        A figure on white, for `write_png` or for any matplotlib canvas.

    Raises:
        ValueError: if there is nothing to draw, the sets differ in their features, a value is infinite, or a p-value
            or distance belongs to no feature.
        ImportError: if matplotlib is missing.
    """
    check_columns(num_columns)
    sets = {
        name: {
            feature: _vector(numbers, f"features[{name!r}][{feature!r}]")
            for feature, numbers in _filled(by_feature, f"features[{name!r}]", "a feature").items()
        }
        for name, by_feature in _filled(features, "features", "a set").items()
    }
    names = list(next(iter(sets.values())))
    for name, by_feature in sets.items():
        if set(by_feature) != set(names):
            raise ValueError(
                f"Expected the same features in every set, got another {sorted(set(by_feature) ^ set(names))} in "
                f"features[{name!r}]. Measure all sets alike."
            )
    for argument, given in (("p_values", p_values), ("distances", distances)):
        unknown = sorted(set(given or {}) - set(names))
        if unknown:
            raise ValueError(f"Expected {argument} of some of {names}, got {unknown}. Leave these out.")

    figure, panels = _panels(len(names), num_columns, 4, 2.9, 2.5)
    for axes, feature in zip(panels, names, strict=True):
        finite = {name: by_feature[feature][~np.isnan(by_feature[feature])] for name, by_feature in sets.items()}
        pooled = np.concatenate(list(finite.values()))
        bins = _common_bins(pooled)
        for index, numbers in enumerate(finite.values()):
            if len(numbers) == 0:
                continue
            color = _series_color(index)
            counts, _ = np.histogram(numbers, bins)
            density = counts / (counts.sum() * np.diff(bins))
            axes.stairs(density, bins, fill=True, color=color, alpha=0.30)
            axes.stairs(density, bins, color=color, linewidth=1.3)
            axes.axvline(np.median(numbers), color=color, linewidth=1.2, linestyle=(0, (4, 2)))
        axes.set_ylim(bottom=0)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        facts = []
        if p_values is not None and feature in p_values:
            facts.append(_p_value(p_values[feature]))
        if distances is not None and feature in distances:
            facts.append(f"{distance_name} = {distances[feature]:.3g}")
        undefined = {name: len(by_feature[feature]) - len(finite[name]) for name, by_feature in sets.items()}
        notes = ", ".join(f"{count} {name}" for name, count in undefined.items() if count)
        title = [feature, ", ".join(facts), f"undefined: {notes}" if notes else ""]
        axes.set_title("\n".join(line for line in title if line), fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
        # counts have no halves
        axes.locator_params(axis="x", nbins=5, min_n_ticks=1, integer=bool((pooled == np.round(pooled)).all()))
    _legend(figure, _patches([f"{name} (n = {max(map(len, by.values()))})" for name, by in sets.items()]))
    return figure


def degradation_curves(
    levels: Sequence[float] | Mapping[str, Sequence[float]],
    scores: Mapping[str, Mapping[str, Sequence[float] | Sequence[Sequence[float]]]],
    level_label: str = "strength of the degradation",
    num_columns: int | None = None,
) -> Figure:
    """A panel a metric, in it a line a kind of damage: does the metric grow as the cells get worse?

    Args:
        levels: (L,) strengths, rising, for all kinds; or kind -> its own.
        scores: metric -> kind -> (L,) values, or (L, R) values over R repeats, drawn as their mean within a band of
            one standard deviation (n - 1) on either side.
        level_label: the horizontal axis's name.
        num_columns: panels in a row; None takes up to 3.

    Returns:
        A figure on white, for `write_png` or for any matplotlib canvas.

    Raises:
        ValueError: if there is nothing to draw, the values do not match the levels, or one is not finite.
        ImportError: if matplotlib is missing.
    """
    check_columns(num_columns)
    curves = {
        metric: {
            kind: np.asarray(values, dtype=float)
            for kind, values in _filled(by_kind, f"scores[{metric!r}]", "a kind of damage").items()
        }
        for metric, by_kind in _filled(scores, "scores", "a metric").items()
    }
    kinds = _union(curves.values())
    if not isinstance(levels, Mapping):
        levels = dict.fromkeys(kinds, levels)
    if missing := sorted(set(kinds) - set(levels)):
        raise ValueError(f"Expected levels of each of {kinds}, got none of {missing}. Give them, or one for all.")
    steps = {kind: _finite(levels[kind], f"the levels of {kind!r}") for kind in kinds}
    for kind, step in steps.items():
        if (np.diff(step) <= 0).any():
            raise ValueError(f"Expected levels of {kind!r} that rise, got {step.tolist()}. Sort them.")
    for metric, by_kind in curves.items():
        for kind, values in by_kind.items():
            if values.ndim not in (1, 2) or len(values) != len(steps[kind]) or values.size == 0:
                raise ValueError(
                    f"Expected a value, or a row of repeats, for each of {len(steps[kind])} levels in "
                    f"scores[{metric!r}][{kind!r}], got shape {values.shape}. Match them."
                )
            _finite(values.ravel(), f"scores[{metric!r}][{kind!r}]")

    figure, panels = _panels(len(curves), num_columns, 3, 3.3, 2.8)
    lines = dict.fromkeys(kinds)
    for axes, (metric, by_kind) in zip(panels, curves.items(), strict=True):
        for kind, values in by_kind.items():
            color, marker = _series_color(kinds.index(kind)), _marker(kinds.index(kind))
            repeats = values.reshape(len(values), -1)
            mean = repeats.mean(axis=1)
            (lines[kind],) = axes.plot(steps[kind], mean, color=color, marker=marker, markersize=4, linewidth=1.5)
            if repeats.shape[1] > 1:
                deviation = repeats.std(axis=1, ddof=1)
                axes.fill_between(steps[kind], mean - deviation, mean + deviation, color=color, alpha=0.2, linewidth=0)
        axes.set_title(metric, fontsize=11)
        axes.set_xlabel(level_label, fontsize=9)
        axes.grid(axis="y", color="#e3e3e3", linewidth=0.7)
    _legend(figure, lines)
    return figure


# Input


def _filled(mapping: Mapping, name: str, entry: str) -> Mapping:
    if not isinstance(mapping, Mapping) or not mapping:
        got = "nothing" if isinstance(mapping, Mapping) else type(mapping).__name__
        raise ValueError(f"Expected {name} to map at least {entry} to its values, got {got}. Give a dictionary.")
    return mapping


def _vector(numbers: float | Sequence[float], name: str) -> np.ndarray:
    """One value or a sequence of them as (n,) float, nan allowed, or a ValueError."""
    vector = np.atleast_1d(np.asarray(numbers, dtype=float))
    if vector.ndim != 1 or len(vector) == 0 or np.isinf(vector).any():
        raise ValueError(f"Expected {name} as a row of finite numbers, got {numbers!r}. Correct it.")
    return vector


def _finite(numbers: float | Sequence[float], name: str) -> np.ndarray:
    vector = _vector(numbers, name)
    if np.isnan(vector).any():
        raise ValueError(
            f"Expected finite {name}, got nan in {int(np.isnan(vector).sum())} of {len(vector)} values. Leave nan out."
        )
    return vector


def _union(mappings: Iterable[Mapping]) -> list[str]:
    """The keys of all mappings, in the order of their first appearance."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _common_bins(values: np.ndarray) -> np.ndarray:
    """Edges of at most 40 bins over all values; whole numbers of a small range get a bin each."""
    if len(values) == 0:
        return np.array([0.0, 1.0])
    low, high = values.min(), values.max()
    if (values == np.round(values)).all() and high - low < _MAX_BINS:
        return np.arange(low - 0.5, high + 1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        return low + max(abs(low), 1.0) * np.array([-0.05, 0.05])
    sturges = math.ceil(math.log2(len(values))) + 1
    width = 2 * np.subtract(*np.percentile(values, (75, 25))) / len(values) ** (1 / 3)  # Freedman and Diaconis 1981
    # one outlier must not ask for a million bins
    number = sturges if width == 0 else int(np.clip((high - low) / width, sturges, max(sturges, _MAX_BINS)))
    return np.linspace(low, high, number + 1)


# Drawing


def _series_color(index: int) -> str:
    return SERIES_COLORS[index % len(SERIES_COLORS)]


def _marker(index: int) -> str:
    """Another one when the colours begin again, so that no two of 49 series look alike."""
    return _MARKERS[(index + index // len(SERIES_COLORS)) % len(_MARKERS)]


def _panels(
    number: int, num_columns: int | None, most_columns: int, width: float, height: float
) -> tuple[Figure, list[Axes]]:
    """`number` axes of that size in inches, in rows of `num_columns`, or in equal rows of at most `most_columns`."""
    columns = min(number, num_columns or math.ceil(number / math.ceil(number / most_columns)))
    rows = math.ceil(number / columns)
    figure = new_figure(columns * width, rows * height + 0.35, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    grid = figure.add_gridspec(rows, columns)
    panels = [figure.add_subplot(grid[index // columns, index % columns]) for index in range(number)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _patches(labels: Sequence[str]) -> dict[str, Patch]:
    from matplotlib.patches import Patch

    return {label: Patch(color=_series_color(index), alpha=0.75) for index, label in enumerate(labels)}


def _legend(figure: Figure, handles: Mapping[str, Artist]) -> None:
    """One legend for all panels, below them, in one row or as many equal ones as it needs."""
    widths, columns = [0.55 + 0.085 * len(label) for label in handles], len(handles)
    if sum(widths) > figure.get_figwidth():
        num_rows = math.ceil(len(handles) / max(1, int(figure.get_figwidth() / max(widths))))
        columns = math.ceil(len(handles) / num_rows)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )


def _slant_long_ticks(axes: Axes, texts: Sequence[str], panel_width: float) -> None:
    if max(map(len, texts)) * 0.085 > 0.8 * panel_width / len(texts):
        for label in axes.get_xticklabels():
            label.set(rotation=30, ha="right", rotation_mode="anchor")


def _p_value(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
