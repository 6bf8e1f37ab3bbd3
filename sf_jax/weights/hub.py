"""Downloads weights from the Hugging Face hub through its own client, with its cache, offline mode and tokens.

A repository is `ORGANIZATION/NAME`, optionally followed by `@REVISION` (a branch, tag or commit); the default is the
main branch. A file is a repository and a path: `gdhe17/Self-Forcing/checkpoints/self_forcing_dmd.pt`. An `hf://` prefix
or the URL of the page also works. A local file or folder of the same name takes precedence. HF_HOME, HF_HUB_OFFLINE,
HF_TOKEN and HF_ENDPOINT have their usual meaning.
"""

import dataclasses
import glob
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from sf_jax.files import local_path
from sf_jax.weights.places import ADAPTER_FILES, DESCRIPTIONS, files_of, find_part

_SCHEME = re.compile(r"hf:/+(?:models/)?")
_PAGE = re.compile(r"https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)/")
_VERBS = ("resolve", "blob", "tree", "raw")
_NAME = re.compile(r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?")
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
# A pattern that matches no file: requests the snapshot's folder without downloading anything.
_NOTHING = ["/"]


@dataclasses.dataclass(frozen=True)
class Place:
    """A repository of the hub, or a file in it.

    Attributes:
      repository: Its name, such as "Wan-AI/Wan2.1-T2V-1.3B".
      revision: Branch, tag or commit; None is the main branch.
      path: A file or folder in it; empty for the whole repository.
    """

    repository: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        """The name as users write it."""
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{self.repository}{revision}{'/' if self.path else ''}{self.path}"


def is_address(value: str) -> bool:
    """Whether a value is an explicit address on the hub: `hf://...` or the URL of a page."""
    return bool(_SCHEME.match(value) or _PAGE.match(value))


def weights_path(value: str) -> str:
    """Validates an option that names weights: returns hub addresses unchanged, else a path (see `files.local_path`).

    Raises:
      ValueError: If it is another kind of address, or not a path.
    """
    return value if is_address(value) else local_path(value)


def parse(value: str) -> Place | None:
    """Parses the name of a repository or file on the hub.

    Args:
      value: The user's input.

    Returns:
      The place; None if `value` is a local path. It counts as local if its first folder exists here.

    Raises:
      ValueError: If `value` is an address of the hub but not a valid name.
    """
    explicit = is_address(value)
    if not explicit and (os.path.lexists(value) or value.startswith((".", "~", "/"))):
        return None
    text = _PAGE.sub("", _SCHEME.sub("", value)).split("?")[0].strip("/")
    organization, _, rest = text.partition("/")
    name, _, path = rest.partition("/")
    name, at, revision = name.partition("@")
    if at and revision == "refs" and path.startswith(("pr/", "convert/")):
        kind, number, *parts = path.split("/", 2)
        revision, path = f"refs/{kind}/{number}", "".join(parts)
    verb, _, page = path.partition("/")
    if _PAGE.match(value) and verb in _VERBS:
        revision, _, path = page.partition("/")
    valid = _NAME.fullmatch(organization) and _NAME.fullmatch(name) and len(f"{organization}/{name}") <= 96
    if valid and (explicit or not Path(organization).exists()):
        return Place(f"{organization}/{name}", revision.replace("%2F", "/") or None, path)
    if explicit:
        raise ValueError(f"{value} names nothing of the hub: give ORGANIZATION/NAME, @REVISION and the file's path")
    return None


def fetch(place: Place, choose: Callable[[Sequence[str]], Sequence[str]]) -> Path:
    """Downloads some files of a repository into the hub's cache.

    Args:
      place: The repository.
      choose: Selects the files to download from the names of all files.

    Returns:
      The folder that contains them; without a network, the cached folder of that revision.

    Raises:
      ValueError: One line that says what to do, if the repository or revision does not exist, access is denied, the
        client is not installed, or there is neither a network nor a cached copy.
    """
    client = _client(place)

    def download():
        try:
            info = client.HfApi().model_info(place.repository, revision=place.revision)
        except Exception as error:
            if not _is_network(error):
                raise
            return client.snapshot_download(
                place.repository, revision=place.revision, local_files_only=True, allow_patterns=_NOTHING
            )
        names = choose([sibling.rfilename for sibling in info.siblings or ()])
        return client.snapshot_download(
            place.repository, revision=place.revision, allow_patterns=[glob.escape(name) for name in names] or _NOTHING
        )

    return Path(_explained(place, download))


def local_file(value: str | Path) -> str:
    """The local path of a weight file: `value` itself, or the downloaded file of that name.

    For a repository without a path, or a folder in it: its transformer, its adapter or its only weight file.

    Args:
      value: A local path, or a file on the hub.

    Raises:
      ValueError: See `fetch`; or if the repository has no such file.
    """
    place = parse(str(value))
    if place is None:
        return str(value)

    def choose(names):
        if place.path in names:
            return [*files_of(names, place.path), *_configs_beside(names, place.path)]
        folder = f"{place.path}/".lstrip("/")
        return [folder + name for name in _only_weights(place, names_inside(place, names))]

    path = fetch(place, choose) / place.path
    if not path.exists():
        raise ValueError(_unreachable(place, None))
    return str(path)


def names_inside(place: Place, names: Sequence[str]) -> list[str]:
    """The files of a repository in the place's folder, relative to that folder; all files if its path is empty.

    Raises:
      ValueError: If the repository has no such folder.
    """
    folder = f"{place.path}/".lstrip("/")
    inside = [name.removeprefix(folder) for name in names if name.startswith(folder)]
    if not inside:
        weights = [name for name in names if name.endswith(_SUFFIXES)]
        raise ValueError(f"{place.repository} of the hub has no file {place.path}: it has {', '.join(weights[:8])}")
    return inside


def _configs_beside(names: Sequence[str], file: str) -> list[str]:
    """The config files next to weights: they have a transformer's number of heads, or an adapter's scale."""
    folder = file.rpartition("/")[0]
    configs = (f"{folder}/{name}".lstrip("/") for name in ("config.json", "adapter_config.json"))
    return [config for config in configs if config in names]


def _only_weights(place: Place, names: Sequence[str]) -> list[str]:
    """The transformer's files in a repository, shards included; else its adapter or only weight file."""
    try:
        main = find_part(names, "transformer")
    except ValueError as error:
        raise ValueError(f"{place} {error}") from error
    if main is not None:
        return [*files_of(names, main), *(name for name in names if name in DESCRIPTIONS)]
    weights = [name for name in names if name.endswith(_SUFFIXES)]
    adapters = [name for name in ADAPTER_FILES if name in names]
    if len(weights) == 1 or adapters:
        file = adapters[0] if adapters else weights[0]
        return [file, *_configs_beside(names, file)]
    there = f"give one of its files: {', '.join(weights[:6])}" if weights else f"it has {', '.join(names[:6])}"
    raise ValueError(f"{place} of the hub is no single file of weights: {there}")


def _client(place: Place):
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            f"{place} is no file or folder here; if it is of the Hugging Face hub, install its client: "
            "pip install 'sf_jax[download]'"
        ) from error
    return huggingface_hub


