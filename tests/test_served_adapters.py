"""The served folder and what is in memory of it: names, versions, and that no selection gets another's values."""

import json
import os
import shutil
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shira
from conftest import all_bits, mlp, random_adapter, same_bits
from shira import ShiraError, Switcher, SwitchError
from shira.serving import catalogue as module
from shira.serving.catalogue import Catalogue
from shira.serving.resident import Resident
from shira.serving.selections import AdapterReplaced, Part, SelectionError, ServedSelection, UnknownAdapter, of_key, parse

pytestmark = pytest.mark.usefixtures("settled")

VERSIONS = {"poet": "1a", "coder": "2b", "x.y-z": "3c"}


@pytest.fixture
def served(tmp_path):
    model = mlp()
    folder = tmp_path / "adapters"
    folder.mkdir()
    for seed, name in enumerate(["coder", "poet"], start=1):
        random_adapter(model, seed).save(folder / f"{name}.safetensors")
    catalogue = Catalogue(folder, ["base"])
    catalogue.scan()
    return model, folder, catalogue


def expected_bits(folder, strengths):
    model = mlp()
    switcher = Switcher(model)
    for name in strengths:
        switcher.add(name, folder / f"{name}.safetensors")
    switcher.use(strengths or None)
    return all_bits(model)


def test_a_selection_is_parsed_into_the_order_of_names():
    both = ServedSelection((Part("coder", "2b", 0.5), Part("poet", "1a", 1.0)))
    assert parse("poet:1.0+coder:0.5", VERSIONS) == parse("coder:.5 + poet", VERSIONS) == both
    assert str(both) == "coder:0.5+poet"
    assert str(parse("poet:0.123456789", VERSIONS)) == "poet:0.123456789" and str(parse("poet:3.0", VERSIONS)) == "poet:3"
    assert both.key == '[["coder","2b",0.5],["poet","1a",1.0]]'
    assert of_key(both.key) == both
    assert of_key("") == ServedSelection() and ServedSelection().key == "" and str(ServedSelection()) == "base"
    assert parse("poet:0+coder", VERSIONS) == ServedSelection((Part("coder", "2b"),))
    assert parse("poet:0", VERSIONS) == ServedSelection()
    assert parse("x.y-z:-1e-3", VERSIONS).parts[0].strength == -1e-3


@pytest.mark.parametrize("text", ["poets", "poet+painter", "base", "poet;coder", "../poet"])
def test_an_unknown_name_is_told(text):
    with pytest.raises(UnknownAdapter, match="no adapter .* is served; "):
        parse(text, VERSIONS)


def test_the_base_is_named_first_where_a_name_is_wrong():
    for text, known in (
        ("qqq", "known: 'SmolLM', 'coder', "),
        ("smollm", "did you mean 'SmolLM'"),
        ("qqq+poet", "known: 'coder', "),
    ):
        with pytest.raises(UnknownAdapter, match=f"is served; {known}"):
            parse(text, dict(sorted(VERSIONS.items())), base=["SmolLM"])


@pytest.mark.parametrize(
    "text", ["", " ", None, 3, "poet:", "poet:x", "poet:nan", "poet:inf", "poet+poet:2", "poet:1:2", "+".join(["poet"] * 17)]
)
def test_a_text_that_is_no_selection_is_refused(text):
    with pytest.raises(SelectionError):
        parse(text, VERSIONS)


@given(st.text(max_size=30))
def test_any_text_is_a_selection_or_an_error(text):
    try:
        selection = parse(text, VERSIONS)
    except SelectionError as error:
        assert str(error).isprintable()
    else:
        assert of_key(selection.key) == selection


@given(st.text(max_size=40) | st.sampled_from(['[["a","b"]]', '[["a",1,1]]', '[["../a","b",1]]', '[["","b",1]]', "[1]", "{}"]))
def test_a_text_that_is_no_key_is_refused(text):
    try:
        assert isinstance(of_key(text), ServedSelection)
    except SelectionError as error:
        assert "is no key of a selection" in str(error)


