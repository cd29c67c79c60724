"""The names in the code use the words of docs/glossary.md; and the check finds those that do not."""

import ast
import re
from collections import Counter

import pytest

from tests.glossary import PAGE, forbidden_words, misnamed, package_of
from tests.structure import PACKAGE, modules

# Names that still use a forbidden word, by package. Each number may only fall.
BUDGET = {"train": 1}


@pytest.fixture(scope="module")
def complaints():
    """Each package's complaints about its names."""
    by_package = {}
    for module, complaint in misnamed(PACKAGE, forbidden_words(PAGE.read_text(encoding="utf-8"))):
        by_package.setdefault(package_of(module), []).append(complaint)
    return by_package


def test_no_package_uses_more_forbidden_names_than_its_budget(complaints):
    """`python -m tests.glossary` lists all of them."""
    above = {name: lines for name, lines in complaints.items() if len(lines) > BUDGET.get(name, 0)}
    assert above == {}


def texts(tree):
    """The constant texts of several words in a module, docstrings left out."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    docs = {id(node.body[0].value) for node in ast.walk(tree)
            if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)}  # fmt: skip
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and " " in node.value
            and id(node) not in docs
        ):
            yield node.value


def test_messages_say_image_and_not_picture():
    """A name of a field or of a style is no message, and the demo's model was trained on two such questions."""
    others = {"Describe the picture.", "What is in the picture?", '<div class="pictures">'}
    messages = {text for module in modules(PACKAGE) for text in texts(module.tree)}
    assert {text for text in messages - others if re.search(r"\bpictures?\b", text, re.IGNORECASE)} == set()


# --- the check itself -------------------------------------------------------------------------------------------------

GLOSSARY = """
## Words in code

| say | not |
|---|---|
| step | `update`, `*_updates` |
| the noun of what it holds: `bad_rows` | `found` |

## Other words

| say | not |
|---|---|
| row | `line` |
"""

CODE = '''
import line
class update:
    """An update."""
def _found(line, found=None, *found_rows):
    for update, (step, found) in []:
        pass
    with line as found:
        row = found
    step.num_updates = [update() for found in row]
    return {"found": found.update(found=1)}
'''


def test_the_table_of_the_section_gives_the_forbidden_words():
    assert forbidden_words(GLOSSARY) == {
        "update": "step", "*_updates": "step", "found": "the noun of what it holds: `bad_rows`",
    }  # fmt: skip


def test_every_name_that_is_given_is_checked_and_no_name_that_is_only_used(tmp_path):
    (tmp_path / "toy" / "core" / "rows").mkdir(parents=True)
    (tmp_path / "toy" / "core" / "rows" / "row.py").write_text(CODE)
    complaints = misnamed(tmp_path / "toy", forbidden_words(GLOSSARY))
    assert {module for module, _ in complaints} == {"core/rows/row"}
    names = Counter(tuple(complaint.split(": ")[:2]) for _, complaint in complaints)
    assert names == Counter(
        [
            ("toy/core/rows/row.py:3", "update"),
            ("toy/core/rows/row.py:5", "_found"),
            ("toy/core/rows/row.py:5", "found"),
            ("toy/core/rows/row.py:6", "update"),
            ("toy/core/rows/row.py:6", "found"),
            ("toy/core/rows/row.py:8", "found"),
            ("toy/core/rows/row.py:10", "num_updates"),
            ("toy/core/rows/row.py:10", "found"),
        ]
    )
    assert complaints[0][1] == "toy/core/rows/row.py:3: update: say step instead of update"


def test_a_module_belongs_to_its_folder():
    assert [package_of(name) for name in ("core/rows/row", "core/model/vision/clip", "cli/app", "core/files")] == [
        "rows", "model", "cli", ".",
    ]  # fmt: skip
