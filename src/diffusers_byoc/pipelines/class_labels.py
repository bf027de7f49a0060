"""Classes of a call (drugs): names, indices or weights of them, as the U-Net takes them."""

import operator
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


def read_class_labels(class_labels: Any) -> Any:
    """Labels in whatever container: a list of them, float32 weights as a tensor, one label, or None."""
    if _is_weights(class_labels):
        return torch.as_tensor(class_labels, dtype=torch.float32)
    if hasattr(class_labels, "tolist"):  # a tensor or an array
        class_labels = class_labels.tolist()
    return list(_flat(class_labels)) if isinstance(class_labels, (list, tuple)) else class_labels


def prepare_class_labels(pipeline, class_labels: Any, num_samples: int, device: torch.device | str) -> Tensor | None:
    """The U-Net's `class_labels`.

    Args:
        pipeline: a `BYOCPipeline`.
        class_labels: of `read_class_labels`.
        num_samples: of the call.
        device: of the result.

    Returns:
        Indices (num_samples,) int64; or weights (num_samples, number of classes); or None for no class.

    Raises:
        ValueError: for labels that the model does not know, or none where it needs them.
    """
    config, label2id = pipeline.unet.config, pipeline.config.label2id or {}
    num_classes = config.num_class_embeds
    if class_labels is None and (num_classes is None or config.conditioning_dropout_prob > 0):
        return None
    if class_labels is None or num_classes is None:
        wanted = "no class_labels" if num_classes is None else f"class_labels (this model has {num_classes} classes)"
        raise ValueError(f"Expected {wanted}, got {class_labels!r}. Known names: {sorted(label2id)}.")
    if torch.is_tensor(class_labels):
        if tuple(class_labels.shape) != (num_samples, num_classes) or not class_labels.isfinite().all():
            raise ValueError(
                f"Expected ({num_samples}, {num_classes}) finite weights as class_labels (num_samples, classes),"
                f" got {tuple(class_labels.shape)}. Give a weight for each class, or names."
            )
        return class_labels.to(device)
    labels = class_labels if isinstance(class_labels, list) else [class_labels] * num_samples
    if len(labels) != num_samples:
        raise ValueError(
            f"Expected one class label, or one per sample ({num_samples}), got {len(labels)}. Match their number."
        )
    indices = [label2id.get(label, -1) if isinstance(label, str) else whole_number(label) for label in labels]
    for label, index in zip(labels, indices, strict=True):
        if not 0 <= index < num_classes:
            raise ValueError(
                f"Expected a class label in [0, {num_classes}) or one of {sorted(label2id)}, got {label!r}. "
                "Choose one of these."
            )
    return torch.tensor(indices, device=device)


def _is_weights(class_labels: Any) -> bool:
    """Whether these are weights of the classes and no indices: a tensor or array of floats, a row a sample."""
    is_array = isinstance(class_labels, np.ndarray) and class_labels.dtype.kind == "f"
    return is_array or (torch.is_tensor(class_labels) and class_labels.is_floating_point())


def _flat(labels: list | tuple) -> Iterator[Any]:
    for label in labels:
        yield from _flat(label) if isinstance(label, (list, tuple)) else (label,)


def whole_number(value: Any) -> int:
    """An integer of any library as Python's; -1 for what is none."""
    try:
        return operator.index(value)
    except TypeError:
        return -1
