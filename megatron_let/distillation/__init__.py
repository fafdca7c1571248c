"""Distillation from a teacher's logits, on vocabulary shards."""
