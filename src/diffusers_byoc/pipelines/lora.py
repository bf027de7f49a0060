"""LoRA adapters of a pipeline's U-Net, loaded, mixed and saved as in diffusers' own pipelines (Hu et al. 2022)."""

import os

from diffusers.loaders.lora_base import LoraBaseMixin
from torch import Tensor

from ..optional import optional


class BYOCLoraLoaderMixin(LoraBaseMixin):
    """What loads, mixes and saves adapters; `set_adapters`, `unload_lora_weights` and so on are diffusers'."""

    _lora_loadable_modules = ["unet"]
    unet_name = "unet"

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, Tensor],
        adapter_name: str | None = None,
        **kwargs,
    ) -> None:
        """Add an adapter to the U-Net; the latest one is in use until `set_adapters` says otherwise.

        Args:
            pretrained_model_name_or_path_or_dict: folder, repository of the Hub, or the tensors of an adapter that
                ``byoc-train --train_lora`` or `save_lora_weights` made.
            adapter_name: to be called by; None for ``default_0`` and so on.
            **kwargs: of diffusers' loaders: `weight_name`, `subfolder`, `revision`, ...

        Raises:
            ValueError: if the adapter is of another U-Net, or not in safetensors.
            OSError: if there is none.
            ImportError: if peft is not installed.
        """
        optional("peft", "lora")
        from diffusers.loaders import StableDiffusionLoraLoaderMixin  # imports transformers, which peft brings

        source = pretrained_model_name_or_path_or_dict
        weight_name = kwargs.get("weight_name") or "safetensors"
        if kwargs.get("use_safetensors") is False or not weight_name.endswith("safetensors"):
            raise ValueError(
                f"Expected an adapter in safetensors, got {weight_name}. Save it again with save_lora_weights."
            )
        options = {"use_safetensors": True, "return_lora_metadata": True}
        source = source if isinstance(source, dict) else os.fspath(source)
        tensors, _, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(source, **(kwargs | options))
        place = "the tensors" if isinstance(source, dict) else source
        self._check_adapter(tensors, place)
        self.unet.load_lora_adapter(
            tensors, prefix=self.unet_name, adapter_name=adapter_name, metadata=metadata, _pipeline=self
        )

    def _check_adapter(self, tensors: dict[str, Tensor], place: str) -> None:
        """Refuse what diffusers would leave out with a line in the log."""
        prefix = f"{self.unet_name}."
        # a layer that has adapters already is called by its own name, its weight is that of its `base_layer`
        layers = {name.removesuffix(".base_layer"): layer for name, layer in self.unet.named_modules()}
        for name, tensor in tensors.items():
            layer, _, kind = name.removeprefix(prefix).partition(".lora_")
            weight = getattr(layers.get(layer), "weight", None)
            if not name.startswith(prefix) or not kind or weight is None:
                raise ValueError(
                    f"Expected an adapter of this U-Net, got {name} in {place}, of which it has no layer. Load the"
                    " pipeline that the adapter was trained on."
                )
            axis = 1 if kind.startswith("A.") else 0
            if weight.shape[axis] != tensor.shape[axis]:
                raise ValueError(
                    f"Expected {weight.shape[axis]} features in {name}, as this U-Net's layer has, got"
                    f" {tensor.shape[axis]} in {place}. Load the pipeline that the adapter was trained on."
                )

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        unet_lora_layers: dict[str, Tensor],
        unet_lora_adapter_metadata: dict | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
    ) -> None:
        """Write an adapter as ``pytorch_lora_weights.safetensors``.

        Args:
            save_directory: made if missing.
            unet_lora_layers: as peft's `get_peft_model_state_dict` returns them for the U-Net.
            unet_lora_adapter_metadata: the adapter's configuration, ``unet.peft_config[NAME].to_dict()``.
            is_main_process: whether this process writes.
            weight_name: of the file.
        """
        if is_main_process:
            layers, metadata = {cls.unet_name: unet_lora_layers}, {cls.unet_name: unet_lora_adapter_metadata}
            cls._save_lora_weights(save_directory, layers, metadata, weight_name=weight_name)

    def fuse_lora(self, components: list[str] | None = None, **kwargs) -> None:
        """Add the adapters in use to the weights: see diffusers' `LoraBaseMixin.fuse_lora`."""
        super().fuse_lora(components or self._lora_loadable_modules, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs) -> None:
        """Take them out again."""
        super().unfuse_lora(components or self._lora_loadable_modules, **kwargs)
