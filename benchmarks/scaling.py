"""How time and memory grow with the batch, the volume's edge and the number of channels, and what tiling costs.

    python benchmarks/scaling.py                                  both tables, and their pictures in docs/images
    python benchmarks/scaling.py growth                           the first alone
    python benchmarks/scaling.py tiling --vqvae outputs/demo/vqvae    the seams of a trained autoencoder

Every case runs in a process of its own (for its peak memory), under bf16 autocast where this machine computes in it.
The autoencoder is the default one. The U-Net has 64, 128 and 256 features, a halving less than the paper's: that one
takes latents of 16³, 24³, ... only. A slope is that of the straight line through the logarithms: 1 is in proportion,
and over the edge 3 is in proportion to the voxels.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import logging
from isolated import in_new_process, peak_gb
from peer_networks import AUTOCAST, FLOAT32, byoc_training_step, inference, unet_training_step
from timing import interleaved_best_ms, machine
from torch import Tensor

from diffusers_byoc import DualChannelUNet3D, MultiCodebookVQModel
from diffusers_byoc.data import make_phantom
from diffusers_byoc.training import fastest_precision


IMAGES = Path(__file__).parent.parent / "docs" / "images"
JOBS = ("encode", "decode", "autoencoder training step", "denoising step", "U-Net training step")
AXES = {
    "batch": ("batch", (1, 2, 4, 8)),
    "edge": ("volume edge, voxels", (32, 48, 64, 96, 128)),
    "num_channels": ("channels M", (1, 2, 3, 4, 5, 6)),
}
BASE = {"batch": 2, "edge": 64, "num_channels": 2}  # what does not vary


def predict_noise(unet: DualChannelUNet3D, sample: Tensor, timesteps: Tensor) -> Tensor:
    return unet(sample, timesteps, return_dict=False)[0]


def measure(
    job: str, device: str, repeats: int, *, batch: int, edge: int, num_channels: int
) -> tuple[float, float, float]:
    """Seconds, GB before the job and peak GB, in a process of its own."""
    logging.set_verbosity_error()
    setting = FLOAT32 if fastest_precision() == "no" else AUTOCAST
    volumes = torch.rand(batch, num_channels, edge, edge, edge, device=device) * 2 - 1
    latents = torch.randn(batch, num_channels * 16, *(edge // 4,) * 3, device=device)
    timesteps = torch.randint(1000, (batch,), device=device)
    if job in ("denoising step", "U-Net training step"):
        network = DualChannelUNet3D(num_channels, block_out_channels=(64, 128, 256)).to(device)
    else:
        network = MultiCodebookVQModel(num_channels).to(device)
    before = peak_gb(device)
    if job == "encode":
        run = inference(lambda: network.encode(volumes), setting, device)
    elif job == "decode":
        run = inference(lambda: network.decode(latents), setting, device)
    elif job == "autoencoder training step":
        run = byoc_training_step(network, volumes, setting)
    elif job == "denoising step":
        run = inference(lambda: network(latents, timesteps), setting, device)
    else:
        run = unet_training_step(predict_noise, network, latents, timesteps, setting)
    seconds = interleaved_best_ms({job: run}, repeats)[job] / 1e3
    return seconds, before, peak_gb(device)


def slope(values: tuple[int, ...], measured: list[float]) -> float:
    return np.polyfit(np.log(values), np.log(measured), 1)[0]


def growth(device: str, repeats: int, largest_edge: int) -> None:
    """Tables and a picture of every job over every axis."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(AXES), figsize=(12, 6.5), layout="constrained")
    for column, (axis, (title, values)) in enumerate(AXES.items()):
        values = tuple(value for value in values if axis != "edge" or value <= largest_edge)
        others = ", ".join(f"{AXES[name][0]} {value}" for name, value in BASE.items() if name != axis)
        print(f"\n| s (peak GB) by {title}; {others} | {' | '.join(map(str, values))} | slope of time, of memory |")
        print("| --- " * (len(values) + 2) + "|")
        for job in JOBS:
            sizes = [BASE | {axis: value} for value in values]
            rows = [in_new_process(partial(measure, job, device, repeats, **size)) for size in sizes]
            seconds = [row[0] for row in rows]
            working = [max(peak - before, 1e-3) for _, before, peak in rows]  # beyond program, network and input
            cells = " | ".join(f"{s:.3f} ({peak:.2f})" for s, _, peak in rows)
            print(f"| {job} | {cells} | {slope(values, seconds):.2f}, {slope(values, working):.2f} |", flush=True)
            axes[0, column].plot(values, seconds, "o-", label=job)
            axes[1, column].plot(values, working, "o-", label=job)
        for row, label in enumerate(("time, s", "memory beyond the network, GB")):
            axes[row, column].set(xscale="log", yscale="log", xlabel=title, ylabel=label if column == 0 else "")
            axes[row, column].set_xticks(values, [str(value) for value in values])
            axes[row, column].minorticks_off()
            axes[row, column].grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(IMAGES / "scaling.png", dpi=110)


