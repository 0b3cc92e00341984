"""Deliberate errors in adapters of pipelines, and in what they do to models."""

from tests.mutations.mutation import Mutation

TESTS = "loaders/test_lora.py"
MUTATIONS = [
    Mutation(
        "adapters: parts for a component that is not there load into nothing, and nobody hears of it",
        "loaders/lora.py",
        "if len(absent) == len(weights):",
        "if False:",
        f"{TESTS}::test_parts_for_components_that_a_pipeline_lacks_are_left_out_loudly",
    ),
    Mutation(
        "adapters: those of an earlier model in a folder are loaded with the new one",
        "loaders/lora.py",
        "(folder / LORA_FOLDER / LORA_INDEX).unlink(missing_ok=True)",
        "pass",
        f"{TESTS}::test_a_pipeline_saved_with_an_adapter_says_so_and_loads_with_it",
    ),
    Mutation(
        "adapters: one that is fused into one component is not saved for the others",
        "loaders/lora.py",
        "name not in adapters.fused_names(model)",
        "name not in self.fused_loras",
        f"{TESTS}::test_an_adapter_fused_into_one_component_is_saved_for_the_others",
    ),
    Mutation(
        "adapters: one that was left out when others were fused counts in the saved pipeline",
        "models/adapters.py",
        "return [name for name in adapter_names(model) if name in fused_names(model)]",
        "return adapter_names(model)",
        f"{TESTS}::test_a_pipeline_saved_with_one_adapter_fused_and_another_left_out_draws_the_same_again",
    ),
    Mutation(
        "adapters: words of one that does not count are known",
        "models/adapters.py",
        "for name in active_adapters(model) if _has_weight(layers, name)",
        "for name in adapter_names(model) if _has_weight(layers, name)",
        f"{TESTS}::test_words_of_an_adapter_are_known_as_long_as_it_counts",
    ),
    Mutation(
        "adapters: words of one of weight 0 are known",
        "models/adapters.py",
        "for name in active_adapters(model) if _has_weight(layers, name)",
        "for name in active_adapters(model)",
        f"{TESTS}::test_words_of_an_adapter_of_weight_0_are_unknown",
    ),
    Mutation(
        "adapters: words of one that was fused with weight 0 are known",
        "models/adapters.py",
        "for name in fused.names if _has_weight(layers, name)",
        "for name in fused.names",
        f"{TESTS}::test_words_of_an_adapter_that_is_fused_with_weight_0_stay_unknown",
    ),
    Mutation(
        "adapters: words of one that is left out of fusing are known",
        "models/adapters.py",
        "layers = [layer for *_, layer in adapter_layers(model)]",
        "layers = [entry[2] for entry in _fused_layers(model) or adapter_layers(model)]",
        f"{TESTS}::test_words_of_an_adapter_that_was_not_fused_with_others_are_unknown_meanwhile",
    ),
    Mutation(
        "adapters: a pickle is read",
        "loaders/lora_files.py",
        'if path.suffix != ".safetensors":',
        "if False:",
        f"{TESTS}::test_an_adapter_of_another_model_is_refused_and_leaves_no_trace",
    ),
    Mutation(
        "adapters: fusing changes weights that another stage uses",
        "models/adapters.py",
        "_keep_lent(model, base, fused)",
        "pass",
        f"{TESTS}::test_fusing_into_one_stage_leaves_the_one_that_shares_its_weights_alone",
    ),
    Mutation(
        "adapters: a damaged one stays",
        "models/adapters.py",
        "        delete_adapters(model, [name])\n        activate(model, active)",
        "        activate(model, active)",
        f"{TESTS}::test_an_error_within_peft_leaves_no_trace",
    ),
    Mutation(
        "adapters: unfusing takes out those that were fused and unloaded earlier",
        "models/adapters.py",
        "fused.before[base, name] = parameter if (base, name) in fused.kept else None",
        "fused.before[base, name] = None",
        f"{TESTS}::test_unfusing_leaves_an_adapter_that_was_fused_and_unloaded_earlier",
    ),
    Mutation(
        "adapters: unfusing brings back weights in the number format that the model had",
        "models/adapters.py",
        "base._parameters[name] = _as_now(parameter, base._parameters[name])",
        "base._parameters[name] = parameter",
        f"{TESTS}::test_models_may_be_moved_while_adapters_are_fused",
    ),
    Mutation(
        "adapters: the scale of fusing stays after unfusing",
        "models/adapters.py",
        "layer.scaling.update(scalings)",
        "pass",
        f"{TESTS}::test_what_is_fused_is_left_alone_until_it_is_unfused",
    ),
    Mutation(
        "adapters: a model saved after fusing lends the fused weights when it is loaded",
        "models/cogview2/modeling_coglm_canvas.py",
        'return any(getattr(parameter, "lender_is_fused", False) for parameter in lent)',
        "return False",
        f"{TESTS}::test_a_pipeline_saved_with_a_fused_adapter_holds_it_in_its_weights",
    ),
    Mutation(
        "adapters: a kept step goes on with an old weight",
        "generation/decoders.py",
        'str(own.get("scaling"))',
        '""',
        f"{TESTS}::test_a_weight_that_changes_counts_in_steps_that_are_kept",
    ),
]
