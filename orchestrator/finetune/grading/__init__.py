"""Grading of generated answers: numbers, programs, choices, instructions."""
