"""What the cache of latents saves in the diffusion's training: a step that encodes its batch, or reads it.

    python benchmarks/latent_cache.py

A step is the U-Net's forward pass, backward pass and Adam; reading and preprocessing the volumes, which the cache
saves too, is not counted. bf16 autocast, as the training script chooses on such machines.
"""

import json
import tempfile

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from timing import interleaved_best_ms, machine

from diffusers_byoc import DualChannelUNet3D, MultiCodebookVQModel
from diffusers_byoc.commands.train_arguments import PRESETS
from diffusers_byoc.training import cache_latents, diffusion_loss


# autoencoder, U-Net (of these presets), batch
CASES = (("demo", "demo", 8), ("paper", "demo", 8), ("paper", "paper", 2))


class RandomVolumes(torch.utils.data.Dataset):
    def __init__(self, num_cells: int):
        self.volumes = torch.rand(num_cells, 2, 64, 64, 64) * 2 - 1

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index: int) -> dict:
        return {"volumes": self.volumes[index]}


def times(vqvae: MultiCodebookVQModel, unet: DualChannelUNet3D, batch_size: int, accelerator: Accelerator) -> dict:
    """Milliseconds of encoding a batch, of reading its latents, and of the step that follows either."""
    cells, scheduler = RandomVolumes(batch_size), DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-4)
    timesteps = torch.randint(0, 1000, (batch_size,))

    def encode() -> torch.Tensor:
        with torch.no_grad(), accelerator.autocast():
            return vqvae.encode(cells.volumes).latents.float()

    noise = torch.randn(encode().shape)

    def step() -> None:
        with accelerator.autocast():
            loss = diffusion_loss(unet, scheduler, latents[indices], noise, timesteps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        latents, indices = cache_latents(vqvae, cells, folder, accelerator), list(range(batch_size))
        return interleaved_best_ms({"encode": encode, "read": lambda: latents[indices], "step": step}, repetitions=3)


def main() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    print(f"{machine('cpu')}; volumes 2 x 64³\n")
    print("| autoencoder | U-Net | batch | encode, ms | read, ms | U-Net's step, ms | without over with the cache |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for autoencoder_preset, unet_preset, batch_size in CASES:
        autoencoder_config, unet_config = (
            json.loads((PRESETS / f"{name}.json").read_text(encoding="utf-8"))[part]
            for name, part in ((autoencoder_preset, "vqvae"), (unet_preset, "unet"))
        )
        vqvae = MultiCodebookVQModel(**autoencoder_config).requires_grad_(False).eval()
        unet = DualChannelUNet3D(latent_channels=vqvae.config.latent_channels, **unet_config)
        ms = times(vqvae, unet, batch_size, accelerator)
        ratio = (ms["encode"] + ms["step"]) / (ms["read"] + ms["step"])
        row = [autoencoder_preset, unet_preset, batch_size, *(f"{ms[name]:.0f}" for name in ms), f"{ratio:.1f}"]
        print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
