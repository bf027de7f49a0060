"""How well a pipeline's autoencoder gives real cells back."""

from collections.abc import Sequence

import numpy as np
import torch

from ..metrics import codebook_usage, find_channels, reconstruction_quality
from ..models import MultiCodebookVQModel
from .sets import CellSet


@torch.no_grad()
def judge_reconstruction(
    autoencoder: MultiCodebookVQModel, real: CellSet, indices: Sequence[int], cell_threshold: float | None = None
) -> dict[str, dict[str, float]]:
    """Error, similarity, overlap and use of the codes, for each channel.

    Args:
        autoencoder: on its device.
        real: the real cells.
        indices: of those to look at.
        cell_threshold: in [0, 1], the cell is brighter; None takes Otsu's.

    Returns:
        Channel -> "mse", "psnr", "ssim", "dice" (means over the cells), "codes_used" and "perplexity".
    """
    names = autoencoder.config.channel_names
    cell, _ = find_channels(names)
    thresholds = [cell_threshold if channel == cell else None for channel in range(len(names))]
    qualities, codes = [], []
    for start in range(0, len(indices), 8):
        volumes = torch.from_numpy(real.volumes(indices[start : start + 8]))
        output = autoencoder((volumes * 2 - 1).to(autoencoder.device, autoencoder.dtype))
        qualities.append(reconstruction_quality(volumes, (output.sample.float() / 2 + 0.5).clamp(0, 1), thresholds))
        codes.append(output.indices.cpu())
    usage = codebook_usage(torch.cat(codes), autoencoder.config.num_vq_embeddings)
    table = {}
    for channel, name in enumerate(names):
        table[name] = {
            measure: float(np.nanmean(np.concatenate([getattr(q, measure)[:, channel] for q in qualities])))
            for measure in ("mse", "psnr", "ssim", "dice")
        }
        codebook = min(channel, len(usage.usage) - 1)
        table[name] |= {
            "codes_used": float(usage.usage[codebook]),
            "perplexity": float(usage.perplexity[codebook]),
        }
    return table
