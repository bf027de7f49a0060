"""Figures of volumes and of what is measured on them. Needs matplotlib: ``pip install "diffusers_byoc[viz]"``.

Every function that draws returns a matplotlib figure that belongs to no window; `write_png` writes it. `write_glb`
writes a 3D model.
"""

from .canvas import CHANNEL_COLORS, composite_channels, write_png
from .charts import SERIES_COLORS, degradation_curves, feature_distributions, metric_bars
from .films import frame_strip, write_film
from .galleries import depth_planes, sample_library
from .meshes import surface_meshes, write_glb
from .slices import PLANE_COLORS, compare_pairs, compare_volumes, orthogonal_slices
from .surfaces import render_surfaces, surface_library, surface_views


__all__ = [
    "CHANNEL_COLORS",
    "PLANE_COLORS",
    "SERIES_COLORS",
    "compare_pairs",
    "compare_volumes",
    "composite_channels",
    "degradation_curves",
    "depth_planes",
    "feature_distributions",
    "frame_strip",
    "metric_bars",
    "orthogonal_slices",
    "render_surfaces",
    "sample_library",
    "surface_library",
    "surface_meshes",
    "surface_views",
    "write_film",
    "write_glb",
    "write_png",
]
