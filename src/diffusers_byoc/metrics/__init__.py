"""Measurements of generated and real cells. Needs ``pip install "diffusers_byoc[metrics]"``."""

from .morphology import CellMorphology, measure_cell, measure_cells


__all__ = ["CellMorphology", "measure_cell", "measure_cells"]
