"""Whatever is declared of DeepSpeed and Megatron is missed when it is gone, by its name, before anything is trained.

Each attribute is taken from the real package, or from a real engine or optimizer, and put back.
"""

import pytest
from patching.upstream_objects import SETTINGS, engine_of, megatron_wrapper, objects_of, without, without_symbol
from ranks import pool

from blockwise_lr.patches import all_instance_patches, all_patches, all_upstreams
from blockwise_lr.patches.deepspeed_variants import BF16
from blockwise_lr.patches.symbols import has_module, installed_version

DECLARED = {declared.name: declared for declared in (*all_patches(), *all_instance_patches(), *all_upstreams())}
UPSTREAMS = {upstream.name: upstream for upstream in all_upstreams()}


def skip_without(declared):
    if installed_version(declared.package) is None or (declared.needs and not has_module(declared.needs)):
        pytest.skip(f"{declared.needs or declared.package} is not installed")


def check(act):
    """The sentence with which a check stops; empty where it does not."""
    from blockwise_lr.patches import PatchError

    try:
        act()
    except PatchError as error:
        return str(error)
    return ""


def symbols_of(declared):
    """Without ``__init__``, which every class has; its parameters are another test's."""
    return [symbol for symbol in declared.symbols_here() if not symbol.path.endswith(".__init__")]


def gone_one_by_one(name):
    """For each symbol: what a check says without it. And what it says with all of them."""
    declared, found = DECLARED[name], {}
    for symbol in symbols_of(declared):
        with without_symbol(*symbol.owner()):
            found[symbol.path] = check(declared.check), declared.problems()
    return found, check(declared.check)


@pytest.mark.parametrize("name", DECLARED)
def test_a_symbol_that_is_gone_stops_the_start_by_its_name(name):
    declared = DECLARED[name]
    skip_without(declared)
    if not declared.symbols_here():
        pytest.skip(f"{declared.package} {installed_version(declared.package)} needs nothing of it")
    ((found, whole),) = pool(1).run(gone_one_by_one, name)
    assert whole == "" and len(found) == len({symbol.path for symbol in symbols_of(declared)}) > 0
    for path, (sentence, problems) in found.items():
        owner, _, last = path.replace(":", ".").rpartition(".")
        assert sentence.startswith(f"{owner} has no {last} any more"), (path, sentence)
        assert f"{declared.package} {installed_version(declared.package)} is installed" in sentence
        assert f"install an unchanged {declared.package}{declared.versions}" in sentence
        assert problems and problems[0].startswith(f"{owner} has no {last} any more")  # what doctor shows


def renamed_parameters(name):
    """For each function whose parameters are declared: what a check says when one has another name."""
    declared, found = DECLARED[name], {}
    for symbol in declared.symbols_here():
        if symbol.parameters:
            owner, attribute = symbol.owner()
            names = ", ".join([*symbol.parameters[:-1], "renamed"])
            changed = eval(f"lambda {names}: None")
            holder = next(kind for kind in getattr(owner, "__mro__", (owner,)) if attribute in vars(kind))
            before = vars(holder)[attribute]
            setattr(holder, attribute, changed)
            try:
                found[symbol.path] = check(declared.check)
            finally:
                setattr(holder, attribute, before)
    return found


@pytest.mark.parametrize(
    "name",
    [name for name, declared in DECLARED.items() if any(s.parameters for s in (*declared.symbols, *declared.reads))],
)
def test_a_renamed_parameter_stops_the_start(name):
    skip_without(DECLARED[name])
    (found,) = pool(1).run(renamed_parameters, name)
    assert found.keys() == {symbol.path for symbol in DECLARED[name].symbols_here() if symbol.parameters}
    for path, sentence in found.items():
        assert sentence.startswith(f"{path} takes (") and "renamed" in sentence and "was expected" in sentence, path


