"""Cells as triangles: the same surfaces as in `surfaces`, for programs that turn them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..optional import optional
from ..volumes import voxel_size_triple
from ..whole_files import whole_or_absent
from .canvas import channel_colors, check_volumes
from .surfaces import Surfaces, check_opacities, check_thresholds


if TYPE_CHECKING:
    import torch


def surface_meshes(
    volume: np.ndarray | torch.Tensor,
    voxel_size_um: float | Sequence[float] = 1.0,
    thresholds: Sequence[float | None] | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The surface of each channel of one volume, by marching cubes.

    Args:
        volume: (M, D, H, W) in [0, 1].
        voxel_size_um: voxel edge in µm, one number or (z, y, x).
        thresholds: as in `surface_library`.

    Returns:
        For each channel vertices (V, 3) float32, in µm, (z, y, x) from the middle of the first voxel, and triangles
        (F, 3) int64, indices of vertices; both empty where the channel has no surface.

    Raises:
        ValueError: if the volume is of another shape or range, or another argument does not match it.
        ImportError: if scikit-image is missing.

    Source: Lewiner et al. 2003, "Efficient implementation of marching cubes' cases with topological guarantees".
    """
    marching_cubes = optional("skimage.measure", "viz").marching_cubes
    if np.ndim(volume) != 4:
        raise ValueError(f"Expected a volume (M, D, H, W), got {np.ndim(volume)} axes. Give one cell at a time.")
    volume = check_volumes(volume, "volume", [str(index) for index in range(len(volume))])[0]
    spacing = voxel_size_triple(voxel_size_um)
    surfaces = Surfaces(volume, spacing, check_thresholds(thresholds, len(volume)))
    meshes = []
    for channel, level in zip(surfaces.channels, surfaces.levels, strict=True):
        vertices, triangles = np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int64)
        if channel.max() > level:
            vertices, triangles, _, _ = marching_cubes(channel, level, spacing=spacing)
        meshes.append((vertices - np.float32(spacing), triangles.astype(np.int64)))  # without the border of zeros
    return meshes


def write_glb(
    path: str | Path,
    volume: np.ndarray | torch.Tensor,
    channel_names: Sequence[str] = ("cell", "nucleus"),
    voxel_size_um: float | Sequence[float] = 1.0,
    thresholds: Sequence[float | None] | None = None,
    opacities: Sequence[float] | None = None,
) -> Path:
    """Write one cell as a 3D model that browsers, Blender and PowerPoint turn: the nucleus within a translucent cell.

    The file is binary glTF 2.0; a mesh for each channel that has a surface, named and coloured after it. One unit is
    1 µm, around the middle of the volume. Seen from the front it lies as an XY slice does: x to the right, y down,
    z away from the viewer.

    Args:
        path: ends in ``.glb``; missing folders are made.
        volume: (M, D, H, W) in [0, 1].
        channel_names: M names.
        voxel_size_um: voxel edge in µm, one number or (z, y, x).
        thresholds: as in `surface_library`.
        opacities: as in `surface_library`.

    Returns:
        The path.

    Raises:
        ValueError: if no channel has a surface, the path has another ending, the volume is of another shape or range,
            or another argument does not match it.
        ImportError: if scikit-image or trimesh is missing.
    """
    path = Path(path)
    if path.suffix.lower() != ".glb":
        raise ValueError(f"Expected a path that ends in .glb, got {str(path)!r}. Rename it.")
    trimesh = optional("trimesh", "viz")
    meshes = surface_meshes(volume, voxel_size_um, thresholds)
    check_volumes(volume, "volume", channel_names)
    if not any(len(triangles) for _, triangles in meshes):
        raise ValueError("Expected a channel that has a surface, got an empty volume. Give thresholds.")
    middle = (np.array(np.shape(volume)[1:]) - 1) * voxel_size_triple(voxel_size_um) / 2
    colors = channel_colors(len(meshes)) ** 2.2  # glTF's factors are linear
    scene = trimesh.Scene()
    for (vertices, triangles), name, color, opacity in zip(
        meshes, channel_names, colors, check_opacities(opacities, len(meshes)), strict=True
    ):
        if len(triangles) == 0:
            continue
        # (z, y, x) to glTF's right-handed axes, its y up and its z to the viewer: half a turn about x
        mesh = trimesh.Trimesh((vertices - middle)[:, ::-1] * (1, -1, -1), triangles, process=False)
        if mesh.volume < 0:  # triangles must be seen from outside
            mesh.invert()
        mesh.visual = trimesh.visual.TextureVisuals(
            material=trimesh.visual.material.PBRMaterial(
                name=name,
                baseColorFactor=[*np.rint(color * 255).astype(int).tolist(), round(opacity * 255)],
                alphaMode="OPAQUE" if opacity == 1 else "BLEND",
                metallicFactor=0.0,
                roughnessFactor=0.5,
            )
        )
        scene.add_geometry(mesh, node_name=name, geom_name=name)
    with whole_or_absent(path) as temporary:
        temporary.write_bytes(scene.export(file_type="glb", include_normals=True))
    return path
