import torch
from safetensors.torch import load_file

from diffusers_byoc import DualChannelUNet3D
from diffusers_byoc.training.lora import add_adapter, save_adapter


def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained(tmp_path):
    torch.manual_seed(0)
    unet = DualChannelUNet3D(2, 2, 4, (8, 8), 1, attention_head_dim=4).eval()
    sample = torch.randn(1, 4, 4, 4, 4)
    before = unet(sample, 300).sample
    add_adapter(unet, rank=2)
    torch.testing.assert_close(unet(sample, 300).sample, before)
    trained = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
    save_adapter(unet, tmp_path)
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert len(tensors) == len(trained)
    assert all(tensor.shape[1 if "lora_B" in name else 0] == 2 for name, tensor in tensors.items())


def test_an_adapter_of_the_phantom_pipelines_is_under_a_megabyte(tmp_path):
    unet = DualChannelUNet3D(2, 8, 8, (72, 64), 1, attention_head_dim=16, num_class_embeds=3)
    add_adapter(unet, rank=8)
    save_adapter(unet, tmp_path)
    assert 3e5 < (tmp_path / "pytorch_lora_weights.safetensors").stat().st_size < 1e6
