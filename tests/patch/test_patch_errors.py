"""Patched means the same results and the same errors for the same inputs.

PyTorch's own samples and error inputs of the patched operations and modules, and what users have
tried: each with the original and with ours, whose outcomes are compared.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from patch_models import patch_all
from torch import Tensor, nn

from ueo_fast.ops.frozen_convolution import frozen_convolution
from ueo_fast.ops.frozen_pooling import frozen_adaptive_avg_pool2d, frozen_avg_pool2d

OURS = {
    "nn.functional.avg_pool2d": (frozen_avg_pool2d, F.avg_pool2d),
    "nn.functional.adaptive_avg_pool2d": (frozen_adaptive_avg_pool2d, F.adaptive_avg_pool2d),
    "nn.functional.conv1d": (frozen_convolution, F.conv1d),
    "nn.functional.conv2d": (frozen_convolution, F.conv2d),
    "nn.functional.conv3d": (frozen_convolution, F.conv3d),
}
MODULES = ("AvgPool2d", "AdaptiveAvgPool2d", "Conv1d", "Conv2d", "Conv3d")
MODULES += ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "LayerNorm")


@functools.cache
def databases() -> tuple[dict[str, Any], dict[str, Any]]:
    """The patched operations and modules in PyTorch's own tests, by name."""
    pytest.importorskip("expecttest", reason="PyTorch's test internals need expecttest")
    invocations = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    modules = pytest.importorskip("torch.testing._internal.common_modules")
    operations = {info.name: info for info in invocations.op_db if info.name in OURS}
    classes = {info.module_cls.__name__: info for info in modules.module_db}
    return operations, {name: classes[name] for name in MODULES}


def outcome(call: Callable[..., Tensor], x: Any, *args: Any, **kwargs: Any) -> Any:
    """The result and the gradient of ``x``; or the type and text of the error."""
    leaf = x
    if isinstance(x, Tensor):
        leaf = x.detach().clone()
        if x.is_floating_point() or x.is_complex():
            leaf.requires_grad_()
    try:
        y = call(leaf, *args, **kwargs)
        if not (isinstance(y, Tensor) and y.requires_grad):
            return y
        weights = torch.linspace(0.5, 1.5, y.numel()).reshape(y.shape).to(y.dtype)
        return y.detach(), *torch.autograd.grad(y, leaf, weights)
    except Exception as error:
        return type(error), str(error).partition("\nException raised")[0]


def frozen(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, tuple) and isinstance(theirs[0], type):
        assert ours == theirs
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", OURS)
def test_pytorchs_samples_of_an_operation(name):
    info = databases()[0][name]
    ours, theirs = OURS[name]
    seen = 0
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.int64):
        if dtype not in info.dtypes:
            continue
        for sample in info.sample_inputs("cpu", dtype, requires_grad=False):
            args = [frozen(value) for value in sample.args]
            options = {key: frozen(value) for key, value in sample.kwargs.items()}
            found = outcome(ours, sample.input, *args, **options)
            assert_same(found, outcome(theirs, sample.input, *args, **options))
            seen += 1
    assert seen >= 10


@pytest.mark.parametrize("name", OURS)
def test_pytorchs_errors_of_an_operation(name):
    ours, theirs = OURS[name]
    for error in databases()[0][name].error_inputs("cpu"):
        sample = error.sample_input
        args = [frozen(value) for value in sample.args]
        if "conv" in name and args[0].dim() != int(name[-2]) + 2:
            continue  # frozen_convolution takes its dimensions from the weight; see HOSTILE
        found = outcome(ours, sample.input, *args, **sample.kwargs)
        assert isinstance(found[0], type), "no error"
        assert found == outcome(theirs, sample.input, *args, **sample.kwargs)


