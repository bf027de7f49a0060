"""Do the channels of generated cells belong together? BYOC's central claim, as numbers.

Source: BYOC, section 4.2 ("inter-channel consistency, with accurate positioning of the cell and nucleus").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..optional import optional
from .morphology import CellMorphology


@dataclass(frozen=True)
class ChannelConsistency:
    """What `channel_consistency` finds. nan where no cell has what it needs.

    Attributes:
        nucleus_inside_share: mean share in [0, 1] of a nucleus's voxels that lie in its cell, over cells with a
            nucleus.
        one_nucleus_share: share in [0, 1] of all cells that have exactly one nucleus, and it lies inside. Real
            dividing cells have two: compare with real cells, not with 1.
        volume_correlation: Pearson's correlation of the logarithms of cell and nucleus volume, in [-1, 1], over the
            cells that have both.
        volume_correlation_interval: its 95 % confidence interval (Fisher's transformation).
        num_cells: how many were looked at.
        num_complete: how many of them have both a cell and a nucleus.
    """

    nucleus_inside_share: float
    one_nucleus_share: float
    volume_correlation: float
    volume_correlation_interval: tuple[float, float]
    num_cells: int
    num_complete: int


def channel_consistency(cells: Sequence[CellMorphology]) -> ChannelConsistency:
    """How well nuclei and cells fit, over a set of cells.

    Args:
        cells: from `measure_cells`.

    Returns:
        The shares and the correlation.

    Raises:
        ValueError: if there are no cells.
        ImportError: if SciPy is missing.
    """
    if not len(cells):
        raise ValueError("Expected at least one cell, got none. Give the measurements of a set.")
    inside = np.array([cell.nucleus_inside_share for cell in cells])
    volumes = np.array([(cell.cell_volume_um3, cell.nucleus_volume_um3) for cell in cells])
    logarithms = np.log(volumes[(volumes > 0).all(1)])
    correlation, interval = float("nan"), (float("nan"), float("nan"))
    if len(logarithms) > 3 and (np.ptp(logarithms, axis=0) > 0).all():  # Fisher's interval needs four
        found = optional("scipy.stats", "metrics").pearsonr(*logarithms.T)
        correlation, interval = float(found.statistic), tuple(map(float, found.confidence_interval(0.95)))
    counts = np.array([(cell.num_nucleus_components, cell.num_nuclei_inside) for cell in cells], dtype=float)
    counts = counts[np.isfinite(counts).all(1)]  # nan without a channel for the nucleus
    return ChannelConsistency(
        nucleus_inside_share=float(np.nanmean(inside)) if np.isfinite(inside).any() else float("nan"),
        one_nucleus_share=float((counts == 1).all(1).mean()) if len(counts) else float("nan"),
        volume_correlation=correlation,
        volume_correlation_interval=interval,
        num_cells=len(cells),
        num_complete=len(logarithms),
    )
