"""ONNX Runtime's execution providers: their names, their options, and why one is not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import onnxruntime as ort

from bntools.errors import BntoolsError

SHORT_NAMES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "dml": "DmlExecutionProvider",
}
CPU = SHORT_NAMES["cpu"]
# TF32 rounds the factors of a float32 product to 10 bits: a comparison would measure that.
OPTIONS = {SHORT_NAMES["cuda"]: {"use_tf32": "0"}}

Provider = str | tuple[str, Mapping[str, Any]]


def requested(providers: Sequence[Provider]) -> list[tuple[str, dict[str, str]]]:
    """The providers asked for as ONNX Runtime takes them: full names, and options with those given on top of ours.

    A provider is a name, short or full, or a pair of it and its options, as in ONNX Runtime itself:
    ``("cuda", {"use_tf32": 1})``. Raises BntoolsError for an empty list, an unknown name or what is neither.
    """
    asked = [providers] if isinstance(providers, str) or _is_pair(providers) else list(providers)
    if not asked:
        raise BntoolsError(f"no provider was asked for: name at least one of {', '.join(SHORT_NAMES)}")
    result = []
    for one in asked:
        pair: tuple[Any, Any] = one if _is_pair(one) else (one, {})  # type: ignore[assignment]
        name, options = pair
        if not isinstance(name, str):
            raise BntoolsError(
                f"found the provider {one!r}: expected a name, or a pair of a name and a dict of its options"
            )
        full = SHORT_NAMES.get(name.lower(), name)
        if full not in ort.get_all_providers():
            raise BntoolsError(
                f"unknown provider {name!r}: expected {', '.join(SHORT_NAMES)} or ONNX Runtime's full name of one"
            )
        given = {str(key): _text(value) for key, value in options.items()}
        result.append((full, {**OPTIONS.get(full, {}), **given}))
    return result


def full_names(providers: Sequence[Provider]) -> list[str]:
    """ONNX Runtime's names of providers given by short or full name. Raises BntoolsError as ``requested`` does."""
    return [name for name, _ in requested(providers)]


def available(providers: Sequence[Provider]) -> list[str]:
    """The full names of these providers; raises BntoolsError for one that this build of ONNX Runtime lacks."""
    wanted, known = full_names(providers), ort.get_available_providers()
    for provider in wanted:
        if provider not in known:
            raise BntoolsError(not_active(provider, f"this build of ONNX Runtime has only {', '.join(known)}"))
    return wanted


def not_active(provider: str, reason: str) -> str:
    """The message for a provider that was asked for and does not run: the reason, and what to do."""
    message = f"provider {short(provider)!r} ({provider}) was asked for and is not active in ONNX Runtime "
    message += f"{ort.__version__}: {reason.strip().rstrip('.')}"
    wheels = installed_wheels()
    if len(wheels) > 1:
        message += (
            f". {' and '.join(wheels)} are installed at once and overwrite each other's files: "
            f"uninstall both, then install the one that has the provider"
        )
    elif provider in (SHORT_NAMES["cuda"], SHORT_NAMES["tensorrt"]) and wheels == ["onnxruntime"]:
        message += ". It comes with onnxruntime-gpu: pip uninstall onnxruntime, then pip install onnxruntime-gpu"
    return message


def short(provider: str) -> str:
    """The short name of a provider, its full one where there is none."""
    return next((name for name, full in SHORT_NAMES.items() if full == provider), provider)


def installed_wheels() -> list[str]:
    """Which of the packages that provide ``onnxruntime`` are installed, by distribution name."""
    names = {(dist.metadata["Name"] or "").lower() for dist in metadata.distributions()}
    return sorted(name for name in names if name == "onnxruntime" or name.startswith("onnxruntime-"))


def _is_pair(one: Any) -> bool:
    return isinstance(one, (tuple, list)) and len(one) == 2 and isinstance(one[1], Mapping)


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)
