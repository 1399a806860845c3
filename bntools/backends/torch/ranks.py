"""The processes of torch.distributed, as the core works with them."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn

from bntools.backends.torch.layers import inside
from bntools.batches import said
from bntools.errors import BntoolsError

LONG = timedelta(days=1)  # one that died is noticed at once; one that reads a large share is waited for


class Ranks:
    """The ranks of a process group.

    With a backend that knows only CUDA (NCCL) what is exchanged goes through the memory of ``device``. With gloo nobody
    asks here whether there is such a device.
    """

    def __init__(self, group: distributed.ProcessGroup, device: str | None):
        self._group, self.device = group, device or "cpu"
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)

    def exchange(self, value: Any) -> list[Any]:
        """What each rank has handed in, pickled on the way, in the order of ranks."""
        every: list[Any] = [None] * self.size
        with self._on_device():
            distributed.all_gather_object(every, value, group=self._group)
        return every

    def absent(self, seconds: float) -> list[int]:
        """The ranks that are not here after some seconds, told through the store that all of them share.

        All come to one verdict, which is the list itself: the last to arrive says that nobody is absent, the first to
        lose patience who is.
        """
        from torch.distributed.distributed_c10d import _get_process_group_store  # which no public name gives away

        store = _get_process_group_store(self._group)
        call = f"bntools/{store.add(f'bntools/calls/{self.rank}', 1)}"
        store.set(f"{call}/{self.rank}", "here")
        if store.add(f"{call}/here", 1) == self.size:
            store.compare_set(f"{call}/verdict", "", "[]")
        with suppress(RuntimeError):
            store.wait([f"{call}/verdict"], timedelta(seconds=seconds))
        seen = [rank for rank in range(self.size) if not store.check([f"{call}/{rank}"])]
        absent: list[int] = json.loads(store.compare_set(f"{call}/verdict", "", json.dumps(seen)))
        if self.rank in absent:
            raise BntoolsError(f"rank {self.rank} of {self.size} came late: the others have given up waiting for it")
        return absent

    def is_first(self, what: str) -> bool:
        """Whether this rank is the first that asks; also where nobody can tell any more."""
        from torch.distributed.distributed_c10d import _get_process_group_store

        try:
            store = _get_process_group_store(self._group)
            return bool(store.compare_set(f"bntools/{what}", "", str(self.rank)) == str(self.rank).encode())
        except RuntimeError:  # it was kept by a process that has ended
            return True

    def leave(self) -> None:
        """End the process group that ``join`` has made."""
        with suppress(RuntimeError):
            distributed.destroy_process_group(self._group)

    def _on_device(self) -> AbstractContextManager[Any]:
        on_host = distributed.get_backend(self._group) == "gloo" or not self.device.startswith("cuda")
        return nullcontext() if on_host else torch.cuda.device(self.device)


def join(device: str | None, local: int) -> Ranks:
    """Join the processes that torchrun has started, the ``local``-th on this machine.

    Each computes on a GPU of its own, if there are any and ``device`` does not say otherwise. What they exchange is
    small and read on the host, so it goes through gloo, which also notices at once when a process dies.
    """
    if device in (None, "cuda") and (gpus := torch.cuda.device_count()):
        device = f"cuda:{local % gpus}"
    try:
        distributed.init_process_group("gloo", timeout=LONG)
    except (RuntimeError, ValueError) as error:
        raise BntoolsError(f"the processes of torchrun cannot reach one another: {said(error)}") from error
    assert distributed.group.WORLD is not None
    return Ranks(distributed.group.WORLD, device)


def ranks(model: Any, group: Any = None) -> Ranks | None:
    """The ranks of a process group, by default of the one in which DistributedDataParallel has put the model.

    None for a model that is in none. Raises BntoolsError for anything but a process group that this process is in.
    """
    if group is None:
        parallel = next((m for m in inside(model) if isinstance(m, nn.parallel.DistributedDataParallel)), None)
        if parallel is None:
            return None
        group = parallel.process_group
    if not (distributed.is_available() and isinstance(group, distributed.ProcessGroup)):
        raise BntoolsError(
            f"found group={group!r}, expected a torch.distributed.ProcessGroup that this process belongs to, such as "
            f"torch.distributed.group.WORLD after init_process_group"
        )
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    return Ranks(group, next((str(tensor.device) for tensor in tensors), None))


def world() -> Any:
    """The group of all processes of a distributed training; None outside of one."""
    return distributed.group.WORLD if distributed.is_available() and distributed.is_initialized() else None
