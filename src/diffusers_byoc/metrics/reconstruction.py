"""How well an autoencoder gives cells back: error, similarity, overlap of the segmentations, use of the codebooks.

Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity" (SSIM), in three
dimensions and with its Gaussian window; Dice 1945.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..optional import optional
from ..volumes import check_unit_range
from .segmentation import segment_channel


if TYPE_CHECKING:
    Volumes = np.ndarray | torch.Tensor

_WINDOW = 11  # voxels, of SSIM's Gaussian of 1.5 voxels


@dataclass(frozen=True)
class ReconstructionQuality:
    """What `reconstruction_quality` finds of each volume and channel; arrays are (B, M).

    Attributes:
        mse: mean squared error of intensities in [0, 1].
        psnr: peak signal-to-noise ratio, -10 log₁₀ mse, in dB; infinite for a perfect reconstruction.
        ssim: structural similarity in three dimensions, at most 1.
        dice: overlap in [0, 1] of the foreground before and after: twice the common over the sum of both; nan where
            neither has any.
    """

    mse: np.ndarray
    psnr: np.ndarray
    ssim: np.ndarray
    dice: np.ndarray


def reconstruction_quality(
    volumes: Volumes, reconstructions: Volumes, thresholds: Sequence[float | None] | None = None
) -> ReconstructionQuality:
    """Compare volumes with their reconstructions, channel by channel.

    Args:
        volumes: (B, M, D, H, W) in [0, 1].
        reconstructions: the same shape, in [0, 1].
        thresholds: M numbers in [0, 1], brighter voxels are foreground; None, for all or for one of them, takes
            Otsu's threshold, of each volume and each reconstruction by itself.

    Returns:
        The four measures.

    Raises:
        ValueError: if shapes, ranges or the number of thresholds do not fit, or an edge is shorter than 11 voxels,
            the window of SSIM.
        ImportError: if SciPy or scikit-image is missing.
    """
    volumes, reconstructions = (
        _check_volumes(batch, name) for batch, name in ((volumes, "volumes"), (reconstructions, "reconstructions"))
    )
    if volumes.shape != reconstructions.shape:
        raise ValueError(
            f"Expected reconstructions of shape {volumes.shape}, got {reconstructions.shape}. Give the same cells."
        )
    if min(volumes.shape[2:]) < _WINDOW:
        raise ValueError(
            f"Expected at least {_WINDOW} voxels along each axis, got {volumes.shape[2:]}. Give whole cells."
        )
    num_channels = volumes.shape[1]
    thresholds = (None,) * num_channels if thresholds is None else tuple(thresholds)
    if len(thresholds) != num_channels:
        raise ValueError(
            f"Expected a threshold for each of {num_channels} channels, got {thresholds}. Give one, or None, for each."
        )
    similarity = optional("skimage.metrics", "metrics").structural_similarity

    mse = ((volumes.astype(np.float64) - reconstructions) ** 2).mean((2, 3, 4))
    with np.errstate(divide="ignore"):
        psnr = -10 * np.log10(mse)
    ssim, dice = np.empty_like(mse), np.empty_like(mse)
    for index in np.ndindex(mse.shape):
        # the window and the biased variances of the paper that defined SSIM
        ssim[index] = similarity(
            volumes[index],
            reconstructions[index],
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        before = segment_channel(volumes[index], thresholds[index[1]]).mask
        after = segment_channel(reconstructions[index], thresholds[index[1]]).mask
        total = before.sum() + after.sum()
        dice[index] = 2 * (before & after).sum() / total if total else np.nan
    return ReconstructionQuality(mse, psnr, ssim, dice)


@dataclass(frozen=True)
class CodebookUsage:
    """What `codebook_usage` finds; arrays are (M,).

    Attributes:
        usage: share in [0, 1] of the codes that occur.
        perplexity: exponential of the entropy of the codes' frequencies, from 1 (one code) to K (all alike often).
    """

    usage: np.ndarray
    perplexity: np.ndarray


def codebook_usage(indices: np.ndarray | torch.Tensor, num_codes: int) -> CodebookUsage:
    """How much of each codebook a set of cells uses.

    Args:
        indices: (B, M, ...) integers in [0, K), the code of every latent position.
        num_codes: size K of each codebook.

    Returns:
        Usage and perplexity of the M codebooks.

    Raises:
        ValueError: if the indices are not such integers.
    """
    indices = np.asarray(indices.detach().cpu() if isinstance(indices, torch.Tensor) else indices)
    if indices.ndim < 2 or indices.size == 0 or indices.dtype.kind not in "iu":
        raise ValueError(
            f"Expected indices as (B, M, ...) integers, got shape {indices.shape} of {indices.dtype}. Give codes."
        )
    if indices.min() < 0 or indices.max() >= num_codes:
        raise ValueError(
            f"Expected indices in [0, {num_codes}), got [{indices.min()}, {indices.max()}]. Correct num_codes."
        )
    counts = np.stack([np.bincount(channel.ravel(), minlength=num_codes) for channel in indices.swapaxes(0, 1)])
    entropy = optional("scipy.stats", "metrics").entropy(counts, axis=1)
    return CodebookUsage(usage=(counts > 0).mean(1), perplexity=np.exp(entropy))


def _check_volumes(volumes: Volumes, name: str) -> np.ndarray:
    volumes = volumes.detach().float().cpu().numpy() if isinstance(volumes, torch.Tensor) else volumes
    volumes = np.asarray(volumes, dtype=np.float32)
    if volumes.ndim != 5 or 0 in volumes.shape:
        raise ValueError(f"Expected {name} (B, M, D, H, W), got shape {volumes.shape}. Give a batch.")
    check_unit_range(volumes, name)
    return volumes
