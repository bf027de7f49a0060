"""Numbers as conditions (a dose, a time, an embedding): from their own units to what the U-Net takes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from torch import Tensor


logger = logging.get_logger(__name__)


def measure_conditions(values: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """What a pipeline must know of its conditions: names, scale and range, for its configuration.

    Args:
        values: name -> (N, length) of the training cells, in their own units; length 1 for a number.

    Returns:
        For each name ``{"name", "mean", "std", "min", "max"}``, lists of its length.

    Raises:
        ValueError: if a value is not finite, or one condition is the same for all cells.
    """
    statistics = []
    for name, column in values.items():
        column = np.asarray(column, np.float64)
        if not np.isfinite(column).all():
            raise ValueError(f"Expected finite numbers as {name}, got NaN or infinity. Leave these cells out.")
        if not column.std(axis=0).any():
            raise ValueError(
                f"Expected cells of different {name}, got {column[0].tolist()} for all. Leave this condition out."
            )
        spread = column.std(axis=0)
        numbers = {
            "mean": column.mean(axis=0),
            "std": np.where(spread > 0, spread, 1.0),  # of an embedding one number may never change
            "min": column.min(axis=0),
            "max": column.max(axis=0),
        }
        statistics.append({"name": name} | {key: number.tolist() for key, number in numbers.items()})
    return statistics


def typical_conditions(statistics: Sequence[Mapping[str, Any]] | None) -> dict[str, list[float]] | None:
    """The means of the training cells, for a call; None where there are no conditions."""
    return {condition["name"]: condition["mean"] for condition in statistics} if statistics else None


def num_condition_features(statistics: Sequence[Mapping[str, Any]]) -> int:
    """Length of the vector of all conditions, the U-Net's `projection_class_embeddings_input_dim`."""
    return sum(len(condition["mean"]) for condition in statistics)


def read_conditions(
    statistics: Sequence[Mapping[str, Any]], given: Mapping[str, Any], num_samples: int | None = None
) -> dict[str, np.ndarray]:
    """The conditions of a call.

    Args:
        statistics: of `measure_conditions`.
        given: name -> one number, or one for each sample; of an embedding one vector, or one for each sample.
        num_samples: how many; None takes the number that is given for each sample, otherwise 1.

    Returns:
        name -> (num_samples, length) float64, in their own units.

    Raises:
        ValueError: for other names, lengths or numbers of samples, or what is not finite.
    """
    names = [condition["name"] for condition in statistics]
    if not isinstance(given, Mapping) or set(given) != set(names):
        got = sorted(map(str, given)) if isinstance(given, Mapping) else repr(given)
        raise ValueError(f"Expected conditions {{name: value}} with the names {names}, got {got}. Give all of these.")
    arrays = {}
    for condition in statistics:
        name, length = condition["name"], len(condition["mean"])
        value = given[name].cpu() if torch.is_tensor(given[name]) else given[name]
        try:
            array = np.asarray(value, np.float64)
        except (TypeError, ValueError):
            array = np.array(np.nan)
        is_one = array.ndim == 0 or (length > 1 and array.ndim == 1)
        array = array.reshape(1, -1) if is_one else array.reshape(len(array), -1)
        if array.shape[1] != length or not np.isfinite(array).all():
            raise ValueError(
                f"Expected {length} finite {'number' if length == 1 else 'numbers'} as {name}, for all samples or for"
                f" each, got {given[name]!r}. Correct it."
            )
        arrays[name] = array
    if num_samples is None:
        num_samples = max(map(len, arrays.values()))
    for name, array in arrays.items():
        if len(array) not in (1, num_samples):
            raise ValueError(
                f"Expected one {name}, or one per sample ({num_samples}), got {len(array)}. Match their number."
            )
        arrays[name] = np.broadcast_to(array, (num_samples, array.shape[1]))
    return arrays


def standardize_conditions(statistics: Sequence[Mapping[str, Any]], values: Mapping[str, np.ndarray]) -> Tensor:
    """Conditions (N, length) each, in their own units, as the U-Net's `conditions` (N, P) float32."""
    columns = []
    for condition in statistics:
        mean, std = np.array(condition["mean"]), np.array(condition["std"])
        columns.append((values[condition["name"]] - mean) / std)
    return torch.from_numpy(np.concatenate(columns, axis=1)).float()


def find_extrapolated(
    statistics: Sequence[Mapping[str, Any]], values: Mapping[str, np.ndarray]
) -> dict[str, list[bool]]:
    """For each name, which of the samples lie beyond the values that the model was trained on."""
    extrapolated = {}
    for condition in statistics:
        column = values[condition["name"]]
        is_beyond = (column < np.array(condition["min"])) | (column > np.array(condition["max"]))
        extrapolated[condition["name"]] = is_beyond.any(axis=1).tolist()
    return extrapolated


def prepare_conditions(
    pipeline, conditions: Mapping[str, Any] | None, num_samples: int, device: torch.device | str
) -> tuple[Tensor | None, dict[str, list[bool]] | None]:
    """The U-Net's `conditions` (num_samples, P) float32, and where they lie beyond the training; or None twice.

    Args:
        pipeline: a `BYOCPipeline`.
        conditions: of the call.
        num_samples: of the call.
        device: of the result.

    Raises:
        ValueError: as `read_conditions`, or for conditions of a model without, or none where it needs them.
    """
    statistics = pipeline.config.conditions
    if conditions is None and (not statistics or pipeline.unet.config.conditioning_dropout_prob > 0):
        return None, None
    if conditions is None or not statistics:
        names = [condition["name"] for condition in statistics or ()]
        wanted = f"conditions with the names {names}" if names else "no conditions"
        raise ValueError(f"Expected {wanted}, got {conditions!r}. Pass what the model was trained on.")
    values = read_conditions(statistics, conditions, num_samples)
    extrapolated = find_extrapolated(statistics, values)
    for condition in statistics:
        if any(extrapolated[condition["name"]]):
            logger.warning(
                f"{condition['name']} lies beyond {condition['min']} to {condition['max']}, what the model was"
                f" trained on, for {sum(extrapolated[condition['name']])} of {num_samples} cells."
            )
    return standardize_conditions(statistics, values).to(device), extrapolated
