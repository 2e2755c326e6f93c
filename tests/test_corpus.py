"""What `make fuzz` found, and a case of each kind of outcome, again; and that the fuzzer would see a fault."""

import random
import re

import pytest
import torch

import fuzz
import fuzz_files
import fuzz_kernels
from shira.files import encoding
from shira.kernels.cpu import native

pytestmark = pytest.mark.skipif(not native.available(), reason="the kernels in C were not built")


@pytest.fixture
def module(request):
    if request.param == "server":
        pytest.importorskip("fastapi")
    threads = torch.get_num_threads()
    yield fuzz.module_of(request.param)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("module", fuzz.PARTS, indirect=True)
def test_the_corpus_again(module):
    cases = fuzz.stored(module)
    assert len(cases) > 20
    try:
        outcomes = {getattr(module, "answered", module.run)(case) for case in cases.values()}
    finally:
        fuzz.closed(module)  # the server must then answer as before, and the base be back
    assert len(outcomes) > 20
    for content in map(module.dump, cases.values()):
        assert module.dump(module.load(content)) == content


def test_a_reader_that_is_wrong_by_one_position_is_found(monkeypatch):
    real = encoding.decode
    monkeypatch.setattr(encoding, "decode", lambda *given: real(*given) + 1)
    with pytest.raises(AssertionError, match="other than docs/format.md says|and refused"):
        fuzz_files.run(fuzz_files.seeds()["delta torch.float32"])


def test_a_file_that_is_read_against_the_rules_is_found(monkeypatch):
    """A rule with a wrong checksum."""
    case = dict(fuzz_files.seeds()["rand"])
    metadata, arrays = fuzz_files.opened(case[fuzz_files.ADAPTER])
    metadata["tensors"] = re.sub('"crc32": [0-9]+', '"crc32": 5', metadata["tensors"])
    case[fuzz_files.ADAPTER] = fuzz_files.closed(metadata, arrays)
    assert fuzz_files.run(case).startswith("refused")
    monkeypatch.setattr(encoding, "checksum", lambda indices: 5)
    with pytest.raises(AssertionError, match="docs/format.md forbids it, and it was read"):
        fuzz_files.run(case)


def test_a_kernel_that_leaves_out_an_entry_is_found(monkeypatch):
    real = native.swap_

    def swap_(plan):
        real(plan)
        write = plan.writes[0]
        if write.indices.numel():
            write.weight.view(-1)[int(write.indices[-1])] = plan.stash[0][-1]

    draw = random.Random(0)
    write = fuzz_kernels.a_write(draw) | {"shape": [64, 33], "layout": "plain", "odd": None, "density": 0.3, "surplus": 0}
    write |= {"dtype": "float32", "values": "float32", "stepped": False}
    case = {"kind": "plan", "seed": 0, "threads": 2, "plain": False, "writes": [write], "shared": False, "steps": ["swap a"]}
    assert fuzz_kernels.run(case) == "plan swap a"
    monkeypatch.setattr(native, "swap_", swap_)
    with pytest.raises(AssertionError, match="step 0, swap a: other bits than the reference"):
        fuzz_kernels.run(case)
