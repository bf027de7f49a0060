import pytest
import torch
from diffusers import DDPMScheduler
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file

from diffusers_byoc import BYOCPipeline, DualChannelUNet3D, MultiCodebookVQModel
from diffusers_byoc.training.lora import TARGET_MODULES


def make_pipeline(width=8):
    torch.manual_seed(0)
    vqvae = MultiCodebookVQModel(
        latent_channels=4, num_vq_embeddings=16, block_out_channels=(8, 16), layers_per_block=1, sample_size=8
    )
    vqvae.initialize_codebooks(torch.randn(4, 8, 4, 4, 4))
    unet = DualChannelUNet3D(2, 4, 4, (width, 16), 1, attention_head_dim=4)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    pipeline = BYOCPipeline(vqvae.eval(), unet.eval(), scheduler, default_num_inference_steps=2)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents_of(pipeline):
    generator = torch.Generator().manual_seed(0)
    return pipeline(1, generator=generator, output_type="latent").volumes


def adapter_tensors(seed):
    """An adapter that changes something, of the layers that a training chooses."""
    unet = make_pipeline().unet
    torch.manual_seed(seed)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=TARGET_MODULES, init_lora_weights=False))
    tensors = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(unet).items()}
    return tensors, unet.peft_config["default"].to_dict()


def save_adapter(folder, seed=1):
    BYOCPipeline.save_lora_weights(folder, *adapter_tensors(seed))
    return folder


def test_an_adapter_is_saved_loaded_and_unloaded(tmp_path):
    pipeline = make_pipeline()
    before = latents_of(pipeline)
    pipeline.load_lora_weights(save_adapter(tmp_path))
    assert (latents_of(pipeline) - before).abs().max() > 1e-3
    assert pipeline.get_active_adapters() == ["default_0"]
    names = load_file(tmp_path / "pytorch_lora_weights.safetensors").keys()
    layers = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names}
    assert layers == {"to_q", "to_k", "to_v", "0", "linear_1", "linear_2", "time_emb_proj", "conv2"}
    pipeline.unload_lora_weights()
    assert torch.equal(latents_of(pipeline), before)


def merged(pipeline, *adapters):
    """`pipeline` with the products B A of (tensors, weight) added to its weights."""
    weights = pipeline.unet.state_dict()
    for tensors, share in adapters:
        for name in (name for name in tensors if name.endswith("lora_A.weight")):
            down, up = tensors[name], tensors[name.replace("lora_A", "lora_B")]
            product = torch.einsum("or,ri...->oi...", up.flatten(1), down)
            weights[name.replace("lora_A.", "")] += share * product
    return pipeline


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.25, 0.5)])
def test_adapters_are_mixed_by_weight(tmp_path, weights):
    pipeline, tensors = make_pipeline(), []
    for index, name in enumerate("ab"):
        pipeline.load_lora_weights(save_adapter(tmp_path / name, index), adapter_name=name)
        tensors.append(adapter_tensors(index)[0])
    pipeline.set_adapters(["a", "b"], list(weights))
    expected = merged(make_pipeline(), *zip(tensors, weights, strict=True))
    torch.testing.assert_close(latents_of(pipeline), latents_of(expected), atol=1e-4, rtol=1e-3)


def test_a_fused_adapter_makes_a_pipeline_of_its_own(tmp_path):
    pipeline = make_pipeline()
    pipeline.load_lora_weights(save_adapter(tmp_path))
    expected = latents_of(pipeline)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "fused")
    fused = BYOCPipeline.from_pretrained(tmp_path / "fused")
    torch.testing.assert_close(latents_of(fused), expected, atol=1e-4, rtol=1e-3)


def test_tensors_are_taken_as_files_are(tmp_path):
    by_file, by_tensors = make_pipeline(), make_pipeline()
    by_file.load_lora_weights(save_adapter(tmp_path))
    by_tensors.load_lora_weights(load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    assert torch.equal(latents_of(by_file), latents_of(by_tensors))


def test_an_adapter_of_another_network_is_refused(tmp_path):
    save_adapter(tmp_path)
    pipeline = make_pipeline(width=16)
    with pytest.raises(ValueError, match="Expected 16 features in unet.*lora_A.weight.*got 8 in .*trained on"):
        pipeline.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="Expected an adapter of this U-Net, got transformer.x.lora_A.weight"):
        pipeline.load_lora_weights({"transformer.x.lora_A.weight": torch.zeros(2, 8)})
    assert not pipeline.get_list_adapters()


def test_pickles_are_refused(tmp_path):
    torch.save({}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(OSError, match="safetensors"):
        make_pipeline().load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="Expected an adapter in safetensors, got pytorch_lora_weights.bin"):
        make_pipeline().load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.bin")
