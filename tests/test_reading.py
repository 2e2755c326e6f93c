"""Rows of files and data sets as examples, and examples as tokens."""

import codecs
import contextlib
import csv
import json
import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shira
from conftest import letter_tokenizer
from shira import DataError, MissingExtra
from shira.data import textfiles
from shira.data.quiet import quiet
from shira.data.reading import examples_of, read_examples
from shira.data.rows import example_of
from shira.data.tasks import Example
from shira.data.tokens import IGNORED, encode
from shira.integrations import transformers as hf

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
ROWS = {
    "text": [{"text": "once", "id": 3}, {"text": "twice", "id": 4}],
    "pairs": [{"prompt": "1+1=", "completion": "2"}],
    "turns": [{"prompt": [USER], "completion": [ANSWER]}],
    "chat": [{"messages": [USER, ANSWER]}, {"messages": [{"role": "system", "content": "be"}, USER, ANSWER, USER, ANSWER]}],
    "choices": [{"prompt": "yes?", "choices": [" no", " yes"], "label": 1}],
    "alpaca": [
        {"instruction": "add", "input": "1 1", "output": "2", "text": "add 1 1: 2"},
        {"instruction": "greet", "input": "", "output": "hi", "text": "greet: hi"},
    ],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}], "system": "be"},
        {"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "yo"}], "system": None},
    ],
    "questions": [{"question": "why?", "answer": "so"}],
}


def turn(answer, asked):
    """A question and its answer: for a chat template, and for a model without one."""
    messages = ({"role": "user", "content": asked}, {"role": "assistant", "content": answer})
    return Example(f"{asked}\n\n", answer, messages=messages, first=1)


EXPECTED = {
    "text": [Example("", "once"), Example("", "twice")],
    "pairs": [Example("1+1=", "2")],
    "turns": [Example(messages=(USER, ANSWER), first=1)],
    "chat": [Example(messages=tuple(row["messages"])) for row in ROWS["chat"]],
    "choices": [Example("yes?", " yes", (" no", " yes"), 1)],
    "alpaca": [turn("2", "add\n\n1 1"), turn("hi", "greet")],
    "sharegpt": [Example(messages=({"role": "system", "content": "be"}, USER, ANSWER)), Example(messages=(USER, ANSWER))],
    "questions": [turn("so", "why?")],
}


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


@pytest.mark.parametrize("kind", ROWS)
def test_one_row_means_the_same_in_every_kind_of_file(kind, tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS[kind])
    table.to_parquet(tmp_path / "data.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl", ROWS[kind])
    write(tmp_path / "files" / "test.jsonl", ROWS[kind][:1])
    lines = write(tmp_path / "data.jsonl", ROWS[kind])
    listed = tmp_path / "data.json"
    listed.write_text(json.dumps(ROWS[kind], indent=1))
    for source in (lines, listed, tmp_path / "data.parquet", tmp_path / "saved", tmp_path / "splits", tmp_path / "files"):
        assert list(examples_of(str(source), "train")) == EXPECTED[kind]
    for source in ("splits:test", "files:test", "files:train[:1]"):
        assert list(read_examples(tmp_path / source)) == EXPECTED[kind][:1]


