import copy

import pytest
import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig

from diffusers_byoc import DualChannelUNet3D


TINY = {
    "latent_channels": 3,
    "sample_size": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "attention_head_dim": 4,
}


def model(**changes):
    torch.manual_seed(0)
    return DualChannelUNet3D(**(TINY | changes)).eval()


def inputs(unet, batch=2):
    config = unet.config
    sample = torch.randn(batch, config.num_channels * config.latent_channels, *(config.sample_size,) * 3)
    labels = None if config.num_class_embeds is None else torch.arange(batch) % config.num_class_embeds
    return {"sample": sample, "timestep": torch.arange(batch) * 300 + 5, "class_labels": labels}


@pytest.mark.parametrize("num_channels", [1, 2, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_num_groups": 4},
        {"num_class_embeds": 3},
        {"layers_per_block": 2, "block_out_channels": (8,)},
        {"layers_per_block": (0, 2)},
        {"layers_per_block": [2, 0]},
    ],
)
@torch.no_grad()
def test_the_output_has_the_shape_of_the_input(num_channels, changes):
    unet = model(num_channels=num_channels, **changes)
    arguments = inputs(unet)
    output = unet(**arguments).sample
    assert output.shape == arguments["sample"].shape
    assert torch.equal(unet(**arguments, return_dict=False)[0], output)


@torch.no_grad()
def test_the_grid_may_differ_from_sample_size():
    unet = model()
    assert unet(torch.randn(1, 6, 4, 6, 8), 3).sample.shape == (1, 6, 4, 6, 8)


@torch.no_grad()
def test_every_channel_depends_on_every_other():
    unet = model(num_channels=3)
    arguments = inputs(unet)
    output = unet(**arguments).sample
    for channel in range(3):
        changed = arguments["sample"].clone()
        changed[:, 3 * channel : 3 * channel + 3] *= -1
        moved = (unet(changed, arguments["timestep"]).sample - output).abs().amax((0, 2, 3, 4))
        assert (moved > 0).all()


@torch.no_grad()
def test_samples_of_a_batch_are_independent():
    unet = model(num_class_embeds=3)
    arguments = inputs(unet, batch=3)
    together = unet(**arguments).sample
    for index in range(3):
        alone = unet(**{name: value[index : index + 1] for name, value in arguments.items()}).sample
        torch.testing.assert_close(alone[0], together[index], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_one_timestep_serves_the_whole_batch():
    unet = model()
    sample = inputs(unet)["sample"]
    expected = unet(sample, torch.tensor([7, 7])).sample
    for timestep in (7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor(7.0)):
        assert torch.equal(unet(sample, timestep).sample, expected)
    assert not torch.allclose(unet(sample, 700).sample, expected)


@torch.no_grad()
def test_class_labels_change_the_output():
    unet = model(num_class_embeds=3)
    arguments = inputs(unet)
    first = unet(**arguments | {"class_labels": torch.tensor([0, 0])}).sample
    second = unet(**arguments | {"class_labels": torch.tensor([0, 2])}).sample
    torch.testing.assert_close(second[0], first[0])
    assert not torch.allclose(second[1], first[1])


def test_a_resolution_without_blocks_keeps_one_on_the_way_up_without_attention():
    unet = model(layers_per_block=(0, 2))
    assert [len(block.attentions) for block in unet.down_blocks] == [0, 2]  # both at the coarser resolution
    assert [len(block.attentions) for block in unet.up_blocks] == [0, 2, 0]
    assert [block.resnet.conv2.out_channels for block in unet.up_blocks] == [16, 16, 8]


def test_blocks_of_too_few_resolutions_are_refused():
    with pytest.raises(ValueError, match="Expected 2 layers_per_block.*got 3"):
        model(layers_per_block=(0, 2, 2))


@pytest.mark.parametrize("layers_per_block", [2, (0, 2), (2, 0)])
def test_every_parameter_takes_part(layers_per_block):
    unet = model(num_class_embeds=2, layers_per_block=layers_per_block).train()
    unet(**inputs(unet)).sample.square().mean().backward()
    for name, parameter in unet.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("norm_num_groups", [None, 4])
def test_gradient_checkpointing_gives_the_same_gradients(norm_num_groups):
    plain = model(norm_num_groups=norm_num_groups).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.enable_gradient_checkpointing()
    calls = []
    checkpointed.mid_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    arguments = inputs(plain)
    for unet in (plain, checkpointed):
        unet(**arguments).sample.square().mean().backward()
    assert len(calls) == 2  # once forward, once again for the backward pass
    for (name, expected), got in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, msg=name)


