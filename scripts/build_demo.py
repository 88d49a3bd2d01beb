"""Build what `mxd.demo` holds: tokenizer, language model, text sample and `results.json`.

    python scripts/build_demo.py --corpus DIR

DIR holds Parquet files with the columns domain, title, author, year and text, one document a
row. The run depends only on the corpus, the seed and the token budget, not on the clock (floating
point may still differ between CPUs and library versions).
"""

import argparse
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from demo_corpus import SOURCES, Document, read_documents, sample_passages, split_documents, write_passages
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

log = logging.getLogger("build_demo")

DEMO = Path(__file__).parents[1] / "mxd" / "demo"
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
VOCAB_SIZE = 4096
CONTEXT = 256  # tokens in a row, the leading BOS included
BATCH_ROWS = 16
TOKENS_PER_STEP = BATCH_ROWS * (CONTEXT - 1)  # BOS not counted
IGNORE = -100  # label that transformers leaves out of the loss

TRAIN_CHARS, HELDOUT_CHARS = 2_700_000, 400_000  # of the text sample, all domains together
LR_MATRICES, LR_OTHER = 1e-2, 5e-3
WEIGHT_DECAY = 0.1
WARMUP_FRACTION = 0.03


class Loss(NamedTuple):
    """A sum of negative log-likelihoods (nats) over so many tokens."""

    nats: float
    tokens: int


def train_tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the documents; puts BOS before every text it encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    # Through the backend: it neither warns about length nor truncates.
    backend = tokenizer.backend_tokenizer
    return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


