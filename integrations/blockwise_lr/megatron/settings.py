"""Settings of the Megatron door: as library users register them, or as flags in Megatron's own argument parser."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..blocks import PRESETS, BlockError
from ..blocks.presets import ANY_SIZE
from ..blocks.types import shown
from ..blocks.user_rules import own_blocks, user_rules
from ..optim import CLASSES
from ..optim.base import BlockwiseOptimizer
from ..patches import PatchError, upstream_megatron
from ..rules.options import OptimizerOptions, clip_limits
from . import guard_flags, muon, sequence_length
from .schedule import BlockSchedule

_ACCEPTABLE = tuple(dict.fromkeys(name for kind in CLASSES.values() for name in kind.Options.acceptable()))

KINDS: Mapping[str, type[BlockwiseOptimizer]] = {f"blockwise_{kind.rule.name}": kind for kind in CLASSES.values()}


class _AnyKind(OptimizerOptions):
    """The options that all kinds have; ``accept_mismatch`` may name those of any, for one registration serves all kinds."""

    @classmethod
    def acceptable(cls) -> tuple[str, ...]:
        return _ACCEPTABLE


@dataclass(frozen=True)
class BlockSettings:
    """What Megatron's own optimizer settings do not say.

    Attributes:
        kind: a key of KINDS.
        block_lr_ratios: peak learning rate of block types over --lr, or a preset's name.
        block_weight_decay: weight decay of block types, in place of --weight-decay. What decays stays Megatron's own
            rule, but that norms decay where they are named.
        block_rules: rules of the user's own, for blocks and rates.
        block_strict: refuse parameters that no rule maps.
        row_parallel_sums: Adam-mini sums a row's squares over tensor-parallel ranks where these hold parts of it, so that
            the result does not depend on their number. False keeps each rank's part a segment of its own: no all-reduce
            over tensor-parallel ranks, one second moment more per row and rank, and a result that depends on TP.
        kernel: "auto", or a kernel's name.
        accept_mismatch, ratio_fade_steps: as for BlockwiseAdamW: in what a loaded checkpoint may differ.
        block_schedule: a schedule in place of Megatron's warmup and decay: {"type": "BlockwiseWSD", ...}, as in a ds_config.
            Steps count iterations of ``samples_per_step`` samples (Megatron's global batch where it is left out).
        block_clip: largest gradient norm of block types, beside --clip-grad, which goes before.
        block_muon: momentum, nesterov, ns_steps and matrix_scale of blockwise_muon and blockwise_muon_mini.
    """

    kind: str = "blockwise_adamw"
    block_lr_ratios: str | Mapping[str, float | str] | None = None
    block_weight_decay: Mapping[str, float] | None = None
    block_rules: tuple[Any, ...] = ()
    block_strict: bool = True
    row_parallel_sums: bool = True
    kernel: str = "auto"
    accept_mismatch: tuple[str, ...] = ()
    ratio_fade_steps: int = 0
    block_schedule: Mapping[str, Any] | None = None
    block_clip: Mapping[str, float | str] | float | str | None = None
    block_muon: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Refuses bad values before any model is built, and values of other types, which usually mean something else."""
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise BlockError(f"kind is {shown(self.kind)}; use one of {', '.join(KINDS)}")
        if not isinstance(self.row_parallel_sums, bool):
            raise BlockError(
                f"row_parallel_sums is {shown(self.row_parallel_sums)}; write True or False, without quotes"
            )
        options = _AnyKind.checked(
            {
                name: getattr(self, name)
                for name in vars(self)
                if name in OptimizerOptions.model_fields and (name, getattr(self, name)) != ("block_clip", None)
            },
            config=ANY_SIZE,
        )
        BlockSchedule.checked(self.block_schedule)
        muon.checked_options(self.block_muon)
        object.__setattr__(self, "accept_mismatch", tuple(sorted(options.accept_mismatch)))
        object.__setattr__(self, "block_rules", user_rules(options.block_rules))  # an iterator is read once


# Process-wide, as what they stand for is: the settings of configs that have none attached, by order of registration, and
# what of ours the last --optimizer named that Megatron parsed into its one set of global arguments.
_registered: list[BlockSettings] = []
_asked: str | None = None
_ATTACHED = "blockwise_settings"  # attribute of an OptimizerConfig


def remember(settings: BlockSettings) -> None:
    """Makes these the settings of every OptimizerConfig that names one of our optimizers and has none attached."""
    _registered.append(settings)


def forget(settings: BlockSettings) -> None:
    """Takes them back; those that were registered before hold again."""
    _registered[:] = [kept for kept in _registered if kept is not settings]


def attach_settings(config: Any, settings: BlockSettings) -> None:
    """Puts settings on one OptimizerConfig, where they go before what is registered.

    Raises:
        BlockError: the config names none of our optimizers.
    """
    if config.optimizer not in KINDS:
        raise BlockError(
            f"settings of blockwise optimizers were attached to an OptimizerConfig of optimizer {config.optimizer!r}; "
            f"name one of {', '.join(KINDS)} in it"
        )
    setattr(config, _ATTACHED, replace(settings, kind=config.optimizer))


def settings_of(config: Any) -> BlockSettings | None:
    """The settings for an OptimizerConfig, or None where its optimizer is not ours.

    It is ours where ``config.optimizer`` names it, or where Megatron's arguments were parsed with our ``--optimizer``.

    Raises:
        BlockError: ours was asked for, and Megatron's arguments do not hold it or its settings any more.
    """
    attached = getattr(config, _ATTACHED, None)
    if attached is not None:
        return attached
    arguments = megatron_arguments()
    if getattr(arguments, "yaml_cfg", None) is not None and (_asked or config.optimizer in KINDS):
        raise BlockError(
            f"--yaml-cfg makes Megatron ignore all flags, and with them the settings of "
            f"{_asked or config.optimizer}; give flags and leave out --yaml-cfg"
        )
    if config.optimizer in KINDS:
        return replace(_registered[-1] if _registered else BlockSettings(), kind=config.optimizer)
    if config.optimizer != "adam":
        return None
    kind = getattr(arguments, "blockwise_optimizer", None)
    if kind is None and _asked:
        raise BlockError(
            f"--optimizer {_asked} was parsed, and Megatron's global arguments do not hold it; call "
            f"Megatron's set_global_variables with what was parsed, or name {_asked!r} in OptimizerConfig"
        )
    return None if kind is None else _from_flags(kind, arguments)


def _from_flags(kind: str, arguments: argparse.Namespace) -> BlockSettings:
    return BlockSettings(
        kind,
        arguments.block_lr_ratios,
        arguments.block_weight_decay,
        arguments.block_rules or (),
        arguments.block_strict,
        arguments.adam_mini_row_sums,
        accept_mismatch=tuple(arguments.accept_mismatch or ()),
        ratio_fade_steps=arguments.ratio_fade_steps,
        block_schedule=_schedule(arguments),
        block_clip=arguments.block_clip,
        block_muon=arguments.block_muon,
    )


_WARMUPS = ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction")


def _schedule(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Raises BlockError where a warmup is given twice."""
    given = arguments.block_schedule
    twice = [name for name in _WARMUPS if getattr(arguments, name, None)]
    if given and twice:
        raise BlockError(
            f"--{twice[0].replace('_', '-')} is {getattr(arguments, twice[0])} and --block-schedule takes the place of "
            f"Megatron's warmup and decay; leave it out and give warmup_num_steps there"
        )
    return given


def megatron_arguments() -> Any:
    """Megatron's parsed arguments, or None where megatron.training is not in use or has parsed none yet."""
    try:
        return upstream_megatron.global_arguments()
    except PatchError as error:
        raise BlockError(str(error)) from error


class ChooseOptimizer(argparse.Action):
    """``--optimizer``: ours are Adams to the rest of Megatron, which checks that name in many places."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        global _asked
        setattr(namespace, self.dest, "adam" if values in KINDS else values)
        namespace.blockwise_optimizer = _asked = values if values in KINDS else None


class BlockValues(argparse.Action):
    """``BLOCK=NUMBER …``, each block type once; own blocks are those of a --block-rules before it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        names = [name for name, _ in values]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise argparse.ArgumentError(self, f"{twice} is given twice; give each block type, and a preset, once")
        own = own_blocks(user_rules(getattr(namespace, "block_rules", None)))
        option = {self.dest: dict(values)}
        try:
            # a ratio that is still to come may be missing
            stated = {name: 1.0 if ratio is None else ratio for name, ratio in own.items()}
            OptimizerOptions.checked(option, own=stated, config=ANY_SIZE)
        except BlockError as error:
            hint = (
                "; blocks of your own come from a --block-rules before it" if "unknown block type" in str(error) else ""
            )
            raise argparse.ArgumentError(self, f"{error}{hint}") from None
        setattr(namespace, self.dest, dict(values))


class CheckedPairs(argparse.Action):
    """``KEY=VALUE …`` as one mapping.

    Args:
        check: takes the pairs, and returns the mapping or raises BlockError.
    """

    def __init__(
        self, *arguments: Any, check: Callable[[Sequence[tuple[str, Any]]], dict[str, Any]], **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.check = check

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        try:
            setattr(namespace, self.dest, self.check(values))
        except BlockError as error:
            raise argparse.ArgumentError(self, str(error)) from None


def _schedule_of(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    given = dict(pairs)
    if len(given) < len(pairs):
        raise BlockError("give one type, and each setting once")
    BlockSchedule.checked(given)
    return given


def _muon_of(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    given = dict(pairs)
    muon.checked_options(given)
    return given


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds our choices to ``--optimizer`` and our flags to Megatron's parser."""
    global _asked
    _asked = None
    choice = next(action for action in parser._actions if "--optimizer" in action.option_strings)
    choice.choices = [*(choice.choices or ()), *KINDS]
    choice.__class__ = ChooseOptimizer
    parser.set_defaults(blockwise_optimizer=None)
    parser.usage = "%(prog)s FLAGS, listed by --help"  # else 1,500 lines of it stand before an error's sentence
    _fix_help(parser)
    group = parser.add_argument_group(title="blockwise learning rates")
    group.add_argument(
        "--block-lr-ratios",
        nargs="+",
        type=_ratio,
        action=BlockValues,
        metavar="BLOCK=RATIO",
        help="Peak learning rate of block types over --lr; all decay to the same --min-lr. Default: embedding=10, which the "
        "head follows, and 1 for all else. Or a preset, paper for embedding=10 qk=8 ffn=6 vo=4 norm=1, those of muP with "
        f"base_hidden_size=256 (and base_num_layers=8) beside it: {', '.join(PRESETS)}.",
    )
    group.add_argument(
        "--block-weight-decay",
        nargs="+",
        type=_pair,
        action=BlockValues,
        metavar="BLOCK=DECAY",
        help="Weight decay of block types, in what decays by Megatron's rule, and of norms where they are "
        "named; --weight-decay for the others.",
    )
    group.add_argument(
        "--block-rules",
        type=_rules_file,
        metavar="FILE",
        help='JSON file with rules of your own: [{"match": "*.adapter.*", "block": "ffn"}], or of rates: '
        '[{"match": "*.vision_model.*", "lr_ratio": 0.1}].',
    )
    group.add_argument(
        "--block-strict",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Stop where a parameter matches no rule; otherwise it trains at --lr.",
    )
    group.add_argument(
        "--adam-mini-row-sums",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Sum Adam-mini's rows over tensor-parallel ranks, so that TP does not change the result; "
        "otherwise each rank's part of a row has a second moment of its own.",
    )
    group.add_argument(
        "--accept-mismatch",
        nargs="+",
        choices=_ACCEPTABLE,
        metavar="NAME",
        help=f"In what a loaded checkpoint may contradict this run: {', '.join(_ACCEPTABLE)}.",
    )
    group.add_argument(
        "--ratio-fade-steps",
        type=_steps,
        default=0,
        metavar="N",
        help="Iterations over which accepted new ratios take over from the checkpoint's; 0: at once.",
    )
    group.add_argument(
        "--block-clip",
        nargs="+",
        type=_limit,
        action=BlockValues,
        metavar="BLOCK=NORM",
        help="Largest gradient norm of block types, each over the whole model, after --clip-grad; or, as in embedding=90%%, "
        "that percentile of the block type's last 1,000 norms.",
    )
    group.add_argument(
        "--block-schedule",
        nargs="+",
        type=_setting,
        action=CheckedPairs,
        check=_schedule_of,
        metavar="TYPE KEY=VALUE",
        help="In place of Megatron's warmup and decay: a scheduler type as in a ds_config and its settings, as in BlockwiseWSD "
        "total_num_steps=50000 warmup_num_steps=1000. Steps are iterations; the minimum is --min-lr.",
    )
    group.add_argument(
        "--block-metrics-interval",
        type=_interval,
        metavar="N",
        help="Iterations between two reports of every block type's second moments, gradients, weights and updates, in the log, "
        "TensorBoard and Weights & Biases.",
    )
    muon.note_defaults(parser)
    group.add_argument(
        "--block-muon",
        nargs="+",
        type=_setting,
        action=CheckedPairs,
        check=_muon_of,
        metavar="KEY=VALUE",
        help="Muon's own options, for blockwise_muon and blockwise_muon_mini: momentum=0.95 nesterov=true ns_steps=5 "
        "matrix_scale=match_rms_adamw (or original). Everything else is set as for the other optimizers.",
    )
    sequence_length.add_arguments(parser)
    guard_flags.add_arguments(parser)
    return parser


def _fix_help(parser: argparse.ArgumentParser) -> None:
    """Escapes lone percent signs in Megatron's help texts (0.19.2 has one), with which --help fails."""
    for action in parser._actions:
        if action.help is None:
            continue
        try:
            parser._get_formatter()._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = action.help.replace("%", "%%")


def _pair(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not BLOCK=NUMBER, as in embedding=10") from None


def _setting(text: str) -> tuple[str, Any]:
    """``KEY=VALUE``, a value being JSON or a word; a word alone is the type."""
    name, equals, value = text.partition("=")
    if not equals:
        return "type", name
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _ratio(text: str) -> tuple[str, float | str]:
    return _pair(text) if "=" in text else ("preset", text)


def _limit(text: str) -> tuple[str, float | str]:
    name, _, value = text.partition("=")
    pair = (name, value) if value.endswith("%") else _pair(text)
    return _checked(pair, lambda: clip_limits(dict([pair])))


def _steps(text: str) -> int:
    try:
        return OptimizerOptions.checked({"ratio_fade_steps": int(text)}).ratio_fade_steps
    except ValueError:  # BlockErrors are such, too
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of iterations, 0 or above") from None


def _interval(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of iterations, 1 or above")
    return int(text)


def _rules_file(path: str) -> tuple[dict, ...]:
    try:
        with open(path) as file:
            rules = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"cannot read block rules from {path!r}: {error}") from None
    if not isinstance(rules, list):
        raise argparse.ArgumentTypeError(f'{path!r} holds no list; write [{{"match": "*.adapter.*", "block": "ffn"}}]')
    return _checked(tuple(rules), lambda: user_rules(rules))


def _checked(value: Any, check: Any) -> Any:
    try:
        check()
    except BlockError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return value
