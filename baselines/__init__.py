"""The methods that BUZZ is compared with: every module in this folder is imported."""

from importlib import import_module
from pkgutil import iter_modules

from buzz.policy import POLICIES, Policy

for _found in iter_modules(__path__):
    import_module(f"{__name__}.{_found.name}")

_own: dict[str, type[Policy]] = {
    cls.__name__: cls for cls in POLICIES.values() if cls.__module__.startswith(f"{__name__}.")
}
globals().update(_own)
__all__ = sorted(_own)
