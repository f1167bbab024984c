"""Starts the explorer from the command line."""

import argparse
from pathlib import Path

from topk_megatron.cli import exit_on_user_error
from topk_megatron.errors import AnalysisError
from topk_megatron.hf.model import open_model
from topk_megatron.web.explorer.security import LOCAL_NAMES


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description="Explore a TopK model in the browser: which neurons fire at each token, "
        "which tokens they promote, and what the model writes when one is steered.",
        epilog="This command runs the code in the model folder. It listens on this machine only, "
        "unless --host says otherwise, and has no login.",
    )
    parser.add_argument("--model", type=Path, required=True, help="exported Hugging Face folder")
    parser.add_argument("--study", type=Path, help="study directory with cards of the neurons")
    parser.add_argument(
        "--run", help="run of the study (default: the run recorded from this model)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument(
        "--allow-host", nargs="+", default=[], metavar="NAME",
        help="further host names under which the page may be opened",
    )  # fmt: skip
    return parser.parse_args()


@exit_on_user_error
def main() -> None:
    """Loads the model and serves the page until interrupted."""
    args = parse()
    try:
        import uvicorn

        from topk_megatron.web.explorer.app import make_app
        from topk_megatron.web.explorer.engine import open_engine
    except ImportError as error:
        raise AnalysisError(
            f"the explorer needs {error.name}; install the extra: pip install "
            "topk-megatron[analysis]"
        ) from error
    if not 0 < args.port < 65536:
        raise AnalysisError(f"--port must be from 1 to 65535, got {args.port}")
    engine = open_engine(open_model(args.model), args.study, args.run)
    app = make_app(engine, (*LOCAL_NAMES, args.host, *args.allow_host))
    shown = f"[{args.host}]" if ":" in args.host else args.host
    print(f"topk-explorer: http://{shown}:{args.port}/  (Ctrl-C stops it)", flush=True)
    if args.host not in LOCAL_NAMES:
        print("  other machines may be able to reach it, and it has no login", flush=True)
    uvicorn.run(
        app, host=args.host, port=args.port, log_level="warning", server_header=False,
        limit_concurrency=32,
    )  # fmt: skip
