from importlib.metadata import EntryPoint

import pytest

import hf_earlyexit.registry as module
from hf_earlyexit.calibration.targets import TARGETS
from hf_earlyexit.errors import UnknownNameError
from hf_earlyexit.losses import OBJECTIVES
from hf_earlyexit.policies import POLICIES
from hf_earlyexit.registry import Registry


class Plugin:
    """What a third party's entry point brings."""


def fruit() -> Registry:
    registry = Registry("fruit")
    for name in ("apple", "pear", "plum"):
        registry.register(name)(name.upper())
    return registry


def plugged(monkeypatch, points, group="fruits"):
    asked = []
    monkeypatch.setattr(module, "entry_points", lambda *, group: asked.append(group) or points)
    return Registry("fruit", group=group), asked


def test_a_registered_thing_comes_back_by_name_and_the_decorator_returns_it():
    registry, thing = Registry("fruit"), object()
    assert registry.register("apple")(thing) is thing
    assert registry.get("apple") is thing


def test_names_are_sorted():
    registry = Registry("fruit")
    for name in ("plum", "apple", "pear"):
        registry.register(name)(name)
    assert registry.names() == ["apple", "pear", "plum"]


def test_a_misspelt_name_gets_the_nearest_one_and_the_list():
    with pytest.raises(
        UnknownNameError, match=r"Unknown fruit 'aple'\. Did you mean 'apple'\? Known: apple, pear, plum\."
    ) as caught:
        fruit().get("aple")
    assert (caught.value.field, caught.value.value) == ("fruit", "aple")


def test_a_name_like_no_other_gets_the_list_and_no_suggestion():
    with pytest.raises(UnknownNameError, match="Known: apple, pear, plum") as caught:
        fruit().get("zzzzzz")
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize("name", [None, 3, ["apple"], {"apple": 1}])
def test_what_is_no_string_is_an_unknown_name(name):
    with pytest.raises(UnknownNameError):
        fruit().get(name)


def test_a_taken_name_is_refused_and_keeps_its_thing():
    registry = fruit()
    with pytest.raises(UnknownNameError, match="The fruit name 'apple' is taken") as caught:
        registry.register("apple")(object())
    assert caught.value.value == "apple"
    assert registry.get("apple") == "APPLE"


def test_registering_the_same_thing_again_is_harmless():
    registry, thing = Registry("fruit"), object()
    registry.register("apple")(thing)
    registry.register("apple")(thing)
    assert registry.names() == ["apple"]


@pytest.mark.parametrize("look", [Registry.names, lambda registry: registry.get("kiwi")])
def test_entry_points_are_read_at_the_first_look_up_only(monkeypatch, look):
    point = EntryPoint("kiwi", f"{__name__}:Plugin", "fruits")
    registry, asked = plugged(monkeypatch, [point])
    assert asked == []
    look(registry)
    look(registry)
    assert asked == ["fruits"]
    assert registry.get("kiwi") is Plugin


def test_a_registry_without_a_group_reads_no_entry_points(monkeypatch):
    registry, asked = plugged(monkeypatch, [EntryPoint("kiwi", f"{__name__}:Plugin", "fruits")], group=None)
    assert registry.names() == []
    assert asked == []


def test_an_entry_point_cannot_take_a_name_that_is_ours(monkeypatch):
    registry, _ = plugged(monkeypatch, [EntryPoint("apple", f"{__name__}:Plugin", "fruits")])
    registry.register("apple")("ours")
    with pytest.raises(UnknownNameError, match="'apple' is taken"):
        registry.names()
    assert registry.get("apple") == "ours"


def test_a_plugin_that_cannot_be_loaded_is_named(monkeypatch):
    registry, _ = plugged(monkeypatch, [EntryPoint("kiwi", "no_such_module_anywhere:Kiwi", "fruits")])
    with pytest.raises(Exception, match="kiwi") as caught:
        registry.names()
    assert "no_such_module_anywhere" in str(caught.value)


@pytest.mark.parametrize(
    ("registry", "typo", "meant"),
    [(POLICIES, "beem_a", "beem-a"), (TARGETS, "maxdrop", "max-drop"), (OBJECTIVES, "distilation", "distillation")],
)
def test_our_own_registries_suggest_the_nearest_name(registry, typo, meant):
    with pytest.raises(UnknownNameError, match=f"Did you mean '{meant}'"):
        registry.get(typo)
