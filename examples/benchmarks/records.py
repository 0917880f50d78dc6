"""The records of a study: a file that grows by a line per record, so that a study that stopped goes on."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

Record = dict[str, Any]


class Records(list[Record]):
    """The records of a study so far.

    Args:
        path: of the file; it need not exist.
        run: the dataclass of a run, whose fields say in a record what was done. Equal runs are done once.
    """

    def __init__(self, path: Path, run: type) -> None:
        lines = path.read_text().splitlines() if path.exists() else []
        super().__init__(json.loads(line) for line in lines)
        self.path, self.names = path, [field.name for field in fields(run)]

    def missing(self, runs: Iterable[Any]) -> list[Any]:
        """The runs that have no record yet, each once."""
        known = {self._key(record) for record in self}
        return [run for run in dict.fromkeys(runs) if self._key(asdict(run)) not in known]

    def do(
        self,
        title: str,
        runs: Iterable[Any],
        work: Callable[[Any], list[Record]],
        workers: int = 1,
        threads: int = 1,
    ) -> None:
        """Carry out the runs that have no record yet; `work` gives the records of one."""
        missing = self.missing(runs)
        results = _results(missing, work, workers, threads)
        for found in tqdm(results, total=len(missing), desc=title, disable=not missing):
            self.add(found)

    def add(self, records: Iterable[Record]) -> None:
        with self.path.open("a") as file:
            for record in records:
                record = record | {"model": _short(record["model"])}
                self.append(record)
                file.write(json.dumps(record) + "\n")

    def _key(self, record: Record) -> str:
        named = {name: record[name] for name in self.names} | {"model": _short(record["model"])}
        return json.dumps(named, sort_keys=True)


def _results(
    runs: Sequence[Any], work: Callable[[Any], list[Record]], workers: int, threads: int
) -> Iterator[list[Record]]:
    """The records of every run, as they come."""
    if workers == 1:
        yield from map(work, runs)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        futures = [pool.submit(work, run) for run in runs]
        yield from (future.result() for future in as_completed(futures))


def _short(model: str) -> str:
    """Folders by their name, so that a study can move to another machine."""
    return Path(model).name if Path(model).exists() else model
