"""Evaluation of exported models: the field's harness, and the loss on text."""
