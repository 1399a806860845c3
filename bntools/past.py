"""What streaming adaptation remembers of the batches that have gone by."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bntools.moments import Moments


@dataclass(frozen=True)
class Past:
    """The moments of past batches together, weighed in samples; a new one comes of each batch.

    ``window`` remembers the last batches as far as they hold no more than that many samples together, the newest in
    any case. With ``half_life`` a sample counts half as much after that many more. With neither, all count for good.

    The window is a queue in two stacks, so that nothing is ever subtracted: ``older`` holds for each of its batches
    its samples and the moments from it to the newest of its stack, the oldest batch last; ``newer`` the batches since.
    """

    window: float | None = None
    half_life: float | None = None
    total: Moments | None = None
    older: tuple[tuple[float, Moments], ...] = ()
    newer: tuple[Moments, ...] = ()
    since: Moments | None = None  # the batches of newer together

    def __post_init__(self) -> None:
        if self.window is not None and self.half_life is not None:
            raise ValueError("a past has a window or a half-life")

    @property
    def samples(self) -> float:
        """The weight of what is remembered, in samples."""
        return 0.0 if self.total is None else self.total.count

    def after(self, batch: Moments) -> Past:
        """The past once ``batch``, whose count is its samples, has gone by."""
        if self.window is not None:
            return self._in_window(batch)
        total = self.total
        if total is not None and self.half_life is not None:
            kept = 0.5 ** (batch.count / self.half_life)
            total = Moments(total.count * kept, total.mean, total.m2 * kept)
        return replace(self, total=batch if total is None else total.merge(batch))

    def _in_window(self, batch: Moments) -> Past:
        assert self.window is not None
        older, newer, since = self.older, self.newer, self.since
        samples = self.samples + batch.count
        while samples > self.window and (older or newer):
            if not older:
                older, newer, since = _turned(newer), (), None
            samples -= older[-1][0]
            older = older[:-1]
        since = batch if since is None else since.merge(batch)
        total = older[-1][1].merge(since) if older else since
        return replace(self, total=total, older=older, newer=(*newer, batch), since=since)


def _turned(batches: tuple[Moments, ...]) -> tuple[tuple[float, Moments], ...]:
    """The stack of older batches that these make: the newest at its bottom."""
    stack: list[tuple[float, Moments]] = []
    for batch in reversed(batches):
        together = batch.merge(stack[-1][1]) if stack else batch
        stack.append((batch.count, together))
    return tuple(stack)
