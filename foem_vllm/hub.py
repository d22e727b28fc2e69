"""Upload a checkpoint to the hub, after a check that it is whole."""

from __future__ import annotations

import glob
import pathlib

from foem_vllm.errors import FoemError
from foem_vllm.format import read_config
from foem_vllm.integrity import INDEX, read_headers, verify_files

REMEDIES = {  # by HTTP status
    401: "there is no valid token; make one with write access and run `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there; use one with write access, or a REPO of your own",
    404: "no such repository for this token; check REPO and --revision",
}


def files_of(folder: pathlib.Path) -> list[str]:
    """Names of the files that belong to the checkpoint, which is proved to be whole: config, headers, checksums.

    Raises FoemError on a folder that an unfinished run left, on damaged, missing and foreign weights, and on checkpoints without
    checksums, which others made.
    """
    if not folder.is_dir():
        raise FoemError(f"{folder}: no such folder; `foem quantize MODEL {folder}` makes one")
    if folder.resolve().name.startswith("."):
        raise FoemError(f"{folder}: hidden, as what an unfinished run leaves; push the folder that `foem quantize` finished")
    meta = read_config(folder).meta
    read_headers(folder)
    if not verify_files(folder, meta):
        raise FoemError(
            f"{folder}: no checksum in config.json was compared, so nothing shows that it is whole; push what `foem quantize` "
            "wrote, without FOEM_SKIP_CHECKSUM"
        )
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    foreign = [name for name in names if name.endswith(".safetensors") and name not in meta["foem"]["sha256"]]
    if foreign:
        raise FoemError(f"{folder / foreign[0]} is not among the weights that config.json lists; move it away")
    return names


def push(folder: str | pathlib.Path, repo: str, private: bool = False, revision: str | None = None) -> str:
    """Upload the checkpoint to the hub's `repo` (OWNER/NAME), which is made where it is missing; returns its address.

    Weights that lie there from before are removed: with them a model would load from two checkpoints. revision: a branch, made
    where it is missing. Raises FoemError when the checkpoint is not whole, and with the remedy when the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    folder = pathlib.Path(folder)
    names = files_of(folder)
    api = HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            allow_patterns=[glob.escape(name) for name in names],
            delete_patterns=["*.safetensors", INDEX],
            commit_message="Checkpoint of foem quantize",
        )
    except HFValidationError as error:
        raise FoemError(f"{repo}: no name for a repository ({error}); write OWNER/NAME") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        remedy = REMEDIES.get(status, "try again later")
        raise FoemError(f"{api.endpoint} refuses to take {repo} (HTTP {status}): {remedy}") from error
    except (HTTPError, OSError) as error:
        raise FoemError(
            f"{api.endpoint} cannot be reached ({_line(error)}); check the network, HF_ENDPOINT and HF_HUB_OFFLINE, push again"
        ) from error
    return str(url)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
