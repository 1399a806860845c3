"""Looking into a ``.pt2`` archive before PyTorch loads it.

``torch.export.load`` trusts its input: it falls back to the full unpickler, loads compiled code, parses
expressions with sympy's ``sympify`` (an ``eval``), looks operators up by any dotted path under
``torch`` and generates Python source that contains names from the file
(torch/_export/serde/serialize.py and torch/export/pt2_archive/_package.py). So everything in the
archive that could become code is checked here, and what is not plainly a program of PyTorch
operators is refused by name.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload

from bntools.backends.torch.pickles import check_sizes, check_text, scanned
from bntools.errors import BntoolsError

NAME = re.compile(r"[\w.+\-/#:]*")
SCALAR_FUNCTION = re.compile(r"(math\.(trunc|ceil|floor|sqrt)|torch\.(_sym_sqrt|sym_\w+))")
OPERATOR = re.compile(
    r"_operator\.(eq|ne|le|ge|lt|gt|neg|pos|mul|add|sub|floordiv|mod|pow|truediv|and_|or_|lshift|rshift|not_|getitem)"
)
HIGHER_ORDER = ("wrap_with_set_grad_enabled", "wrap_with_autocast", "cond", "map_impl", "while_loop", "scan")
EXPRESSION_CALL = re.compile(
    r"Symbol|Integer|Float|Rational|Add|Mul|Pow|Abs|Piecewise|floor|ceiling|Max|Min|Mod|Eq|Ne|Lt|Le|Gt|Ge|Not|And|Or"
    r"|PythonMod|FloorDiv|CeilDiv|CleanDiv|ModularIndexing|Where|PowByNatural|FloatPow|FloatTrueDiv|IntTrueDiv|ToFloat"
    r"|CeilToInt|FloorToInt|TruncToInt|Identity|StrictLessThan|LessThan|StrictGreaterThan|GreaterThan|Equality|Unequality"
)
EXPRESSION_TEXT = re.compile(r"[A-Za-z]\w*|[-+\d.eE]+")  # the name of a symbol, or a number
EXPRESSION_NODES = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Name, ast.Constant, ast.Subscript, ast.Call,
    ast.Attribute, ast.keyword, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context,
)  # fmt: skip
FILE_ARGUMENTS = ("filename", "path")
OPAQUE = ("custom_obj", "opaque_obj")


def check(path: str) -> None:
    """Refuse an exported program whose loading or running could do anything but compute.

    Raises BntoolsError naming what is not admitted.
    """
    with open(path, "rb") as file:
        check_sizes(path, file)
    with zipfile.ZipFile(path) as archive:
        if any("serialized_" in name for name in archive.namelist()):
            raise BntoolsError(f"{path}: an exported program in the format of PyTorch 2.7 or older; save it again")
    try:
        reader = torch._C.PyTorchFileReader(path)
        for name in reader.get_all_records():
            if problem := _problem(path, name, reader):
                raise BntoolsError(f"{path}: not loaded, because {problem}; export the model again and save that")
    except (RuntimeError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        # Its JSON may be anything: what is not where it belongs means the same as what is cut off.
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise BntoolsError(f"{path}: damaged or truncated: {said}") from error


def _problem(path: str, name: str, reader: Any) -> str | None:
    """What is wrong with one record of the archive."""
    if name.startswith("data/aotinductor/"):
        return f"it holds compiled code ({name})"
    if name.endswith(".pt"):
        return _pickle_problem(path, name, reader.get_record(name))
    if name.endswith("_config.json"):
        return _payload_problem(_json(path, name, reader))
    if name.startswith("models/"):
        return next(_program_problems(_json(path, name, reader), ""), None)
    return None


def _json(path: str, name: str, reader: Any) -> Any:
    content = reader.get_record(name)
    check_text(path, name, content)
    return json.loads(content)


def _pickle_problem(path: str, name: str, data: bytes) -> str | None:
    if not data:
        return None
    try:
        scanned(path, io.BytesIO(data))
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        # Whatever it is: what the restricted unpickler does not take, torch.export.load would execute.
        return f"its record {name} is a pickle of more than tensors ({str(error).splitlines()[0]})"
    return None


def _payload_problem(config: Any) -> str | None:
    for name, payload in config["config"].items():
        if payload["use_pickle"] or payload["path_name"].startswith(OPAQUE):
            return f"its constant {name!r} is a pickled object"
    return None


def _program_problems(value: Any, key: str) -> Iterator[str]:
    if isinstance(value, dict):
        if "target" in value and "inputs" in value:
            yield from _target_problems(value["target"])
        for inner, item in value.items():
            yield from _name_problems(inner)
            if inner not in ("metadata", "as_string"):  # kept as text: neither evaluated nor put into source
                yield from _program_problems(item, inner)
    elif isinstance(value, list):
        for item in value:
            yield from _program_problems(item, key)
    elif isinstance(value, str) and key in ("expr_str", "guards_code"):
        if not harmless(value):
            yield f"it holds the expression {value[:80]!r}"
    elif isinstance(value, str):
        yield from _name_problems(value)


def _name_problems(text: str) -> Iterator[str]:
    """Names end up in generated source. The layout of inputs and outputs is JSON inside the JSON."""
    if NAME.fullmatch(text):
        return
    try:
        inner = json.loads(text)
    except ValueError:
        yield f"it holds the name {text[:80]!r}"
    else:
        yield from _program_problems(inner, "")


def _target_problems(target: str) -> Iterator[str]:
    if OPERATOR.fullmatch(target) or SCALAR_FUNCTION.fullmatch(target):
        return
    found = _operator(target)
    if isinstance(found, OpOverload) and not any(a.name in FILE_ARGUMENTS for a in found._schema.arguments):
        return
    if isinstance(found, HigherOrderOperator) and found.name() in HIGHER_ORDER:
        return
    yield f"it calls {target!r}, which is no operator known here (import the library that defines it first)"


def _operator(target: str) -> Any:
    parts = target.split(".")
    if parts[:2] != ["torch", "ops"] or len(parts) < 4:
        return None
    try:
        return reduce(getattr, parts[2:], torch.ops)
    except AttributeError:
        return None


def harmless(expression: str) -> bool:
    """Whether an expression only computes with sizes: no attribute but ``size``, no call but arithmetic."""
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError):
        return False
    return all(_harmless_node(node) for node in ast.walk(tree))


def _harmless_node(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr == "size"
    if isinstance(node, ast.Call):
        plain = isinstance(node.func, ast.Name) and bool(EXPRESSION_CALL.fullmatch(node.func.id))
        return plain or (isinstance(node.func, ast.Attribute) and not node.args and not node.keywords)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return EXPRESSION_TEXT.fullmatch(node.value) is not None  # sympy would evaluate it in turn
    if isinstance(node, ast.Name):
        return not node.id.startswith("__")
    return isinstance(node, EXPRESSION_NODES)