def decode(how: str, path: str | None, latents: Tensor, device: str) -> tuple[Tensor, float, float, float]:
    """The decoded volumes, seconds, GB before and peak GB, in a process of its own."""
    vqvae = load_vqvae(path).to(device)
    if how == "slicing":
        vqvae.enable_slicing()
    elif how == "tiling":
        vqvae.enable_tiling()
    latents = latents.to(device)
    before = peak_gb(device)
    with torch.no_grad():
        seconds = interleaved_best_ms({how: lambda: vqvae.decode(latents)}, repetitions=1)[how] / 1e3
        peak = peak_gb(device)
        return vqvae.decode(latents).sample.float().cpu(), seconds, before, peak


def load_vqvae(path: str | None) -> MultiCodebookVQModel:
    torch.manual_seed(0)
    vqvae = MultiCodebookVQModel.from_pretrained(path) if path else MultiCodebookVQModel()
    return vqvae.eval()


def phantom_volumes(edge: int, batch: int) -> Tensor:
    """(batch, 2, edge, edge, edge) phantom cells in [-1, 1] that fill the cube."""
    volumes = torch.full((batch, 2, edge, edge, edge), -1.0)
    for seed, volume in enumerate(volumes):
        cell = torch.from_numpy(
            make_phantom("blebbistatin", seed, max_size=edge, voxel_size_um=64 / edge).volume.astype("f4")
        )
        cell = cell / cell.amax((1, 2, 3), keepdim=True) * 2 - 1
        start = [(edge - size) // 2 for size in cell.shape[1:]]
        window = tuple(slice(s, s + size) for s, size in zip(start, cell.shape[1:], strict=True))
        volume[(slice(None), *window)] = cell
    return volumes


def tiling(device: str, path: str | None, edge: int) -> None:
    """Time, memory and seams of decoding a large volume whole, sample by sample and in tiles."""
    vqvae = load_vqvae(path)
    num_channels = vqvae.config.num_channels
    with torch.no_grad():
        vqvae.enable_tiling()  # encodes in tiles too: the latents are the same for all three
        latents = vqvae.encode(phantom_volumes(edge, 2)[:, :num_channels]).latents
    print(f"\n| decode 2 x {num_channels} x {edge}³, float32 | s | peak GB | of it the decoding, GB |")
    print("| --- | --- | --- | --- |")
    samples = {}
    for how in ("whole", "slicing", "tiling"):
        samples[how], seconds, before, peak = in_new_process(decode, how, path, latents, device)
        print(f"| {how} | {seconds:.2f} | {peak:.2f} | {peak - before:.2f} |", flush=True)

    whole, tiled = samples["whole"], samples["tiling"]
    difference = (tiled - whole).abs()
    scale = whole.std().item()
    print(f"\nSlicing differs from whole by at most {(samples['slicing'] - whole).abs().max():.1e}.")
    print(
        f"Tiling differs by {difference.mean() / scale:.1e} of the volumes' standard deviation in the mean and by at"
    )
    print(f"most {difference.max() / scale:.1e}. ", end="")
    # a seam is a step between neighbouring planes that the whole volume has not
    steps, own_steps = (
        torch.stack([v.diff(dim=axis).abs().movedim(axis, 0).flatten(1).mean(1) for axis in (2, 3, 4)])
        for v in (tiled - whole, whole)
    )
    worst, usual = steps.max().item(), own_steps.mean().item()
    print(f"Between neighbouring planes the difference jumps by at most {worst / usual:.1%} of the")
    print("mean step between neighbouring voxels of the whole volume.")

    import matplotlib.pyplot as plt

    middle = edge // 2
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.3), layout="constrained")
    panels = {"whole": whole, "in tiles": tiled, "difference x 10": 10 * (tiled - whole)}
    for ax, (title, volumes) in zip(axes, panels.items(), strict=True):
        limit = max(whole[0, 0, middle].abs().max().item(), 1e-6)
        ax.imshow(volumes[0, 0, middle], cmap="gray", vmin=-limit, vmax=limit)
        ax.set_title(f"{title}, channel 0, plane {middle}", fontsize=9)
        ax.axis("off")
    figure.savefig(IMAGES / "tiling.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("table", nargs="?", choices=["growth", "tiling", "all"], default="all")
    add("--vqvae", metavar="DIR", help="trained autoencoder for the seams (default: a random one)")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=2, help="of the CPU")
    add("--repeats", type=int, default=3, help="the best counts")
    add("--largest_edge", type=int, default=128)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    IMAGES.mkdir(parents=True, exist_ok=True)
    print(f"{machine(args.device)}; the best of {args.repeats}")
    if args.table in ("growth", "all"):
        growth(args.device, args.repeats, args.largest_edge)
    if args.table in ("tiling", "all"):
        tiling(args.device, args.vqvae, args.largest_edge)


if __name__ == "__main__":
    main()
