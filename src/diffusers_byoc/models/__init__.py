from .discriminator import PatchDiscriminator3D
from .quantizer import Codebook, nearest_code
from .texture import TextureUNet3D, TextureUNet3DOutput
from .unet import DualChannelUNet3D, DualChannelUNet3DOutput
from .vqvae import (
    MultiCodebookEncoderOutput,
    MultiCodebookQuantizerOutput,
    MultiCodebookVQModel,
    MultiCodebookVQOutput,
)


__all__ = [
    "Codebook",
    "DualChannelUNet3D",
    "DualChannelUNet3DOutput",
    "MultiCodebookEncoderOutput",
    "MultiCodebookQuantizerOutput",
    "MultiCodebookVQModel",
    "MultiCodebookVQOutput",
    "PatchDiscriminator3D",
    "TextureUNet3D",
    "TextureUNet3DOutput",
    "nearest_code",
]
