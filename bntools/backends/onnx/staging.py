"""Running stages in ONNX Runtime, from arrays to arrays in memory that is used again and again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from bntools.backends.onnx.buffers import Buffers
from bntools.backends.onnx.document import Document
from bntools.backends.onnx.session import computed, open_session, quiet
from bntools.backends.onnx.stages import STATS, Stage, model_of, stat_name
from bntools.layer import Stats

# Idle threads of one session would spin on the cores that the next one and the moments need.
NO_SPINNING = {"session.intra_op.allow_spinning": "0"}
NUMBERS = "fiub"  # kinds of arrays whose memory the runtime can be given


@dataclass
class Session:
    """A stage ready to run, and the shapes that it has given for those of its inputs."""

    runtime: ort.InferenceSession
    shapes: dict[Any, dict[str, tuple[tuple[int, ...], np.dtype]] | None] = field(default_factory=dict)


class Runs:
    """The stages of a graph and their sessions, made when they are first run.

    Unless they are to be kept, the session of one stage makes way for that of the next: its weights and
    its working memory are gone with it.
    """

    def __init__(self, document: Document, stages: list[Stage], keep: bool):
        self.stages = stages
        self._document = document
        self._keep = keep
        self._sessions: dict[int, Session] = {}
        self._buffers = Buffers()

    def run(self, index: int, values: dict[str, Any], stats: Mapping[str, Stats]) -> None:
        """Run a stage on the values of one replica, which receive what it writes."""
        stage = self.stages[index]
        if not stage.nodes:
            return
        values.update(self._run(self._session(index, values), stage, self._fed(stage, values, stats)))

    def let_go(self, values: dict[str, Any], names: Iterable[str]) -> None:
        """Forget values; their memory is used again."""
        for name in names:
            if isinstance(value := values.pop(name, None), np.ndarray):
                self._buffers.give_back(value)

    def _session(self, index: int, values: dict[str, Any]) -> Session:
        if index not in self._sessions:
            if not self._keep:
                self._sessions.clear()
                self._buffers.next_stage()
            self._sessions[index] = Session(self._opened(model_of(self._document, self.stages[index], values)))
        return self._sessions[index]

    def _fed(self, stage: Stage, values: dict[str, Any], stats: Mapping[str, Stats]) -> dict[str, Any]:
        fed = {name: values[name] for name in stage.reads}
        for one in stage.applied:
            for place, stat in zip(STATS, stats[one.name], strict=True):
                stored = self._document.constant(one.node.input[place])
                assert stored is not None
                fed[stat_name(one, place)] = np.ascontiguousarray(stat, dtype=stored.dtype)
        return fed

    def _run(self, session: Session, stage: Stage, fed: dict[str, Any]) -> dict[str, Any]:
        """What the stage writes: into memory of ours once the shapes that these inputs lead to are known."""
        key = tuple(value.shape for value in fed.values()) if _are_numbers(fed.values()) else None
        places = session.shapes.get(key) if key is not None else None
        outputs = self._bound(session, fed, places) if places else None
        if outputs is None:
            outputs = computed(session.runtime, stage.writes, fed, self._document.name)
            if key is not None and key not in session.shapes:
                numbers = _are_numbers(outputs.values())
                session.shapes[key] = {name: (v.shape, v.dtype) for name, v in outputs.items()} if numbers else None
        return outputs

    def _bound(
        self, session: Session, fed: dict[str, np.ndarray], places: dict[str, tuple[tuple[int, ...], np.dtype]]
    ) -> dict[str, np.ndarray] | None:
        """The outputs, written into buffers; None where they turn out to have other shapes."""
        binding = session.runtime.io_binding()
        outputs = {name: self._buffers.take(*place) for name, place in places.items()}
        for name, value in fed.items():
            binding.bind_input(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
        for name, value in outputs.items():
            binding.bind_output(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
        try:
            session.runtime.run_with_iobinding(binding, quiet())
        except Exception:  # shapes that depend on the values: then the runtime brings the memory
            for value in outputs.values():
                self._buffers.give_back(value)
            session.shapes = dict.fromkeys(session.shapes)
            return None
        return outputs

    def _opened(self, model: onnx.ModelProto) -> ort.InferenceSession:
        return open_session(
            model.SerializeToString(),
            self._document.name,
            ("cpu",),
            optimize=True,
            folder=self._document.folder,
            lean=self._document.external,
            arena=not self._keep,  # many sessions would each keep their working memory
            entries=NO_SPINNING,
        )


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(value, np.ndarray) and value.dtype.kind in NUMBERS for value in values)