@pytest.mark.parametrize("changes", [{}, {"num_channels": 3, "norm_num_groups": 4, "num_class_embeds": 2}])
@torch.no_grad()
def test_save_and_load_are_identical(changes, tmp_path):
    unet = model(**changes)
    arguments = inputs(unet)
    unet.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = DualChannelUNet3D.from_pretrained(tmp_path)
    assert torch.equal(loaded(**arguments).sample, unet(**arguments).sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_predicts_like_float32(dtype, tmp_path):
    unet = model(num_class_embeds=2)
    arguments = inputs(unet)
    expected = unet(**arguments).sample
    unet.save_pretrained(tmp_path)
    half = DualChannelUNet3D.from_pretrained(tmp_path, dtype=dtype)
    output = half(**arguments | {"sample": arguments["sample"].to(dtype)}).sample
    assert output.dtype == dtype
    assert (output.float() - expected).abs().max() < 0.05 * expected.abs().max()


@torch.no_grad()
def test_layerwise_casting_keeps_the_norms_and_embeddings():
    unet = model(num_class_embeds=2)
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert unet.conv_in.weight.dtype == torch.float8_e4m3fn
    for module in (unet.norm_out, unet.time_embedding.linear_1, unet.class_embedding, unet.mid_blocks[0].resnet.norm1):
        assert module.weight.dtype == torch.float32
    assert torch.isfinite(unet(**inputs(unet)).sample).all()


@torch.no_grad()
def test_it_compiles_into_one_graph():
    unet = model()
    arguments = inputs(unet)
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**arguments).sample, unet(**arguments).sample)


def test_fused_projections_change_nothing():
    unet = model()
    arguments = inputs(unet)
    expected = unet(**arguments).sample
    unet.fuse_qkv_projections()
    attentions = [module for module in unet.modules() if isinstance(module, AttentionModuleMixin)]
    assert len(attentions) == 2 * 5  # spatial and depth-wise, at two resolutions down and up, and in the middle
    assert all(attention.fused_projections for attention in attentions)
    torch.testing.assert_close(unet(**arguments).sample, expected, atol=1e-5, rtol=1e-4)
    unet.unfuse_qkv_projections()
    torch.testing.assert_close(unet(**arguments).sample, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["native", "_native_math"])
@torch.no_grad()
def test_attention_backends_agree(backend):
    unet = model()
    arguments = inputs(unet)
    expected = unet(**arguments).sample
    with attention_backend():  # restores the one that all models share, which the next line sets too
        unet.set_attention_backend(backend)
        assert all(processor._attention_backend == backend for processor in unet.attn_processors.values())
        torch.testing.assert_close(unet(**arguments).sample, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_lora_adapters_load_and_unload(tmp_path):
    unet = model()
    arguments = inputs(unet)
    expected = unet(**arguments).sample
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False))
    adapted = unet(**arguments).sample
    assert not torch.allclose(adapted, expected)
    unet.save_lora_adapter(tmp_path)
    unet.unload_lora()
    assert torch.equal(unet(**arguments).sample, expected)
    unet.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(unet(**arguments).sample, adapted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_size": 5}, r"sample_size divisible by 2 .*got \(5, 5, 5\)"),
        ({"sample_size": 2}, r"sample_size larger than 2, got \(2, 2, 2\)"),
        ({"sample_size": 8, "block_out_channels": (8, 8, 8, 8)}, "larger than 8"),
        ({"norm_num_groups": 3}, "8 features and norm_num_groups=3"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DualChannelUNet3D(**(TINY | changes))


@torch.no_grad()
def test_a_single_deepest_voxel_works_with_group_norm():
    unet = model(sample_size=2, norm_num_groups=2)
    assert torch.isfinite(unet(**inputs(unet)).sample).all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 4, 4, 4), r"\(B, 6, d, h, w\).*got \(1, 3, 4, 4, 4\)"),
        ((6, 4, 4, 4), r"\(B, 6, d, h, w\).*got \(6, 4, 4, 4\)"),
        ((1, 6, 4, 5, 4), r"divisible by 2 .*got \(4, 5, 4\)"),
        ((1, 6, 2, 2, 2), r"larger than 2, got \(2, 2, 2\)"),
    ],
)
def test_a_sample_of_the_wrong_shape_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        model()(torch.zeros(shape), 1)


