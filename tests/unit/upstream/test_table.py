"""Every name that is replaced exists upstream, stands in one table, and is put back."""

import pytest

from megatron_let.upstream.table import Redirect, applied, apply, instead
from tests.support.testing import run_program

WALK = "tests.unit.upstream.every_table"


def test_all_replaced_names_exist_upstream_and_stand_in_one_table():
    result = run_program(WALK)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "'loop_hooks': 5" in result.stdout
    # The twins: a name that upstream has no more is told, and one that stands twice.
    for fault, told in (("gone", "has no attribute 'gone'"), ("twice", "AssertionError: [(")):
        result = run_program(WALK, fault)
        assert result.returncode != 0 and told in result.stderr, fault


class Owner:
    """Whose name is replaced."""

    value = 1


HERE = f"{__name__}.Owner"


def plus(number):
    return Redirect(HERE, "value", lambda value: value + number, "to try it")


@pytest.fixture(autouse=True)
def _value(monkeypatch):
    monkeypatch.setattr(Owner, "value", 1)


def test_a_second_call_replaces_the_first():
    apply([plus(1)])
    apply([plus(10)])
    assert Owner.value == 11


def test_what_is_replaced_for_a_while_is_put_back():
    Owner.value = 5
    with pytest.raises(RuntimeError), applied([plus(1)]):
        assert Owner.value == 6
        raise RuntimeError
    assert Owner.value == 5


def test_a_name_that_is_not_there_cannot_be_replaced():
    with pytest.raises(AttributeError):
        apply([Redirect("os.path", "no_such_name", instead(3), "to try it")])
    assert instead(3)("anything") == 3
