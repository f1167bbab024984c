"""Text to .bin/.idx: what comes out, and what happens to bad input and to killed runs."""

import gzip
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import zstandard

from tests.conftest import run_tool
from tests.harness.launch import REPOSITORY

LINES = [{"text": "To be, or not to be."}, {"text": "Words, words,\nwords."}, {"text": "Ay me!"}]


def write_jsonl(path: Path, lines: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(
    source: object, prefix: Path, tokenizer: Path, *flags: str
) -> "subprocess.CompletedProcess[str]":
    return run_tool(
        "preprocess_data.py",
        *("--input", str(source), "--output-prefix", prefix),
        *("--tokenizer-model", tokenizer, "--workers", "1", *flags),
    )


def documents(prefix: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return [np.asarray(dataset[i]).tolist() for i in range(len(dataset))]


def expected(tokenizer: Path, texts: list[str]) -> list[list[int]]:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    return [[*model.encode(text), model.eos_id()] for text in texts]


def test_documents_are_sentencepiece_ids_with_an_end(tokenizer: Path, tmp_path: Path) -> None:
    done = run(write_jsonl(tmp_path / "a.jsonl", LINES), tmp_path / "out", tokenizer)
    assert done.returncode == 0, done.stderr
    assert documents(tmp_path / "out") == expected(tokenizer, [str(x["text"]) for x in LINES])
    manifest = json.loads((tmp_path / "out.manifest.json").read_text())
    assert manifest["documents"] == 3
    assert manifest["tokens"] == sum(map(len, documents(tmp_path / "out")))
    assert "3 documents" in done.stdout


def test_text_survives_the_tokenizer_byte_for_byte(tokenizer: Path) -> None:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    text = "  two  spaces\n\ttab, naïve — 漢字 🙂 "
    assert model.decode(model.encode(text)) == text


def test_plain_and_compressed_files_and_globs_give_the_same(
    tokenizer: Path, tmp_path: Path
) -> None:
    plain = write_jsonl(tmp_path / "1.jsonl", LINES)
    data = plain.read_bytes()
    (tmp_path / "2.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "3.jsonl.zst").write_bytes(zstandard.compress(data))
    done = run(f"{tmp_path}/*.jsonl*", tmp_path / "out", tokenizer)
    assert done.returncode == 0, done.stderr
    assert documents(tmp_path / "out") == 3 * expected(tokenizer, [str(x["text"]) for x in LINES])


def test_workers_keep_the_order_of_the_input(tokenizer: Path, tmp_path: Path) -> None:
    texts = [f"{number} " + "word " * (number * 7919 % 3000) for number in range(600)]
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    assert run(source, tmp_path / "one", tokenizer, "--workers", "0").returncode == 0
    assert run(source, tmp_path / "two", tokenizer, "--workers", "3").returncode == 0
    for suffix in (".bin", ".idx"):
        one, two = (Path(f"{tmp_path / name}{suffix}").read_bytes() for name in ("one", "two"))
        assert one == two


def test_a_text_file_is_one_document(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# Act I\n\nEnter.\n")
    assert run(f"{tmp_path}/*.md", tmp_path / "out", tokenizer).returncode == 0
    assert documents(tmp_path / "out") == expected(tokenizer, ["# Act I\n\nEnter.\n"])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "not JSON"),
        ('{"body": "x"}', "no key 'text'"),
        ('{"text": 3}', "key 'text' holds int, not text"),
        ("[1, 2]", "no key 'text'"),
        ("[" * 100_000, "not JSON"),
        (r'{"text": "bad \ud800"}', "half a surrogate pair"),
    ],
)
def test_bad_lines_fail_the_run_with_their_number(
    line: str, reason: str, tokenizer: Path, tmp_path: Path
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(f'{{"text": "good"}}\n\n{line}\n{{"text": "also good"}}\n')
    done = run(source, tmp_path / "out", tokenizer)
    assert done.returncode == 2
    assert "1 bad lines" in done.stderr
    assert f"{source}:3: {reason}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*out*"))

    done = run(source, tmp_path / "out", tokenizer, "--skip-bad-lines")
    assert done.returncode == 0
    assert f"skipped {source}:3: {reason}" in done.stderr
    assert documents(tmp_path / "out") == expected(tokenizer, ["good", "also good"])


