"""What a film of a cell would cost (docs/outlook.md): attention over frames in the U-Net, on random weights.

    python benchmarks/frames.py --pretrained pretrained/byoc-phantom --num_frames 8

The U-Net of the pipeline's configuration takes the frames as a batch, and after each of its blocks with attention the
frames attend to each other at every voxel. Both are timed by turns, one denoising step of one film.
"""

import argparse

import torch
from timing import interleaved_best_ms, machine
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffusers_byoc import DualChannelUNet3D
from diffusers_byoc.models.attention import AxialAttention


class FrameAttention(nn.Module):
    """Attention over the frames of a film at each voxel, of (T, C, D, H, W)."""

    def __init__(self, num_features: int, head_dim: int):
        super().__init__()
        self.attention = AxialAttention(num_features, head_dim, "depth")

    def forward(self, hidden_states: Tensor) -> Tensor:
        frames = hidden_states.transpose(0, 1).flatten(2, 3)[None]  # (1, C, T, D*H, W): the frames as its depth
        return self.attention(frames)[0].transpose(0, 1).reshape(hidden_states.shape)


def add_frames(unet: DualChannelUNet3D) -> DualChannelUNet3D:
    head_dim = unet.config.attention_head_dim
    for block in unet.modules():
        if isinstance(getattr(block, "attentions", None), nn.ModuleList) and len(block.attentions):
            block.attentions.append(FrameAttention(block.attentions[0].to_q.in_features, head_dim))
    return unet


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", default="pretrained/byoc-phantom", help="whose U-Net's configuration")
    parser.add_argument("--num_frames", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=10)
    args = parser.parse_args()
    config = DualChannelUNet3D.load_config(args.pretrained, subfolder="unet") | {"num_class_embeds": None}
    networks = {
        "frames alone": DualChannelUNet3D.from_config(config),
        "frames that see each other": add_frames(DualChannelUNet3D.from_config(config)),
    }
    edge, features = config["sample_size"], config["num_channels"] * config["latent_channels"]
    sample = torch.randn(args.num_frames, features, *(edge,) * 3)
    steps = {name: lambda network=network: network(sample, 500) for name, network in networks.items()}
    times = interleaved_best_ms(steps, args.repetitions)
    print(f"{args.num_frames} frames of {tuple(sample.shape[1:])}, float32; {machine('cpu')}\n")
    print("| a step of one film | parameters, million | GFLOP | ms |")
    print("| --- " * 4 + "|")
    for name, network in networks.items():
        with FlopCounterMode(display=False) as counter:
            steps[name]()
        parameters = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        print(f"| {name} | {parameters:.2f} | {counter.get_total_flops() / 1e9:.2f} | {times[name]:.0f} |")


if __name__ == "__main__":
    main()
