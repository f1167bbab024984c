"""The claims, the plots and what is missing: the part of a report that is about all neurons."""

from pathlib import Path
from typing import Any

from topk_megatron.analysis.result import COMMANDS
from topk_megatron.analysis.study import Run, list_runs, open_run, read_json
from topk_megatron.analysis.tables import read_table
from topk_megatron.errors import AnalysisError
from topk_megatron.web.report.measures import Measure
from topk_megatron.web.shared.cards import short

# What the plots draw: table of the study, and the columns that they need.
_INTERVAL = ("mean", "low", "high")
_PERCENTILES = ("p10", "p50", "p90")
_TABLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "entropy": (
        "entropy/summary.parquet",
        ("run", "kind", "layer", "measure", "neurons", "resampled", *_INTERVAL, *_PERCENTILES),
    ),
    "track": ("track/summary.parquet", ("iteration", "layer", "measure", "neurons", *_INTERVAL)),
    "steer": (
        "steer/summary.parquet",
        ("layer", "strength", "control", "measure", "neurons", *_INTERVAL, *_PERCENTILES),
    ),
    "sae": (
        "sae/summary.parquet",
        ("comparison", "layer", "a", "b", "measure", "neurons", *_INTERVAL),
    ),
    "quality": (
        "sae/quality.parquet",
        ("layer", "seed", "explained_variance", "l0", "dead_share", "loss", "loss_without"),
    ),
}  # fmt: skip


def choose_run(study: Path, name: str | None) -> Run:
    """The run whose neurons get cards: the one asked for, else the study's subject.

    The subject is the run that was steered, else the first that entropies were measured of, else
    the TopK LM, the last checkpoint of a trajectory, or whatever was recorded first.

    Raises:
        AnalysisError: no finished run, or none of this name.
    """
    names = list_runs(study)
    if name is not None:
        return open_run(study, name)
    if not names:
        raise AnalysisError(
            f"{study} holds no finished run to report on; record one first with "
            "tools/analyze.py record"
        )
    candidates = [*_subjects(study), *_by_kind(study, names)]
    return open_run(study, next(one for one in candidates if one in names))


def _subjects(study: Path) -> list[str]:
    steer, entropy = (study / command / "parameters.json" for command in ("steer", "entropy"))
    found = [str(read_json(steer).get("run"))] if steer.is_file() else []
    return found + (list(read_json(entropy).get("runs", []))[:1] if entropy.is_file() else [])


def _by_kind(study: Path, names: list[str]) -> list[str]:
    topk = [name for name in names if open_run(study, name).kind == "topk"]
    plain = [name for name in topk if "@" not in name]
    return plain[:1] + topk[-1:] + names[:1]


def summarise(study: Path, run: Run, measures: list[Measure]) -> dict[str, Any]:
    """The content of the report's first view, JSON-able.

    Raises:
        AnalysisError: a file of the study is damaged.
    """
    claims = study / "claims.json"
    manifest = run.manifest
    return {
        "run": run.name,
        "kind": run.kind,
        "layers": list(run.layers),
        "width": run.width,
        "k": manifest["k"],
        "mode": manifest["mode"],
        "model": {**manifest["model"], "path": Path(manifest["model"]["path"]).name},
        "corpus": {**manifest["corpus"], "path": Path(manifest["corpus"]["path"]).name},
        "topN": manifest["top_n"],
        "claims": read_json(claims) if claims.is_file() else [],
        "tables": {key: _rows(study / name, columns) for key, (name, columns) in _TABLES.items()},
        "measures": [
            {"key": one.key, "label": one.label, "unit": one.unit, "hint": one.hint}
            for one in measures
        ],
        "missing": missing_parts(study, run),
    }


def missing_parts(study: Path, run: Run) -> dict[str, str]:
    """For every part that the study lacks the reason, as a sentence for the reader."""
    missing = {}
    for command in COMMANDS:
        if not (study / command / "parameters.json").is_file():
            missing[command] = (
                f"Not measured: tools/analyze.py {command} was not run on this study."
            )
    entropy = study / "entropy" / "parameters.json"
    refused = read_json(entropy).get("semantic_refused") if entropy.is_file() else None
    if refused:
        missing["semantic"] = f"Semantic entropy was left out: {refused}."
    steer = study / "steer" / "parameters.json"
    if steer.is_file() and read_json(steer).get("run") not in (run.name, None):
        other = read_json(steer)["run"]
        missing["steer"] = f"Steering was measured on the run {other}, not on {run.name}."
    return missing


def _rows(path: Path, columns: tuple[str, ...]) -> dict[str, list[Any]] | None:
    """Columns of a table, numbers rounded; None if it was not written."""
    if not path.is_file():
        return None
    table = read_table(path)
    known = [name for name in columns if name in table.column_names]
    return {
        name: [short(v, 6) if isinstance(v, float) else v for v in table[name].to_pylist()]
        for name in known
    }
