"""Measure the pass of `mxd experts`: its time beside the base model's forward pass alone, its memory, and its file.

    python benchmarks/collection.py MODEL TEXT

MODEL is a folder with a language model, TEXT a file to read. The decomposition has `--experts` experts in one layer,
K = 32, random weights and directions. Two parts, of which only the first runs the model:

- `pass`: on `--tokens` tokens, each batch is first given to the model alone, logits included, then to the pass.
- `tables`: the tables of one layer are filled with random coefficients of `--table-tokens` tokens, a batch at a time,
  some experts far more often than others, as in a long text; then finished and saved.

Times are CPU times, so that a busy machine does not matter.
Writes benchmarks/results/collection.json.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import report
import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "collection.json"
BATCH, ROW, K = 16, 128, 32


def peak_bytes() -> int:
    """Return the most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_tables(experts: int, tokens: int, vocabulary: int, width: int) -> dict[str, Any]:
    """Fill the tables of one layer as a long text would, and save them."""
    from mxd.experts.collecting import SAMPLE, TOP, _compact, _LayerPass, _Rows
    from mxd.experts.collection import ExpertCollection
    from mxd.experts.collection_file import save_collection
    from mxd.experts.logit_effects import Unembedding, nearest_rows
    from mxd.experts.streamed_tables import make_places
    from mxd.modeling_mxd import MxDLayerConfig, make_layer

    sizes = {
        "hidden_size": 8,
        "output_size": 8,
        "intermediate_size": 8,
        "num_experts": experts,
        "num_experts_per_tok": K,
    }
    layer = make_layer(MxDLayerConfig(**sizes))
    directions = torch.randn(experts, width)
    unembedding = Unembedding(torch.ones(width), False, torch.randn(vocabulary, width))
    before = peak_bytes()
    one, kept, seconds = _LayerPass(layer, TOP, SAMPLE, 0), _Rows(), 0.0
    for _ in range(0, tokens, BATCH * ROW):
        ids = torch.randint(0, vocabulary, (BATCH, ROW))
        indices = (torch.rand(BATCH * ROW, K).square() * experts).long()
        values = torch.empty(BATCH * ROW, K).exponential_()
        started = time.process_time()
        row = torch.arange(BATCH).repeat_interleave(ROW) + kept.count
        position = torch.arange(ROW).repeat(BATCH)
        one.update(values, indices, make_places(row, position), position > 0, None)
        kept.add(ids, None)
        kept.prune([one])
        seconds += time.process_time() - started
    started = time.process_time()
    kept.prune([one], finished=True)
    documents = {row: row for row in kept.rows}
    fields = one.finish(kept.rows, documents)
    for name in ("similar_direction", "similar_modulation"):
        fields |= zip((f"{name}_ids", f"{name}_values"), nearest_rows(directions), strict=True)
    fields |= unembedding.largest(directions)
    found = ExpertCollection(**fields)
    collection = _compact({0: found}, kept.rows, documents, [], {})
    following = collection.tokens_at(found.top_rows, found.top_positions + 1)
    found.alignment = unembedding.alignment(directions, following, collection.token_counts(vocabulary))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "experts.safetensors")
        save_collection(collection, path)
        size = path.stat().st_size
    finish = time.process_time() - started
    rows = len(collection.documents)
    return {
        "tokens": tokens, "experts": experts, "update_seconds": seconds, "finish_seconds": finish, "rows": rows,
        "file_bytes": size, "memory_bytes": peak_bytes() - before,
    }  # fmt: skip


def measure_pass(model_name: str, text: str, layer: int, experts: int, tokens: int) -> dict[str, Any]:
    """Time the pass and the model alone, batch by batch."""
    from mxd.base.base_model import load_base_model
    from mxd.data.documents import load_text
    from mxd.data.texts import document_batches
    from mxd.experts import collect_experts
    from mxd.jobs.decompose import layer_config
    from mxd.jobs.options import DecompositionOptions
    from mxd.modeling_mxd import MxDConfig, MxDModel, find_mlps

    model, tokenizer, _ = load_base_model(model_name)
    batches, documents = document_batches(load_text(text), tokenizer, ROW, tokens)
    config = layer_config(find_mlps(model)[layer], DecompositionOptions(num_experts=experts, num_experts_per_tok=K))
    decomposition = MxDModel(MxDConfig.from_layer_configs({layer: config}))
    torch.nn.init.normal_(decomposition.layer(layer).gate.weight)
    directions = {layer: torch.randn(experts, config.output_size)}
    alone: list[float] = []
    ended: list[float] = []

    def timed() -> Iterator[dict[str, torch.Tensor]]:
        for batch in batches:
            started = time.process_time()
            with torch.no_grad():
                model(**batch, use_cache=False)
            alone.append(time.process_time() - started)
            yield batch
        ended.append(time.process_time())

    with torch.no_grad():
        model(**batches[0], use_cache=False)
    print(f"layer {layer}", flush=True)  # noqa: T201
    started = time.process_time()
    collect_experts(model, decomposition, timed(), documents=documents, directions=directions)
    finish, whole = time.process_time() - ended[0], ended[0] - started - sum(alone)
    counted = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return {
        "layer": layer, "layers_of_the_model": model.config.num_hidden_layers, "tokens": counted, "experts": experts,
        "alone_seconds": sum(alone), "pass_seconds": whole, "finish_seconds": finish,
    }  # fmt: skip


def at_length(one: dict[str, Any], tables: dict[str, Any]) -> float:
    """Return the time of the pass over that of the model alone, for as many tokens as the tables were filled with.

    What each token costs is the pass's, what the end costs is the tables': it does not grow with the text.
    """
    alone = one["alone_seconds"] / one["tokens"] * tables["tokens"]
    return one["pass_seconds"] / one["alone_seconds"] + tables["finish_seconds"] / alone


def table(results: dict[str, Any]) -> str:
    """Return the table of docs/how-to/experts.md."""
    tables, rows = results["tables"], []
    for one in results["pass"]:
        name = f"the pass, layer {one['layer']} of {one['layers_of_the_model']}"
        rows.append((name, f"{at_length(one, tables):.2f} × the model alone", "–", "–"))
    seconds = f"{tables['update_seconds']:.0f} s, and {tables['finish_seconds']:.0f} s at the end"
    name = f"the tables alone, {tables['tokens']:,} random tokens"
    rows.append((name, seconds, f"{tables['memory_bytes'] / 1e6:,.0f} MB", f"{tables['file_bytes'] / 1e6:.1f} MB"))
    return report.markdown_table(["", "CPU time", "memory above the model", "file"], rows)


def main() -> None:
    """Measure, and write the results."""
    from mxd.base.files import write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--layers", type=int, nargs="+", default=[15, 29])
    parser.add_argument("--experts", type=int, default=16_384)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--table-tokens", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    results = {"tables": measure_tables(asked.experts, asked.table_tokens, 49_152, 576)}
    results["pass"] = [
        measure_pass(asked.model, asked.text, layer, asked.experts, asked.tokens) for layer in asked.layers
    ]
    results["settings"] = {"model": Path(asked.model).name, "machine": report.machine(asked.threads, "cpu")}
    write_json(RESULTS, results)


if __name__ == "__main__":
    main()
