"""What tests/crash.py kills: each scene acts in a folder, checks what lies there after a kill, and how it ends."""

import json
import os
import re
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

os.environ |= {
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}  # before torch: forks have no threads

import torch
import transformers

import crash
import shira
from conftest import letter_tokenizer, random_adapter
from serving import tiny_llama
from shira import Adapter, SparseTensor, cli
from shira.integrations import peft
from shira.integrations.trainer import ShiraCallback
from shira.serving import transformers_server  # noqa: F401  imported before the first fork, which then need not
from trainers import llama, snip, trainer_of

torch.set_num_threads(1)
PROMPT = {"model": "a", "prompt": "hello", "max_tokens": 8, "temperature": 0}


def command(line):
    """One of shira's commands in this process."""
    sys.argv = ["shira", *line.split()]
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 0, f"shira {line}: {code}"


class Scene:
    """given: the files that are there before. expected: those that a run leaves, once `learn` has seen one."""

    def __init__(self, folder):
        self.folder, self.given = folder / "work", {}
        os.chdir(self.folder)

    def reset(self):
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, content in self.given.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(content)

    def keep_given(self):
        self.given = crash.tree(self.folder)

    def learn(self):
        self.expected = crash.tree(self.folder)

    def check(self):
        """Each file has all bytes of the old or of the new one."""
        found = crash.tree(self.folder)
        for name, content in found.items():
            assert content in (self.given.get(name), self.expected.get(name)), f"half a file: {name}, {len(content)} bytes"
        assert found.keys() >= self.given.keys(), "a file is lost"

    def check_end(self):
        found = crash.tree(self.folder)
        assert found == self.expected, (
            f"another end: {[name for name in self.expected if found.get(name) != self.expected[name]]}"
        )

    def write_next(self):
        """Whoever writes in the folder next removes what a killed process has left there."""
        Adapter({}).save("next.safetensors")
        Path("next.safetensors").unlink()


class Save(Scene):
    """Two new files, one of which takes its positions from the other, and one that replaces an older one."""

    def __init__(self, folder):
        super().__init__(folder)
        generator = torch.Generator().manual_seed(0)
        where = (torch.rand(10**6, generator=generator) < 0.3).nonzero().view(-1)
        values = [torch.randn(where.numel(), generator=generator) for _ in range(3)]
        self._adapters = [Adapter({"w": SparseTensor((1000, 1000), where, each)}) for each in values]
        self._adapters[0].save("poet.safetensors")
        self.keep_given()

    def act(self):
        _, one, other = self._adapters
        one.save("poet.safetensors")
        one.save("fresh.safetensors")
        other.save("beside.safetensors", like="fresh.safetensors")

    def check(self):
        super().check()
        for path in self.folder.glob("*.safetensors"):
            shira.load(path)  # whole by its own words, too


class Convert(Scene):
    """PEFT's folder to an adapter, an adapter to a patch and to PEFT's folder."""

    def __init__(self, folder):
        super().__init__(folder)
        model = tiny_llama()
        model.save_pretrained("base")
        kinds = {"delta": "delta", "values": "overwrite"}
        for name, kind in kinds.items():
            tensors = {n: t for n, t in random_adapter(model, 1, 0.05, kind).tensors.items() if "proj" in n}
            Adapter(tensors).save(f"{name}.safetensors")
        peft.save(shira.load("delta.safetensors"), "theirs")
        self.keep_given()

    def act(self):
        for output, line in {
            "ours.safetensors": "theirs --base base",
            "patch.safetensors": "values.safetensors --to trl",
            "again": "delta.safetensors --to peft",
        }.items():
            if not Path(output).exists():
                command(f"convert {line} -o {output}")

    def check(self):
        super().check()
        folder = self.folder / "again"
        if folder.exists():
            names = {name for name in self.expected if name.startswith("again/")}
            assert {f"again/{path.name}" for path in folder.iterdir()} == names, "half a folder"


