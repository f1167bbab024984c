"""Draws what one neuron does: the tokens that it fires on, and held-out text in which it fires.

    python examples/quickstart/neuron_picture.py --study runs/quickstart/study \
        --model runs/quickstart/hf/topk --corpus runs/quickstart/plays-tokens --output neuron.png

The neuron is chosen by a rule and not by hand. A neuron's *concept tokens* are the ten tokens, or
fewer, that contribute most to the divergence of its tokens from the corpus. Among the neurons that
fire on 0.1 to 5 % of all tokens, the picture shows the one with the largest product of

    specificity   the share of its activations that falls on its concept tokens
    support       the share of those tokens' occurrences on which it fires

and among equals the one with the most concept tokens, in the last layer.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from topk_megatron.analysis.corpus import Corpus, open_corpus
from topk_megatron.analysis.sources import make_source
from topk_megatron.analysis.study import Run, open_run
from topk_megatron.hf.model import open_model

HELD_OUT = "-4:"  # the plays that the quickstart's study was recorded on
RARE, FREQUENT = 0.001, 0.05  # share of all tokens on which a neuron that is shown may fire
CONCEPT_TOKENS = 10
BARS, SNIPPETS = 8, 8
WINDOW = 24  # tokens on each side of a snippet's middle
BREAK = " / "  # shown for line breaks
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how a vocabulary shows tokens of one byte
INK, GREY, PALE, COLOUR = "#1d2733", "#6b7683", "#e9ecef", "#d95f02"


@dataclass(frozen=True)
class Neuron:
    """A neuron, and how well its concept tokens describe it.

    Attributes:
        layer: Its layer, counted from 0.
        number: Its number in the layer.
        fires: The share of all tokens on which it fires.
        tokens: Its concept tokens, the most frequent first.
        counts: Its activations on each of them.
        occurrences: How often each of them occurs.
        lifts: For each of them, its share of the activations over its share of the corpus.
        specificity: The share of the activations that falls on these tokens.
        support: The share of these tokens' occurrences on which it fires.
    """

    layer: int
    number: int
    fires: float
    tokens: np.ndarray
    counts: np.ndarray
    occurrences: np.ndarray
    lifts: np.ndarray
    specificity: float
    support: float

    @property
    def quality(self) -> tuple[float, int, int]:
        """What the rule compares: the product, then the number of tokens, then the layer."""
        return round(self.specificity * self.support, 6), len(self.tokens), self.layer


@dataclass(frozen=True)
class Snippet:
    """A window of text around an activation.

    Attributes:
        texts: Its tokens as text.
        levels: The neuron's activation on each of them, 0 where it does not fire.
        target: The place of the activation in the window.
    """

    texts: list[str]
    levels: list[float]
    target: int


def choose(run: Run) -> Neuron:
    """Apply the rule to every neuron of a run."""
    found = (neuron for layer in run.layers for neuron in neurons_of(run, layer))
    return max(found, key=lambda neuron: neuron.quality)


def products(run: Run, neuron: Neuron) -> dict[int, float]:
    """Return specificity x support on the same tokens, of the same neuron, in every layer."""
    found = {}
    for layer in run.layers:
        histogram = run.histogram(layer)
        tokens, counts, _ = histogram.of(neuron.number)
        on_them = counts[np.isin(tokens, neuron.tokens)].sum()
        total = max(1, histogram.totals[neuron.number])
        found[layer] = float(on_them / total * on_them / neuron.occurrences.sum())
    return found


def neurons_of(run: Run, layer: int) -> Iterator[Neuron]:
    """Yield the neurons of a layer that fire neither too rarely nor too often."""
    occurrences = run.vocabulary["count"].to_numpy()
    corpus = occurrences.sum()
    histogram = run.histogram(layer)
    for number, total in enumerate(histogram.totals):
        if not RARE <= total / corpus <= FREQUENT:
            continue
        tokens, counts, _ = histogram.of(number)
        share = counts / total
        lift = share / (occurrences[tokens] / corpus)
        concept = np.argsort(-share * np.log2(lift), kind="stable")[:CONCEPT_TOKENS]
        concept = concept[np.argsort(-counts[concept], kind="stable")]
        yield Neuron(
            layer=layer,
            number=number,
            fires=float(total / corpus),
            tokens=tokens[concept],
            counts=counts[concept],
            occurrences=occurrences[tokens[concept]],
            lifts=lift[concept],
            specificity=float(share[concept].sum()),
            support=float(counts[concept].sum() / occurrences[tokens[concept]].sum()),
        )


def activations(run: Run, neuron: Neuron, model: Path, corpus: Corpus) -> np.ndarray:
    """Return the neuron's activation on every token of the corpus, 0 where it does not fire.

    Raises:
        SystemExit: If model or corpus are not those of the run.
    """
    folder = open_model(model)
    if (
        corpus.fingerprint() != run.manifest["corpus"]["fingerprint"]
        or folder.fingerprint() != run.manifest["model"]["fingerprint"]
    ):
        sys.exit(f"error: {run.name} was recorded with another model or corpus; give that one")
    source = make_source(folder, layers=str(neuron.layer))
    length = run.manifest["corpus"]["seq_length"]
    found = []
    for begin in range(0, len(corpus.tokens), length):
        tokens = np.asarray(corpus.tokens[begin : begin + length], np.int64)
        values, neurons = source.states(torch.from_numpy(tokens)[None])[neuron.layer]
        found.append(torch.where(neurons == neuron.number, values, 0).sum(1))
    return torch.cat(found).numpy()


def snippets_of(run: Run, neuron: Neuron, levels: np.ndarray, corpus: Corpus) -> list[Snippet]:
    """Return windows around its strongest activations: one for each token in turn, none twice."""
    texts = run.vocabulary["text"].to_pylist()
    tokens = np.asarray(corpus.tokens)
    strongest = np.argsort(-levels, kind="stable")
    waiting = [iter(strongest[tokens[strongest] == token]) for token in neuron.tokens]
    places: list[int] = []
    while waiting and len(places) < SNIPPETS:
        candidates = waiting.pop(0)
        for place in candidates:
            if levels[place] > 0 and all(abs(place - other) > WINDOW for other in places):
                places.append(int(place))
                waiting.append(candidates)
                break
    found = []
    for place in places:
        first = max(0, place - WINDOW)
        part = slice(first, place + WINDOW)
        words = [texts[token] for token in tokens[part]]
        found.append(Snippet(words, levels[part].tolist(), place - first))
    return found


def caption(run: Run, neuron: Neuron) -> str:
    """Return what the picture shows, and the rule that chose it."""
    layers = ", ".join(
        f"{value:.2f} at layer {layer}" for layer, value in products(run, neuron).items()
    )
    return (
        f"{100 * neuron.specificity:.0f} % of its activations are on these "
        f"{len(neuron.tokens)} tokens (specificity), and it fires on {100 * neuron.support:.0f} % "
        f"of their occurrences (support).\nChosen by rule: the largest specificity x support of "
        f"all neurons that fire on {100 * RARE:g} to {100 * FREQUENT:g} % of tokens; among equals, "
        f"the most tokens and the last layer.\nThe same neuron at every TopK layer, "
        f"specificity x support on these tokens: {layers}."
    )


def draw(run: Run, neuron: Neuron, snippets: list[Snippet], path: Path) -> None:
    """Write the picture: bars on the left, snippets on the right, the caption below."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 4.7), dpi=150, facecolor="white")
    title = f"Layer {neuron.layer}, neuron {neuron.number}"
    figure.text(0.015, 0.925, title, size=14, weight="bold", color=INK)
    subtitle = f"fires on {100 * neuron.fires:.1f} % of the tokens of held-out text: on these"
    figure.text(0.015, 0.865, subtitle, size=9.5, color=GREY)
    figure.text(
        0.405, 0.865, "its strongest activations on each of them, in context", size=9.5, color=GREY
    )
    texts = run.vocabulary["text"].to_pylist()
    _draw_bars(figure.add_axes((0.07, 0.22, 0.28, 0.60)), neuron, texts)
    _draw_snippets(figure.add_axes((0.405, 0.22, 0.585, 0.60)), snippets)
    figure.text(0.015, 0.035, caption(run, neuron), size=8.5, color=GREY, linespacing=1.6)
    figure.savefig(path)
    plt.close(figure)


