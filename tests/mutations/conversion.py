"""Deliberate errors in the conversion of released files."""

from tests.mutations.mutation import Mutation

MUTATIONS = [
    Mutation(
        "image tokenizer: decoders in the opposite order",
        "conversion/cogview2/layout.py",
        '_DECODER_RATES = {"0": "16", "1": "8", "2": "4"}',
        '_DECODER_RATES = {"0": "4", "1": "8", "2": "16"}',
        "parity/cogview2/test_image_tokenizer.py",
    ),
    Mutation(
        "reader: a tensor beyond its declared storage",
        "conversion/reader.py",
        "last >= min(held, self.num_elements)",
        "last >= held",
        "conversion/test_reader.py::test_a_tensor_that_reaches_beyond_its_declared_storage_is_refused",
    ),
    Mutation(
        "reader: what pickles ask for is not refused",
        "conversion/reader.py",
        'if module.split(".")[0] in sys.stdlib_module_names and path not in _PLAIN_LIBRARY:',
        "if False:",
        "conversion/test_reader.py::test_pickles_that_run_commands_are_refused_and_not_run",
    ),
    Mutation(
        "reader: views are read as if they were whole",
        "conversion/reader.py",
        ".as_strided(self.shape, self.stride).contiguous()",
        "[: math.prod(self.shape)].view(self.shape)",
        "conversion/test_reader.py::test_views_empty_and_scalar_tensors_are_read",
    ),
    Mutation(
        "writer: what is there already does not count on the disk",
        "conversion/writer.py",
        ".free + there < total",
        ".free < total",
        "conversion/test_writer.py::test_what_an_interrupted_run_wrote_needs_no_room_again",
    ),
    Mutation(
        "writer: a hash without the tensors",
        "conversion/writer.py",
        "whole.update(data)",
        "whole.update(data[:8])",
        "conversion/cogview2/test_to_pipeline.py::test_verify_names_files_that_changed",
    ),
    Mutation(
        "writer: values too large for a dtype become infinite",
        "conversion/writer.py",
        "if not torch.equal(converted.isfinite(), values.isfinite()):",
        "if False:",
        "conversion/cogview2/test_to_pipeline.py::test_values_that_a_dtype_cannot_hold_are_refused",
    ),
    Mutation(
        "writer: shards of other files are kept",
        "conversion/writer.py",
        'if progress["source"] == source and all(',
        "if all(",
        "conversion/cogview2/test_to_pipeline.py::test_what_was_begun_from_other_files_is_not_continued",
    ),
    Mutation(
        "job: a component of other files is taken for done",
        "conversion/job.py",
        'if entry is None or entry["source_id"] != source:',
        "if entry is None:",
        "conversion/cogview2/test_to_pipeline.py::test_a_component_of_other_files_is_never_replaced",
    ),
    Mutation(
        "backbone: shared although it differs",
        "conversion/cogview2/to_pipeline.py",
        "if key not in tensors or hash_tensor(tensors[key]) != hashes[key]:",
        "if key not in tensors:",
        "conversion/cogview2/test_to_pipeline.py::test_a_backbone_that_differs_in_one_element_is_stored_in_full",
    ),
    Mutation(
        "index: transformers of another tokenizer make a pipeline",
        "conversion/cogview2/to_pipeline.py",
        "if set(starts.values()) != {start}:",
        "if False:",
        "conversion/cogview2/test_to_pipeline.py::test_transformers_of_another_text_tokenizer_make_no_pipeline",
    ),
    Mutation(
        "CogView: the third norm is taken for the second",
        "conversion/cogview/layout.py",
        '    "third_layernorm": "attention_output_layernorm",\n    "post_attention_layernorm": "mlp_layernorm",',
        '    "third_layernorm": "mlp_layernorm",\n    "post_attention_layernorm": "attention_output_layernorm",',
        "parity/cogview/test_model.py::test_text_to_image_is_the_originals",
    ),
    Mutation(
        "CogView: ranks of queries, keys and values are joined as rows",
        "conversion/cogview/layout.py",
        '"attention.query_key_value.weight": "thirds",',
        '"attention.query_key_value.weight": "rows",',
        "conversion/cogview/test_conversion_cogview.py::test_two_ranks_are_merged_into_the_tensors_of_one",
    ),
    Mutation(
        "CogView: codes are rows in the release",
        "conversion/cogview/layout.py",
        'TRANSPOSED = ("quantize.embed.weight", "quantize.embed_avg")',
        'TRANSPOSED = ("quantize.embed_avg",)',
        "conversion/cogview/test_conversion_cogview.py",
    ),
]
