"""Phantom cells as a data set."""

from collections.abc import Sequence

import numpy as np

from ..formats.volume import Volume
from ..phantoms.phantom import PHENOTYPES, make_phantom
from ..processor import VolumeProcessor
from .cells import CellDataset
from .splits import Population


class PhantomCells(CellDataset):
    """Phantom cells, made at construction; no files.

    The phenotypes take turns, and cell `i` depends on `seed` and `i` alone: a larger set begins with the smaller one.

    Args:
        num_cells: how many.
        processor: makes the crops into network input; its `sample_size` bounds the phantoms and its `voxel_size_um`,
            which must be isotropic, is theirs (1 µm where it has none). Of three channels the third is mitochondria.
        phenotypes: some of `PHENOTYPES`; None for all. They are the classes.
        seed: 0 or more; sets of different seeds have no cell in common.
        cache_gb: memory for preprocessed cells, in 10⁹ bytes; at 64³ and two channels a cell takes 2.1 MB.
        doses: of `make_phantom`, which the cells of each phenotype have in turn, as the condition `dose_um`; None for
            cells of the full effect, without a dose.
        num_workers: processes that make them; 0 for this one.

    Attributes:
        truths: `PhantomTruth` of every cell, which is made again for it.

    Raises:
        ValueError: if an argument is out of range.
        ImportError: if scipy is not installed.
    """

    is_phantom = True

    def __init__(
        self,
        num_cells: int,
        processor: VolumeProcessor,
        phenotypes: Sequence[str] | None = None,
        seed: int = 0,
        cache_gb: float = 1.0,
        doses: Sequence[float] | None = None,
        num_workers: int = 0,
    ):
        phenotypes = PHENOTYPES if phenotypes is None else tuple(phenotypes)
        if num_cells < 1:
            raise ValueError(f"Expected `num_cells` of at least 1, got {num_cells}. Raise it.")
        if not phenotypes or set(phenotypes) - set(PHENOTYPES):
            raise ValueError(f"Expected `phenotypes` among {', '.join(PHENOTYPES)}, got {phenotypes}. Choose some.")
        if seed < 0:
            raise ValueError(f"Expected `seed` of at least 0, got {seed}. Raise it.")
        if doses is not None and not len(doses):
            raise ValueError("Expected a dose or more as `doses`, got none. Give some, or None.")
        self._phantom_voxel_size_um = processor.voxel_size_um or (1.0,) * 3
        if len(set(self._phantom_voxel_size_um)) != 1:
            raise ValueError(
                "Expected cubic voxels, as phantoms have, got the processor's `voxel_size_um`"
                f" {processor.voxel_size_um}. Give it one number."
            )
        if processor.config.num_channels not in (2, 3):
            raise ValueError(
                f"Expected `num_channels` 2 or 3, as phantoms have, got {processor.config.num_channels}. Set it to one"
                " of these."
            )
        self.seed = seed
        population = Population(
            ids=tuple(f"phantom {row} of seed {seed}" for row in range(num_cells)),
            labels=tuple(phenotypes[row % len(phenotypes)] for row in range(num_cells)),
            groups=tuple(map(str, range(num_cells))),
            conditions={}
            if doses is None
            else {
                "dose_um": np.array([[doses[row // len(phenotypes) % len(doses)]] for row in range(num_cells)], float)
            },
        )
        super().__init__(processor, population, None, "phantoms", sorted(set(phenotypes)))
        self._prepare(cache_gb, "Making phantoms", num_workers)

    @property
    def truths(self) -> list:
        return [self._phantom(row).truth for row in self._rows]

    def phantom(self, index: int):
        """The whole `Phantom` of one cell, made again: raw counts, true masks, true measurements."""
        return self._phantom(self._rows[range(len(self))[index]])

    def _phantom(self, row: int):
        return make_phantom(
            self.population.labels[row],
            seed=int(np.random.SeedSequence([self.seed, row]).generate_state(1, np.uint64)[0]),
            max_size=self.processor.config.sample_size,
            voxel_size_um=self._phantom_voxel_size_um[0],
            num_channels=self.processor.config.num_channels,
            dose=float(dose[row, 0]) if (dose := self.population.conditions.get("dose_um")) is not None else None,
        )

    def _read(self, row: int) -> Volume:
        return Volume(self._phantom(row).volume, self._phantom_voxel_size_um)

    def _where(self, row: int) -> str:
        return self.population.ids[row]
