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
