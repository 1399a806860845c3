"""Reading .onnx files that are broken or hostile."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from bntools import BntoolsError
from bntools.backends.onnx import predict
from bntools.backends.onnx.protobuf import check, external_files, read, serialized


@pytest.fixture
def path(tmp_path):
    """A model in a folder of its own, whose weights lie in a file beside it."""
    weight = onnx.numpy_helper.from_array(np.arange(400, dtype=np.float32), "weight")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [400]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "weight"], ["y"])], "g", values[:1], values[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    folder = tmp_path / "folder"
    folder.mkdir()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.data", size_threshold=0)
    return folder / "model.onnx"


def redirect(path, location):
    """Rewrite where the file says that its weights lie."""
    model = onnx.load(path, load_external_data=False)
    entry = next(entry for entry in model.graph.initializer[0].external_data if entry.key == "location")
    entry.value = location
    path.write_bytes(model.SerializeToString())


def test_external_weights_run(path):
    """Weights in a file beside the model are used."""
    zeros = np.zeros(400, np.float32)
    assert np.array_equal(predict(path, zeros)["y"], np.arange(400))
    assert external_files(path) == {"model.data"}


@pytest.mark.parametrize("location", ["../model.data", "/etc/passwd", "sub/../../model.data", "", "link"])
def test_external_weights_outside_the_folder(path, location):
    """Weights said to lie outside the model's folder are refused, also through a link, before anything is read."""
    (path.parent.parent / "model.data").write_bytes((path.parent / "model.data").read_bytes())
    (path.parent / "link").symlink_to(path.parent.parent / "model.data")
    redirect(path, location)
    with pytest.raises(BntoolsError, match=r"'weight' are said to lie in .*, outside its folder: refused"):
        predict(path, np.zeros(400))


def test_external_weights_inside_a_node(path):
    """Weights of a constant inside a subgraph are checked like any other."""
    outside = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="../secret")
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=outside)], "inner", [], [])
    model = onnx.load(path)
    model.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=inner, else_branch=inner))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BntoolsError, match=r"'hidden' are said to lie in '../secret'"):
        read(path)


def test_external_weights_missing(path):
    """Weights that are not there are named."""
    (path.parent / "model.data").unlink()
    with pytest.raises(BntoolsError, match=r"the weights of 'weight' lie in 'model.data', which is not there"):
        read(path)
    assert external_files(path) == set()


def test_model_without_its_weights(path):
    """A model in memory whose external weights were not loaded is refused, with what to do."""
    with pytest.raises(BntoolsError, match="lie in external files and are not loaded"):
        serialized(onnx.load(path, load_external_data=False))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no graph"),
        (b"just some text, no protobuf at all", "not an ONNX model"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not an ONNX model"),
        ("half", "not an ONNX model"),
    ],
    ids=["empty", "text", "image", "truncated"],
)
def test_no_model(path, content, words):
    """An empty, foreign or truncated file is one error that names it."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(BntoolsError, match=words) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_missing_and_folder(tmp_path):
    """A file that is not there and a folder are errors with the system's reason."""
    with pytest.raises(BntoolsError, match="cannot be read: No such file"):
        read(tmp_path / "nothing.onnx")
    with pytest.raises(BntoolsError, match="cannot be read: Is a directory"):
        read(tmp_path)


def test_checker(path):
    """What the checker of ONNX refuses is one error in one line."""
    check(path)
    model = onnx.load(path)
    model.graph.node[0].input[1] = "nowhere"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BntoolsError, match=r"the ONNX checker refuses model.onnx") as caught:
        check(path)
    assert "\n" not in str(caught.value)


def test_too_large(monkeypatch, path):
    """A model beyond what protobuf can hold is refused, with what to do."""

    class Huge:
        graph, functions = onnx.GraphProto(), ()

        def SerializeToString(self):
            raise ValueError("Message onnx.ModelProto exceeds maximum protobuf size of 2GB")

    with pytest.raises(BntoolsError, match="save it with external data"):
        serialized(Huge())
