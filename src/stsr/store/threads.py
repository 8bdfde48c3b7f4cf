"""Threads that end with the work they do."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def own_threads() -> Iterator[None]:
    """Run dask in a thread pool that ends here: after an error, no thread still writes into a folder to be removed."""
    import dask
    from dask.system import CPU_COUNT

    with ThreadPoolExecutor(dask.config.get("num_workers", None) or CPU_COUNT) as pool:
        try:
            with dask.config.set(pool=pool):
                yield
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
