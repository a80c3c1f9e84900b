"""Devices by name: the known ones, where they are."""

import pytest
import torch

from dino_adapters.contracts import RecipeError
from dino_adapters.runtime.world import pick_device


@pytest.mark.parametrize(
    "name",
    ["meta", "xla", "vulkan", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "CPU", "gpu", "", "mps:0"],
)
def test_other_devices_are_refused(name):
    with pytest.raises(RecipeError, match=r"is no device\. Use auto, cpu, cuda, cuda:N or mps"):
        pick_device(name)


def test_known_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_an_absent_gpu_is_said(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device() == torch.device("cpu")
    with pytest.raises(RecipeError, match="torch finds no GPU"):
        pick_device(name)


def test_gpus_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device() == torch.device("cuda")
    with pytest.raises(RecipeError, match="the last GPU is cuda:1"):
        pick_device("cuda:2")


@pytest.mark.parametrize("there", [True, False])
def test_apple_gpus(there, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there)
    if there:
        assert pick_device("mps") == torch.device("mps")
    else:
        with pytest.raises(RecipeError, match="no Apple GPU"):
            pick_device("mps")
