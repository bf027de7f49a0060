"""Pictures of multichannel volumes. Needs matplotlib: ``pip install "diffusers_byoc[viz]"``."""

from .slices import CHANNEL_COLORS, compare_volumes, composite_channels, orthogonal_slices, write_png


__all__ = ["CHANNEL_COLORS", "compare_volumes", "composite_channels", "orthogonal_slices", "write_png"]
