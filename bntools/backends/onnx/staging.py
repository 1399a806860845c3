"""Running stages in ONNX Runtime, from arrays to arrays in memory that is used again and again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

from bntools.backends.onnx.buffers import Buffers
from bntools.backends.onnx.document import Document
from bntools.backends.onnx.session import EXTERNAL_FOLDER, FATAL, quiet
from bntools.backends.onnx.stages import STATS, Stage, model_of, stat_name
from bntools.errors import BntoolsError
from bntools.layer import Stats
from bntools.noise import brief


class Runs:
    """The stages of a graph and their sessions, made when they are first run.

    Unless they are to be kept, the session of one stage makes way for that of the next: its weights and
    its working memory are gone with it.
    """

    def __init__(self, document: Document, stages: list[Stage], keep: bool):
        self.stages = stages
        self._document = document
        self._keep = keep
        self._sessions: dict[int, ort.InferenceSession] = {}
        self._shapes: dict[Any, dict[str, Any] | None] = {}
        self._buffers = Buffers()

    def run(self, index: int, values: dict[str, Any], stats: Mapping[str, Stats]) -> None:
        """Run a stage on the values of one replica, which receive what it writes."""
        stage = self.stages[index]
        if not stage.nodes:
            return
        session = self._session(index, values)
        fed = {name: values[name] for name in stage.reads}
        for one in stage.applied:
            for place, stat in zip(STATS, stats[one.name], strict=True):
                name = stat_name(one, place)
                stored = self._document.constant(one.node.input[place])
                fed[name] = np.ascontiguousarray(stat, dtype=None if stored is None else stored.dtype)
        try:
            values.update(self._outputs(index, session, fed))
        except BntoolsError:
            raise
        except Exception as error:  # the runtime's own errors share no base class but this one
            raise BntoolsError(
                f"ONNX Runtime {ort.__version__} fails in {self._document.name}: {brief(error)}"
            ) from error

    def let_go(self, values: dict[str, Any], names: Iterable[str]) -> None:
        """Forget values; their memory is used again."""
        for name in names:
            if isinstance(value := values.pop(name, None), np.ndarray):
                self._buffers.give_back(value)

    def _session(self, index: int, values: Mapping[str, Any]) -> ort.InferenceSession:
        if index not in self._sessions:
            if not self._keep:
                self._sessions.clear()
                self._buffers.trim()
            model = model_of(self._document, self.stages[index], values)
            self._sessions[index] = _opened(model.SerializeToString(), self._document, arena=not self._keep)
        return self._sessions[index]

    def _outputs(self, index: int, session: ort.InferenceSession, fed: dict[str, Any]) -> dict[str, Any]:
        """What the stage writes: into memory of ours once the shapes that these inputs lead to are known."""
        writes = list(self.stages[index].writes)
        arrays = all(isinstance(value, np.ndarray) and value.dtype.kind in "fiub" for value in fed.values())
        key = (index, tuple(value.shape for value in fed.values())) if arrays else None
        places = self._shapes.get(key) if key else None
        if places is None:
            outputs = dict(zip(writes, session.run(writes, fed, quiet()), strict=True))
            if key is not None and key not in self._shapes:
                plain = all(isinstance(v, np.ndarray) and v.dtype.kind in "fiub" for v in outputs.values())
                self._shapes[key] = {name: (v.shape, v.dtype) for name, v in outputs.items()} if plain else None
            return outputs
        binding = session.io_binding()
        for name, value in fed.items():
            binding.bind_input(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
        outputs = {name: self._buffers.take(*place) for name, place in places.items()}
        for name, value in outputs.items():
            binding.bind_output(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
        try:
            session.run_with_iobinding(binding, quiet())
        except Exception:  # shapes that depend on the values: from now on the runtime brings the memory
            self._shapes[key] = None
            self.let_go(outputs, list(outputs))
            return self._outputs(index, session, fed)
        return outputs


def _opened(model: bytes, document: Document, arena: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = FATAL
    options.enable_cpu_mem_arena = arena  # many sessions at a time would each keep their working memory
    # Idle threads of one session would spin on the cores that the next one and the moments need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if document.folder is not None:
        options.add_session_config_entry(EXTERNAL_FOLDER, str(document.folder))
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own errors share no base class but this one
        raise BntoolsError(f"ONNX Runtime {ort.__version__} cannot load {document.name}: {brief(error)}") from error
