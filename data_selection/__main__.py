"""DSIR from a shell, for pools that several machines score together.

    python -m krontune.data_selection fit --target wanted.jsonl --raw pool-*.jsonl --raw-sample 200000 --out dsir
    python -m krontune.data_selection score --dsir dsir --raw pool-*.jsonl --scores scores --shard 3 --num-shards 16
    python -m krontune.data_selection select --dsir dsir --raw pool-*.jsonl --scores scores -k 100000 --out picked.jsonl

`score` runs on every machine with its own --shard, in a folder that all see; it may be killed and started again.
`select` scores whatever is missing before it picks.
"""

import argparse
import json
import sys
from pathlib import Path

from .dsir import Dsir
from .texts import DataSelectionError


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0, or 2 where the data or an argument is at fault."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except DataSelectionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _fit(options: argparse.Namespace) -> None:
    dsir = Dsir(options.ngrams, options.buckets, normalize=options.normalize, chunk_words=options.chunk_words)
    dsir.fit(target=options.target, raw=options.raw, raw_sample=options.raw_sample, seed=options.seed)
    dsir.save(options.out)


def _score(options: argparse.Namespace) -> None:
    part = (options.shard, options.num_shards)
    folder = Dsir.load(options.dsir).score(options.raw, options.scores, options.num_proc, part)
    print(f"{len(folder.shards) - len(folder.missing())} of {len(folder.shards)} shards are scored")


def _select(options: argparse.Namespace) -> None:
    dsir = Dsir.load(options.dsir)
    k = None if options.k is None else float(options.k) if options.k < 1 else int(options.k)
    picked = dsir.select(
        options.raw,
        k,
        options.method,
        options.temperature,
        options.seed,
        tokens=options.tokens,
        num_proc=options.num_proc,
        out_dir=options.scores,
    )
    picked.write(options.out)
    picked.save(Path(options.out).with_suffix(".selection"))
    print(json.dumps(picked.summary(), indent=2))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m krontune.data_selection", description="Pick texts by DSIR.")
    commands = parser.add_subparsers(required=True)

    fit = commands.add_parser("fit", help="count the n-grams of target and pool")
    fit.set_defaults(run=_fit)
    fit.add_argument("--target", nargs="+", type=Path, required=True)
    fit.add_argument("--raw", nargs="+", type=Path, required=True)
    fit.add_argument("--raw-sample", type=int, help="count only so many texts of the pool")
    fit.add_argument("--ngrams", type=int, default=Dsir.ngrams)
    fit.add_argument("--buckets", type=int)
    fit.add_argument("--normalize", choices=["mean", "sum", "sqrt"])
    fit.add_argument("--chunk-words", type=int)
    fit.add_argument("--seed", type=int, default=0)
    fit.add_argument("--out", required=True, help="a folder for the estimator")

    score = commands.add_parser("score", help="weigh the pool, shard by shard")
    score.set_defaults(run=_score)
    score.add_argument("--shard", type=int, default=0, help="which machine this is, from 0")
    score.add_argument("--num-shards", type=int, default=1, help="how many machines there are")

    select = commands.add_parser("select", help="pick rows and write them")
    select.set_defaults(run=_select)
    select.add_argument("-k", type=float, help="how many rows, or below 1 which share of the pool")
    select.add_argument("--tokens", type=int, help="instead of -k: the most tokens")
    select.add_argument("--method", choices=["gumbel", "topk"], default="gumbel")
    select.add_argument("--temperature", type=float, default=1.0)
    select.add_argument("--seed", type=int, default=0)
    select.add_argument("--out", required=True, help="a .jsonl or .parquet file")
    for command in (score, select):
        command.add_argument("--dsir", required=True, help="the folder of the estimator")
        command.add_argument("--raw", nargs="+", type=Path, required=True)
        command.add_argument("--scores", required=True, help="a folder for the scores, seen by all machines")
        command.add_argument("--num-proc", type=int, default=1)
    return parser


if __name__ == "__main__":
    sys.exit(main())
