#!/usr/bin/env python3
"""Get the released parts of a model, an encoder and a language model, from the Hugging Face Hub or from disk.

    tools/download_parts.py --output-dir data                                  # TTA encoder, RWKV-7 G1 0.4B
    tools/download_parts.py --output-dir data --llm 1.5b
    tools/download_parts.py --output-dir data --encoder my-encoder --llm models/rwkv7-g1d-0.1b.pth

Makes two links, data/encoder and data/llm.pth (or --llm-link; to a file or a folder), which the recipes' configurations
name. What is downloaded lies in Hugging Face's cache (HF_HOME), once for all recipes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download

from speechllm.encoder.pretrained import WEIGHT_FILES
from speechllm.errors import UserError

ENCODER = "AudenAI/auden-encoder-tta-m10"  # arXiv 2511.14410
# In the main branch newer files take the place of older ones; a revision keeps them.
LLM_REPO, LLM_REVISION = "BlinkDL/rwkv7-g1", "ede85bf8ab2e59aff7d7ca909fbbc73317866d89"
LANGUAGE_MODELS = {
    "0.1b": "rwkv7-g1d-0.1b-20260129-ctx8192.pth",
    "0.4b": "rwkv7-g1d-0.4b-20260210-ctx8192.pth",
    "1.5b": "rwkv7-g1i-1.5b-20260805-ctx16384.pth",
    "2.9b": "rwkv7-g1i-2.9b-20260805-ctx16384.pth",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the links")
    parser.add_argument(
        "--encoder", default=ENCODER, metavar="DIR|OWNER/REPO", help="a folder, or a repository (default: %(default)s)"
    )
    parser.add_argument(
        "--llm",
        default="0.4b",
        metavar="FILE|SIZE|OWNER/REPO[/NAME]",
        help=f"a file or folder, one of {', '.join(LANGUAGE_MODELS)} (RWKV-7 G1), or a repository or a file in one "
        "(default: %(default)s)",
    )
    parser.add_argument("--llm-link", default="llm.pth", metavar="NAME", help="of its link (default: %(default)s)")
    args = parser.parse_args()
    try:
        encoder, llm = find_encoder(args.encoder), find_llm(args.llm)
        link(args.output_dir / "encoder", encoder)
        link(args.output_dir / args.llm_link, llm)
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")


def find_encoder(encoder: str) -> Path:
    """The folder of an encoder, downloaded where `encoder` is not one.

    Raises:
        UserError: it cannot be downloaded; the folder has no weights or no config.json.
    """
    folder = Path(encoder)
    if not folder.is_dir():
        if encoder.count("/") != 1:
            raise UserError(f"--encoder {encoder}: no such folder, and no OWNER/REPO of the Hugging Face Hub")
        patterns = ["config.json", *WEIGHT_FILES]
        folder = Path(downloaded(encoder, lambda: snapshot_download(encoder, allow_patterns=patterns)))
    if not (folder / "config.json").is_file() or not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise UserError(f"{folder}: an encoder needs config.json and one of {', '.join(WEIGHT_FILES)}")
    return folder


def find_llm(llm: str) -> Path:
    """The file or folder of a language model, downloaded where `llm` is neither.

    Raises:
        UserError: it cannot be downloaded.
    """
    if Path(llm).exists():
        return Path(llm)
    if llm.lower() in LANGUAGE_MODELS:
        repo, name, revision = LLM_REPO, LANGUAGE_MODELS[llm.lower()], LLM_REVISION
    elif llm.count("/") == 1:
        patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"]
        return Path(downloaded(llm, lambda: snapshot_download(llm, allow_patterns=patterns)))
    elif llm.count("/") >= 2:
        owner, repo, name = llm.split("/", 2)
        repo, revision = f"{owner}/{repo}", None
    else:
        raise UserError(
            f"--llm {llm}: no such file or folder, none of {', '.join(LANGUAGE_MODELS)}, and no OWNER/REPO or "
            "OWNER/REPO/NAME of the Hugging Face Hub"
        )
    return Path(downloaded(f"{repo}/{name}", lambda: hf_hub_download(repo, name, revision=revision)))


def downloaded(what: str, download: Callable[[], str]) -> str:
    print(f"{what}: from the Hugging Face Hub or its cache", flush=True)
    try:
        return download()
    except Exception as e:  # besides its own errors the Hub's client raises those of its HTTP library, which changes
        raise UserError(
            f"cannot download {what}: {type(e).__name__}: {e}\n"
            "Is the network there, and the name still right? HF_ENDPOINT sets a mirror. "
            "Parts that are on disk already are given as --encoder DIR and --llm FILE."
        ) from e


def link(path: Path, target: Path) -> None:
    """Make `path` a link to `target`; an older link is replaced in one move.

    Raises:
        UserError: something that is not a link is there.
    """
    target = target.resolve()
    if path.resolve() != target:
        if path.exists() and not path.is_symlink():
            raise UserError(f"{path}: is there already, and not a link; move it away, or give it as the part itself")
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.new")
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        os.replace(new, path)
    print(f"{path} -> {target}")


if __name__ == "__main__":
    main()
