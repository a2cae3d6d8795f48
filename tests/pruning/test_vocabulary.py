"""Vocabularies that are cut with their embeddings: what text becomes, ids everywhere, and what is refused.

Mutations tried by hand, each of which makes tests here fail: parts that are not propagated (scores); merges whose
result goes kept in the list; a post-processor with old ids.
"""

import json

import numpy as np
import pytest
from pico import pico_llama, raw_tensors
from plans_by_hand import FFN, HIDDEN, LAYERS, slice_by_hand

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.errors import InputError
from nemo_minitron.families import from_hf
from nemo_minitron.pruning import prune
from nemo_minitron.pruning.vocabulary import Vocabulary, count_tokens

SENTENCE = "the cat sat on a mat and ate the rat that sat there then another cat came to chat at the gate"
WORDS = SENTENCE.split(" ")
SPECIAL = ["<unk>", "<s>", "</s>"]


def text(seed, count=400):
    """Words with unlike frequencies, some glued together, some beyond ASCII."""
    generator = np.random.default_rng(seed)
    weights = 1 / np.arange(1, len(WORDS) + 1)
    words = generator.choice(WORDS, count, p=weights / weights.sum())
    return " ".join(str(w) + generator.choice(["", "", "s", "é", "\u2603", "7"]) for w in words)


def tokenizer(kind):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if kind == "byte-level BPE":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=329, special_tokens=SPECIAL[:2], initial_alphabet=alphabet)
        made.train_from_iterator([text(0)], trainer)
    else:
        bytes_ = [f"<0x{i:02X}>" for i in range(256)]
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIAL[:2], unk_token="<unk>")
        made.train_from_iterator([text(0)], trainer)
        pieces = json.loads(made.to_str())["model"]["vocab"]
        pieces = pieces[:2] + [[byte, -30.0] for byte in bytes_] + pieces[2:]
        made.model = models.Unigram([tuple(piece) for piece in pieces], unk_id=0, byte_fallback=True)
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    made.add_special_tokens(SPECIAL[2:])  # behind the model's own, so that its id changes
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(name, made.token_to_id(name)) for name in ("<s>", "</s>")]
    )
    return made


def teacher_of(folder, kind):
    """A pico Llama with two rows that no token has, and the tokenizer's files, slow ones among them."""
    from transformers import PreTrainedTokenizerFast

    made = tokenizer(kind)
    end = made.token_to_id("</s>")
    assert end == made.get_vocab_size() - 1
    pico_llama(folder, vocab_size=end + 3, tie_word_embeddings=True, pad_token_id=end, eos_token_id=[end, 0])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.save_pretrained(folder)
    (folder / "merges.txt").write_text("stale")
    return made


class Stream:
    """As `nemo.data.Tokens` is asked."""

    def __init__(self, ids):
        self.ids, self.tokens = np.array(ids), len(ids)

    def stream(self, start, length):
        return self.ids[start : start + length]


def plan_of(folder, made, size):
    """Of the `size` best tokens of another text."""
    source = from_hf(folder)
    counts = count_tokens(Stream(made.encode(text(1), add_special_tokens=False).ids), source.vocab_size)
    scores = Vocabulary(folder, source.vocab_size).scores(counts)
    assert sorted(scores) == list(range(1, source.vocab_size + 1))
    kept = sorted(np.argsort(-scores)[:size].tolist())
    return PrunePlan(source=source, target=source.replace(vocab_size=size), keep={"vocab": kept})


