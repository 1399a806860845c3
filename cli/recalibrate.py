"""``bntools recalibrate``: measure the statistics anew on data, and write the model and a record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bntools.files import state

from . import arguments, bank, loading, output, paths, placing, processes, progress, records, reporting, resuming
from .loading import load
from .reading import Reading, reading_options, said_when_skipped


@click.command(short_help="Measure statistics anew on data.")
@arguments.model
@arguments.data
@arguments.target
@arguments.in_place
@arguments.force
@click.option(
    "--per-domain", is_flag=True, help="A file of statistics for each subfolder of DATA, in MODEL.sites; MODEL stays."
)
@click.option("--resume", is_flag=True, help="Go on where this command, given before, was stopped.")
@click.option("--method", type=click.Choice(["exact", "precise", "ema"]), default="exact", show_default=True)
@click.option(
    "--prior", type=arguments.Finite(min=0), default=0, metavar="N", help="Count the stored statistics as N samples."
)
@click.option("--memory", type=arguments.Bytes(), metavar="SIZE", help="For activations held at once, such as 4GiB.")
@click.option(
    "--tolerance",
    type=arguments.Finite(min=0, min_open=True),
    help="Stop once the standard error of every mean is below this, in standard deviations.",
)
@click.option("--no-check", is_flag=True, help="Do not measure the residual: saves a pass over DATA.")
@reading_options
@placing.options
@arguments.layers
@arguments.arch
@arguments.allow
@arguments.to_inference
@arguments.html
@arguments.as_json
def command(
    model: Path,
    data: str,
    target: Path | None,
    in_place: bool,
    force: bool,
    per_domain: bool,
    resume: bool,
    method: str,
    prior: float,
    memory: int | None,
    tolerance: float | None,
    no_check: bool,
    reading: Reading,
    device: str | None,
    autocast: str | None,
    layers: tuple[str, ...],
    arch: str | None,
    allow: tuple[str, ...],
    to_inference: bool,
    html: Path | None,
    as_json: bool,
) -> None:
    """Measure the BN statistics of MODEL anew on DATA, without training and without labels.

    Writes MODEL.recalibrated, with the suffix that MODEL has, and the record MODEL.recalibrated.json beside it.
    DATA is a folder of images, tar shards ('train-{000..011}.tar'), Parquet files, a dataset that datasets wrote, a
    .npy, .npz, .pt or .safetensors file of arrays (first axis: samples), or a function package.module:function that
    yields batches or returns a dataset of Hugging Face. With --per-domain, DATA is a folder with a subfolder, or file
    of arrays, for each domain; bntools stats apply brings one of the files into MODEL, bntools.use into a live model.
    Under torchrun (torchrun --nproc-per-node N -m bntools.cli recalibrate MODEL DATA) N processes share DATA.
    """
    if per_domain and html is not None:
        raise click.UsageError("--per-domain writes no report: leave out --html")
    if per_domain:
        processes.refuse_together("recalibrate --per-domain")
    resuming.refuse(resume, per_domain, method, processes.place()[1])
    with processes.joined(model, device) as job:
        if per_domain:
            folder = bank.destination(model, target, in_place, force)
        else:
            written, record_path = records.destinations(model, target, in_place, force)
        reporting.refuse(html, force)
        placing.refuse(model, device, autocast)
        before = state(model)
        loaded = load(model, arch, allow)
        loading.to_inference(model, loaded, to_inference, quiet=as_json)
        options: dict[str, Any] = {
            "method": method,
            "prior": prior,
            "layers": layers or None,
            "memory": memory,
            "tolerance": tolerance,
            "check": not no_check,
        }
        if per_domain:
            with placing.placed(loaded, job.device, autocast) as there:
                bank.write(model, there, data, folder, force, reading, options, as_json)
            return
        start = records.provenance("recalibrate", model, written)
        batches = reading.open(data, loaded, job.shard)
        output.say(f"{data}: {batches.description}", quiet=as_json)
        with (
            resuming.checkpoint(written, method, job.group.size, resume, quiet=as_json) as kept,
            placing.placed(loaded, job.device, autocast) as there,
        ):
            result = _measured(there.model, data, batches, job, {**options, "checkpoint": kept}, as_json)
        record = {**start, **job.record, **there.record, "input": job.agreed(batches), **records.recalibration(result)}
        if job.group.rank:
            return
        about = {"model": str(model), "data": f"{data}: {batches.description}", "output": str(written)}
        with reporting.beside(html, result, about):
            paths.check_source(model, written, before)
            records.write_both(loaded, written, record, record_path, overwrite=force or in_place)
        if as_json:
            output.as_json(record)
        else:
            _print(result, [written, record_path])
            reporting.said(html, quiet=False)


def _measured(
    model: Any, data: str, batches: Any, job: processes.Joined, options: dict[str, Any], as_json: bool
) -> Any:
    """What ``bntools.recalibrate`` gives, all processes together, with its progress on the terminal."""
    import bntools

    with said_when_skipped(data, batches, quiet=as_json), progress.samples() as report:
        return bntools.recalibrate(model, batches, progress=job.paced(report), group=job.group, **options)


def _print(result: Any, written: list[Path]) -> None:
    rows = sorted(result.layers, key=lambda layer: -layer.drift)
    output.table(
        ["layer", "drift", "mean before", "after", "std before", "after"],
        [
            [
                layer.name,
                output.number(layer.drift),
                *(output.number(float(stats.mean.mean())) for stats in (layer.before, layer.after)),
                *(output.number(float(stats.std.mean())) for stats in (layer.before, layer.after)),
            ]
            for layer in rows
        ],
        most=20,
    )
    for name, reason in result.untouched.items():
        click.echo(f"untouched: {name}: {reason}")
    for note in result.notes:
        click.echo(note)
    residual = "" if result.residual is None else f", residual {result.residual:.1e}"
    click.echo(
        f"recalibrated {output.counted(len(result.layers), 'BN layer')} on "
        f"{output.counted(result.samples, 'sample')}{residual}"
    )
    click.echo(f"wrote {' and '.join(str(path) for path in written)}")
