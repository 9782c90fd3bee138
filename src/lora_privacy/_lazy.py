"""Lazy package namespaces (PEP 562), so that ``noise`` and ``dp`` never import torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def attach(
    package: str, homes: dict[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of ``package``; ``homes`` maps a name to its module.

    Args:
        package: ``__name__`` of the package.
        homes: Public name -> module below the package, such as ``{"EntryNoise": "entry"}``.
    """

    def __getattr__(name: str) -> Any:  # noqa: ANN401, N807
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    def __dir__() -> list[str]:  # noqa: N807
        return sorted(homes)

    return __getattr__, __dir__
