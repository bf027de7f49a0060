"""The networks that `peers.py` compares, each behind the same few calls, built as its own code has it."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from medicaldiffusion import HOW_TO_GET, MedicalDiffusion, vqgan_training_step
from torch import Tensor, nn

from diffusers_byoc import DualChannelUNet3D, MultiCodebookVQModel, PatchDiscriminator3D
from diffusers_byoc.training import adaptive_weight, adversarial_surrogate, discriminator_loss, reconstruction_loss


NUM_CHANNELS, CODE_LENGTH, NUM_CODES = 2, 16, 1024
NUM_FEATURES = NUM_CHANNELS * CODE_LENGTH


@dataclass(frozen=True)
class Setting:
    """How a network is run: what a user can choose without changing its code."""

    name: str
    weights: torch.dtype = torch.float32
    use_autocast: bool = False
    memory_format: torch.memory_format = torch.contiguous_format

    @property
    def dtype(self) -> torch.dtype:
        """What the convolutions compute in."""
        return torch.bfloat16 if self.use_autocast else self.weights

    def apply(self, module: nn.Module) -> nn.Module:
        """A copy of `module` under this setting."""
        module = copy.deepcopy(module).to(self.weights)
        for parameter in module.parameters():
            if parameter.ndim == 5:  # `module.to(memory_format=...)` refuses 2D convolutions beside the 3D ones
                parameter.data = parameter.data.contiguous(memory_format=self.memory_format)
        return module

    def autocast(self, device: str) -> AbstractContextManager:
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.use_autocast)

    def cast(self, tensor: Tensor) -> Tensor:
        """A volume or latents, as a user would hand them to the network under this setting."""
        return tensor.to(self.weights).contiguous(memory_format=self.memory_format)


FLOAT32 = Setting("float32")
AUTOCAST = Setting("bf16 autocast", use_autocast=True)
LAST = torch.channels_last_3d
TRAINING_SETTINGS = (
    FLOAT32,
    Setting("float32, channels_last_3d", memory_format=LAST),
    AUTOCAST,
    Setting("bf16 autocast, channels_last_3d", use_autocast=True, memory_format=LAST),
)
INFERENCE_SETTINGS = (
    *TRAINING_SETTINGS,
    Setting("bf16 weights", weights=torch.bfloat16),
    Setting("bf16 weights, channels_last_3d", weights=torch.bfloat16, memory_format=LAST),
)


@dataclass(frozen=True)
class UNetPeer:
    """A denoiser of latents (B, 32, d, h, w). `group` names the comparison it belongs to."""

    name: str
    group: str
    build: Callable[[], nn.Module]
    predict: Callable[[nn.Module, Tensor, Tensor], Tensor]
    checkpoint: Callable[[nn.Module], object] | None = None


@dataclass(frozen=True)
class AutoencoderPeer:
    """An autoencoder of volumes (B, 2, D, H, W) with latents of a quarter of the edge.

    `training_step(module, volumes, setting)` gives a function that does one step with every loss the peer has, named
    in `losses`.
    """

    name: str
    group: str
    build: Callable[[], nn.Module]
    encode: Callable[[nn.Module, Tensor], Tensor]
    decode: Callable[[nn.Module, Tensor], Tensor]
    training_step: Callable[[nn.Module, Tensor, Setting], Callable[[], None]]
    losses: str
    checkpoint: Callable[[nn.Module], object] | None = None


@dataclass(frozen=True)
class QuantizerPeer:
    """A quantiser of (B, 16, d, h, w) by 1024 codes: without update in eval mode, with one in train mode."""

    name: str
    build: Callable[[], nn.Module]
    quantize: Callable[[nn.Module, Tensor], object]
    quantize_and_update: Callable[[nn.Module, Tensor], object]


PAPER, EQUAL = "the paper's widths", "about equal parameters"


class Peers:
    """Every network of this package and of the peers that can be imported.

    Args:
        medicaldiffusion: folder of a copy of MedicalDiffusion's repository, or None.
    """

    def __init__(self, medicaldiffusion: Path | None):
        self.missing: list[str] = []
        self.medicaldiffusion = self.monai = self.vector_quantize = None
        try:
            if medicaldiffusion is None:
                raise ImportError("no --medicaldiffusion given")
            self.medicaldiffusion = MedicalDiffusion(medicaldiffusion)
        except ImportError as error:
            self.missing.append(f"MedicalDiffusion is left out ({error}): {HOW_TO_GET}")
        try:
            from monai.networks import nets

            self.monai = nets
        except ImportError as error:
            self.missing.append(f"MONAI is left out ({error}): pip install monai")
        try:
            import vector_quantize_pytorch

            self.vector_quantize = vector_quantize_pytorch
        except ImportError as error:
            self.missing.append(f"vector-quantize-pytorch is left out ({error}): pip install vector-quantize-pytorch")

    def unets(self) -> Iterator[UNetPeer]:
        """This package's first in each group."""
        for group, widths, layers in (
            (EQUAL, (32, 64, 128, 256), (0, 1, 2, 2)),
            (PAPER, (64, 128, 256, 512), (2, 2, 2, 2)),
        ):
            yield UNetPeer(
                f"DualChannelUNet3D {widths[0]}-{widths[-1]}",
                group,
                lambda w=widths, n=layers: DualChannelUNet3D(block_out_channels=w, layers_per_block=n),
                lambda unet, sample, timesteps: unet(sample, timesteps, return_dict=False)[0],
                DualChannelUNet3D.enable_gradient_checkpointing,
            )
            if self.medicaldiffusion:  # its 64 features are the paper's, and its planar convolutions few parameters
                yield UNetPeer(
                    "MedicalDiffusion Unet3D 64-512",
                    group,
                    lambda: self.medicaldiffusion.unet(64, NUM_FEATURES),
                    lambda unet, sample, timesteps: unet(sample, timesteps),
                )
            if self.monai:
                yield UNetPeer(
                    f"MONAI DiffusionModelUNet {widths[0]}-{widths[-1]}",
                    group,
                    lambda w=widths: self.monai.DiffusionModelUNet(
                        spatial_dims=3,
                        in_channels=NUM_FEATURES,
                        out_channels=NUM_FEATURES,
                        channels=w,
                        num_res_blocks=2,
                        attention_levels=(False, False, True, True),
                        num_head_channels=32,
                    ),
                    lambda unet, sample, timesteps: unet(sample, timesteps),
                )

    def autoencoders(self) -> Iterator[AutoencoderPeer]:
        """This package's first in each group."""
        for group, widths, first_width in ((EQUAL, (32, 64), 16), (PAPER, (64, 128), 32)):
            yield AutoencoderPeer(
                f"MultiCodebookVQModel {widths[0]}-{widths[1]}",
                group,
                lambda w=widths: MultiCodebookVQModel(block_out_channels=(w[0], *w), layers_per_block=(0, 2)),
                lambda vqvae, volumes: vqvae.encode(volumes).latents,
                lambda vqvae, latents: vqvae.decode(latents).sample,
                byoc_training_step,
                "reconstruction, commitment, adversarial with adaptive weight, discriminator",
                MultiCodebookVQModel.enable_gradient_checkpointing,
            )
            if self.medicaldiffusion:
                yield AutoencoderPeer(
                    f"MedicalDiffusion VQGAN {first_width}-{4 * first_width}",
                    group,
                    lambda w=first_width: self.medicaldiffusion.vqgan(w, NUM_CHANNELS),
                    lambda vqgan, volumes: vqgan.encode(volumes, quantize=False),
                    lambda vqgan, latents: vqgan.decode(latents, quantize=True),
                    medicaldiffusion_training_step,
                    "reconstruction, commitment, adversarial in 2D and 3D, feature matching, two discriminators",
                )
            if self.monai:
                yield AutoencoderPeer(
                    f"MONAI VQVAE {widths[0]}-{widths[1]}",
                    group,
                    lambda w=widths: self.monai.VQVAE(
                        spatial_dims=3,
                        in_channels=NUM_CHANNELS,
                        out_channels=NUM_CHANNELS,
                        channels=w,
                        num_res_channels=w,
                        num_res_layers=2,
                        downsample_parameters=((2, 4, 1, 1),) * 2,
                        upsample_parameters=((2, 4, 1, 1, 0),) * 2,
                        num_embeddings=NUM_CODES,
                        embedding_dim=CODE_LENGTH,
                    ),
                    lambda vqvae, volumes: vqvae.encode(volumes),
                    lambda vqvae, latents: vqvae.decode_stage_2_outputs(latents),
                    monai_training_step,
                    "reconstruction, commitment",
                    _checkpoint_monai,
                )

    def quantizers(self) -> Iterator[QuantizerPeer]:
        """This package's first."""

        def update(vqvae: MultiCodebookVQModel, latents: Tensor) -> None:
            vqvae.initialize_codebooks(latents)  # once, as in training: random codes would all be revived, every time
            vqvae.update_codebooks(latents, vqvae.quantize(latents).indices)

        def call(module: nn.Module, latents: Tensor) -> object:
            return module(latents)

        yield QuantizerPeer(
            "MultiCodebookVQModel.quantize",
            lambda: MultiCodebookVQModel(num_channels=1, block_out_channels=(8, 16, 16), layers_per_block=1),
            lambda vqvae, latents: vqvae.quantize(latents),
            update,
        )
        if self.medicaldiffusion:
            yield QuantizerPeer("MedicalDiffusion Codebook", self.medicaldiffusion.codebook, call, call)
        if self.monai:
            from monai.networks.layers.vector_quantizer import EMAQuantizer

            yield QuantizerPeer("MONAI EMAQuantizer", lambda: EMAQuantizer(3, NUM_CODES, CODE_LENGTH), call, call)
        if self.vector_quantize:

            def call_on_tokens(module: nn.Module, latents: Tensor) -> object:
                return module(latents.flatten(2).transpose(1, 2))

            yield QuantizerPeer(
                "vector-quantize-pytorch VectorQuantize",
                lambda: self.vector_quantize.VectorQuantize(
                    dim=CODE_LENGTH, codebook_size=NUM_CODES, decay=0.99, commitment_weight=0.25
                ),
                call_on_tokens,
                call_on_tokens,
            )


