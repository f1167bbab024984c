"""Reads benchmarks/results/gpu_predictions.md, written before any run, and judges it by a run.

A line of its table is: what is predicted, a key, a bound such as ``>= 0.85``, and the reason. Keys
are the names below, with the case after a colon where there is one.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "results" / "gpu_predictions.md"
LINE = re.compile(r"^\| (.+?) \| `([^`]+)` \| (>=|<=|=) ([\d.]+)(?: \S.*?)? \| (.+?) \|$")

Facts = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Prediction:
    """One line of the page."""

    what: str
    key: str
    sign: str
    bound: float
    reason: str

    @property
    def text(self) -> str:
        """The bound in words."""
        words = {">=": "at least", "<=": "at most", "=": ""}
        return f"{words[self.sign]} {self.bound:g}".strip()

    def holds(self, value: float) -> bool:
        """Whether a measured value keeps the promise."""
        if self.sign == "=":
            return value == self.bound
        return value >= self.bound if self.sign == ">=" else value <= self.bound


def read_predictions(page: Path = PAGE) -> list[Prediction]:
    """Read every line of the page's tables that has a key and a bound."""
    found = (LINE.match(line) for line in page.read_text().splitlines())
    return [Prediction(m[1], m[2], m[3], float(m[4]), m[5]) for m in found if m]


def _case(facts: Facts, dtype: str, hidden_size: str, k: str) -> dict[str, Any]:
    lines = facts["operator"]["tables"]["sizes"]
    wanted = (dtype, int(hidden_size), int(k))
    return next(x for x in lines if (x["dtype"], x["hidden_size"], x["k"]) == wanted)


def _share(facts: Facts, work: str, *case: str) -> float:
    return _case(facts, *case)[work]["share_of_copy"]


def _slowest_kind(facts: Facts, dtype: str) -> float:
    lines = [x for x in facts["operator"]["tables"]["kinds"] if x["dtype"] == dtype]
    normal = next(x["forward"]["median"] for x in lines if x["kind"] == "normal")
    return max(x["forward"]["median"] for x in lines) / normal


def _faster(facts: Facts, dtype: str, baseline: str) -> float:
    lines = facts["operator"]["tables"]["baselines"]
    found = next(x for x in lines if x["dtype"] == dtype)
    return found[baseline]["median"] / found["forward"]["median"]


def _counter(facts: Facts, name: str, work: str) -> float:
    return next(w for w in facts["counters"]["works"] if w["work"].startswith(work))[name]


def _difference(facts: Facts, one: str, other: str) -> float:
    pairs = facts["train_step"]["differences"]
    return next(d for d in pairs if (d["of"], d["over"]) == (one, other))["mean"]


def _loss_falls(facts: Facts) -> float:
    losses = facts["training"]["runs"]["topk"]["losses"]
    return losses[0][1] - losses[-1][1]


MEASURED: dict[str, Callable[..., float]] = {
    "differences": lambda facts: float(len(facts["oracle"]["differences"])),
    "copy": lambda facts, *case: _case(facts, *case)["copy_tb_s"],
    "share": _share,
    "slowest kind": _slowest_kind,
    "faster than": _faster,
    "counter": _counter,
    "unequal shapes": lambda facts: float(
        sum(not shape["equal"] for shape in facts["transport"]["shapes"])
    ),
    "step difference": _difference,
    "pretrain steps": lambda facts: float(facts["pretrain"]["runs"]["topk"]["steps"]),
    "loss falls": _loss_falls,
}


def measured(key: str, facts: Facts, steps: list[Any]) -> float | None:
    """Return the value behind a key, or None if the run did not measure it."""
    name, *rest = (part.strip() for part in key.split(":"))
    if name == "passed":
        status = next((step.status for step in steps if step.name == rest[0]), None)
        return None if status is None or status.startswith("skipped") else float(status == "ok")
    try:
        return MEASURED[name](facts, *rest)
    except (KeyError, StopIteration, IndexError):
        return None


def judge(
    predictions: list[Prediction], facts: Facts, steps: list[Any]
) -> list[tuple[Prediction, float | None, str]]:
    """Return each prediction with the measured value and whether it held."""
    judged = []
    for prediction in predictions:
        value = measured(prediction.key, facts, steps)
        verdict = "not measured" if value is None else "yes" if prediction.holds(value) else "NO"
        judged.append((prediction, value, verdict))
    return judged