def test_a_table_of_uneven_rows(tmp_path):
    """Columns that a row lacks, and parts that a message lacks, come as null."""
    datasets = pytest.importorskip("datasets")
    named = {"role": "user", "content": "hi", "name": "ann"}
    rows = [{"messages": [named, ANSWER], "text": None}, {"messages": None, "text": "plain"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert list(read_examples(tmp_path / "a.parquet")) == [Example(messages=(named, ANSWER)), Example("", "plain")]


def test_tables_with_a_header(tmp_path):
    path = tmp_path / "data.csv"
    for content, expected in {
        "prompt,completion\r\n1+1=,2\r\n": [Example("1+1=", "2")],
        '\ufeffid;text\n1;"two\nlines; ""one"" cell"\n\n2;b\n': [Example("", 'two\nlines; "one" cell'), Example("", "b")],
        "instruction\tinput\toutput\nadd\t1 1\t2\ngreet\t\thi\n": EXPECTED["alpaca"],
        "question, answer\nwhy?,so\n": EXPECTED["questions"],
        'prompt,choices,label\nyes?,"["" no"", "" yes""]",1\n': EXPECTED["choices"],
        f"text\n{'x' * 200_000}\n": [Example("", "x" * 200_000)],  # longer than Python's limit for a cell
    }.items():
        path.write_bytes(content.encode())
        assert list(read_examples(path)) == expected
    assert csv.field_size_limit() == 131072
    assert list(read_examples(path))[0].origin == f"{path}, line 2"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("prompt,answer_\na,b\n", "line 2: expected .*; found 'prompt', 'answer_', but no 'completion'"),
        ("ask,reply\na,b\n", "line 1: expected a header with the columns 'messages'.*'text'; found 'ask', 'reply'"),
        ("", "line 1: expected a header.*found none"),
        ("text,text\na,b\n", "line 1: expected each column once; found 'text', 'text'"),
        ('text,id\n"a\nb",1\nc\n', "line 4: expected 2 cells, for 'text', 'id'; found 1"),
        ("prompt,completion\na,b,c\n", "line 2: expected 2 cells, .*found 3"),
        ("prompt,completion\na,\n", "line 2: .*found 'prompt', but no 'completion'"),
        ('text\n"a"b\n', r"line 2: it is not CSV in UTF-8 \(.*quote cells"),
        ("messages\nhi\n", "line 2: expected JSON in the column 'messages', found 'hi'"),
        ("text\n\udce9t\udce9\n", "not UTF-8|not CSV in UTF-8"),
    ],
)
def test_a_bad_table_is_refused_with_its_line(content, words, tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=f"(?s)data.csv, .*{words}"):
        list(read_examples(path))


