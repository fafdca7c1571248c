"""The alignment of an early student layer with the teacher's states: losses, resize, attachment."""
