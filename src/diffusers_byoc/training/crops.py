"""Crops around the cell: most of a cell's cube is background, which trains nothing."""

import torch
from torch import Tensor


def crop_cells(volumes: Tensor, size: int, places: Tensor, *others: Tensor) -> Tensor | tuple[Tensor, ...]:
    """A cube out of each volume around a voxel of its cell, or as near to it as the volume's border allows.

    Args:
        volumes: (B, M, D, H, W) in [-1, 1], background -1.
        size: edge of the crops, at most D, H and W.
        places: (B,) in [0, 1), which voxel of the cell; of the volume, if there is no cell.
        others: (B, C, D, H, W) to crop at the same places.

    Returns:
        (B, M, size, size, size); with `others`, a tuple of it and theirs.

    Raises:
        ValueError: if the crops are larger than the volumes.
    """
    if size > min(volumes.shape[2:]):
        raise ValueError(
            f"Expected a crop_size of at most {min(volumes.shape[2:])}, the volumes' edge, got {size}. Lower it."
        )
    boxes = []
    for volume, place in zip(volumes, places.tolist(), strict=True):
        is_cell = (volume > -1).any(dim=0)
        voxels = is_cell.nonzero() if is_cell.any() else torch.ones_like(is_cell).nonzero()
        middle = voxels[int(place * len(voxels))].tolist()
        starts = [min(max(m - size // 2, 0), length - size) for m, length in zip(middle, is_cell.shape, strict=True)]
        boxes.append((slice(None), *(slice(start, start + size) for start in starts)))
    crops = tuple(
        torch.stack([volume[box] for volume, box in zip(batch, boxes, strict=True)]) for batch in (volumes, *others)
    )
    return crops if others else crops[0]