@given(st.lists(st.text(), min_size=1, max_size=9), st.integers(1, 9), st.sampled_from([None, 0, 2]), st.booleans())
def test_a_json_list_is_read_in_pieces(texts, piece, indent, bom):
    """Whatever piece of the file is in memory, the rows are those of the whole list, each with its line, also after the mark
    of UTF-8 that Windows writes."""
    rows = [{"text": text} for text in texts]
    content = json.dumps(rows, indent=indent, ensure_ascii=False)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(textfiles, "PIECE", piece):
        path = Path(folder, "data.json")
        path.write_bytes(codecs.BOM_UTF8 * bom + content.encode(errors="replace"))
        read = list(read_examples(path))
        assert [example.completion for example in read] == [row["text"] for row in json.loads(path.read_bytes())]
        lines = path.read_bytes().split(b"\n")
        assert all(b"{" in lines[int(example.origin.rpartition(" ")[2]) - 1] for example in read)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"text": "a"},\n {"text": 3}]', "line 2: 'text': expected a string, found 3"),
        ('[{"text": "a"}\n {"text": "b"}]', "after line 1: expected a list of JSON objects with .*expected ','"),
        ('[\n{"text": "a"},\n{"text": "b"', "after line 2: expected a list of JSON objects"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "after line 1: expected the end of the file after the list"),
        ("[1, 2]", "line 1: expected an object with .*; found 1"),
        ("[ ]", "holds no example"),
        ("[", "after line 1: expected a list"),
        ('[{"text": "\\ud83d"}]', r"line 1: 'text': expected valid Unicode, found '\\ud83d'"),
    ],
)
def test_a_bad_list_is_refused_with_its_line(content, words, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(DataError, match=words):
        list(read_examples(path))


def test_a_question_is_a_chat_or_text(tmp_path):
    """The chat template formats it where there is one; otherwise a blank line is between the question and the answer."""
    tokenizer = letter_tokenizer()
    assert letters(encode(tokenizer, EXPECTED["questions"])[0])[0] == letters(encode(tokenizer, [chat_of("why?", "so")])[0])[0]
    tokenizer.chat_template = None
    (row,) = encode(tokenizer, EXPECTED["questions"])
    plain = encode(tokenizer, [Example("why?\n\n", "so")])[0]
    assert row == plain
    with pytest.raises(DataError, match="messages need a tokenizer with a chat template"):
        encode(tokenizer, EXPECTED["sharegpt"])


def chat_of(asked, answer):
    return Example(messages=({"role": "user", "content": asked}, {"role": "assistant", "content": answer}))


def test_a_bad_row_is_found_before_the_model_is_loaded(tmp_path, monkeypatch, run):
    path = write(tmp_path / "data.jsonl", [*ROWS["text"] * 50, {"txt": "a"}])
    monkeypatch.setattr(hf, "load_model", lambda *given: pytest.fail("the model was loaded"))
    code, _, err = run(f"train {tmp_path} --data {path} -o {tmp_path / 'a.safetensors'}")
    assert code == 1 and "data.jsonl, line 101: expected" in " ".join(err.split())


def test_files_are_read_a_row_at_a_time(tmp_path):
    lines = write(tmp_path / "data.jsonl", [*ROWS["text"], 3])
    examples = read_examples(lines)
    assert [next(examples), next(examples)] == EXPECTED["text"]
    with pytest.raises(DataError, match=r"data.jsonl, line 3: expected an object with 'messages'.*found 3"):
        next(examples)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([], r"expected an object with 'messages'; .*'prompt' and 'completion'; .* found \[\]"),
        (
            {"instruction": "a", "answer": "b"},
            "expected .*'instruction' and 'output'.*found 'instruction', 'answer', but no 'output'",
        ),
        ({"instruction": "a", "input": 3, "output": "b"}, "'input': expected a string, found 3"),
        ({"conversations": [{"from": "human"}]}, "message 1 of 'conversations' must have 'from' and 'value', two strings"),
        ({"conversations": [{"from": "observation", "value": "x"}]}, "'from' must be one of 'human', .* found 'observation'"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "expected a turn of the role 'assistant'"),
        ({"prompt": "a", "txt": "b"}, "expected 'messages'.*found 'prompt', 'txt', but no 'completion'"),
        ({"messages": "hi"}, "expected 'messages' to be a list of messages, found 'hi'"),
        ({"messages": []}, r"expected 'messages' to be a list of messages, found \[\]"),
        ({"messages": [USER]}, r"expected a turn of the role 'assistant' to learn from; found \['user'\]"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2 of 'messages' must have 'role' and 'content'.*found {'role'"),
        ({"messages": [{"from": "human", "value": "hi"}]}, "message 1 of 'messages' must.*found {'from': 'human'"),
        ({"prompt": [USER], "completion": "yo"}, "expected 'completion' to be a list of messages, found 'yo'"),
        ({"prompt": [USER, ANSWER], "completion": [USER]}, "expected a turn of the role 'assistant'"),
        ({"messages": [USER, {"role": "assistant", "content": "\ud83d"}]}, "'messages': expected valid Unicode"),
        ({"prompt": "a", "choices": ["b", "\udcff"], "label": 0}, "'choices': expected valid Unicode"),
        ({"text": "x" * 5, "label": 0, "choices": ["x" * 300]}, r"at least two strings, found \['x{40,}\.\.\.x"),
    ],
)
def test_a_bad_row_is_named(row, words):
    with pytest.raises(DataError, match="^data, row 7: ") as caught:
        example_of(row, "data, row 7")
    assert re.search(words, str(caught.value))


def test_data_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"query": "a"}]).to_parquet("other.parquet")
    datasets.Dataset.from_list(ROWS["text"]).save_to_disk("saved")
    Path("torn.parquet").write_bytes(Path("other.parquet").read_bytes()[:-9])
    Path("filled.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")  # for which pyarrow raises an OSError
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/rows.jsonl").write_text('{"text": "a"')
    for data, words in {
        "nowhere.parquet": "neither a file nor a built-in task",
        "nowhere:train": "neither a file nor a built-in task.*a data set is named 'org/name:train'",
        "no/such:train": "cannot load the data set 'no/such:train'",
        "no/such@main:plain:train[:10%]": "cannot load the data set 'no/such@main:plain:train",
        "other.parquet": "expected the columns 'messages'.*found 'query'",
        "torn.parquet": "torn.parquet is not a whole Parquet file",
        "filled.parquet": "filled.parquet is not a whole Parquet file",
        "saved:test": "cannot load the data set 'saved:test': ValueError: it is one split",
        "empty": "cannot load the data set 'empty'",
        "broken": "cannot load the data set 'broken': ArrowInvalid: JSON parse error: Missing a comma",
    }.items():
        with pytest.raises(DataError, match=words):
            list(read_examples(data))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for data in ("other.parquet", "saved"):
        with pytest.raises(MissingExtra, match=r"pip install 'shira-adapters\[train\]'"):
            list(read_examples(data))


