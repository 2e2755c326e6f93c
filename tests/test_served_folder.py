"""The served folder: names of the base that would hide adapters, two of one name, links that lead to nothing."""

import logging
import shutil

import pytest

from conftest import mlp, random_adapter
from serving_site import until
from shira.serving.catalogue import Catalogue
from shira.serving.selections import SelectionError, ServedSelection

pytestmark = pytest.mark.usefixtures("settled")


@pytest.mark.parametrize("name", ["b+c", "b + c", "b:1", "b:0.5+c:-1e3", "", " "])
def test_a_name_of_the_base_that_would_hide_a_selection_is_refused(tmp_path, name):
    with pytest.raises(SelectionError, match="cannot be a name of the base model: .*--served-model-name"):
        Catalogue(tmp_path, ["base", name])


def test_other_names_of_the_base_may_have_these_signs(tmp_path):
    for name in ("llama3:8b", "org/model:1", "c++", "a+b/c", "poet"):
        assert Catalogue(tmp_path, [name]).resolve(name) == ServedSelection()


@pytest.fixture
def catalogue(tmp_path):
    """Of a folder with poet/, in which an adapter is."""
    (tmp_path / "poet").mkdir()
    random_adapter(mlp(), 1).save(tmp_path / "poet" / "adapter.safetensors")
    made = Catalogue(tmp_path, ["base"])
    made.scan()
    return made


def errors(catalogue):
    return {row["name"]: row["error"] for row in catalogue.listed() if row["status"] == "error"}


def test_a_file_and_a_folder_of_one_name_are_told(catalogue):
    file = catalogue.folder / "poet.safetensors"
    random_adapter(mlp(), 2).save(file)
    before = catalogue.versions["poet"]
    catalogue.scan()
    assert catalogue.versions.keys() == {"poet"} and catalogue.versions["poet"] != before  # the file goes first
    assert errors(catalogue) == {"poet/": "poet.safetensors has the same name and goes first; rename one of them"}
    assert [row["file"] for row in catalogue.listed()] == ["poet.safetensors", "poet"]
    for name in ("poet/", "poet/adapter"):
        with pytest.raises(SelectionError):
            catalogue.load(name)
    file.unlink()
    catalogue.scan()
    assert not errors(catalogue) and catalogue.versions["poet"] == before


def test_a_file_and_a_folder_of_one_name_are_told_once_in_the_log(site, caplog):
    async def work(client):
        (site.folder / "poet").mkdir()
        await until(lambda: "adapter poet/ is not served: poet.safetensors has the same name" in caplog.text)
        assert (await client.get("/v1/models/poet")).status_code == 200
        shutil.rmtree(site.folder / "poet")
        await until(lambda: not site.catalogue.refused)
        assert caplog.text.count("has the same name") == 1

    caplog.set_level(logging.INFO)
    site.run(work)


def test_a_folder_with_the_ending_of_a_file_does_not_hide_another(catalogue):
    before = dict(catalogue.versions)
    (catalogue.folder / "poet.safetensors").mkdir()
    catalogue.scan()
    assert catalogue.versions == before and catalogue.load("poet") == before["poet"]
    shutil.copy(catalogue.folder / "poet" / "adapter.safetensors", catalogue.folder / "poet.safetensors" / "x.safetensors")
    catalogue.scan()
    assert catalogue.versions.keys() == {"poet", "poet.safetensors"} and catalogue.versions["poet"] == before["poet"]
    assert not errors(catalogue)


def test_a_link_that_leads_to_nothing_is_listed(catalogue):
    folder = catalogue.folder
    (folder / "gone.safetensors").symlink_to(folder / "absent.safetensors")
    (folder / "poet" / "more.safetensors").symlink_to(folder / "absent.safetensors")
    catalogue.scan()
    nothing = "{}.safetensors is a link that leads to nothing"
    assert errors(catalogue) == {"gone": nothing.format("gone"), "poet": nothing.format("more")} and not catalogue.versions
    with pytest.raises(SelectionError, match="leads to nothing"):
        catalogue.load("gone")
    shutil.copy(folder / "poet" / "adapter.safetensors", folder / "absent.safetensors")
    (folder / "poet" / "more.safetensors").unlink()
    catalogue.scan()
    assert catalogue.versions.keys() == {"absent", "gone", "poet"}
