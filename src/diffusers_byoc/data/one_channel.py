"""One channel of a cell, as a pipeline takes it in `given_channels`."""

import numpy as np

from .formats.volume import Volume
from .processor import VolumeProcessor


def prepare_channel(volume: Volume, processor: VolumeProcessor, name: str) -> np.ndarray:
    """A channel, alone in its file or among others, in the middle of a cube.

    Args:
        volume: one channel, or some of which one bears that name, or as many as the processor's.
        processor: of the pipeline (`pipe.volume_processor`).
        name: of the channel, one of the processor's.

    Returns:
        (S, S, S) float32 in [0, 1].

    Raises:
        ValueError: if there is no such channel, or it does not fit.
    """
    config = processor.config
    if name not in config.channel_names:
        raise ValueError(f"Expected a channel among {list(config.channel_names)}, got {name}. Choose one of these.")
    names = list(volume.channel_names or ())
    if not names and len(volume.data) == config.num_channels:
        names = list(config.channel_names)
    if len(volume.data) > 1 and name not in names:
        raise ValueError(
            f"Expected the channel {name}: alone, or named so, got {len(volume.data)} channels ({', '.join(names)})."
            f" Save the {name} alone."
        )
    index = names.index(name) if name in names else 0
    intensity_range = config.intensity_range
    if intensity_range is not None and np.ndim(intensity_range) == 2:
        intensity_range = intensity_range[list(config.channel_names).index(name)]
    alone = VolumeProcessor(
        sample_size=config.sample_size,
        num_channels=1,
        channel_names=(name,),
        normalization=config.normalization,
        percentiles=config.percentiles,
        intensity_range=intensity_range,
        voxel_size_um=processor.voxel_size_um,
        oversize=config.oversize,
    )
    return alone.preprocess(volume.data[index : index + 1], volume.voxel_size_um).numpy()[0] / 2 + 0.5
