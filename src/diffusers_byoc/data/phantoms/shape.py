"""Shapes of phantom cells: what distinguishes the phenotypes, the geometry drawn from it, and its distance field."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import numpy as np


@dataclass(frozen=True)
class Recipe:
    """The ranges one phenotype is drawn from; a pair is a uniform range. Ratios are to the longest axis."""

    body_volume_um3: float  # median of a log-normal
    middle_axis: tuple[float, float]
    short_axis: tuple[float, float]
    irregularity: tuple[float, float]  # bound on |r(n) - 1| of the body
    bend: float  # standard deviation of the rise at the body's end over its half length
    nucleus_fraction: tuple[float, float]  # of the body's volume
    nucleus_axes: tuple[float, float]  # middle and short axis of the nucleus
    tilt_degrees: float  # standard deviation, out of the collagen's plane
    roll_degrees: float  # standard deviation, about the long axis
    num_polar: tuple[int, int] = (0, 0)  # protrusions at the ends of the long axis; inclusive range
    num_lateral: tuple[int, int] = (0, 0)  # protrusions anywhere around the rim; inclusive range
    protrusion_length: tuple[float, float] = (0.0, 0.0)  # µm beyond the surface
    root_radius: tuple[float, float] = (0.0, 0.0)  # µm, of a protrusion
    tip_radius: tuple[float, float] = (0.0, 0.0)  # µm
    branch_probability: float = 0.0
    protrusion_probability: float = 1.0  # of each one that would be there


RECIPES = {
    "binimetinib": Recipe(
        body_volume_um3=7000.0,
        middle_axis=(0.62, 0.82),
        short_axis=(0.46, 0.60),
        irregularity=(0.18, 0.34),
        bend=0.10,
        nucleus_fraction=(0.25, 0.36),
        nucleus_axes=(0.80, 0.66),
        tilt_degrees=18.0,
        roll_degrees=20.0,
        num_polar=(0, 1),
        num_lateral=(0, 2),
        protrusion_length=(4.0, 10.0),
        root_radius=(4.5, 6.5),
        tip_radius=(1.0, 1.7),
        branch_probability=0.1,
    ),
    "blebbistatin": Recipe(
        body_volume_um3=5000.0,
        middle_axis=(0.38, 0.50),
        short_axis=(0.32, 0.40),
        irregularity=(0.10, 0.20),
        bend=0.18,
        nucleus_fraction=(0.28, 0.38),
        nucleus_axes=(0.64, 0.56),
        tilt_degrees=15.0,
        roll_degrees=60.0,
        num_polar=(2, 3),
        num_lateral=(0, 2),
        protrusion_length=(9.0, 18.0),
        root_radius=(3.2, 4.8),
        tip_radius=(0.9, 1.2),
        branch_probability=0.45,
    ),
    "nocodazole": Recipe(
        body_volume_um3=7500.0,
        middle_axis=(0.90, 1.00),
        short_axis=(0.36, 0.48),
        irregularity=(0.05, 0.12),
        bend=0.04,
        nucleus_fraction=(0.24, 0.36),
        nucleus_axes=(0.90, 0.58),
        tilt_degrees=14.0,
        roll_degrees=10.0,
    ),
}

#: What a cell is drawn from that no drug has reached. Its protrusions would be the drug's; it has none of them.
UNTREATED = Recipe(
    body_volume_um3=6000.0,
    middle_axis=(0.78, 0.92),
    short_axis=(0.60, 0.74),
    irregularity=(0.08, 0.16),
    bend=0.05,
    nucleus_fraction=(0.26, 0.36),
    nucleus_axes=(0.84, 0.72),
    tilt_degrees=15.0,
    roll_degrees=25.0,
    protrusion_probability=0.0,
)
EC50_UM = 2.0  # dose of half the effect, µM
_OF_PROTRUSIONS = ("num_polar", "num_lateral", "protrusion_length", "root_radius", "tip_radius", "branch_probability")


def recipe_at(phenotype: str, dose: float | None) -> Recipe:
    """The recipe of a phenotype at a dose in µM: between `UNTREATED` and its own, as `make_phantom` says."""
    full = RECIPES[phenotype]
    if dose is None:
        return full
    effect = dose / (dose + EC50_UM)
    mixed = {}
    for field in fields(Recipe):
        if field.name not in _OF_PROTRUSIONS:
            none, all_of_it = (np.array(getattr(recipe, field.name)) for recipe in (UNTREATED, full))
            value = ((1 - effect) * none + effect * all_of_it).tolist()
            mixed[field.name] = tuple(value) if isinstance(value, list) else value
    return replace(full, **mixed)


# ---------------------------------------------------------------------------------------------------------------------
# geometry

_BODY_VOLUME_SPREAD = 0.22  # standard deviation of the logarithm
_NUCLEUS_IRREGULARITY = (0.04, 0.12)
_NUCLEUS_DEPTH_UM = 1.2  # least cytoplasm around the nucleus
_BLEND_UM = 3.0  # width of the flare where a protrusion leaves the body
_SEGMENT_UM = 2.5
MARGIN_VOXELS = 2
_MIN_TUBE_VOXELS = 0.9  # above √3/2 the voxels along a tube's axis are face-connected, however the tube runs

_DEGREES = (2, 3, 3, 4, 5)  # l of the zonal harmonics; 0 and 1 would only scale and shift
_LEGENDRE = {  # P_l(x), highest power first, for Horner's rule
    2: (1.5, 0.0, -0.5),
    3: (2.5, 0.0, -1.5, 0.0),
    4: (4.375, 0.0, -3.75, 0.0, 0.375),
    5: (7.875, 0.0, -8.75, 0.0, 1.875, 0.0),
}


@dataclass(frozen=True)
class _Star:
    """A closed surface around `center`: an ellipsoid whose unit sphere is deformed by zonal harmonics."""

    center: np.ndarray  # (3,) µm, body frame
    half_axes: np.ndarray  # (3,) µm
    degrees: tuple[int, ...]
    directions: np.ndarray  # (J, 3) unit vectors e_j
    coefficients: np.ndarray  # (J,) c_j

    def radius(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """r(n) for unit vectors given by component."""
        radius = np.ones_like(x)
        for degree, direction, coefficient in zip(self.degrees, self.directions, self.coefficients, strict=True):
            cosine = x * np.float32(direction[0])
            cosine += y * np.float32(direction[1])
            cosine += z * np.float32(direction[2])
            powers = _LEGENDRE[degree]
            harmonic = cosine * np.float32(coefficient * powers[0])
            for power in powers[1:-1]:
                harmonic += np.float32(coefficient * power)
                harmonic *= cosine
            harmonic += np.float32(coefficient * powers[-1])
            radius += harmonic
        return radius

    def distance(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Signed distance in µm at body-frame points, negative inside; first order near the surface."""
        unit = [
            (value - np.float32(c)) / np.float32(a)
            for value, c, a in zip((x, y, z), self.center, self.half_axes, strict=True)
        ]
        length = np.sqrt(unit[0] ** 2 + unit[1] ** 2 + unit[2] ** 2) + np.float32(1e-6)
        normal = [value / length for value in unit]
        slope = np.sqrt(sum((value / np.float32(a)) ** 2 for value, a in zip(normal, self.half_axes, strict=True)))
        return (length - self.radius(*normal)) / (slope + np.float32(1e-6))

    def surface(self) -> np.ndarray:
        """(512, 3) points of the surface, µm, body frame."""
        normals = _SPHERE
        return self.center + self.half_axes * normals * self.radius(*normals.T)[:, None]

    def with_volume(self, volume_um3: float) -> _Star:
        """The same shape at a given volume: 4π/3 · abc · mean of r³."""
        volume = 4 / 3 * math.pi * self.half_axes.prod() * float(np.mean(self.radius(*_SPHERE.T) ** 3))
        return replace(self, half_axes=self.half_axes * (volume_um3 / volume) ** (1 / 3))


