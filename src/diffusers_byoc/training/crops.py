"""Crops around the cell: most of a cell's cube is background, which trains nothing."""

import torch
from torch import Tensor


def crop_cells(volumes: Tensor, size: int, places: Tensor) -> Tensor:
    """A cube out of each volume that holds a part of its cell.

    The middle of the crop lies anywhere in the box around the cell, unless the volume ends before.

    Args:
        volumes: (B, M, D, H, W) in [-1, 1], background -1.
        size: edge of the crops, at most D, H and W.
        places: (B, 3) in [0, 1), where in the box.

    Returns:
        (B, M, size, size, size).

    Raises:
        ValueError: if the crops are larger than the volumes.
    """
    if size > min(volumes.shape[2:]):
        raise ValueError(
            f"Expected a crop_size of at most {min(volumes.shape[2:])}, the volumes' edge, got {size}. Lower it."
        )
    occupied = (volumes > -1).any(dim=1)  # (B, D, H, W)
    crops = []
    for volume, is_cell, place in zip(volumes, occupied, places.tolist(), strict=True):
        box = []
        for axis, share in enumerate(place):
            others = tuple(other for other in range(3) if other != axis)
            found = is_cell.amax(dim=others).nonzero()
            length = is_cell.shape[axis]
            first, last = (int(found[0]), int(found[-1])) if len(found) else (0, length - 1)
            middle = first + int(share * (last - first + 1))
            start = min(max(middle - size // 2, 0), length - size)
            box.append(slice(start, start + size))
        crops.append(volume[(slice(None), *box)])
    return torch.stack(crops)
