"""One of the processes that test_processes starts: ``worker.py RANK COUNT PORT...``; prints what it saw as JSON."""

import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from datetime import timedelta

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import bntools
from bntools import processes
from bntools.cli import main

RANK, COUNT, *PORTS = map(int, sys.argv[1:])
SIZES = (30, 0, 7)


def begin(port):
    """A process group of gloo."""
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group(
        "gloo", init_method=address, rank=RANK, world_size=COUNT, timeout=timedelta(seconds=240)
    )


def recalibrated(batches, wrap=True):
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
    os.environ.update(RANK=str(RANK), WORLD_SIZE=str(COUNT), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    out, err, status = io.StringIO(), io.StringIO(), None
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(list(arguments), prog_name="bntools")
        except SystemExit as ended:
            status = ended.code
    return status, out.getvalue(), err.getvalue()


def dying():
    """A process that is killed while the others wait for it."""
    if RANK == 2:
        print(json.dumps({**found, "dead": ""}), flush=True)
        os._exit(9)
    yield torch.ones(2, 3, 9, 9) * RANK


found = {}
share = torch.split(torch.from_numpy(np.load("x.npy")), SIZES)[RANK]
begin(PORTS[0])
found["ddp"] = recalibrated(list(share.split(4)) if len(share) else [])
processes.PATIENCE = 0.5
if RANK == 2:
    distributed.distributed_c10d._get_default_store().wait(["given up"], timedelta(seconds=240))
found["absent"] = recalibrated([share], wrap=False)
distributed.distributed_c10d._get_default_store().set("given up", "")
distributed.barrier()
distributed.destroy_process_group()
found["cli"], found["cli out"], _ = command(PORTS[1], "recalibrate", "model.pt", "x.npy", "-o", "three.pt")
found["bad"], _, found["bad err"] = command(PORTS[2], "recalibrate", "model.pt", "bad.npy", "-o", "bad.pt")
found["usage"], _, found["usage err"] = command(PORTS[2], "recalibrate", "model.pt")
begin(PORTS[3])
found["dead"] = recalibrated(dying(), wrap=False)
print(json.dumps(found), flush=True)
with suppress(RuntimeError):
    distributed.destroy_process_group()
