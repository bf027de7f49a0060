import sys
import types

import pytest
import torch

from diffusers_byoc.training import StageSettings
from diffusers_byoc.training.optimizers import make_optimizer, optimizer_class


def test_optimizer_and_schedule_are_those_of_the_settings():
    settings = StageSettings(
        max_train_steps=3,
        optimizer="adamw",
        adam_beta1=0.5,
        adam_weight_decay=0.1,
        learning_rate=0.5,
        lr_scheduler="linear",
        lr_warmup_steps=1,
    )
    frozen = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    optimizer, schedule = make_optimizer(settings, [torch.nn.Parameter(torch.zeros(1)), frozen], 3)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["betas"] == (0.5, 0.99)
    assert optimizer.defaults["weight_decay"] == 0.1 and len(optimizer.param_groups[0]["params"]) == 1
    rates = []
    for _ in range(3):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert rates == [0, 0.5, 0.25]  # one step of warm-up


def test_rmsprop_has_no_momentum():
    settings = StageSettings(max_train_steps=1, optimizer="rmsprop", learning_rate=0.5)
    optimizer, _ = make_optimizer(settings, [torch.nn.Parameter(torch.zeros(1))], 1)
    assert type(optimizer) is torch.optim.RMSprop
    assert optimizer.defaults["momentum"] == 0 and optimizer.defaults["lr"] == 0.5


def test_eight_bit_optimizers_are_those_of_bitsandbytes(monkeypatch):
    settings = StageSettings(max_train_steps=1, optimizer="adamw", use_8bit_adam=True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"pip install .diffusers_byoc\[8bit\]"):
        optimizer_class(settings)
    names = types.SimpleNamespace(Adam8bit=torch.optim.Adam, AdamW8bit=torch.optim.NAdam, RMSprop8bit=torch.optim.SGD)
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.SimpleNamespace(optim=names))
    adamw = optimizer_class(settings)
    assert adamw.func is torch.optim.NAdam and adamw.keywords == {"betas": (0.9, 0.99)}
    settings = StageSettings(max_train_steps=1, optimizer="rmsprop", use_8bit_adam=True)
    assert optimizer_class(settings) is torch.optim.SGD