def _explained(place: Place, call: Callable[[], str]) -> str:
    """Calls the hub's client; turns its errors into one line that says what to do."""
    from huggingface_hub import errors

    repository, page = place.repository, f"https://huggingface.co/{place.repository}"
    log_in = "log in with 'hf auth login', or set HF_TOKEN"
    try:
        return call()
    except errors.GatedRepoError as error:
        raise ValueError(f"{place} is gated: accept its terms at {page}, then {log_in}") from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{repository} of the hub has no revision {place.revision}: see {page}/tree/main") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{place} is no file or folder here, and the hub has no repository {repository} that you may read: correct "
            f"the name, or, if it is private, {log_in}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ValueError(_unreachable(place, error.__cause__ or error)) from error
    except errors.HFValidationError as error:
        raise ValueError(f"{place} names nothing of the hub ({' '.join(str(error).split())[:160]})") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise ValueError(f"{place} may not be read ({status}): {log_in}") from error
        raise ValueError(f"{place}: the hub answers {status}; try again later") from error
    except Exception as error:
        if isinstance(error, ValueError) or not _is_network(error):
            raise
        raise ValueError(_unreachable(place, error)) from error


def _unreachable(place: Place, error: BaseException | None) -> str:
    """The error message without a network; `error` is the client's exception, if any."""
    offline = type(error).__name__ == "OfflineModeIsEnabled" or os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "")
    reason = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
    return (
        f"{place} is no file or folder here, nor in the hub's cache, and {reason}: fetch it where there is a network "
        "(hf download) and give its path, or HF_HOME with its cache"
    )


def _is_network(error: BaseException) -> bool:
    """Whether an error means that the hub is unreachable or down; its client raises many kinds."""
    response = getattr(error, "response", None) if type(error).__module__.startswith("huggingface_hub") else None
    if response is not None:
        return getattr(response, "status_code", 0) >= 500
    names = {kind.__name__ for kind in type(error).__mro__}
    known = {"ConnectionError", "TransportError", "TimeoutException", "Timeout", "IncompleteSnapshotError"}
    return bool(names & known) or isinstance(error, TimeoutError)
