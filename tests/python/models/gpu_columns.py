"""The columns of docs/architectures.md that come from a GPU: put beside those that are there already."""

import re
from collections import Counter

LONGEST = 90
FIRST = "| type |"
SECTION = "## On CUDA devices"
OUTCOMES = ("right", "not captured", "wrong", "failed", "not run", "not reached")
TITLES = {"eager": "CUDA eager", "captured": "CUDA captured"}
AFTER = "difference"
HEAD = """{section}

Made by `python tests/python/models/try_on_gpu.py --out FILE` on one {device} (torch {torch}, transformers
{transformers}, {date}) and put here by `python tests/python/models/table.py --gpu FILE`:

{counts}

Each type is the same kind of small model, saved and loaded by `tp_rs.load` over two ranks of one GPU, in
float32 without TF32, and compared with the whole model on that GPU. *CUDA eager* is with `capture=False`:
logits of a left-padded batch, of three steps after it, and {new} greedy tokens. *CUDA captured* is `generate`
as it is by itself, its steps recorded as CUDA graphs: tokens and their logits while steps are recorded and
when they run again, and the tokens of `generate_fast`. The number is the largest difference in standard
deviations of the logits. *No* says why steps are not used; the type then runs eager, with the right
tokens.{prompts}

## Types

"""
PROMPTS = """ *Prompts eager* means that
only steps of single tokens are recorded: {count} types, in float32."""


def merged(text, results, new):
    """The page with two columns more, or with new ones in their place.

    Args:
        text: The page.
        results: What `try_on_gpu.py` wrote.
        new: Greedy tokens that it compared.

    Raises:
        ValueError: The page has no table, or types of the results are not in it.
    """
    before, rows = _table(text)
    names = {row["type"] for row in rows}
    unknown = sorted(set(results["types"]) - names)
    if unknown:
        message = f"not in the table: {', '.join(unknown)}; make it anew first"
        raise ValueError(message)
    for row in rows:
        columns = results["types"].get(row["type"], {})
        for column, title in TITLES.items():
            row[title] = cell(columns.get(column, {"outcome": "not reached"}))
    order = [title for title in rows[0] if title not in TITLES.values()]
    place = order.index(AFTER) + 1
    order[place:place] = TITLES.values()
    lines = _lines(order, [[row[title] for title in order] for row in rows])
    return before + _head(results, names, new) + "\n".join(lines) + "\n"


def cell(found):
    """What the table says of an outcome."""
    reason = _short(found.get("reason", ""))
    if found["outcome"] == "right":
        said = f"{found['difference']:.0e}"
        said += ", in float64" if reason.startswith("in float64") else ""
        for what in ("prompts", "decoding"):
            why = found.get(f"without_{what}")
            said += f"; {what} eager: {_short(why)}" if why else ""
        return said
    words = {"not captured": "no", "wrong": "**wrong**", "failed": "**fails**"}
    said = words.get(found["outcome"], found["outcome"])
    return f"{said}: {reason}" if reason else said


def _short(reason):
    reason = " ".join(reason.split()).replace("|", "/")
    return reason if len(reason) <= LONGEST else f"{reason[:LONGEST]}…"


def _table(text):
    """What stands before the table or the section of GPUs, and the table's rows by their titles."""
    lines = text.splitlines()
    first = next((place for place, line in enumerate(lines) if line.startswith(FIRST)), None)
    if first is None:
        message = f"no table: wanted a line that begins with {FIRST}"
        raise ValueError(message)
    titles = _cells(lines[first])
    rows = [dict(zip(titles, _cells(line), strict=True)) for line in lines[first + 2 :] if line]
    before = text[: text.index(FIRST)]
    return before.partition(f"{SECTION}\n")[0], rows


def _cells(line):
    return [each.strip() for each in re.fullmatch(r"\|(.*)\|", line.strip()).group(1).split("|")]


def _lines(titles, rows):
    written = [f"| {' | '.join(cells)} |" for cells in (titles, *rows)]
    return [written[0], "|---" * len(titles) + "|", *written[1:]]


def _head(results, names, new):
    found = {
        column: Counter(
            results["types"].get(name, {}).get(column, {"outcome": "not reached"})["outcome"]
            for name in names
        )
        for column in TITLES
    }
    used = [each for each in OUTCOMES if any(counts[each] for counts in found.values())]
    rows = [
        [title, *(str(found[column][each]) for each in used), str(len(names))]
        for column, title in TITLES.items()
    ]
    eager = sum("without_prompts" in columns.get("captured", {}) for columns in results["types"].values())
    return HEAD.format(
        section=SECTION,
        counts="\n".join(_lines(["column", *used, "all"], rows)),
        new=new,
        prompts=PROMPTS.format(count=eager) if eager else "",
        **{name: results["made"][name] for name in ("device", "torch", "transformers", "date")},
    )
