"""Every architecture with a plan: logits and greedy tokens over ranks are those of the whole model."""

import torch
from architectures import REPRESENTATIVE, planned, small

from tp_rs.integrations.transformers import selfcheck
from tp_rs.integrations.transformers.assemble import assemble, decide
from tp_rs.integrations.transformers.checkpoint import open_checkpoint
from tp_rs.integrations.transformers.twin import make_twin

CANNOT_BUILD = {
    "llama4": "its wrapper's configuration is not the text model's",
    "qwen4_exp_text": "no small configuration of it was found",
}


def pytest_generate_tests(metafunc):
    if "architecture" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--all-architectures", default=False)
        names = planned() if everything else [name for name in REPRESENTATIVE if name in planned()]
        metafunc.parametrize("architecture", [name for name in names if name not in CANNOT_BUILD])


def ranked(model, kv, splits=None, **options):
    checkpoint = open_checkpoint(model, torch.float32)
    splits = splits or selfcheck.uneven(model.config.get_text_config(), kv)
    skeleton, layout = decide(checkpoint, splits, len(kv))
    devices = [torch.device("cpu")] * len(kv)
    return assemble(checkpoint, skeleton, layout, devices, **options)


def greedy(model, ids, mask):
    result = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    return result[:, ids.shape[1] :]


def test_over_ranks_as_whole(architecture):
    model = make_twin(small(architecture), seed=torch.seed() % 1000)
    ids, mask = selfcheck.prompt(model)
    whole, tokens = selfcheck.steps(model, ids, mask), greedy(model, ids, mask)
    scale = whole[0].std()
    for kv in ([2, 1], [3, 0], [2, 1, 0]):
        front = ranked(model, kv)
        try:
            own = selfcheck.steps(front, ids, mask)
            difference = max((a - b).abs().max() for a, b in zip(whole, own, strict=True)) / scale
            assert difference <= selfcheck.TOLERANCE, f"{kv}: off by {difference:.1e} standard deviations"
            assert torch.equal(greedy(front, ids, mask), tokens), kv
            held = [sum(p.numel() for p in each.parameters()) for each in front.tp_rs_runner.models]
            assert max(held) < sum(p.numel() for p in model.parameters()), f"{kv}: a rank holds everything"
        finally:
            front.unload()
