import hashlib

import pytest
import torch
from peft import LoraConfig

from diffusers_byoc import DualChannelUNet3D


def make_unet(**changes):
    arguments = {"latent_channels": 3, "sample_size": 4, "block_out_channels": (8, 16), "layers_per_block": 1}
    return DualChannelUNet3D(**(arguments | {"attention_head_dim": 4, "num_class_embeds": 2} | changes))


def test_what_diffusers_returns_is_returned(tmp_path):
    unet = make_unet()
    unet.save_pretrained(tmp_path)
    loaded, info = DualChannelUNet3D.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == []
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), unet.parameters(), strict=True))
    assert isinstance(DualChannelUNet3D.from_pretrained(tmp_path), DualChannelUNet3D)


def test_ignored_sizes_are_left_to_be_trained(tmp_path):
    make_unet().save_pretrained(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match="class_embedding.weight"):
        DualChannelUNet3D.from_pretrained(tmp_path, num_class_embeds=5)
    options = {"ignore_mismatched_sizes": True, "low_cpu_mem_usage": False}
    for _ in range(3):  # uninitialised memory, finite or not
        unet = DualChannelUNet3D.from_pretrained(tmp_path, num_class_embeds=5, **options)
        assert unet.class_embedding.weight.shape[0] == 5


def test_weights_saved_with_an_adapter_inside_are_refused(tmp_path):
    unet = make_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    unet.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"to_q.weight.* and 7 more. .*save_lora_adapter"):
        DualChannelUNet3D.from_pretrained(tmp_path)


def test_weights_too_large_for_half_precision_say_so(tmp_path):
    unet = make_unet()
    with torch.no_grad():
        unet.conv_in.weight.fill_(1e5)
    unet.save_pretrained(tmp_path)
    DualChannelUNet3D.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="conv_in.weight.*dtype=torch.float32 or torch.bfloat16"):
        DualChannelUNet3D.from_pretrained(tmp_path, dtype=torch.float16)


def test_pickles_cannot_be_asked_for(tmp_path):
    make_unet().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Expected safetensors weights .*got use_safetensors=False"):
        DualChannelUNet3D.from_pretrained(tmp_path, use_safetensors=False)


def test_pickles_are_not_fallen_back_on(tmp_path):
    make_unet().save_pretrained(tmp_path)
    torch.save(make_unet().state_dict(), tmp_path / "diffusion_pytorch_model.fp16.bin")
    with pytest.raises(OSError, match="diffusion_pytorch_model.fp16.safetensors"):
        DualChannelUNet3D.from_pretrained(tmp_path, variant="fp16")


def test_pickles_are_not_written(tmp_path):
    make_unet().save_pretrained(tmp_path, safe_serialization=False, variant="fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.fp16.safetensors",
    ]


def test_an_empty_folder_is_an_error_of_the_system(tmp_path):
    make_unet().save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        DualChannelUNet3D.from_pretrained(tmp_path)


def test_a_truncated_file_is_called_damaged(tmp_path):
    make_unet().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=f"Expected whole safetensors weights in {path}, got a damaged file"):
        DualChannelUNet3D.from_pretrained(tmp_path)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(OSError, match="git lfs pull"):
        DualChannelUNet3D.from_pretrained(tmp_path)


def test_a_downloaded_file_is_the_one_that_the_hub_has(tmp_path):
    """The Hub's cache keeps a file under its SHA-256, and links to it."""
    make_unet().save_pretrained(tmp_path / "snapshot")
    path = tmp_path / "snapshot" / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    blob = tmp_path / hashlib.sha256(whole).hexdigest()
    path.rename(blob)
    path.symlink_to(blob)
    DualChannelUNet3D.from_pretrained(tmp_path / "snapshot")
    blob.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # a weight that is finite still
    with pytest.raises(ValueError, match=f"Expected the SHA-256 {blob.name[:12]}… .* Delete {blob}, and load it"):
        DualChannelUNet3D.from_pretrained(tmp_path / "snapshot")
