"""What the supervisor asks of the ledger: the bytes that a pool holds, written down with whoever runs on them."""

from collections.abc import Mapping
from typing import Protocol


class Promises(Protocol):
    def held(self, pool_id: str) -> dict[str, int]:
        """By device id; empty for a pool to which nothing is promised."""
        ...

    def restore(self, pool_id: str, instance_id: str, bytes_by_device: Mapping[str, int]) -> None:
        """Raises SollolError: it cannot be promised again."""
        ...

    def freed(self, pool_id: str, instance_id: str) -> None: ...
