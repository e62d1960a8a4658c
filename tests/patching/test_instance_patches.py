"""What is replaced on single objects, on real engines and optimizers: on, on once, off, and other objects left alone."""

import pytest
from patching.upstream_objects import SETTINGS, engine_of, megatron_wrapper, objects_of
from ranks import pool

from blockwise_lr.patches import InstancePatch, PatchError, all_instance_patches
from blockwise_lr.patches.symbols import Symbol, installed_version

PATCHES = {patch.name: patch for patch in all_instance_patches()}


def replaceable(patch, instance):
    """The attributes of an object that a patch declares to replace."""
    own = {kind: f"{kind.__module__}:{kind.__qualname__}" for kind in type(instance).__mro__}.values()
    names = [symbol.path.rpartition(".")[2] for symbol in patch.symbols if symbol.path.rpartition(".")[0] in own]
    return names + [name for attributes in patch.sets if attributes.of in own for name in attributes.names]


def state(instance):
    return {name: value for name, value in vars(instance).items() if name != "_blockwise_lr_patches"}


def on_and_off(patch, instance):
    """What each step replaces on an object, and whether the patch says that it stands there."""
    from blockwise_lr.patches import undo_instance

    undo_instance(instance)
    names, before = replaceable(patch, instance), state(instance)
    new = {name: (lambda *_, **__: None) for name in names}
    patch.apply(instance, **new)
    first = all(vars(instance)[name] is value for name, value in new.items()), patch.applied_to(instance)
    patch.apply(instance, **{name: (lambda *_, **__: None) for name in names})
    second = all(vars(instance)[name] is value for name, value in new.items())
    patch.undo(instance)
    off = state(instance) == before, patch.applied_to(instance)
    vars(instance).update({names[0]: before.get(names[0], new[names[0]])})  # as upstream sets a method anew
    if names[0] not in before:
        delattr(instance, names[0])
    with patch.during(instance, **new):
        inside = patch.applied_to(instance)
    undo_instance(instance)
    return first, second, off, inside, state(instance) == before


def on_engines(kind):
    """Patch -> its outcomes on all objects of an engine that it can be applied to."""
    engine = engine_of(kind)
    found = {}
    for name, patch in PATCHES.items():
        for label, instance in objects_of(engine).items():
            if instance is not None and replaceable(patch, instance):
                found[name, label] = on_and_off(patch, instance)
    engine.destroy()
    return found


def on_megatron():
    with megatron_wrapper("distributed") as wrapper:
        return {
            (name, "wrapper"): on_and_off(PATCHES[name], wrapper) for name in PATCHES if name.startswith("megatron")
        }


# on PipelineEngines alone, of which sequence_length/test_deepspeed.py has a real one
PIPELINES = {"deepspeed-pipeline-lengths"}
GOOD = ((True, True), True, (True, False), True, True)


@pytest.mark.skipif(installed_version("deepspeed") is None, reason="deepspeed is not installed")
def test_each_patch_goes_on_once_and_comes_off_the_objects_of_an_engine():
    seen = set()
    for kind in ("ZeRO-1", "ZeRO-3", "BF16_Optimizer"):
        (found,) = pool(1).run(on_engines, kind)
        assert all(outcome == GOOD for outcome in found.values()), found
        seen |= {name for name, _ in found}
    assert seen == {name for name in PATCHES if name.startswith("deepspeed")} - PIPELINES


@pytest.mark.skipif(installed_version("megatron-core") is None, reason="megatron-core is not installed")
def test_each_patch_goes_on_once_and_comes_off_a_megatron_optimizer():
    (found,) = pool(1).run(on_megatron)
    assert found and all(outcome == GOOD for outcome in found.values()), found


def detached(kind):
    """Which patches stand on an engine's objects; which after detach; and the losses of two steps before and after."""
    from deepspeed_door.engines import train

    from blockwise_lr.deepspeed import detach
    from blockwise_lr.patches.instances import instance_patches_on

    engine = engine_of(kind)
    train(engine, 1)
    on = {
        label: instance_patches_on(instance) for label, instance in objects_of(engine).items() if instance is not None
    }
    own = state(engine.optimizer)
    detach(engine)
    off = {
        label: instance_patches_on(instance) for label, instance in objects_of(engine).items() if instance is not None
    }
    left = {name for name, value in own.items() if value is not state(engine.optimizer).get(name)}
    losses = train(engine, 1)
    detach(engine)  # twice is harmless
    engine.destroy()
    return {label: names for label, names in on.items() if names}, any(off.values()), left, losses


@pytest.mark.skipif(installed_version("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("kind", SETTINGS)
def test_an_engine_that_is_detached_has_deepspeeds_methods_and_trains_on(kind):
    for on, off, gone, losses in pool(2).run(detached, kind):
        assert on["monitor"] == ("deepspeed-learning-rates",)
        if kind != "unfused":
            assert "deepspeed-universal-loads" in on["wrapper"]
            assert {"_load_universal_checkpoint"} <= gone
        assert not off and all(loss == loss for loss in losses)


class Object:
    def method(self):
        return "upstream"


def patch_of(name, *names):
    symbols = tuple(Symbol(f"{__name__}:Object.{attribute}") for attribute in names)
    return InstancePatch(name=name, package="pytest", versions=">=1", symbols=symbols, why="")


def test_a_later_patch_is_undone_first():
    one, two, thing = patch_of("one", "method"), patch_of("two", "method"), Object()
    one.apply(thing, method=lambda: "one")
    two.apply(thing, method=lambda: "two")
    with pytest.raises(PatchError, match="'two' was applied on top of 'one'"):
        one.undo(thing)
    assert one.applied_to(thing) and two.applied_to(thing)
    two.undo(thing)
    assert thing.method() == "one"
    one.undo(thing)
    assert thing.method() == "upstream" and Object().method() == "upstream"


def test_what_upstream_sets_anew_is_replaced_again_and_stays_upstreams_on_undo():
    patch, thing = patch_of("one", "method"), Object()
    patch.apply(thing, method=lambda: "ours")
    thing.method = lambda: "anew"
    assert not patch.applied_to(thing)
    patch.apply(thing, method=lambda: "ours again")
    assert thing.method() == "ours again"
    patch.undo(thing)
    assert thing.method() == "anew"
    patch.apply(thing, method=lambda: "ours")
    thing.method = anew = lambda: "anew"
    patch.undo(thing)
    assert thing.method is anew


def test_undeclared_and_missing_methods_are_refused():
    patch = patch_of("one", "method", "gone")
    with pytest.raises(PatchError, match="does not declare other"):
        patch.apply(Object(), other=None)
    with pytest.raises(PatchError, match="Object has no gone any more"):
        patch.apply(Object(), gone=None)
