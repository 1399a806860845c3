"""What passes over the data have measured, before anything is concluded from it."""

from __future__ import annotations

from dataclasses import dataclass, field

from bntools.batches import Batch
from bntools.course import Course
from bntools.moments import Arrival, Moments


@dataclass
class Measured:
    """Moments per layer, courses over the samples, and what was noticed."""

    samples: int = 0
    moments: dict[str, Moments] = field(default_factory=dict)
    courses: dict[str, Course] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    late: set[str] = field(default_factory=set)
    batches: list[Batch] = field(default_factory=list)

    def add(self, arrival: Arrival) -> None:
        """Pool one arrival."""
        self._pool(arrival.layer, arrival.moments)
        if arrival.samples is not None:
            self.courses.setdefault(arrival.layer, Course()).add(arrival.samples)

    def include(self, other: Measured) -> None:
        """Pool what another pass has measured."""
        self.samples += other.samples
        for name, moments in other.moments.items():
            self._pool(name, moments)
        for name, course in other.courses.items():
            self.courses.setdefault(name, Course()).include(course)
        self.calls = {name: max(self.calls.get(name, 0), n) for name, n in (self.calls | other.calls).items()}
        self.late |= other.late

    def _pool(self, name: str, new: Moments) -> None:
        self.moments[name] = self.moments[name].merge(new) if name in self.moments else new
