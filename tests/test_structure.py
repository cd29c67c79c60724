"""The package is built as docs/architecture.md says; and the checks find what breaks each rule."""

import pytest

from tests import structure
from tests.structure import PACKAGE, PAGE

LONG_FUNCTIONS: dict[str, int] = {}
CIRCLES: list[set[str]] = []
PLAIN_MODEL = ["core/data", "core/train", "core/formats"]  # what the model must not import
FLOORS = ["cli", "train", "model", "ground"]


@pytest.fixture(scope="module")
def page():
    return PAGE.read_text(encoding="utf-8")


def test_no_import_leads_to_a_floor_above(page):
    assert structure.upward_imports(PACKAGE, structure.floors(page)) == []


def test_every_package_has_a_floor(page):
    packages = {name.removeprefix("core/").split("/")[0] for name in structure.real_folders(PACKAGE)} - {"", "core"}
    assert packages <= set(structure.floors(page))


def test_imports_form_no_circle():
    assert [names for names in structure.circles(PACKAGE) if not any(names <= old for old in CIRCLES)] == []


def test_the_model_imports_neither_data_nor_training_nor_formats():
    assert structure.imports_between(PACKAGE, "core/model", PLAIN_MODEL) == []


def test_only_the_command_line_and_the_server_print():
    assert structure.prints(PACKAGE) == []


def test_every_module_begins_with_its_purpose():
    assert structure.without_purpose(PACKAGE) == []


def test_no_function_is_longer_than_sixty_lines():
    assert structure.long_functions(PACKAGE, LONG_FUNCTIONS) == []


def test_the_page_draws_the_tree_as_it_is(page):
    """`python -m tests.structure` brings the page up to date."""
    assert structure.tree_differences(PACKAGE, page) == []


# --- the checks find what breaks a rule -------------------------------------------------------------------------------


@pytest.fixture
def tiny_package(tmp_path):
    """`tiny_package({"core/train/run.py": "…"})` is the folder of a package of these files."""

    def write(files):
        for name, text in files.items():
            path = tmp_path / "toy" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "toy"

    return write


@pytest.mark.parametrize(
    "line",
    [
        "from toy.core.train import run",
        "from toy.core.train.run import train",
        "import toy.core.train.run",
        "def later():\n    from toy.core.train.run import train",
        "if TYPE_CHECKING:\n    from toy.core.train.run import Run",
    ],
)
def test_an_import_that_leads_up_is_reported(tiny_package, line):
    package = tiny_package({"core/train/run.py": "", "core/model/vlm.py": line, "core/device.py": line})
    complaints = structure.upward_imports(package, FLOORS)
    line_number = line.count("\n") + 1
    assert complaints == [
        f"toy/core/device.py:{line_number}: ground is below train: core/device must not import core/train/run",
        f"toy/core/model/vlm.py:{line_number}: model is below train: core/model/vlm must not import core/train/run",
    ]


def test_an_import_that_leads_down_or_stays_or_asks_for_the_version_is_right(tiny_package):
    package = tiny_package({
        "__init__.py": "__version__ = '1'",
        "cli/app.py": "from toy import __version__\nfrom toy.core.train.run import train",
        "core/train/run.py": "import torch\nfrom toy.core.train.step import step\nfrom toy.core.model import vlm",
        "core/train/step.py": "import toy",
        "core/model/vlm.py": "from toy.core.device import pick",
        "core/device.py": "from toy import __version__",
    })  # fmt: skip
    assert structure.upward_imports(package, FLOORS) == []
    assert structure.circles(package) == []


def test_a_circle_is_reported_though_one_import_is_inside_a_function(tiny_package):
    package = tiny_package({
        "a.py": "from toy.b import b",
        "b.py": "from toy import c",
        "c.py": "def late():\n    import toy.a",
        "d.py": "import toy.a",
    })  # fmt: skip
    assert structure.circles(package) == [{"a", "b", "c"}]


def test_what_the_model_imports_from_above_is_reported(tiny_package):
    package = tiny_package({
        "core/model/vlm.py": "def f():\n    from toy.core.data.batch import Batch",
        "core/data/batch.py": "from toy.core.model.vlm import f",
    })  # fmt: skip
    assert structure.imports_between(package, "core/model", PLAIN_MODEL) == [
        "toy/core/model/vlm.py:2: core/model/vlm must not import core/data/batch"
    ]


def test_a_print_is_reported_outside_the_command_line(tiny_package):
    package = tiny_package({"cli/app.py": "print(1)", "core/serve/api.py": "print(1)", "core/model/vlm.py": "print(1)"})
    assert structure.prints(package) == ["toy/core/model/vlm.py:1: only cli and serve print"]


def test_a_module_without_a_purpose_is_reported(tiny_package):
    package = tiny_package({"__init__.py": "", "a.py": "x = 1", "b.py": '"""What b is."""'})
    assert structure.without_purpose(package) == ["toy/a.py:1: the first line must say what the module is"]


def test_a_long_function_is_reported_unless_it_is_allowed(tiny_package):
    function = "\n".join(["def long():", *["    pass"] * 60, "def short():", *["    pass"] * 59])
    package = tiny_package({"a.py": function})
    assert structure.long_functions(package, {}) == ["toy/a.py:1: long has 61 lines, more than 60"]
    assert structure.long_functions(package, {"a:long": 61}) == []


TREE = """
```tree
toy/
    a (why it is there) · b
  core/         what is below
      errors ·
      files
    old/
      gone
```
```floors
cli          the command line
train
```
"""


def test_a_tree_that_differs_is_reported_and_redrawn(tiny_package):
    package = tiny_package({
        "__init__.py": "", "a.py": "1", "b.py": "1", "core/errors.py": "1", "core/new/__init__.py": "1",
        "core/new/thing.py": "1",
    })  # fmt: skip
    differences = structure.tree_differences(package, TREE)
    assert [line.split()[0] for line in differences] == [
        "core/new/", "core/new/__init__", "core/new/thing", "core/files", "core/old/", "core/old/gone",
    ]  # fmt: skip
    page = structure.redrawn(package, TREE)
    assert structure.tree_differences(package, page) == []
    assert "    a (why it is there) · b\n  core/         what is below\n      errors\n    new/\n" in page
    assert structure.floors(page) == ["cli", "train"]
