"""bntools.export of a model that is ONNX already."""

from __future__ import annotations

import onnx
import pytest
from listing import contents
from onnx import helper, numpy_helper
from onnx_files import images, keep, small

import bntools
from bntools import BntoolsError, VerificationError


def test_folded_verified_and_otherwise_as_it_was(tmp_path):
    """The file has no BN, verifies, and keeps opset, names, metadata and what nodes say about themselves."""
    model = small()
    model.graph.node[0].metadata_props.add(key="scope", value="stem")
    before = model.SerializeToString(deterministic=True)
    check = bntools.export(model, tmp_path / "out.onnx", images())
    assert check.passed
    assert (check.exporter, check.dynamic, check.folded, check.kept) == ("onnx", True, ["bn1", "bn2"], {})
    written = onnx.load(tmp_path / "out.onnx")
    assert {node.op_type for node in written.graph.node} == {"Conv", "Relu"}
    assert [(one.domain, one.version) for one in written.opset_import] == [("", 17)]
    assert [written.graph.input[0].name, written.graph.output[0].name] == ["image", "scores"]
    assert {"team", "bntools.folded"} <= {one.key for one in written.metadata_props}
    assert [one.value for one in written.graph.node[0].metadata_props] == ["stem"]
    assert model.SerializeToString(deterministic=True) == before


def test_another_opset_where_asked(tmp_path):
    """opset= converts, and node metadata survives the converter."""
    path = keep(small(), tmp_path / "model.onnx", external=True)
    model = onnx.load(path, load_external_data=False)
    model.graph.node[0].metadata_props.add(key="scope", value="stem")
    path.write_bytes(model.SerializeToString())
    check = bntools.export(path, tmp_path / "out.onnx", images(), opset=21)
    assert check.passed
    written = onnx.load(tmp_path / "out.onnx")
    assert written.opset_import[0].version == 21
    assert [one.value for one in written.graph.node[0].metadata_props] == ["stem"]
    with pytest.raises(BntoolsError, match="cannot be converted from opset 17 to opset 999"):
        bntools.export(path, tmp_path / "never.onnx", images(), opset=999)
    assert not (tmp_path / "never.onnx").exists()


def test_external_weights_stay_external(tmp_path):
    """The data file of the export has its own name; exporting again replaces it, and metadata is there once."""
    source = keep(small(), tmp_path / "model.onnx", external=True)
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "model.onnx"
    bntools.export(bntools.load(source), target, images())
    bntools.export(target, target, images())
    names = sorted(path.name for path in target.parent.iterdir())
    assert len(names) == 2
    assert set(names) == {"model.onnx"} | bntools.backends.backend("onnx").external_files(target)
    keys = [one.key for one in onnx.load(target).metadata_props]
    assert len(keys) == len(set(keys))


def test_a_fixed_batch_size_is_noted(tmp_path):
    """A file that is bound to its batch size is verified on that, which a note says."""
    check = bntools.export(small(batch=6), tmp_path / "out.onnx", images())
    assert not check.dynamic
    assert any("the batch size is fixed at 6" in note for note in check.notes)


@pytest.mark.parametrize("opset", [None, 21])
def test_functions_survive(opset, tmp_path):
    """A model-local function is in the exported file, and used, as is what the graph says of itself."""
    model = small()
    relu = helper.make_function(
        "team", "Act", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    model.functions.append(relu)
    model.opset_import.append(helper.make_opsetid("team", 1))
    model.graph.node[2].op_type, model.graph.node[2].domain = "Act", "team"
    model.graph.metadata_props.add(key="source", value="vision")
    assert bntools.export(model, tmp_path / "out.onnx", images(), opset=opset).passed
    written = onnx.load(tmp_path / "out.onnx")
    assert list(written.functions) == [relu]
    assert [(one.key, one.value) for one in written.graph.metadata_props] == [("source", "vision")]


def test_nothing_is_written_unless_it_verifies(tmp_path):
    """A file that misses the tolerance is not written, and neither is its data."""
    path = keep(small(), tmp_path / "model.onnx", external=True)
    before = contents(tmp_path)
    with pytest.raises(VerificationError, match="no file verified"):
        bntools.export(path, tmp_path / "out.onnx", images(), tolerance=1e-12)
    assert contents(tmp_path) == before


def test_the_example_above_is_not_trivial():
    """The model's BN layers change what goes through them: a fold that drops them cannot verify."""
    scale = numpy_helper.to_array(next(one for one in small().graph.initializer if one.name == "bn1.weight"))
    assert abs(scale - 1).max() > 0.1
