"""Decoded volumes to cells: the texture network's flow from noise to texture."""

from itertools import product

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..models import TextureUNet3D


_FAINTEST = -0.95  # of a cell's voxels, once decoded; in [-1, 1]
# where pieces of a cell are told apart: decoded processes are no fainter; with texture, near Otsu's for phantoms
_BRIGHT, _BRIGHT_WITH_TEXTURE = -0.6, -0.4
_REACH = 2  # voxels around them that may belong to the cell
# Between two steps the cubes of 2³ voxels in which the network works move by a voxel: their borders fall elsewhere.
_PHASES = tuple(product((0, 1), repeat=3))


@torch.no_grad()
def add_texture(
    texture_unet: TextureUNet3D,
    scheduler: SchedulerMixin,
    reconstruction: Tensor,
    num_inference_steps: int,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Tensor:
    """Draw texture into decoded volumes.

    Only the decoded cell and what is next to it can have texture; all else becomes background: a network that knows
    processes too fine to be decoded would draw specks there. Where it was trained on cells of one piece each
    (`connected_cells`), what lies apart from the largest one becomes background, too: what is decoded so, and what is
    apart once texture has broken a process. A volume without a cell stays as it is. A cell's texture depends on its
    own generator alone, where there is one per sample.

    Args:
        texture_unet: the network.
        scheduler: of flow matching; its timesteps are set here.
        reconstruction: (B, M, D, H, W) decoded volumes, nominally in [-1, 1], axes divisible by the network's
            `downsampling_factor`.
        num_inference_steps: evaluations of the network.
        generator: one random generator, or one per sample.

    Returns:
        (B, M, D, H, W) float32 in [-1, 1].
    """
    reconstruction = reconstruction.float()
    noise = randn_tensor(reconstruction.shape, generator=generator, device=reconstruction.device, dtype=torch.float32)
    textured = torch.full_like(reconstruction, -1.0)
    is_cell = (reconstruction > _FAINTEST).any(dim=1)
    if texture_unet.config.connected_cells:
        is_cell = torch.stack(
            [_without_loose_pieces(*each, _BRIGHT) for each in zip(is_cell, reconstruction, strict=True)]
        )
    is_near = _dilate(is_cell)[:, None]  # (B, 1, D, H, W)
    for index, volume in enumerate(reconstruction):
        if not is_near[index].any():
            textured[index] = volume.clamp(-1, 1)
            continue
        box = (slice(index, index + 1), slice(None), *_box(is_near[index, 0], texture_unet.downsampling_factor))
        decoded, texture = reconstruction[box], noise[box]
        scheduler.set_timesteps(num_inference_steps, device=reconstruction.device)
        for step, timestep in enumerate(scheduler.timesteps):
            phase = _PHASES[step % len(_PHASES)]
            inputs = (_shift(x, phase).to(texture_unet.dtype) for x in (texture, decoded))
            velocity = texture_unet(next(inputs), timestep, next(inputs), return_dict=False)[0].float()
            velocity = _shift(velocity, [-distance for distance in phase])
            texture = scheduler.step(velocity, timestep, texture, return_dict=False)[0]
        drawn = torch.where(is_near[box], texture_unet.apply_texture(decoded, texture), -1.0)
        if texture_unet.config.connected_cells:
            for brightness in (_BRIGHT, _BRIGHT_WITH_TEXTURE):
                is_cell = _without_loose_pieces((drawn[0] > -1).any(dim=0), drawn[0], brightness)
                drawn = torch.where(is_cell, drawn, -1.0)
        textured[box] = drawn
    return textured


def is_connected(volume: Tensor) -> bool:
    """Whether what is bright in a cell (M, D, H, W), in [-1, 1], is of one piece, all channels taken together."""
    return not any(loose_pieces(volume, brightness).any() for brightness in (_BRIGHT, _BRIGHT_WITH_TEXTURE))


def loose_pieces(volume: Tensor, brightness: float = _BRIGHT) -> Tensor:
    """Mask (D, H, W) of what is brighter in (M, D, H, W), in [-1, 1], and apart from the largest such piece."""
    is_bright = (volume > brightness).any(dim=0)
    return is_bright & ~largest_piece(is_bright)


def _without_loose_pieces(is_cell: Tensor, volume: Tensor, brightness: float) -> Tensor:
    """`is_cell` (D, H, W) of `volume` (M, D, H, W), but for brighter pieces apart and what is fainter around them."""
    loose = loose_pieces(volume, brightness)
    if not loose.any():
        return is_cell
    is_faint = (volume <= brightness).all(dim=0)
    return largest_piece(is_cell & ~loose & ~(is_faint & _dilate(loose[None])[0]))


def _dilate(masks: Tensor) -> Tensor:
    """Masks (B, D, H, W) and the voxels next to them."""
    return F.max_pool3d(masks.float(), 2 * _REACH + 1, stride=1, padding=_REACH) > 0


def largest_piece(mask: Tensor) -> Tensor:
    """The largest connected piece (26 neighbours) of a mask (D, H, W); the mask where there is none."""
    if not mask.any():
        return mask
    box = _box(mask, 1)
    inside = mask[box]
    # each voxel knows another one of its piece, with a higher number, and soon the highest (exact up to 2^24 voxels)
    labels = inside * torch.arange(1.0, inside.numel() + 1, device=mask.device).view(inside.shape)
    spread = torch.zeros_like(labels)
    while not torch.equal(spread, labels):
        spread = labels
        labels = inside * F.max_pool3d(labels[None, None], 3, stride=1, padding=1)[0, 0]
        labels[inside] = labels.flatten()[labels[inside].long() - 1]  # what that one knows
    piece = torch.zeros_like(mask)
    piece[box] = inside & (labels == labels[inside].long().bincount().argmax())
    return piece


def _box(is_cell: Tensor, multiple: int) -> tuple[slice, ...]:
    """Where the cell is in a mask (D, H, W), edges on multiples of `multiple`."""
    box = []
    for other_axes in ((1, 2), (0, 2), (0, 1)):
        places = is_cell.amax(dim=other_axes).nonzero()
        box.append(slice(int(places[0]) // multiple * multiple, (int(places[-1]) // multiple + 1) * multiple))
    return tuple(box)


def _shift(volumes: Tensor, distances) -> Tensor:
    return torch.roll(volumes, tuple(distances), dims=(2, 3, 4))
