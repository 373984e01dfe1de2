"""Public names of a package that load their module only when they are asked for (PEP 562)."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package: The package's name.
        modules: Public name -> `module:attribute`, or `module` alone for the module itself.

    Returns:
        The two functions. A name that was looked up once stays in the package.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name)
        module, _, attribute = modules[name].partition(":")
        found = import_module(module)
        value = getattr(found, attribute) if attribute else found
        setattr(import_module(package), name, value)
        return value

    def names() -> list[str]:
        own = (name for name in vars(import_module(package)) if name.startswith("__"))
        return sorted({*own, *modules})

    return get, names
