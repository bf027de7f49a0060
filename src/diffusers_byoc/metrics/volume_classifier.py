"""The classifier two-sample test on whole volumes: a small 3D network that sees what no measurement was made for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .two_sample import ClassifierTest, cross_validated_test


if TYPE_CHECKING:
    Volumes = np.ndarray | Tensor

_FEATURES = (16, 32, 64)


def volume_classifier_test(
    real: Volumes,
    generated: Volumes,
    num_folds: int = 5,
    num_steps: int = 100,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> ClassifierTest:
    """Train a small convolutional network, anew in each fold, to tell generated volumes from real ones.

    It is shown the mean and the standard deviation of every block of 2³ voxels: a quarter of the numbers, in which
    a missing texture is as plain as a wrong shape. Three strided convolutions with group norm, the mean and the
    maximum over all places, one linear layer: about 70,000 weights. Cells are mirrored at random in training, as a
    cell has no preferred side. The norms hide how bright a whole cell is: `classifier_test` on morphology sees
    that. A handful of cells can be learned by heart: below some hundred cells in each set an accuracy near 0.5
    says little.

    Args:
        real: (N, M, D, H, W) in [0, 1].
        generated: (N', M, D, H, W) in [0, 1].
        num_folds: of the cross-validation; every cell is judged once, by a network that did not see it.
        num_steps: training steps in each fold, however few the cells are; 20 at the least.
        batch_size: cells in a training step.
        learning_rate: highest rate of AdamW, reached after a tenth of the steps and then lowered to 0.
        seed: of weights, folds, order and mirroring.
        device: where the network runs.

    Returns:
        The cross-validated accuracy.

    Raises:
        ValueError: if the volumes differ in shape, a set has fewer cells than folds, or there are fewer steps.
        ImportError: if scikit-learn or SciPy is missing.
    """
    if num_steps < 20:
        raise ValueError(f"Expected num_steps of at least 20, got {num_steps}. Raise it: the rate rises and falls.")
    real, generated = (np.asarray(v.detach().cpu() if isinstance(v, Tensor) else v) for v in (real, generated))
    if real.ndim != 5 or real.shape[1:] != generated.shape[1:]:
        raise ValueError(
            f"Expected both sets as (N, M, D, H, W) of one shape, got {real.shape} and {generated.shape}. Bring"
            " both into the same cube."
        )

    def judge(training: np.ndarray, is_generated: np.ndarray, judged: np.ndarray, fold: int) -> np.ndarray:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * num_folds + fold)
            network = _Classifier(training).to(device, memory_format=torch.channels_last_3d)
        generator = torch.Generator().manual_seed(seed * num_folds + fold)
        _train(network, training, is_generated, num_steps, batch_size, learning_rate, generator, device)
        return _judge(network, judged, batch_size, device)

    return cross_validated_test(_blocks(real), _blocks(generated), judge, num_folds, seed)


def _blocks(volumes: np.ndarray) -> np.ndarray:
    """(N, M, D, H, W) -> (N, 2 M, D/2, H/2, W/2): mean and standard deviation of every 2³ voxels."""
    blocks = []
    for volume in volumes:
        volume = torch.from_numpy(volume).float()
        mean, mean_of_squares = (F.avg_pool3d(v, 2, ceil_mode=True) for v in (volume, volume**2))
        blocks.append(torch.cat([mean, (mean_of_squares - mean**2).clamp(min=0).sqrt()]))
    return torch.stack(blocks).numpy()


class _Classifier(nn.Module):
    """(B, 2 M, D/2, H/2, W/2) -> (B,) logit of being generated."""

    def __init__(self, training: np.ndarray):
        super().__init__()
        num_channels, axes = training.shape[1], (0, 2, 3, 4)
        # deviations within a block are a tenth of the means: both enter in units of their own spread
        scale = 1 / training.std(axes, dtype=np.float64).clip(min=1e-6)
        self.register_buffer("scale", torch.from_numpy(scale).float()[None, :, None, None, None])
        widths = (num_channels, *_FEATURES)
        self.convolutions = nn.ModuleList(
            nn.Conv3d(width_in, width_out, 3, stride=2, padding=1)
            for width_in, width_out in zip(widths, widths[1:], strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in _FEATURES)
        self.linear = nn.Linear(2 * _FEATURES[-1], 1)

    def forward(self, blocks: Tensor) -> Tensor:
        features = blocks * self.scale
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            features = F.silu(norm(convolution(features)))
        features = features.flatten(2)  # (B, 64, voxels)
        return self.linear(torch.cat([features.mean(2), features.amax(2)], 1))[:, 0]


def _train(network, cells, is_generated, num_steps, batch_size, learning_rate, generator, device) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_steps, pct_start=0.1)
    targets = torch.from_numpy(is_generated).float()
    num_epochs = -(-num_steps * batch_size // len(cells))
    order = torch.cat([torch.randperm(len(cells), generator=generator) for _ in range(num_epochs)])
    shape = (batch_size, *cells.shape[1:])
    # one buffer for all batches: to get memory takes longer than to fill it
    batch = torch.empty(shape, memory_format=torch.channels_last_3d)
    network.train()
    for indices in order.split(batch_size)[:num_steps]:
        directions = (1 - 2 * torch.randint(2, (batch_size, 3), generator=generator)).tolist()
        for place, index, (z, y, x) in zip(batch.numpy(), indices.tolist(), directions, strict=True):
            place[:] = cells[index, :, ::z, ::y, ::x]
        loss = F.binary_cross_entropy_with_logits(network(batch.to(device)), targets[indices].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _judge(network: nn.Module, cells: np.ndarray, batch_size: int, device) -> np.ndarray:
    network.eval()
    batches = torch.from_numpy(cells).split(batch_size)
    return torch.cat([network(batch.to(device)) > 0 for batch in batches]).cpu().numpy()
