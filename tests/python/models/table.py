"""Which architectures run over ranks: `python tests/python/models/table.py > docs/architectures.md`.

Every causal language model of the installed transformers is built small with random weights and run whole and
over ranks. With `--verified FILE` the types that agree are written where `load` looks them up.
"""

import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers
from architectures import planned, small
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tp_rs.integrations.transformers import selfcheck
from tp_rs.integrations.transformers.assemble import decide
from tp_rs.integrations.transformers.checkpoint import open_checkpoint
from tp_rs.integrations.transformers.twin import make_twin

SPLITS = ([2, 1], [3, 0], [2, 1, 0])
MOSTLY_WHOLE = 0.75
HEAD = """# Architectures

transformers {version}, made by `python {command}`.

Small random models in float32, KV heads 2+1, 3+0 and 2+1+0, left-padded batch, prefill and decode; the
difference is the largest one of logits to the whole model, in standard deviations. Types without a plan are
tried again when they are loaded.

| type | plan | state | weights cut | difference | what stays whole, or why not |
|---|---|---|---|---|---|"""


def row(name):
    """What became of a type: (state, what a rank of two holds at most, the largest difference, a reason)."""
    try:
        model = make_twin(small(name))
        if not all(torch.isfinite(each).all() for each in selfcheck.steps(model, *selfcheck.prompt(model))):
            return "not tried", "", "", "its small model gives no finite logits"
    except Exception as error:  # noqa: BLE001  foreign code, and the reason goes into the table
        return "not tried", "", "", f"no small model of it: {type(error).__name__}"
    try:
        differences = [selfcheck.compare(model, kv) for kv in SPLITS]
    except Exception as error:  # noqa: BLE001  as above
        return "refused", "", "", str(error).splitlines()[0][:90]
    splits = selfcheck.uneven(model.config.get_text_config(), [2, 1])
    skeleton, layout = decide(open_checkpoint(model, torch.float32), splits, 2)
    sizes = {key: parameter.numel() for key, parameter in skeleton.named_parameters()}
    cut = sum(size for key, size in sizes.items() if key in layout.cuts)
    share = cut / sum(sizes.values())
    worst = f"{max(differences):.0e}"
    if not max(differences) <= selfcheck.TOLERANCE:
        return "refused", f"{share:.0%}", worst, "other logits"
    reasons = "; ".join(sorted({reason.partition(":")[0] for reason in layout.whole.values()}))[:90]
    return ("sharded" if share > 1 - MOSTLY_WHOLE else "mostly whole"), f"{share:.0%}", worst, reasons


def say(line):
    """Print at once: the whole table takes a while."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main():
    """Print the table."""
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    plans = set(planned())
    names = sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING)
    if "--planned" in sys.argv:
        names = sorted(plans)
    verified = []
    say(HEAD.format(version=transformers.__version__, command="tests/python/models/table.py"))
    for name in names:
        state, share, worst, reason = row(name)
        plan = "yes" if name in plans else "no"
        say(f"| {name} | {plan} | {state} | {share} | {worst} | {reason} |")
        if name in plans and state in {"sharded", "mostly whole"}:
            verified.append(name)
    if "--verified" in sys.argv:
        lines = "".join(f'        "{name}",\n' for name in verified)
        Path(sys.argv[sys.argv.index("--verified") + 1]).write_text(
            '"""Types that ran over ranks as whole; made by tests/python/models/table.py --verified."""\n'
            f"\nVERIFIED: frozenset[str] = frozenset(\n    {{\n{lines}    }}\n)\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
