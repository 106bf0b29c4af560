"""A dataset repository of the Hugging Face Hub: read as any file system of fsspec, written by commits.

Reading is pinned to the commit that the last listing saw. Writing goes in commits of many files, so that the history
stays readable and a broken connection costs one commit at most: the Hub keeps the files' content, and the next try
sends only what it lacks. `HfApi.upload_large_folder` is not used: it decides the order of files itself, writes notes
into the folder that it sends, and tries again where the Hub refuses.
"""

import contextlib
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, override

from geomcache.cache.inventory import Stored
from geomcache.errors import UserInputError
from geomcache.sharing.address import public_address
from geomcache.sharing.base import Content, file_size, remote_errors
from geomcache.sharing.object_store import FsspecRemote
from geomcache.waits import limit_hub_requests

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

_COMMIT_FILES = 100
_DATASET = "dataset"


class HubRemote(FsspecRemote):
    """A dataset repository."""

    on_hub = True

    def __init__(self, address: str, revision: str | None) -> None:
        """Open the repository of an address. The Hub is not asked yet.

        Raises:
            UserInputError: the address names none.
        """
        match = re.fullmatch(r"hf://(?:datasets/)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?/?", address)
        if match is None:
            raise UserInputError(
                f"{public_address(address)}: expected hf://datasets/owner/name or hf://datasets/owner/name@revision,"
                " got another form"
            )
        if match[2] and revision and match[2] != revision:
            raise UserInputError(f"--revision: expected {match[2]}, as {address} has it, got {revision}: give one")
        from huggingface_hub import HfApi

        self._api, self._repo_id, self._revision = HfApi(library_name="geomcache"), match[1], revision or match[2]
        self._pinned = False
        limit_hub_requests()
        super().__init__(f"hf://datasets/{self._repo_id}" + (f"@{self._revision}" if self._revision else ""))

    @override
    def listing(self) -> dict[str, Stored]:
        with remote_errors(self.address):
            commit = self._api.repo_info(self._repo_id, repo_type=_DATASET, revision=self._revision).sha
        self._open_driver(f"hf://datasets/{self._repo_id}@{commit}")
        self._pinned = True
        return super().listing()

    @staticmethod
    @override
    def _sha256(entry: Mapping[str, Any]) -> str:
        return entry["lfs"].sha256 if entry["lfs"] else ""  # git's own files have another hash

    @override
    def fetch(self, name: str, limit: int, folder: Path) -> bool:
        if not self._pinned:
            self.listing()
        return super().fetch(name, limit, folder)

    @override
    def prepare(self, *, private: bool) -> None:
        """Create repository and branch where there are none.

        Raises:
            UserInputError: the repository exists, and is public where it was to be private.
        """
        with remote_errors(self.address):
            self._api.create_repo(self._repo_id, repo_type=_DATASET, private=private or None, exist_ok=True)
            if private and not self._api.repo_info(self._repo_id, repo_type=_DATASET).private:
                raise UserInputError(
                    f"{self.address}: --private: expected a private repository, found a public one: make it private in"
                    " its settings on the Hub, or leave --private out"
                )
            if self._revision is not None:
                self._api.create_branch(self._repo_id, repo_type=_DATASET, branch=self._revision, exist_ok=True)

    @override
    def put(self, files: Mapping[str, Content], done: Callable[[int], None]) -> None:
        from huggingface_hub import CommitOperationAdd

        for names in itertools.batched(files, _COMMIT_FILES):
            additions = [CommitOperationAdd(name, files[name]) for name in names]
            self._commit(
                additions, f"geomcache push: {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "")
            )
            done(sum(file_size(files[name]) or 0 for name in names))

    @override
    def delete(self, names: Collection[str]) -> None:
        from huggingface_hub import CommitOperationDelete

        if names:
            removals = [CommitOperationDelete(name, is_folder=False) for name in names]
            self._commit(removals, f"geomcache push: remove {len(names)} files that are to be replaced")

    def _commit(self, operations: "Sequence[CommitOperationAdd | CommitOperationDelete]", message: str) -> None:
        with remote_errors(self.address), _without_bars():
            self._api.create_commit(
                self._repo_id, operations, commit_message=message, repo_type=_DATASET, revision=self._revision
            )
        self._pinned = False


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keep huggingface_hub from showing bars of its own."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    disabled_before = are_progress_bars_disabled()
    if not disabled_before:
        disable_progress_bars()
    try:
        yield
    finally:
        if not disabled_before:
            enable_progress_bars()
