"""Which training gives an autoencoder texture? Recipes on the same phantoms for the same time, judged alike.

    python benchmarks/recipes.py --seconds 240                            # all of them: the table in docs/quality.md
    python benchmarks/recipes.py --seconds 600 --recipes crops texture    # some

Each is judged on phantoms of other seeds, encoded and decoded: error, texture (energy of a volume minus its 3³ mean
inside the cell, against the phantoms'; 1 is right), Fréchet distance on morphology, whether trees and a 3D network
tell it from phantoms, and whether a grid of period 2 is left. Rows are appended to `--output_dir`/recipes.jsonl, where
a row that stands is not made again; a picture of each lies beside it. A recipe's losers are here and not in the
package. Seconds are of processor time, so that other work on the machine does not decide: OMP_NUM_THREADS=1.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import uniform_filter
from timing import machine
from torch import Tensor, nn

from diffusers_byoc import MultiCodebookVQModel, PatchDiscriminator3D, TextureUNet3D
from diffusers_byoc.data import PHENOTYPES, PhantomCells, VolumeProcessor
from diffusers_byoc.metrics import (
    classifier_test,
    frechet_distance,
    measure_cells,
    morphology_features,
    segment_channel,
    standardize_features,
    volume_classifier_test,
)
from diffusers_byoc.metrics.spectrum import grid_excess, grid_test
from diffusers_byoc.pipelines.schedulers import make_texture_scheduler
from diffusers_byoc.pipelines.texture import add_texture
from diffusers_byoc.training import adaptive_weight, adversarial_loss, discriminator_loss, keep_freed_memory
from diffusers_byoc.training.crops import crop_cells
from diffusers_byoc.training.losses import flow_matching_loss
from diffusers_byoc.visualization import compare_volumes, write_png


@dataclass(frozen=True)
class Recipe:
    """What differs from crops of 32³, batches of 8, squared error and one codebook a channel.

    Args:
        crop_size: None for whole volumes.
        batch_size: of crops.
        norm: of the reconstruction error, 1 or 2.
        layers_per_block: residual blocks at half and at a quarter of the resolution.
        num_quantizers: residual codebooks a channel; 0 decodes what is not quantised.
        adversary: share of the time after which it joins; 1 for never.
        adversary_weight: of the hinge loss; None for the adaptive weight of Esser et al. times 0.1.
        feature_matching: weight of the distance of the discriminator's features (L1).
        slices: the adversary sees random slices in the three directions, not volumes.
        noise: a channel of noise enters each resolution of the decoder, with learnt strengths (StyleGAN).
        texture: share of the time after which the texture network is trained in place of the autoencoder.
    """

    crop_size: int | None = 32
    batch_size: int = 8
    norm: int = 2
    layers_per_block: tuple[int, int] = (0, 2)
    num_quantizers: int = 1
    adversary: float = 1.0
    adversary_weight: float | None = None
    feature_matching: float = 0.0
    slices: bool = False
    noise: bool = False
    texture: float = 1.0


MATCHED = {"norm": 1, "adversary_weight": 0.1, "feature_matching": 4.0}
RECIPES = {
    "cubes": Recipe(crop_size=None, batch_size=1),
    "crops": Recipe(),
    "l1": Recipe(norm=1),
    "finer_blocks": Recipe(layers_per_block=(1, 2)),
    "unquantized": Recipe(num_quantizers=0),
    "four_codebooks": Recipe(num_quantizers=4),
    "adversary_late": Recipe(adversary=0.8),
    "adversary_half": Recipe(adversary=0.5),
    "matching": Recipe(adversary=0.2, **MATCHED),
    "matching_weak": Recipe(adversary=0.2, **{**MATCHED, "adversary_weight": 0.02}),
    "matching_late": Recipe(adversary=0.6, **MATCHED),
    "matching_slices": Recipe(adversary=0.6, slices=True, **MATCHED),
    "matching_noise": Recipe(adversary=0.6, noise=True, **MATCHED),
    "texture": Recipe(texture=0.5),
    "texture_four_codebooks": Recipe(texture=0.5, num_quantizers=4),
}


class SliceDiscriminator(nn.Module):
    """Realness of every patch of random slices, cut in each of the three directions."""

    def __init__(self, num_channels: int):
        super().__init__()
        widths = (num_channels, 32, 64, 128)
        self.layers = nn.Sequential()
        for width_in, width in zip(widths[:-1], widths[1:], strict=True):
            self.layers.append(nn.Conv2d(width_in, width, 4, stride=2, padding=1))
            self.layers.append(nn.LeakyReLU(0.2))
        self.layers.append(nn.Conv2d(width, 1, 3, padding=1))

    def slices(self, volumes: Tensor, places: list[int]) -> Tensor:
        return torch.cat([volumes.select(axis, place) for axis, place in enumerate(places, 2)])


class NoiseInjection(nn.Module):
    """Adds a channel of noise, with a strength for each feature, to what the modules it hooks return."""

    def __init__(self, decoder: nn.Module, example: Tensor):
        super().__init__()
        self.strengths = nn.ParameterList()
        self._widths: list[int] = []
        handles = [block.register_forward_hook(self._measure) for block in decoder.up_blocks]
        with torch.no_grad():
            decoder(example)
        for handle in handles:
            handle.remove()
        for block, width in zip(decoder.up_blocks, self._widths, strict=True):
            strength = nn.Parameter(torch.full((1, width, 1, 1, 1), 0.05))
            self.strengths.append(strength)
            block.register_forward_hook(lambda _, __, output, s=strength: output + s * torch.randn_like(output[:, :1]))

    def _measure(self, _, __, output: Tensor) -> None:
        self._widths.append(output.shape[1])


def features_of(discriminator: nn.Module, volumes: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and what each nonlinearity returns."""
    features, hidden_states = [], volumes
    for layer in discriminator.layers:
        hidden_states = layer(hidden_states)
        if isinstance(layer, nn.LeakyReLU):
            features.append(hidden_states)
    return hidden_states.float(), features