def packed_rows(ids: list[list[int]]) -> torch.Tensor:
    """Rows of BOS and packed tokens; EOS ends every document, the last few tokens are dropped."""
    stream = np.concatenate([np.array([*document, EOS_ID]) for document in ids])
    width = CONTEXT - 1
    body = stream[: len(stream) // width * width].reshape(-1, width)
    return torch.from_numpy(np.insert(body, 0, BOS_ID, axis=1))


def padded_rows(ids: list[list[int]]) -> torch.Tensor:
    """Rows of BOS and up to ``CONTEXT - 1`` tokens of one text, so that every token is scored."""
    width = CONTEXT - 1
    pieces = [text[i : i + width] for text in ids for i in range(0, len(text), width)]
    rows = torch.full((len(pieces), CONTEXT), PAD_ID)
    for row, piece in zip(rows, pieces, strict=True):
        row[: len(piece) + 1] = torch.tensor([BOS_ID, *piece])
    return rows


def new_model(seed: int) -> LlamaForCausalLM:
    """A freshly initialised model of 3.0 M parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        num_hidden_layers=5,
        num_attention_heads=6,
        intermediate_size=512,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    return LlamaForCausalLM(config)


def new_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    # match_rms_adamw gives Muon's updates AdamW's size, hence learning rates of one order.
    muon = torch.optim.Muon(matrices, lr=LR_MATRICES, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.ndim == 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=LR_OTHER,
        betas=(0.9, 0.95),
        fused=True,
    )
    return [muon, adamw]


def lr_factor(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, then linear decay to zero."""
    warmup = max(1, round(WARMUP_FRACTION * steps))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def batches(rows: torch.Tensor, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """``steps`` batches of rows, shuffled over the whole corpus anew in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    needed = steps * BATCH_ROWS
    epochs = [torch.randperm(len(rows), generator=generator) for _ in range(-(-needed // len(rows)))]
    yield from rows[torch.cat(epochs)[:needed]].split(BATCH_ROWS)


def train_model(rows: torch.Tensor, steps: int, seed: int) -> LlamaForCausalLM:
    """Train a new model for so many steps of ``TOKENS_PER_STEP`` tokens."""
    model = new_model(seed).train()
    optimizers = new_optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: lr_factor(step, steps)) for o in optimizers]
    smoothed = math.log(VOCAB_SIZE)
    with tqdm(total=steps * TOKENS_PER_STEP, unit="tok", unit_scale=True, desc="train") as bar:
        for batch in batches(rows, steps, seed):
            # bfloat16 matrix products are several times faster here; weights stay float32.
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            model.zero_grad(set_to_none=True)
            smoothed += 0.05 * (loss.item() - smoothed)
            bar.set_postfix(loss=f"{smoothed:.3f}", refresh=False)
            bar.update(TOKENS_PER_STEP)
    return model.eval()


@torch.no_grad()
def model_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> Loss:
    """The model's loss on the rows, padding left out."""
    nats, count = 0.0, 0
    for batch in rows.split(BATCH_ROWS):
        labels = batch.masked_fill(batch == PAD_ID, IGNORE)
        tokens = int((labels[:, 1:] != IGNORE).sum())
        nats += model(input_ids=batch, labels=labels).loss.item() * tokens
        count += tokens
    return Loss(nats, count)


def unigram_nats(train: torch.Tensor, rows: torch.Tensor) -> float:
    """Cross-entropy (nats/token) of training-token frequencies, add-one smoothed."""
    counts = torch.bincount(train[:, 1:].flatten(), minlength=VOCAB_SIZE).double() + 1
    targets = rows[:, 1:]
    return -(counts / counts.sum()).log()[targets[targets != PAD_ID]].mean().item()


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model (float16) and tokenizer as one transformers folder."""
    shutil.rmtree(folder, ignore_errors=True)
    # float16 keeps three more bits than bfloat16, and no weight comes near its limits.
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def evaluate(model: LlamaForCausalLM, ids: dict[str, list[list[int]]], heldout: list[Document]) -> dict[str, Any]:
    """Held-out losses (nats per token, bits per byte), over all domains and for each."""
    losses = {domain: model_loss(model, padded_rows(texts)) for domain, texts in ids.items()}
    total = Loss(sum(x.nats for x in losses.values()), sum(x.tokens for x in losses.values()))
    size = sum(len(d.text.encode()) for d in heldout)
    return {
        "cross_entropy": total.nats / total.tokens,
        "cross_entropy_by_domain": {k: x.nats / x.tokens for k, x in losses.items()},
        "bits_per_byte": total.nats / math.log(2) / size,
        "tokens": total.tokens,
        "bytes": size,
    }


def sample_text(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """A continuation of the prompt, for a look at what the model has learnt."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=80, do_sample=True, temperature=0.8)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def build(corpus: Path, output: Path, tokens: int, seed: int) -> dict[str, Any]:
    """Build everything under ``output`` and return what ``results.json`` records."""
    train, heldout = split_documents(read_documents(corpus), seed)
    sample = sample_passages(heldout, HELDOUT_CHARS, seed)
    write_passages(sample_passages(train, TRAIN_CHARS, seed), output / "text" / "train.parquet")
    write_passages(sample, output / "text" / "heldout.parquet")
    tokenizer = train_tokenizer(train)
    rows = packed_rows(encode(tokenizer, [d.text for d in train]))
    log.info("%d training rows of %d tokens", len(rows), CONTEXT)
    steps = -(-tokens // TOKENS_PER_STEP)
    tokens = steps * TOKENS_PER_STEP

    start = time.perf_counter()
    model = train_model(rows, steps, seed)
    seconds = time.perf_counter() - start

    domains = sorted({d.domain for d in sample})
    ids = {k: encode(tokenizer, [d.text for d in sample if d.domain == k]) for k in domains}
    unrounded = evaluate(model, ids, sample)["cross_entropy"]
    save_model(model, tokenizer, output / "model")
    # Score what ships, loaded as a user loads it, not what is in memory.
    model = AutoModelForCausalLM.from_pretrained(output / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    quality = evaluate(model, ids, sample)
    every_row = padded_rows([text for texts in ids.values() for text in texts])
    log.info("a sample: %r", sample_text(model, tokenizer, "The people of the"))
    return {
        "heldout": {
            **quality,
            "unigram_cross_entropy": unigram_nats(rows, every_row),
            "cross_entropy_before_float16": unrounded,
        },
        "units": "cross-entropies in nats per token",
        "parameters": model.num_parameters(),
        "tokens_trained": tokens,
        "training_tokens_available": rows[:, 1:].numel(),
        "training_seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "text": {k: SOURCES.get(k, {}) for k in domains},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Build the embedded model and text sample.")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of Parquet files")
    parser.add_argument("--output", type=Path, default=DEMO, help="folder, by default mxd/demo")
    parser.add_argument("--tokens", type=int, default=5_500_000, help="training tokens")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    # The tokenizers library reads this when it starts its thread pool.
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    outcome = build(args.corpus, args.output, args.tokens, args.seed)
    text = json.dumps(outcome, indent=2) + "\n"
    (args.output / "results.json").write_text(text, encoding="utf-8")
    log.info("wrote %s: %s", args.output, outcome["heldout"])


if __name__ == "__main__":
    main()
