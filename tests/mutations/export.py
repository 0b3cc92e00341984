"""Deliberate errors in exported models and in what draws with them."""

from tests.mutations.mutation import Mutation

TESTS = "export/test_onnx.py"
SAME_TOKENS = f"{TESTS}::test_the_tokens_of_all_stages_are_those_of_the_pipeline"
MUTATIONS = [
    Mutation(
        "onnx: guidance leads the other way",
        "export/onnx_pictures.py",
        "(logits[:1] - logits[1:])",
        "(logits[1:] - logits[:1])",
        SAME_TOKENS,
    ),
    Mutation(
        "onnx: tokens stand one position too early",
        "export/onnx_pictures.py",
        'known["image_position"] + 1 + index)',
        'known["image_position"] + index)',
        SAME_TOKENS,
    ),
    Mutation(
        "onnx: cells of later passes are seen before their pass",
        "export/onnx_pictures.py",
        'np.where(step_map >= step, known["boi_token_id"], canvas)',
        'np.where(step_map == step, known["boi_token_id"], canvas)',
        SAME_TOKENS,
    ),
    Mutation(
        "onnx: noise of 23 bits",
        "export/onnx_pictures.py",
        "(bits & 0xFFFFFF)",
        "(bits & 0xFFFFFE)",
        f"{TESTS}::test_noise_is_that_of_a_generator_of_pytorch",
    ),
    Mutation(
        "onnx: files are not compared with what was written",
        "export/onnx_pictures.py",
        'if size != file["bytes"]:',
        "if False:",
        f"{TESTS}::test_a_file_that_was_cut_short_is_noticed",
    ),
]
