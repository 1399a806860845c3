"""Lets torchvision and timm import next to a CPU build of torch, whose operator library they lack.

Each operator that an import asks for is declared without a kernel; no test calls one.
"""

import re
import sys

import torch

_LIBRARY = torch.library.Library("torchvision", "DEF")


def import_torchvision():
    """Import and return torchvision, declaring the operators it misses one at a time."""
    while True:
        try:
            import torchvision
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            _LIBRARY.define(f"{missing[1]}(Tensor x) -> Tensor")
            for name in [name for name in sys.modules if name.startswith("torchvision")]:
                del sys.modules[name]
        else:
            return torchvision


import_torchvision()
