"""A tiny pipeline of drugs, numbers and channels, for tests."""

import numpy as np
import torch
from diffusers import DDIMScheduler

from diffusers_byoc import BYOCPipeline, DualChannelUNet3D, MultiCodebookVQModel
from diffusers_byoc.pipelines.conditions import measure_conditions


DOSES = {"dose_um": np.array([[0.0], [2.0], [4.0]])}
BOTH = DOSES | {"time_h": np.array([[24.0], [24.0], [48.0]])}


def make_pipeline(
    values=BOTH,
    num_class_embeds=3,
    conditioning_dropout_prob=0.1,
    channel_names=("cell", "nucleus"),
    channel_timesteps_prob=0.0,
    **config,
):
    """A tiny pipeline of drugs, and of the numbers in `values`; untrained, but every condition has an effect."""
    torch.manual_seed(0)
    num_channels = len(channel_names)
    vqvae = MultiCodebookVQModel(
        num_channels,
        channel_names,
        latent_channels=4,
        num_vq_embeddings=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
    )
    vqvae.initialize_codebooks(torch.randn(4, 4 * num_channels, 4, 4, 4))
    statistics = measure_conditions(values) if values else None
    unet = DualChannelUNet3D(
        num_channels,
        latent_channels=4,
        sample_size=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_head_dim=4,
        num_class_embeds=num_class_embeds,
        class_embed_type="projection" if values else None,
        projection_class_embeddings_input_dim=sum(len(c["mean"]) for c in statistics) if values else None,
        conditioning_dropout_prob=conditioning_dropout_prob,
        channel_timesteps_prob=channel_timesteps_prob,
    )
    if values:
        torch.nn.init.normal_(unet.condition_embedding.linear_2.weight)
    names = ("binimetinib", "blebbistatin", "nocodazole")
    pipeline = BYOCPipeline(
        vqvae.eval(),
        unet.eval(),
        DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False),
        default_num_inference_steps=3,
        label2id=num_class_embeds and {name: index for index, name in enumerate(names)},
        conditions=statistics,
        **config,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents_of(pipeline, **arguments):
    arguments = {"generator": torch.Generator().manual_seed(0), "output_type": "latent"} | arguments
    return pipeline(**arguments).volumes
