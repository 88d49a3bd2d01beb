"""A tokenizer whose words are markup and names of JavaScript's own."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

HOSTILE = ["<img", "src=x", "onerror=window.hacked=1>", "<script>window.hacked=1</script>", "</mark></button>",
           "javascript:window.hacked=1", "&lt;b&gt;", "國家",
           "\u202eright-to-left", "__proto__", "constructor"]  # fmt: skip


def hostile_tokenizer():
    words = ["<s>", "</s>", *HOSTILE, *(f"word{number}" for number in range(64 - 2 - len(HOSTILE)))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
