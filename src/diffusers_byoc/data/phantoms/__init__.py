"""Phantom cells: analytic, seeded light-sheet volumes of cell body, nucleus and, if asked for, mitochondria.

A phantom is a drawing, never a melanoma cell. Its three phenotypes follow the words in which BYOC's paper describes
melanoma cells in collagen under three drugs: round and flat (nocodazole), spindly (blebbistatin), and in between
(binimetinib). No shape statistic is fitted to measured cells, so a result on phantoms says that the code works and
nothing about biology.

Lengths are µm and arrays are (z, y, x) throughout; only the last stage, the camera, knows counts. The body and the
nucleus are star-shaped, `r(n) = 1 + Σ_j c_j P_l(n · e_j)` in the unit space of an ellipsoid (zonal harmonics with
random axes e_j, i.e. low-order spherical harmonics); protrusions are chains of tapered capsules, joined to the body
by a smooth minimum of the two distance fields.
"""

from .measurement import PhantomTruth
from .phantom import PHENOTYPES, Phantom, make_phantom


__all__ = ["PHENOTYPES", "Phantom", "PhantomTruth", "make_phantom"]