def _draw_bars(axes: Any, neuron: Neuron, texts: list[str]) -> None:
    """One bar per token: its occurrences, and in colour those on which the neuron fires."""
    shown = list(zip(neuron.tokens, neuron.counts, neuron.occurrences, neuron.lifts, strict=True))
    most = max(neuron.occurrences[:BARS])
    for place, (token, count, occurrences, lift) in enumerate(shown[:BARS]):
        axes.barh(place, occurrences, height=0.5, color=PALE)
        axes.barh(place, count, height=0.5, color=COLOUR, alpha=0.85)
        note = f"fires on {count:,} of {occurrences:,}, {lift:.0f} times chance"
        axes.text(0, place + 0.42, note, size=8.5, color=GREY, va="center")
        name = texts[token].strip() or "(space)"
        axes.text(-0.03 * most, place, name, size=15, weight="bold", color=INK, ha="right",
                  va="center", family="serif")  # fmt: skip
    axes.set_xlim(0, most)
    axes.set_ylim(max(3, min(BARS, len(shown))) - 0.3, -0.4)
    axes.axis("off")


def _draw_snippets(axes: Any, snippets: list[Snippet]) -> None:
    """One line per snippet, with the activations in the middle below each other."""
    axes.axis("off")
    axes.set_xlim(0, 1)
    axes.set_ylim(SNIPPETS - 0.5, -0.5)
    strongest = max(max(snippet.levels) for snippet in snippets)
    for line, snippet in enumerate(snippets):
        words = list(zip(_shown(snippet.texts), snippet.levels, strict=True))
        _draw_words(axes, line, words[snippet.target :], strongest, left=False)
        _draw_words(axes, line, words[: snippet.target][::-1], strongest, left=True)


