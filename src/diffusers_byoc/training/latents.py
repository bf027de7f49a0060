"""Stage two trains on latents: encode each cell once, keep the latents on disk, say how they lie for the diffusion."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..models import MultiCodebookVQModel
from ..models.fingerprint import fingerprint_weights
from ..models.vqvae import is_cell_place
from ..whole_files import whole_or_absent


@torch.no_grad()
def encode_batches(vqvae: MultiCodebookVQModel, batches: Iterable[Tensor]) -> Tensor:
    """Unquantised latents (N, M*n, d, h, w), float32 on the CPU, of batches of volumes (B, M, D, H, W) in [-1, 1]."""
    vqvae.eval()
    return torch.cat([vqvae.encode(volumes.to(vqvae.device)).latents.float().cpu() for volumes in batches])


class CachedLatents:
    """Unquantised latents of a data set, in safetensors files that are mapped into memory and read as needed.

    Args:
        paths: the files, in the order of the cells; all but the last hold as many.
    """

    def __init__(self, paths: Iterable[Path]):
        self._shards = [load_file(path)["latents"] for path in paths]
        self._shard_size = len(self._shards[0])

    def __len__(self) -> int:
        return sum(map(len, self._shards))

    def __getitem__(self, indices: list[int]) -> Tensor:
        """Latents (B, M*n, d, h, w) float32 of these cells."""
        return torch.stack([self._shards[i // self._shard_size][i % self._shard_size] for i in indices])

    def chunks(self) -> Iterator[Tensor]:
        """All latents in order, some at a time, (B, M*n, d, h, w) each."""
        for shard in self._shards:
            yield from shard.split(64)

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Of every feature, (M*n,) float32 each."""
        return _mean_and_std(chunk.double().movedim(1, 0).flatten(1) for chunk in self.chunks())


