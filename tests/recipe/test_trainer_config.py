"""The keys of every recipe: ArcticTraining's are all there, and batches add up."""

import pytest
from pydantic import ValidationError

from arctic_like.config.docs import attribute_docs
from arctic_like.errors import RecipeError
from arctic_like.trainer.config import TrainerConfig, resolve_batch

ARCTIC_TRAINING = """
type code skip_validation epochs train_iters micro_batch_size
gradient_accumulation_steps sequence_parallel_size expert_parallel_size seed eval_interval
eval_log_iter_interval loss_log_interval train_log_iter_interval train_log_metrics_path
exit_iteration exit_iteration_this_run min_iterations overfit_first_batch kill_switch_path
mem_profiler mem_profiler_dir mem_profiler_max_entries activation_checkpoint_cpu_offload
tiled_mlp_compute deepspeed model tokenizer data optimizer scheduler checkpoint logger wandb
arctic_moe
"""
OURS = """
output_dir overwrite device deterministic global_batch_size eval_at_start eval_at_end
trackers callbacks allow_changes exporters metric_monitor test_at_end test_only
"""


def test_all_keys_are_declared_and_documented():
    fields = TrainerConfig.model_fields
    assert {*ARCTIC_TRAINING.split(), *OURS.split()} == fields.keys()
    assert all(attribute_docs(TrainerConfig).get(key) for key in fields)
    for declared in (TrainerConfig.not_yet, TrainerConfig.no_effect):
        assert declared.keys() <= fields.keys()


def test_defaults():
    config = TrainerConfig()
    assert (config.seed, config.epochs, config.train_iters) == (42, 1, 0)
    assert (config.micro_batch_size, config.gradient_accumulation_steps) == (1, 1)
    assert str(config.train_log_iter_interval) == "1"
    assert not config.eval_interval
    assert config.logger.print_output_ranks == [0]


@pytest.mark.parametrize(
    ("world", "micro", "accumulation", "total", "expected"),
    [
        (1, 8, None, 8, (1, 8)), (2, 2, None, 8, (2, 8)), (1, 2, 4, None, (4, 8)),
        (4, 2, 3, None, (3, 24)), (3, 2, None, 8, (2, 8)), (2, 1, 4, 8, (4, 8)),
        (16, 1, None, 8, (1, 8)),
    ],
)  # fmt: skip
def test_batches_add_up(world, micro, accumulation, total, expected):
    batch = resolve_batch(
        world,
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        global_batch_size=total,
    )
    assert (batch.gradient_accumulation_steps, batch.global_batch_size) == expected
    # enough room for every sample, and not a whole accumulation step too much
    room = batch.gradient_accumulation_steps * micro * world
    assert room >= batch.global_batch_size > room - micro * world


def test_batches_that_do_not_add_up():
    config = TrainerConfig(micro_batch_size=2, gradient_accumulation_steps=2, global_batch_size=8)
    assert config.resolve_batch(2).gradient_accumulation_steps == 2
    with pytest.raises(RecipeError, match=r"2 × 2 × 1 = 4") as caught:
        config.resolve_batch(1)
    assert caught.value.problems[0].place == "global_batch_size"
    with pytest.raises(ValidationError, match=r"no multiple .*3 = 6"):
        TrainerConfig(micro_batch_size=2, gradient_accumulation_steps=3, global_batch_size=8)


def test_wandb_twice():
    from arctic_like.recipe import load_recipe

    with pytest.raises(RecipeError, match="names wandb too"):
        load_recipe(
            {"type": "test_scene", "wandb": {"enable": True}, "trackers": [{"type": "wandb"}]}
        )
