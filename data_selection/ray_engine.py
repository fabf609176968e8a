"""Scoring on a Ray cluster (`pip install krontune[scale]`): the shards of `scoring`, handed out by Ray Data.

The folder of scores and its files are those of `Dsir.score`, so a run may begin on one engine and end on the other.
"""

import os
from pathlib import Path
from typing import Any

from .dsir import Dsir
from .scoring import ESTIMATOR, ScoreFolder, open_folder, score_shard
from .selection import checked_int
from .shards import NamedFiles, file_names
from .texts import DataSelectionError, TextSource, file_paths


def score_with_ray(
    dsir: Dsir, raw: TextSource, out_dir: str | os.PathLike[str], workers: int = 1, cpus: float = 1.0
) -> ScoreFolder:
    """Score on Ray what is missing in the folder; afterwards `dsir.select(raw, ..., out_dir=out_dir)` picks.

    Ray is started on this machine where `ray.init` was not called before.

    Args:
        dsir: a fitted estimator.
        raw: files, or a source that can be pickled; every node must see the files under the same path.
        out_dir: a folder that every node sees.
        workers: how many shards are scored at a time.
        cpus: cores that Ray sets aside for each.

    Raises:
        DataSelectionError: Ray is not installed, a shard cannot be read, or the folder belongs to something else.
    """
    workers = checked_int(workers, "workers", 1, 100_000, "so many shards are scored at a time")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports its use otherwise
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise DataSelectionError(f"{error}; pip install 'krontune[scale]'") from error
    # A worker may have another working folder. The names that the noise depends on stay.
    source = raw
    if paths := file_paths(raw):
        source = NamedFiles([str(path.absolute()) for path in paths], file_names(raw, paths))
    folder = open_folder(dsir, source, Path(out_dir).absolute())
    missing = folder.missing()
    if missing:
        items = ray.data.from_items([{"shard": number} for number in missing], override_num_blocks=len(missing))
        scored = items.map(
            ShardScorer,  # type: ignore[arg-type]  # Ray takes a class with __call__, its types do not say so
            fn_constructor_args=(folder, source),
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(missing))),
            num_cpus=cpus,
        )
        faults = [row["fault"] for row in scored.take_all() if row["fault"]]
        if faults:
            raise DataSelectionError(f"{len(faults)} of {len(missing)} shards failed; the first: {faults[0]}")
    return open_folder(dsir, raw, folder.path)


class ShardScorer:
    """An actor: reads the estimator once, then scores shard after shard."""

    def __init__(self, folder: ScoreFolder, raw: TextSource) -> None:
        self.folder, self.raw = folder, raw
        self.scorer = Dsir.load(folder.path / ESTIMATOR).scorer()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        shard = self.folder.shards[row["shard"]]
        try:
            self.folder.write(shard.number, score_shard(self.scorer, self.raw, shard, ""))
        except (DataSelectionError, OSError) as error:
            return {"shard": shard.number, "fault": str(error)}
        return {"shard": shard.number, "fault": ""}
