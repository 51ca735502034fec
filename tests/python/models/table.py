"""Which architectures run over ranks: `python tests/python/models/table.py > docs/architectures.md`.

Every causal language model of the installed transformers is built small with random weights and run whole and
over ranks. With `--verified FILE` the types with a plan that agree are written where `load` looks them up,
with `--captured FILE` those that also run in steps of fixed shapes. `--gpu FILE` runs nothing: it puts what
try_on_gpu.py found on a GPU into docs/architectures.md, beside what is there.
Names after the options limit the table to these types.
"""

import argparse
import json
import logging
import os
import re
import sys
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import gpu_columns
import torch
import transformers
from architectures import NOT_BUILT, built, everything, plan_of
from on_devices import NEW
from transformers import PreTrainedModel

from tp_rs.errors import ModelError
from tp_rs.integrations.transformers import captured_check, captured_types, selfcheck
from tp_rs.integrations.transformers.assemble import decide
from tp_rs.integrations.transformers.checkpoint import open_checkpoint

SPLITS = ([2, 1], [3, 0], [2, 1, 0])
MOSTLY_WHOLE = 0.75
NOTICED = 0.05
LONGEST = 150
PAGE = Path(__file__).parents[3] / "docs" / "architectures.md"
STATES = ("sharded", "mostly whole", "refused", "not run")
HEAD = """# Architectures

transformers {version}, made by `python tests/python/models/table.py`. {total} causal language models:

{counts}

Each is a small random model in float32 with KV heads 2+1, 3+0 and 2+1+0, a left-padded batch, prefill and
decode. The difference is the largest one of logits to the whole model, in standard deviations; 1e-4 is
allowed. *Weights cut* is the share of the language model's weights that no rank holds whole; a tower for
images or sound stays whole on every rank and is not counted. Sizes are those of the small model, so shares
differ from a real one's. *Mostly whole* means that less than a quarter is cut: it runs, and saves little.

A plan is the architecture's own list of how its layers are cut: *text* where it is the plan of the wrapper's
text model, *experts* where it speaks of experts alone. A type without a full plan is cut by what its parts
are called, and `load` tries it on a small model with the choices of the real one before it is trusted. What
the trial shows to be cut wrongly stays whole, with a warning; a type that is wrong even so is refused. The
tower of `gemma3n` needs the package timm; without it that row says so.

| type | plan | state | weights cut | difference | what stays whole, or why it does not run |
|---|---|---|---|---|---|"""


def row(name):
    """What became of a type: (state, share of the weights that is cut, the largest difference, a reason)."""
    if name in NOT_BUILT:
        return "not run", "", "", NOT_BUILT[name]
    try:
        model = built(name)
    except ModelError as error:
        return "not run", "", "", str(error)
    try:
        settled = selfcheck.settle(model, SPLITS)
    except ModelError as error:
        return "refused", "", "", str(error)
    splits = selfcheck.uneven(model.config.get_text_config(), [2, 1])
    skeleton, layout = decide(open_checkpoint(model, torch.float32), splits, 2, settled.guesses)
    sizes = {
        key: parameter.numel()
        for key, parameter in skeleton.named_parameters()
        if key in layout.cuts or key.startswith(language(skeleton))
    }
    for tower in other_models(skeleton):
        sizes = {key: size for key, size in sizes.items() if not key.startswith(f"{tower}.")}
    share = sum(size for key, size in sizes.items() if key in layout.cuts) / sum(sizes.values())
    state = "sharded" if share > 1 - MOSTLY_WHOLE else "mostly whole"
    reasons = sorted({re.sub(r"[\w.]+\.\d+\.", "", reason) for reason in layout.whole.values()})
    if settled.reason:
        reasons.insert(0, settled.reason)
    whole = holders(skeleton, {key: size for key, size in sizes.items() if key not in layout.cuts})
    if whole:
        reasons.insert(0, ", ".join(whole))
    return state, f"{share:.0%}", f"{settled.difference:.0e}", "; ".join(reasons)


