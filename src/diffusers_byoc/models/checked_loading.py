"""Loading that refuses weights which would sample wrongly without a word."""

import os
import re
from pathlib import Path

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils.sha import sha_fileobj
from safetensors import SafetensorError


_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class CheckedModelMixin(ModelMixin):
    """A `ModelMixin` whose weights come from safetensors, all of them, are finite, and are those that the Hub has."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """As in diffusers, and checked.

        diffusers leaves a tensor that the file lacks as it finds the memory, with a line in the log.

        Args:
            pretrained_model_name_or_path: folder, or name on the Hub.
            **kwargs: of diffusers' `ModelMixin.from_pretrained`. With `ignore_mismatched_sizes=True`, tensors of
                another size in the file are left to be trained, as there.

        Raises:
            ValueError: if there are pickled weights only, if the file is damaged or, downloaded, not the one that the
                Hub has by its SHA-256, if a tensor is missing, or one is not finite.
            OSError: if there are no weights.
        """
        place = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        _refuse_pickles(place, kwargs.get("use_safetensors"))
        kwargs["use_safetensors"] = True  # diffusers would fall back on pickles
        wants_info = kwargs.pop("output_loading_info", False)
        if place.is_dir():
            _check_downloaded(place)
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, **kwargs, output_loading_info=True)
        except OSError as error:
            reason = getattr(error.__context__, "__context__", None)  # diffusers tries to read it as text after that
            if not isinstance(reason, SafetensorError):
                raise
            raise ValueError(
                f"Expected whole safetensors weights in {_weights_path(place, kwargs.get('variant'))}, got a damaged"
                f" file ({reason}). Save the model again, or load another copy."
            ) from error
        if not place.is_dir():  # downloaded now
            config = (Path(kwargs.get("subfolder") or "") / CONFIG_NAME).as_posix()
            options = {name: kwargs.get(name) for name in ("cache_dir", "revision")}
            downloaded = try_to_load_from_cache(str(pretrained_model_name_or_path), config, **options)
            if isinstance(downloaded, str):
                _check_downloaded(Path(downloaded).parent)

        path = _weights_path(place, kwargs.get("variant"))
        missing = sorted(info.get("missing_keys", []))
        if missing:
            raise ValueError(
                f"Expected every tensor of {cls.__name__} in {path}, got none for {_few(missing)}. Save the model"
                " again (an adapter apart from it, by save_lora_adapter), or load another copy."
            )
        mismatched = {name for name, *_ in info.get("mismatched_keys", [])}
        tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in mismatched}
        broken = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
        if broken:
            raise ValueError(
                f"Expected finite weights in {path}, got NaN or infinity in {_few(broken)}. Load another copy, or"
                " train again; weights above 65504 need dtype=torch.float32 or torch.bfloat16."
            )
        return (model, info) if wants_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        **kwargs,
    ) -> None:
        """As in diffusers, but always as safetensors: what `safe_serialization=False` writes could not be loaded."""
        kwargs["safe_serialization"] = True
        super().save_pretrained(save_directory, variant=variant, max_shard_size=max_shard_size, **kwargs)


def _refuse_pickles(folder: Path, use_safetensors: bool | None) -> None:
    """Refuse a folder that has pickled weights and no others, and a call that asks for them."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    pickles = [name for name in names if name.endswith(_PICKLES)]
    has_safetensors = any(name.endswith(".safetensors") for name in names)
    if use_safetensors is False or (pickles and not has_safetensors):
        old = folder / (pickles[0] if pickles else "diffusion_pytorch_model.bin")
        raise ValueError(
            f"Expected safetensors weights in {folder}, got {old.name if pickles else 'use_safetensors=False'}."
            f" Convert pickled ones: safetensors.torch.save_file(torch.load({str(old)!r}, weights_only=True),"
            f" {str(folder / SAFETENSORS_WEIGHTS_NAME)!r})."
        )


def _check_downloaded(folder: Path) -> None:
    """Refuse weights in the Hub's cache whose SHA-256 is not the one that they are kept under.

    The client compares sizes only. Where the cache has no links (Windows), nothing is known and nothing checked.
    """
    for path in folder.glob("*.safetensors"):
        expected = path.resolve().name
        if not (path.is_symlink() and re.fullmatch("[0-9a-f]{64}", expected)):
            continue
        with path.open("rb") as file:
            found = sha_fileobj(file).hex()
        if found != expected:
            raise ValueError(
                f"Expected the SHA-256 {expected[:12]}… of the Hub for {path}, got {found[:12]}…: it was changed on"
                f" its way or here. Delete {path.resolve()}, and load it again."
            )


def _weights_path(folder: Path, variant: str | None) -> Path:
    """The file of weights in `folder`, or the folder where they are in several, or on the Hub."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    path = path.with_suffix(f".{variant}.safetensors") if variant else path
    return path if path.is_file() else folder


def _is_finite(tensor: torch.Tensor) -> bool:
    is_whole = tensor.is_meta or tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return is_whole or bool(torch.isfinite(tensor).all())


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
