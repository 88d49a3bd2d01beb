"""A tokenizer whose words are markup and names of JavaScript's own, and a server for the tests."""

import threading
from contextlib import contextmanager

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mxd.jobs.explore import explore
from mxd.jobs.use_options import ExploreOptions

HOSTILE = ["<img", "src=x", "onerror=window.hacked=1>", "<script>window.hacked=1</script>", "</mark></button>",
           "javascript:window.hacked=1", "&lt;b&gt;", "國家",
           "\u202eright-to-left", "__proto__", "constructor"]  # fmt: skip


def hostile_tokenizer():
    words = ["<s>", "</s>", *HOSTILE, *(f"word{number}" for number in range(64 - 2 - len(HOSTILE)))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@contextmanager
def serving(folder):
    """Serve the explorer of a decomposition inside the block."""
    server = explore(ExploreOptions(decomposition=str(folder), port=0))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
