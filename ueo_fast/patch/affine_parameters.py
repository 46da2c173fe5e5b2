"""The affine parameters of a tower's normalisation layers: what UEO trains in the image tower.

Statistics and all other weights stay frozen. Keep the model in eval mode while training, so that
BatchNorm uses its running statistics.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ueo_fast.patch.patched import original_class
from ueo_fast.patch.sites import is_norm, visual_tower, visual_towers
from ueo_fast.ranges import check_one_of

SCOPES = ("all", "authors")
_TEXT = frozenset(
    {"text", "text_model", "text_encoder", "text_tower", "text_projection", "textual"}
    | {"language_model", "token_embedding", "word_embeddings", "embed_tokens", "wte"}
)
"""Names that occur in text towers only."""


class Group(NamedTuple):
    """How many parameters the modules of one type have."""

    tensors: int
    numbers: int


class AffineParameters(dict[str, nn.Parameter]):
    """A dict from name to parameter, with how they were chosen.

    Attributes:
        scope: the rule.
        groups: how many tensors and numbers were found, by type of the module that owns them.
    """

    def __init__(
        self, found: dict[str, nn.Parameter], scope: str, groups: dict[str, Group]
    ) -> None:
        super().__init__(found)
        self.scope = scope
        self.groups = groups

    def summary(self) -> str:
        """A few lines of text: the rule, and the counts by type."""
        numbers = sum(group.numbers for group in self.groups.values())
        lines = [f"scope={self.scope!r}: {numbers:,} numbers in {len(self)} tensors"]
        lines += [
            f"  {name}: {group.numbers:,} numbers in {group.tensors} tensors"
            for name, group in self.groups.items()
        ]
        return "\n".join(lines)


def affine_parameters(model: nn.Module, scope: str = "all") -> AffineParameters:
    """The affine parameters of the visual tower's normalisation layers, in the model's order.

    Args:
        model: an open_clip model, HuggingFace's (``vision_model``), either of them in a wrapper
            (``DataParallel``, ``torch.compile``, a module that holds it), or any other module with
            normalisation layers and no text tower, which is then the tower itself; patched or not.
        scope: ``"all"`` takes the weight and bias of every normalisation layer, found by type.
            ``"authors"`` is the published rule: every visual parameter with ``bn`` or ``ln`` in
            its name. On RN50 it finds 45,568 of 53,248 numbers, as it misses the BatchNorm of the
            four downsampling paths; on ViT-B-16 both rules find 39,936; in timm's transformers,
            whose layers are called ``norm``, it finds none.

    Returns:
        A dict from name (as in ``model.named_parameters()``) to parameter, whose ``summary()``
        says what was chosen. A parameter shared by several layers occurs once.

    Raises:
        TypeError: the model has neither a visual tower nor a normalisation layer; or it has
            several towers, or only a text tower, so it is unclear which layers to train.
        ValueError: unknown ``scope``, or no parameter found.

    Source: Liang et al., 2024, arXiv 2308.12919, section 3.4; the rule is in the authors' demo.py.
    """
    check_one_of("scope", scope, SCOPES)
    tower, prefix = visual_tower(model)
    if tower is model:
        _check_no_text(model)
    if tower is model and not any(map(is_norm, model.modules())):
        raise TypeError(
            f"model is a {type(model).__name__} without a visual tower (model.visual) and without "
            "a normalisation layer of its own; pass an open_clip model"
        )
    found: dict[str, nn.Parameter] = {}
    groups: dict[str, Group] = {}
    seen: set[int] = set()
    for path, module in tower.named_modules():
        owner = original_class(module).__name__
        for name, parameter in module.named_parameters(path, recurse=False):
            if id(parameter) in seen or not _is_chosen(module, name, scope):
                continue
            seen.add(id(parameter))
            found[prefix + name] = parameter
            tensors, numbers = groups.get(owner, Group(0, 0))
            groups[owner] = Group(tensors + 1, numbers + parameter.numel())
    if not found:
        way_out = (
            "use scope='all', which chooses by type"
            if scope == "authors"
            else "train the prompt only, or choose a tower with BatchNorm or LayerNorm"
        )
        raise ValueError(
            f"scope={scope!r} finds no affine parameter of a normalisation layer in the visual "
            f"tower {type(tower).__name__}; {way_out}"
        )
    return AffineParameters(found, scope, groups)


def _check_no_text(model: nn.Module) -> None:
    """Refuse a model whose text norms would be trained along with those of the images."""
    towers = visual_towers(model)
    texts = [path for path, _ in model.named_modules() if not _TEXT.isdisjoint(path.split("."))]
    if not towers and not texts:
        return
    found = (
        f"has {len(towers)} visual towers ({', '.join(towers)})"
        if towers
        else f"has a text tower ({texts[0]}) and no visual tower with a known name"
    )
    raise TypeError(
        f"model is a {type(model).__name__} that {found}, so it is unclear which normalisation "
        "layers belong to the images; pass the image tower itself, and freeze the rest with "
        "model.requires_grad_(False)"
    )


def _is_chosen(module: nn.Module, name: str, scope: str) -> bool:
    if scope == "authors":
        return "bn" in name or "ln" in name
    # EvoNorm and FRN also have parameters for their activation.
    return is_norm(module) and name.rpartition(".")[2] in ("weight", "bias")


def freeze_all_but_affine(model: nn.Module, scope: str = "all") -> AffineParameters:
    """Freeze everything but the :func:`affine_parameters`, and return these.

    Sets ``requires_grad``, also of the text tower and the logit scale. Changes nothing if it
    raises, for which see :func:`affine_parameters`.

    Args:
        model: as for :func:`affine_parameters`; changed in place.
        scope: as for :func:`affine_parameters`.
    """
    trained = affine_parameters(model, scope)
    model.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained
