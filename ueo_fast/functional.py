"""The functions that users call: arguments checked, backend chosen, result handed back."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, distributed

from ueo_fast import backends, reference
from ueo_fast.arguments import check_contents, check_matrix, check_weights
from ueo_fast.ops import ueo_loss as op
from ueo_fast.ranges import check_number


class UEOStats(NamedTuple):
    """Detached by-products of the loss, in the loss's dtype; parts of one buffer of C + 5 numbers.

    Attributes:
        conditional_entropy: 0-d, confidence-weighted mean entropy of the rows, in nats.
        marginal_entropy: 0-d, entropy of ``marginal``, in nats.
        mean_confidence: 0-d, mean of the confidences in use.
        marginal: (C,), the reverse-weighted mean prediction ``q``.
    """

    conditional_entropy: Tensor
    marginal_entropy: Tensor
    mean_confidence: Tensor
    marginal: Tensor


_HAS_RANKS = distributed.is_available()
_ranks_were_named = False


def _name_ranks() -> None:
    """Warn, once, where several processes might each pass their part of a batch."""
    global _ranks_were_named
    if not _HAS_RANKS or _ranks_were_named or not distributed.is_initialized():
        return
    if distributed.get_world_size() == 1:
        return
    _ranks_were_named = True
    warnings.warn(
        f"ueo_loss sees the logits of this process alone, one of {distributed.get_world_size()}: "
        "averaging the gradients of ranks, as DistributedDataParallel does, minimises another loss "
        "than that of the whole batch, because the confidences are normalised and the marginal is "
        "taken over the rows of one call. Pass all rows on one rank (docs/guide.md, "
        '"Large batches, several processes")',
        stacklevel=4,
    )


# As torch.compiler.assume_constant_result: runs, and warns, while a graph is traced.
_name_ranks._dynamo_marked_constant = True  # type: ignore[attr-defined]


_AS_IT_IS: contextlib.AbstractContextManager[None] = contextlib.nullcontext()

_Arguments = tuple[str, Tensor, Tensor | None, Tensor | None, float, float, float]
"""backend, logits, confidence, marginal_weights, trade_off, confidence_scale, eps: checked."""


def _check(
    backend: str,
    logits: Tensor,
    confidence: Tensor | None,
    marginal_weights: Tensor | None,
    trade_off: float,
    confidence_scale: float,
    eps: float,
) -> _Arguments:
    _name_ranks()
    check_matrix("logits", logits)
    scale = check_number("confidence_scale", confidence_scale, sign="positive")
    if confidence is not None and scale != 1:
        raise ValueError(
            f"confidence_scale={scale} has no effect on a given confidence: "
            "leave out one of the two"
        )
    if confidence is not None:
        confidence = check_weights("confidence", confidence, logits)
    if marginal_weights is not None:
        marginal_weights = check_weights("marginal_weights", marginal_weights, logits)
    arguments = (
        backends.choose(backend, logits, confidence, marginal_weights),
        logits,
        confidence,
        marginal_weights,
        check_number("trade_off", trade_off, sign="any"),
        scale,
        check_number("eps", eps, sign="not negative"),
    )
    if arguments[0] != "cpp":  # whose op looks itself: _refuse_weights
        _check_contents(arguments)
    if arguments[0] == "reference":
        backends.check_memory("logits", logits)
    return arguments


def _check_contents(arguments: _Arguments) -> None:
    _, _, confidence, marginal_weights, *_ = arguments
    check_contents("confidence", confidence, positive=True)
    check_contents("marginal_weights", marginal_weights, positive=False)


def _refuse_weights(arguments: _Arguments) -> None:
    """Raise, of weights that the C++ op has refused, the errors of every other backend."""
    try:
        _check_contents(arguments)
    except (RuntimeError, ValueError) as error:
        raise error from None  # without the op's own


def _reference(
    logits: Tensor,
    confidence: Tensor | None,
    marginal_weights: Tensor | None,
    trade_off: float,
    confidence_scale: float,
    eps: float,
) -> tuple[Tensor, UEOStats]:
    terms = reference.ueo_terms(
        logits,
        confidence,
        marginal_weights=marginal_weights,
        confidence_scale=confidence_scale,
        eps=eps,
    )
    return terms[0] - trade_off * terms[1], UEOStats(*(term.detach().clone() for term in terms))


def _with_results(*args: Any) -> tuple[Tensor, tuple[Tensor, UEOStats]]:
    loss, stats = _reference(*args)
    return loss, (loss, stats)


def _stats(statistics: Tensor) -> UEOStats:
    columns = statistics.shape[0] - op.SUMMARY
    summary = statistics[columns], statistics[columns + 1], statistics[columns + 2]
    return UEOStats(*summary, statistics[:columns])


@overload
def ueo_loss(
    logits: Tensor,
    confidence: Tensor | None = None,
    *,
    marginal_weights: Tensor | None = None,
    trade_off: float = 1.0,
    confidence_scale: float = 1.0,
    eps: float = 0.0,
    return_stats: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def ueo_loss(
    logits: Tensor,
    confidence: Tensor | None = None,
    *,
    marginal_weights: Tensor | None = None,
    trade_off: float = 1.0,
    confidence_scale: float = 1.0,
    eps: float = 0.0,
    return_stats: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, UEOStats]: ...
@overload
def ueo_loss(
    logits: Tensor,
    confidence: Tensor | None = None,
    *,
    marginal_weights: Tensor | None = None,
    trade_off: float = 1.0,
    confidence_scale: float = 1.0,
    eps: float = 0.0,
    return_stats: bool,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, UEOStats]: ...
def ueo_loss(
    logits: Tensor,
    confidence: Tensor | None = None,
    *,
    marginal_weights: Tensor | None = None,
    trade_off: float = 1.0,
    confidence_scale: float = 1.0,
    eps: float = 0.0,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, UEOStats]:
    """Universal entropy: sum_i a_i H(p_i) - trade_off * H(sum_i b_i p_i), in nats.

    ``p = softmax(logits)``, ``a`` the normalised confidences, ``b`` the normalised reverse
    weights. Confident samples have their entropy lowered; the batch's mean prediction, in which
    doubtful samples count more, has its entropy raised (docs/math.md).

    The loss couples the rows of a call: it is not the mean over parts of the batch. Adding up the
    gradients of micro-batches, or averaging those of ranks (DistributedDataParallel), minimises
    another loss. :class:`ueo_fast.GradCache` accumulates exactly, and a call in a process group of
    several ranks warns once.

    Args:
        logits: (B, C) float64, float32, float16 or bfloat16; any strides. Arithmetic is float32
            (float64 for float64). ``-inf`` masks a class: probability and gradient are 0. NaN or
            ``+inf``, or a row that is masked whole, gives a NaN loss.
        confidence: (B,) positive constants ``w`` on the logits' device. ``None``: the maximum of
            ``softmax(confidence_scale * logits)``, recomputed here, as a constant. Values are
            checked on the CPU, where a graph of torch.compile raises RuntimeError instead of
            ValueError, and not on a GPU.
        marginal_weights: (B,) constants ``v``, not negative; ``None`` means ``1 / w``.
        trade_off: λ, any sign. With all confidences 1, ``trade_off=1`` is InfoMax and
            ``trade_off=0`` is EntMin.
        confidence_scale: multiplies the *logits* before the internal confidence: 0.01 turns CLIP's
            100 x cosine into the authors' MCM score.
        eps: added inside every logarithm: 0 is the paper's entropy, 1e-5 the authors' code.
        return_stats: also return :class:`UEOStats`.
        backend: ``auto``, ``cpp`` (CPU), ``cuda`` or ``triton`` (GPU), or ``reference`` (plain
            PyTorch, any device, differentiable twice, and under ``torch.func`` transforms).
            ``auto`` takes the first of them that can run on the logits' device.

    Returns:
        The loss, 0-d, float32 (float64 for float64 logits); with ``return_stats`` the pair
        ``(loss, UEOStats)``. An empty batch gives 0 and zero gradients. A compiled backend gives
        the same bits for the same input on the same machine; ``cpp`` on any number of threads.

    Raises:
        TypeError, ValueError: an argument is unusable; the message says which, and the way out.
        RuntimeError: an explicit backend cannot run on this machine.

    Source: Liang et al., ICML 2024 (arXiv 2308.12919), section 3.3; authors' code
    github.com/tim-learn/UEO.
    """
    args = _check(backend, logits, confidence, marginal_weights, trade_off, confidence_scale, eps)
    if args[0] == "reference":
        loss, stats = _reference(*args[1:])
        return (loss, stats) if return_stats else loss
    try:
        if logits.requires_grad and torch.is_grad_enabled():
            result = op.UEOLossFunction.apply(*args, return_stats)
            return (result[0], _stats(result[1])) if return_stats else result
        loss, saved = op.forward(*args)
    except RuntimeError:
        _refuse_weights(args)
        raise
    if not return_stats:
        return loss
    return loss, _stats(op.statistics(saved, logits.shape[1]))


@overload
def ueo_loss_and_grad(
    logits: Tensor,
    confidence: Tensor | None = None,
    *,
    marginal_weights: Tensor | None = None,
    trade_off: float = 1.0,
    confidence_scale: float = 1.0,
    eps: float = 0.0,
    return_stats: Literal[False] = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...
@overload
def ueo_loss_and_grad(
    logits: Tensor,
    confidence: Tensor | None = None,
    *,
    marginal_weights: Tensor | None = None,
    trade_off: float = 1.0,
    confidence_scale: float = 1.0,
    eps: float = 0.0,
    return_stats: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor, UEOStats]: ...
def ueo_loss_and_grad(
    logits: Tensor,
    confidence: Tensor | None = None,
    *,
    marginal_weights: Tensor | None = None,
    trade_off: float = 1.0,
    confidence_scale: float = 1.0,
    eps: float = 0.0,
    return_stats: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, UEOStats]:
    """The loss and its gradient by the logits, at once and without autograd.

    Arguments and errors as :func:`ueo_loss`. Works under ``no_grad`` and ``inference_mode``;
    neither result is part of a graph.

    Returns:
        ``(loss, dlogits)``, with ``return_stats`` ``(loss, dlogits, UEOStats)``: loss 0-d,
        dlogits (B, C) contiguous in the logits' dtype.
    """
    args = _check(backend, logits, confidence, marginal_weights, trade_off, confidence_scale, eps)
    if args[0] == "reference":
        with torch.inference_mode(False), torch.enable_grad():
            copy = logits.detach().clone(memory_format=torch.contiguous_format)
            # Unlike autograd.grad it works within vmap.
            grad, (loss, stats) = torch.func.grad(_with_results, has_aux=True)(copy, *args[2:])
        loss, grad = loss.detach(), grad.detach()
        return (loss, grad, stats) if return_stats else (loss, grad)
    with torch.no_grad() if logits.requires_grad else _AS_IT_IS:
        try:
            loss, saved, grad = op.loss_and_grad(*args)
        except RuntimeError:
            _refuse_weights(args)
            raise
        if not return_stats:
            return loss, grad
        return loss, grad, _stats(op.statistics(saved, logits.shape[1]))


def mcm_score(cosines: Tensor, scale: float = 1.0) -> Tensor:
    """Maximum concept matching score: max_c softmax(scale * cosines)_c. High means known.

    Args:
        cosines: (B, C) cosine similarities of images and class prompts; float64, float32, float16
            or bfloat16, any strides.
        scale: multiplies the cosines; 1 as in the authors' code (and MCM's temperature 1).

    Returns:
        (B,) in [1/C, 1], float32 (float64 for float64 cosines). Differentiable where ``cosines``
        require grad.

    Raises:
        TypeError, ValueError: an argument is unusable; the message says which, and the way out.

    Source: Ming et al., *Delving into Out-of-Distribution Detection with Vision-Language
    Representations*, NeurIPS 2022, equation 1.
    """
    check_matrix("cosines", cosines)
    factor = check_number("scale", scale, sign="positive")
    needs_grad = cosines.requires_grad and torch.is_grad_enabled()
    chosen = "reference" if needs_grad else backends.choose("auto", cosines)
    if chosen == "reference":
        backends.check_memory("cosines", cosines)
        return reference.max_softmax(cosines, factor)
    return op.max_softmax(chosen, cosines, factor)
