"""Records the tensor list of a GGUF file as the ``gguf`` package reads it: name, type, shape, bytes, block.

python tests/data/record_gguf.py MODEL.gguf > tests/data/smollm2_135m_gguf.json
"""

import json
import sys

from gguf import GGML_QUANT_SIZES, GGUFReader

reader = GGUFReader(sys.argv[1])
tensors = [
    [
        t.name,
        t.tensor_type.name,
        [int(n) for n in reversed(t.shape)],
        int(t.n_bytes),
        GGML_QUANT_SIZES[t.tensor_type][0],
    ]
    for t in reader.tensors
]
metadata = {
    key: field.contents()
    for key, field in reader.fields.items()
    if key.startswith("llama.") or key == "general.architecture"
}
json.dump({"metadata": metadata, "tensors": tensors}, sys.stdout, separators=(",", ":"))
print()
