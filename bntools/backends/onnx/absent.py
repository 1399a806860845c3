"""A graph without BatchNormalization: was it folded already?"""

from __future__ import annotations

from typing import Any

from bntools.backends.onnx.document import STANDARD, Document, all_nodes, opened

CONVOLUTIONS = {"Conv": 2, "ConvTranspose": 2, "ConvInteger": None, "QLinearConv": 8}  # op -> the place of its bias
OTHERS = ("InstanceNormalization", "GroupNormalization", "LayerNormalization")


def absence(model: Any) -> str:
    """What a model without BN layers has instead, in words: convolutions that carry a bias, other normalizations."""
    document: Document = opened(model)
    total = biased = 0
    others: set[str] = set()
    for root in (document.proto.graph, *document.proto.functions):
        for node in all_nodes(root):
            if node.domain not in STANDARD:
                continue
            if node.op_type in CONVOLUTIONS:
                place = CONVOLUTIONS[node.op_type]
                total += 1
                biased += place is not None and len(node.input) > place and bool(node.input[place])
            elif node.op_type in OTHERS:
                others.add(node.op_type)
    instead = f"; it normalizes by {', '.join(sorted(others))}, which keep no statistics" if others else ""
    if not total:
        return f"it has no convolutions either{instead}"
    if not biased:
        return f"none of its {total} convolutions carries a bias, so they were not folded{instead}"
    if others:
        return f"{biased} of {total} convolutions carry a bias{instead}"
    return f"{biased} of {total} convolutions carry a bias, so they were folded already, it seems"
