"""Makes the two task files from held-out plays: which line comes next, and who speaks next.

    python examples/quickstart/make_tasks.py --plays runs/quickstart/plays

The plays are the last ones of the corpus, which `--split 90,10,0` keeps out of training. The files
are in the repository; this script reproduces them byte for byte.
"""

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PLAYS = ("tragedies/romeo-and-juliet.md", "tragedies/timon-of-athens.md")
EXAMPLES = 120
CHOICES = 4


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plays", type=Path, required=True, help="folder with the Markdown plays")
    parser.add_argument("--output", type=Path, default=HERE / "tasks")
    return parser.parse_args()


def main() -> None:
    """Write both task files."""
    args = parse()
    texts = [(args.plays / play).read_text() for play in PLAYS]
    for name, make in (("next_line", next_lines), ("next_speaker", next_speakers)):
        examples = [example for text in texts for example in make(text, random.Random(name))]
        chosen = random.Random(0).sample(examples, EXAMPLES)
        placed = [place_answer(example, n % CHOICES) for n, example in enumerate(chosen)]
        lines = [json.dumps(example, ensure_ascii=False) for example in placed]
        (args.output / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def place_answer(example: dict[str, Any], place: int) -> dict[str, Any]:
    """Move the right choice to `place`; over all examples each place is right equally often."""
    choices = [choice for n, choice in enumerate(example["choices"]) if n != example["answer"]]
    choices.insert(place, example["choices"][example["answer"]])
    return {**example, "choices": choices, "answer": place}


def speeches(text: str) -> list[tuple[str, list[str]]]:
    """Return (speaker, lines) in the order of the play, without stage directions."""
    found = []
    for paragraph in text.split("\n\n"):
        head, *lines = paragraph.strip().split("\n")
        if (match := re.fullmatch(r"\*\*(.+)\*\* *", head)) and lines:
            found.append((match[1], [line.rstrip() for line in lines]))
    return found


def next_lines(text: str, draw: random.Random) -> list[dict[str, Any]]:
    """Make examples: four lines of a speech, and four lines of the play of which one follows."""
    spoken = speeches(text)
    pool = [line for _, lines in spoken for line in lines if 25 <= len(line) <= 60]
    examples = []
    for speaker, lines in spoken:
        if len(lines) < 5 or not 25 <= len(lines[4]) <= 60:
            continue
        others = [line for line in draw.sample(pool, 9) if line != lines[4]][: CHOICES - 1]
        context = f"**{speaker}**  \n" + "".join(f"{line}  \n" for line in lines[:4])
        examples.append(_example(context, lines[4], others))
    return examples


def next_speakers(text: str, draw: random.Random) -> list[dict[str, Any]]:
    """Make examples: two speeches, and four characters of the play of whom one speaks next."""
    spoken = [speech for speech in speeches(text) if len(speech[1]) <= 4]
    people = sorted({speaker for speaker, _ in spoken})
    examples = []
    for first, second, third in zip(spoken, spoken[1:], spoken[2:], strict=False):
        if third[0] == second[0]:
            continue
        others = [name for name in draw.sample(people, len(people)) if name != third[0]]
        context = "".join(
            f"**{speaker}**  \n" + "  \n".join(lines) + "\n\n" for speaker, lines in (first, second)
        )
        examples.append(_example(f"{context}**", third[0] + "**", [f"{n}**" for n in others]))
    return examples


def _example(context: str, answer: str, others: list[str]) -> dict[str, Any]:
    choices = [answer, *others[: CHOICES - 1]]
    return {"context": context, "choices": choices, "answer": 0}


if __name__ == "__main__":
    main()
