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
    num_epochs: int = 12,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> ClassifierTest:
    """Train a small convolutional network, anew in each fold, to tell generated volumes from real ones.

    Three strided convolutions with group norm, the mean over all voxels, one linear layer: about 70,000 weights. Cells
    are mirrored at random in training, as a cell has no preferred side. Half of a handful of cells can be learned by
    heart: below some hundred cells in each set an accuracy near 0.5 says little.

    Args:
        real: (N, M, D, H, W) in [0, 1].
        generated: (N', M, D, H, W) in [0, 1].
        num_folds: of the cross-validation; every cell is judged once, by a network that did not see it.
        num_epochs: passes over the training cells.
        batch_size: cells in a training step.
        learning_rate: highest rate of AdamW, reached after a tenth of the steps and then lowered to 0.
        seed: of weights, folds, order and mirroring.
        device: where the network runs.

    Returns:
        The cross-validated accuracy.

    Raises:
        ValueError: if the volumes differ in shape, or a set has fewer cells than folds.
        ImportError: if scikit-learn or SciPy is missing.
    """
    real, generated = (np.asarray(v.detach().cpu() if isinstance(v, Tensor) else v) for v in (real, generated))
    if real.ndim != 5 or real.shape[1:] != generated.shape[1:]:
        raise ValueError(
            f"both sets must be (N, M, D, H, W) of one shape, got {real.shape} and {generated.shape}; bring both into"
            " the same cube"
        )

    def judge(training: np.ndarray, is_generated: np.ndarray, judged: np.ndarray, fold: int) -> np.ndarray:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * num_folds + fold)
            network = _Classifier(real.shape[1]).to(device)
        generator = torch.Generator().manual_seed(seed * num_folds + fold)
        _train(network, training, is_generated, num_epochs, batch_size, learning_rate, generator, device)
        return _judge(network, judged, batch_size, device)

    return cross_validated_test(real, generated, judge, num_folds, seed)


class _Classifier(nn.Module):
    """(B, M, D, H, W) -> (B,) logit of being generated."""

    def __init__(self, num_channels: int):
        super().__init__()
        widths = (num_channels, *_FEATURES)
        self.convolutions = nn.ModuleList(
            nn.Conv3d(width_in, width_out, 3, stride=2, padding=1)
            for width_in, width_out in zip(widths, widths[1:], strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in _FEATURES)
        self.linear = nn.Linear(2 * _FEATURES[-1], 1)

    def forward(self, volumes: Tensor) -> Tensor:
        features = volumes * 2 - 1
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            features = F.silu(norm(convolution(features)))
        features = features.flatten(2)  # (B, 64, voxels)
        return self.linear(torch.cat([features.mean(2), features.amax(2)], 1))[:, 0]


def _train(network, cells, is_generated, num_epochs, batch_size, learning_rate, generator, device) -> None:
    num_steps = num_epochs * -(-len(cells) // batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_steps, pct_start=0.1)
    targets = torch.from_numpy(is_generated).float()
    network.train()
    for _ in range(num_epochs):
        for indices in torch.randperm(len(cells), generator=generator).split(batch_size):
            volumes = torch.from_numpy(cells[indices.numpy()]).to(device, torch.float32)
            mirrored = torch.rand(3, generator=generator) < 0.5
            volumes = volumes.flip([axis + 2 for axis in range(3) if mirrored[axis]])
            loss = F.binary_cross_entropy_with_logits(network(volumes), targets[indices].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def _judge(network: nn.Module, cells: np.ndarray, batch_size: int, device) -> np.ndarray:
    network.eval()
    batches = torch.from_numpy(cells).split(batch_size)
    return torch.cat([network(batch.to(device, torch.float32)) > 0 for batch in batches]).cpu().numpy()