def test_the_folder_is_listed_and_followed(served):
    model, folder, catalogue = served
    assert list(catalogue.versions) == ["coder", "poet"]
    before = catalogue.resolve("poet")
    random_adapter(model, 7).save(folder / "poet.safetensors")
    random_adapter(model, 8).save(folder / "new.safetensors")
    (folder / "coder.safetensors").unlink()
    (folder / ".hidden.safetensors").write_bytes(b"")
    (folder / "notes.txt").write_text("no adapter")
    catalogue.scan()
    assert list(catalogue.versions) == ["new", "poet"]
    assert catalogue.resolve("poet") != before
    assert catalogue.resolve("base") == ServedSelection()
    assert [row["status"] for row in catalogue.listed()] == ["served", "served"]
    with pytest.raises(UnknownAdapter):
        catalogue.resolve("coder")


def test_a_folder_that_training_wrote_is_an_adapter(served):
    model, folder, catalogue = served
    (folder / "trained").mkdir()
    catalogue.scan()
    assert "trained" not in {row["name"] for row in catalogue.listed()}  # there is nothing in it
    random_adapter(model, 3).save(folder / "trained" / "adapter.safetensors")
    catalogue.scan()
    first = catalogue.resolve("trained")
    Resident(model, folder).prefetch(first.key)
    random_adapter(model, 4).save(folder / "trained" / "adapter.safetensors")
    catalogue.scan()
    assert catalogue.resolve("trained") != first


def test_what_cannot_be_served_is_listed_with_the_reason(served):
    model, folder, catalogue = served
    (folder / "broken.safetensors").write_bytes(b"\x08" + bytes(20))
    (folder / "a+b.safetensors").write_bytes(b"")
    (folder / "out.safetensors").symlink_to("/etc/passwd")
    shutil.copy(folder / "poet.safetensors", folder / "base.safetensors")
    catalogue.scan()
    assert list(catalogue.versions) == ["coder", "poet"]
    errors = {row["name"]: row["error"] for row in catalogue.listed() if row["status"] == "error"}
    assert errors.keys() == {"broken", "a+b", "out", "base"}
    assert "leads out of the served folder" in errors["out"] and "name of the base" in errors["base"]
    with pytest.raises(UnknownAdapter):
        catalogue.resolve("broken")
    shutil.copy(folder / "poet.safetensors", folder / "broken.safetensors")  # mended
    catalogue.scan()
    assert "broken" in catalogue.versions


def test_strange_files_neither_stop_a_scan_nor_lead_out(served, tmp_path_factory):
    model, folder, catalogue = served
    outside = tmp_path_factory.mktemp("outside") / "adapter.safetensors"
    shutil.copy(folder / "poet.safetensors", outside)
    for name in ("linked", "stored.safetensors"):
        (folder / name).mkdir()
    (folder / "linked" / "adapter.safetensors").symlink_to(outside)  # a folder of the server, whose file is not
    shutil.copy(outside, folder / "stored.safetensors" / "adapter.safetensors")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    shutil.copy(outside, os.fsencode(folder) + b"/\xff.safetensors")  # no name that an answer could hold
    os.mkfifo(folder / "pipe.safetensors")
    catalogue.scan()
    assert list(catalogue.versions) == ["coder", "poet", "stored.safetensors"]
    errors = {row["name"]: row["error"] for row in catalogue.listed() if row["status"] == "error"}
    assert errors.keys() == {"linked", "loop", "\\udcff", "pipe"}
    assert "leads out" in errors["linked"] and "FIFO" in errors["pipe"] and "symbolic" in errors["loop"]
    json.dumps(catalogue.listed(), ensure_ascii=False).encode()
    assert str(folder) not in json.dumps(catalogue.listed())
    with pytest.raises(SelectionError, match="leads out"):
        catalogue.load("linked")
    for name in ("y" * 300, "\ud800", "a\u202eb"):
        with pytest.raises(SelectionError):
            catalogue.load(name)


def test_a_removed_folder_is_not_looked_for_on_the_hub(served, monkeypatch):
    model, folder, _ = served
    monkeypatch.chdir(folder.parent)
    (folder / "trained").mkdir()
    random_adapter(model, 3).save(folder / "trained" / "adapter.safetensors")
    catalogue, resident = Catalogue(folder.name, ["base"]), Resident(model, folder.name, ready=2)
    catalogue.scan()
    key = catalogue.resolve("trained").key
    for name in ("trained", "poet", "coder"):  # so that the first is known, and is not ready any more
        resident.use(catalogue.resolve(name).key)
    shutil.rmtree(folder / "trained")  # "adapters/trained" could be a name of the hub
    with pytest.raises(AdapterReplaced):
        resident.use(key)


