"""The architectures of every run stand for all: no style of a shipped plan is left to the sweep alone."""

from architectures import REPRESENTATIVE, planned
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def styles(name):
    """The styles in the plans of a type and of the configurations inside it."""
    kind = CONFIG_MAPPING[name]
    kinds = [kind, *kind.sub_configs.values()]
    plans = [getattr(each, plan, None) or {} for each in kinds for plan in _PLANS]
    return {style for plan in plans for style in plan.values()}


_PLANS = ("base_model_tp_plan", "base_model_ep_plan")


def test_every_style_is_among_them():
    everywhere = set().union(*map(styles, planned()))
    assert len(everywhere) > 5
    missing = everywhere - set().union(*map(styles, REPRESENTATIVE))
    holders = {style: [name for name in planned() if style in styles(name)] for style in missing}
    assert not missing, f"add one of each to REPRESENTATIVE: {holders}"


def test_they_exist():
    assert set(REPRESENTATIVE) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert len(set(REPRESENTATIVE)) == len(REPRESENTATIVE)
