"""The rows of the table of what is supported; see support.py."""

from collections.abc import Callable

from support import Row, both, each

ADAMW, MINI, LION = "BlockwiseAdamW", "BlockwiseAdamMini", "BlockwiseLion"
_PARITY, _CHECK = "tests/deepspeed_door/test_parity.py::", "tests/deepspeed_door/test_checkpoint.py::"
_PARALLEL, _ORDER = "tests/deepspeed_door/test_parallel.py::", "tests/deepspeed_door/test_order.py::"
_FEATURES = "tests/deepspeed_door/test_features.py::"
_FSDP, _CONTRACT = "tests/optim/test_fsdp.py::", "tests/optim/test_contract.py::"
_RATES, _REFUSALS = "tests/megatron_door/test_rates_and_decays.py::", "tests/megatron_door/test_refusals.py::"
_LENGTHS = "tests/sequence_length/"
_MEGATRON, _SAVED = "tests/megatron_door/test_megatron_parity.py::", "tests/megatron_door/test_megatron_checkpoint.py::"


def _stage(stage: int) -> dict[str, str]:
    return each(lambda kind: rf"{_PARITY}test_equals_the_unfused_twin\[{kind}-\w+-{stage}-")


def _layout(layout: str) -> dict[str, str]:
    """Parity on megatron-core of a model and layout."""
    return each(lambda kind: rf"{_MEGATRON}test_equals_the_single_process_twin\[{kind}-{layout}\]")


MUON, MUON_MINI = "BlockwiseMuon", "BlockwiseMuonMini"
_MUON, _MEGATRON_MUON = "tests/deepspeed_door/test_deepspeed_muon.py::", "tests/megatron_door/test_megatron_muon.py::"
# by what stands in their tests' names
_MUON_LAYOUTS = {
    "TP": "tp2",
    "TP and the distributed optimizer": "tp2.distributed",
    "TP and PP": "tp2.pp2",
    "TP and SP": "tp2.sp",
    "TP, SP, EP and the distributed optimizer": "tp2.ep2.sp.distributed",
    "virtual stages and the distributed optimizer": "pp2.vpp2.distributed",
    "bf16, TP": r"tp2(?:.distributed)?.bf16",
}


def _muons(test: Callable[[str], str]) -> dict[str, str]:
    return {kind: test(kind) for kind in (MUON, MUON_MINI)}


def _megatron_muon(layout: str) -> Callable[[str], str]:
    return lambda kind: rf"{_MEGATRON_MUON}test_(?:equals|steps)\w+\[{kind}-\w+-\d-{layout}\]"


