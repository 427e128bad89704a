"""Folders sent to the Hugging Face hub. It goes through huggingface_hub, so that HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE
mean what they mean everywhere; nothing is sent that was not asked for."""

from __future__ import annotations

import re
from pathlib import Path

from smalllm.config import UserError


def check_name(repo: str) -> None:
    """UserError unless this is a name OWNER/NAME that the hub allows."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}", repo):
        raise UserError(f"--push {repo!r} is not OWNER/NAME, such as me/my-stories")


def push(folder: Path, repo: str) -> str:
    """Upload all files of a folder as one commit of a model repository, made private if it is new; returns its address.
    UserError in a sentence for what the hub refuses."""
    check_name(repo)
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(repo, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Model, tokenizer and certificate, by SmallLM"
        )
    except HFValidationError:
        raise UserError(f"--push {repo}: the hub does not allow this name; choose another") from None
    except OfflineModeIsEnabled:
        raise UserError(f"--push {repo}: HF_HUB_OFFLINE is set; unset it to upload") from None
    except HfHubHTTPError as error:
        raise UserError(_refusal(repo, error.response.status_code)) from None
    except Exception as error:  # the client's transport has error classes of its own, and other ones in each version
        reason = type(error).__name__
        raise UserError(f"--push {repo}: {hub.endpoint} cannot be reached ({reason}); {folder} is complete") from None
    return f"{hub.endpoint}/{repo}"


def _refusal(repo: str, status: int) -> str:
    if status in (401, 403):
        return f"--push {repo}: the hub wants a token that may write there; set HF_TOKEN, or run `hf auth login`"
    return f"--push {repo}: the hub answered with status {status}; try again later"
