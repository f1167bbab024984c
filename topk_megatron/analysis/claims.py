"""Claims: a sentence, the numbers for it, and whether the interval of a difference says so."""

from typing import Any

from topk_megatron.analysis.measures import Interval


def row(name: str, interval: Interval | None) -> dict[str, Any]:
    """One number of a claim."""
    if interval is None:
        return {"name": name, "value": None, "low": None, "high": None, "n": 0}
    return {
        "name": name,
        "value": interval.value,
        "low": interval.low,
        "high": interval.high,
        "n": interval.n,
    }


def claim(
    command: str,
    identity: str,
    sentence: str,
    measure: str,
    unit: str,
    rows: list[dict[str, Any]],
    *,
    difference: tuple[str, Interval | None] | None = None,
    holds_if: str = "below",
    note: str = "",
) -> dict[str, Any]:
    """An entry of claims.json.

    Args:
        command: which subcommand made it.
        identity: its id.
        sentence: the claim.
        measure, unit: what the numbers are.
        rows: from `row`.
        difference: its name and interval; the claim stands or falls with it.
        holds_if: ``below`` or ``above``: on which side of 0 the interval must lie.
        note: what a reader should know.
    """
    holds: bool | None = None
    if difference is not None and difference[1] is not None:
        interval = difference[1]
        if interval.high < 0:
            holds = holds_if == "below"
        elif interval.low > 0:
            holds = holds_if == "above"
    entry = None
    if difference is not None:
        entry = {k: v for k, v in row(*difference).items() if k != "n"}
    return {
        "id": identity,
        "command": command,
        "claim": sentence,
        "measure": measure,
        "unit": unit,
        "rows": rows,
        "difference": entry,
        "holds": holds,
        "note": note,
    }