SECTIONS = {
    "PyTorch": [
        Row("one process, DDP", each("tests/optim/test_step.py::test_any_cut_gives_the_unsharded_step")),
        Row("copy.deepcopy, pickle, torch.save", each(rf"{_CONTRACT}test_copies_go_on_as_the_original\[")),
        Row(
            "add_param_group, unfreezing later",
            each(rf"{_CONTRACT}(?:test_a_group_added_later|test_parameters_can_be_unfrozen)"),
        ),
        Row("non-contiguous parameters and gradients", each(f"{_CONTRACT}test_parameters_and_gradients_need_not")),
        Row(
            "complex parameters",
            {
                **each(lambda name: f"!{_CONTRACT}test_other_rules_refuse_complex_parameters.*{name}"),
                ADAMW: f"{_CONTRACT}test_complex_parameters",
            },
        ),
        Row("sparse gradients", each(f"!{_CONTRACT}test_sparse_gradients_are_refused"), "as torch's AdamW"),
        Row("torch.compile(optimizer.step)", each(f"{_CONTRACT}test_compiled_steps"), "a graph break: not compiled"),
        Row(
            "learning-rate schedulers of torch",
            both("tests/optim/test_schedule.py::test_another_scheduler_after_ours"),
        ),
        Row("FSDP2 (fully_shard)", each(f"{_FSDP}test_sharded_parameters_train")),
        Row("HSDP (fully_shard on a two-dimensional mesh)", each(f"{_FSDP}test_hybrid_sharding")),
        Row(
            "FSDP2, state dicts and torch.distributed.checkpoint, resharded",
            each(f"{_FSDP}test_checkpoints_resume_and_reshard"),
        ),
        Row("FSDP2, full state dicts", each(f"{_FSDP}test_full_states_of_sharded")),
        Row("FSDP1", both(f"!{_FSDP}test_fsdp1_is_refused")),
        Row("DTensors of tensor parallelism", both(f"!{_FSDP}test_other_placements_are_refused")),
        Row(
            "Accelerate, gradient accumulation",
            {ADAMW: "tests/hugging_face/test_trainer.py::test_accelerate_steps_the_schedule"},
        ),
        Row(
            "Hugging Face Trainer, DDP",
            {
                ADAMW: "tests/hugging_face/test_trainer.py::test_a_resumed_run.*DDP AdamW",
                MINI: "tests/hugging_face/test_trainer.py::test_a_resumed_run.*DDP Adam-mini",
                LION: "tests/hugging_face/test_trainer.py::test_a_resumed_run.*DDP Lion",
            },
        ),
    ],
    "DeepSpeed": [
        *(Row(f"ZeRO-{stage}", _stage(stage)) for stage in range(4)),
        Row(
            "bf16, fp16",
            each(rf"{_PARITY}test_low_precision_follows_the_twin\["),
            "bounded by rounding; AdamW in bf16 also equals torch's inside DeepSpeed",
        ),
        Row(
            "CPU offload of the optimizer, round_robin_gradients, overlap_comm, sub_group_size, small buckets",
            both("tests/fuzz/test_fuzz.py::test_random_configurations"),
            "`make fuzz`",
        ),
        Row(
            "offload_param and offload_optimizer to CPU, zero_hpz_partition_size, leaf modules, reduce_scatter off",
            each(rf"{_FEATURES}test_a_switch_of_zero_changes_no_weight\["),
        ),
        Row("zero.Init", each(rf"{_FEATURES}test_models_made_under_zero_init\[")),
        Row(
            "torch_autocast, immediate_grad_update, communication_data_type",
            {ADAMW: f"{_FEATURES}test_low_precision_switches_equal_torch"},
        ),
        Row(
            "NVMe or partial offload, ZenFlow, SuperOffload, elastic checkpoints, low-precision master weights",
            each(rf"!{_FEATURES}test_what_another_optimizer_would_step_is_refused\["),
        ),
        Row("ZeRO++ quantization, AutoEP, DeepCompile, hybrid engine, amp", {}, "most need a GPU"),
        Row("checkpoints, same layout", each(rf"{_CHECK}test_a_resumed_run_goes_on_to_the_bit\[")),
        Row(
            "checkpoints, other ranks and stages (universal)",
            each(rf"{_CHECK}test_universal_checkpoints_continue_anywhere\["),
        ),
        Row(
            "checkpoints, another order of parameters",
            both(f"!{_ORDER}test_another_order_is_refused"),
            "universal ones go by names",
        ),
        Row("round_robin_gradients, converted to universal", both(f"{_ORDER}test_any_order_is_converted_rightly")),
        Row(
            "safe_get/set_full and _local_optimizer_state",
            both("tests/deepspeed_door/test_state_access.py::test_(?:getting|local_forms)"),
        ),
        Row("pipelines (PipelineModule), resumed", each(rf"{_CHECK}test_a_pipeline_resumes_to_the_bit\[")),
        Row(
            "AutoTP",
            {
                ADAMW: f"{_PARALLEL}test_autotp_with_adamw_equals",
                MINI: rf"!{_PARALLEL}test_autotp_is_refused.*\[BlockwiseAdamMini",
            },
            "fused weights are refused",
        ),
        Row("MoE (deepspeed.moe)", each(lambda name: rf"{_PARALLEL}test_moe_and_ulysses_train.*{name}-.*'ep_size'")),
        Row("MoE, checkpoints", each(rf"{_PARALLEL}test_moe_and_ulysses_resume_to_the_bit\[(?=.*'ep_size')")),
        Row(
            "Ulysses sequence parallelism through an mpu",
            each(lambda name: rf"{_PARALLEL}test_moe_and_ulysses_train.*{name}-.*'mpu'"),
        ),
        Row("Ulysses through mesh_param", both(f"!{_PARALLEL}test_ulysses_through_mesh_param_is_refused")),
        Row(
            "ranks with different models or settings",
            both("!tests/deepspeed_door/test_agreement.py::test_a_rank_that_differs"),
        ),
        Row("Megatron models, TP or PP with ZeRO", both("tests/megatron_door/test_inside_deepspeed.py::")),
    ],
    "Megatron (0.16 and 0.19)": [
        Row("data parallel", _layout(r"gpt-\d-dp")),
        Row("--use-distributed-optimizer", _layout("gqa-2-distributed")),
        Row("--tensor-model-parallel-size", _layout("gqa-2-tp2")),
        Row("query groups that TP ranks share (0.19)", _layout("shared_group-2-tp2")),
        Row("--sequence-parallel", _layout("gpt-2-tp2.sp")),
        Row("--context-parallel-size", _layout("gqa-4-cp2.distributed")),
        Row("--pipeline-model-parallel-size", _layout("gqa-2-pp2")),
        Row("virtual pipeline stages", _layout("gqa-2-pp2.vpp2")),
        Row("--expert-model-parallel-size", _layout("moe-4-ep2.distributed")),
        Row("--expert-tensor-parallel-size", _layout("moe-4-tp2.ep2.etp2.sp.distributed")),
        Row("--num-distributed-optimizer-instances", _layout("moe-4-ep2.instances2.distributed")),
        Row("MLA, MTP", _layout("deepseek-4-tp2.sp.distributed")),
        Row("gated delta nets", _layout("delta-4-tp2.sp.distributed")),
        Row("bf16", each(rf"{_MEGATRON}test_bf16_steps_equal_the_twins_on_the_same_gradients\[")),
        Row(
            "checkpoints, same layout (torch_dist and torch)",
            each(rf"{_SAVED}test_the_same_layout_resumes_to_the_bit\["),
        ),
        Row(
            "checkpoints, other TP, PP, DP, virtual stages",
            each(rf"{_SAVED}test_another_layout_goes_on_as_the_first\["),
        ),
        Row(
            "rates logged and used where groups differ (--use-mup)",
            {ADAMW: f"{_RATES}test_the_rates_of_an_optimizer"},
            "the flag itself on 0.19: test_pretrain.py",
        ),
        Row("--block-weight-decay with --apply-wd-to-qk-layernorm", {ADAMW: f"{_RATES}test_block_weight_decay"}),
        Row("--use-torch-fsdp2", both(f"!{_REFUSALS}test_fsdp2_is_refused_on_every_rank")),
        Row(
            "--use-megatron-fsdp, --optimizer-cpu-offload, --use-precision-aware-optimizer, --decoupled-lr, "
            "--fp8-param-gather, --optimizer-cuda-graph and their like",
            both(f"!{_REFUSALS}test_flags_that_cannot_go_together_are_named"),
            "by the flag",
        ),
        Row("--overlap-grad-reduce, --overlap-param-gather", _layout("gqa-2-distributed.overlap")),
        Row("--fp16, --fp8-format", {}),
        Row(
            "checkpoints of Megatron's Adam, and for it",
            {ADAMW: f"{_SAVED}test_(?:plain_adam_goes|blockwise_adamw_goes)"},
        ),
    ],
    "Muon": [
        Row(
            "one process",
            {
                MUON: "tests/optim/test_muon.py::test_it_is_torchs",
                MUON_MINI: "tests/optim/test_muon.py::test_the_other_half",
            },
        ),
        Row(
            "FSDP2",
            {
                MUON: r"tests/optim/test_muon.py::test_matrices_that_fsdp\w+\[mesh0",
                MUON_MINI: "tests/optim/test_muon.py::test_the_other_half",
            },
        ),
        Row("HSDP", {MUON: r"tests/optim/test_muon.py::test_matrices_that_fsdp\w+\[mesh2"}),
        *(
            Row(
                f"ZeRO-{stage}",
                _muons(lambda kind, stage=stage: rf"{_MUON}test_(?:cut|it_trains)\w+\[{kind}-\w+-{stage}-"),
            )
            for stage in range(4)
        ),
        Row("checkpoints, same layout", _muons(lambda kind: rf"{_MUON}test_a_resumed_run\w+\[{kind}-")),
        Row("checkpoints, other ranks and stages", _muons(lambda kind: rf"{_MUON}test_universal\w+\[{kind}-")),
        Row("pipelines (PipelineModule), resumed", {MUON: f"{_MUON}test_a_pipeline"}),
        Row("AutoTP", {MUON: f"!{_MUON}test_slices_that_deepspeed"}),
        *(Row(f"Megatron {name}", _muons(_megatron_muon(layout))) for name, layout in _MUON_LAYOUTS.items()),
        Row("Megatron models, TP with ZeRO", {MUON: f"{_MEGATRON_MUON}test_megatron_layers_inside"}),
        Row("Megatron checkpoints", _muons(lambda kind: rf"{_MEGATRON_MUON}test_a_checkpoint_goes\w+\[{kind}-")),
    ],
    "Beside the optimizer": [
        Row("sequence length warmup, ZeRO 0 to 3", {ADAMW: f"{_LENGTHS}test_deepspeed.py::test_trains_and_resumes"}),
        Row("the same, PipelineModule", {ADAMW: f"{_LENGTHS}test_deepspeed.py::test_a_pipeline_trains"}),
        Row("the same, Trainer", {ADAMW: f"{_LENGTHS}test_length_trainer.py::test_trains_and_resumes"}),
        Row(
            "the same, Megatron's TP, SP, PP, CP, virtual stages", {ADAMW: f"{_LENGTHS}test_megatron.py::test_loss_and"}
        ),
        Row("block_clip, ZeRO 0 to 3", each("tests/optim/test_clipping.py::test_in_deepspeed_it_is_the_twins")),
        Row("block_clip, Megatron", each("tests/megatron_door/test_block_clip.py::test_norms_are_those")),
        Row("block_metrics, ZeRO 1 to 3", each("tests/measure/test_monitor.py::test_a_ds_config_writes")),
        Row("--block-metrics-interval, TP, PP, CP, EP", {ADAMW: "tests/megatron_door/test_megatron_metrics.py::"}),
        Row("guard, ZeRO-2 and 3", {ADAMW: "tests/measure/test_guard.py::test_an_engine_goes_back"}),
        Row(
            "guard, Trainer",
            {ADAMW: "tests/hugging_face/test_trainer_guard.py::test_(?:rates|it_saves)"},
            "Megatron's --guard on 0.19: test_megatron_guard.py",
        ),
        Row("sharpness, DeepSpeed and FSDP2", {ADAMW: "tests/measure/test_estimates.py::test_(?:ranks_find|sharded)"}),
        Row(
            "sharpness, Megatron's TP, SP, PP, CP, EP",
            {ADAMW: "tests/megatron_door/test_megatron_sharpness.py::test_(?:sharded|experts)"},
        ),
        Row("preemption and restart", {ADAMW: "tests/deepspeed_door/test_preemption.py::test_a_signal"}),
        Row("blockwise-lr submit, Slurm", {ADAMW: "tests/jobs/test_slurm.py::"}, "where Slurm is installed"),
    ],
}
