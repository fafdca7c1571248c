"""A student's rows in the tokens of a teacher with another tokenizer."""
