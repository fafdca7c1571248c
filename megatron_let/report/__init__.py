"""Finished runs, and how much a method saved: in numbers, a picture and a page."""
