"""Compiled ops by namespace: fake kernels for all of them, and those that are defined in Python."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from ueo_fast import _extension, backends

_libraries: list[torch.library.Library] = []
"""An op lives as long as its library."""

_overloads: dict[str, SimpleNamespace] = {}
"""Ops by namespace, as overloads: calling one skips overload resolution."""


def _keep_overload(namespace: str, name: str) -> None:
    ops = _overloads.setdefault(namespace, SimpleNamespace())
    setattr(ops, name, getattr(getattr(torch.ops, namespace), name).default)


class Ops:
    """One file's ops: in ``torch.ops.ueo_fast`` (C++), and the same in ``ueo_fast_triton``.

    Args:
        stem: the file's name; ``ueo_fast/triton/<stem>.py`` has ``KERNELS``, by op.
        fakes: by op, shapes and dtypes of what it returns; signatures are those of
            csrc/library.cpp.
    """

    def __init__(self, stem: str, fakes: Mapping[str, Callable[..., Any]]) -> None:
        self.fakes = fakes
        if _extension.cpu_error is None:
            for name, fake in fakes.items():
                torch.library.register_fake(f"ueo_fast::{name}", _on_one_device(name, fake))
                _keep_overload("ueo_fast", name)

        def kernel(name: str) -> Callable[..., Any]:
            # Imports triton: only once an op of it runs.
            module = importlib.import_module(f"ueo_fast.triton.{stem}")
            function: Callable[..., Any] = module.KERNELS[name]
            return function

        self.define_in_python("ueo_fast_triton", kernel)

    def define_in_python(
        self, namespace: str, kernels: Callable[[str], Callable[..., Any]]
    ) -> None:
        """The ops below ``torch.ops.<namespace>``, computed by ``kernels(name)(*arguments)``.

        ``kernels`` is called when an op runs, not before.
        """

        def kernel(name: str) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                for parameter, value in zip(signatures[name].parameters, arguments, strict=True):
                    if isinstance(value, torch.Tensor):
                        backends.check_memory(parameter, value)
                return kernels(name)(*arguments)

            return run

        signatures = {name: inspect.signature(fake) for name, fake in self.fakes.items()}

        library = torch.library.Library(namespace, "FRAGMENT")
        _libraries.append(library)
        for name, fake in self.fakes.items():
            library.define(name + torch.library.infer_schema(fake, mutates_args=()))
            library.impl(name, kernel(name), "CUDA")
            library.impl(name, kernel(name), "CPU")
            torch.library.register_fake(
                f"{namespace}::{name}", _on_one_device(name, fake), lib=library
            )
            _keep_overload(namespace, name)


def _on_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """``fake``, which also runs where one argument is a meta tensor: refuse others next to it."""

    @functools.wraps(fake)
    def checked(*arguments: Any) -> Any:
        devices = {value.device for value in arguments if isinstance(value, torch.Tensor)}
        if len(devices) > 1:
            found = ", ".join(sorted(map(str, devices)))
            raise RuntimeError(
                f"ueo_fast::{name} needs all tensors on one device, got {found}: move them to one"
            )
        return fake(*arguments)

    return checked


def of(backend: str) -> Any:
    """The ops of a compiled backend by name, as overloads of ``torch.ops.<namespace>``."""
    return _overloads[backends.COMPILED[backend].namespace]
