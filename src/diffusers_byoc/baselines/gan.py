"""What the GANs have in common as diffusers models: noise in, volumes out."""

from dataclasses import dataclass

from diffusers.configuration_utils import ConfigMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from ..models.checked_loading import CheckedModelMixin


@dataclass
class GANOutput(BaseOutput):
    """`sample` (B, M, D, H, W) in [-1, 1]."""

    sample: Tensor


class GANModel(CheckedModelMixin, ConfigMixin):
    """A generator, as `generator`, with all networks that it is trained against.

    Its configuration has `num_channels`, `channel_names`, `sample_size` and `latent_dim`.
    """

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of the noise of one volume."""
        return (self.config.latent_dim,)

    def forward(self, latents: Tensor, return_dict: bool = True) -> GANOutput | tuple[Tensor]:
        """Generate volumes.

        Args:
            latents: (B, latent_dim) standard normal noise.
            return_dict: return the dataclass, or a plain tuple.

        Returns:
            `sample` (B, M, D, H, W) in [-1, 1].

        Raises:
            ValueError: for noise of another length.
        """
        if latents.ndim != 2 or latents.shape[1] != self.config.latent_dim:
            raise ValueError(
                f"Expected latents (B, {self.config.latent_dim}), got {tuple(latents.shape)}. Draw as many"
                " numbers for each volume."
            )
        sample = self.generator(latents)
        return GANOutput(sample=sample) if return_dict else (sample,)


def check_channel_names(num_channels: int, channel_names: tuple[str, ...]) -> None:
    """Raise `ValueError` unless there are as many names as channels."""
    if len(channel_names) != num_channels:
        raise ValueError(f"Expected {num_channels} channel_names, got {tuple(channel_names)}. Name every channel.")