def cache_latents(
    vqvae: MultiCodebookVQModel,
    cells: Dataset,
    directory: str | Path,
    accelerator: Accelerator,
    shard_size: int = 256,
    num_workers: int = 0,
) -> CachedLatents:
    """The latents of all `cells` from `directory`, after encoding what is not there yet.

    A file is used if its fingerprint is that of the weights, the arithmetic and the preprocessed volumes of its cells
    (so of the files, the processor and any augmentation behind them); otherwise it is encoded again. The processes
    share the files out, and a file is whole or absent: a run killed while encoding goes on where it was.

    Args:
        vqvae: trained, on the device to encode on.
        cells: items ``{"volumes": (M, D, H, W)}`` in [-1, 1], the same at every access.
        directory: one for each data set; made if missing. Latents of a data set of another length are deleted.
        accelerator: gives autocast and the processes.
        shard_size: cells a file.
        num_workers: processes that load the cells.
    """
    directory = Path(directory)
    num_shards = -(-len(cells) // shard_size)
    paths = [directory / f"latents-{shard:05}-of-{num_shards:05}.safetensors" for shard in range(num_shards)]
    if accelerator.is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
        for path in set(directory.glob("latents-*")) - set(paths):
            path.unlink()
    accelerator.wait_for_everyone()

    # how latents are scaled for the diffusion comes after encoding
    later = ("latents_", "_", "latent_scaling", "latent_range")
    config = {key: value for key, value in vqvae.config.items() if not key.startswith(later)}
    weights = fingerprint_weights(vqvae.encoders, config, accelerator.mixed_precision)
    for shard in range(accelerator.process_index, num_shards, accelerator.num_processes):
        rows = range(shard * shard_size, min((shard + 1) * shard_size, len(cells)))
        loader = DataLoader(Subset(cells, rows), batch_size=8, num_workers=num_workers)
        if (known := _read_fingerprint(paths[shard])) is not None:
            fingerprint = hashlib.sha256(weights.encode())
            for _ in _hashed(loader, fingerprint):
                pass
            if fingerprint.hexdigest() == known:
                continue
        fingerprint = hashlib.sha256(weights.encode())
        with accelerator.autocast():
            latents = encode_batches(vqvae, _hashed(loader, fingerprint))
        with whole_or_absent(paths[shard]) as temporary:
            metadata = {"fingerprint": fingerprint.hexdigest()}
            save_file({"latents": latents.contiguous()}, temporary, metadata=metadata)
    accelerator.wait_for_everyone()
    return CachedLatents(paths)


def _hashed(batches: Iterable[dict[str, Tensor]], fingerprint) -> Iterator[Tensor]:
    """The volumes of batches, with which `fingerprint`, of hashlib, is updated on the way."""
    for batch in batches:
        fingerprint.update(batch["volumes"].numpy())
        yield batch["volumes"]


def _read_fingerprint(path: Path) -> str | None:
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("fingerprint")


@torch.no_grad()
def latent_statistics(vqvae: MultiCodebookVQModel, chunks: Iterable[Tensor]) -> dict[str, float]:
    """How latents, unquantised, look to the diffusion.

    Args:
        vqvae: normalises them.
        chunks: latents (B, M*n, d, h, w), some at a time.

    Returns:
        For each channel NAME: `latent_std/NAME`, the standard deviation after `normalize_latents` (far below 1 means
        that the noise schedule's signal-to-noise ratios are shifted), and `latent_outside/NAME`, the share of numbers
        outside [-1, 1] (which clipping a predicted sample would distort).
    """
    names = vqvae.config.channel_names
    outside, count = torch.zeros(len(names), dtype=torch.float64), 0

    def channels_of_chunks():
        nonlocal outside, count
        for chunk in chunks:
            normalized = vqvae.normalize_latents(chunk.to(vqvae.device)).cpu()
            channels = normalized.movedim(1, 0).reshape(len(names), -1).double()  # (M, numbers)
            outside += (channels.abs() > 1).sum(1)
            count += channels.shape[1]
            yield channels

    _, std = _mean_and_std(channels_of_chunks())
    statistics = {}
    for name, channel_std, channel_outside in zip(names, std, outside, strict=True):
        statistics[f"latent_std/{name}"] = channel_std.item()
        statistics[f"latent_outside/{name}"] = channel_outside.item() / count
    return statistics


def measure_latents(vqvae: MultiCodebookVQModel, latents: CachedLatents) -> None:
    """Record in the autoencoder what its `latent_scaling` needs of the training latents, if it has none yet.

    That of a trained pipeline has: the U-Net that was trained with it knows the latents by that scale.
    """
    if vqvae.config.latents_std is not None:
        return
    if vqvae.config.latent_scaling == "standardize":
        vqvae.set_latent_statistics(*latents.mean_and_std())
    elif vqvae.config.latent_scaling == "cell":
        vqvae.set_latent_statistics(None, _cell_deviation(vqvae, latents))


def _cell_deviation(vqvae: MultiCodebookVQModel, latents: CachedLatents) -> Tensor:
    """Root mean square, (M*n,), of each feature's distance from background, where there is a cell."""

    def squares() -> Iterator[Tensor]:
        for chunk in latents.chunks():
            background = vqvae.background_latents(tuple(chunk.shape[2:])).float().cpu()
            yield (chunk - background).square().double().movedim(1, -1).flatten(0, -2)  # (places, M*n)

    means = torch.stack([chunk.mean(0) for chunk in squares()]).mean(0)
    total, count = torch.zeros_like(means), 0
    for chunk in squares():
        is_cell = is_cell_place(chunk, means)
        total, count = total + chunk[is_cell].sum(0), count + int(is_cell.sum())
    return (total / max(count, 1)).sqrt().clamp(min=1e-6).float()


def _mean_and_std(chunks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Of each row of chunks (rows, numbers), merged as in Chan et al. (1979), which does not cancel; float32."""
    count, mean, squares = 0, 0.0, 0.0
    for chunk in chunks:
        size = chunk.shape[1]
        difference = chunk.mean(1) - mean
        squares = squares + (chunk.var(1, correction=0) + difference**2 * (count / (count + size))) * size
        mean = mean + difference * (size / (count + size))
        count += size
    return mean.float(), (squares / max(count - 1, 1)).sqrt().float()