def letters(row):
    """(the row's letters, those of them that the loss counts)."""
    tokenizer = letter_tokenizer()
    shown = ["".join(tokenizer.convert_ids_to_tokens(ids)) for ids in (row["input_ids"],)]
    counted = tokenizer.convert_ids_to_tokens([label for label in row["labels"] if label != IGNORED])
    return shown[0], "".join(counted)


def test_only_the_assistants_turns_count():
    one, two, three = encode(letter_tokenizer(), EXPECTED["chat"] + EXPECTED["turns"])
    assert letters(one) == letters(three) == ("?hi;=yo;", "yo;")
    assert letters(two) == ("!be;?hi;=yo;?hi;=yo;", "yo;yo;")
    assert [label != IGNORED for label in two["labels"]][8:12] == [False, True, True, True]
    earlier = Example(messages=(USER, ANSWER, USER, ANSWER, USER), first=2)  # a prompt may hold answers; what follows is no use
    assert [letters(row) for row in encode(letter_tokenizer(), [earlier])] == [("?hi;=yo;?hi;=yo;", "yo;")]


def test_a_template_that_changes_earlier_turns_gives_a_row_a_turn():
    """As those do that leave out what the model thought earlier."""
    forgetful = (
        "{% for m in messages %}{{ {'user': '?', 'assistant': '='}[m['role']] }}"
        "{% if m['role'] == 'assistant' and loop.last %}{{ '(hm)' }}{% endif %}{{ m['content'] + ';' }}{% endfor %}"
        "{% if add_generation_prompt %}={% endif %}"
    )
    rows = encode(letter_tokenizer(forgetful), [Example(messages=(USER, ANSWER, USER, ANSWER))])
    assert [letters(row) for row in rows] == [("?hi;=(hm)yo;", "(hm)yo;"), ("?hi;=yo;?hi;=(hm)yo;", "(hm)yo;")]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "messages need a tokenizer with a chat template"),
        ("{{ raise_exception('roles must alternate') }}", "does not take these messages: roles must alternate"),
        ("{% if add_generation_prompt %}now{% else %}then{% endif %}", "with message 2 the chat template's text does not"),
    ],
)
def test_a_chat_that_cannot_be_told(template, words):
    with pytest.raises(DataError, match=f"^f, line 1: .*{words}"):
        encode(letter_tokenizer(template), [example_of(ROWS["chat"][0], "f, line 1")])


