"""Push to the hub, and load by name: against a server on loopback that speaks its API (tests/hub.py)."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import shira
from conftest import all_bits, letter_tokenizer, mlp, random_adapter, same_bits
from hub import TOKEN, serving
from shira import HubError, MissingExtra
from shira.integrations.hub import parcel, push

utils = pytest.importorskip("huggingface_hub.utils")
constants = pytest.importorskip("huggingface_hub.constants")


pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # how huggingface_hub calls httpx2


@pytest.fixture
def online(tmp_path, monkeypatch):
    """A user at a hub, with an empty cache and a working folder."""
    with serving() as server:
        point_to(server.url, tmp_path, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        yield server
        utils.close_session()


def point_to(url, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server has only LFS
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    utils.close_session()


def same(one, other):
    return one.metadata == other.metadata and all(
        torch.equal(tensor.indices, other.tensors[name].indices) and torch.equal(tensor.values, other.tensors[name].values)
        for name, tensor in one.tensors.items()
    )


def test_push_load_switch_fuse_and_merge_by_name(online, monkeypatch, run):
    model = mlp()
    base, one, two = all_bits(model), random_adapter(model, 1), random_adapter(model, 2)
    one.save("poet.safetensors")
    first = push("poet.safetensors", "me/poet", private=True)
    two.save("poet.safetensors")
    push("poet.safetensors", "me/poet", revision="next")
    assert same(shira.load("me/poet"), one) and same(shira.load(first), one)
    assert same(shira.load("me/poet@next"), two) and same(shira.load("me/poet", revision="next"), two)
    assert online.repos["me/poet"]["private"] and set(online.files("me/poet")) == {"README.md", "adapter.safetensors"}

    switcher = shira.Switcher(model)
    switcher.add("poet", "me/poet")
    online.commit("me/poet", "main", {"adapter.safetensors": online.files("me/poet", "next")["adapter.safetensors"]})
    switcher.use("poet")
    weight = model[0].weight.detach().view(-1)[one.tensors["0.weight"].indices]
    assert torch.equal(weight, one.tensors["0.weight"].values)  # what was checked when it was added, whatever is pushed later
    switcher.use(None)
    assert same_bits(base, all_bits(model))
    assert same(shira.load("me/poet"), two)
    fused = shira.fuse({f"{first}": 1.0, "me/poet@next": 0.5}, base=model)
    assert set(fused.metadata["fused"]["strengths"]) == {first.removeprefix("me/"), "poet@next"}
    assert shira.compare(first, "me/poet@next", base=model, spectra=False).total.changes.keys() == {"random1", "random2"}
    code, out, _ = run(f"inspect {first} --json")
    assert code == 0 and json.loads(out)["nnz"] == one.nnz

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(online.requests)
    assert same(shira.load(first), one) and same(shira.load("me/poet@next"), two)
    with pytest.raises(HubError, match="'me/poem' is no file or folder, and not in the cache of the hub; offline.*'me/poet'"):
        shira.load("me/poem")
    assert len(online.requests) == asked


def test_a_pipeline_is_trained_by_name(online, tmp_path, run):
    """`shira train-image me/pipe` makes the adapter that it makes of the same pipeline in a folder."""
    pytest.importorskip("diffusers")
    from pipelines import folder_with_pictures, stable_diffusion

    folder_with_pictures(Path.cwd())
    stable_diffusion().save_pretrained("folder")
    files = {str(path.relative_to("folder")): path.read_bytes() for path in Path("folder").rglob("*") if path.is_file()}
    online.make("me/pipe")
    online.commit("me/pipe", "main", files)
    line = "train-image {} --data one --steps 2 --density 0.1 --batch-size 2 --sample-steps 2 -o {}.safetensors"
    environment = {"HF_ENDPOINT": online.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "shira.cli", *line.format("me/pipe", "one").split()]
    # a process of its own: Diffusers reads the hub's address when it is imported
    subprocess.run(command, check=True, env=os.environ | environment | {"HF_HUB_OFFLINE": "0"}, timeout=300)
    assert run(line.format("folder", "other"))[0] == 0
    one, other = shira.load("one.safetensors"), shira.load("other.safetensors")
    assert all(torch.equal(each.values, other.tensors[name].values) for name, each in one.tensors.items())
    assert Path("one.png").read_bytes() == Path("other.png").read_bytes()  # the samples


def test_a_path_that_exists_wins(online):
    os.makedirs("me/poet")
    adapter = random_adapter(mlp(), 1)
    adapter.save("me/poet/adapter.safetensors")
    push("me/poet", "me/poet")
    random_adapter(mlp(), 2).save("me/poet/adapter.safetensors")
    assert same(shira.load("me/poet"), random_adapter(mlp(), 2)) and same(shira.load("me/poet@main"), adapter)
    with pytest.raises(HubError, match="is of a name of the hub"):
        shira.load("me/poet", revision="main")
    with pytest.raises(HubError, match="names the revision 'main', and revision= says 'v1'"):
        shira.load("me/poet@main", revision="v1")
    with pytest.raises(FileNotFoundError):
        shira.load("me/other.safetensors")  # a name of a file, for which no hub is asked


FILES = {
    "me/full": ["config.json", "model.safetensors"],
    "me/lora": ["adapter_model.safetensors"],
    "me/away": ["a\\..\\x.safetensors"],
}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("me/peot", "no repository of the hub that you may read .*; did you mean 'me/poet'"),
        ("them/poet", "no repository of the hub that you may read .*hf auth login"),
        ("me/poet@v1", "'me/poet' on the hub has no revision 'v1'; known: 'main', 'next'"),
        ("me/full", "'me/full' on the hub holds no adapter.safetensors; it holds config.json, model.safetensors"),
        ("me/lora", "is no adapter of shira; it is an adapter of PEFT, which has to be converted"),
        ("me/secret", "no repository of the hub that you may read .*if it is private, log in"),
        ("me/away", r"'me/away': huggingface_hub cannot use what it was given \(Invalid filename"),
    ],
)
def test_what_the_hub_does_not_have_is_one_error(online, monkeypatch, name, words):
    random_adapter(mlp(), 1).save("a.safetensors")
    push("a.safetensors", "me/poet")
    online.repos["me/poet"]["branches"]["next"] = online.repos["me/poet"]["branches"]["main"]
    for repo, files in FILES.items():
        online.make(repo)
        online.commit(repo, "main", dict.fromkeys(files, b"x"))
    if name == "me/secret":
        online.make(name, private=True)
        monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=words):
        shira.load(name)


def test_the_only_adapter_of_a_repository_may_have_any_name(online, monkeypatch):
    random_adapter(mlp(), 1).save("a.safetensors")
    online.make("me/other")
    with open("a.safetensors", "rb") as file:
        online.commit("me/other", "main", {"spam.safetensors": file.read(), "README.md": b""})
    assert shira.load("me/other").name == "random1"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert shira.load("me/other").name == "random1"


def test_what_cannot_be_pushed_is_refused_before_anything_is_sent(online, monkeypatch):
    random_adapter(mlp(), 1).save("a.safetensors")
    online.make("me/full")
    online.commit("me/full", "main", {"model.safetensors": b"x"})
    online.make("me/open")
    before = dict(online.commits)
    refused = {
        ("a.safetensors", "me/full"): (HubError, "holds something else"),
        ("a.safetensors", "poet"): (HubError, "named user/repo; found 'poet'"),
        ("a.safetensors", "me/poet@v1"): (HubError, "named user/repo"),
        ("none.safetensors", "me/poet"): (FileNotFoundError, "none.safetensors"),
        ("me/nowhere", "me/poet"): (FileNotFoundError, "me/nowhere"),
        (".", "me/poet"): (shira.FormatError, "is a folder; pass one of the files in it"),
    }
    random_adapter(mlp(), 2).save("b.safetensors")
    for call, (error, words) in refused.items():
        with pytest.raises(error, match=words):
            push(*call)
    with pytest.raises(HubError, match="exists and is public, so nothing was sent"):
        push("a.safetensors", "me/open", private=True)
    cards = {b"---\nlicense: [\n---\n": "the header of a.md is not YAML", b"caf\xe9": "a.md is not a text in UTF-8"}
    for content, words in (cards | {b"---\nlicense: none\n---\n": r"me/open.*cannot use.*license must be known"}).items():
        Path("a.md").write_bytes(content)
        with pytest.raises(HubError, match=words):
            push("a.safetensors", "me/open")
    os.remove("a.md")
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    with pytest.raises(HubError, match="log in with `hf auth login`"):
        push("a.safetensors", "me/poet")
    assert online.commits == before


def test_a_file_that_takes_positions_from_another_is_pushed_whole(online):
    one, two = random_adapter(mlp(), 1), random_adapter(mlp(), 1)
    one.save("one.safetensors")
    two.save("two.safetensors", like="one.safetensors")
    push("two.safetensors", "me/two")
    assert same(shira.load("me/two"), two)


def test_nothing_but_what_belongs_to_it_goes_along(tmp_path):
    adapter = random_adapter(mlp(), 1)
    adapter.save(tmp_path / "adapter.safetensors")
    for name in ("recipe.yaml", "secrets.yaml", "optimizer.pt", "samples.png", "LICENSE", ".env", "notes.md"):
        (tmp_path / name).write_text("x")
    (tmp_path / "README.md").write_text(
        '# mine\n```python\nswitcher.add("p", "adapter.safetensors")\n```\n"adapter.safetensors"\n'
    )
    found = parcel(tmp_path, "me/poet")
    assert set(found.files) == {"adapter.safetensors", "recipe.yaml", "samples.png", "LICENSE", "README.md"}
    assert found.left_out == [".env", "notes.md", "optimizer.pt", "secrets.yaml"]
    assert b'switcher.add("p", "me/poet")\n```\n"adapter.safetensors"\n' in found.files["README.md"]


def test_no_hub_is_a_matter_of_seconds(tmp_path, monkeypatch):
    """A server that takes the call and says nothing; and none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shira.files.hub, "PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        point_to(f"http://127.0.0.1:{mute.getsockname()[1]}", tmp_path, monkeypatch)
        start = time.monotonic()
        with pytest.raises(
            HubError, match="'me/poet' is no file or folder, and not in the cache of the hub; .* cannot be reached"
        ):
            shira.load("me/poet")
        assert time.monotonic() - start < 4
    with pytest.raises(HubError, match="cannot be reached"):
        shira.load("me/poet")
    random_adapter(mlp(), 1).save("poet.safetensors")
    with pytest.raises(HubError, match=r"no file was pushed, because .* cannot be reached .*; try again"):
        push("poet.safetensors", "me/poet")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="no file was pushed, because HF_HUB_OFFLINE is set; unset it"):
        push("poet.safetensors", "me/poet")


