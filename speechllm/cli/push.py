"""`speechllm push`: a model's folder to the Hugging Face Hub."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_push(commands: argparse._SubParsersAction) -> None:
    push = commands.add_parser(
        "push",
        help="upload a model to the Hugging Face Hub",
        description="Upload the folder of a trained model, with its card and the results of recipes/decode.py in it, "
        "as one commit. HF_TOKEN or `hf auth login` say who you are. Then OWNER/NAME is a --model of all commands.",
    )
    push.add_argument("folder", type=Path, metavar="DIR", help="folder of a trained model")
    push.add_argument("repo", metavar="OWNER/NAME[@BRANCH]", help="repository; it is made if it is not there")
    push.add_argument("--private", action="store_true", default=None, help="a new repository is private")
    push.set_defaults(run=run_push)


def run_push(args: argparse.Namespace) -> int:
    from speechllm.errors import UserError
    from speechllm.hub import hub_id, push_folder
    from speechllm.model.config import load_model_config

    llm = load_model_config(args.folder).llm
    if llm is not None and llm.path is not None and hub_id(llm.path) is None:
        raise UserError(
            f"{args.folder}: holds an adapter without its base, {llm.path}, which is on this machine only: push the "
            "merged model, or set llm.path in its config.yaml to the id of the base on the Hub"
        )
    print(push_folder(args.folder, args.repo, args.private))
    return 0