def attributes_gone(upstream, instances):
    """(class, attribute) -> what a check of these objects says without it."""
    found = {}
    for instance in instances:
        for attributes in upstream.instances_here():
            if instance is not None and attributes.is_for(instance):
                for name in attributes.names:
                    with without(instance, name):
                        found[attributes.of, name] = check(lambda of=instance: upstream.check_instance(of))
    return found


def engine_attributes(kind):
    engine = engine_of(kind)
    found = attributes_gone(UPSTREAMS["deepspeed-reads"], objects_of(engine).values())
    engine.destroy()
    return found


def optimizer_attributes(kind):
    with megatron_wrapper(kind) as wrapper:
        buffers = getattr(wrapper, "buffers", [])
        instances = [wrapper, *buffers, *(bucket for buffer in buffers for bucket in buffer.buckets)]
        return attributes_gone(UPSTREAMS["megatron-reads"], instances)


@pytest.mark.parametrize(
    "name, case, kinds",
    [
        ("deepspeed-reads", engine_attributes, tuple(SETTINGS)),
        ("megatron-reads", optimizer_attributes, ("plain", "bf16", "distributed", "distributed bf16")),
    ],
)
def test_an_attribute_of_an_object_that_is_gone_is_missed_by_its_name(name, case, kinds):
    upstream = UPSTREAMS[name]
    skip_without(upstream)
    found = {}
    for kind in kinds:
        found.update(pool(1).run(case, kind)[0])
    declared = {(attributes.of, name) for attributes in upstream.instances_here() for name in attributes.names}
    if name == "deepspeed-reads" and "BF16_Optimizer" not in kinds:
        declared = {(of, attribute) for of, attribute in declared if of != BF16}
    assert found.keys() == declared  # each was looked at on some real object
    for (of, attribute), sentence in found.items():
        assert sentence.startswith(f"{of.replace(':', '.')} has no {attribute} any more"), (of, attribute, sentence)


def start_of_a_changed_deepspeed(kind, wrapper, attribute):
    """An engine of a DeepSpeed whose optimizer calls an attribute otherwise."""
    from blockwise_lr.patches.symbols import Symbol

    cls = Symbol(wrapper).value()
    init = cls.__init__

    def renaming(self, *args, **kwargs):
        init(self, *args, **kwargs)
        vars(self)[f"{attribute}_renamed"] = vars(self).pop(attribute)

    cls.__init__ = renaming
    try:
        engine_of(kind)
    finally:
        cls.__init__ = init


@pytest.mark.parametrize(
    "kind, wrapper, attribute",
    [
        ("ZeRO-1", "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer", "bit16_groups"),
        ("ZeRO-1", "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer", "_hp_optimizer_states_linked"),
        ("ZeRO-3", "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3", "grad_position"),
    ],
)
def test_an_engine_of_a_changed_deepspeed_does_not_start_on_any_rank(kind, wrapper, attribute):
    if installed_version("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    for error in pool(2).run(start_of_a_changed_deepspeed, kind, wrapper, attribute, errors=True):
        assert f"has no {attribute} any more" in str(error) and type(error).__name__ == "PatchError"


def global_arguments_renamed():
    """What stops where megatron.training keeps its arguments elsewhere: the start, and a build that comes all the same."""
    from megatron.core.optimizer import OptimizerConfig
    from megatron.training import global_vars

    import blockwise_lr.megatron
    from blockwise_lr.megatron.settings import settings_of

    undo = blockwise_lr.megatron.register()
    with without_symbol(global_vars, "_GLOBAL_ARGS"):
        try:
            settings_of(OptimizerConfig(optimizer="adam"))
            late = ""
        except Exception as error:
            late = str(error)
        undo()
        return check(blockwise_lr.megatron.register), late


def test_a_megatron_without_its_global_arguments_trains_no_adam_in_place_of_ours():
    if not has_module("megatron.training"):
        pytest.skip("megatron.training is not installed")
    ((early, late),) = pool(1).run(global_arguments_renamed)
    for sentence in (early, late):
        assert sentence.startswith("megatron.training.global_vars has no _GLOBAL_ARGS any more")
