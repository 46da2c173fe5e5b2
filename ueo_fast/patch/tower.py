"""Where a model's visual tower is."""

from __future__ import annotations

from torch import nn

_VISUAL = frozenset(
    {"visual", "vision_model", "vision_tower", "vision_encoder", "visual_encoder", "visual_model"}
    | {"image_encoder", "image_model"}
)
"""What open_clip, HuggingFace's transformers and others call it."""


def visual_towers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that are named as visual towers are, by their path, outermost only.

    ``model.visual`` alone, where there is one. Else they are looked for within wrappers:
    ``module`` (DataParallel), ``_orig_mod`` (torch.compile), or whatever attribute holds the model.
    """
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        outer, _, name = path.rpartition(".")
        if name in _VISUAL and not any(f"{outer}.".startswith(f"{one}.") for one in found):
            found[path] = module
    return {"visual": found["visual"]} if "visual" in found else found


def visual_tower(model: nn.Module) -> tuple[nn.Module, str]:
    """The tower and the prefix of its names; a model without one, or with several, is itself it."""
    found = visual_towers(model)
    if len(found) != 1:
        return model, ""
    ((path, tower),) = found.items()
    return tower, f"{path}."
