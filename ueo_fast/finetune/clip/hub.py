"""The Hugging Face hub: what its cache holds, and whether it can be reached."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from huggingface_hub import constants, get_session, try_to_load_from_cache

_PATIENCE = 8.0
"""Seconds in which the hub must answer before anything is downloaded."""
_T = TypeVar("_T")


def cached(repository: str, files: list[str]) -> str | None:
    """The path of the first of these files of a repository that the cache holds."""
    if not repository:
        return None
    found = (try_to_load_from_cache(repository, file) for file in files)
    return next((path for path in found if isinstance(path, str)), None)


def in_old_cache(url: str) -> bool:
    """Whether OpenAI's own client has downloaded the file before."""
    return (Path("~/.cache/clip").expanduser() / url.rpartition("/")[2]).is_file()


def check_access(what: str, url: str, way_out: str, named: str, network: bool) -> None:
    """Stop at once where ``what`` cannot or must not be downloaded.

    Raises:
        OSError: nobody who is trusted asked for it, or ``url`` does not answer.
    """
    if not network:
        raise OSError(
            f"{what}: not found in {constants.HF_HUB_CACHE}, and nothing that a run or a delta "
            f"names is downloaded by itself. If you trust it, name it: {named}"
        )
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else unreachable(url)
    if reason:
        raise not_downloaded(what, reason, way_out)


def not_downloaded(what: str, reason: str, way_out: str) -> OSError:
    """The error for a file that is neither in the cache nor to be had."""
    return OSError(
        f"{what}: not found in {constants.HF_HUB_CACHE}, and could not be downloaded ({reason}). "
        f"Without a network: {way_out}"
    )


def unreachable(url: str) -> str:
    """Why ``url`` does not answer, empty if it does: one request, because the hub's client repeats
    its own for minutes."""
    reason = f"no answer from {url} within {_PATIENCE:g} s"

    def ask() -> None:
        nonlocal reason
        try:
            get_session().head(url, timeout=_PATIENCE)
            reason = ""
        except Exception as error:  # of the client that the hub uses in this version
            reason = f"{url}: {str(error).strip() or type(error).__name__}"

    thread = threading.Thread(target=ask, daemon=True)  # no time-out bounds the look-up of names
    thread.start()
    thread.join(_PATIENCE)
    return reason


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Inside, the hub's client serves what is in its cache and asks no network."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def from_hub(load: Callable[[], _T], *, network: bool) -> _T:
    """What ``load`` returns from the hub's cache, else, with ``network``, from the hub itself.

    Raises:
        Exception: whatever ``load`` raises.
    """
    with offline():
        try:
            return load()
        except Exception as error:
            missing = error
    if not network or constants.HF_HUB_OFFLINE:
        raise missing
    if reason := unreachable(constants.ENDPOINT):
        raise OSError(f"{missing}; {reason}") from missing
    return load()
