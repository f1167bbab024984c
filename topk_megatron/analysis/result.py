"""What a command of the analysis finds, and the one way in which it gets into a study.

Every command returns a `Result`: tables, claims and parameters. A claim is a sentence, the numbers
for it, and whether the interval of a difference supports it; docs/analysis.md gives its keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from topk_megatron.analysis.measures import Interval
from topk_megatron.analysis.tables import write_table
from topk_megatron.errors import AnalysisError
from topk_megatron.files import read_json, write_json

# The commands that write results, in the order in which a study lists their claims.
COMMANDS = ("entropy", "track", "steer", "sae")
Claim = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a command found.

    Attributes:
        tables: the tables by name; each becomes ``NAME.parquet``.
        claims: entries of claims.json, from `claim`.
        parameters: the content of parameters.json: the settings, and facts about the inputs.
    """

    tables: Mapping[str, pa.Table]
    claims: list[Claim]
    parameters: dict[str, Any]


def write_result(study: Path, command: str, result: Result) -> None:
    """Write a command's result into a study: tables, claims, and the parameters last.

    Each file is replaced in one step. The study's claims.json collects the claims of all commands.
    """
    directory = study / command
    write_tables(directory, result.tables)
    write_json(directory / "claims.json", result.claims)
    paths = [study / name / "claims.json" for name in COMMANDS]
    collected = [entry for path in paths if path.exists() for entry in _read_claims(path)]
    write_json(study / "claims.json", collected)
    write_json(directory / "parameters.json", result.parameters)


def write_tables(directory: Path, tables: Mapping[str, pa.Table]) -> None:
    """Write tables as ``NAME.parquet``, each in one step."""
    for name, table in tables.items():
        write_table(directory / f"{name}.parquet", table)


def _read_claims(path: Path) -> list[Claim]:
    return read_json(path, AnalysisError)


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
) -> Claim:
    """Return an entry of claims.json.

    Args:
        command: the subcommand that makes the claim.
        identity: its id.
        sentence: the claim.
        measure: the name of the number that was measured.
        unit: the unit of that number.
        rows: the numbers, from `row`.
        difference: a name and an interval, which decide whether the claim holds.
        holds_if: the side of 0 on which the interval must be: ``below`` or ``above``.
        note: what a reader should know.
    """
    entry, holds = None, None
    if difference is not None:
        entry = {k: v for k, v in row(*difference).items() if k != "n"}
        holds = _holds(difference[1], holds_if)
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


def _holds(difference: Interval | None, holds_if: str) -> bool | None:
    """Return whether the interval is on the right side of 0; None if it contains 0."""
    if difference is None:
        return None
    if difference.high < 0:
        return holds_if == "below"
    return holds_if == "above" if difference.low > 0 else None


def row(name: str, interval: Interval | None) -> dict[str, Any]:
    """Return one number of a claim; None says that it could not be measured."""
    if interval is None:
        return {"name": name, "value": None, "low": None, "high": None, "n": 0}
    return {
        "name": name,
        "value": interval.value,
        "low": interval.low,
        "high": interval.high,
        "n": interval.n,
    }