@pytest.mark.parametrize(("kind", "size"), [("byte-level BPE", 280), ("byte-level BPE", 310), ("Unigram", 285)])
def test_text_before_and_after(tmp_path, kind, size):
    """The same tokens where all stay, smaller ones elsewhere, and always the same text."""
    from transformers import AutoTokenizer

    made = teacher_of(tmp_path / "t", kind)
    plan = plan_of(tmp_path / "t", made, size)
    student = prune(tmp_path / "t", plan, tmp_path / "s")
    assert not (student / "merges.txt").exists()
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "t", student))
    assert len(new) <= size
    numbers = {before: after for after, before in enumerate(plan.keep["vocab"])}
    same = shorter = 0
    for line in [*text(2, 2000).split("a"), *text(3, 2000).split(" "), "Ünï\u2603cödé <s> \n\t zebra </s>"]:
        before, after = old(line).input_ids, new(line).input_ids
        assert new.decode(after, skip_special_tokens=True) == old.decode(before, skip_special_tokens=True)
        if all(i in numbers for i in before):
            assert after == [numbers[i] for i in before], line
            same += 1
        else:
            assert len(after) >= len(before)
            shorter += 1
    assert same > 100
    assert shorter > 10
    assert new.bos_token_id == numbers[old.bos_token_id]
    assert new.eos_token_id == numbers[old.eos_token_id] < old.eos_token_id


@pytest.mark.parametrize("kind", ["byte-level BPE", "Unigram"])
def test_logits_and_configs(tmp_path, kind):
    """Rows of the embedding go with their tokens: logits of what stays are the teacher's, bit by bit."""
    import torch
    from transformers import AutoModelForCausalLM

    made = teacher_of(tmp_path / "t", kind)
    plan = plan_of(tmp_path / "t", made, 290)
    kept = plan.keep["vocab"]
    student = prune(tmp_path / "t", plan, tmp_path / "s")
    embedding = "model.embed_tokens.weight"
    np.testing.assert_array_equal(raw_tensors(student)[embedding], raw_tensors(tmp_path / "t")[embedding][kept])
    tokens = torch.arange(64)[None] * 7 % 290
    with torch.no_grad():
        after = AutoModelForCausalLM.from_pretrained(student)(tokens).logits
        before = AutoModelForCausalLM.from_pretrained(tmp_path / "t")(torch.tensor(kept)[tokens]).logits
    torch.testing.assert_close(after, before[..., kept], rtol=0, atol=1e-6)
    for name in ("config.json", "generation_config.json"):
        old, new = (json.loads((folder / name).read_text()) for folder in (tmp_path / "t", student))
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            mapped = [kept[i] for i in new[field]] if field == "eos_token_id" else kept[new[field]]
            assert mapped == old[field]
    decoder = json.loads((student / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {kept[int(i)]: token["content"] for i, token in decoder.items()} == {
        made.token_to_id(name): name for name in SPECIAL
    }


def test_every_axis_in_one_cut(tmp_path):
    """Layers, hidden, ffn, query groups, heads within those that stay, and the vocabulary: slicing by hand."""
    made = teacher_of(tmp_path / "t", "byte-level BPE")
    plan = plan_of(tmp_path / "t", made, 300)
    keep = {"heads": {0: [0, 5], 2: [3, 4], 5: [1, 2]}, "query_groups": {0: [0, 2], 2: [1, 2], 5: [0, 1]}}
    keep |= {"layers": LAYERS, "hidden": HIDDEN, "ffn": {n: [int(i) for i in FFN[n]] for n in LAYERS}, **plan.keep}
    sizes = {"hidden_size": 41, "ffn_hidden_size": 50, "num_attention_heads": 2, "num_query_groups": 2}
    target = plan.source.replace(num_layers=3, vocab_size=300, **sizes)
    both = PrunePlan(source=plan.source, target=target, keep=keep)
    student = prune(tmp_path / "t", both, tmp_path / "s")
    expected = slice_by_hand(raw_tensors(tmp_path / "t"), both)
    expected["model.embed_tokens.weight"] = expected["model.embed_tokens.weight"][plan.keep["vocab"]]
    found = raw_tensors(student)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name, strict=True)
    assert from_hf(student) == target


def test_counts():
    ids = [0, 3, 3, 5]
    np.testing.assert_array_equal(count_tokens(Stream(ids), 7), [1, 0, 0, 2, 0, 1, 0])
    with pytest.raises(InputError, match=r"token 5; the model has 0 to 4"):
        count_tokens(Stream(ids), 5)


def test_parts(tmp_path):
    """By hand: 'that' is made of th, at (or ha, ...) as the merges say; rows without a token come last."""
    made = teacher_of(tmp_path, "byte-level BPE")
    vocabulary = Vocabulary(tmp_path, 332)
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    for left, right in merges:
        assert {made.token_to_id(left), made.token_to_id(right)} <= vocabulary.parts(left + right)
    assert vocabulary.parts("<s>") == set()
    scores = vocabulary.scores(np.arange(332)[::-1])
    assert set(np.argsort(scores)[:2]) == {330, 331}
    assert set(np.argsort(-scores)[: len(vocabulary.required)]) == vocabulary.required
    assert len(vocabulary.required) == 259


def test_what_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    made = teacher_of(tmp_path / "t", "byte-level BPE")
    source = from_hf(tmp_path / "t")
    first = sorted(Vocabulary(tmp_path / "t", source.vocab_size).required)

    def refused(kept, message):
        plan = PrunePlan(source=source, target=source.replace(vocab_size=len(kept)), keep={"vocab": sorted(kept)})
        with pytest.raises(InputError, match=message) as caught:
            prune(tmp_path / "t", plan, tmp_path / "s")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "s").exists()

    refused(first[1:], r"drops token 0 \('<unk>'\), which has to stay.* keeps all 259")
    long = max(json.loads(made.to_str())["model"]["vocab"].items(), key=lambda item: len(item[0]))
    refused([*first, long[1]], f"keeps token {long[1]} .* from which it is merged")
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE"}}))
    refused(first, "is no tokenizer")
    (tmp_path / "t" / "tokenizer.json").write_text(Tokenizer(models.WordPiece({"a": 0}, unk_token="a")).to_str())
    refused(first, "a WordPiece tokenizer cannot be cut; BPE and Unigram can")
    (tmp_path / "t" / "tokenizer.json").unlink()
    refused(first, "the tokenizer .* does not exist")


