"""Every error names the argument, the value it had, and the way out."""

from __future__ import annotations

import math
import re
import traceback

import numpy as np
import pytest
import torch
from loss_backends import BACKENDS, shrink

from ueo_fast import UEOLoss, mcm_score, ueo_loss, ueo_loss_and_grad

LOGITS = torch.randn(6, 4)


class DTensor(torch.Tensor):
    """Stands in for torch.distributed.tensor.DTensor, which needs a process group."""


BAD_LOGITS = [
    ([[1.0]], TypeError, "logits must be a torch.Tensor, got list"),
    (LOGITS.long(), TypeError, "logits must be float64, float32, float16 or bfloat16, got torch.int64"),
    (LOGITS.bool(), TypeError, "got torch.bool: convert with logits.float()"),
    (LOGITS.cfloat(), TypeError, "got torch.complex64"),
    (LOGITS.to_sparse(), TypeError, "dense tensor, got torch.sparse_coo: convert with logits.to_dense()"),
    (LOGITS.as_subclass(DTensor), TypeError, "logits is a DTensor, whose rows live in several processes: pass the rows of this process with logits.to_local()"),
    (torch.nested.nested_tensor([LOGITS[0], LOGITS[1, :2]]), TypeError, "logits is a nested tensor: pass a dense one, e.g. logits.to_padded_tensor(float('-inf'))"),
    (torch.masked.masked_tensor(LOGITS, LOGITS > 0), TypeError, "logits is a masked tensor: pass a dense one, e.g. logits.to_tensor(float('-inf'))"),
    (LOGITS[0], ValueError, "logits must have shape (B, C), got (4,)"),
    (LOGITS[None], ValueError, "got (1, 6, 4): flatten leading dimensions with logits.flatten(0, -2)"),
    (torch.tensor(1.0), ValueError, "got (): "),
    (LOGITS[:, :0], ValueError, "logits must have at least one class, got shape (6, 0): check the list of class names"),
]  # fmt: skip


@pytest.mark.parametrize("function", [ueo_loss, ueo_loss_and_grad, UEOLoss()])
@pytest.mark.parametrize(("logits", "error", "message"), BAD_LOGITS, ids=range(len(BAD_LOGITS)))
def test_logits(logits, error, message, function):
    if function is ueo_loss_and_grad and not isinstance(logits, torch.Tensor):
        logits = np.ones((6, 4))
        message = "logits must be a torch.Tensor, got ndarray"
    with pytest.raises(error, match=re.escape(message)):
        function(logits)


BAD_WEIGHTS = [
    ([1.0] * 6, TypeError, "{} must be a torch.Tensor, got list"),
    (torch.ones(6, dtype=torch.long), TypeError, "{} must be float64, float32, float16 or bfloat16, got torch.int64: convert with {}.float()"),
    (torch.ones(6).to_sparse(), TypeError, "{} must be a dense tensor, got torch.sparse_coo: convert with {}.to_dense()"),
    (torch.ones(6).as_subclass(DTensor), TypeError, "{} is a DTensor, whose rows live in several processes: pass the rows of this process with {}.to_local()"),
    (torch.masked.masked_tensor(torch.ones(6), torch.ones(6).bool()), TypeError, "{} is a masked tensor: pass a dense one, e.g. {}.to_tensor(1.0)"),
    (torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]), TypeError, "{} is a nested tensor: pass a dense one, e.g. {}.to_padded_tensor(1.0)"),
    (torch.ones(5), ValueError, "{} must have shape (B,) = (6,) to match logits (6, 4), got (5,)"),
    (torch.ones(6, 1), ValueError, "got (6, 1)"),
    (torch.ones(6, device="meta"), ValueError, "{} is on meta but logits are on cpu: move it with {}.to(logits.device)"),
    (torch.ones(6, requires_grad=True), ValueError, "{} requires grad, but it is a constant of the method: pass {}.detach()"),
    (torch.tensor([1, 1, math.nan, 1, 1, 1]), ValueError, "{} must be"),
    (torch.tensor([1, 1, math.inf, 1, 1, 1]), ValueError, "got values from 1.0 to inf"),
    (torch.tensor([1, 1, -0.5, 1, 1, 1]), ValueError, "got values from -0.5 to 1.0: bound it with {}.clamp(1e-6, 1e6)"),
    (torch.zeros(6), ValueError, "got values from 0.0 to 0.0"),
    (torch.full((6,), 1e-300, dtype=torch.float64), ValueError, "in float32, got values from 0.0 to 0.0"),
    (torch.full((6,), 1e300, dtype=torch.float64), ValueError, "in float32, got values from inf to inf"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("name", ["confidence", "marginal_weights"])
@pytest.mark.parametrize(("weights", "error", "message"), BAD_WEIGHTS, ids=range(len(BAD_WEIGHTS)))
def test_weights(weights, error, message, name, backend):
    with pytest.raises(error, match=re.escape(message.replace("{}", name))):
        ueo_loss(LOGITS, **{name: weights}, backend=backend)


@pytest.mark.parametrize("function", [ueo_loss, ueo_loss_and_grad])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -0.1, 0.0])
@pytest.mark.parametrize("name", ["confidence", "marginal_weights"])
def test_the_cpp_op_finds_a_bad_value_wherever_it_is(name, bad, dtype, function):
    for count in (1, 15, 16, 37):  # fewer, as many and more than the op reads at a time
        for place in range(count):
            weights = torch.rand(count).add(0.1).to(dtype)
            weights[place] = bad
            logits = torch.randn(count, 4, dtype=dtype, requires_grad=True)
            if name == "marginal_weights" and bad == 0 and count > 1:
                result = function(logits, **{name: weights}, backend="cpp")
                assert torch.isfinite(result if function is ueo_loss else result[0])
                continue
            said = []
            for backend in ("cpp", "reference"):
                with pytest.raises(ValueError, match=f"{name} must be") as raised:
                    function(logits, **{name: weights}, backend=backend)
                said.append("".join(traceback.format_exception_only(raised.value)))
                assert "ueo_fast: " not in "".join(traceback.format_exception(raised.value))
            assert said[0] == said[1]


def test_zero_confidence_is_an_error_but_a_zero_marginal_weight_is_not():
    weights = torch.tensor([1.0, 0, 1, 1, 1, 1])
    with pytest.raises(
        ValueError, match="confidence must be positive and finite in float32, got values from"
    ):
        ueo_loss(LOGITS, weights)
    assert torch.isfinite(ueo_loss(LOGITS, marginal_weights=weights))


BAD_NUMBERS = [
    ("trade_off", math.nan, ValueError, "trade_off must be from -1e+30 to 1e+30, got nan"),
    ("trade_off", math.inf, ValueError, "got inf"),
    ("trade_off", "1", TypeError, "trade_off must be a number, got str '1'"),
    ("trade_off", True, TypeError, "trade_off must be a number, got bool True"),
    ("trade_off", torch.tensor(1.0), TypeError, "got Tensor tensor(1.): convert with float()"),
    ("confidence_scale", 0, ValueError, "confidence_scale must be from 1e-30 to 1e+30, got 0"),
    (
        "confidence_scale",
        -1.0,
        ValueError,
        "confidence_scale must be from 1e-30 to 1e+30, got -1.0",
    ),
    ("eps", -1e-5, ValueError, "eps must be 0 or from 1e-30 to 1e+30, got -1e-05"),
    ("eps", 1e-46, ValueError, "eps must be 0 or from 1e-30 to 1e+30, got 1e-46"),
    ("confidence_scale", 1e39, ValueError, "confidence_scale must be from 1e-30 to 1e+30"),
    ("trade_off", 10**400, ValueError, "trade_off must be from -1e+30 to 1e+30, got 1000"),
    ("eps", None, TypeError, "eps must be a number, got NoneType None"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD_NUMBERS)
def test_numbers(name, value, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ueo_loss(LOGITS, **{name: value})


def test_numbers_of_other_types_are_numbers():
    expected = ueo_loss(LOGITS, trade_off=2.0)
    assert ueo_loss(LOGITS, trade_off=2) == expected
    assert ueo_loss(LOGITS, trade_off=np.float32(2)) == expected


def test_confidence_scale_beside_a_given_confidence():
    message = "confidence_scale=0.01 has no effect on a given confidence: leave out one of the two"
    with pytest.raises(ValueError, match=re.escape(message)):
        ueo_loss(LOGITS, torch.ones(6), confidence_scale=0.01)


@pytest.mark.parametrize(
    "options", [{"eps": -1.0}, {"confidence_scale": -5.0}, {"trade_off": math.inf}], ids=str
)
def test_a_bad_number_is_an_error_while_compiling_too(options):
    compiled = torch.compile(lambda z: ueo_loss(z, **options), backend="aot_eager")
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        compiled(LOGITS)


@pytest.mark.parametrize("backend", ["tpu", 3, None, [], {}, np.array(["cpp", "auto"])], ids=str)
def test_unknown_backend(backend):
    message = f"backend={backend!r} is unknown: choose one of auto, cpp, cuda, triton, reference"
    with pytest.raises(ValueError, match=re.escape(message)):
        ueo_loss(LOGITS, backend=backend)


def test_backend_that_does_not_serve_the_device():
    logits = torch.empty(6, 4, device="meta")
    message = "backend='cpp' runs on cpu tensors, got logits on meta: move with logits.cpu()"
    with pytest.raises(ValueError, match=re.escape(message)):
        ueo_loss(logits, backend="cpp")
    assert ueo_loss(logits).device.type == "meta"


def test_mcm_score_names_its_own_arguments():
    with pytest.raises(ValueError, match=re.escape("cosines must have shape (B, C), got (4,)")):
        mcm_score(LOGITS[0])
    with pytest.raises(ValueError, match=re.escape("scale must be from 1e-30 to 1e+30, got -1.0")):
        mcm_score(LOGITS, -1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("left", [0, 7])
@pytest.mark.parametrize("name", ["logits", "confidence", "marginal_weights"])
@pytest.mark.parametrize("function", [ueo_loss, ueo_loss_and_grad])
def test_memory_that_was_freed(function, name, left, dtype, backend):
    given = {
        "logits": LOGITS.to(backend.device, dtype),
        "confidence": torch.ones(6, device=backend.device, dtype=dtype),
        "marginal_weights": torch.ones(6, device=backend.device, dtype=dtype),
    }
    given[name] = shrink(given[name], left)
    message = rf"{name} needs \d+ bytes of memory, but its storage holds {left}: it was freed"
    with pytest.raises(RuntimeError, match=message):
        function(**given, backend=backend)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[:, ::2], lambda x: x.t()])
def test_the_score_of_memory_that_was_freed(view, needs_grad):
    cosines = torch.rand(40, 40)
    score = view(cosines)
    cosines.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"cosines needs .* its storage holds 0"):
        mcm_score(score.requires_grad_(needs_grad))


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_that_were_freed_before_backward(backend):
    if backend == "reference":
        pytest.skip("PyTorch's own backward, which keeps the probabilities")
    if backend == "cuda_host":
        pytest.skip("numpy holds the memory, and does not let it be resized")
    logits = LOGITS.to(backend.device).clone().requires_grad_()
    loss = ueo_loss(logits, backend=backend)
    logits.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="logits needs 96 bytes of memory, but its storage hol"):
        loss.backward()


def test_a_view_of_memory_that_is_there_is_used():
    whole = torch.rand(3, 40)
    whole[0, 0] = float("nan")
    part = whole[1:, 7:]
    assert torch.equal(ueo_loss(part, whole[2, 1:3]), ueo_loss(part.clone(), whole[2, 1:3].clone()))
    spread = torch.rand(1, 1).expand(6, 4)  # four bytes for 24 elements
    assert float(ueo_loss(spread, torch.rand(1).expand(6))) == pytest.approx(0.0, abs=1e-6)


def test_vmap_over_the_weights_alone():
    logits = LOGITS.clone().requires_grad_()
    weights = torch.rand(3, 6) + 0.1
    for name in ("confidence", "marginal_weights"):
        one = [ueo_loss(logits, **{name: row}) for row in weights]
        batched = torch.func.vmap(lambda row, name=name: ueo_loss(logits, **{name: row}))(weights)
        torch.testing.assert_close(batched, torch.stack(one))
        (grad,) = torch.autograd.grad(batched.sum(), logits)
        (true,) = torch.autograd.grad(sum(one), logits)
        torch.testing.assert_close(grad, true)
        with pytest.raises(RuntimeError, match=r"has no rules for torch.func transforms"):
            torch.func.vmap(lambda row, name=name: ueo_loss(logits, **{name: row}, backend="cpp"))(
                weights
            )
