"""What passes over the data have measured, before anything is concluded from it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from bntools.batches import Batch
from bntools.course import Course
from bntools.moments import Arrival, Moments, merged
from bntools.processes import Group


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
        self.pool(arrival.layer, merged([arrival.moments]))
        self.follow(arrival)

    def follow(self, arrival: Arrival) -> None:
        """Go on with the course of a layer, where samples were measured one by one."""
        if arrival.samples is not None:
            self.courses.setdefault(arrival.layer, Course()).add(arrival.samples)

    def include(self, other: Measured) -> None:
        """Pool what another pass has measured."""
        self.samples += other.samples
        for name, moments in other.moments.items():
            self.pool(name, moments)
        for name, course in other.courses.items():
            self.courses.setdefault(name, Course()).include(course)
        self.calls = {name: max(self.calls.get(name, 0), n) for name, n in (self.calls | other.calls).items()}
        self.late |= other.late

    def on_all(self, group: Group) -> Measured:
        """What all processes of a group have measured, pooled by rank; the batches are this one's."""
        if group.size == 1:
            return self
        own = replace(self, batches=[], moments={name: moments.numpy() for name, moments in self.moments.items()})
        result = Measured(batches=self.batches)
        for one in group.gather(own):
            result.include(one)
        return result

    def pool(self, name: str, new: Moments) -> None:
        """Take moments of a layer in."""
        self.moments[name] = self.moments[name].merge(new) if name in self.moments else new
