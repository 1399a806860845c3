"""The PyTorch back end: nn.Module."""

from bntools.backends.torch.adapting import adapt
from bntools.backends.torch.arrays import arrays
from bntools.backends.torch.converting import convert
from bntools.backends.torch.described import described
from bntools.backends.torch.digests import digest
from bntools.backends.torch.editing import commit, edit, handed
from bntools.backends.torch.export import EXPORTERS, export
from bntools.backends.torch.files import load, save
from bntools.backends.torch.freezing import freeze, reset, unfreeze
from bntools.backends.torch.graph import graph
from bntools.backends.torch.inputs import input_channels
from bntools.backends.torch.layers import layers, parts, stored, write
from bntools.backends.torch.memory import free_memory
from bntools.backends.torch.observing import observer
from bntools.backends.torch.placing import autocast, double, precision
from bntools.backends.torch.ranks import join, ranks, world
from bntools.backends.torch.replica import measuring
from bntools.backends.torch.running import predict
from bntools.backends.torch.surgery import absorb
from bntools.backends.torch.switching import live
from bntools.backends.torch.tracing import runners

__all__ = [
    "EXPORTERS",
    "absorb",
    "adapt",
    "arrays",
    "autocast",
    "commit",
    "convert",
    "described",
    "digest",
    "double",
    "edit",
    "export",
    "free_memory",
    "freeze",
    "graph",
    "handed",
    "input_channels",
    "join",
    "layers",
    "live",
    "load",
    "measuring",
    "observer",
    "parts",
    "precision",
    "predict",
    "ranks",
    "reset",
    "runners",
    "save",
    "stored",
    "unfreeze",
    "world",
    "write",
]
