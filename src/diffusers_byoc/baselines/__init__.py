from .alpha_gan import AlphaGAN
from .gan import GANModel, GANOutput
from .ha_gan import HAGAN
from .pipeline import BaselinePipeline
from .w_gan import WGAN


__all__ = ["HAGAN", "WGAN", "AlphaGAN", "BaselinePipeline", "GANModel", "GANOutput"]
