"""A pre-training run on paper (`plan.plan`): arithmetic, without torch and without Megatron."""