def cosine(share: float) -> float:
    return max(0.02, 0.5 + 0.5 * math.cos(math.pi * share))


def batches(volumes: Tensor, recipe: Recipe, generator: torch.Generator):
    """Endless (B, M, D, H, W)."""
    while True:
        chosen = volumes[torch.randint(len(volumes), (recipe.batch_size,), generator=generator)].float()
        flips = [axis for axis in (2, 3, 4) if torch.rand((), generator=generator) < 0.5]
        chosen = chosen.flip(flips)
        if recipe.crop_size is not None:
            chosen = crop_cells(chosen, recipe.crop_size, torch.rand(len(chosen), generator=generator))
        yield chosen


def train_autoencoder(recipe: Recipe, volumes: Tensor, seconds: float) -> tuple[MultiCodebookVQModel, int]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    vqvae = MultiCodebookVQModel(
        latent_channels=8,
        block_out_channels=(32, 32, 64),
        layers_per_block=recipe.layers_per_block,
        ema_decay=0.98,
        num_quantizers=max(1, recipe.num_quantizers),
    )
    parameters = list(vqvae.parameters())
    if recipe.noise:
        parameters += NoiseInjection(vqvae.decoder, torch.zeros(1, 16, 4, 4, 4)).parameters()
    discriminator = SliceDiscriminator(2) if recipe.slices else PatchDiscriminator3D(2)
    optimizer = torch.optim.Adam([p for p in parameters if p.requires_grad], 1e-3, (0.9, 0.99), fused=True)
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), 2e-4, (0.5, 0.9), fused=True)

    start, step = time.process_time(), 0
    for batch in batches(volumes, recipe, generator):
        share = (time.process_time() - start) / seconds
        if share >= 1:
            break
        optimizer.param_groups[0]["lr"] = 1e-3 * cosine(share)
        with torch.autocast("cpu", torch.bfloat16):
            if step == 0:
                with torch.no_grad():
                    vqvae.initialize_codebooks(vqvae.encode(batch).latents, generator)
            if recipe.num_quantizers:
                reconstruction, commit_loss, latents, indices = vqvae(batch, return_dict=False)
            else:
                latents, commit_loss = vqvae.encode(batch).latents, 0.0
                reconstruction = vqvae.decode(latents, force_not_quantize=True).sample
        error = reconstruction.float() - batch
        error = 4 * error.abs().mean() if recipe.norm == 1 else error.square().mean()
        loss = error + commit_loss
        fake = reconstruction.float()
        if share > recipe.adversary:
            places = torch.randint(batch.shape[2], (3,), generator=generator).tolist()
            seen = (discriminator.slices(x, places) for x in (batch, fake)) if recipe.slices else (batch, fake)
            real, fake = seen
            with torch.autocast("cpu", torch.bfloat16):
                real_logits, real_features = features_of(discriminator, real)
                fake_logits, fake_features = features_of(discriminator, fake)
            adversarial = adversarial_loss(fake_logits)
            if recipe.adversary_weight is None:
                weight = 0.1 * adaptive_weight(error, adversarial, vqvae.decoder.conv_out.weight)
            else:
                weight = recipe.adversary_weight * min(1.0, 5 * (share - recipe.adversary))  # it grows
            loss = loss + weight * adversarial
            pairs = zip(fake_features, real_features, strict=True)
            distances = [F.l1_loss(a.float(), b.float().detach()) for a, b in pairs]
            loss = loss + recipe.feature_matching * torch.stack(distances).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if share > recipe.adversary:
            with torch.autocast("cpu", torch.bfloat16):
                logits = [features_of(discriminator, x.detach())[0] for x in (real, fake)]
            discriminator_optimizer.zero_grad()
            discriminator_loss(*logits).backward()
            discriminator_optimizer.step()
        if recipe.num_quantizers:
            vqvae.update_codebooks(latents.float().detach(), indices, generator)
        step += 1
    return vqvae.eval(), step


