import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import resnet50
from safetensors.torch import load_file, save_file

from diffusers_byoc.metrics import Med3DConfig, Med3DModel, convert_med3d_checkpoint, load_med3d


TINY = {"layers": (1, 1, 1, 1), "block_inplanes": (4, 4, 8, 8)}


def tiny(seed: int = 0, **config) -> Med3DModel:
    torch.manual_seed(seed)
    model = Med3DModel(Med3DConfig(**TINY | config))
    for name, buffer in model.named_buffers():  # statistics that evaluation mode can be told by
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
    return model


def published(model: Med3DModel) -> dict:
    """MedicalNet's format: a DataParallel's weights under state_dict."""
    return {"state_dict": {f"module.{name}": weight for name, weight in model.network.state_dict().items()}}


def by_hand(weights: dict, volumes: torch.Tensor) -> torch.Tensor:
    """MedicalNet's network from its weights alone: strides 2, 2 (pool), 1, 2, then dilations 2 and 4."""

    def convolve(x, name, **kwargs):
        return F.conv3d(x, weights[f"{name}.weight"], **kwargs)

    def normalise(x, name):
        statistics = (weights[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *statistics)

    x = F.relu(normalise(convolve(volumes, "conv1", stride=2, padding=3), "bn1"))
    x = F.max_pool3d(x, 3, stride=2, padding=1)
    for layer, (stride, dilation) in enumerate([(1, 1), (2, 1), (1, 2), (1, 4)], 1):
        for block in sorted({int(name.split(".")[1]) for name in weights if name.startswith(f"layer{layer}.")}):
            prefix, step = f"layer{layer}.{block}", stride if block == 0 else 1
            y = F.relu(normalise(convolve(x, f"{prefix}.conv1"), f"{prefix}.bn1"))
            y = convolve(y, f"{prefix}.conv2", stride=step, dilation=dilation, padding=dilation)
            y = normalise(convolve(F.relu(normalise(y, f"{prefix}.bn2")), f"{prefix}.conv3"), f"{prefix}.bn3")
            if block == 0:
                x = normalise(convolve(x, f"{prefix}.downsample.0", stride=step), f"{prefix}.downsample.1")
            x = F.relu(x + y)
    return x.mean((2, 3, 4))


@torch.no_grad()
def test_features_are_those_of_medicalnets_network_on_the_mean_channel():
    model = tiny(layers=(2, 1, 2, 1))
    volumes = torch.rand(2, 3, 32, 32, 32)
    expected = by_hand(model.network.state_dict(), volumes.mean(1, keepdim=True) * 2 - 1)
    assert expected.shape == (2, 32)
    torch.testing.assert_close(model(volumes).features, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(volumes, return_dict=False)[0], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_without_dilation_it_is_monais_resnet_and_both_have_2048_features():
    torch.manual_seed(0)
    monai = resnet50(
        spatial_dims=3, n_input_channels=1, feed_forward=False, shortcut_type="B", bias_downsample=False
    ).eval()
    model = Med3DModel(Med3DConfig(dilated=False, intensity_normalization="none"))
    model.network.load_state_dict(monai.state_dict())
    volumes = torch.rand(1, 2, 16, 16, 16)
    features = model(volumes).features
    assert features.shape == (1, 2048)
    torch.testing.assert_close(features, monai(volumes.mean(1, keepdim=True)))


@torch.no_grad()
def test_the_intensities_enter_as_the_config_says():
    volumes = torch.rand(2, 2, 16, 16, 16)
    plain = tiny(intensity_normalization="none").network(volumes.mean(1, keepdim=True) * 2 - 1)
    torch.testing.assert_close(tiny(intensity_normalization="symmetric")(volumes).features, plain)
    zscore = tiny(intensity_normalization="zscore")
    torch.testing.assert_close(zscore(volumes).features, zscore(volumes * 0.5 + 0.2).features, rtol=1e-3, atol=1e-4)
    assert zscore(torch.zeros(1, 2, 16, 16, 16)).features.isfinite().all()
    with pytest.raises(ValueError, match="intensity_normalization"):
        Med3DConfig(intensity_normalization="minmax")


@torch.no_grad()
def test_it_saves_safetensors_and_loads_the_same_in_evaluation_mode(tmp_path):
    model = tiny(intensity_normalization="zscore")
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    loaded = load_med3d(tmp_path)
    volumes = torch.rand(1, 2, 16, 16, 16)
    torch.testing.assert_close(loaded(volumes).features, model(volumes).features)
    assert loaded.config.intensity_normalization == "zscore" and not loaded.training


@pytest.mark.parametrize("damage", ["missing", "unexpected"])
def test_saved_weights_that_do_not_fit_are_an_error(tmp_path, damage):
    tiny().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if damage == "missing":
        del weights["network.layer4.0.conv3.weight"]
    else:
        weights["network.layer9.weight"] = torch.ones(1)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 {damage} \(network.layer"):
        Med3DModel.from_pretrained(tmp_path)


def test_a_checkpoint_of_medicalnet_converts_exactly(tmp_path):
    model = tiny()
    torch.save(published(model), tmp_path / "resnet_50.pth")
    converted = convert_med3d_checkpoint(tmp_path / "resnet_50.pth", config=Med3DConfig(**TINY))
    for name, weight in model.state_dict().items():
        assert torch.equal(converted.state_dict()[name], weight), name


def test_checkpoints_that_do_not_fit_are_refused_with_the_names(tmp_path):
    path, config = tmp_path / "resnet_50.pth", Med3DConfig(**TINY)
    cases = [("missing", "1 missing"), ("unexpected", "1 unexpected"), ("shape", "other shapes: conv1.weight")]
    for damage, message in cases:
        checkpoint = published(tiny())
        weights = checkpoint["state_dict"]
        if damage == "missing":
            del weights["module.layer2.0.bn1.weight"]
        elif damage == "unexpected":
            weights["module.conv_seg.weight"] = torch.ones(1)
        else:
            weights["module.conv1.weight"] = torch.ones(4, 3, 7, 7, 7)
        torch.save(checkpoint, path)
        with pytest.raises(ValueError, match=message):
            convert_med3d_checkpoint(path, config=config)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="key state_dict"):
        convert_med3d_checkpoint(path, config=config)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="a checkpoint of weights alone"):
        convert_med3d_checkpoint(path, config=config)


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of a checkpoint ran')",))


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    torch.save({"state_dict": Hostile()}, tmp_path / "zip.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"state_dict": Hostile()}))
    for name in ("zip.pth", "pickle.pth"):
        with pytest.raises(ValueError, match="a checkpoint of weights alone"):
            convert_med3d_checkpoint(tmp_path / name)


@pytest.mark.parametrize("shape", [(2, 16, 16, 16), (1, 2, 3)])
def test_bad_volumes_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(B, M, D, H, W\)"):
        tiny()(torch.rand(shape))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        tiny()(torch.rand(1, 2, 16, 16, 16) * 2 - 1)


REFUSED_AND_CONVERTED = """
import torch
from diffusers_byoc.metrics import Med3DConfig, convert_med3d_checkpoint, load_med3d

for name in ("org/nothing", "not a name"):
    try:
        load_med3d(name)
    except OSError as error:
        print(error)
model = convert_med3d_checkpoint(config=Med3DConfig(layers=(1, 1, 1, 1), block_inplanes=(4, 4, 8, 8)))
volumes = torch.rand(1, 2, 16, 16, 16)
features = model(volumes).features
model.push_to_hub("org/med3d")
print(torch.equal(features, load_med3d("org/med3d")(volumes).features))
"""


def serve_checkpoint(hub, model: Med3DModel) -> None:
    file = io.BytesIO()
    torch.save(published(model), file)
    files = {"a" * 40: {"resnet_50.pth": file.getvalue()}}
    hub.repos["models/TencentMedicalNet/MedicalNet-Resnet50"] = {"head": "a" * 40, "commits": files}


def test_published_weights_load_from_a_hub_and_are_shared_again(hub):
    serve_checkpoint(hub, tiny())
    *refused, equal = hub.run(REFUSED_AND_CONVERTED, timeout=250).splitlines()
    how = "Download resnet_50.pth from https://huggingface.co/TencentMedicalNet/MedicalNet-Resnet50"
    assert len(refused) == 2 and all(how in message for message in refused)
    assert equal == "True"
    assert set(hub.files("org/med3d")) >= {"config.json", "model.safetensors"}


@pytest.mark.slow
def test_the_default_is_medicalnets_repository(hub):
    torch.manual_seed(0)
    model = Med3DModel(Med3DConfig())
    serve_checkpoint(hub, model)
    code = "import torch; from diffusers_byoc.metrics import load_med3d; m = load_med3d();"
    printed = hub.run(f"{code} print(m(torch.ones(1, 2, 16, 16, 16)).features.sum().item())", timeout=250)
    assert float(printed) == pytest.approx(model(torch.ones(1, 2, 16, 16, 16)).features.sum().item(), rel=1e-4)
