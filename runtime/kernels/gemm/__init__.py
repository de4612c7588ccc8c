"""GEMM kernels: a file each, which registers what it defines. Importing this folder imports every file of it."""

import pkgutil
from importlib import import_module

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
