from .alpha_gan import AlphaGAN
from .gan import GANModel, GANOutput
from .ha_gan import HAGAN
from .medical_diffusion import MedicalDiffusionVQModel
from .medical_diffusion_discriminator import MedicalDiffusionDiscriminator
from .medical_diffusion_unet import MedicalDiffusionUNet3D, MedicalDiffusionUNet3DOutput
from .pipeline import BaselinePipeline
from .w_gan import WGAN


__all__ = [
    "HAGAN",
    "WGAN",
    "AlphaGAN",
    "BaselinePipeline",
    "GANModel",
    "GANOutput",
    "MedicalDiffusionDiscriminator",
    "MedicalDiffusionUNet3D",
    "MedicalDiffusionUNet3DOutput",
    "MedicalDiffusionVQModel",
]
