"""Which architectures run over ranks of a GPU: `python tests/python/models/try_on_gpu.py --out FILE`.

Every causal language model of the installed transformers is built small with random weights, saved, and
loaded over two ranks of one GPU, without recorded steps and with them. `table.py --gpu FILE` beside this puts
what came out into docs/architectures.md, on any machine. Types work in processes of their own, several at
once; the file is written anew after each. Names after the options limit the run to these types.
"""

import argparse
import datetime as dt
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Types take turns on the cores, not on threads of one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers
from architectures import NOT_BUILT, everything
from on_devices import COLUMNS, trials
from workers import Workers

from tp_rs.integrations.transformers.captured_types import CAPTURED
from tp_rs.integrations.transformers.verified import VERIFIED

_OVER = {"not reached": {"outcome": "not reached"}}


def serve(pipe, device):
    """Try one type after the other for `Workers`."""
    _quiet()
    pipe.send(None)
    while True:
        name = pipe.recv()
        for column, found in trials(name, device):
            pipe.send((column, found))
        if torch.device(device).type == "cuda":
            # After an error of the device nothing works in its process any more; then this one ends here.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        pipe.send(None)


def _quiet():
    warnings.simplefilter("ignore")
    log = logging.getLogger("tp_rs.transformers")
    # Reasons are read from it, and stderr is for progress.
    log.propagate = False
    log.addHandler(logging.NullHandler())
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def tried(names, device, *, count, each, seconds, keep):
    """The outcomes of types, {name: {column: outcome}}.

    Args:
        names: The types.
        device: Where both ranks of each are.
        count: Types at once.
        each: Seconds that one may take; then its process is ended, and what it had is kept.
        seconds: Seconds for all of them.
        keep: Called with a name and all that there is, whenever there is something new.
    """
    found = {name: {} for name in names}
    for name in set(names) & set(NOT_BUILT):
        found[name] = {column: {"outcome": "not run", "reason": NOT_BUILT[name]} for column in COLUMNS}
    tasks = sorted((name for name in names if not found[name]), key=_importance)
    for name, column, said in Workers(serve, (device,), count, each, seconds).run(tasks):
        if column is not None:
            found[name][column] = said
        for missing in COLUMNS if column is None else ():
            found[name].setdefault(missing, _OVER.get(said, {"outcome": "failed", "reason": said}))
        keep(name, found)
    return found


def _importance(name):
    # What is not reached should be what few people have.
    return name not in CAPTURED, name not in VERIFIED, name


def made_with(device):
    """What a reader has to know of a run, beside its results."""
    return {
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
    }


def write(file, made, found):
    """Replace a file at once, so that it is whole whenever the run ends."""
    beside = file.with_name(f"{file.name}.part")
    beside.write_text(json.dumps({"made": made, "types": found}, indent=1) + "\n", encoding="utf-8")
    beside.replace(file)


def main():
    """Try the types, and write what came out; returns 1 where a type fails or says something else."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="JSON with the results")
    parser.add_argument("--device", default="cuda:0", help="where all ranks are (cuda:0)")
    parser.add_argument("--workers", metavar="N", type=int, default=8, help="types at once (8)")
    parser.add_argument("--each", metavar="S", type=float, default=45, help="seconds a type may take (45)")
    parser.add_argument("--seconds", metavar="S", type=float, default=600, help="seconds in all (600)")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(everything()))
    if unknown:
        parser.error(f"no causal types of transformers: {', '.join(unknown)}")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"{options.device}: torch sees no GPU")
    begin = time.monotonic()
    made = made_with(options.device)

    def keep(name, found):
        write(options.out, made, found)
        done = sum(len(columns) == len(COLUMNS) for columns in found.values())
        outcomes = ", ".join(f"{column} {each['outcome']}" for column, each in found[name].items())
        sys.stderr.write(f"{time.monotonic() - begin:5.0f} s {done:3}/{len(found)} {name}: {outcomes}\n")

    found = tried(
        options.names or everything(),
        options.device,
        count=options.workers,
        each=options.each,
        seconds=options.seconds,
        keep=keep,
    )
    write(options.out, {**made, "seconds": round(time.monotonic() - begin)}, found)
    return int(any(each["outcome"] in {"wrong", "failed"} for one in found.values() for each in one.values()))


if __name__ == "__main__":
    sys.exit(main())
