import json

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset

from krontune.data_selection import AdaptInf, DataSelectionError, Store
from krontune.data_selection.bergson import import_bergson
from krontune.data_selection.targeted import select_for_target

SIZES = {"layers.0.q_proj": 6, "layers.0.v_proj": 4, "layers.1.q_proj": 6}
ROWS = 60


def gradients(rows=ROWS, seed=0):
    found = np.random.default_rng(seed).normal(size=(rows, 16)).astype(np.float32)
    found[3] = 0.0  # a document of one token
    return found


def write_index(folder, values, dtype="float32", structured=False, data=True, **changes):
    """An index as `bergson build` writes it: gradients.bin, info.json, config.yaml, processor_config.yaml, data.hf."""
    folder.mkdir(parents=True)
    rows = len(values)
    if dtype == "bfloat16":
        raw = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    else:
        raw = values.astype(dtype)
    if structured:
        kind = {"float16": "<f2", "float32": "<f4", "bfloat16": "<V2"}[dtype]
        fields = {
            "names": list(SIZES),
            "formats": [f"({size},){kind}" for size in SIZES.values()],
            "itemsize": raw.itemsize * 16,
        }
        info = {"num_grads": rows, "dtype": fields, "grad_sizes": SIZES, "base_dtype": dtype}
    else:
        info = {
            "attribute_tokens": False,
            "num_items": rows,
            "num_grads": rows,
            "grad_sizes": SIZES,
            "base_dtype": dtype,
        }
    (folder / "info.json").write_text(json.dumps(info | changes.pop("info", {}), indent=2))
    stored = np.memmap(folder / "gradients.bin", raw.dtype, "w+", shape=raw.shape)
    stored[:] = raw
    stored.flush()
    index = {"model": "owner/name", "revision": None, "loss_reduction": "mean", "data": {"dataset": "pile"}}
    index |= changes.pop("index_cfg", {})
    settings = {"index_cfg": index, "preprocess_cfg": {"aggregation": "none", "unit_normalize": False}}
    settings["preprocess_cfg"] |= changes.pop("preprocess_cfg", {})
    processor = {"projection_dim": 16, "projection_type": "rademacher", "projection_seed": 7, "include_bias": False}
    assert not changes
    document = {"steps": [{"build": settings}], "metadata": {"bergson_version": "2.5.1"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(document))
    (folder / "processor_config.yaml").write_text(yaml.safe_dump(processor))
    if data:
        losses = np.linspace(1.0, 2.0, rows).astype(np.float32)
        Dataset.from_dict({"text": [f"row {i}" for i in range(rows)], "loss": losses}).save_to_disk(folder / "data.hf")
    return folder


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_index_becomes_a_store_row_by_row(tmp_path, dtype, structured):
    values = gradients()
    store = import_bergson(write_index(tmp_path / "i", values, dtype, structured), out_dir=tmp_path / "s")
    norms = np.linalg.norm(values, axis=1)
    rough = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}[dtype]
    np.testing.assert_allclose(store.norms[4:], norms[4:], rtol=rough)
    for row in (0, 17, 59):
        np.testing.assert_allclose(store.vectors[row], values[row] / norms[row], atol=rough + 1e-3)
    assert not store.vectors[3].any() and np.isnan(store.norms[3]) and np.isnan(store.scores["nll"][3])
    np.testing.assert_allclose(store.scores["nll"][[0, 59]], [1.0, 2.0])
    source = store.key["source"]
    assert source["format"] == "bergson" and source["version"] == "2.5.1"
    assert source["layout"] == ("structured" if structured else "flat")
    assert store.key["model"] == "bergson:owner/name@main" and store.key["projection"]["projection_dim"] == 16
    picked = AdaptInf(clusters=3).select(store, budget=20)
    assert len(picked.indices) == 20 and 3 not in picked.indices
    chosen = picked.apply(Dataset.load_from_disk(tmp_path / "i" / "data.hf"))
    assert chosen["text"][0] == f"row {picked.indices[0]}"


def test_some_modules_alone_are_their_columns(tmp_path):
    values = gradients()
    index = write_index(tmp_path / "i", values)
    store = import_bergson(index, out_dir=tmp_path / "s", modules=["layers.1.q_proj", "layers.0.q_proj"])
    own = values[:, [*range(6), *range(10, 16)]]
    np.testing.assert_allclose(store.vectors[5], own[5] / np.linalg.norm(own[5]), atol=1e-3)
    assert store.key["layers"] == ["layers.0.q_proj", "layers.1.q_proj"]
    with pytest.raises(DataSelectionError, match=r"\['layers.9'\].*layers.0.q_proj, layers.0.v_proj"):
        import_bergson(index, out_dir=tmp_path / "t", modules=["layers.9"])


