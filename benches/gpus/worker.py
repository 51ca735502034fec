"""A process that measures what it is asked for: a line of JSON in, a line of JSON out."""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any


def _side(spec: dict[str, Any]) -> Any:
    import torch  # noqa: PLC0415  after the answers have a place of their own

    torch.set_num_threads(4)
    devices = spec["devices"]
    if spec["kind"] == "one":
        from .one_process import OneProcess  # noqa: PLC0415

        return OneProcess(devices)
    from .rank_process import RankProcess  # noqa: PLC0415

    return RankProcess(spec["rank"], devices, spec["meeting"])


def main() -> None:
    """Answer until the input ends."""
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    spec = json.loads(sys.argv[1])
    try:
        side = _side(spec)
        from .timing import warm  # noqa: PLC0415

        own = spec["devices"] if spec["kind"] == "one" else [spec["devices"][spec["rank"]]]
        warm(own)
    except Exception as error:  # noqa: BLE001  said in the table
        traceback.print_exc()
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    answer({"ready": True})
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "end":
            break
        try:
            answer({"us": side.measure(command)})
        except Exception as error:  # noqa: BLE001  said in the table
            traceback.print_exc()
            answer({"error": f"{type(error).__name__}: {error}"})
    side.close()


if __name__ == "__main__":
    main()