def test_without_huggingface_hub_the_install_line_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match="pip install huggingface_hub"):
        shira.load("me/poet")


def test_the_page_on_sharing(online, run, tiny_llama):
    """docs/share.md: its commands train and push a tiny model under the name of the real one, and its snippet loads by name."""
    page = (Path(__file__).parents[1] / "docs" / "share.md").read_text(encoding="utf-8")
    tiny_llama.save_pretrained("SmolLM2")
    letter_tokenizer().save_pretrained("SmolLM2")
    rows = [{"prompt": f"{a}=", "choices": ["x", "y"], "label": a % 2} for a in range(20)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for line in re.search(r"```bash\n(.*?)```", page, re.DOTALL)[1].splitlines():
        line = line.replace("SmolLM2-135M-Instruct-Q4_1", "SmolLM2").replace("--data spam", "--data rows.jsonl")
        code, out, err = run(line.removeprefix("shira ").replace("--steps 40", "--steps 2"))
        assert code == 0, err
    assert "shira.load('me/poet') reads it; this commit is me/poet@" in out
    before = all_bits(tiny_llama)
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], names := {"model": tiny_llama})
    assert names["adapter"].metadata["training"]["held_out"]["rows"] and same_bits(before, all_bits(tiny_llama))
    card = online.files("me/poet")["README.md"].decode()
    assert 'switcher.add("poet", "me/poet")' in card and 'license: "mit"' in card
    code, out, err = run("eval SmolLM2 --data rows.jsonl -a me/poet=0.5 --json")
    assert code == 0 and json.loads(out)["results"][1]["active"] == "me/poet=0.5", err
