"""A training that begins where another one ended, for other classes."""

from collections.abc import Mapping, Sequence

import torch

from ..models import DualChannelUNet3D


@torch.no_grad()
def take_unet_weights(
    unet: DualChannelUNet3D, trained: DualChannelUNet3D, label2id: Mapping[str, int] | None, class_names: Sequence[str]
) -> None:
    """Give `unet` the weights of `trained`, which may know other classes or none.

    A class that both know, by its name, keeps its embedding; a new one begins as the mean of all that are known. A
    network without classes begins as the mean of those it will see: of one class, exactly as that class. A network
    with a timestep for each channel, and one without, begin as `trained` where all channels have the same.

    Args:
        unet: of the same configuration, but for its conditions. Vectors that `trained` does not take begin as nothing.
        trained: the weights.
        label2id: the classes of `trained`, by name; None where it has none, or they have no names.
        class_names: of the cells that `unet` will be trained on.
    """
    weights = trained.state_dict()
    bias = weights["time_embedding.linear_2.bias"]
    known = weights.pop("class_embedding.weight", torch.zeros_like(bias)[None])
    rows = {name: known[index] for name, index in (label2id or {}).items()}
    embeddings = torch.stack([rows.get(name, known.mean(0)) for name in class_names])
    if unet.class_embedding is None:
        weights["time_embedding.linear_2.bias"] = bias + embeddings.mean(0)  # where the embedding would be added
    else:
        weights["class_embedding.weight"] = embeddings
    length = unet.config.projection_class_embeddings_input_dim
    if length is None or length != trained.config.projection_class_embeddings_input_dim:
        weights = {name: weight for name, weight in weights.items() if not name.startswith("condition_embedding.")}
        own = {} if length is None else unet.condition_embedding.state_dict(prefix="condition_embedding.")
        weights |= own
    name, width = "time_embedding.linear_1.weight", unet.config.block_out_channels[0]
    theirs, ours = (network.time_embedding.linear_1.in_features // width for network in (trained, unet))
    if theirs != ours:
        weights[name] = weights[name].unflatten(1, (theirs, width)).sum(1).repeat(1, ours) / ours
    unet.load_state_dict(weights)
