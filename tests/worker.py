"""The processes of test_processes: ``worker.py COUNT PORT...``; each writes what it saw to ``RANK.json``.

They are forks of one that has imported everything, which takes longer than all that they do.
"""

import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # which DistributedDataParallel imports
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import bntools
from bntools import processes
from bntools.cli import main, recalibrate  # noqa: F401

COUNT, *PORTS = map(int, sys.argv[1:])
SIZES = (30, 0, 7)
bntools.backends.backend("torch")
RANK = next((rank for rank in range(1, COUNT) if not os.fork()), 0)
torch.set_num_threads(1)


def begin(port):
    """A process group of gloo."""
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group(
        "gloo", init_method=address, rank=RANK, world_size=COUNT, timeout=timedelta(seconds=240)
    )


def tell(found):
    """Leave what was seen to the test."""
    Path(f"{RANK}.json").write_text(json.dumps(found))


def measured(batches, wrap=True):
    """The statistics, or what was raised."""
    model = torch.load("model.pt", weights_only=False)
    try:
        if wrap:
            bntools.recalibrate(DistributedDataParallel(model), batches)
        else:
            bntools.recalibrate(model, batches, group=distributed.group.WORLD)
    except bntools.BntoolsError as error:
        return str(error)
    return np.concatenate([np.concatenate(layer.stats) for layer in bntools.inspect(model)]).tolist()


def command(port, *arguments):
    """Exit status, stdout and stderr of a command under torchrun."""
    if RANK == 0 and port not in stores:  # torchrun keeps it, beyond the end of its processes
        stores[port] = distributed.TCPStore("127.0.0.1", port, COUNT, is_master=True, wait_for_workers=False)
    os.environ.update(RANK=str(RANK), WORLD_SIZE=str(COUNT), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    out, err, status = io.StringIO(), io.StringIO(), None
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(list(arguments), prog_name="bntools")
        except SystemExit as ended:
            status = ended.code
    del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
    return status, out.getvalue(), err.getvalue()


def dying():
    """A process that is killed while the others wait for it."""
    if RANK == 2:
        tell({**found, "dead": ""})
        os._exit(9)
    yield torch.ones(2, 3, 9, 9) * RANK


found, stores = {}, {}
share = torch.split(torch.from_numpy(np.load("x.npy")), SIZES)[RANK]
begin(PORTS[0])
found["ddp"] = measured(list(share.split(4)) if len(share) else [])
processes.PATIENCE = 1.0
if RANK == 2:
    distributed.distributed_c10d._get_default_store().wait(["given up"], timedelta(seconds=240))
found["absent"] = measured([share], wrap=False)
distributed.distributed_c10d._get_default_store().set("given up", "")
distributed.barrier()
distributed.destroy_process_group()
found["cli"], found["cli out"], _ = command(PORTS[1], "recalibrate", "model.pt", "x.npy", "-o", "three.pt")
found["bad"], _, found["bad err"] = command(PORTS[2], "recalibrate", "model.pt", "bad.npy", "-o", "bad.pt")
found["usage"], _, found["usage err"] = command(PORTS[2], "recalibrate", "model.pt")
asked = ("recalibrate", "model.pt", "x.npy", "-o", "no.pt", "--device", "cuda:77")
found["device"], _, found["device err"] = command(PORTS[3], *asked)
begin(PORTS[4])
found["dead"] = measured(dying(), wrap=False)
tell(found)
with suppress(RuntimeError):
    distributed.destroy_process_group()
for _ in range(1, COUNT if RANK == 0 else 1):
    os.wait()
