"""torch.compile for the parts of a layer that are bound by memory, not by arithmetic: its MLP and its norms.

They come out as fused kernels; attention over trees, whose shapes change with every batch, stays as it is.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from helpsteer_assets.errors import HelpsteerError

COMPILED = ("MLP", "RMSNorm")
"""Endings of the class names of what is compiled, as transformers' models have them."""


@contextmanager
def compiled_layers(model: torch.nn.Module, enabled: bool = True) -> Iterator[None]:
    """Run a model's MLPs and norms compiled, for any number of tokens; the first passes compile, for up to a minute.

    Raises HelpsteerError where a CPU is to compute and there is no C++ compiler.
    """
    if not enabled:
        yield
        return
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        raise HelpsteerError(
            "run.compile needs a C++ compiler on a CPU, and there is none; install g++ or set it to false"
        )
    modules = [module for module in model.modules() if type(module).__name__.endswith(COMPILED)]
    for module in modules:
        module.forward = torch.compile(module.forward, dynamic=True)
    try:
        yield
    finally:
        for module in modules:
            del module.forward
