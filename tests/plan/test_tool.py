"""The command as a user types it, the files that it writes, and its output in the docs."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import plan_memory, scaling_model
from tests.conftest import run_tool
from tests.harness.launch import REPOSITORY
from tests.plan.conftest import SMALL, config_flags
from topk_megatron.errors import ConfigError
from topk_megatron.plan.assumptions import SCALARS, cluster_of
from topk_megatron.plan.command_lines import layout_in, read_flags, shape_of
from topk_megatron.plan.layout import Layout
from topk_megatron.plan.report import assumption_table
from topk_megatron.plan.script import write_script

DOCS = REPOSITORY / "docs"
EXAMPLE = ["configs/70b.args", "--gpu", "h100", "--nodes", "64"]


def test_docs_show_what_the_command_prints() -> None:
    done = run_tool("plan.py", *EXAMPLE)
    assert done.returncode == 0, done.stderr
    shown = (DOCS / "planning.md").read_text()
    assert f"$ python tools/plan.py {' '.join(EXAMPLE)}\n" in shown
    for line in done.stdout.splitlines():
        assert f"    {line}".rstrip() in shown.splitlines()


def test_docs_show_the_assumptions() -> None:
    assert assumption_table() in (DOCS / "planning.md").read_text()
    assert all(scalar.source for scalar in SCALARS)


def test_docs_show_megatrons_memory_beside_the_plans() -> None:
    assert (
        "\n".join([plan_memory.HEADER, *plan_memory.rows()]) in (DOCS / "planning.md").read_text()
    )


def test_docs_on_scaling_show_what_the_script_prints(capsys: pytest.CaptureFixture[str]) -> None:
    scaling_model.print_transport()
    scaling_model.print_memory()
    shown = (DOCS / "scaling.md").read_text()
    printed = capsys.readouterr().out.strip().splitlines()
    assert len(printed) == 14
    assert [line for line in printed if line not in shown] == []


def test_json_holds_every_layout_and_reason() -> None:
    done = run_tool("plan.py", *EXAMPLE, "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["parameters"] == shape_of(config_flags("70b")).parameters
    best = plan["layouts"][0]
    assert (best["tp"], best["pp"], best["dp"]) == (4, 4, 32)
    memory = best["memory"]
    parts = ("weights", "gradients", "optimizer", "dense")
    assert best["bytes_per_gpu"] == pytest.approx(sum(memory[part] for part in parts))
    assert best["tokens_per_second"] == pytest.approx(2048 * 4096 / best["seconds"]["total"])
    assert {one["kind"] for one in plan["rejected"]} == {"divide", "memory"}
    assert plan["own_layout"]["tp"] == 4
    assert len(plan["assumptions"]) > 10


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that runs the command in this process, in the repository's root."""
    main = runpy.run_path(str(REPOSITORY / "tools" / "plan.py"))["main"]

    def call(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["plan.py", *words])
        main()

    monkeypatch.chdir(REPOSITORY)
    return call


def test_model_can_be_given_as_flags_that_win_over_the_file(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command("--json", "--", *SMALL)
    assert json.loads(capsys.readouterr().out)["parameters"] == shape_of(SMALL).parameters
    command("configs/1b.args", "--json", "--", "--num-layers", "12")
    changed = shape_of([*config_flags("1b"), "--num-layers", "12"])
    assert json.loads(capsys.readouterr().out)["parameters"] == changed.parameters


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "error: no model: give an argument file"),
        (["configs/none.args"], "error: the argument file configs/none.args cannot be read"),
        (["configs/70b.args"], "error: no layout fits on 8 x h100: the nearest, TP 8"),
        (["configs/1b.args", "--link", "wet"], "error: --link wet is unknown"),
        (["configs/1b.args", "--", "--num-experts", "8"], "error: --num-experts is not planned"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    command: Callable[..., None],
    words: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit:
        command(*words)
    assert exit.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith(complaint)


def test_plans_are_made_without_megatron() -> None:
    script = (
        "import runpy, sys; sys.modules['megatron'] = None; "
        "sys.argv = ['plan.py', 'configs/1b.args']; "
        "runpy.run_path('tools/plan.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "the file's own" in done.stdout


def fake_slurm(directory: Path) -> Path:
    """Write an srun that records its arguments and a scontrol that knows one node."""
    directory.mkdir()
    srun, scontrol = directory / "srun", directory / "scontrol"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >"$RUN/srun.txt"\nenv >"$RUN/env.txt"\n')
    scontrol.write_text('#!/bin/sh\n[ "$2" = hostnames ] && echo n1 || echo NodeAddr=10.0.0.1 x\n')
    for script in (srun, scontrol):
        script.chmod(0o755)
    return directory


def test_written_script_starts_the_chosen_layout(tmp_path: Path) -> None:
    done = run_tool("plan.py", *EXAMPLE, "--write", tmp_path / "plan")
    assert done.returncode == 0, done.stderr
    script, arguments = tmp_path / "plan" / "70b.sbatch", tmp_path / "plan" / "70b.args"
    text = script.read_text()
    assert "#SBATCH --nodes=64\n" in text
    assert "#SBATCH --gpus-per-node=8\n" in text
    assert shape_of(read_flags(arguments)) == shape_of(config_flags("70b"))
    assert layout_in(read_flags(arguments)) == Layout(tp=4, pp=4, dp=1)

    copy = tmp_path / "spooled"  # Slurm runs a copy outside its folder
    shutil.copy(script, copy)
    slurm = {"SLURM_SUBMIT_DIR": str(REPOSITORY), "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n"}
    path = f"{fake_slurm(tmp_path / 'bin')}:{os.environ['PATH']}"
    started = subprocess.run(
        ["bash", str(copy)],
        env={**os.environ, **slurm, "PATH": path, "RUN": str(tmp_path), "SLURM_JOB_NAME": "70b"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert started.returncode == 0, started.stderr
    words = (tmp_path / "srun.txt").read_text().split("\n")
    cut = words.index("--num-layers")
    assert words[cut : cut + len(read_flags(arguments))] == read_flags(arguments)
    assert "RANKS_PER_NODE=8\n" in (tmp_path / "env.txt").read_text()


def test_words_that_the_scripts_would_break_are_refused(tmp_path: Path) -> None:
    flags = [*SMALL, "--wandb-exp-name", "two words"]
    cluster = cluster_of("h100", 1, 8, "ndr")
    with pytest.raises(ConfigError, match="cannot carry 'two words'"):
        write_script(tmp_path, "run", flags, Layout(tp=1, pp=1, dp=8), cluster)


def test_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--write .*file"):
        write_script(
            tmp_path / "file",
            "run",
            SMALL,
            Layout(tp=1, pp=1, dp=8),
            cluster_of("h100", 1, 8, "ndr"),
        )


def test_every_link_in_the_page_leads_somewhere() -> None:
    for page in ("planning.md", "design/0009-planner.md"):
        text = (DOCS / page).read_text()
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((DOCS / page).parent / target).exists(), target
