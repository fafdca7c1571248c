"""The losses with a teacher, and how they reach the student."""
