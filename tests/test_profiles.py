"""lab.profiles: the book's sizes and dtypes follow the device."""

import pytest
import torch
from lora2qlora.lab import profiles


def test_profile_follows_the_device_unless_told(monkeypatch):
    monkeypatch.delenv("LORA2QLORA_PROFILE", raising=False)
    for available, memory, expected in [(False, 0, "cpu"), (True, 16e9, "t4"), (True, 80e9, "large")]:
        properties = type("Properties", (), {"total_memory": memory})
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, properties=properties: properties)
        assert profiles.choose_profile() == expected
    monkeypatch.setenv("LORA2QLORA_PROFILE", "t4")
    assert profiles.choose_profile() == "t4"
    monkeypatch.setenv("LORA2QLORA_PROFILE", "laptop")
    with pytest.raises(ValueError, match="laptop"):
        profiles.choose_profile()


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float32), ((9, 0), torch.bfloat16)])
def test_compute_dtype_is_bf16_only_in_hardware(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert profiles.compute_dtype() == expected
