"""What an answer of the hub means, and what to do about it."""

from __future__ import annotations

from ...errors import UserError

_SIGN_IN = "hf auth login, or set HF_TOKEN"


def explained(error: Exception, repo: str, revision: str | None = None) -> UserError:
    """The error for people behind an exception of huggingface_hub, or of the HTTP library under it."""
    from huggingface_hub import constants, errors

    place = f"{constants.ENDPOINT}/{repo}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        why = f"{repo} is gated: the hub gives it to those alone who asked for it"
        return UserError(why, f"ask at {place}, then: {_SIGN_IN}")
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{repo} has no revision {revision!r}", f"a branch, a tag or a commit of {place}/commits/main")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(
            f"the hub has no {repo}, or it is private and this machine has no token for it",
            f"check the spelling; for a private one: {_SIGN_IN}",
        )
    if isinstance(error, errors.HFValidationError):
        return UserError(f"{repo} cannot be the name of a repository", "user/name, of letters, digits, - _ and .")
    if isinstance(error, errors.LocalTokenNotFoundError):
        return UserError("this machine has no token of the hub", _SIGN_IN)
    if status in (401, 403):
        return UserError(f"the hub refuses {repo} to this token", f"{_SIGN_IN} of an account that may do this")
    if status is not None and not isinstance(error, errors.LocalEntryNotFoundError):
        return UserError(f"{repo}: the hub answers {status} ({_line(error)})", "try again later")
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return UserError(f"{repo} lacks a file ({_line(error)})", "another revision of it, or ask its author")
    return UserError(
        f"{repo} is not in the cache, and the hub cannot be reached ({_line(error)})",
        "check the network, HF_HUB_OFFLINE and HF_ENDPOINT; what was loaded once is loaded without a network",
    )


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
