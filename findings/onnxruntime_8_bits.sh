#!/usr/bin/env bash
# onnxruntime (1.32.0) computes an 8-bit network otherwise on x86 processors without VNNI: it adds two products of an
# unsigned and a signed number in 16 bits, which saturate. No message says so. A session entry makes it exact; it is
# ignored, without a message too, where its name is misspelt. Here 64 products of 255 and 127 are added and divided by
# their exact sum: 1 is right, and saturated sums would give 0.51. A processor with VNNI prints 1 four times.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/setup.sh"
exec "$PYTHON" - <<'EOF'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from helper.runtime import processor

TERMS = 64
exact = TERMS * 255 * 127
values = {
    "weight": np.full((TERMS, 8), 127, np.int8),
    "one": np.float32(1),
    "step": np.float32(exact / 255),
    "zero": np.uint8(0),
    "signed_zero": np.int8(0),
}
nodes = [
    helper.make_node("DequantizeLinear", ["x", "one", "zero"], ["a"]),
    helper.make_node("DequantizeLinear", ["weight", "one", "signed_zero"], ["b"]),
    helper.make_node("MatMul", ["a", "b"], ["c"]),
    helper.make_node("QuantizeLinear", ["c", "step", "zero"], ["d"]),
    helper.make_node("DequantizeLinear", ["d", "step", "zero"], ["y"]),
]
graph = helper.make_graph(
    nodes,
    "products",
    [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, TERMS])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8])],
    [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
print(f"onnxruntime {onnxruntime.__version__} on {processor()}")
levels = onnxruntime.GraphOptimizationLevel
for what, entry, level in (
    ("as it comes", None, levels.ORT_ENABLE_ALL),
    ("session.x64quantprecision = 1", "session.x64quantprecision", levels.ORT_ENABLE_ALL),
    ("misspelt, session.x64quantprecison", "session.x64quantprecison", levels.ORT_ENABLE_ALL),
    ("in float32, without graph optimisations", None, levels.ORT_DISABLE_ALL),
):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    if entry is not None:
        options.add_session_config_entry(entry, "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.full((1, TERMS), 255, np.uint8)})
    print(f"{y[0, 0] / exact:.2f}  {what}")
EOF