@given(st.lists(st.tuples(st.text("abc", max_size=9), st.text("abc", max_size=9)), min_size=1, max_size=8), st.integers(2, 12))
def test_rows_are_what_the_plain_way_gives(pairs, longest):
    """Against lists: ids and labels, cut to length, rows without a token to predict left out."""
    tokenizer, plain, shortened, dropped = letter_tokenizer(), [], 0, 0
    for prompt, completion in pairs:
        ids = tokenizer(prompt + completion)["input_ids"] + [tokenizer.eos_token_id]
        labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
        starts = [len(ids) - longest] if prompt else range(0, len(ids), longest)
        cut = [(ids[max(0, s) : s + longest], labels[max(0, s) : s + longest]) for s in starts]
        shortened += bool(prompt) and len(ids) > longest
        cut = [(i, la) for i, la in cut if any(label != IGNORED for label in la[1:])]
        dropped += not cut
        plain += cut
    examples = [Example(*pair) for pair in pairs]
    if not plain:
        with pytest.raises(DataError, match=rf"no example to train on: none of {dropped} has a token"):
            encode(tokenizer, examples, longest)
        return
    done = []
    rows = encode(tokenizer, iter(examples), longest, on_read=done.append)
    assert [(row["input_ids"], row["labels"]) for row in rows] == plain
    assert (rows.shortened, rows.dropped, done) == (shortened, dropped, list(range(1, len(pairs) + 1)))
    assert rows[-1] == rows[len(rows) - 1] and rows[1:] == [rows[n] for n in range(1, len(rows))]
    assert rows.tokens.dtype.itemsize == 5 and rows.lengths.tolist() == [len(ids) for ids, _ in plain]
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_the_page_on_data(run, tmp_path, monkeypatch, tiny_llama):
    """docs/data.md: its files are read, its snippet and its commands run, on a tiny model under the name of the real one."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    tiny_llama.save_pretrained("SmolLM2")
    letter_tokenizer().save_pretrained("SmolLM2")
    files = re.findall(r"\n`(\w+\.\w+)`: [^`]*(?:`[^`\n]*`[^`]*)*?\n\n```\w+\n(.*?)```", page, re.DOTALL)
    lines = ["text.jsonl", "pairs.jsonl", "turns.jsonl", "chat.jsonl", "questions.jsonl"]
    assert [name for name, _ in files] == [*lines, "alpaca.json", "sharegpt.json", "asked.csv"]
    for name, content in files:
        Path(name).write_text(content)
        assert len(list(read_examples(name))) == content.count("\n") - name.endswith(".csv")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(snippet, {})
    commands = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert len(commands) >= 5
    for command in commands:
        program, _, line = command.partition(" ")
        code, _, err = run(line.replace("SmolLM2-135M-Instruct-Q4_1", "SmolLM2"))
        assert (program, code) == ("shira", 0), f"{command}: {err}"
    packed, again = shira.load("packed.safetensors"), shira.load("packed-2.safetensors")  # the last command repeats the run
    assert packed.metadata == again.metadata
    assert all(torch.equal(t.values, again.tensors[name].values) for name, t in packed.tensors.items())


@pytest.mark.real
def test_the_chat_template_of_a_real_model():
    tokenizer = hf.load_tokenizer("SmolLM2-135M-Instruct-Q4_1")
    messages = (USER, {"role": "assistant", "content": "Hello, you!"}, USER, {"role": "assistant", "content": "Again?"})
    (row,) = encode(tokenizer, [Example(messages=messages)])
    whole = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True)["input_ids"]
    assert row["input_ids"] == whole
    counted = tokenizer.decode([label for label in row["labels"] if label != IGNORED])
    assert counted == "Hello, you!<|im_end|>\nAgain?<|im_end|>\n"


@pytest.mark.parametrize("library", ["transformers", "datasets", "diffusers"])
@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_of_others_stay_as_they_were(library, shown):
    library = pytest.importorskip(library)
    logging = library.utils.logging
    before = logging.is_progress_bar_enabled()
    try:
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
        with pytest.raises(ZeroDivisionError), quiet(library):
            assert not logging.is_progress_bar_enabled()
            raise ZeroDivisionError
        assert logging.is_progress_bar_enabled() == shown
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def test_retries_of_the_hub_are_not_shown(caplog, monkeypatch):
    """The hub's own function, at a port where nobody answers; what else it says is shown."""
    from huggingface_hub.utils import _http

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for inside, expected in ((quiet(), 0), (contextlib.nullcontext(), 3)):
        with inside, pytest.raises(Exception, match="refused"):
            _http.http_backoff("HEAD", "http://127.0.0.1:1", max_retries=1, base_wait_time=0)
        assert len(caplog.messages) == expected
    with quiet():
        _http.logger.warning("Rate limited. Waiting 60s before retry [Retry 1/5].")
    assert len(caplog.messages) == 4
