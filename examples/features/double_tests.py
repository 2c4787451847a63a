"""Tests that a program of code.yaml passes when its function ``f`` doubles a number."""

from solution import f

assert f(3) == 6


def test_negative_numbers():
    assert f(-2) == -4


def test_zero():
    assert f(0) == 0
