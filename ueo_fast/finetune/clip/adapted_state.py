"""All that adaptation may change, by name: what a delta and a checkpoint hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ueo_fast.patch import affine_parameters

if TYPE_CHECKING:
    from ueo_fast.finetune.clip.model import ClipClassifier

CONTEXT = "prompt.context"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def tower_tensors(model: Any, scope: str) -> dict[str, Tensor]:
    """The visual tower's own tensors that a method may change, in a fixed order.

    The affine parameters in ``scope`` and the statistics of all BatchNorms (AdaBN and Tent
    re-estimate them), under their names in ``model.state_dict()``.
    """
    tensors: dict[str, Tensor] = dict(affine_parameters(model, scope))
    visual: nn.Module = model.visual
    for path, module in visual.named_modules(prefix="visual"):
        if isinstance(module, _BatchNorm):
            for name in _STATISTICS:
                value = getattr(module, name)
                if value is not None:
                    tensors[f"{path}.{name}"] = value
    return tensors


def adapted_tensors(classifier: ClipClassifier) -> dict[str, Tensor]:
    """The classifier's own tensors that a method may change, in a fixed order.

    The prompt's context as ``prompt.context``, and :func:`tower_tensors`.
    """
    context: dict[str, Tensor] = {CONTEXT: classifier.prompt.context}
    return context | tower_tensors(classifier.model, classifier.scope)


def adapted_state(classifier: ClipClassifier) -> dict[str, Tensor]:
    """Copies of :func:`adapted_tensors` on the CPU."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in adapted_tensors(classifier).items()
    }


def check_adapted_state(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Do the names and shapes of ``state`` fit ``tensors``?

    Raises:
        ValueError: they do not; the message names the first tensor that is missing, too many, or
            of another shape.
    """
    missing, extra = tensors.keys() - state.keys(), state.keys() - tensors.keys()
    if missing or extra:
        name = min(missing or extra)
        what = "lacks" if missing else "has"
        raise ValueError(
            f"the adapted state {what} {name!r} ({len(missing)} missing, {len(extra)} too many): "
            "it is of another model, or of another scope of affine parameters"
        )
    for name, tensor in tensors.items():
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(state[name].shape)} in the adapted state, but "
                f"{tuple(tensor.shape)} in this model"
            )


@torch.no_grad()
def load_adapted_state(classifier: ClipClassifier, state: Mapping[str, Tensor]) -> None:
    """Put a state back, in place. Changes nothing if it raises.

    Raises:
        ValueError: names or shapes that are not this classifier's; the message names the first.
    """
    tensors = adapted_tensors(classifier)
    check_adapted_state(tensors, state)
    for name, tensor in tensors.items():
        tensor.copy_(state[name])