def test_ids_at_any_depth_follow_the_cut(tmp_path):
    """Of every JSON that is copied; those beyond the embedding name no token, and go."""
    made = teacher_of(tmp_path / "t", "byte-level BPE")
    beyond, end = from_hf(tmp_path / "t").vocab_size, made.token_to_id("</s>")
    ids = [end, 5]
    generation = {
        "eos_token_id": [end, beyond], "pad_token_id": beyond, "suppress_tokens": ids,
        "bad_words_ids": [ids, [5, beyond]], "forced_decoder_ids": [[1, end]],
        "sequence_bias": [[ids, -1.5]], "nested": {"stop_token_ids": ids, "top_k": 5},
    }  # fmt: skip
    (tmp_path / "t" / "generation_config.json").write_text(json.dumps(generation))
    for name in ("tokenizer.model", "tekken.json", "qwen.tiktoken", "added_tokens.json"):
        (tmp_path / "t" / name).write_text("stale")
    tokenizer = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": beyond, "content": "<beyond>"})
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"][str(beyond)] = config["added_tokens_decoder"]["0"] | {"content": "<beyond>"}
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(config))
    plan = plan_of(tmp_path / "t", made, 290)
    student = prune(tmp_path / "t", plan, tmp_path / "s")
    new = {old: i for i, old in enumerate(plan.keep["vocab"])}
    moved = [new[i] for i in ids]
    assert moved != ids
    assert json.loads((student / "generation_config.json").read_text()) == {
        "eos_token_id": [new[end]], "pad_token_id": None, "suppress_tokens": moved, "bad_words_ids": [moved],
        "forced_decoder_ids": [[1, new[end]]], "sequence_bias": [[moved, -1.5]],
        "nested": {"stop_token_ids": moved, "top_k": 5},
    }  # fmt: skip
    assert not {"tokenizer.model", "tekken.json", "qwen.tiktoken", "added_tokens.json"} & {
        f.name for f in student.iterdir()
    }
    contents = [token["content"] for token in json.loads((student / "tokenizer.json").read_text())["added_tokens"]]
    assert contents == SPECIAL
    decoder = json.loads((student / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert sorted(token["content"] for token in decoder.values()) == sorted(SPECIAL)
