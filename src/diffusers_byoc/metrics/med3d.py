"""Med3D features: a 3D ResNet-50 that was trained to segment medical volumes, its last feature maps averaged.

The network is MONAI's, the weights are MedicalNet's. `load_med3d` takes either form they come in: a folder or
repository that `Med3DModel.save_pretrained` wrote, or MedicalNet's own `.pth`.

Source: Chen et al. 2019, "Med3D: Transfer learning for 3D medical image analysis"; BYOC, appendix A.2. Weights:
https://huggingface.co/TencentMedicalNet/MedicalNet-Resnet50.
"""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
)
from torch import Tensor, nn

from ..optional import optional
from ..volumes import check_unit_range


optional("monai", "med3d")
optional("transformers", "med3d")

from monai.networks.nets.resnet import ResNet  # noqa: E402
from transformers import PreTrainedConfig, PreTrainedModel  # noqa: E402
from transformers.utils import ModelOutput  # noqa: E402


MED3D_REPOSITORY = "TencentMedicalNet/MedicalNet-Resnet50"
MED3D_FILE = "resnet_50.pth"  # trained on 8 data sets, the paper's; resnet_50_23dataset.pth on 23

_HOW_TO_GET_THEM = (
    f"Download {MED3D_FILE} from https://huggingface.co/{MED3D_REPOSITORY} and give its path, or the folder that"
    " convert_med3d_checkpoint(path).save_pretrained(folder) wrote"
)

_NOT_FOUND = (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError)


class Med3DConfig(PreTrainedConfig):
    """Configuration of `Med3DModel`; the defaults are MedicalNet's ResNet-50.

    Args:
        layers: bottleneck blocks in each of the four stages.
        block_inplanes: width of each stage; a block puts out four times as many features.
        dilated: MedicalNet halves the first convolution's output and dilates the last two stages (by 2 and 4) in
            place of striding them, and so did the evaluation of HA-GAN that the paper follows. False gives MONAI's
            strides (full resolution first, then halved in each stage), under which the same weights give other
            features.
        intensity_normalization: how a volume in [0, 1], its channels averaged, enters the network. "symmetric": as
            [-1, 1], the range that HA-GAN's evaluation feeds; "zscore": each volume minus its mean, over its standard
            deviation, which is nearer to how MedicalNet was trained but hides differences in brightness; "none".

    Raises:
        ValueError: if an argument is out of range.
    """

    model_type = "med3d"

    def __init__(
        self,
        layers: tuple[int, ...] = (3, 4, 6, 3),
        block_inplanes: tuple[int, ...] = (64, 128, 256, 512),
        dilated: bool = True,
        intensity_normalization: str = "symmetric",
        **kwargs,
    ):
        if len(layers) != 4 or len(block_inplanes) != 4:
            raise ValueError(
                f"Expected four stages, got layers {layers} and block_inplanes {block_inplanes}. Give four of each."
            )
        if intensity_normalization not in ("symmetric", "zscore", "none"):
            raise ValueError(
                f"Expected `intensity_normalization` 'symmetric', 'zscore' or 'none', got {intensity_normalization!r}."
                " Choose one."
            )
        self.layers = list(layers)
        self.block_inplanes = list(block_inplanes)
        self.dilated = dilated
        self.intensity_normalization = intensity_normalization
        super().__init__(**kwargs)


@dataclass
class Med3DOutput(ModelOutput):
    """`features` (B, 2048): the last feature maps, averaged over depth, height and width."""

    features: Tensor | None = None


class Med3DModel(PreTrainedModel):
    """Multichannel volumes to Med3D features.

    Loads, saves and is shared as any model of 🤗 Transformers, with two exceptions: it is made in evaluation mode, and
    weights that do not fit are an error, never a warning, because random features look like features.

    Args:
        config: the architecture and how volumes are prepared.
    """

    config_class = Med3DConfig
    base_model_prefix = "med3d"
    main_input_name = "volumes"
    _no_split_modules = ["ResNetBottleneck"]

    def __init__(self, config: Med3DConfig):
        super().__init__(config)
        self.network = ResNet(
            "bottleneck",
            config.layers,
            config.block_inplanes,
            n_input_channels=1,
            conv1_t_stride=2 if config.dilated else 1,
            shortcut_type="B",
            feed_forward=False,
            bias_downsample=False,
        )
        if config.dilated:
            _dilate(self.network.layer3, 2)
            _dilate(self.network.layer4, 4)
        self.post_init()
        self.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As in Transformers; but weights that are missing, left over or of another shape are an error.

        Raises:
            ValueError: naming the keys that do not fit.
            OSError: if there is no such folder or repository.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        mismatched = {key for key, *_ in info["mismatched_keys"]}
        missing = set(info["missing_keys"]) | mismatched
        _check_keys(missing, info["unexpected_keys"], str(pretrained_model_name_or_path))
        return (model, info) if wants_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """MONAI initialises its network at construction."""

    def forward(self, volumes: Tensor, return_dict: bool | None = None) -> Med3DOutput | tuple[Tensor]:
        """Features of a batch.

        Args:
            volumes: (B, M, D, H, W) in [0, 1].
            return_dict: return `Med3DOutput`, or a plain tuple.

        Returns:
            `features` (B, 2048).

        Raises:
            ValueError: if the volumes are not (B, M, D, H, W) in [0, 1].
        """
        if volumes.ndim != 5:
            raise ValueError(f"Expected volumes (B, M, D, H, W), got shape {tuple(volumes.shape)}. Give a batch.")
        check_unit_range(volumes)
        # 1. channels -> one, intensities -> the network's
        mean = volumes.mean(1, keepdim=True)  # (B, 1, D, H, W)
        if self.config.intensity_normalization == "symmetric":
            mean = mean * 2 - 1
        elif self.config.intensity_normalization == "zscore":
            deviation, average = torch.std_mean(mean, (1, 2, 3, 4), keepdim=True)
            mean = (mean - average) / deviation.clamp(min=1e-6)  # an empty volume stays empty

        # 2. feature maps, averaged: MONAI's network ends in that mean
        features = self.network(mean.to(self.dtype))
        return Med3DOutput(features) if return_dict in (None, True) else (features,)