def language(model):
    """Where the names of the language model's parameters begin."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    names = [name for name, module in model.named_modules() if module is decoder]
    return names[0] if names and isinstance(decoder, PreTrainedModel) else ""


def other_models(model):
    """The parts of a wrapper that are no language model."""
    text = type(model.config.get_text_config())
    others = {kind for kind in model.config.sub_configs.values() if kind is not text}
    for name, module in model.named_modules():
        if name and isinstance(module, PreTrainedModel) and type(module.config) in others:
            yield name


def holders(model, whole):
    """The classes of the modules that hold most of what stays whole."""
    held = Counter()
    for key, size in whole.items():
        # A module of a layer says more than the linear layer in it.
        parts = key.split(".")
        layer = max((place for place, part in enumerate(parts) if part.isdigit()), default=len(parts) - 3)
        owner = ".".join(parts[: max(min(layer + 2, len(parts) - 1), 1)])
        held[type(model.get_submodule(owner)).__name__] += size
    total = sum(parameter.numel() for parameter in model.parameters())
    return [f"`{name}`" for name, size in held.most_common(2) if size > NOTICED * total]


def say(line):
    """Print one line."""
    sys.stdout.write(f"{line}\n")


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--verified", metavar="FILE", type=Path)
    parser.add_argument("--captured", metavar="FILE", type=Path)
    parser.add_argument("--gpu", metavar="FILE", type=Path)
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    if options.gpu is not None:
        results = json.loads(options.gpu.read_text(encoding="utf-8"))
        PAGE.write_text(gpu_columns.merged(PAGE.read_text(encoding="utf-8"), results, NEW), encoding="utf-8")
        return
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if options.captured is not None:
        write_captured(
            options.captured, [name for name in options.names or everything() if name not in NOT_BUILT]
        )
        return
    rows = []
    for name in options.names or everything():
        rows.append((name, plan_of(name), *row(name)))
        sys.stderr.write(f"{' '.join(rows[-1][:5])}\n")
    say(HEAD.format(version=transformers.__version__, total=len(rows), counts=counts(rows)))
    for name, plan, state, share, worst, reason in rows:
        text = " ".join(reason.split()).replace("|", "/")
        text = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
        say(f"| {name} | {plan} | {state} | {share} | {worst} | {text} |")
    if options.verified is not None:
        right = [name for name, plan, state, *_ in rows if plan in {"yes", "text"} and state in STATES[:2]]
        lines = "".join(f'        "{name}",\n' for name in right)
        options.verified.write_text(
            '"""Types that ran over ranks as whole; made by tests/python/models/table.py --verified."""\n'
            f"\nVERIFIED: frozenset[str] = frozenset(\n    {{\n{lines}    }}\n)\n",
            encoding="utf-8",
        )


def write_captured(file, names):
    """Write the types whose static steps give the whole model's logits, and whether attention may be ours."""
    settled = {}
    for name in names:
        try:
            settled[name] = captured_check.settle(built(name))
        except ModelError as error:
            settled[name] = str(error)
        sys.stderr.write(f"{name} {settled[name]}\n")
    lines = "".join(f'    "{name}": {own},\n' for name, own in settled.items() if isinstance(own, bool))
    head = (captured_types.__doc__ or "").rstrip("\n")
    file.write_text(f'"""{head}\n"""\n\nCAPTURED: dict[str, bool] = {{\n{lines}}}\n', encoding="utf-8")


def counts(rows):
    """How many types with a plan and without are in each state, as a table."""
    lines = ["| | " + " | ".join(STATES) + " | all |", "|---" * (len(STATES) + 2) + "|"]
    kinds = (("with a plan", {"yes", "text"}), ("without one, or of experts alone", {"experts", "no"}))
    for title, plans in kinds:
        found = Counter(state for _, plan, state, *_ in rows if plan in plans)
        each = " | ".join(str(found[state]) for state in STATES)
        lines.append(f"| {title} | {each} | {found.total()} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
