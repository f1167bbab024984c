"""Runs tasks of lm-evaluation-harness, from local YAML files or by name, on an open model."""

import os
from pathlib import Path
from typing import Any

from topk_megatron.errors import ConfigError, DataError
from topk_megatron.hf.model import OpenModel


def read_task(path: Path) -> dict[str, Any]:
    """Read a task file, and find the data files that it names next to it.

    Raises:
        DataError: the file is missing or is not a task, or its data are missing.
    """
    import yaml

    try:
        task = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"cannot read the task {path}: {' '.join(str(error).split())}") from error
    if not isinstance(task, dict) or "task" not in task:
        raise DataError(f"{path} is not a task of lm-evaluation-harness: it has no entry 'task'")
    _refuse_code(path, task)
    files = (task.get("dataset_kwargs") or {}).get("data_files")
    if isinstance(files, dict):
        found = {split: path.parent / str(name) for split, name in files.items()}
        if missing := [str(file) for file in found.values() if not file.is_file()]:
            raise DataError(f"{path} reads {missing[0]}, which does not exist")
        task["dataset_kwargs"]["data_files"] = {k: str(v) for k, v in found.items()}
    return task


def _refuse_code(path: Path, task: dict[str, Any]) -> None:
    """Refuse entries by which a task file makes the harness run other people's code.

    The harness fetches a metric that it does not have from a hub or a file, and runs it;
    ``include`` reads a second file in which ``!function`` names code.
    """
    from lm_eval.api import metrics  # noqa: F401  (registers them)
    from lm_eval.api.registry import metric_registry

    if "include" in task:
        raise DataError(f"{path}: include is not supported; write the task into one file")
    for entry in task.get("metric_list") or []:
        name = entry.get("metric") if isinstance(entry, dict) else entry
        if not isinstance(name, str) or name not in metric_registry or "hf_evaluate" in entry:
            raise DataError(
                f"{path}: the metric {name!r} is not one of lm-evaluation-harness's own, and would "
                "be loaded as code from elsewhere; use one of the harness, such as acc or acc_norm"
            )


def _sandbox_templates() -> None:
    """Render templates of tasks in Jinja's sandbox.

    The harness's own environment lets a template such as ``{{ cycler.__init__.__globals__ }}``
    reach every module, and so run commands (lm_eval/utils.py).
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    library: Any = utils
    if isinstance(library.env, ImmutableSandboxedEnvironment):
        return
    sandbox = ImmutableSandboxedEnvironment(
        loader=library.env.loader,
        undefined=library.env.undefined,
        keep_trailing_newline=library.env.keep_trailing_newline,
    )
    sandbox.filters.update(library.env.filters)
    library.env = sandbox


def evaluate_tasks(
    opened: OpenModel, tasks: list[str], *, batch_size: int = 8, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Run tasks.

    Args:
        opened: model and tokenizer.
        tasks: paths of YAML files, or names of the harness's own tasks (it downloads their data).
        batch_size: requests per forward pass.
        limit: examples per task; None is all.

    Returns:
        For each task its metrics, standard errors (``acc_stderr``) and ``examples``.

    Raises:
        ConfigError: lm-evaluation-harness is not installed.
        DataError: a task is unknown, or its file or data cannot be read.
    """
    if all(_is_file(task) for task in tasks):
        # Local tasks need no network, and without one each request to the hub costs minutes.
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from jinja2 import TemplateError
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models import huggingface
    except ImportError as error:
        raise ConfigError(
            f"tasks need lm-evaluation-harness ({error}): pip install 'topk-megatron[evaluate]'"
        ) from error
    specs = [read_task(Path(task)) if _is_file(task) else task for task in tasks]
    _sandbox_templates()
    library: Any = huggingface
    language_model = library.HFLM(
        pretrained=opened.model,
        tokenizer=opened.tokenizer,
        batch_size=batch_size,
        max_length=opened.max_length,
    )
    try:
        run: Any = simple_evaluate
        found = run(model=language_model, tasks=list(specs), limit=limit, log_samples=False)
    except (KeyError, FileNotFoundError, ConnectionError, ValueError, TemplateError) as error:
        raise DataError(f"lm-evaluation-harness refuses: {' '.join(str(error).split())}") from error
    return {name: _metrics(found, name) for name in found["results"]}


def _is_file(task: str) -> bool:
    if task.endswith((".yaml", ".yml")):
        if not Path(task).is_file():
            raise DataError(f"there is no task file {task}")
        return True
    return False


def _metrics(found: Any, name: str) -> dict[str, float]:
    """Return metrics without the harness's filter names, such as none in ``acc_norm,none``."""
    metrics = {
        key.split(",")[0]: float(value)
        for key, value in found["results"][name].items()
        if isinstance(value, int | float) and "," in key
    }
    metrics["examples"] = found["n-samples"][name]["effective"]
    return metrics
