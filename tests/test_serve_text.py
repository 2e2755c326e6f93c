"""Text as it comes: characters of several tokens, spaces, stop strings, and the settings that come with a model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import CHAT, letter_tokenizer
from serving import tiny_llama

pytest.importorskip("fastapi")
from shira.serving.answers import Text
from shira.serving.logprobs import LETTERS, ChatLogprobs
from shira.serving.sampling import TokenLogprob
from shira.serving.transformers_server import defaults_of, ends_of


def byte_tokenizer():
    """One token for each byte, as byte-level BPE without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({letter: number for number, letter in enumerate([*letters, "<end>"])}, []))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>")


def space_tokenizer():
    """Words with the space before them, which the decoder leaves out at the beginning of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", *(f"\u2581{word}" for word in ("one", "two", "three"))]
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")


BYTES = byte_tokenizer()


def shown(text, tokens):
    pieces = []
    for token in tokens:
        pieces.append(text.add(token))
        if text.stopped:
            break
    return [*pieces, text.end()]


def test_a_character_is_shown_when_all_of_its_bytes_are_there():
    tokens = BYTES("né😀!")["input_ids"]
    assert shown(Text(BYTES), tokens) == ["n", "", "é", "", "", "", "😀", "!", ""]
    assert shown(Text(BYTES), tokens[:5])[-1] == "\ufffd"  # as `decode` writes it


def test_a_space_between_the_prompt_and_its_answer_is_shown():
    tokenizer = space_tokenizer()
    prompt, answer = tokenizer("one two")["input_ids"], tokenizer("three one")["input_ids"]
    assert shown(Text(tokenizer, prompt), answer) == [" three", " one", ""]
    assert shown(Text(tokenizer), answer) == ["three", " one", ""]


def fallback_tokenizer():
    """Pieces of SentencePiece, with a token for each byte that no other one has."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "\ufffd"]
    plain = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], byte_fallback=True))
    plain.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")


@pytest.mark.parametrize("tokenizer", [BYTES, fallback_tokenizer()], ids=["byte-level", "fallback"])
def test_the_bytes_of_tokens_that_are_parts_of_a_character(tokenizer):
    text = "aé😀\ufffda"
    entries = [TokenLogprob(token, -1.0, [(token, -1.0)]) for token in tokenizer(text)["input_ids"]]
    found = ChatLogprobs(tokenizer).whole(entries).content
    assert len(found) > len(text) and bytes(byte for entry in found for byte in entry.bytes) == text.encode()
    assert [entry.top_logprobs[0].bytes for entry in found] == [entry.bytes for entry in found]


def test_bytes_that_are_not_known_are_null():
    class Unknown:
        def decode(self, tokens, **options):
            return "\ufffd"

        def convert_ids_to_tokens(self, token):
            return ["\u2581", b"\xff", None][token]

    entries = [TokenLogprob(token, -1.0, []) for token in range(3)]
    assert [entry.bytes for entry in ChatLogprobs(Unknown()).whole(entries).content] == [None] * 3


def test_every_byte_of_byte_level_pieces_is_known():
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert {byte: letter for letter, byte in LETTERS.items()} == bytes_to_unicode()


TEXTS = st.text("ab\né😀", max_size=12)


@given(TEXTS, st.lists(st.text("ab\né😀", min_size=1, max_size=4), max_size=3), TEXTS)
def test_a_text_ends_before_the_stop_string_that_was_complete_first(text, stops, prompt):
    made = Text(BYTES, BYTES(prompt)["input_ids"] if prompt else [], stops)
    pieces = shown(made, BYTES(text)["input_ids"] if text else [])
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    complete = min(ends, default=None)
    expected = text if complete is None else text[: min(text[:complete].find(s) for s in stops if s in text[:complete])]
    assert "".join(pieces) == expected
    assert made.stopped == bool(ends)
    for end in range(len(pieces)):  # nothing was shown that had to be taken back
        assert expected.startswith("".join(pieces[:end]))


def test_special_tokens_are_left_out():
    assert "".join(shown(Text(BYTES), [*BYTES("ab")["input_ids"], BYTES.eos_token_id])) == "ab"


def test_the_tokens_that_end_an_answer():
    model, tokenizer = tiny_llama(), letter_tokenizer(CHAT.replace("';'", "'<pad>'"))
    model.generation_config.eos_token_id = [5, 6]
    assert ends_of(model, tokenizer) == [0, 1, 5, 6]  # <pad> ends a turn, <s> is the tokenizer's
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    model.generation_config.eos_token_id = None
    assert ends_of(model, tokenizer) == [1]


def test_the_sampling_settings_of_a_model():
    model = tiny_llama()
    assert defaults_of(model) == {}
    model.generation_config.temperature, model.generation_config.top_k = 0.6, 20
    assert defaults_of(model) == {"temperature": 0.6, "top_k": 20}


@given(st.lists(st.floats(-8, 8, width=32), min_size=5, max_size=40), st.floats(0.05, 0.999))
def test_a_quick_top_p_keeps_what_transformers_keeps(scores, top_p):
    from transformers import TopPLogitsWarper

    from shira.serving import sampling

    row = torch.tensor([scores]) + torch.arange(len(scores)) * 1e-3  # no two are equal
    expected = TopPLogitsWarper(top_p)(None, row)
    with pytest.MonkeyPatch.context() as patch:
        for most in (1024, 3):
            patch.setattr(sampling, "MOST", most)
            found = sampling.QuickTopP(top_p)(None, row)
            different = found.isfinite() ^ expected.isfinite()
            if different.any():  # the sums were rounded at the border
                ordered = row[0].softmax(-1).sort(descending=True).values.cumsum(-1)
                assert different.sum() == 1 and (ordered - top_p).abs().min() < 1e-5


def test_the_smallest_top_p_keeps_the_most_probable_token():
    from shira.serving.sampling import QuickTopP

    row = torch.tensor([[0.5, 2.0, 1.0]])
    assert QuickTopP(1e-320)(None, row).isfinite().tolist() == [[False, True, False]]
