"""Where scripts look for stacks since the first version; they live in `microscope`."""

from .microscope.cutting import CutCell, cut_cells, find_cells
from .microscope.stacks import Stack, channel_indices, open_stack, read_channels


__all__ = ["CutCell", "Stack", "channel_indices", "cut_cells", "find_cells", "open_stack", "read_channels"]
