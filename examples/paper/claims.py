"""The paper's claims, one row each: what was measured here, and whether the claim held."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare import Measures, entropy, entropy_difference, gap, score
from grid import Run

from topk_megatron.analysis.measures import Interval

RECOMMENDED = "anneal"  # the variant that docs/design/0010-training.md recommends
NEAR_PERCENT = 3.0  # perplexity above the dense twin's that we call "keeps its capabilities"

YES, NO, OPEN, UNTESTED = "reproduced", "not reproduced", "undecided", "not testable here"


@dataclass(frozen=True)
class Row:
    """A claim of the paper, the verdict, and the numbers for it."""

    claim: str
    verdict: str
    number: str


def rows(variants: dict[str, list[Run]], measures: Measures, studies: Sequence[Path]) -> list[Row]:
    """Return all claims of the paper's abstract and key findings."""
    found = [_performance(variants, measures), _tasks(variants, measures)]
    found.append(_entropy(variants, measures))
    for identity, claim in _STUDIED.items():
        found.append(_studied(identity, claim, studies))
    found.append(_steering(studies))
    found.append(_stability(studies))
    found += [
        Row("The same holds with 24 layers and 1 billion parameters", UNTESTED, "6 layers, 5.6 M"),
        Row("Other tasks, longer contexts, larger models (its future work)", UNTESTED, "-"),
    ]
    return found


_STUDIED = {
    "entropy-token_entropy-sae-seed-0": "Neurons are as specialised as the latents of a post-hoc "
    "SAE, by token entropy (TopK - SAE, bits)",
    "entropy-semantic_entropy-dense": "Neurons fire in fewer kinds of contexts than a dense "
    "model's: semantic entropy (TopK - dense, bits)",
    "track-same-neuron": "A neuron keeps its meaning over training: similarity to itself at the "
    "end, against another neuron",
    "track-layers": "A neuron keeps its meaning from layer to layer: similarity to the same number "
    "in the next layer, against another one",
    "track-specialisation-grows": "Specialisation grows during training: share of specialised "
    "neurons, end - beginning",
}


def text_of(interval: Interval | None, digits: int = 2) -> str:
    """Return an interval in the form `1.23 [1.10, 1.36]`."""
    if interval is None:
        return "no value"
    return f"{interval.value:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _performance(variants: dict[str, list[Run]], measures: Measures) -> Row:
    found, constant = (
        gap(variants[name], variants["dense"], measures).percent for name in (RECOMMENDED, "topk")
    )
    verdict = YES if found.high < NEAR_PERCENT else NO if found.low > NEAR_PERCENT else OPEN
    return Row(
        "TopK LMs keep the original performance (perplexity within "
        f"{NEAR_PERCENT:.0f} % of dense, k = H / 16)",
        verdict,
        f"annealed k {text_of(found, 1)} % above dense; constant k {text_of(constant, 1)} %",
    )


def _tasks(variants: dict[str, list[Run]], measures: Measures) -> Row:
    texts, apart = [], False
    for task in sorted(measures[variants["dense"][0].name]["tasks"]):
        one, one_error = score(variants["topk"], measures, task)
        other, other_error = score(variants["dense"], measures, task)
        error = (one_error**2 + other_error**2) ** 0.5
        apart |= one < other - 2 * error
        texts.append(f"{task} {one:.3f} against {other:.3f} (± {2 * error:.3f})")
    return Row("TopK LMs score like dense ones on tasks", NO if apart else OPEN, "; ".join(texts))


def _entropy(variants: dict[str, list[Run]], measures: Measures) -> Row:
    k = variants["topk"][0].k
    found = entropy_difference(variants["topk"], variants["dense"], measures, k)
    means = [text_of(entropy(variants[name], measures, k)) for name in ("topk", "dense")]
    return Row(
        "Neurons are more specialised than a dense model's: token entropy (TopK - dense, bits)",
        _verdict_of(found, below=True),
        f"{text_of(found)}; TopK {means[0]}, dense {means[1]}",
    )


def _verdict_of(found: Interval | None, *, below: bool) -> str:
    if found is None or found.low <= 0 <= found.high:
        return OPEN
    return YES if (found.high < 0) == below else NO


def claims_of(study: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of a study's claims.json by id."""
    return {entry["id"]: entry for entry in json.loads((study / "claims.json").read_text())}


def _studied(identity: str, claim: str, studies: Sequence[Path]) -> Row:
    """Return the row of a claim that each seed's study has decided."""
    entries = [claims_of(study).get(identity) for study in studies]
    known = [entry for entry in entries if entry is not None and entry["difference"] is not None]
    if not known:
        return Row(claim, OPEN, "no neuron with enough activations")
    holds = {entry["holds"] for entry in known}
    verdict = YES if holds == {True} else NO if holds == {False} else OPEN
    return Row(claim, verdict, "; ".join(_difference(entry) for entry in known))


def _difference(entry: dict[str, Any]) -> str:
    difference = entry["difference"]
    if difference["value"] is None:
        return "no value"
    return f"{difference['value']:.2f} [{difference['low']:.2f}, {difference['high']:.2f}]"


def _steering(studies: Sequence[Path]) -> Row:
    """Return the row on steering, at each seed's best strength against the control."""
    texts, holds = [], set()
    for study in studies:
        entries = [e for name, e in claims_of(study).items() if name.startswith("steer-")]
        entries = [e for e in entries if e["difference"] and e["difference"]["value"] is not None]
        if not entries:
            continue
        best = max(entries, key=lambda entry: entry["difference"]["value"])
        holds.add(best["holds"])
        low, high = (100 * best["difference"][name] for name in ("low", "high"))
        value = 100 * best["difference"]["value"]
        strength = best["id"].removeprefix("steer-")
        texts.append(f"{value:+.1f} [{low:+.1f}, {high:+.1f}] points at strength {strength}")
    verdict = YES if holds == {True} else NO if holds == {False} else OPEN
    return Row(
        "Pushing a neuron brings its concept into the text (share of its tokens, own - control, at "
        "the best of four strengths and therefore optimistic)",
        verdict,
        "; ".join(texts) or "no neuron to push",
    )


def _stability(studies: Sequence[Path]) -> Row:
    """Return the row that compares neurons of two checkpoints with SAE latents of two seeds."""
    texts, holds = [], set()
    for study in studies:
        entry = claims_of(study).get("sae-stability")
        if entry is None:
            continue
        holds.add(entry["holds"])
        numbers = [
            f"{row['name']} {row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
            for row in entry["rows"]
            if row["value"] is not None
        ]
        texts.append(", ".join(numbers))
    return Row(
        "Neurons are more stable than SAE latents: share found again at another checkpoint, and "
        "under another seed",
        YES if holds == {True} else NO if holds == {False} else OPEN,
        "; ".join(texts) or "nothing matched",
    )
