"""What a model wrote, held against what it should have written: numbers, programs, choices."""