def _draw_words(
    axes: Any, line: int, words: list[tuple[str, float]], strongest: float, *, left: bool
) -> None:
    """Draw tokens from the middle outwards, as many whole words as fit."""
    edge, drawn = 0.5, []
    for text, level in words:
        label = axes.text(
            edge, line, text, ha="right" if left else "left", va="center_baseline", size=11.5,
            family="serif", zorder=2, color=GREY if text == BREAK else INK,
            weight="bold" if level else "normal",
        )  # fmt: skip
        box = label.get_window_extent().transformed(axes.transData.inverted())
        edge = box.x0 if left else box.x1
        drawn.append((label, box, level / strongest))
        if not 0 <= edge <= 1:
            break
    # The last token does not fit; where it continues a word, neither does the word.
    last = len(drawn) - 1
    while last > 0 and not (words[last - 1 if left else last][0].startswith(" ")):
        last -= 1
    for label, _, _ in drawn[last:]:
        label.remove()
    for _, box, level in drawn[:last]:
        if level:
            axes.barh(line, box.width + 0.006, left=box.x0 - 0.003, height=0.74, color=COLOUR,
                      alpha=0.2 + 0.55 * level, zorder=1)  # fmt: skip


def _shown(texts: list[str]) -> list[str]:
    """Return tokens for one line: no Markdown, single spaces, line breaks as one slash."""
    found: list[str] = []
    ends_blank = True
    for text in texts:
        text = BYTE.sub(lambda match: chr(int(match[1], 16)), text)
        text = text.replace("*", "").replace("_", "")
        if "\n" in text and BREAK not in found[-1:]:
            last = len(found)
            while last and not found[last - 1].strip():
                last -= 1
            found[last:] = [""] * (len(found) - last)  # no blanks before a line break
            text = BREAK
        elif not text.strip():
            text = "" if ends_blank or "\n" in text else " "
        found.append(text)
        ends_blank = text.endswith(" ") if text else ends_blank
    return found


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", type=Path, required=True, help="study directory")
    parser.add_argument("--run", default="topk", help="run of the study (default: topk)")
    parser.add_argument("--model", type=Path, required=True, help="exported folder of the run")
    parser.add_argument("--corpus", required=True, help="dataset of the run")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    return parser.parse_args()


def main() -> None:
    """Choose the neuron and draw it."""
    args = parse()
    run = open_run(args.study, args.run)
    neuron = choose(run)
    tokens = run.manifest["corpus"]["tokens"]
    corpus = open_corpus(args.corpus, lambda: None, documents=HELD_OUT, max_tokens=tokens)
    levels = activations(run, neuron, args.model, corpus)
    draw(run, neuron, snippets_of(run, neuron, levels, corpus), args.output)
    print(
        f"layer {neuron.layer}, neuron {neuron.number}: {caption(run, neuron)}".replace("\n", " ")
    )


if __name__ == "__main__":
    main()
