"""Collects what a report shows of all neurons together: claims, plots and what is missing."""

from pathlib import Path
from typing import Any

from topk_megatron.analysis.study import Run, list_runs, open_run, read_json
from topk_megatron.analysis.tables import read_table
from topk_megatron.errors import AnalysisError
from topk_megatron.web.shared.cards import CardReader, short

# For each plot a table of the study, and the columns that the plot needs.
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
    """Returns the run whose neurons get cards: the given one, or else the study's subject.

    The subject is the run that was steered. If none was, it is the first run whose entropies were
    measured, the TopK LM, the last checkpoint of a trajectory, or the run that was recorded first.

    Raises:
        AnalysisError: there is no finished run, or none of this name.
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


def summarise(reader: CardReader) -> dict[str, Any]:
    """Returns the content of the report's first view, as JSON can hold it.

    Raises:
        AnalysisError: a file of the study is damaged.
    """
    study, run = reader.study, reader.run
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
        "measures": [one.describe() for one in reader.measures],
        "missing": dict(reader.missing),
    }


def _rows(path: Path, columns: tuple[str, ...]) -> dict[str, list[Any]] | None:
    """Returns a table's columns with rounded numbers; None if it was not written."""
    if not path.is_file():
        return None
    table = read_table(path)
    known = [name for name in columns if name in table.column_names]
    return {
        name: [short(v, 6) if isinstance(v, float) else v for v in table[name].to_pylist()]
        for name in known
    }
