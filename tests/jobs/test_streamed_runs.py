"""Commands that train open the text they stream once."""

from collections import Counter

import pytest
from datasets import IterableDataset
from text_cases import document, write

from mxd import DecompositionOptions, FinetuningOptions, FrontierOptions, decompose, finetune, measure_frontier
from mxd.data import documents as documents_module
from mxd.data import local_text

DOCUMENTS = 150  # of each of four shards
FEW = {
    "tokens": 1024,
    "batch_tokens": 512,
    "evaluation_tokens": 256,
    "streaming": True,
    "training": {"disable_tqdm": True, "statistics_tokens": 256},
}


@pytest.fixture
def read(monkeypatch):
    """Names of the shards that are opened, and documents that are read."""
    opened, read, read_rows_from = [], [], local_text.read_rows_from
    monkeypatch.setattr("mxd.data.packing.PASSAGES_PER_BATCH", 4)

    def rows(path, start, **how):
        opened.append(path)
        for row in read_rows_from(path, start, **how):
            read.append(row["text"])
            yield row

    def of_shards(shards):
        for shard in shards:
            opened.append(shard)
            for number in range(shard * DOCUMENTS, (shard + 1) * DOCUMENTS):
                read.append(document(number))
                yield {"text": document(number)}

    monkeypatch.setattr(documents_module, "read_rows_from", rows)
    hub = IterableDataset.from_generator(of_shards, gen_kwargs={"shards": [*range(4)]})
    monkeypatch.setattr(documents_module, "load_dataset", lambda *_, **__: hub)
    return opened, read


@pytest.mark.usefixtures("private_cache")
@pytest.mark.parametrize(
    ("job", "kind"),
    [("decompose in passes", "hub"), ("finetune", "csv"), ("frontier", "jsonl")],
)
def test_the_text_is_opened_once(tmp_path, finished, read, job, kind):
    dataset = ["owner/hub"] if kind == "hub" else [write(tmp_path / "text", kind, per_file=DOCUMENTS)]
    how = {"dataset": dataset, **FEW, "output": str(tmp_path / "out")}
    if job == "finetune":
        result = finetune(FinetuningOptions(decomposition=str(finished[0]), **how))
    elif job == "frontier":
        small = {"methods": ["skip_transcoder"], "num_experts_per_tok": [4], "match_transcoder": 4}
        result = measure_frontier(FrontierOptions(**small, **how), progress=False)
    else:
        passes = {"layers": [1, 2], "layers_per_pass": 1} if "passes" in job else {}
        result = decompose(DecompositionOptions(num_experts=64, num_experts_per_tok=4, **passes, **how))
    opened, documents = read
    assert result["settings"]
    # A second pass over the rows is a second training, which opens them behind the first ones.
    times = 2 if "passes" in job else 1
    assert set(Counter(opened).values()) == {times} and len(set(opened)) == 4
    assert max(Counter(documents).values()) <= times
