"""Versions that are too old, against the one line that they are refused with."""
import pytest

from harness import check_versions


@pytest.mark.parametrize("python, torch_version, message", [
    pytest.param((3, 9, 18), "2.13.0", "Python 3.9 is too old: use 3.10 or newer", id="python"),
    pytest.param((3, 11, 7), "2.5.1+cu124", "torch 2.5.1+cu124 is too old: use 2.6 or newer", id="torch"),
])
def test_versions_that_are_too_old_are_refused_in_one_line(python, torch_version, message):
    """The line that ends the program, word for word."""
    with pytest.raises(SystemExit) as end:
        check_versions(python, torch_version)
    assert end.value.code == message


@pytest.mark.parametrize("python, torch_version", [
    pytest.param((3, 10, 0), "2.6.0", id="oldest"),
    pytest.param((3, 14, 0), "2.13.0+cpu", id="newer"),
    pytest.param((4, 0), "3.0.0a0", id="newest"),
])
def test_versions_that_are_new_enough_pass(python, torch_version):
    """The oldest that the README names, and later ones."""
    assert check_versions(python, torch_version) is None
