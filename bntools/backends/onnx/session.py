"""ONNX Runtime sessions: on the providers that were asked for, or an error with the runtime's reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from bntools.backends.onnx.providers import CPU, OPTIONS, Provider, available, full_names, not_active, requested, short
from bntools.errors import BntoolsError
from bntools.noise import brief, caught
from bntools.runner import Outputs

ERRORS, FATAL = 3, 4  # log severities; an error that is raised needs no second line on stderr
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
RECORD_PLACEMENT = "session.record_ep_graph_assignment_info"  # since ONNX Runtime 1.24; before, it has no effect
# What makes a session hold copies of the weights of a file, which it otherwise maps into memory: measured on
# 2.2 GB of Conv and BN, the peak was 2.2 times the file with these and 1.03 times without.
COPYING = ("ConvBNFusion", "ConvMulFusion", "ConvAddFusion", "MatMul_BatchNormalization_Fusion", "NchwcTransformer")
LEAN = {"session.disable_prepacking": "1", "optimization.disable_specified_optimizers": ";".join(COPYING)}
LACKING = re.compile(r"Could not find an implementation for \w+\((?P<since>\d+)\)")
OLDEST_OPSET = 7  # onnxruntime.ai/docs/reference/compatibility.html
SOURCE_PLACE = re.compile(r"/onnxruntime_src/[^\s:]+:\d+ [^(]*\(")  # a file, a line and the head of a signature
UNKNOWN_OPERATOR = (
    re.compile(r"Fatal error: (?P<domain>[^:\s]*):(?P<op>\w+)\(-?\d+\) is not a registered function/op"),
    re.compile(r"No Op registered for (?P<op>\S+) with domain_version of -?\d+"),
)


def open_session(
    source: str | bytes,
    name: str,
    providers: Sequence[Provider],
    *,
    optimize: bool,
    folder: Path | None = None,
    lean: bool = False,
    arena: bool = True,
    entries: Mapping[str, str] | None = None,
) -> ort.InferenceSession:
    """A session on a model file or its bytes, on exactly the providers asked for.

    ``optimize`` is ONNX Runtime's default level of graph optimizations, or none. ``folder`` is where
    the external weights of a model given as bytes lie. ``lean`` leaves out what copies weights,
    ``arena=False`` the memory that a session keeps for its next run; ``entries`` are further entries of its
    configuration. Raises
    BntoolsError where the runtime refuses the model, or where a provider is not active in the session: there
    is no fallback.
    """
    wanted = available(providers)
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    only_cpu = wanted == [CPU]
    options.log_severity_level = FATAL if only_cpu else ERRORS
    options.enable_cpu_mem_arena = arena
    every = {RECORD_PLACEMENT: "1", **(LEAN if lean else {}), **(entries or {})}
    if folder is not None:
        every[EXTERNAL_FOLDER] = str(folder)
    for key, value in every.items():
        options.add_session_config_entry(key, value)
    # A provider that fails to load is only reported on the process's stderr, and the session goes on without it.
    with nullcontext(str) if only_cpu else caught(native=True) as said:
        session = _create(source, name, options, requested(providers))
    active = session.get_providers()
    for provider in wanted:
        if provider not in active:
            raise BntoolsError(not_active(provider, said() or f"the session runs {', '.join(active)}"))
    session.disable_fallback()
    return session


def placement(session: ort.InferenceSession) -> dict[str, int]:
    """How many nodes each provider runs in a session; empty where this ONNX Runtime does not say (before 1.24)."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return {}
    counts: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] += len(part.get_nodes())
    return dict(counts)


def require_placed(placed: dict[str, int], providers: Sequence[Provider], name: str) -> None:
    """Raise BntoolsError where a session runs nodes, and none of them on the provider that was asked for first."""
    wanted = full_names(providers)[0]
    if placed and not placed.get(wanted):
        where = ", ".join(f"{count:,} on {provider}" for provider, count in placed.items())
        raise BntoolsError(
            f"provider {short(wanted)!r} ({wanted}) was asked for and active, but ONNX Runtime {ort.__version__} runs "
            f"no node of {name} on it ({where}): it supports none of them; ask for a provider that does"
        )


def require(providers: Sequence[Provider]) -> None:
    """Raise BntoolsError unless a session on these providers can be had, before any other work."""
    if requested(providers) != [(CPU, {})]:
        open_session(_smallest_model(), "a model of one node", providers, optimize=True)


def _smallest_model() -> bytes:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "smallest", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return model.SerializeToString()


def _create(
    source: str | bytes, name: str, options: ort.SessionOptions, wanted: list[tuple[str, dict[str, str]]]
) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(source, options, providers=wanted, enable_fallback=0)
    except Exception as error:  # the runtime's own errors share no base class but this one
        raise BntoolsError(_refused(name, str(error), wanted)) from error


def _refused(name: str, reason: str, wanted: list[tuple[str, dict[str, str]]]) -> str:
    for pattern in UNKNOWN_OPERATOR:
        if found := pattern.search(reason):
            domain = found.groupdict().get("domain") or "ai.onnx"
            return (
                f"{name} uses the operator {found['op']!r} of the domain {domain!r}, which ONNX Runtime "
                f"{ort.__version__} does not have: it cannot be run, only inspected"
            )
    message = f"ONNX Runtime {ort.__version__} cannot load {name}: {plain(reason)}"
    if (lacking := LACKING.search(reason)) and int(lacking["since"]) < OLDEST_OPSET:
        return (
            f"{message} (it is the operator as of opset {lacking['since']}, and ONNX Runtime serves opsets from "
            f"{OLDEST_OPSET} on: convert the model, with onnx.version_converter.convert_version)"
        )
    if lacking or "NOT_IMPLEMENTED" in reason or "Type Error" in reason:
        message += f" ({wanted[0][0]} lacks this operator in this dtype: try float32, or another provider)"
    if given := [f"{provider} {options}" for provider, options in wanted if options != OPTIONS.get(provider, {})]:
        message += f" (asked for with options: {', '.join(given)})"
    return message


def plain(reason: object) -> str:
    """What ONNX Runtime says went wrong, in one line, without the place in its C++ sources that may stand before it."""
    text = str(reason)
    if place := SOURCE_PLACE.search(text):
        depth, end = 1, place.end()
        while depth and end < len(text):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        text = text[: place.start()] + text[end:].removeprefix(" const").lstrip()
    return brief(text)


def computed(session: ort.InferenceSession, names: Sequence[str], fed: Mapping[str, np.ndarray], name: str) -> Outputs:
    """These outputs of a session by name; raises BntoolsError where the model, which messages call ``name``, fails."""
    try:
        values = session.run(list(names), dict(fed), quiet())
    except Exception as error:  # the runtime's own errors share no base class but this one
        raise BntoolsError(f"ONNX Runtime {ort.__version__} fails in {name}: {plain(error)}") from error
    return dict(zip(names, values, strict=True))


def quiet() -> ort.RunOptions:
    """Options of one run: what goes wrong is raised, not printed as well."""
    options = ort.RunOptions()
    options.log_severity_level = FATAL
    return options
