"""A dataset repository of the Hugging Face Hub, spoken to by huggingface_hub: its own protocols, logins and caches.

What is read is pinned to the commit that was there when it was asked for first. What is written goes in commits of many
files, so that a history stays readable and a cut connection costs one commit's files at most; the Hub keeps what of
them it had already.
"""

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from geomcache.errors import ConnectionFailedError, GeomcacheError, RemoteError, UserInputError
from geomcache.sharing.base import LocalFile, Patience, RemoteFile, reason

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

_COMMIT_FILES, _COMMIT_NBYTES = 100, 2 << 30
_PASSING_STATUS = {408, 429, 500, 502, 503, 504}
_KIND = "dataset"


@dataclass(kw_only=True)
class HubRemote:
    """A dataset repository."""

    api: "HfApi"
    repo_id: str
    revision: str | None
    address: str
    has_card: bool = True
    _commit: str | None = field(default=None, init=False)
    _files: dict[str, RemoteFile] | None = field(default=None, init=False)

    @classmethod
    @contextlib.contextmanager
    def open(cls, address: str, revision: str | None) -> Iterator[Self]:
        """The repository of an address; while it is used, huggingface_hub shows no bars of its own.

        Raises:
            UserInputError: the address names none.
        """
        match = re.fullmatch(r"hf://(?:datasets/)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?/?", address)
        if match is None:
            raise UserInputError(
                f"{address}: expected hf://datasets/owner/name or hf://datasets/owner/name@revision, got another form"
            )
        if match[2] and revision and match[2] != revision:
            raise UserInputError(f"--revision: expected {match[2]}, as {address} has it, got {revision}: give one")
        from huggingface_hub import HfApi
        from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

        wanted = revision or match[2]
        named = f"hf://datasets/{match[1]}" + (f"@{wanted}" if wanted else "")
        before = are_progress_bars_disabled()
        if not before:
            disable_progress_bars()
        try:
            yield cls(api=HfApi(library_name="geomcache"), repo_id=match[1], revision=wanted, address=named)
        finally:
            if not before:
                enable_progress_bars()

    def listing(self) -> dict[str, RemoteFile]:
        """As of `Remote`, with the hashes that the Hub keeps. Pins the commit that it is of."""
        from huggingface_hub.hf_api import RepoFile

        self._files = {}
        with self._speaking(""):
            self._commit = self.api.repo_info(self.repo_id, repo_type=_KIND, revision=self.revision).sha
            tree = self.api.list_repo_tree(self.repo_id, repo_type=_KIND, revision=self._commit, recursive=True)
            for entry in tree:
                if isinstance(entry, RepoFile):
                    digest = entry.lfs.sha256 if entry.lfs else None
                    oid = None if entry.lfs else entry.blob_id
                    self._files[entry.path] = RemoteFile(size=entry.size, sha256=digest, git_oid=oid)
        return dict(self._files)

    def read(self, name: str, limit: int) -> bytes | None:
        """As of `Remote`."""
        import tempfile

        with tempfile.TemporaryDirectory(prefix="geomcache-") as folder:
            path = self.fetch(name, limit, Path(folder))
            return None if path is None else path.read_bytes()

    def fetch(self, name: str, size: int, folder: Path) -> Path | None:
        """As of `Remote`. The size that the Hub tells is compared before anything is asked for."""
        if self._files is None:
            self.listing()
        assert self._files is not None
        found = self._files.get(name)
        if found is None:
            return None
        if found.size > size:
            raise RemoteError(
                f"{self.address}/{name}: expected {size} bytes at most, found {found.size}: the repository was changed"
                " by something else than `geomcache push`"
            )
        with self._speaking(name):
            return Path(
                self.api.hf_hub_download(self.repo_id, name, repo_type=_KIND, revision=self._commit, local_dir=folder)
            )

    def prepare(self, *, private: bool) -> None:
        """As of `Remote`: makes repository and branch where there are none.

        Raises:
            UserInputError: the repository is there, and public where it was to be private.
        """
        with self._speaking(""):
            self.api.create_repo(self.repo_id, repo_type=_KIND, private=private or None, exist_ok=True)
            if private and not self.api.repo_info(self.repo_id, repo_type=_KIND).private:
                raise UserInputError(
                    f"{self.address}: --private: expected a private repository, found a public one: make it private in"
                    " its settings on the Hub, or leave --private out"
                )
            if self.revision is not None:
                self.api.create_branch(self.repo_id, repo_type=_KIND, branch=self.revision, exist_ok=True)

    def put(self, files: Mapping[str, LocalFile], insist: Patience, done: Callable[[int], None]) -> None:
        """As of `Remote`: in commits of many files."""
        for batch in _batches(files):
            insist(lambda batch=batch: self._add(files, batch))  # type: ignore[misc]
            done(sum(files[name].size for name in batch))

    def _add(self, files: Mapping[str, LocalFile], names: list[str]) -> None:
        from huggingface_hub import CommitOperationAdd

        additions = [CommitOperationAdd(name, _as_operand(files[name].source)) for name in names]
        self._change(additions, f"geomcache push: {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else ""))

    def delete(self, names: Collection[str]) -> None:
        """As of `Remote`: in one commit."""
        from huggingface_hub import CommitOperationDelete

        if names:
            removals = [CommitOperationDelete(name, is_folder=False) for name in names]
            self._change(removals, f"geomcache push: remove {len(names)} files that are to be replaced")

    def _change(self, operations: "Sequence[CommitOperationAdd | CommitOperationDelete]", message: str) -> None:
        with self._speaking(""):
            self.api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                repo_type=_KIND,
                revision=self.revision,
            )
        self._files = None

    @contextlib.contextmanager
    def _speaking(self, name: str) -> Iterator[None]:
        """Turn what huggingface_hub raises into one line that says what to do."""
        import httpx
        from huggingface_hub import errors

        where = f"{self.address}/{name}".rstrip("/")
        login = "for a private one run `hf auth login` with an account that may use it"
        try:
            yield
        except errors.OfflineModeIsEnabled as error:
            raise RemoteError(f"{where}: expected the Hub, found HF_HUB_OFFLINE set: unset it") from error
        except errors.HFValidationError as error:
            raise UserInputError(f"{where}: expected a repository's name ({reason(error)})") from error
        except errors.GatedRepoError as error:
            raise RemoteError(
                f"{where}: expected access, found that the Hub wants consent first: agree on the repository's page"
                " there and run `hf auth login`"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise RemoteError(f"{where}: expected this revision, found that the repository has none such") from error
        except errors.RepositoryNotFoundError as error:
            raise RemoteError(
                f"{where}: expected a dataset repository, found none that you may see: check the name; {login}"
            ) from error
        except GeomcacheError:
            raise
        except (OSError, httpx.HTTPError, RuntimeError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
                raise  # this machine's own: no room, no permission
            status = _status(error)
            if status in (401, 403) or isinstance(error, PermissionError):
                raise RemoteError(
                    f"{where}: expected access, found none ({reason(error)}): run `hf auth login` with a token that may"
                    " do this"
                ) from error
            if (status or 0) >= 400 and status not in _PASSING_STATUS:
                raise RemoteError(f"{where}: expected the Hub to agree, found a refusal ({reason(error)})") from error
            if isinstance(error, ValueError) and not isinstance(error, OSError):
                raise RemoteError(f"{where}: expected the Hub's protocol, found another ({reason(error)})") from error
            raise ConnectionFailedError(
                f"{where}: expected an answer, found the connection failing ({reason(error)})"
            ) from error


def _status(error: BaseException | None) -> int | None:
    """HTTP's, of the error or of what it came from: an upload's is wrapped."""
    while error is not None:
        found = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(found, int):
            return found
        error = error.__cause__
    return None


def _as_operand(source: Path | bytes) -> str | bytes:
    return source if isinstance(source, bytes) else str(source)


def _batches(files: Mapping[str, LocalFile]) -> Iterator[list[str]]:
    batch: list[str] = []
    nbytes = 0
    for name, file in files.items():
        if batch and (len(batch) == _COMMIT_FILES or nbytes + file.size > _COMMIT_NBYTES):
            yield batch
            batch, nbytes = [], 0
        batch.append(name)
        nbytes += file.size
    if batch:
        yield batch
