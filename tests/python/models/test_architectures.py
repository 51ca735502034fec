"""Every architecture: logits and greedy tokens over ranks are those of the whole model."""

import pytest
import torch
from architectures import GUESSES, NOT_BUILT, REPRESENTATIVE, built, everything

from tp_rs.errors import ModelError
from tp_rs.integrations.transformers import load, rules_mlp, selfcheck
from tp_rs.integrations.transformers.assemble import assemble, decide
from tp_rs.integrations.transformers.checkpoint import open_checkpoint
from tp_rs.integrations.transformers.layout import Guesses
from tp_rs.integrations.transformers.splits import Splits


def pytest_generate_tests(metafunc):
    if "architecture" in metafunc.fixturenames:
        everywhere = metafunc.config.getoption("--all-architectures", default=False)
        names = everything() if everywhere else REPRESENTATIVE
        metafunc.parametrize("architecture", [name for name in names if name not in NOT_BUILT])


def ranked(model, kv, splits=None, guesses=Guesses.ALL, **options):
    checkpoint = selfcheck.as_saved(model, model.dtype)
    splits = splits or selfcheck.uneven(model.config.get_text_config(), kv)
    skeleton, layout = decide(checkpoint, splits, len(kv), guesses)
    devices = [torch.device("cpu")] * len(kv)
    return assemble(checkpoint, skeleton, layout, devices, **options)


def greedy(model, ids, mask):
    result = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
        decoder_start_token_id=1,
        num_return_sequences=1,
        use_cache=getattr(model.config, "use_cache", True),
    )
    return result[:, ids.shape[1] :]


def difference(own, whole):
    return max((a - b).abs().max() for a, b in zip(own, whole, strict=True)) / whole[0].std()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_over_ranks_as_whole(architecture):
    model = built(architecture, seed=torch.seed() % 1000)
    guesses = GUESSES.get(architecture, Guesses.ALL)
    ids, mask = selfcheck.prompt(model)
    for kv in ([2, 1], [3, 0], [2, 1, 0]):
        off, same = over_ranks(model, kv, guesses, ids, mask)
        if off > selfcheck.TOLERANCE:
            # Random weights can make a model that enlarges rounding errors, or choose other experts for them.
            # Then float64 must agree.
            off, same = over_ranks(selfcheck.in_dtype(model, torch.float64), kv, guesses, ids, mask)
        assert off <= selfcheck.TOLERANCE, f"{kv}: off by {off:.1e} standard deviations"
        assert same, f"{kv}: other tokens"


def over_ranks(model, kv, guesses, ids, mask):
    front = ranked(model, kv, guesses=guesses)
    try:
        held = [sum(p.numel() for p in each.parameters()) for each in front.tp_rs_runner.models]
        assert max(held) < sum(p.numel() for p in model.parameters()), f"{kv}: a rank holds everything"
        off = difference(selfcheck.steps(front, ids, mask), selfcheck.steps(model, ids, mask))
        return off, torch.equal(greedy(front, ids, mask), greedy(model, ids, mask))
    finally:
        front.unload()


@pytest.mark.parametrize("multi_query", ["falcon", "gpt_bigcode"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_one_kv_head_on_several_ranks(multi_query):
    model = built(multi_query)
    ids, mask = selfcheck.prompt(model)
    base = selfcheck.uneven(model.config, [2, 1])
    splits = Splits(
        kv_split=[(0, 0, 1), (1, 0, 1)],
        q_split=[(0, 0, 4), (1, 4, 6)],
        id_split=base.id_split,
        vc_split=base.vc_split,
    )
    _, layout = decide(open_checkpoint(model, torch.float32), splits, 2)
    held = [[heads.queries for heads in each.ranks] for each in layout.attentions.values()]
    assert held == [[4, 2]] * model.config.num_hidden_layers
    front = ranked(model, [1, 1], splits)
    try:
        assert difference(selfcheck.steps(front, ids, mask), selfcheck.steps(model, ids, mask)) <= 1e-4
    finally:
        front.unload()


# Transposed weights, a bias that the file has under another name, wrapped layers, experts.
@pytest.mark.parametrize("unplanned", ["gpt2", "bert", "moshi", "granitemoe"])
def test_from_a_folder_without_a_plan(unplanned, tmp_path):
    model = built(unplanned)
    model.save_pretrained(tmp_path)
    ids, mask = selfcheck.prompt(model)
    front = load(tmp_path, plan=selfcheck.uneven(model.config, [2, 1]), devices=["cpu"] * 2)
    try:
        assert difference(selfcheck.steps(front, ids, mask), selfcheck.steps(model, ids, mask)) <= 1e-4
    finally:
        front.unload()


@pytest.fixture
def _forgetful(monkeypatch):
    monkeypatch.setattr(selfcheck, "_passed", {})


@pytest.mark.usefixtures("_forgetful")
class TestTheSelfCheck:
    """A layout that is wrong is not trusted."""

    def test_refuses_a_broken_rule_of_a_plan(self, monkeypatch):
        monkeypatch.setattr(rules_mlp, "_halves", lambda own, _total: own + own)
        model = built("phi3")
        with pytest.raises(ModelError, match=r"Phi3ForCausalLM.*off by .* standard deviations"):
            load(model, plan=selfcheck.uneven(model.config, [2, 1]), check=True)

    def test_leaves_what_it_guessed_wrongly_whole(self, monkeypatch, caplog):
        monkeypatch.setattr(rules_mlp, "_halves", lambda own, _total: own + own)
        model = built("modernbert-decoder")
        with caplog.at_level("WARNING", "tp_rs.transformers"):
            front = load(model, plan=selfcheck.uneven(model.config, [2, 1]), check=True)
        ids, mask = selfcheck.prompt(model)
        try:
            assert difference(selfcheck.steps(front, ids, mask), selfcheck.steps(model, ids, mask)) <= 1e-4
        finally:
            front.unload()
        assert "MLPs that no plan names stay whole" in caplog.text

    def test_leaves_attentions_whole_whose_heads_are_in_another_order(self):
        settled = selfcheck.settle(built("diffllama"), [[2, 1]])
        assert settled.guesses == Guesses.MLPS
        assert "attentions" in settled.reason