def test_a_cut_import_goes_on_to_the_same_bytes_and_another_index_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("krontune.data_selection.bergson.ROWS_AT_ONCE", 16)
    index = write_index(tmp_path / "i", gradients())
    import_bergson(index, out_dir=tmp_path / "once")
    write = Store.write

    def killed(store, rows, scores, vectors):
        if rows[0] >= 32:
            raise KeyboardInterrupt
        write(store, rows, scores, vectors)

    monkeypatch.setattr(Store, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        import_bergson(index, out_dir=tmp_path / "s")
    monkeypatch.setattr(Store, "write", write)
    assert Store(tmp_path / "s").done.sum() == 32
    import_bergson(index, out_dir=tmp_path / "s")
    for name in ("vectors.f16", "scores.arrow"):
        assert (tmp_path / "s" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()
    other = write_index(tmp_path / "j", gradients(seed=1))
    with pytest.raises(DataSelectionError, match="source: .*there"):
        import_bergson(other, out_dir=tmp_path / "s")


def test_pool_and_target_are_compared_where_they_were_built_alike(tmp_path):
    values = gradients()
    pool = import_bergson(write_index(tmp_path / "p", values), out_dir=tmp_path / "ps")
    target = import_bergson(write_index(tmp_path / "t", values[[7, 7]]), out_dir=tmp_path / "ts")
    assert 7 in select_for_target(pool, target, budget=1).indices
    conditioned = write_index(tmp_path / "c", values[:5], preprocess_cfg={"hessian_path": "run/hessian"})
    other = import_bergson(conditioned, out_dir=tmp_path / "cs")
    with pytest.raises(DataSelectionError, match="cannot be compared .*hessian"):
        select_for_target(pool, other, budget=1)
    bare = write_index(tmp_path / "b", values[:5], index_cfg={"loss_reduction": "sum"})
    assert "loss" in import_bergson(bare, out_dir=tmp_path / "bs").scores
    for name in ("config.yaml", "processor_config.yaml"):
        (bare / name).unlink()
    unknown = import_bergson(bare, out_dir=tmp_path / "us")
    with pytest.raises(DataSelectionError, match="cannot be compared .*unknown, of index"):
        select_for_target(pool, unknown, budget=1)


def test_what_is_no_such_index_is_refused_by_name(tmp_path):
    values = gradients(8)

    def refused(match, folder):
        with pytest.raises(DataSelectionError, match=match):
            import_bergson(folder, out_dir=tmp_path / "s")

    refused("give the folder that Bergson built", tmp_path / "none")
    write_index(tmp_path / "many" / "shard-0", values)
    refused("import each of shard-0", tmp_path / "many")
    refused("attribute_tokens: true", write_index(tmp_path / "a", values, info={"attribute_tokens": True}))
    refused("aggregated over all rows", write_index(tmp_path / "b", values, preprocess_cfg={"aggregation": "mean"}))
    refused("'int8'; known are float16", write_index(tmp_path / "c", values, info={"base_dtype": "int8"}))
    refused("cut short", write_index(tmp_path / "d", values, info={"num_grads": 9, "num_items": 9}))
    refused("neither the flat layout of Bergson 0.13.1", write_index(tmp_path / "e", values, info={"num_items": 4}))
    refused("an index of another kind, one of scores", _scores(tmp_path / "f"))
    wrong = {"dtype": {"names": ["x"], "formats": ["(16,)<f4"], "itemsize": 64}}
    refused("not the modules of grad_sizes", write_index(tmp_path / "g", values, info=wrong))
    values[2, 1] = np.nan
    refused("row 2 is not finite", write_index(tmp_path / "h", values))
    short = write_index(tmp_path / "i", gradients(8), data=False)
    Dataset.from_dict({"loss": [1.0]}).save_to_disk(short / "data.hf")
    refused("has 1 rows, and there are 8 gradients", short)


def _scores(folder):
    folder.mkdir()
    (folder / "info.json").write_text(json.dumps({"num_items": 8, "num_scores": 1, "dtype": {}}))
    return folder
