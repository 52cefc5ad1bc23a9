"""``MODULE:OBJECT``: what is to be served, named by a text."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from zmqcore.rpc.dispatcher import public_methods

__all__ = ["NotServable", "load_endpoint", "load_object"]


class NotServable(ValueError):
    """MODULE:OBJECT names nothing that can be served; the text says why."""


def load_endpoint(target: str) -> Any:
    """Import *target*, ``MODULE:OBJECT`` or ``MODULE``, and return the object to serve.

    A class is instantiated without arguments; a function is served under its own name; a module serves its
    public functions; everything else is served as it is. OBJECT may be dotted (``module:Outer.Inner``).

    Raises NotServable if there is no such module or object, if a class cannot be made without arguments, or if there is
    no method to serve. What the module itself raises while it is imported is passed on.
    """
    found = load_object(target)
    if inspect.isclass(found):
        found = _made(found, target)
    elif inspect.isroutine(found):
        found = {found.__name__: found}
    try:
        public_methods(found, coroutines=True)
    except TypeError as exc:
        raise NotServable(f"{target}: {exc}") from exc
    return found


def load_object(target: str) -> Any:
    """Import *target*, ``MODULE:OBJECT`` or ``MODULE``, and return it as it is. Raises as load_endpoint() does."""
    module_name, colon, path = target.partition(":")
    if not module_name or (colon and not path) or module_name.endswith(".py") or "/" in module_name:
        raise NotServable(
            f"{target!r} is not MODULE:OBJECT; for stock.py with a class Stock in it write: stock:Stock"
        )
    found: Any = _imported(module_name)
    for name in path.split(".") if path else ():
        try:
            found = getattr(found, name)
        except AttributeError as exc:
            public = ", ".join(sorted(each for each in vars(found) if not each.startswith("_"))[:12])
            raise NotServable(
                f"{module_name} has no {path!r}" + (f"; it has {public}" if public else "")
            ) from exc
    return found


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        # A module that the wanted one imports may be what is missing: that is for the user to see as it is.
        if exc.name is None or not (name + ".").startswith(exc.name + "."):
            raise
        raise NotServable(
            f"there is no module {exc.name!r}; it is looked for in {Path.cwd()} and in what is installed for "
            f"{sys.executable}"
        ) from exc


def _made(cls: type, target: str) -> Any:
    try:
        inspect.signature(cls).bind()
    except TypeError as exc:
        raise NotServable(
            f"{target} cannot be made without arguments ({exc}); name an object of it instead"
        ) from exc
    except ValueError:
        pass  # a class of an extension module may have no signature; then one sees when it is called
    return cls()
