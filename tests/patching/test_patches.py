"""Every patch on the real upstream package: it goes on, goes on once, and comes off without a trace."""

import importlib.metadata
import sys

import pytest
from ranks import pool

from blockwise_lr.patches import PatchError, all_patches
from blockwise_lr.patches.base import Patch, Undo
from blockwise_lr.patches.symbols import Symbol, has_module, installed_version

PATCHES = {patch.name: patch for patch in all_patches()}
# what a patch may set beside the symbols that it declares: attributes of the module that it stands in for altogether
WHOLE = {"cuda-on-cpu": ("torch.cuda",), "megatron-on-cpu": ("torch.cuda",)}


def usable(patch):
    return installed_version(patch.package) is not None and (not patch.needs or has_module(patch.needs))


def ready():
    """The patches that can be applied here, with their hooks known and none in force."""
    import torch

    if installed_version("deepspeed"):
        import blockwise_lr.deepspeed  # hands the patches their hooks
    if installed_version("megatron-core"):
        import blockwise_lr.megatron

        blockwise_lr.megatron.register()()
    if installed_version("transformers"):
        from blockwise_lr.patches import transformers_batches

        transformers_batches.PATCH.apply(transformers_batches.Hooks(lambda trainer: None))
    for patch in PATCHES.values():
        patch.undo()
    return {name: patch for name, patch in PATCHES.items() if usable(patch)} if not torch.cuda.is_available() else {}


def contents(value):
    """What tells whether an attribute is the same as before: lists by their members."""
    return list(value) if isinstance(value, list) else value


def seen(patch):
    """The symbols that a patch declares to replace, and all attributes of the modules that they are in."""
    found = {}
    for symbol in patch.symbols_here():
        owner, name = symbol.owner()
        found[symbol.path] = contents(vars(owner).get(name, "inherited"))
        found.update({(symbol.path, key): contents(value) for key, value in vars(owner).items()})
    for module in WHOLE.get(patch.name, ()):
        found.update({(module, key): value for key, value in vars(sys.modules[module]).items()})
    return found


def changed(before, after):
    return {
        key
        for key in before.keys() | after.keys()
        if before.get(key, None) is not after.get(key, None) and before.get(key, None) != after.get(key, None)
    }


def on_and_off(name):
    """What one patch changes when it is applied, when it is applied again, and when it has been undone."""
    patches = ready()
    patch = patches[name]
    original = seen(patch)
    undo = patch.apply()
    first = seen(patch)
    again = patch.apply()
    second = seen(patch)
    on = patch.applied
    undo()
    after = seen(patch)
    again()  # the second undo has nothing left to do
    result = {
        "changed": sorted(map(str, changed(original, first))),
        "again": sorted(map(str, changed(first, second))),
        "left": sorted(map(str, changed(original, after))),
        "applied": (on, patch.applied),
    }
    patch.apply()  # and it goes on again
    assert patch.applied
    for other in patches.values():
        other.undo()
    if installed_version("deepspeed"):
        from blockwise_lr.deepspeed.door import apply_patches

        apply_patches()  # the ranks go on to other cases
    return result


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_goes_on_once_and_comes_off(name):
    if not usable(PATCHES[name]):
        pytest.skip(f"{PATCHES[name].needs or PATCHES[name].package} is not installed")
    (found,) = pool(1).run(on_and_off, name)
    here = installed_version(PATCHES[name].package)
    due = any(symbol.is_in(here) for symbol in PATCHES[name].symbols)  # some versions need no change
    assert bool(found["changed"]) == due, "nothing was replaced, or what the version needs none of"
    assert not found["again"] and not found["left"]
    assert found["applied"] == (True, False)


def test_a_process_that_is_done_with_ours_has_its_deepspeed_back():
    """All together, in the order in which the adapter applies them."""
    assert pool(1).run(all_off) == [[]]


def all_off():
    ready()
    patches = [patch for name, patch in PATCHES.items() if usable(patch) and name.startswith("deepspeed")]
    before = [seen(patch) for patch in patches]
    if patches:
        from blockwise_lr.deepspeed.door import apply_patches

        apply_patches()()
    left = [sorted(map(str, changed(*pair))) for pair in zip(before, map(seen, patches))]
    if patches:
        apply_patches()
    return [found for found in left if found]


def never(undo, hooks):
    raise AssertionError("must not be reached")


def patch_of(*symbols, install=never, **changes):
    values = {"name": "test", "package": "torch", "versions": ">=2", "why": "", "install": install, **changes}
    return Patch(symbols=symbols, **values)


def test_a_changed_signature_is_refused_and_nothing_is_left_changed():
    with pytest.raises(PatchError, match=r"nn:Module.eval takes \('self',\) where \('self', 'x'\) was expected"):
        patch_of(Symbol("torch.nn:Module.eval", ("self", "x"))).apply()
    with pytest.raises(PatchError, match=r"torch.nn.Module has no gone any more \(torch .* is installed\).*newer"):
        patch_of(Symbol("torch.nn:Module.gone")).apply()
    with pytest.raises(PatchError, match=r"torch\.gone cannot be imported"):
        patch_of(Symbol("torch.gone:value")).apply()


def test_a_module_that_lacks_another_project_says_which(monkeypatch, tmp_path):
    (tmp_path / "in_need.py").write_text("import one_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        PatchError, match=r"in_need needs one_that_is_not_there, which is not installed \(pip install it\)"
    ):
        patch_of(Symbol("in_need:value")).apply()


@pytest.mark.parametrize("version, words", [("0.1", "0.1 is installed"), (None, "is not installed; pip install")])
def test_another_version_is_refused(monkeypatch, version, words):
    def of(package):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(importlib.metadata, "version", of)
    with pytest.raises(PatchError, match=words):
        patch_of().apply()


def test_a_patch_that_fails_half_way_leaves_nothing():
    import torch

    def install(undo, hooks):
        undo.set(torch.nn.Module, "eval", None)
        raise KeyError("half-way")

    before = torch.nn.Module.eval
    with pytest.raises(KeyError):
        patch_of(install=install).apply()
    assert torch.nn.Module.eval is before


def test_hooks_are_asked_for_and_kept():
    given = []
    patch = patch_of(install=lambda undo, hooks: given.append(hooks), hooks=str)
    with pytest.raises(PatchError, match="import that first"):
        patch.apply()
    undo = patch.apply("one")
    with pytest.raises(PatchError, match="applied with other hooks"):
        patch.apply("two")
    undo()
    patch.apply()
    assert given == ["one", "one"]


def test_undo_deletes_what_was_inherited():
    class Base:
        value = 1

    class Derived(Base):
        pass

    undo = Undo()
    undo.set(Derived, "value", 2)
    undo()
    assert "value" not in vars(Derived) and Derived.value == 1


def test_every_patch_says_why_and_until_when():
    for patch in PATCHES.values():
        assert len(patch.why) > 20 and len(patch.until) > 20 and patch.symbols, patch.name