def inference(function: Callable[[], object], setting: Setting, device: str) -> Callable[[], object]:
    """`function` without gradients, under the setting's autocast."""

    def run() -> object:
        with torch.no_grad(), setting.autocast(device):
            return function()

    return run


def unet_training_step(
    predict: Callable[[nn.Module, Tensor, Tensor], Tensor],
    unet: nn.Module,
    sample: Tensor,
    timesteps: Tensor,
    setting: Setting,
) -> Callable[[], None]:
    """L1 on the noise and a fused Adam, for all alike."""
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-4, fused=True)
    noise = torch.randn_like(sample)

    def step() -> None:
        optimizer.zero_grad()
        with setting.autocast(sample.device.type):
            loss = F.l1_loss(predict(unet, sample, timesteps).float(), noise)
        loss.backward()
        optimizer.step()

    return step


def byoc_training_step(vqvae: MultiCodebookVQModel, volumes: Tensor, setting: Setting) -> Callable[[], None]:
    """What `examples/train_byoc.py` does once the discriminator has joined."""
    discriminator = PatchDiscriminator3D(vqvae.config.num_channels).to(volumes.device).train()
    optimizer, discriminator_optimizer = (
        torch.optim.Adam(m.parameters(), lr=3e-4, fused=True) for m in (vqvae, discriminator)
    )
    device = volumes.device.type
    vqvae.train()

    def step() -> None:
        with setting.autocast(device):
            reconstruction, commit_loss, latents, indices = vqvae(volumes, return_dict=False)
            adversarial, fake_logits = adversarial_surrogate(reconstruction, discriminator)
        loss_reconstruction = reconstruction_loss(reconstruction, volumes)
        weight = adaptive_weight(loss_reconstruction, adversarial, vqvae.decoder.conv_out.weight)
        optimizer.zero_grad()
        (loss_reconstruction + commit_loss + 0.1 * weight * adversarial).backward()
        optimizer.step()

        with setting.autocast(device):
            loss = discriminator_loss(discriminator(volumes), fake_logits)
        discriminator_optimizer.zero_grad()
        loss.backward()
        discriminator_optimizer.step()
        vqvae.update_codebooks(latents, indices)

    return step


def medicaldiffusion_training_step(vqgan: nn.Module, volumes: Tensor, setting: Setting) -> Callable[[], None]:
    return vqgan_training_step(vqgan.train(), volumes, lambda: setting.autocast(volumes.device.type))


def monai_training_step(vqvae: nn.Module, volumes: Tensor, setting: Setting) -> Callable[[], None]:
    optimizer = torch.optim.Adam(vqvae.parameters(), lr=3e-4, fused=True)
    vqvae.train()

    def step() -> None:
        optimizer.zero_grad()
        with setting.autocast(volumes.device.type):
            reconstruction, commitment = vqvae(volumes)
            loss = F.mse_loss(reconstruction.float(), volumes) + commitment
        loss.backward()
        optimizer.step()

    return step


def _checkpoint_monai(vqvae: nn.Module) -> None:
    vqvae.use_checkpointing = True
