"""The served folder: names of the base that would hide adapters, two of one name, links that lead to nothing."""

import pytest

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