def test_class_labels_are_required_exactly_with_classes():
    with pytest.raises(ValueError, match="Expected no class_labels for num_class_embeds=None"):
        model()(torch.zeros(1, 6, 4, 4, 4), 1, class_labels=torch.tensor([0]))
    with pytest.raises(ValueError, match="num_class_embeds=2, got None"):
        model(num_class_embeds=2)(torch.zeros(1, 6, 4, 4, 4), 1)


@pytest.mark.parametrize(
    ("dtype", "use_autocast", "tolerance"),
    [(torch.float32, False, 1e-5), (torch.float32, True, 0.02), (torch.bfloat16, False, 0.02)],
    ids=["float32", "bf16 autocast", "bf16 weights"],
)
@torch.no_grad()
def test_every_arithmetic_stays_near_float64(dtype, use_autocast, tolerance):
    unet = model(sample_size=8, block_out_channels=(16, 32, 64), attention_head_dim=16)  # down to 2 x 2 x 2
    arguments = inputs(unet)
    sample = arguments.pop("sample")
    exact = copy.deepcopy(unet).double()(sample.double(), **arguments).sample
    with torch.autocast("cpu", torch.bfloat16, enabled=use_autocast):
        output = unet.to(dtype)(sample.to(dtype), **arguments).sample
    assert (output - exact).norm() < tolerance * exact.norm()


def conditional(**changes):
    unet = model(num_class_embeds=3, class_embed_type="projection", projection_class_embeddings_input_dim=2, **changes)
    torch.nn.init.normal_(unet.condition_embedding.linear_2.weight)  # as if it were trained
    return unet


@torch.no_grad()
def test_weights_of_classes_are_a_mixture_of_their_embeddings():
    unet = model(num_class_embeds=3)
    arguments = inputs(unet)
    expected = unet(**arguments).sample
    one_hot = torch.nn.functional.one_hot(arguments["class_labels"], 3).float()
    torch.testing.assert_close(unet(**arguments | {"class_labels": one_hot}).sample, expected)
    table = unet.class_embedding.weight
    between = unet.embed_conditions(arguments["sample"], 3, torch.tensor([[0.25, 0.0, 0.75]]).expand(2, 3))
    unet.class_embedding.weight[1] = 0.25 * table[0] + 0.75 * table[2]
    torch.testing.assert_close(between, unet.embed_conditions(arguments["sample"], 3, torch.tensor([1, 1])))


@torch.no_grad()
def test_a_condition_that_is_not_given_adds_nothing():
    unet = conditional(conditioning_dropout_prob=0.1)
    arguments = inputs(unet)
    vectors = torch.randn(2, 2)
    with_all = unet(**arguments, conditions=vectors).sample
    none_of_both = unet(arguments["sample"], arguments["timestep"]).sample
    assert not torch.allclose(with_all, none_of_both)
    nothing = {"class_labels": torch.zeros(2, 3), "conditions": torch.full((2, 2), torch.nan)}
    torch.testing.assert_close(unet(**arguments | nothing).sample, none_of_both)
    # each sample of a batch for itself, and each kind for itself
    half = torch.stack([vectors[0], torch.tensor([1.0, torch.nan])])
    mixed = unet(**arguments, conditions=half).sample
    torch.testing.assert_close(mixed[0], with_all[0])
    torch.testing.assert_close(mixed[1], unet(**arguments).sample[1])


