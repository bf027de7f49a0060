"""Crops around the cell: most of a cell's cube is background, which trains nothing."""

import torch
from torch import Tensor


def crop_cells(volumes: Tensor, size: int, places: Tensor) -> Tensor:
    """A cube out of each volume around a voxel of its cell, or as near to it as the volume's border allows.

    Args:
        volumes: (B, M, D, H, W) in [-1, 1], background -1.
        size: edge of the crops, at most D, H and W.
        places: (B,) in [0, 1), which voxel of the cell; of the volume, if there is no cell.

    Returns:
        (B, M, size, size, size).

    Raises:
        ValueError: if the crops are larger than the volumes.
    """
    if size > min(volumes.shape[2:]):
        raise ValueError(
            f"Expected a crop_size of at most {min(volumes.shape[2:])}, the volumes' edge, got {size}. Lower it."
        )
    crops = []
    for volume, place in zip(volumes, places.tolist(), strict=True):
        is_cell = (volume > -1).any(dim=0)
        voxels = is_cell.nonzero() if is_cell.any() else torch.ones_like(is_cell).nonzero()
        middle = voxels[int(place * len(voxels))].tolist()
        starts = [min(max(m - size // 2, 0), length - size) for m, length in zip(middle, is_cell.shape, strict=True)]
        crops.append(volume[(slice(None), *(slice(start, start + size) for start in starts))])
    return torch.stack(crops)
