"""Names to things: registries at the edge, and the one door for optional libraries."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType

from mmengine.registry import Registry

from dino_adapters.contracts import MissingLibraryError, UnknownNameError

SCOPE = "dino_adapters"
READERS = Registry("reader", scope=SCOPE)
HEADS = Registry("head", scope=SCOPE)


def nearest(name: str, known: Iterable[str], *, within: str = "") -> str:
    """A hint for a misspelt name: the closest known one, with what it stands in, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"Did you mean '{within}{close[0]}'?"
    return f"Known: {', '.join(names)}."


def find(registry: Registry, name: str) -> type:
    """The class registered under `name`.

    Looks in the known names alone: the registry's own `get` would import any dotted path.

    Raises:
        UnknownNameError: there is no such name; the message holds the nearest one.
    """
    known = registry.module_dict
    if name in known:
        return known[name]
    raise UnknownNameError(f"There is no {registry.name} called '{name}'. {nearest(name, known)}")


def need(module: str, *, extra: str) -> ModuleType:
    """Imports an optional library, or says how to install it.

    Raises:
        MissingLibraryError: it is absent.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != module.split(".")[0]:
            raise  # it is installed, but something inside it is missing: let that be seen
        hint = f"Run: pip install 'dino-adapters[{extra}]'"
        raise MissingLibraryError(f"This needs '{module}', which is absent. {hint}") from error