@dataclass(frozen=True)
class _Tube:
    """A chain of tapered capsules."""

    points: np.ndarray  # (P, 3) µm, body frame
    radii: np.ndarray  # (P,) µm


@dataclass(frozen=True)
class Geometry:
    """A whole cell in its body frame (x long, y middle, z short axis) and the pose that frame has in the volume."""

    body: _Star
    nucleus: _Star
    tubes: tuple[_Tube, ...]
    num_protrusions: int
    bend: float  # 1/µm: the body frame is straightened by y -> y - bend · x²
    blend_um: float
    pose: np.ndarray  # (3, 3), body (x, y, z) to volume (z, y, x)

    def scaled(self, factor: float) -> Geometry:
        def scale(star: _Star) -> _Star:
            return replace(star, center=star.center * factor, half_axes=star.half_axes * factor)

        return replace(
            self,
            body=scale(self.body),
            nucleus=scale(self.nucleus),
            tubes=tuple(_Tube(tube.points * factor, tube.radii * factor) for tube in self.tubes),
            bend=self.bend / factor,
            blend_um=self.blend_um * factor,
        )

    def with_tubes_at_least(self, radius_um: float) -> Geometry:
        return replace(self, tubes=tuple(replace(t, radii=np.maximum(t.radii, radius_um)) for t in self.tubes))

    def to_volume(self, points: np.ndarray) -> np.ndarray:
        """(N, 3) straight body-frame points to (N, 3) (z, y, x) offsets from the body's centre, µm."""
        bent = points.copy()
        bent[:, 1] += self.bend * points[:, 0] ** 2
        return bent @ self.pose.T

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Least and greatest (z, y, x) of the cell, µm."""
        surface = self.to_volume(self.body.surface())
        low, high = surface.min(axis=0), surface.max(axis=0)
        for tube in self.tubes:
            points = self.to_volume(tube.points)
            low = np.minimum(low, (points - tube.radii[:, None]).min(axis=0))
            high = np.maximum(high, (points + tube.radii[:, None]).max(axis=0))
        return low, high


def _fibonacci_sphere(num_points: int) -> np.ndarray:
    """(num_points, 3) nearly uniform unit vectors."""
    index = np.arange(num_points) + 0.5
    z = 1 - 2 * index / num_points
    azimuth = math.pi * (1 + math.sqrt(5)) * index
    ring = np.sqrt(1 - z**2)
    return np.stack([ring * np.cos(azimuth), ring * np.sin(azimuth), z], axis=1).astype(np.float32)


_SPHERE = _fibonacci_sphere(512)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _draw_star(rng: np.random.Generator, half_axes: np.ndarray, irregularity: float) -> _Star:
    """A deformed ellipsoid with |r(n) - 1| <= irregularity, because |P_l| <= 1 and Σ|c_j| = irregularity."""
    num_waves = len(_DEGREES)
    shares = rng.dirichlet(np.full(num_waves, 2.0))
    signs = rng.choice([-1.0, 1.0], size=num_waves)
    directions = _unit(rng.standard_normal((num_waves, 3)))
    return _Star(np.zeros(3), half_axes, _DEGREES, directions, irregularity * shares * signs)


def _draw_nucleus(recipe: Recipe, body: _Star, body_volume_um3: float, rng: np.random.Generator) -> _Star:
    """A nucleus with at least `_NUCLEUS_DEPTH_UM` of cytoplasm around it.

    What is drawn may not fit. It is then morphed, at constant volume, towards a small copy of the body, which always
    fits; the first step of the morph that fits is taken.
    """
    volume = body_volume_um3 * rng.uniform(*recipe.nucleus_fraction)
    half_axes = np.array([1.0, *recipe.nucleus_axes]) * np.exp(0.06 * rng.standard_normal(3))
    drawn = _draw_star(rng, half_axes, rng.uniform(*_NUCLEUS_IRREGULARITY)).with_volume(volume)
    center = body.half_axes * rng.normal(0.0, (0.14, 0.08, 0.05))
    copy = body.with_volume(volume)
    for weight in np.linspace(0.0, 1.0, 9):
        nucleus = _Star(
            center=(1 - weight) * center,
            half_axes=drawn.half_axes ** (1 - weight) * copy.half_axes**weight,
            degrees=drawn.degrees + copy.degrees,
            directions=np.concatenate([drawn.directions, copy.directions]),
            coefficients=np.concatenate([(1 - weight) * drawn.coefficients, weight * copy.coefficients]),
        ).with_volume(volume)
        if body.distance(*nucleus.surface().T.astype(np.float32)).max() < -_NUCLEUS_DEPTH_UM:
            break
    return nucleus


def _draw_tube(
    rng: np.random.Generator,
    start: np.ndarray,
    heading: np.ndarray,
    length_um: float,
    root_um: float,
    tip_um: float,
    sway: float,
) -> _Tube:
    """A tapered process from `start` that wanders about its first heading."""
    num_segments = max(2, round(length_um / _SEGMENT_UM))
    turn = rng.normal(0.0, sway, 3)  # a steady turn gives an arc, the jitter below makes it irregular
    points = [start]
    for _ in range(num_segments):
        points.append(points[-1] + heading * length_um / num_segments)
        heading = _unit(heading + turn / num_segments + rng.normal(0.0, sway / 4, 3))
    taper = np.linspace(0.0, 1.0, num_segments + 1)
    radii = tip_um + (root_um - tip_um) * (1 - taper) ** 1.6
    radii[-1] *= rng.uniform(0.85, 1.3)  # some tips end in a small club, some in a point
    return _Tube(np.array(points), radii)


def _draw_tubes(recipe: Recipe, body: _Star, rng: np.random.Generator) -> tuple[tuple[_Tube, ...], int]:
    num_polar = int(rng.integers(recipe.num_polar[0], recipe.num_polar[1] + 1))
    num_lateral = int(rng.integers(recipe.num_lateral[0], recipe.num_lateral[1] + 1))
    if recipe.protrusion_probability < 1:  # whose numbers a cell of the full effect does not draw
        num_polar, num_lateral = rng.binomial((num_polar, num_lateral), recipe.protrusion_probability).tolist()
    first_pole = rng.choice([-1.0, 1.0])
    headings = [
        np.array([first_pole * (-1) ** i, *rng.normal(0.0, 0.15 if i < 2 else 0.5, 2)]) for i in range(num_polar)
    ]
    for _ in range(num_lateral):
        azimuth = rng.uniform(0, 2 * math.pi)
        headings.append(np.array([math.cos(azimuth), math.sin(azimuth), rng.normal(0.0, 0.25)]))

    tubes = []
    for index, heading in enumerate(headings):
        heading = _unit(heading)
        normal = _unit(heading / body.half_axes)
        surface = body.half_axes * normal * float(body.radius(*normal[:, None].astype(np.float32))[0])
        reach = float(np.linalg.norm(surface))
        length = rng.uniform(*recipe.protrusion_length) * (1.0 if index < num_polar else 0.7)
        root, tip = rng.uniform(*recipe.root_radius), rng.uniform(*recipe.tip_radius)
        if index >= num_polar:
            root = 0.75 * root
        tube = _draw_tube(rng, 0.7 * surface, heading, length + 0.3 * reach, root, tip, sway=0.4)
        tubes.append(tube)
        if rng.random() < recipe.branch_probability:
            fork = int(rng.integers(len(tube.points) // 2, len(tube.points) - 1))
            sideways = _unit(np.cross(heading, rng.standard_normal(3)))
            branch_heading = _unit(tube.points[fork + 1] - tube.points[fork]) + rng.uniform(0.7, 1.2) * sideways
            branch_length = length * rng.uniform(0.4, 0.7)
            branch_root = max(tip, 0.8 * tube.radii[fork])
            tubes.append(
                _draw_tube(rng, tube.points[fork], _unit(branch_heading), branch_length, branch_root, tip, sway=0.3)
            )
    return tuple(tubes), len(headings)


def _rotation(axis: np.ndarray, angle: float) -> np.ndarray:
    """Rodrigues' formula, (3, 3)."""
    x, y, z = _unit(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


def draw_geometry(recipe: Recipe, rng: np.random.Generator) -> Geometry:
    # 1. body
    body_volume = recipe.body_volume_um3 * math.exp(_BODY_VOLUME_SPREAD * float(np.clip(rng.normal(), -2.5, 2.5)))
    half_axes = np.array([1.0, rng.uniform(*recipe.middle_axis), rng.uniform(*recipe.short_axis)])
    body = _draw_star(rng, half_axes, rng.uniform(*recipe.irregularity)).with_volume(body_volume)

    # 2. nucleus and protrusions, in the body's frame
    nucleus = _draw_nucleus(recipe, body, body_volume, rng)
    tubes, num_protrusions = _draw_tubes(recipe, body, rng)
    bend = recipe.bend * rng.normal() / body.half_axes[0]

    # 3. pose: any direction in the plane, a modest tilt out of it
    turn = _rotation(np.array([0.0, 0.0, 1.0]), rng.uniform(0, 2 * math.pi))
    azimuth = rng.uniform(0, 2 * math.pi)
    tilt = _rotation(
        np.array([math.cos(azimuth), math.sin(azimuth), 0.0]), math.radians(rng.normal(0, recipe.tilt_degrees))
    )
    roll = _rotation(np.array([1.0, 0.0, 0.0]), math.radians(rng.normal(0, recipe.roll_degrees)))
    pose = (tilt @ turn @ roll)[::-1]
    return Geometry(body, nucleus, tubes, num_protrusions, bend, _BLEND_UM, pose)


def fit(geometry: Geometry, max_size: int, voxel_size_um: float) -> Geometry:
    """The cell itself where it fits into max_size voxels, else the same cell drawn smaller."""
    room = (max_size - 2 * MARGIN_VOXELS) * voxel_size_um
    while True:
        fitted = geometry.with_tubes_at_least(_MIN_TUBE_VOXELS * voxel_size_um)
        low, high = fitted.bounds()
        extent = float((high - low).max())
        if extent <= room:
            return fitted
        geometry = geometry.scaled(0.99 * room / extent)


def _tube_distance(geometry: Geometry, grid: list[np.ndarray], voxel_size_um: float) -> np.ndarray:
    """Distance to the protrusions, µm; a large constant away from them, where no surface depends on it."""
    distance = np.full([axis.size for axis in grid], 1e3, dtype=np.float32)
    for tube in geometry.tubes:
        points = geometry.to_volume(tube.points)
        for start, end, start_um, end_um in zip(points[:-1], points[1:], tube.radii[:-1], tube.radii[1:], strict=True):
            reach = max(start_um, end_um) + geometry.blend_um + 2 * voxel_size_um
            low, high = np.minimum(start, end) - reach, np.maximum(start, end) + reach
            box = tuple(slice(*np.searchsorted(axis, (lo, hi))) for axis, lo, hi in zip(grid, low, high, strict=True))
            offset = [axis[part] - np.float32(s) for axis, part, s in zip(grid, box, start, strict=True)]
            offset = [offset[0][:, None, None], offset[1][None, :, None], offset[2][None, None, :]]
            step = (end - start).astype(np.float32)
            along = (offset[0] * step[0] + offset[1] * step[1] + offset[2] * step[2]) / np.float32(step @ step)
            np.clip(along, 0, 1, out=along)
            squared = sum((o - along * s) ** 2 for o, s in zip(offset, step, strict=True))
            capsule = np.sqrt(squared) - (np.float32(start_um) + along * np.float32(end_um - start_um))
            np.minimum(distance[box], capsule, out=distance[box])
    return distance


def distances(geometry: Geometry, grid: list[np.ndarray], voxel_size_um: float) -> tuple[np.ndarray, np.ndarray]:
    """Signed distance to the cell and to the nucleus, (d, h, w) float32 µm each, negative inside."""
    z, y, x = grid[0][:, None, None], grid[1][None, :, None], grid[2][None, None, :]
    straight = [z * column[0] + y * column[1] + x * column[2] for column in geometry.pose.T.astype(np.float32)]
    straight[1] -= np.float32(geometry.bend) * straight[0] ** 2
    cell = geometry.body.distance(*straight)
    nucleus = geometry.nucleus.distance(*straight)
    if geometry.tubes:
        tubes = _tube_distance(geometry, grid, voxel_size_um)
        blend = np.float32(geometry.blend_um)
        overlap = np.maximum(blend - np.abs(cell - tubes), 0)
        cell = np.minimum(cell, tubes) - overlap**2 / (4 * blend)  # quadratic smooth minimum
    return cell, nucleus
