"""A cell or a nucleus from a file that somebody sends."""

from pathlib import Path

import numpy as np

from ..data import VolumeProcessor, read_volume
from ..data.formats.reading import ending_of, open_images
from ..data.formats.volume import Volume


ENDINGS = (".tif", ".tiff", ".npy", ".npz", ".nii", ".nii.gz")
MAX_UPLOAD_BYTES = 2**26  # of a file
MAX_UNPACKED_BYTES = 2**28  # one cell of two channels at uint16 is then at most 406 voxels wide


def read_upload(path: str) -> Volume:
    """One volume of a file that is not trusted: of known formats, small when unpacked; nothing of it is run.

    Raises:
        ValueError: naming the file, what is wrong with it, and the remedy.
    """
    name = Path(path).name
    if ending_of(path) not in ENDINGS:
        raise ValueError(f"Expected a file ending in {', '.join(ENDINGS)}, got {name}. Convert it.")
    try:
        images = open_images(path)
        sizes = [image.num_bytes for image in images]
        for image in images:
            image.close()
        if sum(sizes) > MAX_UNPACKED_BYTES:
            raise ValueError(
                f"Expected one cell of at most {MAX_UNPACKED_BYTES} bytes, got {sum(sizes)} in {name}. Cut it out."
            )
        return read_volume(path)
    except ValueError as error:  # who sent it knows it by its name
        raise ValueError(str(error).replace(str(path), name)) from error


def as_cell(volume: Volume, processor: VolumeProcessor) -> np.ndarray:
    """An uploaded cell as the pipeline's training cells were prepared.

    Args:
        volume: as many channels as the pipeline's.
        processor: the pipeline's.

    Returns:
        (M, S, S, S) in [0, 1].

    Raises:
        ValueError: if it does not fit.
    """
    return processor.preprocess(volume.data, volume.voxel_size_um).numpy() / 2 + 0.5


def as_nucleus(volume: Volume, processor: VolumeProcessor) -> np.ndarray:
    """The nucleus of an upload, alone or among the pipeline's channels, in the middle of a cube.

    Args:
        volume: one channel, or one named "nucleus", or as many as the pipeline's.
        processor: the pipeline's.

    Returns:
        (S, S, S) in [0, 1].

    Raises:
        ValueError: if there is no nucleus, or it does not fit.
    """
    config = processor.config
    names = list(volume.channel_names or ())
    if not names and len(volume.data) == config.num_channels:
        names = list(config.channel_names)
    if len(volume.data) == 1:
        index = 0
    elif "nucleus" in names:
        index = names.index("nucleus")
    else:
        raise ValueError(
            f"Expected a nucleus: one channel, or one named so, got {len(volume.data)} channels ({', '.join(names)})."
            " Save the nucleus alone."
        )
    intensity_range = config.intensity_range
    if intensity_range is not None and np.ndim(intensity_range) == 2:
        intensity_range = intensity_range[list(config.channel_names).index("nucleus")]
    alone = VolumeProcessor(
        sample_size=config.sample_size,
        num_channels=1,
        channel_names=("nucleus",),
        normalization=config.normalization,
        percentiles=config.percentiles,
        intensity_range=intensity_range,
        voxel_size_um=processor.voxel_size_um,
        oversize=config.oversize,
    )
    return as_cell(Volume(volume.data[index : index + 1], volume.voxel_size_um), alone)[0]
