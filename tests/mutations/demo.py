"""Deliberate errors in the scenes, their scorer and measurements."""

from tests.mutations.mutation import Mutation

MUTATIONS = [
    Mutation(
        "scorer: objects in each other's place are right",
        "demo/scorer.py",
        '"position": reading.objects == scene.objects,',
        '"position": set(reading.objects) == set(scene.objects),',
        "demo/test_rendering_and_scorer.py::test_objects_in_each_others_place_cost_only_position",
    ),
    Mutation(
        "scenes: colours and shapes that are held out are trained on",
        "demo/scenes.py",
        "if colour % len(SHAPES) == SHAPES.index(concept.shape):",
        "if False:",
        "demo/test_scenes.py::test_split_is_the_known_one_in_both_readings",
    ),
    Mutation(
        "scenes: both readings of a pair are drawn for the validation apart",
        "demo/scenes.py",
        "told = scene.canonical()",
        "told = scene",
        "demo/test_scenes.py::test_both_readings_of_a_pair_are_kept_for_the_validation_or_neither",
    ),
    Mutation(
        "rendering: small pictures are sharpened",
        "demo/rendering.py",
        "Image.Resampling.BOX",
        "Image.Resampling.BICUBIC",
        "demo/test_rendering_and_scorer.py::test_small_picture_is_the_exact_mean_of_the_native_one",
    ),
    Mutation(
        "evaluation: shuffled pictures are their own",
        "demo/evaluation.py",
        "asked = [*cases[1:], *cases[:1]]",
        "pass",
        "cli/test_evaluate.py::test_true_pictures_have_full_marks_and_shuffled_ones_none",
    ),
    Mutation(
        "evaluation: the worst candidate is compared with the first",
        "demo/evaluation.py",
        ".argsort(dim=1, stable=True)[:, 0]",
        ".argsort(dim=1, stable=True)[:, -1]",
        "cli/test_evaluate.py::test_the_draft_with_the_lowest_caption_loss_is_the_best",
    ),
    Mutation(
        "editing: another background is right",
        "demo/editing.py",
        '"rest": reading.background == scene.background\n        and all(',
        '"rest": all(',
        "demo/test_editing.py::test_each_share_of_inpainting_falls_when_its_own_thing_is_wrong",
    ),
    Mutation(
        "captions: articles by letters instead of sounds",
        "demo/captions/templates.py",
        ' and not words.startswith(("uni", "use"))',
        "",
        "demo/test_captions.py::test_pair_has_the_templates_of_both_true_readings_with_articles_by_sound",
    ),
]
