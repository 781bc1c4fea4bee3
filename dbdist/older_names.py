"""Modules under the names that they had before they moved, for scripts that import them."""

import sys
from importlib.abc import InspectLoader, Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from pkgutil import resolve_name
from types import CodeType, ModuleType

MOVED = {
    "dbdist.compat": "dbdist.inference.published",
    "dbdist.export": "dbdist.commands.export",
    "dbdist.import_published": "dbdist.commands.import_published",
    "dbdist.merge": "dbdist.commands.merge",
    "dbdist.plan": "dbdist.commands.plan",
}


class OlderNames(MetaPathFinder, Loader):
    """Finds a moved module where it is now."""

    def find_spec(
        self, name: str, path: object, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in MOVED:
            return None
        now = find_spec(MOVED[name])
        return spec_from_loader(name, self, origin=now.origin if now else None)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return resolve_name(MOVED[spec.name])

    def exec_module(self, module: ModuleType) -> None:
        """It has run under its own name."""

    def get_code(self, name: str) -> CodeType | None:
        """Returns what `python -m` runs."""
        spec = find_spec(MOVED[name])
        assert spec is not None
        assert isinstance(spec.loader, InspectLoader)
        return spec.loader.get_code(MOVED[name])


def install() -> None:
    """Makes the old names importable."""
    if not any(isinstance(finder, OlderNames) for finder in sys.meta_path):
        sys.meta_path.append(OlderNames())