def test_a_clock_that_was_set_back(served, monkeypatch):
    model, folder, catalogue = served
    monkeypatch.setattr(module, "SETTLED", 0.05)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    random_adapter(model, 7).save(folder / "new.safetensors")
    catalogue.scan()
    assert "new" in catalogue.versions


def test_a_file_that_is_written_again_and_again_does_not_hold_up_a_load(served, monkeypatch):
    model, folder, catalogue = served
    monkeypatch.setattr(module, "TRIES", 3)
    monkeypatch.setattr(module, "SETTLED", 60.0)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    random_adapter(model, 7).save(folder / "new.safetensors")
    with pytest.raises(AdapterReplaced, match="being written"):
        catalogue.load("new")


def test_a_file_that_is_being_written_waits(served, monkeypatch):
    model, folder, catalogue = served
    monkeypatch.setattr(module, "SETTLED", 60.0)
    before = dict(catalogue.versions)
    random_adapter(model, 7).save(folder / "new.safetensors")
    random_adapter(model, 7).save(folder / "poet.safetensors")
    catalogue.scan()
    assert catalogue.versions == before
    monkeypatch.setattr(module, "SETTLED", 0.0)
    time.sleep(0.01)
    catalogue.scan()
    assert catalogue.versions["poet"] != before["poet"] and "new" in catalogue.versions


def test_loading_and_unloading(served):
    model, folder, catalogue = served
    catalogue.unload("poet")
    catalogue.scan()
    assert list(catalogue.versions) == ["coder"]
    assert {row["name"]: row["status"] for row in catalogue.listed()} == {"coder": "served", "poet": "unloaded"}
    assert catalogue.load("poet") == catalogue.versions["poet"]
    random_adapter(model, 9).save(folder / "fresh.safetensors")
    catalogue.load("fresh")
    assert "fresh" in catalogue.versions
    for name in ("../poet", "a/b", "", ".", "..", "/etc/passwd", "poet\0"):
        with pytest.raises(SelectionError):
            catalogue.load(name)
    with pytest.raises(UnknownAdapter):
        catalogue.load("absent")
    with pytest.raises(UnknownAdapter):
        catalogue.unload("absent")
    (folder / "fresh.safetensors").write_bytes(b"no adapter")
    with pytest.raises(SelectionError, match="fresh"):
        catalogue.load("fresh")
    assert catalogue.inspect("poet")["nnz"] > 0
    with pytest.raises(UnknownAdapter):
        catalogue.inspect("absent")


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SelectionError, match="there is no folder"):
        Catalogue(tmp_path / "absent", ["base"])
    (tmp_path / "poet.safetensors").touch()
    with pytest.raises(SelectionError, match="poet.safetensors is a file; give the folder of the adapters: "):
        Catalogue(tmp_path / "poet.safetensors", ["base"])


def test_selections_in_the_weights_are_exact(served):
    model, folder, catalogue = served
    base = all_bits(model)
    resident = Resident(model, folder, ready=2)
    wanted = [{"poet": 1.0}, {}, {"coder": 0.5, "poet": 1.0}, {"coder": 1.0}, {"poet": 1.0}, {"poet": -0.5}]
    for strengths in wanted:
        key = catalogue.resolve("+".join(f"{name}:{value}" for name, value in strengths.items()) or "base").key
        assert resident.use(key)
        assert not resident.use(key)
        assert same_bits(all_bits(model), expected_bits(folder, strengths))
    tiers = resident.tiers()
    assert tiers["weights"] == key and len(tiers["ready"]) == 2 and tiers["ready"][-1] == key
    assert tiers["switches"] == len(wanted) and tiers["misses"] == 5 and tiers["hits"] == 0
    resident.use("")
    assert same_bits(all_bits(model), base)