def pair(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A patched and an unpatched copy, all weights frozen but those of norms."""
    convolutions = nn.Conv1d | nn.Conv2d | nn.Conv3d
    for child in module.modules():
        if isinstance(child, convolutions):
            child.requires_grad_(False)
    patched = copy.deepcopy(module)
    patch_all(patched)
    return patched, module


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_pytorchs_inputs_of_a_module(name, training):
    info = databases()[1][name]
    options = {"device": "cpu", "dtype": torch.float32, "requires_grad": False}
    samples = info.module_inputs_func(info, **options, training=training)
    if info.module_error_inputs_func is not None:
        errors = info.module_error_inputs_func(info, **options, training=training)
        samples += [error.module_error_input for error in errors]
    seen = 0
    for sample in samples:
        arguments = sample.constructor_input
        try:
            module = info.module_cls(*arguments.args, **arguments.kwargs)
        except Exception:
            continue  # an error of the constructor, which is not patched
        patched, original = pair(module.train(training))
        forward = sample.forward_input
        if forward is None:
            continue
        found = outcome(patched, *forward.args, **forward.kwargs)
        assert_same(found, outcome(original, *forward.args, **forward.kwargs))
        seen += 1
    assert seen >= 4


def norm_then_relu(norm: nn.Module) -> nn.Module:
    return nn.Sequential(norm, nn.ReLU())


def changed(module: nn.Module, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        value = nn.Parameter(value) if isinstance(value, Tensor) else value
        setattr(module, name, value)
    return module


def convolution(**attributes: Any) -> nn.Module:
    return changed(nn.Conv2d(4, 3, 3), **attributes)


def norm(**attributes: Any) -> nn.Module:
    return changed(nn.BatchNorm2d(4), **attributes)


def shortcut(channels: int, norm: nn.Module, **attributes: Any) -> nn.Module:
    """A 1 x 1 convolution to 32 channels, and what follows it."""
    conv = changed(nn.Conv2d(channels, 32, 1, bias=False), **attributes)
    return nn.Sequential(conv, norm, nn.ReLU())


IMAGE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
HOSTILE: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "stride 0": (lambda: nn.AvgPool2d(2, stride=0), IMAGE),
    "kernel of three": (lambda: nn.AvgPool2d((2, 2, 2)), IMAGE),
    "stride of three": (lambda: nn.AvgPool2d(2, stride=(2, 2, 2)), IMAGE),
    "padding of three": (lambda: nn.AvgPool2d(2, padding=(1, 1, 1)), IMAGE),
    "kernel of one": (lambda: nn.AvgPool2d((2,)), IMAGE),
    "kernel 0": (lambda: nn.AvgPool2d(0), IMAGE),
    "kernel None": (lambda: nn.AvgPool2d(None), IMAGE),
    "kernel as a float": (lambda: nn.AvgPool2d(2.0), IMAGE),
    "large padding": (lambda: nn.AvgPool2d(2, padding=2), IMAGE),
    "divisor 0": (lambda: nn.AvgPool2d(2, divisor_override=0), IMAGE),
    "pool of a vector": (lambda: nn.AvgPool2d(2), IMAGE[0, 0, 0]),
    "pool of integers": (lambda: nn.AvgPool2d(2), IMAGE.long()),
    "pool of a list": (lambda: nn.AvgPool2d(2), [[1.0]]),
    "pool of nothing": (lambda: nn.AvgPool2d(2), None),
    "to -1 and 0": (lambda: nn.AdaptiveAvgPool2d((-1, 0)), IMAGE),
    "to 0": (lambda: nn.AdaptiveAvgPool2d(0), IMAGE),
    "to three": (lambda: nn.AdaptiveAvgPool2d((2, 2, 2)), IMAGE),
    "to five": (lambda: nn.AdaptiveAvgPool2d((2, 2, 2, 2, 2)), IMAGE),
    "to one number": (lambda: nn.AdaptiveAvgPool2d((2,)), IMAGE),
    "to None": (lambda: nn.AdaptiveAvgPool2d(None), IMAGE),
    "to a float": (lambda: nn.AdaptiveAvgPool2d(2.5), IMAGE),
    "to None and 3": (lambda: nn.AdaptiveAvgPool2d((None, 3)), IMAGE),
    "to a pixel": (lambda: nn.AdaptiveAvgPool2d(1), IMAGE),
    "adaptive pool of a vector": (lambda: nn.AdaptiveAvgPool2d(2), IMAGE[0, 0, 0]),
    "double bias": (lambda: convolution(bias=torch.ones(3).double()), IMAGE),
    "double weight": (lambda: nn.Conv2d(4, 3, 3).double(), IMAGE),
    "half image": (lambda: nn.Conv2d(4, 3, 3), IMAGE.half()),
    "complex": (lambda: nn.Conv2d(4, 3, 3, dtype=torch.complex64), IMAGE.to(torch.complex64)),
    "complex weight": (lambda: nn.Conv2d(4, 3, 3, dtype=torch.complex64), IMAGE),
    "other channels": (lambda: nn.Conv2d(5, 3, 3), IMAGE),
    "weight of a sequence": (lambda: convolution(weight=torch.ones(3, 4, 3)), IMAGE),
    "weight of a volume": (lambda: convolution(weight=torch.ones(3, 4, 3, 3, 3)), IMAGE),
    "weight of nothing": (lambda: convolution(weight=torch.tensor(1.0)), IMAGE),
    "short bias": (lambda: convolution(bias=torch.ones(2)), IMAGE),
    "stride of three, convolution": (lambda: convolution(stride=(1, 1, 1)), IMAGE),
    "padding of three, convolution": (lambda: convolution(padding=(1, 1, 1)), IMAGE),
    "dilation of three": (lambda: convolution(dilation=(1, 1, 1)), IMAGE),
    "stride 0, convolution": (lambda: convolution(stride=(0, 0)), IMAGE),
    "negative padding": (lambda: convolution(padding=(-1, -1)), IMAGE),
    "no groups": (lambda: convolution(groups=0), IMAGE),
    "odd groups": (lambda: convolution(groups=3), IMAGE),
    "large kernel": (lambda: nn.Conv2d(4, 3, 9), IMAGE),
    "unknown padding": (lambda: convolution(padding="other"), IMAGE),
    "strided same": (lambda: changed(nn.Conv2d(4, 3, 3, padding="same"), stride=(2, 2)), IMAGE),
    "dimensions of a convolution": (lambda: nn.Conv2d(4, 3, 3), IMAGE[0, 0]),
    "image of a sequence": (lambda: nn.Conv1d(4, 3, 3), IMAGE),
    "convolution of a list": (lambda: nn.Conv2d(4, 3, 3), [[1.0]]),
    "norm of other channels": (lambda: nn.BatchNorm2d(5), IMAGE),
    "norm of a sequence": (lambda: nn.BatchNorm2d(4), IMAGE[..., 0]),
    "norm of a vector": (lambda: nn.BatchNorm1d(4), IMAGE[0, :, 0, 0]),
    "norm of an image": (lambda: nn.BatchNorm1d(4), IMAGE),
    "norm and ReLU of an image": (lambda: norm_then_relu(nn.BatchNorm1d(4)), IMAGE),
    "norm and ReLU of other channels": (lambda: norm_then_relu(nn.BatchNorm2d(5)), IMAGE),
    "double norm": (lambda: nn.BatchNorm2d(4).double(), IMAGE),
    "norm of double": (lambda: nn.BatchNorm2d(4), IMAGE.double()),
    "norm of half": (lambda: nn.BatchNorm2d(4), IMAGE.half()),
    "half norm": (lambda: nn.BatchNorm2d(4).half(), IMAGE),
    "half weight": (lambda: norm(weight=torch.ones(4).half()), IMAGE),
    "long weight": (lambda: norm(weight=torch.ones(5)), IMAGE),
    "no statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), IMAGE),
    "negative eps": (lambda: nn.BatchNorm2d(4, eps=-0.5), IMAGE),
    "tiny eps": (lambda: nn.BatchNorm2d(4, eps=1e-40), IMAGE),
    "integer eps": (lambda: nn.BatchNorm2d(4, eps=1), IMAGE),
    "norm of integers": (lambda: nn.BatchNorm2d(4), IMAGE.long()),
    "norm of a list": (lambda: nn.BatchNorm2d(4), [[1.0]]),
    "norm of an empty batch": (lambda: nn.BatchNorm2d(4), IMAGE[:0]),
    "shortcut": (lambda: shortcut(4, nn.BatchNorm2d(32)), IMAGE),
    "shortcut of other channels": (lambda: shortcut(3, nn.BatchNorm2d(32)), IMAGE),
    "shortcut to another norm": (lambda: shortcut(4, nn.BatchNorm2d(9)), IMAGE),
    "shortcut to a norm of vectors": (lambda: shortcut(4, nn.BatchNorm1d(32)), IMAGE),
    "shortcut of double": (lambda: shortcut(4, nn.BatchNorm2d(32)), IMAGE.double()),
    "shortcut, stride of three": (lambda: shortcut(4, nn.BatchNorm2d(32), stride=(1, 1, 1)), IMAGE),
    "shortcut, stride 0": (lambda: shortcut(4, nn.BatchNorm2d(32), stride=(0, 0)), IMAGE),
    "shortcut, negative stride": (lambda: shortcut(4, nn.BatchNorm2d(32), stride=(-1, 1)), IMAGE),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_users_have_tried(name):
    make, x = HOSTILE[name]
    torch.manual_seed(0)
    patched, original = pair(make().eval())
    assert_same(outcome(patched, x), outcome(original, x))


def test_addition_before_the_relu_of_what_does_not_fit():
    resnet = pytest.importorskip("torchvision.models.resnet")
    torch.manual_seed(0)
    block = resnet.BasicBlock(4, 8, downsample=nn.Conv2d(4, 8, 1)).eval()  # not of stride 2
    block.conv1 = nn.Conv2d(4, 8, 3, stride=2, padding=1)
    patched, original = pair(block)
    found = outcome(patched, IMAGE)
    assert found[0] is RuntimeError
    assert found == outcome(original, IMAGE)
