"""Deliberate errors in losses and scores."""

from tests.mutations.mutation import Mutation

MUTATIONS = [
    Mutation(
        "caption loss: a sum over tokens",
        "evaluation/likelihood.py",
        "(token_losses.sum(1) / labelled.sum(1))",
        "token_losses.sum(1)",
        "evaluation/test_likelihood.py::test_the_loss_is_the_mean_over_the_text_tokens_of_each_pair",
    ),
    Mutation(
        "caption loss: in the order of lengths",
        "evaluation/likelihood.py",
        "losses[pairs] = (token_losses",
        "losses[batch] = (token_losses",
        "evaluation/test_likelihood.py::test_the_loss_of_a_pair_does_not_depend_on_its_batch",
    ),
    Mutation(
        "caption loss: all texts are English",
        "evaluation/likelihood.py",
        "languages = [tokenizer.language(text_ids) for text_ids in ids]",
        'languages = ["en" for text_ids in ids]',
        "evaluation/test_likelihood.py",
    ),
    Mutation(
        "image loss: of logits one place too early",
        "evaluation/likelihood.py",
        "torch.arange(first, first + layout.image_length, device=device)",
        "torch.arange(first - 1, first - 1 + layout.image_length, device=device)",
        "pipelines/cogview2/test_pipeline_cogview2_caption.py::test_image_losses_are_those_of_text_to_image",
    ),
    Mutation(
        "CLIP: long texts are not cut",
        "evaluation/embedding_scores.py",
        "truncation=True",
        "truncation=False",
        "evaluation/test_embedding_scores.py::test_clip_reads_what_it_can_of_a_long_text_and_wants_a_text_for_each_picture",
    ),
    Mutation(
        "estimates: pictures that are there are made again",
        "evaluation/estimates.py",
        "sum(run.num_missing(block) for block in blocks)",
        "sum(run.num_rows(block) for block in blocks)",
        "evaluation/test_estimates.py::test_a_batch_is_made_and_kept_and_the_rest_is_told_from_it",
    ),
    Mutation(
        "estimates: of all shards",
        "evaluation/estimates.py",
        "run.blocks_left(shard)",
        "run.blocks_left()",
        "evaluation/test_estimates.py::test_of_a_shard_only_its_own_is_told",
    ),
    Mutation(
        "candidates: the best of all is chosen",
        "evaluation/candidates.py",
        "max(range(number), key=",
        "max(range(self.count), key=",
        "evaluation/test_candidates.py::test_the_best_of_the_first_so_many_is_chosen_by_each_scorer",
    ),
    Mutation(
        "candidates: captions share seeds",
        "evaluation/candidates.py",
        "self.seed + index * self.count + number",
        "self.seed + index + number",
        "evaluation/test_candidates.py::test_every_candidate_has_a_seed_of_its_own_and_is_drawn_once",
    ),
    Mutation(
        "requirements: too many of an object are no fault",
        "evaluation/requirements.py",
        "len(of(unwanted.label)) < unwanted.count",
        "True",
        "evaluation/test_requirements.py::test_numbers_are_at_least_what_is_included_and_less_than_what_is_excluded",
    ),
    Mutation(
        "requirements: counting takes unsure detections",
        "evaluation/requirements.py",
        "COUNTING_THRESHOLD if requirements.task == _COUNTING else THRESHOLD",
        "THRESHOLD",
        "evaluation/test_requirements.py::test_detections_count_if_they_are_sure_and_surer_where_numbers_are_asked_for",
    ),
    Mutation(
        "requirements: left is right",
        "evaluation/requirements.py",
        "found.add(names[distance > 0])",
        "found.add(names[distance < 0])",
        "evaluation/test_requirements.py::test_places_are_told_from_the_middles_beyond_a_tenth_of_the_sizes",
    ),
]