def test_a_request_never_gets_a_newer_version(served):
    model, folder, catalogue = served
    base = all_bits(model)
    old = catalogue.resolve("poet").key
    resident = Resident(model, folder, ready=3)
    resident.prefetch(old)
    before = expected_bits(folder, {"poet": 1.0})
    random_adapter(model, 7).save(folder / "poet.safetensors")
    catalogue.scan()
    new = catalogue.resolve("poet").key
    for key, bits in ((old, before), (new, expected_bits(folder, {"poet": 1.0})), (old, before)):
        resident.use(key)
        assert same_bits(all_bits(model), bits)
    for strength in (2, 3, 4):  # these take the room of the old version
        resident.use(catalogue.resolve(f"poet:{strength}").key)
    with pytest.raises(AdapterReplaced, match="'poet' was replaced"):
        resident.use(old)
    assert same_bits(all_bits(model), base) and resident.tiers()["weights"] == ""
    resident.use(new)
    (folder / "poet.safetensors").unlink()
    (folder / "coder.safetensors").unlink()
    with pytest.raises(AdapterReplaced, match="removed"):
        resident.use(catalogue.resolve("coder").key)
    assert same_bits(all_bits(model), base)


def test_an_error_of_a_file_leaves_the_base(served):
    model, folder, catalogue = served
    base = all_bits(model)
    resident = Resident(model, folder)
    resident.use(catalogue.resolve("poet").key)
    content = bytearray((folder / "coder.safetensors").read_bytes())
    random_adapter(torch.nn.Sequential(torch.nn.Linear(3, 3)), 1).save(folder / "other.safetensors")
    content[-40:] = os.urandom(40)
    (folder / "coder.safetensors").write_bytes(content)
    catalogue.scan()
    for name in ("other", "coder"):
        with pytest.raises(ShiraError):
            resident.prefetch(catalogue.resolve(name).key)
        resident.use(catalogue.resolve("poet").key)
        with pytest.raises(ShiraError):
            resident.use(catalogue.resolve(name).key)
        assert same_bits(all_bits(model), base)


def test_pinned_selections_stay_ready(served):
    model, folder, catalogue = served
    resident = Resident(model, folder, ready=2)
    pinned = catalogue.resolve("poet").key
    resident.pin(pinned)
    for strength in (2, 3, 4):
        resident.use(catalogue.resolve(f"coder:{strength}").key)
    assert pinned in resident.tiers()["ready"] and resident.tiers()["pinned"] == [pinned]
    with pytest.raises(SwitchError, match="at most 1 of them can be pinned"):
        resident.pin(catalogue.resolve("coder").key)
    resident.pin(pinned, False)
    for strength in (2, 3):
        resident.use(catalogue.resolve(f"coder:{strength}").key)
    assert pinned not in resident.tiers()["ready"] and not resident.tiers()["pinned"]


def test_the_versions_that_are_known_are_bounded(served, monkeypatch):
    model, folder, catalogue = served
    monkeypatch.setattr("shira.serving.resident.MOST_KNOWN", 3)
    resident = Resident(model, folder, ready=2)
    for seed in range(6):
        random_adapter(mlp(), seed).save(folder / "poet.safetensors")
        catalogue.scan()
        resident.use(catalogue.resolve("poet").key)
    assert len(resident._known) == 3


def test_prefetch_beside_switches(served):
    """One thread makes selections ready while another switches: every switch is exact."""
    model, folder, catalogue = served
    texts = ["poet", "coder", "poet:0.5+coder", "base", "poet:2"]
    expected = {
        text: expected_bits(folder, {part.name: part.strength for part in catalogue.resolve(text).parts}) for text in texts
    }
    resident = Resident(model, folder, ready=2)
    stop = threading.Event()
    failed = []

    def prefetch():
        while not stop.is_set():
            for text in texts:
                try:
                    resident.prefetch(catalogue.resolve(text).key)
                except BaseException as error:
                    failed.append(error)
                    return

    thread = threading.Thread(target=prefetch)
    thread.start()
    try:
        for _ in range(30):
            for text in texts:
                resident.use(catalogue.resolve(text).key)
                assert same_bits(all_bits(model), expected[text])
    finally:
        stop.set()
        thread.join()
    assert not failed


def test_pin_and_ready_of_a_switcher():
    model = mlp()
    switcher = shira.Switcher(model, ready=2)
    for seed in range(4):
        switcher.add(str(seed), random_adapter(model, seed))
    switcher.pin({"0": 0.5})
    for seed in range(1, 4):
        switcher.use(str(seed))
    assert switcher.ready == [{"0": 0.5}, {"3": 1.0}]
    with pytest.raises(SwitchError, match="can be pinned"):
        switcher.pin("3")
    switcher.use(None)
    switcher.remove("0")
    switcher.pin("3")
    assert {"3": 1.0} in switcher.ready
    switcher.unpin("3")
    switcher.pin(None)  # the base needs no room
