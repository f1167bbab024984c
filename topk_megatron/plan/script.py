"""Writes the files that start a planned run: an argument file and an sbatch script."""

import shlex
from pathlib import Path

from topk_megatron.errors import ConfigError
from topk_megatron.plan.assumptions import Cluster
from topk_megatron.plan.command_lines import grouped, layout_flags, without_layout
from topk_megatron.plan.layout import Layout

_LINE = 100  # characters per line of flags

_SCRIPT = """\
#!/usr/bin/env bash
# {title}
# Written by tools/plan.py. Submit it from a checkout of topk_megatron:
#
#     DATA=… TOKENIZER=… sbatch {script}
#
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=TERM@600
#SBATCH --gpus-per-node={gpus}
# Sites differ here; uncomment what your site needs.
##SBATCH --exclusive
##SBATCH --partition=gpu
##SBATCH --time=24:00:00
set -euo pipefail

# examples/slurm/many_nodes.sbatch lists the other variables.
export PROJECT=${{PROJECT:-$SLURM_SUBMIT_DIR}}
export CONFIG=${{CONFIG:-{arguments}}}
export RANKS_PER_NODE={gpus}

exec bash "$PROJECT/examples/slurm/many_nodes.sbatch"
"""


def write_script(
    directory: Path, name: str, flags: list[str], layout: Layout, cluster: Cluster
) -> tuple[Path, Path]:
    """Write ``NAME.args`` and ``NAME.sbatch``.

    Args:
        directory: The folder to write to; created if missing.
        name: The name of the files and of the job.
        flags: Pretraining flags; those of the layout are replaced.
        layout: The chosen layout.
        cluster: The cluster that it was chosen for.

    Returns:
        The script and the argument file.

    Raises:
        ConfigError: If the folder cannot be written, or a flag does not survive the scripts'
            parser, which splits at white space and drops everything after a ``#``.
    """
    chosen = [*without_layout(flags), *layout_flags(layout)]
    odd = [word for word in chosen if not word or word.split() != [word] or "#" in word]
    if odd:
        raise ConfigError(
            f"examples/slurm/ reads argument files word by word and cannot carry {odd[0]!r}"
        )
    title = f"{layout.words()} on {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}"
    arguments, script = directory / f"{name}.args", directory / f"{name}.sbatch"
    text = _SCRIPT.format(
        title=title,
        script=script,
        name=name,
        nodes=cluster.nodes,
        gpus=cluster.gpus_per_node,
        arguments=shlex.quote(str(arguments.resolve())),
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        arguments.write_text(f"# {title}; written by tools/plan.py\n{_wrapped(chosen)}\n")
        script.write_text(text)
    except OSError as error:
        raise ConfigError(f"--write {directory}: {error.strerror}") from error
    script.chmod(0o755)
    return script, arguments


def _wrapped(words: list[str]) -> str:
    """Return the flags in lines, each flag next to its values."""
    lines = [""]
    for group in grouped(words):
        text = " ".join(group)
        if lines[-1] and len(lines[-1]) + 1 + len(text) > _LINE:
            lines.append(text)
        else:
            lines[-1] = f"{lines[-1]} {text}".strip()
    return "\n".join(lines)