def train_texture(vqvae: MultiCodebookVQModel, recipe: Recipe, volumes: Tensor, seconds: float) -> TextureUNet3D:
    generator = torch.Generator().manual_seed(1)
    network = TextureUNet3D()
    average = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, (0.9, 0.99), fused=True)
    start, step = time.process_time(), 0
    for batch in batches(volumes, recipe, generator):
        share = (time.process_time() - start) / seconds
        if share >= 1:
            break
        optimizer.param_groups[0]["lr"] = 1e-3 * cosine(share)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                decoded = decode(vqvae, recipe, batch)
            texture = network.texture(batch, decoded)
            noise = torch.randn(texture.shape, generator=generator)
            times = torch.randn(len(batch), generator=generator).sigmoid()
            loss = flow_matching_loss(network, texture, decoded, noise, times)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        step += 1
        torch._foreach_lerp_(average, [p.detach() for p in network.parameters()], 1 - min(0.999, step / (9 + step)))
    with torch.no_grad():
        for parameter, mean in zip(network.parameters(), average, strict=True):
            parameter.copy_(mean)
    return network.eval()


@torch.no_grad()
def decode(vqvae: MultiCodebookVQModel, recipe: Recipe, volumes: Tensor) -> Tensor:
    latents = vqvae.encode(volumes).latents
    return vqvae.decode(latents, force_not_quantize=not recipe.num_quantizers).sample.float()


def texture_energy(volume: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(M,) mean square of a volume minus its 3³ mean, in the mask."""
    return np.array([((channel - uniform_filter(channel, 3))[mask] ** 2).mean() for channel in volume])


def judge(decoded: np.ndarray, real: np.ndarray, real_features: np.ndarray) -> dict:
    features = morphology_features(measure_cells(decoded))
    scaled = (standardize_features(x, real_features) for x in (real_features, features))
    masks = [segment_channel(volume[0]).mask for volume in real]
    energies = np.array([[texture_energy(v, m) for v, m in zip(x, masks, strict=True)] for x in (real, decoded)])
    grids = grid_test([grid_excess(v, m) for v, m in zip(decoded, masks, strict=True)])
    return {
        "error": (4 * (decoded - real) ** 2).mean((0, 2, 3, 4)).tolist(),  # volumes in [-1, 1], as elsewhere
        "texture": (energies[1].mean(0) / energies[0].mean(0)).tolist(),
        "frechet": frechet_distance(*scaled),
        "trees": classifier_test(real_features, features).accuracy,
        "network": volume_classifier_test(real, decoded).accuracy,
        "grid": grids[0].excess,
    }


def run(name: str, recipe: Recipe, training: Tensor, held_out: Tensor, real_features, args) -> dict:
    vqvae, num_steps = train_autoencoder(recipe, training, args.seconds * recipe.texture)
    network = None
    if recipe.texture < 1:
        network = train_texture(vqvae, recipe, training, args.seconds * (1 - recipe.texture))
    generator = torch.Generator().manual_seed(2)
    decoded = []
    with torch.autocast("cpu", torch.bfloat16):
        for volumes in held_out.split(4):
            volumes = decode(vqvae, recipe, volumes.float())
            if network is not None:
                volumes = add_texture(network, make_texture_scheduler(), volumes, 10, generator)
            decoded.append((volumes / 2 + 0.5).clamp(0, 1).float())
    decoded, real = torch.cat(decoded).numpy(), (held_out.float() / 2 + 0.5).numpy()
    write_png(compare_volumes({"phantoms": real[:6], name: decoded[:6]}), args.output_dir / f"{name}.png")
    row = {"recipe": name, "seconds": args.seconds, "steps": num_steps, **judge(decoded, real, real_features)}
    return row | {"settings": asdict(recipe), "threads": torch.get_num_threads(), "machine": machine("cpu")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="of processor time for the training of each recipe")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--num_phantoms", type=int, default=600)
    parser.add_argument("--num_judged", type=int, default=96)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/recipes"))
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()

    processor = VolumeProcessor(64, voxel_size_um=1.0)
    training, held_out = (
        torch.stack([cell["volumes"].half() for cell in PhantomCells(number, processor, PHENOTYPES, seed)])
        for number, seed in ((args.num_phantoms, 1), (args.num_judged, 2))
    )
    real_features = morphology_features(measure_cells((held_out.float() / 2 + 0.5).numpy()))
    path = args.output_dir / "recipes.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    for name in args.recipes:
        if not any(row["recipe"] == name and row["seconds"] == args.seconds for row in rows):
            rows.append(run(name, RECIPES[name], training, held_out, real_features, args))
            with path.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print("| recipe | steps | squared error, cell / nucleus | texture | Fréchet | trees | 3D network | grid |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        error, texture = ((" / ".join(f"{x:.{n}f}" for x in row[k])) for k, n in (("error", 5), ("texture", 2)))
        numbers = f"{row['frechet']:.0f} | {row['trees']:.2f} | {row['network']:.2f} | {row['grid']:.1f}"
        print(f"| {row['recipe']} | {row['steps']} | {error} | {texture} | {numbers} |")


if __name__ == "__main__":
    main()
