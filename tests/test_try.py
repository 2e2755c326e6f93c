"""`shira generate`, `shira chat` and `shira eval` on a tiny random model: what they print, and what they refuse."""

import io
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

import shira
from conftest import all_bits, letter_tokenizer, random_adapter, same_bits
from shira.integrations import generation
from shira.integrations import transformers as hf
from shira.runs.chat import Chat, converse

TEXTS = [
    {"text": "abcabcabcabc" * 4},
    {"prompt": "ab", "completion": "cab"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    {"prompt": "yes?", "choices": ["y", "n"], "label": 1},
]
QUESTIONS = [{"prompt": f"{a}+{b}=", "choices": ["x", "yy"], "label": (a + b) % 2} for a in range(3) for b in range(3)]


@pytest.fixture
def home(tmp_path, monkeypatch, tiny_llama):
    """A working folder with a tiny model, its tokenizer, two adapters (one in a folder), and data."""
    tiny_llama.save_pretrained(tmp_path / "model")
    letter_tokenizer().save_pretrained(tmp_path / "model")
    random_adapter(tiny_llama, 1, density=0.1).save(tmp_path / "poet.safetensors")
    (tmp_path / "coder").mkdir()
    random_adapter(tiny_llama, 2, density=0.1).save(tmp_path / "coder" / "adapter.safetensors")
    for name, rows in (("texts", TEXTS), ("questions", QUESTIONS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def live(home):
    """The model of that folder, its tokenizer, and a switcher with both adapters."""
    model, tokenizer = hf.load_model("model"), hf.load_tokenizer("model")
    switcher = shira.Switcher(model)
    switcher.add("poet", "poet.safetensors")
    switcher.add("coder", "coder")
    return model, tokenizer, switcher


def plainly(model, tokenizer, text, count=6):
    """What `generate` of Transformers writes after a text, without streaming."""
    ids = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**ids, max_new_tokens=count, do_sample=False, eos_token_id=1, pad_token_id=0)
    return tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


GENERATE = "generate model --max-new-tokens 6 --temperature 0"


@pytest.mark.parametrize(
    ("options", "asked", "selection"),
    [
        ("-p hi", "?hi;=", {}),
        ("-p hi --raw", "hi", {}),
        ("-p hi --system be", "!be;?hi;=", {}),
        ("-p hi -a poet.safetensors=0.8", "?hi;=", {"poet": 0.8}),
        ("-p hi -a poet.safetensors -a coder=-2", "?hi;=", {"poet": 1.0, "coder": -2.0}),
        ("""-p hi -a 'coder={"*": 0, "*.mlp.*": 2}'""", "?hi;=", {"coder": {"*": 0.0, "*.mlp.*": 2.0}}),
        ("-f ask.txt -a coder/adapter.safetensors", "?hi;=", {"coder": 1.0}),
    ],
)
def test_generate_prints_what_transformers_writes(run, live, options, asked, selection):
    model, tokenizer, switcher = live
    Path("ask.txt").write_text("hi\n")
    code, out, err = run(f"{GENERATE} {options}")
    assert code == 0, err
    switcher.use(selection)
    assert out == plainly(model, tokenizer, asked) + "\n"


def test_generate_compares_with_the_base(run, live):
    model, tokenizer, switcher = live
    base = plainly(model, tokenizer, "?hi;=")
    switcher.use("poet")
    code, out, err = run(f"{GENERATE} -p hi -p yo -a poet.safetensors --compare")
    assert code == 0, err
    assert base != plainly(model, tokenizer, "?hi;=")
    first, second = out.split("prompt: yo ═")
    assert re.fullmatch(
        rf"prompt: hi ═+\nbase ─+\n{re.escape(base)}\npoet.safetensors ─+\n{re.escape(plainly(model, tokenizer, '?hi;='))}\n",
        first,
    )
    assert plainly(model, tokenizer, "?yo;=") in second and "the same" not in out
    out = run(f"{GENERATE} -p hi -a poet.safetensors=0 --compare")[1]
    assert out.count(base) == 2 and out.endswith("(both answers are the same)\n")


def test_generate_reads_the_standard_input_and_fuses_by_any_method(run, live, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    code, out, err = run(f"{GENERATE} -a poet.safetensors -a coder --method dare --drop 0.5 --seed 3")
    assert code == 0, err
    model, tokenizer, switcher = live
    switcher.use({"poet": 1.0, "coder": 1.0}, "dare", drop=0.5, seed=3)
    assert out == plainly(model, tokenizer, "?hi;=") + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    code, _, err = run(GENERATE)
    assert code == 1 and "the standard input holds no prompt" in err


def test_tokens_are_drawn_by_their_seed_and_disturb_nothing(live):
    model, tokenizer, _ = live
    state = torch.get_rng_state()
    answers = [generation.answer(model, tokenizer, "hi", max_new_tokens=9, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    assert torch.equal(state, torch.get_rng_state())


def test_an_answer_ends_where_the_model_has_no_more_room(live):
    model, tokenizer, _ = live
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    pieces = []
    text = generation.answer(model, tokenizer, "a" * 60, max_new_tokens=20, temperature=0, on_text=pieces.append)
    assert "".join(pieces) == text and len(text.split()) == 4 and pieces
    with pytest.raises(shira.DataError, match="the prompt has 64 tokens; expected at least 1, and less than the 64"):
        generation.answer(model, tokenizer, "a" * 64)
    with pytest.raises(shira.DataError, match="the prompt has 0 tokens"):
        generation.answer(model, tokenizer, "")


def test_a_prompt_that_is_no_text_and_a_model_that_computes_no_number(live):
    model, tokenizer, _ = live
    with pytest.raises(shira.DataError, match="the prompt is not valid Unicode"):
        generation.answer(model, tokenizer, "a\udcff")
    torch.nn.init.constant_(model.model.norm.weight, math.inf)  # as float16 holds what is too large for it
    for temperature in (0, 1):
        with pytest.raises(shira.DataError, match="scores for the next token are not finite; lower the strengths"):
            generation.answer(model, tokenizer, "hi", temperature=temperature)


def test_an_adapter_may_be_called_base_and_be_the_working_folder(run, home, monkeypatch):
    shutil.copytree("coder", "base")
    code, out, err = run(f"{GENERATE} -p hi -a base --compare")
    assert code == 0 and out.count("base ──") == 2, err
    code, out, err = run("eval model --data texts.jsonl -a base")
    assert code == 0 and len(re.findall(r"^│ base +│ [^│]+│$", out, re.MULTILINE)) == 2, err
    monkeypatch.setattr("sys.stdin", io.StringIO("/use base\n/use\ta-b=2\n/quit now\n/base\n"))
    monkeypatch.chdir("base")
    code, out, err = run("chat ../model -a . -a 'a b=adapter.safetensors'")
    assert code == 0 and not re.search("Error", err), err
    assert "Adapters: base, a-b." in out and "a-b=2 is active" in out and out.endswith("> /quit now\n")


def test_what_a_model_writes_has_no_effect_on_the_terminal(capsys):
    from shira.cli.output import write

    write("a\x1b[2J\u202e\tb\r\n")
    assert capsys.readouterr().out == "a\\x1b[2J\\u202e\tb\\r\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("generate model -p hi -a none.safetensors", "FileNotFoundError: .*none.safetensors"),
        ("generate model -p hi -a poet.safetensor", "no file or folder 'poet.safetensor'; did you mean 'poet.safetensors'"),
        ("eval model --data ./text.jsonl", "DataError: './text.jsonl' is neither .*did you mean './texts.jsonl'"),
        ("generate model -p hi -a poet.safetensors=x", "DataError: .*after '=' must be a number or a JSON object, found 'x'"),
        ("generate model -p hi -a poet.safetensors=nan", "AdapterError: the strength of 'poet.safetensors' must be a finite"),
        ("""generate model -p hi -a 'coder={"*": 1, "nose": 2}'""", "AdapterError: coder: .*'nose' matches none"),
        ("generate model -p hi -a coder -a coder=2", "DataError: one adapter is given twice"),
        (
            "generate model -p hi -a coder -a coder/adapter.safetensors",
            "DataError: one adapter .* as 'coder' and 'coder/adapter.saf",
        ),
        (
            "generate model -p hi -a bard=poet.safetensors",
            "DataError: 'bard=poet.safetensors' gives .* only `shira chat` takes NAME=FILE; give 'poet.safetensors'",
        ),
        (
            "eval model --data texts.jsonl -a bard=coder=0.5",
            "DataError: .* only `shira chat` takes NAME=FILE; give 'coder=0.5'",
        ),
        ("generate model -p hi -a bard=none.safetensors", "DataError: .*after '=' must be a number"),
        ("generate model -p hi -a texts.jsonl", "FormatError: texts.jsonl is not a whole safetensors file"),
        (
            "generate model -p hi -a other.safetensors",
            "BaseMismatch: other.safetensors does not .* it has no tensor '0.weight'",
        ),
        ("generate model -p hi --compare", "DataError: --compare needs an adapter"),
        ("generate model -p hi --raw --system be", "DataError: --system .*--raw leaves it out"),
        ("generate model -p hi --method tise -a coder", "AdapterError: unknown fusion method 'tise'; did you mean 'ties'"),
        ("generate model -f none.txt", "FileNotFoundError: .*none.txt"),
        ("generate model -f model/model.safetensors", "DataError: model/model.safetensors is not a text in UTF-8"),
        ("generate model -p hi --dtype float8", "found 'float8'; did you mean 'float32'"),
        ("generate model -p hi --temperature -1", "Invalid value for '--temperature'"),
        ("generate nomodel -p hi", "DataError: cannot load 'nomodel'"),
        (
            "generate pipeline -p hi",
            "'pipeline': it is a Diffusers pipeline: `shira train-image` trains it, and `shira sample`",
        ),
        ("train pipeline --data texts.jsonl", "'pipeline': it is a Diffusers pipeline: `shira train-image` trains it"),
        ("generate other.safetensors -p hi", "it holds an adapter, no model; .*: `shira generate BASE -a other.safetensors`"),
        ("eval run --data texts.jsonl", "cannot load 'run': it holds an adapter of 'tiny', no model; .* BASE -a run`"),
        ("chat lora", "cannot load 'lora': .*it is an adapter of PEFT, which has to be converted: `shira convert lora"),
        ("train run --data texts.jsonl", "cannot load 'run': it holds an adapter of 'tiny', no model; .* BASE -a run`"),
        ("generate bare -p hi", "DataError: 'bare' holds a model and no tokenizer; save one beside it: tokenizer.save_pretr"),
        ("chat bare", "DataError: 'bare' holds a model and no tokenizer"),
        ("eval bare --data texts.jsonl", "DataError: 'bare' holds a model and no tokenizer"),
        ("train bare --data texts.jsonl --targets all-linear", "DataError: 'bare' holds a model and no tokenizer"),
        ("serve bare --adapters coder --engine transformers --port 0", "DataError: 'bare' holds a model and no tokenizer"),
        ("generate plain -p hi --system be", "DataError: --system .*this model's tokenizer has none"),
        ("chat plain --system be", "DataError: --system .*this model's tokenizer has none"),
        ("chat model -a poet=coder -a poet.safetensors", "DataError: two adapters have the name 'poet': coder and poet.safet"),
        ("chat model -a none=none.safetensors", "FileNotFoundError: .*none.safetensors"),
        ("chat model -a poet.safetensors=x", "DataError: .*after '=' must be a number"),
        ("chat model -a other.safetensors", "BaseMismatch: other.safetensors does not"),
        ("eval model --data nowhere.jsonl", "DataError: 'nowhere.jsonl' is neither a file nor a built-in task"),
        ("eval model --data spamm", "DataError: 'spamm' is neither .*did you mean 'spam'"),
        ("eval model --data texts.jsonl --data texts.jsonl", "DataError: --data: the same data are given twice"),
        ("eval model --data texts.jsonl -a none.safetensors", "FileNotFoundError: .*none.safetensors"),
        ("eval model --data texts.jsonl -a coder=inf", "AdapterError: the strength of 'coder' must be a finite number"),
        ("eval model --data texts.jsonl -a other.safetensors", "BaseMismatch: other.safetensors does not"),
        ("eval model --data texts.jsonl --predictions texts.jsonl", "DataError: --predictions: texts.jsonl is there already"),
        (
            "eval model --data texts.jsonl --predictions no/where.jsonl",
            "FileNotFoundError: --predictions: there is no folder no",
        ),
        ("eval plain --data texts.jsonl", "DataError: texts.jsonl, line 3: messages need a tokenizer with a chat template"),
        ("eval model --data texts.jsonl --harness", "DataError: --harness asks questions: texts.jsonl needs"),
        ("eval model --data texts.jsonl --dtype bf16", "found 'bf16'; did you mean 'bfloat16'"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(run, home, monkeypatch, line, words):
    random_adapter(torch.nn.Sequential(torch.nn.Linear(4, 4)), 1).save("other.safetensors")
    Path("run").mkdir()
    shira.Adapter(shira.load("other.safetensors").tensors, {"base": {"id": "tiny"}}).save("run/adapter.safetensors")
    Path("lora").mkdir()
    Path("lora/adapter_config.json").write_text("{}")
    Path("pipeline").mkdir()
    Path("pipeline/model_index.json").write_text("{}")
    Path("bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(f"model/{name}", "bare")
    if " plain" in line:
        shutil.copytree("model", "plain")
        letter_tokenizer(None).save_pretrained("plain")
        Path("plain/chat_template.jinja").unlink(missing_ok=True)
    monkeypatch.setattr("shira.integrations.transformers.load_model", lambda *_: pytest.fail("the model was loaded"))
    before = sorted(home.rglob("*"))
    code, out, err = run(line)
    assert code in (1, 2)
    assert re.search(words, re.sub(r"[│\s]+", " ", err)), err
    assert not out and "Traceback" not in err
    assert sorted(home.rglob("*")) == before


def test_generate_without_a_prompt(run, home, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    code, _, err = run(GENERATE)
    assert code == 1 and "there is no prompt: give -p TEXT or -f FILE" in err


def talk(run, monkeypatch, lines, options=""):
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return run(f"chat model --max-new-tokens 6 --temperature 0 -a poet.safetensors -a prose=coder {options}")


def test_a_line_that_is_no_text_is_left_out_of_a_chat(run, home, monkeypatch):
    """The lines around it are answered, although Python decodes them together with it."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"/base\nh\xffi\n/adapters\n/quit\n"), encoding="utf-8"))
    code, out, err = run("chat model -a poet.safetensors")
    assert code == 0 and "a line of the standard input is not in UTF-8, and was left out" in err
    assert "> /base" in out and "> /adapters" in out


MS = r"[\d.]+ ms"


def test_a_chat_switches_and_goes_on_after_errors(run, live, monkeypatch):
    model, tokenizer, switcher = live
    lines = "hi\n/use poet=0.5 prose\n/use pote\n/use poet=x\n/use\n/nose\n/adapters\nhi\n/base\n/reset\nhi\n/help\n/quit\nhi\n"
    code, out, err = talk(run, monkeypatch, lines)
    assert code == 0, err
    base = plainly(model, tokenizer, "?hi;=")
    switcher.use({"poet": 0.5, "coder": 1.0})
    both = plainly(model, tokenizer, f"?hi;={base};?hi;=")
    parts = re.split(r"^> .*\n", out, flags=re.MULTILINE)
    assert parts[0] == "Adapters: poet, prose. /help lists the commands.\nthe base is active.\n"
    assert re.fullmatch(rf"poet=0.5 \+ prose=1 is active: switched in {MS} \(read and checked in {MS}\)\n", parts[2])
    assert parts[1] == f"{base}\n" and parts[3:7] == [""] * 4
    assert re.split(r" {2,}|\n", parts[7]) == ["poet", "active, 0.5", "prose", "active, 1", ""]
    assert parts[8] == f"{both}\n"
    assert re.fullmatch(rf"the base is active: switched in {MS}\n", parts[9])
    assert parts[10:12] == ["the conversation is forgotten\n", f"{base}\n"]
    assert "/use poet=1 coder=0.5" in parts[12] and parts[13:] == [""]
    assert re.findall(r"^\w+Error(?=: )", err, re.MULTILINE) == ["SwitchError", "DataError", "DataError", "DataError"]
    for words in ("no adapter 'pote'; did you mean 'poet'", "found 'x'", "there are: poet, prose", "no command '/nose'"):
        assert words in err


def test_a_chat_may_begin_with_adapters_and_a_system_prompt(run, live, monkeypatch):
    model, tokenizer, switcher = live
    code, out, err = talk(run, monkeypatch, "hi", "-a mine=poet.safetensors=0.5 --system be")
    assert code == 0, err
    switcher.use({"poet": 0.5})
    assert "mine=0.5 is active.\n" in out and out.endswith(f"> hi\n{plainly(model, tokenizer, '!be;?hi;=')}\n")


def test_strengths_by_pattern_and_a_file_that_is_gone(live):
    model, tokenizer, switcher = live
    chat = Chat(model, tokenizer, switcher, max_new_tokens=6)
    chat.command('/use poet={"*": 0.5, "*.mlp.*": 2} coder=-1')
    assert switcher.active == {"coder": -1.0, "poet": {"*": 0.5, "*.mlp.*": 2.0}}
    assert chat.active() == "coder=-1 + poet={'*': 0.5, '*.mlp.*': 2.0}"
    before = all_bits(model)
    switcher.add("gone", Path(shutil.copy("poet.safetensors", "gone.safetensors")))
    Path("gone.safetensors").unlink()
    lines, errors = iter(["/use gone", "/use poet=nan", '/use poet={"nose": 1}', "/use poet=1e30", None]), []
    converse(chat, lambda: next(lines), lambda _: None, lambda _: None, errors.append)
    assert [type(error).__name__ for error in errors[:3]] == ["FileNotFoundError", "AdapterError", "AdapterError"]
    chat.command('/use poet={"*": 0.5, "*.mlp.*": 2} coder=-1')
    assert same_bits(before, all_bits(model))


def test_an_interrupt_ends_an_answer_and_not_the_chat(live):
    """Once while nothing is asked, once in the middle of an answer, whose beginning is kept."""
    model, tokenizer, switcher = live
    chat = Chat(model, tokenizer, switcher, max_new_tokens=6, temperature=0)
    switcher.use("poet")
    asked, said, notes = iter([KeyboardInterrupt, "hi", "", "/reset", None]), [], []
    history = []

    def ask():
        history.append(list(chat.messages))
        line = next(asked)
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    def write(text):
        said.append(text)
        if len(said) == 2:  # the first is the line break after the first interrupt
            raise KeyboardInterrupt

    converse(chat, ask, write, notes.append, pytest.fail)
    assert notes[:2] == ["interrupted; poet=1 is active; /quit or Ctrl-D ends the chat"] * 2
    assert history[2] == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": said[1]}]
    assert chat.messages == [] and switcher.active == {"poet": 1.0}


def test_a_model_without_a_template_continues_each_text(run, live, monkeypatch):
    model, tokenizer, _ = live
    letter_tokenizer(None).save_pretrained("model")
    Path("model/chat_template.jinja").unlink(missing_ok=True)
    code, out, err = talk(run, monkeypatch, "hi\nhi\n/use prose=0\n")
    assert code == 0, err
    text = plainly(model, tokenizer, "hi")
    assert "has no chat template" in out and out.count(f"> hi\n{text}\n") == 2
    assert "the base is active: switched in" in out


def test_the_page_on_trying(run, live, monkeypatch):
    """docs/try.md: its data are read, its snippet and its commands run, on a tiny model under the name of the real one."""
    page = (Path(__file__).parents[1] / "docs" / "try.md").read_text(encoding="utf-8")
    shutil.copytree("model", "SmolLM2")
    (texts, predictions) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    Path("texts.jsonl").write_text(texts)
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(snippet, {"model": live[0], "tokenizer": live[1]})
    commands = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert len(commands) >= 8
    for command in commands:
        given, _, line = command.rpartition("shira ")
        assert re.fullmatch(r"(echo '[^']*' \| )?", given), command
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(re.findall("'(.*)'", given))))
        line = re.sub(r"--data (spam|questions)\b", "--data questions.jsonl", line)
        code, _, err = run(line.replace("SmolLM2-135M-Instruct-Q4_1", "SmolLM2"))
        assert code == 0, f"{command}: {err}"
    told = [json.loads(line) for line in predictions.splitlines()]
    (found, *_) = map(json.loads, Path("spam-out.jsonl").read_text().splitlines())
    assert found.keys() == told[0].keys() and found["adapted"].keys() == told[0]["adapted"].keys()
    assert run("eval model --data texts.jsonl -a coder --predictions texts-out.jsonl")[0] == 0
    found = json.loads(Path("texts-out.jsonl").read_text().splitlines()[1])
    assert found.keys() == told[1].keys() and found["adapted"].keys() == told[1]["adapted"].keys()
