"""The batches that a stage is fed with: each a function of its number, shared out among the processes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..data import Cells, augment_cells, draw_augmentation
from ..data.sets.batches import StepBatches
from ..models import MultiCodebookVQModel
from ..pipelines.conditions import standardize_conditions
from ..randomness import process_share, step_generator
from .interruptions import ignore_termination
from .latents import CachedLatents
from .settings import StageSettings


def remaining_batches(cells: Cells, settings: StageSettings, first_step: int) -> DataLoader:
    """A loader of what this process has left to see of a stage."""
    state, accumulation = PartialState(), settings.gradient_accumulation_steps
    return cells.loader(
        settings.train_batch_size,
        first_step * accumulation,
        (settings.max_train_steps - first_step) * accumulation,
        settings.seed,
        state.process_index,
        state.num_processes,
        settings.shuffle_buffer_size,
        num_workers=settings.dataloader_num_workers,
        worker_init_fn=ignore_termination,
    )


def cells_to_encode_once(cells: Cells, settings: StageSettings, num_augmented_copies: int | None) -> Dataset | None:
    """The cells, or copies of them, whose latents are kept on the disk; None where batches are encoded on the way.

    Args:
        cells: to train on.
        settings: of the stage.
        num_augmented_copies: of every cell that is augmented; None to draw another in every epoch.
    """
    if not cells.is_indexable:  # a stream may outgrow the disk
        return None
    if not settings.is_augmented:
        return cells
    return None if num_augmented_copies is None else AugmentedCopies(cells, num_augmented_copies, settings)


def latent_batches(
    accelerator: Accelerator,
    settings: StageSettings,
    cells: Cells,
    vqvae: MultiCodebookVQModel,
    latents: CachedLatents | None,
    first_step: int,
    conditions: Sequence[Mapping[str, Any]] | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """What this process has left to see of a stage that trains on latents.

    Args:
        accelerator: gives autocast and the device.
        settings: of the stage.
        cells: to train on.
        vqvae: trained, on the device.
        latents: those of all `cells`, once or several times; None to encode augmented batches.
        first_step: steps made before.
        conditions: of the pipeline; None for a U-Net that takes none.

    Yields:
        Normalised latents (B, M*n, d, h, w), class labels (B,), and conditions (B, P) as the U-Net takes them, or
        None.
    """

    def vectors(values: Mapping[str, Tensor]) -> Tensor | None:
        if not conditions:
            return None
        numbers = {name: value.numpy() for name, value in values.items()}
        return standardize_conditions(conditions, numbers).to(accelerator.device)

    if latents is None:
        loader = remaining_batches(cells, settings, first_step)
        for micro_step, batch in enumerate(loader, first_step * settings.gradient_accumulation_steps):
            volumes = augment(batch["volumes"].to(accelerator.device), settings, micro_step)
            with torch.no_grad(), accelerator.autocast():
                clean = vqvae.encode(volumes).latents.float()
            yield (
                vqvae.normalize_latents(clean),
                batch["class_labels"].to(accelerator.device),
                vectors(batch.get("conditions", {})),
            )
    else:
        labels, num_copies = torch.tensor(cells.labels), len(latents) // len(cells)
        labels = labels.repeat(num_copies)
        values = {name: torch.from_numpy(x).repeat(num_copies, 1) for name, x in cells.conditions.items()}
        state, accumulation = PartialState(), settings.gradient_accumulation_steps
        batches = StepBatches(
            len(latents),
            settings.train_batch_size,
            first_step * accumulation,
            (settings.max_train_steps - first_step) * accumulation,
            settings.seed,
            state.process_index,
            state.num_processes,
        )
        for indices in batches:
            clean = latents[indices].to(accelerator.device)
            given = vectors({name: value[indices] for name, value in values.items()})
            yield vqvae.normalize_latents(clean), labels[indices].to(accelerator.device), given


def augment(volumes: Tensor, settings: StageSettings, micro_step: int) -> Tensor:
    """This process's cells (B, M, D, H, W), turned and re-stained as drawn for all processes."""
    if not settings.is_augmented:
        return volumes
    state = PartialState()
    drawn = draw_augmentation(
        len(volumes) * state.num_processes,
        volumes.shape[1],
        step_generator(settings.seed, micro_step, "augmentation"),
        settings.augmentation,
        settings.intensity_jitter,
    )
    return augment_cells(volumes, *(process_share(x, state.process_index, state.num_processes) for x in drawn))


class AugmentedCopies(Dataset):
    """Every cell several times, each time turned and re-stained in a way of its own that does not change.

    Args:
        cells: that can be read in any order; copy `c` of cell `i` is item ``c * len(cells) + i``.
        num_copies: of each.
        settings: say how cells are augmented.
    """

    def __init__(self, cells: Cells, num_copies: int, settings: StageSettings):
        self.cells, self.num_copies, self.settings = cells, num_copies, settings

    def __len__(self) -> int:
        return self.num_copies * len(self.cells)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        cell, settings = self.cells[index % len(self.cells)], self.settings
        volumes = cell["volumes"][None]
        generator = step_generator(settings.seed, index, "augmented copy")
        drawn = draw_augmentation(1, volumes.shape[1], generator, settings.augmentation, settings.intensity_jitter)
        return cell | {"volumes": augment_cells(volumes, *drawn)[0]}


def sample_cells(cells: Cells, num_cells: int, seed: int) -> Dataset:
    """All `cells` if they are no more than `num_cells`, otherwise so many random ones; of a stream, in memory."""
    cells = cells.indexable(num_cells, seed)
    if len(cells) <= num_cells:
        return cells
    order = torch.randperm(len(cells), generator=step_generator(seed, 0, "sample"))
    return Subset(cells, order[:num_cells].sort().values.tolist())
