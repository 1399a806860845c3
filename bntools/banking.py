"""The verb bank: statistics for each of several domains, of one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bntools import files
from bntools.errors import BntoolsError
from bntools.layer import Selection
from bntools.recalibrated import Recalibration
from bntools.recalibration import Progress, recalibrate
from bntools.stats import Statistics, statistics


@dataclass(frozen=True)
class Bank:
    """What ``bank`` returns: by domain its ``statistics``, and the ``results`` of the recalibrations they come from."""

    statistics: dict[str, Statistics]
    results: dict[str, Recalibration]

    def __iter__(self) -> Iterator[str]:
        return iter(self.statistics)

    def __len__(self) -> int:
        return len(self.statistics)

    def __getitem__(self, domain: str) -> Statistics:
        return self.statistics[domain]


def bank(
    model: Any,
    domains: Mapping[str, Iterable[Any]],
    *,
    method: str = "exact",
    prior: float = 0,
    layers: Selection = None,
    forward: Callable[[Any, Any], Any] | None = None,
    memory: int | None = None,
    tolerance: float | None = None,
    check: bool = True,
    progress: Progress | None = None,
) -> Bank:
    """Measure a model's statistics on each of several domains; the model itself stays as it is.

    ``domains`` gives batches by the name of a domain. Each is measured as ``recalibrate`` does it, with its arguments,
    and starts from the statistics that the model has; ``prior=N`` weighs those as N samples, which a domain with little
    data needs. Layers that are left alone have the model's own statistics in every domain.

    Raises BntoolsError that names the domain, where one cannot be measured.

        sites = bntools.bank(model, {"a": loader_a, "b": loader_b}, prior=100)
        with bntools.use(model, sites["a"]):
            model(images)
    """
    if not domains:
        raise BntoolsError("found no domains: expected batches by the name of each")
    if isinstance(model, (str, Path)):
        model = files.working(model)  # its file is not to be written and put back for each
    bank = Bank({}, {})
    for name, batches in domains.items():
        try:
            result = recalibrate(
                model,
                batches,
                method=method,
                prior=prior,
                layers=layers,
                forward=forward,
                memory=memory,
                tolerance=tolerance,
                check=check,
                progress=progress,
            )
            try:
                bank.statistics[name] = statistics(model, samples=result.samples, note=f"domain {name}")
            finally:
                result.undo()
        except BntoolsError as error:
            raise BntoolsError(f"{name}: {error}") from error
        bank.results[name] = result
    return bank
