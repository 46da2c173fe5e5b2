"""Which base model it is: the fingerprint sees the base and nothing that adaptation changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

open_clip = pytest.importorskip("open_clip")

from open_clip import factory  # noqa: E402
from tiny_model_folder import save_tiny_clip, tiny_model_cfg  # noqa: E402

from ueo_fast.finetune.clip.base_model import describe_base, fingerprint  # noqa: E402
from ueo_fast.finetune.clip.load import load_base, load_clip  # noqa: E402
from ueo_fast.finetune.demo.tiny_clip import tiny_clip  # noqa: E402
from ueo_fast.patch import affine_parameters, patch_visual  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("models") / "tiny bn é", "bn", seed=3)


def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tower", ["bn", "vit"])
def test_the_fingerprint_sees_the_base_and_nothing_else(tower):
    model = tiny_clip(tower, 0)
    original = fingerprint(model)
    assert original == fingerprint(tiny_clip(tower, 0))
    assert original != fingerprint(tiny_clip(tower, 1))
    assert original == fingerprint(tiny_clip(tower, 0).half()) == fingerprint(model.double())
    assert original != fingerprint(tiny_clip(tower, 0).bfloat16())
    with torch.no_grad():
        for parameter in affine_parameters(model).values():
            parameter.add_(1)
        for name, buffer in model.named_buffers():
            if "running" in name or "tracked" in name:
                buffer.add_(1)
    with patch_visual(model):
        assert fingerprint(model) == original
    model.visual.to(memory_format=torch.channels_last)
    assert fingerprint(model) == original
    with torch.no_grad():
        model.logit_scale.add_(1)
    assert fingerprint(model) != original


def test_the_same_weights_in_another_class_of_open_clip_are_the_same_base():
    state = tiny_clip("bn", 0).state_dict()
    custom = open_clip.CustomTextCLIP(**tiny_model_cfg("bn"))
    custom.load_state_dict(factory.convert_to_custom_text_state_dict(state))
    assert describe_base(custom) == describe_base(tiny_clip("bn", 0))


def test_half_precision_loads_the_same_base(folder):
    full = load_clip(str(folder))
    half = load_clip(str(folder), precision="fp16")
    assert half.model.visual.conv1.weight.dtype == torch.float16
    assert half.base == full.base
    rounded = load_clip(str(folder), precision="bf16")
    assert rounded.base.fingerprint != full.base.fingerprint
    with torch.no_grad():
        torch.testing.assert_close(
            half.model.encode_image(images().half()).float(),
            full.model.encode_image(images()),
            rtol=0,
            atol=0.05,
        )


def test_a_replaced_folder_is_not_the_recorded_base(tmp_path):
    base = load_clip(str(save_tiny_clip(tmp_path, "bn", seed=0))).base
    save_tiny_clip(tmp_path, "bn", seed=1)
    with pytest.raises(ValueError, match=r"fingerprint: recorded .*its weights were replaced"):
        load_base(base)
    with pytest.raises(ValueError, match="has no name"):
        load_base(describe_base(tiny_clip("bn", 0)))
