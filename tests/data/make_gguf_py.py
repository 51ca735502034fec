# /// script
# dependencies = ["gguf==0.19.0", "numpy"]
# ///
"""Writes gguf_py.gguf and gguf_py.json with the Python package gguf: a tensor of every type that it knows.

Run in this folder with `uv run --script make_gguf_py.py`. The tests compare what tp_rs reads with what gguf says.
"""

import json
from pathlib import Path

import gguf
import numpy as np

writer = gguf.GGUFWriter("gguf_py.gguf", "llama")
writer.add_block_count(2)
writer.add_context_length(2048)
writer.add_embedding_length(64)
writer.add_head_count([8, 4])
writer.add_head_count_kv([2, 1])
writer.add_rope_freq_base(10000.0)
writer.add_array("test.flags", [True, False, True])
writer.add_bool("test.yes", True)
writer.add_int8("test.i8", -8)
writer.add_uint8("test.u8", 200)
writer.add_int16("test.i16", -300)
writer.add_int64("test.i64", -(2**60))
writer.add_uint64("test.u64", 2**63)
writer.add_float64("test.f64", 0.1)
writer.add_token_list(["<s>", "</s>", "é"] + [f"t{i}" for i in range(100)])
writer.add_token_scores([0.5] * 103)
writer.add_string("general.name", "Fixture é")
writer.add_custom_alignment(64)
for name, tensor_type in gguf.GGMLQuantizationType.__members__.items():
    block, size = gguf.GGML_QUANT_SIZES[tensor_type]
    rows = np.zeros((3, 2 * size), dtype=np.uint8)
    writer.add_tensor(f"blk.{int(tensor_type)}.{name}", rows, raw_dtype=tensor_type)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

read = [
    [
        tensor.name,
        tensor.tensor_type.name,
        [int(size) for size in reversed(tensor.shape)],
        int(tensor.n_bytes),
        gguf.GGML_QUANT_SIZES[tensor.tensor_type][0],
    ]
    for tensor in gguf.GGUFReader("gguf_py.gguf").tensors
]
rows = ",\n".join("  " + json.dumps(row) for row in read)
Path("gguf_py.json").write_text(f"[\n{rows}\n]\n")