def test_killed_half_way_leaves_nothing_that_looks_complete(
    tokenizer: Path, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "word " * 2000}] * 30_000)
    command = [sys.executable, str(REPOSITORY / "tools/preprocess_data.py"), "--input", str(source)]
    command += ["--output-prefix", str(tmp_path / "out"), "--tokenizer-model", str(tokenizer)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    # Kill as soon as there are tokens on disk.
    while not any(path.stat().st_size for path in tmp_path.glob(".out.partial*.bin")):
        assert process.poll() is None, "finished before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert workers
    process.kill()
    process.wait()
    assert not list(tmp_path.glob("out*"))
    while any(Path("/proc", pid, "cmdline").exists() for pid in workers):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.jsonl", None, "no file matches"),
        ("a.csv", b"x", "the file type .csv is not known"),
        ("a.jsonl", b"", "holds no document"),
        ("a.txt", b"\xff\xfe", "not UTF-8 (byte 0)"),
        ("a.jsonl.gz", b"no gzip", "cannot read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9999, mtime=0)[:60], "cannot read"),
        ("a.jsonl.gz", gzip.compress(b"x" * 9999, mtime=0)[:20] + b"\xff" * 40, "cannot read"),
        ("a.jsonl.zst", b"no zstandard", "cannot read"),
    ],
)
def test_unusable_input_is_one_clear_line(
    name: str, content: bytes | None, reason: str, tokenizer: Path, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = run(tmp_path / name, tmp_path / "out", tokenizer)
    assert done.returncode == 2
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*out*"))


def test_existing_output_is_kept_unless_told_otherwise(tokenizer: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", LINES)
    assert run(source, tmp_path / "out", tokenizer).returncode == 0
    before = (tmp_path / "out.bin").read_bytes()
    done = run(write_jsonl(source, LINES[:1]), tmp_path / "out", tokenizer)
    assert done.returncode == 2
    assert "--overwrite" in done.stderr
    assert (tmp_path / "out.bin").read_bytes() == before
    assert run(source, tmp_path / "out", tokenizer, "--overwrite").returncode == 0
    assert len(documents(tmp_path / "out")) == 1


def test_an_input_is_never_written_over(tokenizer: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "out.manifest.json", LINES)
    done = run(source, tmp_path / "out", tokenizer, "--overwrite")
    assert done.returncode == 2
    assert "is an input" in done.stderr
    assert json.loads(source.read_text().splitlines()[0]) == LINES[0]


def test_partial_files_of_a_killed_run_are_removed_by_the_next(
    tokenizer: Path, tmp_path: Path
) -> None:
    litter = tmp_path / ".out.partial-999999999.bin"
    litter.write_bytes(b"x")
    assert (
        run(write_jsonl(tmp_path / "a.jsonl", LINES), tmp_path / "out", tokenizer).returncode == 0
    )
    assert not litter.exists()


@pytest.mark.parametrize("prefix", ["", "a.jsonl/x", "/proc/x/y"])
def test_output_that_cannot_be_written_is_one_line(
    prefix: str, tokenizer: Path, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", LINES)
    output = tmp_path / prefix if prefix.startswith("a") else Path(prefix)
    done = run(source, output, tokenizer)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_tokenizer_that_is_none_is_named(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", LINES)
    (tmp_path / "broken.model").write_bytes(b"not a model")
    for name, reason in (("absent.model", "does not exist"), ("broken.model", "cannot be opened")):
        done = run(source, tmp_path / "out", tmp_path / name)
        assert done.returncode == 2
        assert reason in done.stderr
        assert "Traceback" not in done.stderr


def test_hugging_face_tokenizer_gives_its_own_ids(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    texts = [str(line["text"]) for line in LINES]
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"])
    )
    PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "hf")
    source = write_jsonl(tmp_path / "a.jsonl", LINES)
    done = run(
        source, tmp_path / "out", tmp_path / "hf", "--tokenizer-type", "HuggingFaceTokenizer"
    )
    assert done.returncode == 0, done.stderr
    end = raw.token_to_id("</s>")
    assert documents(tmp_path / "out") == [[*raw.encode(text).ids, end] for text in texts]


class TestTrainTokenizer:
    def test_vocabulary_that_the_text_cannot_fill_is_explained(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("a few words\n" * 5)
        done = run_tool(
            "train_tokenizer.py",
            *("--input", tmp_path / "a.txt", "--output", tmp_path / "t.model"),
            *("--vocab-size", "9000"),
        )
        assert done.returncode == 2
        assert "cannot train the tokenizer" in done.stderr
        assert "9000" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "t.model").exists()

    def test_long_lines_are_learned_from(self, tmp_path: Path) -> None:
        import sentencepiece

        line = json.dumps({"text": "quick brown fox jumps " * 400})
        (tmp_path / "a.jsonl").write_text((line + "\n") * 20)
        done = run_tool(
            "train_tokenizer.py",
            *("--input", tmp_path / "a.jsonl", "--output", tmp_path / "t.model"),
            *("--vocab-size", "300"),
        )
        assert done.returncode == 0, done.stderr
        model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
        assert len(model.encode("quick brown fox")) < 10

    @pytest.mark.parametrize(
        ("flags", "reason"),
        [
            ("--vocab-size 0", "--vocab-size must be at least 300"),
            ("--vocab-size 300 --character-coverage 5", "--character-coverage must be"),
            ("--vocab-size 300 --max-sentences -1", "--max-sentences must be"),
            ("--vocab-size 300 --output .", "--output must name a file"),
            ("--vocab-size 300 --output /proc/x/t.model", "cannot write"),
        ],
    )
    def test_wrong_numbers_and_paths_are_one_line(
        self, flags: str, reason: str, tmp_path: Path
    ) -> None:
        (tmp_path / "a.txt").write_text("words\n" * 50)
        output = ("--output", tmp_path / "t.model")
        done = run_tool(
            "train_tokenizer.py", "--input", tmp_path / "a.txt", *output, *flags.split()
        )
        assert done.returncode == 2
        assert reason in done.stderr
        assert "Traceback" not in done.stderr
        assert not list(tmp_path.glob("*.model*"))

    def test_bad_line_is_named_alone(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{broken\n')
        done = run_tool(
            "train_tokenizer.py",
            *("--input", tmp_path / "a.jsonl", "--output", tmp_path / "t.model"),
            *("--vocab-size", "300"),
        )
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/a.jsonl:2: not JSON")

    def test_no_text_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("\n\n")
        done = run_tool(
            "train_tokenizer.py",
            *("--input", tmp_path / "a.txt", "--output", tmp_path / "t.model"),
            *("--vocab-size", "300"),
        )
        assert done.returncode == 2
        assert "there is no text" in done.stderr
