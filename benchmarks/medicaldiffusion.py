"""MedicalDiffusion's own modules (Khader et al. 2023), from a copy of its repository that the user has.

    git clone https://github.com/FirasGit/medicaldiffusion
    pip install einops einops-exts rotary-embedding-torch

Nothing of what is timed is changed. What its files import without needing it for a network's arithmetic
(pytorch_lightning, torchvision, imageio, skvideo, SimpleITK) is replaced by stand-ins while they are imported, so that
none of it need be installed; `LightningModule` becomes a plain `nn.Module` that logs nothing. Its perceptual loss is
left out (weight 0, as in its configuration file; the command in its README has 4, for that and for feature matching,
which is left in): it would download a VGG network, and takes no volume of two channels. That is to its advantage.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor, nn


HOW_TO_GET = (
    "git clone https://github.com/FirasGit/medicaldiffusion; pip install einops einops-exts rotary-embedding-torch; "
    "then --medicaldiffusion DIR"
)
_STAND_INS = ("torchvision", "imageio", "imageio.core", "imageio.core.util", "skvideo", "skvideo.io", "SimpleITK")


class _LightningModule(nn.Module):
    global_step = 0

    def save_hyperparameters(self) -> None:
        pass

    def log(self, *args, **kwargs) -> None:
        pass


@contextmanager
def _stand_ins() -> Iterator[None]:
    lightning = ModuleType("pytorch_lightning")
    lightning.LightningModule = _LightningModule
    stand_ins = {name: MagicMock() for name in _STAND_INS} | {"pytorch_lightning": lightning}
    replaced = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, module in replaced.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


class MedicalDiffusion:
    """Builds the networks of the repository in `directory`.

    Raises:
        ImportError: where the repository or a package it needs is missing.
    """

    def __init__(self, directory: Path):
        if not (directory / "vq_gan_3d" / "model" / "vqgan.py").is_file():
            raise ImportError(f"{directory} holds no vq_gan_3d/model/vqgan.py")
        sys.path.insert(0, str(directory))
        try:
            with _stand_ins():
                self._vqgan = importlib.import_module("vq_gan_3d.model.vqgan")
                self._diffusion = importlib.import_module("ddpm.diffusion")
        finally:
            sys.path.remove(str(directory))
        self._vqgan.LPIPS = nn.Identity

    def unet(self, dim: int, num_features: int) -> nn.Module:
        """`Unet3D` with `dim` times 1, 2, 4, 8 features, for latents (B, num_features, d, h, w)."""
        return self._diffusion.Unet3D(dim=dim, dim_mults=(1, 2, 4, 8), channels=num_features)

    def vqgan(self, first_width: int, num_channels: int) -> nn.Module:
        """`VQGAN` that quarters each axis, with 1024 codes of 16 features; all losses on from the first step."""
        model = SimpleNamespace(
            embedding_dim=16,
            n_codes=1024,
            n_hiddens=first_width,
            downsample=(4, 4, 4),
            norm_type="group",
            padding_type="replicate",
            num_groups=32,
            no_random_restart=False,
            restart_thres=1.0,
            disc_channels=64,
            disc_layers=3,
            disc_loss_type="hinge",
            discriminator_iter_start=0,
            image_gan_weight=1.0,
            video_gan_weight=1.0,
            gan_feat_weight=4.0,
            l1_weight=4.0,
            perceptual_weight=0.0,
            lr=3e-4,
        )
        return self._vqgan.VQGAN(SimpleNamespace(model=model, dataset=SimpleNamespace(image_channels=num_channels)))

    def codebook(self) -> nn.Module:
        """`Codebook` of 1024 codes of 16 features."""
        return self._vqgan.Codebook(1024, 16)

    def ancestral_step(self, unet: nn.Module, latents: Tensor) -> Callable[[], Tensor]:
        """One of the 1000 steps of its sampler."""
        diffusion = self._diffusion.GaussianDiffusion(
            unet, image_size=latents.shape[-1], num_frames=latents.shape[2], channels=latents.shape[1], timesteps=1000
        ).to(latents.device)
        timesteps = torch.full((len(latents),), 500, device=latents.device)
        return lambda: diffusion.p_sample(latents, timesteps)


def vqgan_training_step(
    vqgan: nn.Module, volumes: Tensor, autocast: Callable[[], AbstractContextManager]
) -> Callable[[], None]:
    """Both optimizers' halves of a step as Lightning runs them: each only with gradients for its own parameters."""
    optimizers, _ = vqgan.configure_optimizers()
    groups = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]

    def step() -> None:
        # it draws a slice by `torch.randint(...).cuda()`
        with patch.object(torch.Tensor, "cuda", lambda tensor: tensor.to(volumes.device)):
            for index, optimizer in enumerate(optimizers):
                for group_index, group in enumerate(groups):
                    for parameter in group:
                        parameter.requires_grad_(group_index == index)
                with autocast():
                    loss = vqgan.training_step({"data": volumes}, 0, index)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    return step
