"""The example of docs/tasks.md, run as it stands there, and tasks by dotted path."""

import importlib
import pickle
import re
import sys
from pathlib import Path

import pytest

from krontune.rl import CertificateReward, RlError, heuristic_table
from krontune.rl.tasks import get_task

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The example's task, from a module written out of the page."""
    found = re.search(r"```python\n# (closest)\.py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    (tmp_path / "closest.py").write_text(found[2], encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield get_task("closest:Closest")
    sys.modules.pop("closest", None)


def test_the_example_of_the_page_is_a_task_like_any_other(own):
    items = own.instances(40, [4, 8])
    texts = [own.completion(item) for item in items]
    for item in items:
        values = [row[0] for row in item.rows]
        assert own.solve(item).value == min(abs(a - b) for i, a in enumerate(values) for b in values[:i])
    for kind in ("certificate", "answer", "ids_exact", "shaped", "format"):
        reward = pickle.loads(pickle.dumps(CertificateReward(own, kind)))
        assert reward(completions=texts, instance=[own.to_json(item) for item in items]) == [1.0] * 40
    wrong = [own.write(item, (1, item.n)) for item in items]
    assert sum(CertificateReward(own)(completions=wrong, instance=items)) < 20
    assert heuristic_table(own, items)["neighbours"].certificate.value < 0.8
    assert all(not own.fooled(item) for item in own.instances(10, 8, discriminating=True))
    assert own.dataset(5, 4, split="test").column_names[:3] == ["prompt", "completion", "instance"]


def test_the_example_is_short():
    found = re.search(r"```python\n# closest\.py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found and len([line for line in found[1].split("\n") if line.strip()]) <= 40


def test_options_of_a_dotted_task_are_checked_too():
    task = get_task("krontune.rl.tasks.lis:Lis", values=(1, 9))
    assert task.options()["values"] == (1, 9)
    with pytest.raises(RlError, match="did you mean 'values'"):
        get_task("krontune.rl.tasks.lis:Lis", value=(1, 9))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module_here:Task", "no task at"),
        ("krontune.rl.tasks.lis:Missing", "no task at"),
        ("krontune.rl.tasks.lis:", "no task at"),
        (":Lis", "no task at"),
        ("json:JSONDecoder", "no subclass"),
        ("krontune.rl.tasks.lis:REJECTION_MAX_N", "no subclass"),
    ],
)
def test_a_path_that_leads_to_no_task_is_refused(path, message):
    with pytest.raises(RlError, match=message):
        get_task(path)


def test_a_task_that_lacks_methods_is_told_which():
    with pytest.raises(RlError, match="lacks methods that a task has: check, features"):
        get_task("krontune.rl.tasks:CertificateTask")
