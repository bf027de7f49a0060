"""Augmentation that keeps a cell a cell: it is turned, mirrored and slightly re-stained, never stretched or cut.

Drawing and applying are apart, so that several processes can draw for the one global batch and apply their shares:

    generator = step_generator(seed, step, "augmentation")
    poses, gammas = draw_augmentation(global_batch_size, num_channels, generator, rotation="axial")
    volumes = augment_cells(volumes, process_share(poses, ...), process_share(gammas, ...))
"""

from itertools import permutations, product

import torch
import torch.nn.functional as F
from torch import Tensor


ROTATIONS = ("none", "quarter_turns", "axial", "full")


def draw_augmentation(
    num_cells: int,
    num_channels: int,
    generator: torch.Generator,
    rotation: str = "quarter_turns",
    intensity_jitter: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """What happens to each cell of a batch, drawn on the CPU from `generator` alone.

    Args:
        num_cells: cells B of the batch.
        num_channels: channels M of each.
        generator: on the CPU.
        rotation: "none"; "quarter_turns": the eight quarter turns and mirror images in the plane (y, x), which move
            voxels and interpolate none; "axial": any angle about the optical axis z, mirrored or not; "full": any
            rotation in space, mirrored or not, for images as sharp in z as in y and x.
        intensity_jitter: j in [0, 1]; every channel of a cell gets an exponent (gamma) between 1 / (1 + j) and 1 + j.

    Returns:
        Poses (B, 3, 3) float32, orthogonal, in the order z, y, x: the voxel at p, seen from the middle of the cube,
        gets what is at pose @ p. Gammas (B, M) float32.

    Raises:
        ValueError: if an argument is out of range.
    """
    if rotation not in ROTATIONS:
        raise ValueError(f"Expected `rotation` {', '.join(ROTATIONS)}, got {rotation!r}. Choose one.")
    if not 0 <= intensity_jitter <= 1:
        raise ValueError(f"Expected `intensity_jitter` in [0, 1], got {intensity_jitter}. Correct it.")
    exponents = torch.rand(num_cells, num_channels, generator=generator) * 2 - 1
    gammas = (1 + intensity_jitter) ** exponents

    if rotation == "none":
        return torch.eye(3).repeat(num_cells, 1, 1), gammas
    if rotation == "full":
        # the orthogonal factor of a normal matrix is uniform, once the other's diagonal is positive
        orthogonal, triangular = torch.linalg.qr(torch.randn(num_cells, 3, 3, generator=generator))
        return orthogonal * triangular.diagonal(dim1=1, dim2=2).sign().unsqueeze(1), gammas
    if rotation == "quarter_turns":
        turns = torch.randint(4, (num_cells,), generator=generator)
        cos, sin = torch.tensor([1.0, 0, -1, 0])[turns], torch.tensor([0, 1.0, 0, -1])[turns]
    else:
        angles = torch.rand(num_cells, generator=generator) * 2 * torch.pi
        cos, sin = angles.cos(), angles.sin()
    mirror = torch.randint(2, (num_cells,), generator=generator) * 2.0 - 1
    poses = torch.zeros(num_cells, 3, 3)
    poses[:, 0, 0] = 1
    poses[:, 1, 1], poses[:, 1, 2] = cos, -sin
    poses[:, 2, 1], poses[:, 2, 2] = sin * mirror, cos * mirror
    return poses, gammas


def augment_cells(volumes: Tensor, poses: Tensor, gammas: Tensor) -> Tensor:
    """A batch as `draw_augmentation` says, all channels of a cell alike in space.

    Background stays exactly -1 and comes in where a turned cube leaves room. A cell that would leave the cube takes
    the nearest quarter turn instead, in which it always fits; so does one whose background is not -1, as it fills the
    cube.

    Args:
        volumes: (B, M, S, S, S) in [-1, 1], background -1, of any floating dtype, on any device.
        poses: (B, 3, 3), orthogonal.
        gammas: (B, M), positive; channels, taken from 0 (background) to 1, are raised to these powers.

    Returns:
        (B, M, S, S, S) in [-1, 1], of the dtype and on the device of `volumes`, which are left as they were.

    Raises:
        ValueError: if the shapes do not fit each other, or the volumes are not cubes.
    """
    if volumes.ndim != 5 or len(set(volumes.shape[2:])) != 1:
        raise ValueError(f"Expected volumes (B, M, S, S, S), got {tuple(volumes.shape)}. Pad them to cubes.")
    if poses.shape != (len(volumes), 3, 3) or gammas.shape != volumes.shape[:2]:
        raise ValueError(
            f"Expected `poses` and `gammas` for {tuple(volumes.shape[:2])} cells and channels, got"
            f" {tuple(poses.shape)} and {tuple(gammas.shape)}. Draw them for this batch."
        )
    poses = poses.cpu()  # where every cell's decides what is done with it
    quarter_turns = _nearest_quarter_turns(poses)
    exact = torch.isclose(poses, quarter_turns, atol=1e-6).all(dim=(1, 2))
    if not exact.all():
        exact |= ~_fit(volumes, poses)

    augmented = torch.empty_like(volumes, memory_format=torch.contiguous_format)
    for index in exact.nonzero().flatten().tolist():
        augmented[index] = _turn(volumes[index], quarter_turns[index])
    rotated = (~exact).nonzero().flatten()
    if len(rotated):
        augmented[rotated] = _rotate(volumes[rotated], poses[rotated])
    if (gammas != 1).any():
        shares = (augmented.float() / 2 + 0.5).clamp(0, 1) ** gammas.to(volumes.device)[:, :, None, None, None]
        augmented = (shares * 2 - 1).to(volumes.dtype)
    return augmented


def _nearest_quarter_turns(poses: Tensor) -> Tensor:
    """Of the 48 ways to lay a cube onto itself, the one most like each pose (B, 3, 3)."""
    turns = torch.stack(
        [
            torch.diag(torch.tensor(signs))[list(order)]
            for order in permutations(range(3))
            for signs in product((1.0, -1.0), repeat=3)
        ]
    )
    return turns[torch.einsum("bij,tij->bt", poses, turns).argmax(dim=1)]


def _fit(volumes: Tensor, poses: Tensor) -> Tensor:
    """Which cells (B,) stay inside the cube; on the device of `poses`."""
    reach = (volumes.shape[-1] - 1) / 2
    fits = []
    for volume, pose in zip(volumes, poses, strict=True):
        occupied = (volume > -1).any(dim=0).nonzero() - reach  # (number of voxels, 3)
        fits.append((occupied @ pose.to(occupied)).abs().le(reach).all())
    return torch.stack(fits).to(poses.device)


def _turn(volume: Tensor, pose: Tensor) -> Tensor:
    """(M, S, S, S) in one of the 48 poses, voxel by voxel."""
    source_axes = pose.abs().argmax(dim=0)
    mirrored = [axis + 1 for axis, source in enumerate(source_axes.tolist()) if pose[source, axis] < 0]
    return volume.permute(0, *(source_axes + 1).tolist()).flip(mirrored)


def _rotate(volumes: Tensor, poses: Tensor) -> Tensor:
    """(B, M, S, S, S) in any pose, interpolated linearly in float32."""
    matrices = F.pad(poses.flip(1, 2), (0, 1)).to(volumes.device)  # (B, 3, 4) for x, y, z, without a shift
    grid = F.affine_grid(matrices, volumes.shape, align_corners=False)
    # PyTorch pads with 0, which must mean background
    return (F.grid_sample(volumes.float() + 1, grid, align_corners=False).clamp(0, 2) - 1).to(volumes.dtype)
