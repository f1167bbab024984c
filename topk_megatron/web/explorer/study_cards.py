"""Cards of a study for the model that is explored."""

from pathlib import Path
from typing import Any

import numpy as np

from topk_megatron.analysis.study import list_runs, open_run
from topk_megatron.errors import AnalysisError
from topk_megatron.hf.model import OpenModel
from topk_megatron.web.report.measures import collect_measures
from topk_megatron.web.report.summary import missing_parts
from topk_megatron.web.shared.cards import Card, CardReader

_LAYERS_HELD = 2


class StudyCards:
    """Reads cards a layer at a time and holds the last layers.

    Args:
        study: a study directory.
        run: one of its runs; None takes the one that was recorded from this model.
        folder: the model.

    Raises:
        AnalysisError: the study has no run of this model.
    """

    def __init__(self, study: Path, run: str | None, folder: OpenModel) -> None:
        name = run or _run_of(study, folder)
        self.run = open_run(study, name)
        if self.run.manifest["model"]["fingerprint"] != folder.fingerprint():
            raise AnalysisError(
                f"the run {name} of {study} was recorded from another model than {folder.path}"
            )
        if self.run.kind != "topk":
            raise AnalysisError(f"the run {name} is of kind {self.run.kind}, not of a TopK LM")
        self.name = f"{study.resolve().name}, run {name}"
        self.missing = missing_parts(study, self.run)
        self._measures = collect_measures(study, self.run)
        self._reader = CardReader(study, self.run)
        self._layers: dict[int, dict[int, Card]] = {}

    def card(
        self, layer: int, neuron: int
    ) -> tuple[Card | None, list[dict[str, Any]], float | None]:
        """A neuron's card, its measures, and its largest value; nothing for unrecorded layers."""
        if layer not in self.run.layers:
            return None, [], None
        place = self.run.layers.index(layer)
        measures, largest = [], None
        for one in self._measures:
            value = float(one.values[place, neuron])
            known = None if np.isnan(value) else value
            largest = known if one.key == "max" else largest
            measures.append(
                {"label": one.label, "unit": one.unit, "hint": one.hint, "value": known}
            )
        return self._layer(layer).get(neuron, {}), measures, largest

    def _layer(self, layer: int) -> dict[int, Card]:
        found = self._layers.get(layer)
        if found is None:
            found = self._reader.layer(layer)
            while len(self._layers) >= _LAYERS_HELD:
                self._layers.pop(next(iter(self._layers)), None)
            self._layers[layer] = found
        return found


def _run_of(study: Path, folder: OpenModel) -> str:
    fingerprint = folder.fingerprint()
    for name in list_runs(study):
        manifest = open_run(study, name).manifest
        if manifest["model"]["fingerprint"] == fingerprint and manifest["kind"] == "topk":
            return name
    raise AnalysisError(
        f"{study} has no run that was recorded from the model in {folder.path}; record one, or "
        "start without --study"
    )
