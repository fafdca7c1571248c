"""The only door to Megatron's insides: what is replaced there, and the reasons."""
