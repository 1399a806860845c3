"""ONNX Runtime sessions: the provider that was asked for, or an error with the runtime's reason."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path

import onnxruntime as ort
from onnx import TensorProto, helper

from bntools.errors import BntoolsError
from bntools.noise import brief, caught

SHORT_NAMES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "dml": "DmlExecutionProvider",
}
# TF32 rounds the factors of a float32 product to 10 bits: a comparison would measure that.
PROVIDER_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}
ERRORS, FATAL = 3, 4  # log severities; an error that is raised needs no second line on stderr
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"


def open_session(
    source: str | bytes, name: str, providers: Sequence[str], *, optimize: bool, folder: Path | None = None
) -> ort.InferenceSession:
    """A session on a model file or its bytes, on exactly the providers asked for.

    ``optimize`` is ONNX Runtime's default level of graph optimizations, or none. ``folder`` is where
    the external weights of a model given as bytes lie. Raises BntoolsError where the runtime refuses the
    model, or where a provider is not active in the session: there is no fallback.
    """
    wanted = full_names(providers)
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    only_cpu = wanted == [SHORT_NAMES["cpu"]]
    options.log_severity_level = FATAL if only_cpu else ERRORS
    if folder is not None:
        options.add_session_config_entry(EXTERNAL_FOLDER, str(folder))
    known = ort.get_available_providers()
    for provider in wanted:
        if provider not in known:
            raise BntoolsError(_not_active(provider, f"this build of ONNX Runtime has only {', '.join(known)}"))
    # A provider that fails to load is only reported on the process's stderr, and the session goes on without it.
    with nullcontext(str) if only_cpu else caught(native=True) as said:
        session = _create(source, name, options, wanted)
    active = session.get_providers()
    for provider in wanted:
        if provider not in active:
            raise BntoolsError(_not_active(provider, said() or f"the session runs {', '.join(active)}"))
    session.disable_fallback()
    return session


def require(providers: Sequence[str]) -> None:
    """Raise BntoolsError unless a session on these providers can be had, before any other work."""
    if full_names(providers) != [SHORT_NAMES["cpu"]]:
        open_session(_smallest_model(), "a model of one node", providers, optimize=True)


def _smallest_model() -> bytes:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "smallest", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return model.SerializeToString()


def full_names(providers: Sequence[str]) -> list[str]:
    """ONNX Runtime's names of providers given by short or full name.

    Raises BntoolsError for an empty list or an unknown name.
    """
    names = [providers] if isinstance(providers, str) else list(providers)
    if not names:
        raise BntoolsError(f"no provider was asked for: name at least one of {', '.join(SHORT_NAMES)}")
    full = [SHORT_NAMES.get(name.lower(), name) for name in names]
    for name, provider in zip(names, full, strict=True):
        if provider not in ort.get_all_providers():
            raise BntoolsError(
                f"unknown provider {name!r}: expected {', '.join(SHORT_NAMES)} or ONNX Runtime's full name of one"
            )
    return full


def _create(source: str | bytes, name: str, options: ort.SessionOptions, wanted: list[str]) -> ort.InferenceSession:
    requested = [(provider, PROVIDER_OPTIONS.get(provider, {})) for provider in wanted]
    try:
        return ort.InferenceSession(source, options, providers=requested, enable_fallback=0)
    except Exception as error:  # the runtime's own errors share no base class but this one
        lacks = "NOT_IMPLEMENTED" in str(error) or "Type Error" in str(error)
        remedy = f" ({wanted[0]} lacks this operator in this dtype: try float32, or another provider)" if lacks else ""
        raise BntoolsError(f"ONNX Runtime {ort.__version__} cannot load {name}: {brief(error)}{remedy}") from error


def _not_active(provider: str, reason: str) -> str:
    short = next((short for short, full in SHORT_NAMES.items() if full == provider), provider)
    message = f"provider {short!r} ({provider}) was asked for and is not active in ONNX Runtime {ort.__version__}: "
    message += reason.strip().rstrip(".")
    wheels = installed_wheels()
    if len(wheels) > 1:
        message += (
            f". {' and '.join(wheels)} are installed at once and overwrite each other's files: "
            f"uninstall both, then install the one that has the provider"
        )
    elif provider in (SHORT_NAMES["cuda"], SHORT_NAMES["tensorrt"]) and wheels == ["onnxruntime"]:
        message += ". It comes with onnxruntime-gpu: pip uninstall onnxruntime, then pip install onnxruntime-gpu"
    return message


def installed_wheels() -> list[str]:
    """Which of the packages that provide ``onnxruntime`` are installed, by distribution name."""
    names = {(dist.metadata["Name"] or "").lower() for dist in metadata.distributions()}
    return sorted(name for name in names if name == "onnxruntime" or name.startswith("onnxruntime-"))


def quiet() -> ort.RunOptions:
    """Options of one run: what goes wrong is raised, not printed as well."""
    options = ort.RunOptions()
    options.log_severity_level = FATAL
    return options
