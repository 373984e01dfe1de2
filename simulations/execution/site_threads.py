"""Simulated sites side by side: a thread for each core, with a model of its own.

One site's products are small: two cores work faster on two sites than on one. The frozen base and
its outputs are one for all lanes; only the adapter is there once in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import torch

Handle = Callable[[bytes], bytes]


class SiteThreadPool:
    """`count` lanes; sites take them by turns, so that each always meets the same model."""

    def __init__(self, sites: Iterable[str], count: int) -> None:
        self.count = count
        self.of = {site: place % count for place, site in enumerate(sites)}
        self._before = torch.get_num_threads()
        self._threads = ThreadPoolExecutor(
            count, initializer=torch.set_num_threads, initargs=(1,), thread_name_prefix="lane"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()
        torch.set_num_threads(self._before)  # a lane's setting is that of all threads to come

    def ask(self, handles: Mapping[str, Handle], requests: Mapping[str, bytes]) -> dict[str, bytes]:
        """Each site's answer to its request, in the order of the requests."""

        def along(lane: int) -> list[tuple[str, bytes]]:
            return [
                (site, handles[site](wire))
                for site, wire in requests.items()
                if self.of[site] == lane
            ]

        found = dict(one for lane in self._threads.map(along, range(self.count)) for one in lane)
        return {site: found[site] for site in requests}
