"""Records what transformers says of the configurations in `configs/`, for the Rust tests to compare with.

Run by hand from this folder, with torch and transformers 5 installed; it needs neither network nor GPU:

    HF_HUB_OFFLINE=1 python record_parameters.py [NAME ...]

Every model is built on the meta device, so that nothing is allocated. Names and shapes are those that
`save_pretrained` would write: transformers' own conversion is reverted (it fuses experts in memory), and tied
weights are left out. The result goes to `parameters/NAME.json`:

    total, count   elements and tensors of the language model
    digest         FNV-1a (64 bit) over the lines "name d0,d1\\n", sorted by name
    tensors        name -> shape of what is outside layers, of layer 0 and of the last layer (expert 0 only)
    layers         [mixer, window or null, cache elements a token], one entry for each run of equal layers,
                   preceded by how many layers the run has
    roles          elements of routed experts, of shared experts and dense MLPs, of everything inside attention

The cache elements come from the rows of the key and value projections, not from the configuration; windows from
the cache that transformers makes for `generate()`.
A model that has parts for other modalities is recorded without them.
"""

import itertools
import json
import pathlib
import re
import sys

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
)
from transformers.core_model_loading import revert_weight_conversion

HERE = pathlib.Path(__file__).parent
ATTENTION = re.compile(r"\.(self_attn|attention|self_attention|attn|linear_attn|mamba|mixer)$")
OTHER_MODALITIES = re.compile(r"vision_tower|vision_model|multi_modal_projector")


def fnv1a(text):
    state = 0xCBF29CE484222325
    for byte in text.encode():
        state = (state ^ byte) * 0x100000001B3 % 2**64
    return f"{state:016x}"


def build(config):
    with torch.device("meta"):
        if hasattr(config, "vision_config"):
            return AutoModelForImageTextToText.from_config(config)
        return AutoModelForCausalLM.from_config(config)


def saved(model):
    """What `save_pretrained` would write: name -> shape."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        for name in model._tied_weights_keys or {}:
            state.pop(name, None)
    state = revert_weight_conversion(model, state)
    return {n: list(t.shape) for n, t in sorted(state.items()) if not OTHER_MODALITIES.search(n)}


def rows(module, *names):
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    return None


def mixers(model):
    """(mixer, window, cache elements a token) of each layer, from the modules and the cache of generate()."""
    found = {}
    recurrent = ("linear_attn", "mamba", "mixer")
    # Mamba keeps a cache of a class of its own.
    only_recurrent = any(name.endswith(".mixer") for name, _ in model.named_modules())
    cached = [] if only_recurrent else DynamicCache(config=model.config).layers
    for name, module in model.named_modules():
        if OTHER_MODALITIES.search(name) or not ATTENTION.search(name):
            continue
        layer = int(re.search(r"\.(\d+)\.", name).group(1))
        leaf = name.rsplit(".", 1)[1]
        window = getattr(cached[layer], "sliding_window", None) if layer < len(cached) else None
        if leaf in recurrent:
            found[layer] = ("recurrent", None, 0)
        elif hasattr(module, "kv_a_proj_with_mqa"):
            found[layer] = ("latent", None, module.kv_a_proj_with_mqa.out_features)
        elif hasattr(module, "k_proj"):
            found[layer] = ("attention", window, module.k_proj.out_features + module.v_proj.out_features)
        elif hasattr(module, "c_attn"):
            found[layer] = ("attention", window, module.c_attn.nf - module.c_proj.nx)
        else:
            fused = rows(module, "qkv_proj", "query_key_value")
            out = rows(module, "o_proj", "dense")
            found[layer] = ("attention", window, fused.out_features - out.in_features)
    return [list(found[i]) for i in sorted(found)]


def elements(tensors, pattern):
    return sum(torch.Size(s).numel() for n, s in tensors.items() if re.search(pattern, n))


def record(path):
    raw = json.loads(path.read_text())
    config = AutoConfig.for_model(**{k: v for k, v in raw.items() if k != "architectures"})
    model = build(config)
    tensors = saved(model)
    layers = mixers(model)
    last = len(layers) - 1

    def shown(name):
        layer = re.search(r"\.(\d+)\.", name)
        expert = re.search(r"experts\.(\d+)\.", name)
        return not (layer and int(layer.group(1)) not in (0, last)) and not (
            expert and expert.group(1) != "0"
        )

    runs = [[len(list(g)), *k] for k, g in itertools.groupby(layers)]
    return {
        "transformers": transformers.__version__,
        "total": sum(torch.Size(s).numel() for s in tensors.values()),
        "count": len(tensors),
        "digest": fnv1a("".join(f"{n} {','.join(map(str, s))}\n" for n, s in tensors.items())),
        "layers": runs,
        "roles": {
            "experts": elements(tensors, r"\.experts\."),
            "mlp": elements(tensors, r"\.(mlp|feed_forward|block_sparse_moe)\.(?!experts\.)"),
            "attention": elements(tensors, r"\.(self_attn|attention|self_attention|attn)\."),
        },
        "tensors": {n: s for n, s in tensors.items() if shown(n)},
    }


def main():
    wanted = sys.argv[1:]
    for path in sorted((HERE / "configs").glob("*.json")):
        if wanted and path.stem not in wanted:
            continue
        result = record(path)
        text = json.dumps(result)
        # One tensor a line reads well in a diff and stays small.
        text = re.sub(r'\], "', '],\n "', text.replace('"tensors": {', '"tensors": {\n '))
        (HERE / "parameters").mkdir(exist_ok=True)
        (HERE / "parameters" / f"{path.stem}.json").write_text(text + "\n")
        sys.stdout.write(f"{path.stem}: {result['total']:,} in {result['count']} tensors\n")


if __name__ == "__main__":
    main()