def load_med3d(pretrained: str | os.PathLike = MED3D_REPOSITORY) -> Med3DModel:
    """Med3D from wherever its weights are, in evaluation mode.

    Args:
        pretrained: a folder or Hub repository written by `Med3DModel.save_pretrained`; a checkpoint of MedicalNet; or
            a Hub repository that holds `MED3D_FILE`, as MedicalNet's own.

    Returns:
        The model.

    Raises:
        OSError: if there are no weights, with how to get them.
        ValueError: if the weights do not fit the network; the message names them.
        ImportError: if MONAI or transformers is missing.
    """
    if Path(pretrained).is_file():
        return convert_med3d_checkpoint(pretrained)
    if Path(pretrained).is_dir():
        return Med3DModel.from_pretrained(pretrained)
    try:
        if isinstance(try_to_load_from_cache(str(pretrained), MED3D_FILE), str):  # also without a connection
            return convert_med3d_checkpoint(pretrained)
        hf_hub_download(str(pretrained), "config.json")
    except RemoteEntryNotFoundError:
        return convert_med3d_checkpoint(pretrained)
    except _NOT_FOUND as error:
        raise OSError(
            f"Expected Med3D weights at {pretrained}, got none there, or no connection. {_HOW_TO_GET_THEM}."
        ) from error
    return Med3DModel.from_pretrained(pretrained)


def convert_med3d_checkpoint(
    checkpoint: str | os.PathLike = MED3D_REPOSITORY, filename: str = MED3D_FILE, config: Med3DConfig | None = None
) -> Med3DModel:
    """MedicalNet's checkpoint as a `Med3DModel`, for `save_pretrained` and `push_to_hub`.

    Args:
        checkpoint: path of the `.pth`, or the Hub repository it lies in. It is read with `weights_only=True`: no code
            in it runs.
        filename: its name in the repository; `resnet_50_23dataset.pth` was trained on 23 data sets.
        config: of the model; None for MedicalNet's ResNet-50.

    Returns:
        The model, in evaluation mode.

    Raises:
        OSError: if there is no such file or repository, with how to get the weights.
        ValueError: if the file is no such checkpoint, or its weights do not fit; the message names them.
    """
    path = Path(checkpoint)
    if not path.is_file():
        try:
            path = Path(hf_hub_download(str(checkpoint), filename))
        except _NOT_FOUND as error:
            raise OSError(
                f"Expected Med3D weights at {checkpoint}, got no such file, no repository with {filename}, or no"
                f" connection. {_HOW_TO_GET_THEM}."
            ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(
            f"Expected a checkpoint of weights alone, got {path} ({error}). {_HOW_TO_GET_THEM}."
        ) from error
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise ValueError(
            f"Expected a dictionary with the key state_dict in {path}, got {_kind(content)}. {_HOW_TO_GET_THEM}."
        )

    model = Med3DModel(config or Med3DConfig())
    weights = {name.removeprefix("module."): weight for name, weight in weights.items()}
    expected = model.network.state_dict()
    counters = {name for name in expected if name.endswith("num_batches_tracked")}  # of no use after training
    _check_keys(set(expected) - set(weights) - counters, set(weights) - set(expected), str(path))
    shapes = {
        f"{name} {tuple(weight.shape)} instead of {tuple(expected[name].shape)}"
        for name, weight in weights.items()
        if weight.shape != expected[name].shape
    }
    if shapes:
        raise ValueError(
            f"Expected the weights of a ResNet-50 in {path}, got other shapes: {_some(shapes)}. {_HOW_TO_GET_THEM}."
        )
    model.network.load_state_dict(weights, strict=False)
    return model


def _dilate(stage: nn.Sequential, dilation: int) -> None:
    """Let a stage dilate its convolutions in place of striding."""
    for block in stage:
        block.conv2.stride, block.conv2.dilation, block.conv2.padding = (1,) * 3, (dilation,) * 3, (dilation,) * 3
        if block.downsample is not None:
            block.downsample[0].stride = (1,) * 3


def _check_keys(missing, unexpected, where: str) -> None:
    if missing or unexpected:
        parts = [
            f"{len(keys)} {kind} ({_some(keys)})"
            for kind, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        ]
        raise ValueError(
            f"Expected the weights of Med3D's network in {where}, got {', '.join(parts)}. {_HOW_TO_GET_THEM}."
        )


def _kind(content) -> str:
    return f"the keys {_some(content)}" if isinstance(content, dict) else type(content).__name__


def _some(keys) -> str:
    keys = sorted(map(str, keys))
    return ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")
