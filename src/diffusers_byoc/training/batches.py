"""The batches that a stage is fed with: each a function of its number, shared out among the processes."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..data import CellDataset, StreamBatches, StreamedCells, augment_cells, draw_augmentation
from ..models import MultiCodebookVQModel
from .interruptions import ignore_termination
from .latents import CachedLatents
from .randomness import StepBatches, process_share, step_generator
from .settings import StageSettings


def batch_loader(
    cells: CellDataset | StreamedCells, settings: StageSettings, first_batch: int, num_batches: int
) -> DataLoader:
    """This process's batches `first_batch` to `first_batch + num_batches` of an endless run of shuffled epochs."""
    state = PartialState()
    place = (state.process_index, state.num_processes)
    options = {"num_workers": settings.dataloader_num_workers, "worker_init_fn": ignore_termination}
    which = (settings.train_batch_size, first_batch, num_batches, settings.seed)
    if isinstance(cells, StreamedCells):
        batches = StreamBatches(cells, *which, settings.shuffle_buffer_size, *place)
        return DataLoader(batches, batch_size=None, **options)
    return DataLoader(cells, batch_sampler=StepBatches(len(cells), *which, *place), **options)


def remaining_batches(cells: CellDataset | StreamedCells, settings: StageSettings, first_step: int) -> DataLoader:
    """A loader of what this process has left to see of a stage."""
    accumulation = settings.gradient_accumulation_steps
    num_batches = (settings.max_train_steps - first_step) * accumulation
    return batch_loader(cells, settings, first_step * accumulation, num_batches)


def latent_batches(
    accelerator: Accelerator,
    settings: StageSettings,
    cells: CellDataset | StreamedCells,
    vqvae: MultiCodebookVQModel,
    latents: CachedLatents | None,
    first_step: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What this process has left to see of a stage that trains on latents.

    Args:
        accelerator: gives autocast and the device.
        settings: of the stage.
        cells: to train on.
        vqvae: trained, on the device.
        latents: those of all `cells`; None to encode the batches, augmented as the settings say.
        first_step: steps made before.

    Yields:
        Normalised latents (B, M*n, d, h, w) and class labels (B,).
    """
    loader = remaining_batches(cells, settings, first_step)
    if latents is None:
        for micro_step, batch in enumerate(loader, first_step * settings.gradient_accumulation_steps):
            volumes = augment(batch["volumes"].to(accelerator.device), settings, micro_step)
            with torch.no_grad(), accelerator.autocast():
                clean = vqvae.encode(volumes).latents.float()
            yield vqvae.normalize_latents(clean), batch["class_labels"].to(accelerator.device)
    else:
        labels = torch.tensor(cells.labels)
        for indices in loader.batch_sampler:
            clean = latents[indices].to(accelerator.device)
            yield vqvae.normalize_latents(clean), labels[indices].to(accelerator.device)


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


def indexable(cells: CellDataset | StreamedCells, num_cells: int, seed: int) -> Dataset:
    """`cells` as they are; of a stream, up to `num_cells` random ones, in memory."""
    if not isinstance(cells, StreamedCells):
        return cells
    batches = StreamBatches(cells, 1, 0, min(num_cells, len(cells)), seed)
    return [{name: value[0] for name, value in batch.items()} for batch in batches]


def sample_cells(cells: CellDataset | StreamedCells, num_cells: int, seed: int) -> Dataset:
    """All `cells` if they are no more than `num_cells`, otherwise so many random ones; of a stream, in memory."""
    cells = indexable(cells, num_cells, seed)
    if len(cells) <= num_cells:
        return cells
    order = torch.randperm(len(cells), generator=step_generator(seed, 0, "sample"))
    return Subset(cells, order[:num_cells].sort().values.tolist())
