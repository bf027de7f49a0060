"""Which network something was made with."""

import hashlib
import json
from typing import Any

import torch
from torch import nn


def fingerprint_weights(network: nn.Module, *others: Any) -> str:
    """Changes with any weight or buffer of a network, and with `others`, as JSON."""
    fingerprint = hashlib.sha256(json.dumps(others, sort_keys=True, default=str).encode())
    for name, weight in sorted(network.state_dict().items()):
        fingerprint.update(f"{name} {weight.dtype}".encode())
        fingerprint.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return fingerprint.hexdigest()
