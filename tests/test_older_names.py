"""Scripts that import modules by the names of before still run."""

import dbdist.compat
import dbdist.export

from dbdist.commands import export
from dbdist.inference import published


def test_a_moved_module_is_the_same_under_its_old_name():
    assert dbdist.export.run is export.run
    assert dbdist.compat.load_published_vit is published.load_published_vit
