"""Where a command computes."""

from __future__ import annotations

import torch


def chosen_device(name: str | None) -> str:
    """``name`` if this machine has such a device; ``None``: a GPU where there is one, else the CPU.

    Raises:
        ValueError: PyTorch knows no such device, or cannot use it here.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, NotImplementedError, AssertionError, ImportError) as error:
        # Only the first sentence: of a missing backend PyTorch lists all the others.
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        raise ValueError(
            f"device={name!r} cannot be used here: {reason}. Take --device cpu, or leave it out; "
            "ueo-fast info lists the devices of this machine"
        ) from error
    return name