@torch.no_grad()
def test_vectors_begin_at_nothing_and_change_the_output():
    arguments = inputs(model(num_class_embeds=3))
    fresh = model(num_class_embeds=3, class_embed_type="projection", projection_class_embeddings_input_dim=2)
    assert fresh.condition_embedding(torch.randn(4, 2)).abs().max() == 0
    trained = conditional()
    low, high = (trained(**arguments, conditions=torch.full((2, 2), value)).sample for value in (-1.0, 1.0))
    assert (low - high).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_of_a_conditional_model_takes_part(dtype):
    unet = conditional().train().to(dtype)
    arguments = inputs(unet)
    arguments["sample"] = arguments["sample"].to(dtype)
    unet(**arguments, conditions=torch.randn(2, 2)).sample.float().square().mean().backward()
    for name, parameter in unet.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_embed_type": "projection"}, "got 'projection' with None"),
        ({"projection_class_embeddings_input_dim": 2}, "got None with 2"),
        ({"class_embed_type": "timestep"}, "got 'timestep' with None"),
        ({"num_class_embeds": 2, "conditioning_dropout_prob": 1.5}, "from 0 to 1, got 1.5"),
    ],
)
def test_conditions_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        model(**changes)
    with pytest.raises(ValueError, match="from 0 to 0.33, got 0.4"):
        conditional(conditioning_dropout_prob=0.4)


def test_vectors_are_required_exactly_with_a_projection():
    with pytest.raises(ValueError, match="Expected no conditions for projection_class_embeddings_input_dim=None"):
        model()(torch.zeros(1, 6, 4, 4, 4), 1, conditions=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="projection_class_embeddings_input_dim=2, got None"):
        conditional()(torch.zeros(1, 6, 4, 4, 4), 1, class_labels=torch.tensor([0]))


@torch.no_grad()
@pytest.mark.parametrize("num_channels", [2, 3])
def test_every_channel_has_a_timestep(num_channels):
    unet = model(num_channels=num_channels, channel_timesteps_prob=0.5)
    sample = torch.randn(2, 3 * num_channels, 4, 4, 4)
    together = unet(sample, torch.tensor([5, 600])).sample
    times = torch.tensor([[5], [600]]).repeat(1, num_channels)
    torch.testing.assert_close(unet(sample, times).sample, together)
    torch.testing.assert_close(unet(sample, 5).sample[0], together[0])
    for channel in range(num_channels):  # which one it is matters, and only to its own sample
        apart = times.clone()
        apart[0, channel] = -1
        changed = (unet(sample, apart).sample - together).abs().amax(dim=(1, 2, 3, 4))
        assert changed[0] > 1e-4 and changed[1] < 1e-5
        assert (unet(sample, apart.roll(1, 1)).sample[0] - unet(sample, apart).sample[0]).abs().max() > 1e-4


def test_timesteps_of_channels_are_refused_where_they_do_not_fit():
    with pytest.raises(ValueError, match=r"timesteps one for each sample, got \(2, 2\).*channel_timesteps_prob"):
        model()(torch.zeros(2, 6, 4, 4, 4), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"timesteps one for each sample, or \(B, 2\), got \(2, 3\)"):
        model(channel_timesteps_prob=0.5)(torch.zeros(2, 6, 4, 4, 4), torch.zeros(2, 3))
    for changes in ({"channel_timesteps_prob": 1.5}, {"channel_timesteps_prob": 0.5, "num_channels": 1}):
        with pytest.raises(ValueError, match="Expected a channel_timesteps_prob from 0 to 1, and 0 of one channel"):
            model(**changes)
