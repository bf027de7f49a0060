import json


PUSH = """
import torch
from diffusers import DDPMScheduler
from diffusers_byoc import BYOCPipeline, DualChannelUNet3D, MultiCodebookVQModel

torch.set_num_threads(1)
pipe = BYOCPipeline(
    MultiCodebookVQModel(latent_channels=2, num_vq_embeddings=8, block_out_channels=(4, 8), sample_size=8),
    DualChannelUNet3D(latent_channels=2, sample_size=4, block_out_channels=(8, 8), layers_per_block=1),
    DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False),
    default_num_inference_steps=2,
)
pipe.push_to_hub("org/byoc-nocodazole")
pipe.to(torch.float16).push_to_hub("org/byoc-nocodazole", variant="fp16")
"""

PULL = """
import torch
from diffusers import DiffusionPipeline
from diffusers_byoc import BYOCPipeline

torch.set_num_threads(1)
cells = BYOCPipeline.from_pretrained("org/byoc-nocodazole")(num_samples=8).volumes
print(cells.shape, cells.min() >= 0, cells.max() <= 1)
pipe = DiffusionPipeline.from_pretrained("org/byoc-nocodazole")
print(type(pipe).__name__, pipe.config.default_num_inference_steps)
half = BYOCPipeline.from_pretrained("org/byoc-nocodazole", variant="fp16", dtype=torch.float16, cache_dir="half")
print(half.unet.dtype, half.vqvae.dtype)
"""


def test_the_readmes_call_loads_a_pipeline_from_the_hub(hub):
    hub.run(PUSH)
    files = hub.files("org/byoc-nocodazole")
    assert not [name for name in files if name.endswith((".bin", ".pkl", ".pt", ".py"))]
    assert {name for name in files if name.startswith("vqvae/")} == {
        "vqvae/config.json",
        "vqvae/diffusion_pytorch_model.safetensors",
        "vqvae/diffusion_pytorch_model.fp16.safetensors",
    }
    assert json.loads(files["model_index.json"])["unet"] == ["diffusers_byoc", "DualChannelUNet3D"]

    printed = hub.run(PULL).splitlines()
    assert printed == ["(8, 2, 8, 8, 8) True True", "BYOCPipeline 2", "torch.float16 torch.float16"]
