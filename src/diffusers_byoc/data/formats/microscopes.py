"""The microscopes' own formats, CZI, ND2 and LIF, through bioio."""

import functools
import importlib.util
import math
from pathlib import Path

from ...optional import optional
from .units import Step, VoxelSize, voxel_size_of
from .volume import OpenImage, VolumeFileError


def open_images(path: Path) -> list[OpenImage]:
    """The images (scenes) of a file.

    Raises:
        ValueError: if the file is damaged, or holds scans of other axes.
        ImportError: if bioio, or its reader of this format, is not installed.
    """
    bioio, suffix = optional("bioio", "data,bioio"), path.suffix.lower()
    reader = f"bioio_{suffix[1:]}"
    if importlib.util.find_spec(reader) is None:
        raise ImportError(
            f'Expected the package {reader} for {path}, got none. Run pip install "diffusers_byoc[bioio]".'
        )
    return [_image(path, bioio, name, index) for index, name in enumerate(bioio.BioImage(path).scenes)]


def _image(path: Path, bioio, name: str, index: int) -> OpenImage:
    image = bioio.BioImage(path)
    image.set_scene(index)
    if path.suffix.lower() == ".lif":
        _check_lif(path, index)
    sizes = dict(image.dims.items())
    names = tuple(str(channel) for channel in image.channel_names or [])
    return OpenImage(
        path=path,
        axes="".join(sizes),
        shape=tuple(sizes.values()),
        dtype=image.dtype,
        read=functools.partial(image.get_image_data, "".join(sizes)),
        lazy=functools.partial(image.get_image_dask_data, "".join(sizes)),
        name=name,
        voxel_size=_voxel_size(image, path),
        channel_names=names if len(names) == sizes.get("C", 1) else None,
    )


def _voxel_size(image, path: Path) -> VoxelSize:
    if path.suffix.lower() == ".nd2" and not _is_calibrated(path):
        return VoxelSize(None, "an ND2 that is not calibrated")
    lengths = image.physical_pixel_sizes
    if lengths is None:
        return VoxelSize(None, "nothing")
    steps = {axis: getattr(lengths, axis) for axis in "ZYX"}
    # in µm, all of them; the sign says which way the stage went
    return voxel_size_of({axis: Step(abs(step), "µm") for axis, step in steps.items() if step and math.isfinite(step)})


def _check_lif(path: Path, scene_index: int) -> None:
    """Refuse scans of other axes, of which bioio says that they have fewer, or are damaged."""
    try:
        import liffile
    except ImportError:  # bioio-lif before 2.0 reads with another package
        return
    with liffile.LifFile(path) as file:
        sizes = file.images[scene_index].sizes  # from the slowest axis to the fastest; none of length 1
    if not set(sizes) <= set("TCZYX") or list(sizes)[-2:] != ["Y", "X"]:
        known = {"λ": "emission wavelength", "Λ": "excitation wavelength", "A": "rotation", "M": "tile", "S": "colour"}
        axes = ", ".join(
            f"{axis}={length}" + (f" ({known[axis]})" if axis in known else "") for axis, length in sizes.items()
        )
        raise VolumeFileError(
            f"Expected planes of Y and X for each Z and channel in {path}, got a scan of {axes}. Export it from LAS X"
            " as an OME-TIFF with these axes: wavelengths as channels or one of them, tiles merged, an xz scan"
            " resliced."
        )


def _is_calibrated(path: Path) -> bool:
    """Whether an ND2 says how large its voxels are; bioio has 1 µm where it does not."""
    import nd2

    with nd2.ND2File(path) as file:
        return all(all(channel.volume.axesCalibrated) for channel in file.metadata.channels or [])
