"""Stand-ins for mmengine and mmcv, of which running the backbone needs little."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types

from torch import nn


class BaseModule(nn.Module):
    """mmengine's, as far as running a model needs it."""

    def __init__(self, init_cfg=None):
        super().__init__()


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of a package that is not installed: the names below, and empty classes."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name, path, target=None):
        if name.split('.')[0] == self.package:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__version__ = '999.0'  # new enough
        registry = types.SimpleNamespace(register_module=lambda: lambda cls: cls)
        known = dict(BaseModule=BaseModule, MODULE2PACKAGE={}, print_log=lambda *args: print(*args))
        known.update(
            MODELS=registry,
            HOOKS=registry,
            FUNCTIONS=registry,
            DropPath=lambda probability: nn.Identity(),
        )

        def lookup(name):
            if name.startswith('__'):
                raise AttributeError(name)
            return known.get(name, type(name, (), {}))

        module.__getattr__ = lookup
        return module

    def exec_module(self, module):
        pass


def replace_missing() -> list:
    """Put stand-ins in the place of packages that cannot be imported, and return their names."""
    missing = []
    for package, needed in (('mmengine', 'mmengine.registry'), ('mmcv', 'mmcv.cnn.bricks')):
        try:
            importlib.import_module(needed)
        except Exception:  # it may be there, and broken for want of what it needs
            for name in [name for name in sys.modules if name.split('.')[0] == package]:
                del sys.modules[name]
            sys.meta_path.insert(0, StandIns(package))
            missing.append(package)
    if missing:  # the engine asks more of them, and is not needed to run a model
        engine = types.ModuleType('crossformer_mm.engine')
        engine.runner = types.SimpleNamespace(ADDED_HOOKS=[])
        sys.modules['crossformer_mm.engine'] = engine
    return missing