class Merge(Scene):
    """A checkpoint of several shards with two adapters."""

    def __init__(self, folder):
        super().__init__(folder)
        model = tiny_llama()
        model.save_pretrained("base", max_shard_size="20KB")
        letter_tokenizer().save_pretrained("base")
        for seed, name in enumerate("ab"):
            random_adapter(model, seed).save(f"{name}.safetensors")
        self.keep_given()

    def act(self):
        if not Path("merged").exists():
            command("merge base a.safetensors b.safetensors=0.5 -o merged")

    def check(self):
        super().check()
        folder = self.folder / "merged"
        names = {name for name in self.expected if name.startswith("merged/")}
        assert not folder.exists() or {f"merged/{path.name}" for path in folder.iterdir()} == names, "half a folder"


class Train(Scene):
    """Transformers' Trainer with checkpoints, from which it resumes; and `shira train`, which begins again.

    The times in the Trainer's own files differ from run to run, so of a checkpoint the adapter and the masters are compared.
    """

    OURS = re.compile(r"run/checkpoint-\d+/(adapter|model)\.safetensors|final\.safetensors|poet\.(safetensors|yaml|md)")
    TIMES = re.compile(rb'"(seconds|tokens_per_second)": [0-9.e+-]+')

    def __init__(self, folder):
        super().__init__(folder)
        tiny_llama().save_pretrained("model")
        letter_tokenizer().save_pretrained("model")
        rows = [{"prompt": f"{a}+{b}=", "choices": ["x", "y"], "label": (a + b) % 2} for a in range(4) for b in range(4)]
        Path("sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
        self.keep_given()

    def act(self):
        if not Path("final.safetensors").exists():
            model = llama()
            with snip(model) as tuner:
                trainer = trainer_of(model, "run", [ShiraCallback(tuner)])
                found = transformers.trainer_utils.get_last_checkpoint("run") if Path("run").exists() else None
                trainer.train(resume_from_checkpoint=found)
                tuner.adapter("final").save("final.safetensors")
        if not Path("poet.md").exists():
            line = "train model --data sums.jsonl --steps 3 --batch-size 4 --targets all-linear --density 0.05"
            force = "--force" if Path("poet.safetensors").exists() else ""
            command(f"{line} -o poet.safetensors {force}")

    def _found(self):
        found = {name: content for name, content in crash.tree(self.folder).items() if self.OURS.fullmatch(name)}
        return {name: comparable(self.folder / name, content) for name, content in found.items()}

    def learn(self):
        self.expected = self._found()
        assert {"final.safetensors", "run/checkpoint-8/model.safetensors", "poet.md"} <= self.expected.keys()

    def check(self):
        for name, content in self._found().items():
            assert content == self.expected[name], f"half a file, or another: {name}"

    def check_end(self):
        assert self._found() == self.expected, "another end"


def comparable(path, content):
    """The bytes of a file; of an adapter all but its metadata, which tell how long a run took; of a card its last line."""
    if path.name == "model.safetensors" or path.suffix == ".yaml":
        return content
    if path.suffix == ".md":
        return content.rstrip().splitlines()[-1:]
    adapter = shira.load(path)
    return {name: (t.shape, t.kind, t.indices.tolist(), t.values.tolist()) for name, t in adapter.tensors.items()}


def killed(scene):
    """(folder, kills, draw) -> counts, of a scene that is one act."""
    return lambda folder, kills, draw: crash.scene(scene(folder), kills, folder, draw)


class Serve:
    """A server that takes up the files of a writer, and a client. Each second time the writer is killed, else the server."""

    def __init__(self, folder, draw):
        self.folder, self.draw, self.log = folder / "work", draw, folder / "log"
        tiny_llama().save_pretrained(folder / "model")
        letter_tokenizer().save_pretrained(folder / "model")
        self.model = folder / "model"
        self._adapters = [random_adapter(tiny_llama(), seed) for seed in range(2)]
        self.bytes = []
        for adapter in self._adapters:
            adapter.save(self.folder / "a.safetensors")
            self.bytes.append((self.folder / "a.safetensors").read_bytes())

    def serve(self):
        """Begin a server. Returns its process; `self.url` is where it is."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        line = f"serve {self.model} --adapters {self.folder} --engine transformers --port {port} --scan 0.05 --max-tokens 8"
        return crash.begin(lambda: command(line), self.log)

    def write(self):
        """Save one version after the other, for ever."""
        number = 0
        while True:
            self._adapters[number % 2].save(self.folder / "a.safetensors")
            number += 1
            time.sleep(0.15)  # a file that has just been written is not taken up for 0.05 s

    def ask(self, method, path, body=None):
        """(status, JSON) of a request; (0, None) if nobody answers."""
        request = urllib.request.Request(
            f"{self.url}{path}", None if body is None else json.dumps(body).encode(), method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, None
        except (OSError, ValueError):
            return 0, None

    def ready(self, server):
        until = time.monotonic() + crash.SECONDS
        while self.ask("GET", "/ready")[0] != 200:
            assert time.monotonic() < until and crash.ended(server, 0) is None, f"no server: {self.log.read_text()[-2000:]}"
            time.sleep(0.02)

    def answer(self):
        """What is answered with the file that is there, once the server has taken it up."""
        for _ in range(200):
            self.ask("POST", "/v1/adapters", {"name": "a"})
            status, found = self.ask("POST", "/v1/completions", PROMPT)
            if status == 200:
                return found["choices"][0]["text"]
            time.sleep(0.02)
        raise AssertionError(f"the server no longer answers: {status}, {self.log.read_text()[-2000:]}")

    def settled(self):
        """The answer must be that of the file in place, which is one of the two, to the bit."""
        content = (self.folder / "a.safetensors").read_bytes()
        assert content in self.bytes, f"half a file, {len(content)} bytes"
        until = time.monotonic() + 10  # the server looks at the folder every 0.05 s
        while (found := self.answer()) != self.texts[self.bytes.index(content)]:
            assert time.monotonic() < until, f"answers {found!r} with the file of {self.texts[self.bytes.index(content)]!r}"

    def learn(self):
        """What is answered with each version."""
        began, server = time.monotonic(), self.serve()
        try:
            self.ready(server)
            self.seconds = time.monotonic() - began
            self.texts = []
            for content in self.bytes:
                (self.folder / "a.safetensors").write_bytes(content)
                time.sleep(0.3)
                self.texts.append(self.answer())
        finally:
            crash.kill(server)
        assert self.texts[0] != self.texts[1], "both versions give one answer: this tests nothing"

    def once(self, number, counts):
        (self.folder / "a.safetensors").write_bytes(self.bytes[0])
        running = {"server": self.serve(), "writer": crash.begin(self.write, self.log.with_name("writer"))}
        victim = "server" if number % 2 else "writer"
        try:
            early = victim == "server" and self.draw.random() < 0.3  # while it starts
            if not early:
                self.ready(running["server"])
            until = time.monotonic() + self.draw.uniform(0, self.seconds if early else 0.5)
            while time.monotonic() < until:
                counts[f"asked, {self.step()}"] += 1
            crash.kill(running.pop(victim))
            counts[f"{victim} killed{', while it started' if early else ''}"] += 1
            if victim == "server":
                crash.kill(running.pop("writer"))
                running["server"] = self.serve()
                self.ready(running["server"])
            self.settled()
        finally:
            for process in running.values():
                crash.kill(process)
        self._adapters[0].save(self.folder / "a.safetensors")
        assert not crash.leftovers(self.folder), "left behind"
        counts["ended right"] += 1

    def step(self):
        """One request of a client; returns a word. An answer is one of the two."""
        kind = self.draw.choice(["load", "unload", "ask", "ask"])
        if kind == "ask":
            status, found = self.ask("POST", "/v1/completions", PROMPT)
            assert status != 200 or found["choices"][0]["text"] in self.texts, f"of neither version: {found}"
        elif kind == "load":
            status, _ = self.ask("POST", "/v1/adapters", {"name": "a"})
        else:
            status, _ = self.ask("DELETE", "/v1/adapters/a")
        assert status < 500, f"{kind}: {status}"
        if not status:
            time.sleep(0.01)
        return "answered" if status == 200 else "refused" if status else "nobody there"


def serve(folder, kills, draw):
    import collections

    counts, made = collections.Counter(), Serve(folder, draw)
    made.learn()
    for number in range(kills):
        made.once(number, counts)
    return counts


SCENES = {name.__name__.lower(): killed(name) for name in (Save, Train, Convert, Merge)} | {"serve": serve}
